"""How long training takes for more images and on more machines: a small model of it, and a check of the model here.

    python benchmarks/scale.py             # known data sets on 1, 8 and 64 GPUs (docs/scale.md explains the table)
    python benchmarks/scale.py --check     # predict 2 and 4 processes of this machine from 1, run them, compare
    python benchmarks/scale.py --same --dataset_type demo --epochs 3 ...    # what 1, 2 and 4 processes arrive at

The model: encoding takes as long as the slowest of its parts, which overlap (encoder, JPEG decoding, reading, writing); a
training step takes its arithmetic shared among the workers, and what does not get less with more of them (launching,
adding up gradients), or as long as it takes to collect the next step's features, where that is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import TINY, Bench

GB = 1e9
REGIONS, CHANNELS = 49, 2048  # of ResNet50's grids, which are kept in float16
EMBED, HIDDEN, ATTENTION = 512, 512, 512  # the attention decoder of the plan, one layer
COUNTS = (1, 2, 4)  # of processes that the check runs
INDEX_BYTES = 800  # of memory an image takes in each process: benchmarks/memory.py, from 8,000 to 128,000 images
# Seconds an image takes in every process before the first step (captions, index, checks), the first time, which tokenizes:
# benchmarks/memory.py at 128,000 images of five captions. Later runs take half of it.
FIRST_START = 138e-6


class DataSet(NamedTuple):
    """What a plan takes of a data set."""

    name: str
    images: float
    captions: float  # of each image
    tokens: float  # of a caption, with its end
    words: int  # in the vocabulary
    image_bytes: float  # of an image file


DATA_SETS = (
    DataSet("Flickr8k", 8e3, 5, 11.9, 3_500, 130e3),
    DataSet("Flickr30k", 31e3, 5, 13.4, 9_500, 140e3),
    DataSet("COCO", 123e3, 5, 11.5, 10_000, 160e3),
    DataSet("Conceptual Captions 3M", 3e6, 1, 11.3, 16_000, 100e3),
    DataSet("Conceptual Captions 12M", 12e6, 1, 21, 50_000, 100e3),
    DataSet("400 M pairs", 400e6, 1, 12, 50_000, 50e3),
)


@dataclass(frozen=True)
class Rates:
    """What one worker (a GPU, or a process) does in a second, and what its machine does."""

    encode: float  # images through the encoder
    decode: float  # JPEGs decoded and resized by one core
    cores: float  # of a worker
    arithmetic: float  # operations of a training step's matrix products
    fixed: float  # seconds of a step that do not get less with more workers
    network: float  # bytes of gradients that a worker sends and takes
    latency: float  # seconds of adding up gradients, however few
    disk: float  # bytes read or written by a machine
    memory: float  # bytes of a machine that can hold features
    gather: float  # bytes of features that a process collects from memory for its next step, meanwhile
    own_memory: float  # bytes of features that a GPU can hold itself
    workers: int  # of a machine


# Assumed, not measured. Eight GPUs of H100's kind, 16 cores each, one NVMe drive.
GPU = Rates(
    encode=2500, decode=250, cores=16, arithmetic=60e12, fixed=6e-3, network=20 * GB, latency=0.3e-3, disk=5 * GB,
    memory=1500 * GB, gather=5 * GB, own_memory=40 * GB, workers=8,
)  # fmt: skip
RATES = ("encode", "decode", "disk", "network", "arithmetic", "memory", "gather")  # that flags can change


class Plan(NamedTuple):
    """What training costs."""

    start: float  # seconds until the first step, the first time, beside encoding
    encoding: float  # seconds, once
    epoch: float  # seconds of every epoch
    feature_bytes: float
    index_bytes: float  # of memory in each process
    slowest: str  # what encoding waits for
    limit: str  # what a step waits for


def step_arithmetic(data: DataSet, captions: float) -> float:
    """Operations of a step of the attention decoder: see `training.multiply_adds`."""
    tokens, images = captions * data.tokens, captions / data.captions
    needed = 4 * HIDDEN * (images * EMBED + tokens * (EMBED + HIDDEN)) + tokens * (HIDDEN * EMBED + EMBED * data.words)
    needed += images * REGIONS * EMBED * ATTENTION
    needed += tokens * (HIDDEN * ATTENTION + HIDDEN * EMBED + EMBED * EMBED + REGIONS * (ATTENTION + EMBED))
    return 2 * (3 * needed + 2 * images * REGIONS * CHANNELS * EMBED)


def parameters(data: DataSet) -> float:
    """Of the attention decoder: embeddings, image projection, LSTM, output, attention."""
    lstm = 4 * HIDDEN * (EMBED + HIDDEN)
    return data.words * EMBED + CHANNELS * EMBED + lstm + HIDDEN * EMBED + HIDDEN * ATTENTION + 3 * EMBED * EMBED


def step_seconds(rates: Rates, workers: int, arithmetic: float, gradient_bytes: float) -> dict[str, float]:
    """What a step spends on arithmetic, on what does not get less, and on gradients."""
    spent = {"arithmetic": arithmetic / rates.arithmetic / workers, "fixed costs": rates.fixed, "gradients": 0.0}
    if workers > 1:  # a ring passes everything on twice
        spent["gradients"] = rates.latency + 2 * (workers - 1) / workers * gradient_bytes / rates.network
    return spent


def plan(data: DataSet, rates: Rates, workers: int, batch: int) -> Plan:
    """Predict a training. Args: batch: captions of a step, of all workers together."""
    machines = max(1, workers // rates.workers)
    feature_bytes = data.images * REGIONS * CHANNELS * 2
    encoding = {
        "encoder": data.images / (rates.encode * workers),
        "JPEG decoding": data.images / (rates.decode * rates.cores * workers),
        "reading images": data.images * data.image_bytes / (rates.disk * machines),
        "writing features": feature_bytes / (rates.disk * machines),
    }
    spent = step_seconds(rates, workers, step_arithmetic(data, batch), 4 * parameters(data))
    step_bytes = batch / data.captions * REGIONS * CHANNELS * 2
    meanwhile = {"": 0.0}  # while the GPU computes
    if feature_bytes > rates.own_memory:
        meanwhile["gathering features"] = step_bytes / (rates.gather * workers)
    if feature_bytes > rates.memory * machines:
        meanwhile["reading features"] = step_bytes / (rates.disk * machines)
    waiting, computing = max(meanwhile, key=lambda part: meanwhile[part]), sum(spent.values())
    limit = waiting if meanwhile[waiting] > computing else max(spent, key=lambda part: spent[part])
    epoch = max(computing, meanwhile[waiting]) * data.images * data.captions / batch
    slowest = max(encoding, key=lambda part: encoding[part])
    return Plan(
        FIRST_START * data.images, encoding[slowest], epoch, feature_bytes, INDEX_BYTES * data.images, slowest, limit
    )


def duration(seconds: float) -> str:
    for unit, length in (("s", 60), ("min", 60), ("h", 48)):
        if seconds < length:
            return f"{seconds:.1f} {unit}" if seconds < 10 else f"{seconds:.0f} {unit}"
        seconds /= length if unit != "h" else 24
    return f"{seconds:.1f} days" if seconds < 10 else f"{seconds:.0f} days"


def size_of(count: float) -> str:
    unit, scale = next((unit, scale) for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if count >= scale)
    return f"{count / scale:.3g} {unit}"


def print_row(columns: Mapping[str, int], cells: Iterable[object]) -> None:
    """Print cells, right-aligned. Args: columns: heads and their widths; a blank tells two of the same head apart."""
    row = (f"{str(cell).strip():>{width}}" for cell, width in zip(cells, columns.values(), strict=True))
    print("".join(row), flush=True)


def print_plans(rates: Rates, batch: int, epochs: int) -> None:
    """Every data set on 1, 8 and 64 workers; the batch grows with the workers, up to a fiftieth of an epoch."""
    columns = {
        "GPUs": 5, "captions/step": 14, "start": 9, "encoding": 10, "waits for": 17, "epoch": 9, "waits for ": 20,
        f"{epochs} epochs": 11, "GPU hours": 11,
    }  # fmt: skip
    for data in DATA_SETS:
        sizes = plan(data, rates, 1, batch)
        print(f"\n{data.name}: {data.images:,.0f} images, features {size_of(sizes.feature_bytes)}, "
              f"{size_of(sizes.index_bytes)} of memory a process")  # fmt: skip
        print_row(columns, columns)
        for workers in (1, 8, 64):
            captions = min(batch * workers, max(batch, int(data.images * data.captions / 50)))
            found = plan(data, rates, workers, captions)
            whole = found.start + found.encoding + epochs * found.epoch
            cells = (
                workers, f"{captions:,}", duration(found.start), duration(found.encoding), found.slowest,
                duration(found.epoch), found.limit, duration(whole), f"{whole * workers / 3600:.2f}",
            )  # fmt: skip
            print_row(columns, cells)


# --------------------------------------------------------------------------------------------------
# The check


def work(folder: Path, epochs: int) -> None:
    """One of the processes that are measured: encode, train, and (the first) write what it took as JSON."""
    import numpy as np
    import torch
    import training

    from captioning import distributed
    from captioning.building import build_data, build_features
    from captioning.encoders import find_encoder
    from captioning.settings import parse_flags

    distributed.join()
    torch.set_num_threads(1)
    flags = json.loads((folder / "flags.json").read_text())
    settings = parse_flags(flags)
    spec = find_encoder(settings.encoder)

    def seconds_of(call: Callable[[], object]) -> float:
        distributed.wait_for_all()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def make_encoder() -> None:
        encode = spec.build(spec.find_weights()[0]).fast_form(torch.device("cpu"))
        for _ in range(3):  # the first calls optimize the graph
            encode(np.zeros((2, spec.image_size, spec.image_size, 3), np.uint8))

    making = seconds_of(make_encoder)
    data = build_data(settings, None)
    encoding = seconds_of(lambda: build_features(settings, data, np.arange(len(data.names))))
    trial = training.Trial(flags)

    def median_epoch() -> float:
        return statistics.median([seconds_of(trial.epoch) for _ in range(epochs)][1:])

    whole, plan = median_epoch(), trial.loader.plan(0)
    parts = {}  # alone: what a step takes that has a second or a fourth of the captions
    for shares in COUNTS if distributed.size() == 1 else ():
        trial.load(trial.loader.images, training.BATCH // shares)
        parts[shares] = median_epoch() / trial.loader.steps
    gradient = torch.zeros(sum(parameter.numel() for parameter in trial.decoder.parameters()))
    adding = 0.0
    if distributed.size() > 1:  # the first exchange makes the connections
        exchange = lambda: torch.distributed.all_reduce(gradient)  # noqa: E731
        adding = [seconds_of(exchange) for _ in range(6)][-1]
    if distributed.is_first():
        result = {
            "encoding": encoding, "making": making, "images": len(data.names), "epoch": whole, "parts": parts,
            "steps": len(plan), "adding": adding,
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
    distributed.leave()


def torchrun(processes: int, command: Sequence[object]) -> None:
    """Run a command in so many processes of one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, *map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def measure(directory: Path, processes: int, epochs: int, images: int) -> dict[str, Any]:
    """Encoding and training by so many processes, from an empty cache."""
    import torch
    import training

    bench = Bench(replace(TINY, images=images), torch.device("cpu"), directory)
    data_dir, _ = training.prepare_data(bench)
    folder = directory / f"processes{processes}"
    folder.mkdir()
    flags = training.flags_for(bench, data_dir, "attention", "small", "efficientnet_lite0")
    flags += ["--feature_cache", str(folder / "cache"), "--precision", "fp32"]
    (folder / "flags.json").write_text(json.dumps(flags))
    torchrun(processes, [__file__, "--work", folder, "--epochs", epochs])
    return json.loads((folder / "result.json").read_text())  # type: ignore[no-any-return]


