"""Feed odd files to everything that reads files, and print what became of them.

    python benchmarks/fuzz.py                     # 2000 inputs for each reader: minutes
    python benchmarks/fuzz.py --examples 20000 --only archive "checkpoint bytes" --seed 7

The inputs and what has to hold of each are `tests/fuzz_targets.py`. Exit code 1 where something crashed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path += [str(Path(__file__).resolve().parent.parent / folder) for folder in ("", "tests")]

from fuzz_inputs import Target, tried
from fuzz_targets import TARGETS


def fuzz(target: Target, examples: int, first: int) -> tuple[Counter[str], list[str]]:
    """How many inputs were accepted, refused, or crashed the reader; and a traceback for each kind of crash."""
    counts: Counter[str] = Counter()
    crashes: dict[str, str] = {}

    @seed(first)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.inputs)
    def one(value: Any) -> None:
        try:
            counts["accepted" if tried(target, value) else "refused"] += 1
        except Exception as error:  # counted rather than raised: the others are to be tried too
            counts["crashed"] += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            crashes.setdefault(
                f"{type(error).__name__} {place.filename}:{place.lineno}",
                f"{traceback.format_exc()}from {value!r:.2000}\n",
            )

    one()
    return counts, list(crashes.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--examples", type=int, default=2000, help="inputs for each reader (default: 2000)")
    parser.add_argument("--quick", action="store_const", dest="examples", const=100, help="100 inputs for each reader")
    parser.add_argument("--seed", type=int, default=0, help="other inputs (default: 0)")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="these readers only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow and PyTorch warn of files that are odd, which these are
    print(f"{'reader':<20}{'inputs':>9}{'accepted':>10}{'refused':>9}{'crashed':>9}{'seconds':>9}")
    total: Counter[str] = Counter()
    found: list[str] = []
    for name in arguments.only:
        started = time.perf_counter()
        counts, crashes = fuzz(TARGETS[name], arguments.examples, arguments.seed)
        seconds = time.perf_counter() - started
        shown = "".join(f"{counts[key]:>{width}}" for key, width in (("accepted", 10), ("refused", 9), ("crashed", 9)))
        print(f"{name:<20}{counts.total():>9}{shown}{seconds:>9.0f}", flush=True)
        total += counts
        found += crashes
    print(f"{total.total()} inputs, {total['crashed']} crashes (--seed {arguments.seed})")
    print("\n".join(["", *found]) if found else "", end="")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
