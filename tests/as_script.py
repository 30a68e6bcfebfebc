"""For the test files that also run as scripts, as in the original README: `python tests/test_lr_scheduling.py`."""

import sys

try:
    import pytest
except ImportError:
    sys.exit("error: the tests need pytest: python -m pip install pytest, or `./setup.sh test` for all of them")


def run(file: str) -> int:
    """Run the tests of one file; return pytest's exit code."""
    return int(pytest.main([file, "-v"]))