def check(epochs: int, images: int) -> list[dict[str, float]]:
    """Predict several processes from one, and run them; print a table and return its rows."""
    cores = os.cpu_count() or 1
    rows = []
    with TemporaryDirectory(prefix="benchmark-") as place:
        found = {count: measure(Path(place), count, epochs, images) for count in COUNTS}
    one = found[1]
    print(
        f"{cores} cores; one thread a process; {one['images']} images, {one['steps']} steps an epoch; "
        "predicted from one process"
    )
    heads = {"processes": 10, "encoding s": 12, "predicted": 11, "epoch s": 10, "predicted ": 11, "speed-up": 10,
             "gradients, ms a step": 22}  # fmt: skip
    print_row(heads, heads)
    for count, seen in found.items():
        busy = max(1.0, count / cores)  # processes that share a core
        encoding = one["making"] * busy + (one["encoding"] - one["making"]) * busy / count
        step = one["parts"][str(count)] * busy + seen["adding"]
        row = {
            "processes": count, "encoding": seen["encoding"], "encoding_predicted": encoding, "epoch": seen["epoch"],
            "epoch_predicted": step * one["steps"], "speed_up": one["epoch"] / seen["epoch"],
        }  # fmt: skip
        cells = [f"{count}", *(f"{value:.2f}" for value in list(row.values())[1:]), f"{1000 * seen['adding']:.1f}"]
        print_row(heads, cells)
        rows.append(row)
    step, half = one["epoch"] / one["steps"], one["parts"]["2"]
    fixed = max(0.0, 2 * half - step)
    print(f"Of a step's {1000 * step:.0f} ms, {1000 * fixed:.0f} do not get less with fewer captions")
    return rows


