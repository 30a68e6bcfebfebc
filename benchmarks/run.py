"""Measure how fast the project is on this machine; every figure stands beside a baseline measured in the same call.

    python benchmarks/run.py --quick                            # about two minutes, on generated data
    python benchmarks/run.py --data_dir data/flickr8k           # everything, with real captions and images
    python benchmarks/run.py --only decoding,startup
    python benchmarks/charts.py benchmark_results/DATE.json     # draw the charts of docs/benchmarks.md

Let nothing else run beside it. Wherever PyTorch sees a CUDA device, that is what is measured.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import decoding
import encoding
import memory
import reward
import startup
import torch
import training
from measure import FULL, QUICK, Bench, Figure, Scale, machine

from captioning.io import write_json

PARTS = {part.PART: part for part in (encoding, training, decoding, reward, memory, startup)}


def measure(bench: Bench, parts: list[str]) -> list[Figure]:
    """The figures of some parts, each printed as soon as its part is done."""
    figures: list[Figure] = []
    for part in parts:
        start = time.perf_counter()
        found = PARTS[part].measure(bench)
        print_table(found)
        print(f"({part}: measured in {time.perf_counter() - start:.0f} s)\n", flush=True)
        figures += found
    return figures


def print_table(figures: list[Figure]) -> None:
    print(f"{'figure':<58}{'measured':>20}{'baseline':>12}  {'ratio':>8}  {'target':<10}{'reached':<9}baseline is")
    for figure in figures:
        baseline = "" if figure.baseline is None else f"{figure.baseline:.4g}"
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        reached = "" if figure.reached is None else "yes" if figure.reached else "NO"
        print(
            f"{figure.part + ' ' + figure.name:<58}{f'{figure.value:.4g} {figure.unit}':>20}{baseline:>12}  {ratio:>8}  "
            f"{figure.target:<10}{reached:<9}{figure.against}"
        )
    for note in dict.fromkeys(figure.note for figure in figures if figure.note):
        print(f"  {note}")


def write_result(path: Path, figures: list[Figure], bench: Bench, quick: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "quick": quick, "machine": machine(bench.device),
        "data": "real" if bench.data_dir else "generated", "scale": asdict(bench.scale),
        "figures": [asdict(figure) for figure in figures],
    }  # fmt: skip
    write_json(path, content)


def main(argv: list[str] | None = None, scale: Scale | None = None) -> Path:
    """Measure, print and write; return the file.

    Args:
        scale: instead of what `--quick` chooses.

    Raises:
        SystemExit: a figure is above its physical limit.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images, steps and repeats; nothing is compiled")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas (default: %(default)s)")
    parser.add_argument("--data_dir", type=Path, help="a real data set, for its captions and JPEGs")
    parser.add_argument("--model_path", type=Path, help="a trained model for decoding, with its --feature_cache")
    parser.add_argument("--feature_cache", type=Path, help="features of --data_dir for --model_path's encoder")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmark_results/DATE.json)")
    args = parser.parse_args(argv)
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {unknown.pop()}: the parts are {', '.join(PARTS)}")
    if args.model_path and not (args.feature_cache and args.data_dir):
        parser.error("--model_path needs --data_dir and the --feature_cache that holds its features")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = args.output or Path("benchmark_results") / f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}.json"
    print(", ".join(f"{key}: {value}" for key, value in machine(device).items() if value), flush=True)
    with TemporaryDirectory(prefix="benchmark-") as directory:
        bench = Bench(
            scale or (QUICK if args.quick else FULL), device, Path(directory), args.data_dir, args.model_path,
            args.feature_cache,
        )  # fmt: skip
        figures = measure(bench, parts)
    write_result(output, figures, bench, args.quick)
    missed = [figure.name for figure in figures if figure.reached is False]
    print(f"{len(missed)} target(s) missed{': ' if missed else ''}{'; '.join(missed)}. Written: {output}")
    wrong = [
        f"{figure.name} is {figure.ratio:.2f}" for figure in figures if (figure.ratio or 0) > (figure.limit or math.inf)
    ]
    if wrong:
        raise SystemExit(f"error: above the physical limit, so that something else was measured: {'; '.join(wrong)}")
    return output


if __name__ == "__main__":
    main()
