"""What every benchmark needs: sizes, interleaved timing, the machine's matrix-product rate, and figures."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Scale:
    """How much is measured; every figure is a rate or is scaled, so that the scales can be compared."""

    repeats: int  # rounds of an interleaved measurement, of which the median counts
    encoded: dict[str, int]  # images of an encoding pass, by encoder
    naive: int  # images of the naive loops
    compiled: bool  # measure the encoder compiled and in ONNX Runtime too
    images: int  # of the generated data set: 6/7 of them train
    sizes: dict[str, tuple[str, ...]]  # decoders by size ('small', 'default') that the epoch part trains
    steps: int  # of the project in one measurement
    captions_encoded: int  # by the original's way in one measurement, scaled to a batch
    matmul: int  # rows and columns of the large product
    training: int  # steps that the decoding part trains for
    decoded: int  # images captioned in a batch
    alone: int  # images captioned one at a time
    memory: tuple[int, ...]  # numbers of images
    memory_steps: int
    starts: int  # of the program


BOTH = ("lstm", "attention")
FULL = Scale(
    repeats=5, encoded={"efficientnet_lite0": 256, "resnet50": 32}, naive=32, compiled=True, images=7000,
    sizes={"small": BOTH, "default": BOTH}, steps=6, captions_encoded=32, matmul=4096, training=480, decoded=1000,
    alone=40, memory=(1_000, 8_000, 32_000, 128_000), memory_steps=60, starts=5,
)  # fmt: skip
QUICK = Scale(
    repeats=1, encoded={"efficientnet_lite0": 48, "resnet50": 16}, naive=12, compiled=False, images=1400,
    sizes={"small": BOTH, "default": ("lstm",)}, steps=3, captions_encoded=8, matmul=4096, training=60, decoded=100,
    alone=8, memory=(1_000, 8_000), memory_steps=10, starts=2,
)  # fmt: skip
TINY = Scale(
    repeats=1, encoded={"efficientnet_lite0": 2}, naive=1, compiled=False, images=14,
    sizes={"small": ("attention",)}, steps=1, captions_encoded=1, matmul=64, training=1, decoded=2, alone=1,
    memory=(14,), memory_steps=1, starts=1,
)  # fmt: skip


@dataclass
class Bench:
    """Where and how much to measure, and the data that several parts share."""

    scale: Scale
    device: torch.device
    directory: Path  # for generated data, caches and runs
    data_dir: Path | None = None  # real captions and images, or None to generate some
    model_path: Path | None = None
    feature_cache: Path | None = None


@dataclass
class Figure:
    """One line of the table. A ratio is how many times better than the baseline, except where its name says otherwise."""

    part: str
    name: str
    value: float
    unit: str
    against: str = ""
    baseline: float | None = None
    ratio: float | None = None
    target: str = ""
    reached: bool | None = None
    note: str = ""
    limit: float | None = None  # a ratio above it is physically impossible: the measurement is wrong

    def must(self, sign: str, bound: float, of_value: bool = False) -> Figure:
        """Set the target: the ratio (or the value) is to be '>=', '<' this bound."""
        measured = self.value if of_value or self.ratio is None else self.ratio
        self.target = f"{sign} {bound:g}" + (f" {self.unit}" if of_value else "")
        self.reached = measured >= bound if sign == ">=" else measured < bound
        return self


def compared(part: str, name: str, value: float, unit: str, against: str, baseline: float, note: str = "") -> Figure:
    """A rate (its unit ends in /s) or a duration, and how many times better than the baseline it is."""
    ratio = value / baseline if unit.endswith("/s") else baseline / value
    return Figure(part, name, value, unit, against, baseline, ratio, note=note)


def interleaved(ways: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each way. Every round runs each once, so that a busy moment of the machine hits all alike.

    A first round, which is not counted, warms caches, allocators and compiled code. A way that has a start of its
    own to leave out returns the seconds that count, as a float.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for counted in [False] + repeats * [True]:
        for name, way in ways.items():
            start = time.perf_counter()
            own = way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if counted:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def large_product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """A matrix product of `size` x `size`, which is 2 * size**3 operations."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to compare figures; nothing that identifies the machine."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        fields = [line.partition(":") for line in information.read_text().splitlines()]
        known = {key.strip(): value.strip() for key, _, value in fields}
        extensions = {"avx512f", "avx512_bf16", "amx_tile"}.intersection(known.get("flags", "").split())
        cpu = ", ".join([known.get("model name", cpu), *sorted(extensions)])
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__, "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }  # fmt: skip
