"""Peak anonymous memory and time per image of building the data and training, over growing data sets.

Anonymous memory is what a process has for itself; mapped files are the page cache's. Each size is trained in a
process of its own, which is watched from outside. Linux only, where /proc tells it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from shutil import rmtree

from measure import TINY, Bench, Figure

PART = "memory"
INTERVAL = 0.01  # seconds between two readings of a process


def measure(bench: Bench) -> list[Figure]:
    if not Path("/proc/self/status").is_file():
        print("memory: left out, /proc is Linux's")
        return []
    from generated import feature_file, fill_cache_sparsely, write_data_set

    figures: list[Figure] = []
    for images in bench.scale.memory:
        folder = bench.directory / f"memory{images}"
        write_data_set(folder / "data", images, [])
        paths = sorted((folder / "data" / "Images").iterdir())
        fill_cache_sparsely(feature_file(folder / "cache", "resnet50", folder / "data" / "Images", "grid"), paths)
        os.sync()  # the first run is not to share the disk with what was just written
        for when in ("first", "later"):  # a later run finds its tokens in the cache and needs no spaCy
            seen = watch([sys.executable, __file__, str(folder), str(bench.scale.memory_steps), bench.device.type])
            name, note = (
                f"{images:,} images, {when} run",
                f"{when} run, {seen['steps']:.0f} steps of attention, 512 x 1",
            )
            figures += [
                Figure(PART, f"{name}: peak anonymous memory", seen["peak"], "MB", note=note),
                Figure(PART, f"{name}: building the data", 1e6 * seen["build"] / images, "us/image"),
                Figure(PART, f"{name}: training", 1e3 * seen["train"], "ms/image"),
            ]
        rmtree(folder)
    compare(figures, bench.scale.memory)
    return figures


def compare(figures: list[Figure], sizes: tuple[int, ...]) -> None:
    """Add the ratio of each size to 8,000 images (or to the smallest), and the target to the largest."""
    base = 8_000 if 8_000 in sizes else sizes[0]
    for figure in figures:
        size, _, what = figure.name.partition(" images, ")
        reference = next(other for other in figures if other.name == f"{base:,} images, {what}")
        figure.against, figure.baseline = f"{base:,} images", reference.value
        figure.ratio = figure.value / reference.value
        if size == f"{max(sizes):,}" and max(sizes) > base and "building" not in what:
            figure.must("<", 1.2)


def watch(command: list[str]) -> dict[str, float]:
    """Run a process that prints JSON as its last line; return that and its peak of RssAnon in MB."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(int(line.split()[1]) for line in lines)])
            time.sleep(INTERVAL)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak": peak / 1024}


def child(folder: Path, steps: int, device: str) -> None:
    """Build the data and train some steps in this process; print the seconds of each."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    import training

    # The vocabulary is to have one size, and with it the work of a token: more captions bring more words thrice.
    images = len(list((folder / "data" / "Images").iterdir()))
    threshold = ["--freq_threshold", str(max(1, round(3 * images / 8_000)))]
    flags = training.flags_for(Bench(TINY, torch.device(device), folder), folder / "data", "attention", "small")
    start = time.perf_counter()
    trial = training.Trial(flags + threshold)
    built = time.perf_counter()
    trial.shorten(steps)
    trial.epoch()
    trained = (time.perf_counter() - built) / len(trial.loader.images)
    print(json.dumps({"build": built - start, "train": trained, "steps": trial.loader.steps}))


if __name__ == "__main__":
    child(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