def same(flags: list[str]) -> None:
    """Train with the main program's `flags` in 1, 2 and 4 processes, and print what came out."""
    import torch

    program = Path(__file__).resolve().parent.parent / "flickr_image_caption_with_pytorch_resnet_lstm.py"
    heads = {"processes": 10, "training loss": 15, "validation loss": 17, "validation CIDEr": 18, "seconds": 9,
             "largest difference of a weight": 32}  # fmt: skip
    print_row(heads, heads)
    weights: dict[str, Any] = {}
    with TemporaryDirectory(prefix="benchmark-") as place:
        for count in COUNTS:
            folder = Path(place) / str(count)
            start = time.perf_counter()
            torchrun(count, [program, *flags, "--model_save_dir", folder])
            seconds = time.perf_counter() - start
            (last,) = folder.rglob("last.pt")
            checkpoint = torch.load(last, weights_only=True)
            curve, found = checkpoint["loss_curve"], checkpoint["decoder"]
            weights = weights or found
            apart = max(float((found[name] - weights[name]).abs().max()) for name in found)
            losses = [f"{curve[name][-1]:.5f}" for name in ("training_losses", "validation_losses")]
            cider = 100 * checkpoint["metrics_history"][-1]["cider"]
            cells = [f"{count}", *losses, f"{cider:.2f}", f"{seconds:.0f}", f"{apart:.2e}"]
            print_row(heads, cells)


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure this machine with 1, 2 and 4 processes")
    parser.add_argument("--same", nargs=argparse.REMAINDER, help="and then the flags of a training")
    parser.add_argument("--images", type=int, default=700, help="of the check's data set")
    parser.add_argument("--epochs", type=int, default=None, help="of the plan (15), or of the check (4)")
    parser.add_argument("--batch_size", type=int, default=640, help="captions of a step on one GPU, in the plan")
    for name in RATES:
        parser.add_argument(f"--{name}", type=float, default=getattr(GPU, name), help="of the plan: see `Rates`")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args.work, args.epochs)
        return []
    if args.same is not None:
        same(args.same)
        return []
    if args.check:
        return check(args.epochs or 4, args.images)
    print_plans(replace(GPU, **{name: getattr(args, name) for name in RATES}), args.batch_size, args.epochs or 15)
    return []


if __name__ == "__main__":
    main()
