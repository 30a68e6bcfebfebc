"""Strangers' files: nothing but our own error comes out of a reader, and no file outside its directory.

The same inputs in each run; `python benchmarks/stress.py --only fuzz` tries more, and others.
"""

import pytest
from fuzz_inputs import tried
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings


@pytest.mark.filterwarnings("ignore")  # Pillow and PyTorch warn of files that are odd, which these are
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_our_own_error(name):
    examples = 50 if name == "exported model" else 150  # whose graphs take long to load
    how = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    @settings(derandomize=True, max_examples=examples, **how)
    @given(TARGETS[name].inputs)
    def one(value):
        tried(TARGETS[name], value)

    one()
