"""Strangers' files: nothing but our own error comes out of a reader, and no file outside its directory.

The same inputs in each run; `python benchmarks/fuzz.py` tries more, and others.
"""

import pytest
from fuzz_inputs import tried
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings

# Crashes that are found and not fixed yet; `strict` has the test fail as soon as one is fixed.
OPEN = {
    "split lists": "captioning/splits.py, few(): control characters of names in split lists reach a note",
    "checkpoint fields": "captioning/checkpoints.py, load_checkpoint: KeyError where `decoding` is absent",
    "file of flags": "captioning/settings.py, config_flags: TypeError for a list in `explicit`, ValueError for 6,000 digits",
}
NAMES = [
    pytest.param(name, marks=[pytest.mark.xfail(reason=OPEN[name], strict=True)] if name in OPEN else [])
    for name in TARGETS
]


@pytest.mark.filterwarnings("ignore")  # Pillow and PyTorch warn of files that are odd, which these are
@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_our_own_error(name):
    @settings(derandomize=True, deadline=None, max_examples=150, database=None, suppress_health_check=list(HealthCheck))
    @given(TARGETS[name].inputs)
    def one(value):
        tried(TARGETS[name], value)

    one()
