"""Peak anonymous memory and time per image of building the data and training, over growing data sets.

Anonymous memory is what a process has for itself; mapped files are the page cache's. Each size is trained in a
process of its own, which is watched from outside. Linux only, where /proc tells it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree

from measure import TINY, Bench, Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from captioning.io import KERNELS

PART = "memory"
INTERVAL = 0.01  # seconds between two readings of a process


def measure(bench: Bench) -> list[Figure]:
    if not Path("/proc/self/status").is_file():
        print("memory: left out, /proc is Linux's")
        return []
    from generated import feature_file, fill_cache_sparsely, write_data_set

    figures: list[Figure] = []
    kernels: list[Figure] = []  # none on a GPU
    for images in bench.scale.memory:
        folder = bench.directory / f"memory{images}"
        write_data_set(folder / "data", images, [])
        paths = sorted((folder / "data" / "Images").iterdir())
        for kind in ("grid", "mean"):
            fill_cache_sparsely(feature_file(folder / "cache", "resnet50", folder / "data" / "Images", kind), paths)
        os.sync()  # the first run is not to share the disk with what was just written
        command = [sys.executable, __file__, str(folder), str(bench.scale.memory_steps), bench.device.type]
        for when in ("first", "later"):  # a later run finds its tokens in the cache and needs no spaCy
            seen = watch([*command, "attention", "small", "128"])
            name, note = (
                f"{images:,} images, {when} run",
                f"{when} run, {seen['steps']:.0f} steps of attention, 512 x 1",
            )
            figures += [
                Figure(PART, f"{name}: peak anonymous memory", seen["peak"], "MB", note=note),
                Figure(PART, f"{name}: building the data", 1e6 * seen["build"] / images, "us/image"),
                Figure(PART, f"{name}: training", 1e3 * seen["train"], "ms/image"),
            ]
        if images == min(bench.scale.memory) and bench.device.type == "cpu":
            kernels = compare_kernels([*command, "lstm", [*bench.scale.sizes][-1], "64"], bench.scale.repeats)
        rmtree(folder)
    compare(figures, bench.scale.memory)
    return figures + kernels


def compare_kernels(command: list[str], repeats: int) -> list[Figure]:
    """Train the first quick start's model with the kernels that oneDNN is told to keep, and with its own number."""
    seen: dict[int, list[dict[str, float]]] = {KERNELS: [], 1024: []}
    for _ in range(repeats):
        for kept, runs in seen.items():
            runs.append(watch(command, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(kept)}))
    figures = []
    for key, name, unit, scale in (("peak", "peak anonymous memory", "MB", 1), ("train", "training", "ms/image", 1e3)):
        ours, theirs = (scale * statistics.median(run[key] for run in runs) for runs in seen.values())
        note = f"{seen[KERNELS][0]['steps']:.0f} steps of lstm in batches of 64, medians of {repeats}"
        name = f"{KERNELS} kernels: {name}"
        figures.append(Figure(PART, name, ours, unit, "1,024 kernels", theirs, ours / theirs, note=note))
    figures[0].must("<", 2048, of_value=True)
    figures[1].must("<", 1.05)
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


def watch(command: list[str], environment: Mapping[str, str] = {}) -> dict[str, float]:
    """Run a process that prints JSON as its last line; return that and its peak of RssAnon in MB."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as process:
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


def child(folder: Path, steps: int, device: str, decoder: str, size: str, batch: str) -> None:
    """Build the data and train some steps in this process; print the seconds of each."""
    from captioning.io import limit_kernels

    limit_kernels()  # as the main script does
    import torch
    import training

    # The vocabulary is to have one size, and with it the work of a token: more captions bring more words thrice.
    images = len(list((folder / "data" / "Images").iterdir()))
    threshold = ["--freq_threshold", str(max(1, round(3 * images / 8_000)))]
    flags = training.flags_for(Bench(TINY, torch.device(device), folder), folder / "data", decoder, size)
    start = time.perf_counter()
    trial = training.Trial([*flags, *threshold, "--batch_size", batch])
    built = time.perf_counter()
    trial.shorten(steps)
    trial.epoch()
    trained = (time.perf_counter() - built) / len(trial.loader.images)
    print(json.dumps({"build": built - start, "train": trained, "steps": trial.loader.steps}))


if __name__ == "__main__":
    child(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
