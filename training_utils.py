"""Precision, stopping, learning-rate schedules, and random numbers that a resumed run draws again."""

from __future__ import annotations

import argparse
import math
import signal
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import distributed
from safe_io import UserError, log


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Seed PyTorch for one training step, so that it draws the same whatever ran before it, and each process its own."""
    own = f" {distributed.rank()}" if distributed.rank() else ""
    torch.manual_seed(zlib.crc32(f"{seed} {epoch} {step}{own}".encode()))


def pick_device(name: str) -> torch.device:
    """`auto` is the fastest device at hand.

    Raises:
        UserError: the named device is not there.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    has["mps"] &= distributed.size() == 1  # for which torch.distributed has no backend
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise UserError(f"--device {name}: this PyTorch sees no such device here; use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    if distributed.local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"rank {distributed.rank()} finds no GPU for itself, this machine has {torch.cuda.device_count()}: "
            "torchrun's --nproc_per_node is at most that"
        )
    torch.cuda.set_device(distributed.local_rank())
    return torch.device(name, distributed.local_rank())


class Precision:
    """The type that matrix products run in (`fp32`, `bf16` or `fp16`); weights and the optimizer stay float32.

    `auto` is bf16 where the device multiplies it faster than float32 (CUDA from Ampere on, CPUs with
    AVX512-BF16 or AMX), else fp32. fp16's small range is covered by scaling the loss.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            name = "bf16" if multiplies_bf16(device) else "fp32"
        self.name, self.device = name, device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        """Around the forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")

    def step(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, grad_clip: float) -> torch.Tensor:
        """Backward pass, clipping and update; returns the gradient's norm, on the device.

        Where the norm is not a finite number the weights stay as they are: the fused optimizer is told so
        on the device, without waiting for it.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            optimizer.step()
        return norm


def multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Stopped(Exception):
    """Training was stopped by a signal, after saving where it stood."""

    def __init__(self, number: signal.Signals, directory: Path):
        super().__init__(number.name)
        self.signal, self.directory = number, directory


SAME_SIGNAL = 5.0  # seconds in which a second signal may be the first one, passed on by torchrun


class StopRequest:
    """Remembers the first SIGINT or SIGTERM while training runs, so that the step in hand is finished and saved.

    A second one stops at once, but for what torchrun passes on of a signal that a job's processes got already. Used as a context manager, which puts the old handlers back.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.when = 0.0

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            if distributed.launched() and time.monotonic() - self.when < SAME_SIGNAL:
                return
            raise KeyboardInterrupt
        self.signal, self.when = signal.Signals(number), time.monotonic()
        log.warning(f"\n{self.signal.name}: saving after this step; a second time stops at once")


# --------------------------------------------------------------------------------------------------
# Learning rate


@dataclass
class ScheduleSettings:
    """A schedule in full: what a checkpoint keeps, and all that a curve depends on."""

    type: str  # reduce_lr_on_plateau | step | cosine | exponential | one_cycle
    learning_rate: float  # the base rate, which for one_cycle is its peak
    min_lr: float
    patience: int
    factor: float
    step_size: int  # epochs
    gamma: float
    t_max: int  # epochs
    warmup_epochs: int
    first_epoch: int  # epochs trained before this schedule began
    epochs: int  # that it was planned for
    steps_per_epoch: int


class Schedule:
    """The learning rate as a function of where training stands.

    Four of the five are closed forms of (epoch, step), so that nothing is lost in resuming and none falls
    below `min_lr` or rises where it should not; only the plateau rule has a memory.
    """

    def __init__(self, settings: ScheduleSettings, plateau: dict[str, Any] | None = None):
        self.settings = settings
        self.plateau = plateau or {"rate": settings.learning_rate, "best": math.inf, "bad_epochs": 0}

    def rate(self, epoch: int, step: int = 0) -> float:
        """Learning rate of a step. Args: epoch: epochs finished before it; step: steps finished in this one."""
        s = self.settings
        done = epoch - s.first_epoch
        if s.type == "reduce_lr_on_plateau":
            return max(self.plateau["rate"], s.min_lr)
        if s.type == "step":
            return max(s.learning_rate * s.gamma ** (done // s.step_size), s.min_lr)
        if s.type == "exponential":
            return max(s.learning_rate * s.gamma**done, s.min_lr)
        if s.type == "cosine":  # Loshchilov and Hutter (2017), one half-period; it stays at its end
            return cosine(s.learning_rate, s.min_lr, min(done / s.t_max, 1.0))
        total = s.epochs * s.steps_per_epoch - 1
        rising = s.warmup_epochs * s.steps_per_epoch
        position = done * s.steps_per_epoch + step
        if position < rising:  # Smith and Topin (2018): up from a 25th, then down
            return cosine(max(s.learning_rate / 25, s.min_lr), s.learning_rate, position / rising)
        return cosine(s.learning_rate, s.min_lr, min((position - rising) / max(1, total - rising), 1.0))

    def epoch_ended(self, validation_loss: float) -> None:
        """Let the plateau rule see an epoch's validation loss (PyTorch's ReduceLROnPlateau, threshold 1e-4)."""
        if self.settings.type != "reduce_lr_on_plateau":
            return
        memory = self.plateau
        if validation_loss < memory["best"] * (1 - 1e-4):
            memory["best"], memory["bad_epochs"] = validation_loss, 0
        else:
            memory["bad_epochs"] += 1
        if memory["bad_epochs"] > self.settings.patience:
            memory["rate"] = max(memory["rate"] * self.settings.factor, self.settings.min_lr)
            memory["bad_epochs"] = 0

    def finished(self, epoch: int) -> bool:
        """Whether a cosine or one-cycle curve has reached its end after so many epochs."""
        s = self.settings
        length = {"cosine": s.t_max, "one_cycle": s.epochs}.get(s.type, math.inf)
        return epoch - s.first_epoch >= length

    def describe(self) -> str:
        """As the original prints it: `CosineAnnealingLR (T_max=20)`."""
        s = self.settings
        return {
            "reduce_lr_on_plateau": f"ReduceLROnPlateau (patience={s.patience}, factor={s.factor:g})",
            "step": f"StepLR (step_size={s.step_size}, gamma={s.gamma:g})",
            "cosine": f"CosineAnnealingLR (T_max={s.t_max})",
            "exponential": f"ExponentialLR (gamma={s.gamma:.4g})",
            "one_cycle": f"OneCycleLR (max_lr={s.learning_rate:g}, warmup_epochs={s.warmup_epochs})",
        }[s.type]

    def state(self) -> dict[str, Any]:
        return {"settings": asdict(self.settings), "plateau": dict(self.plateau)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Schedule:
        return cls(ScheduleSettings(**state["settings"]), dict(state["plateau"]))


def cosine(start: float, end: float, part: float) -> float:
    """Half a cosine from `start` (part 0) to `end` (part 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def choose_schedule(
    args: argparse.Namespace, typed: set[str], checkpoint: dict[str, Any] | None, steps: int
) -> Schedule | None:
    """The learning-rate schedule of this run, by the table under 'Train longer' in the README."""
    first = checkpoint["epoch"] if checkpoint else 0
    saved = Schedule.from_state(checkpoint["schedule"]) if checkpoint and checkpoint["schedule"] else None
    names = {
        "min_lr": "min_lr", "scheduler_patience": "patience",
        "scheduler_factor": "factor", "scheduler_step_size": "step_size", "scheduler_gamma": "gamma",
        "scheduler_t_max": "t_max", "warmup_epochs": "warmup_epochs",
    }  # fmt: skip
    if not args.use_scheduler and saved is None:
        idle = sorted(name for name in typed if name in names or name == "scheduler_type")
        if idle:
            raise UserError(f"--{idle[0]} has no effect: the checkpoint has no schedule; add --use_scheduler")
        return None
    if saved is not None and (not args.use_scheduler or args.scheduler_type == saved.settings.type):
        kind = saved.settings.type
        new_cycle = saved.finished(first) and (kind == "one_cycle" or "scheduler_t_max" in typed)
        for flag, name in names.items():
            if flag in typed:
                setattr(saved.settings, name, getattr(args, flag))
        if "learning_rate" in typed:
            saved.settings.learning_rate = saved.plateau["rate"] = args.learning_rate
            log.info(f"The new base learning rate is {args.learning_rate:g}")
        if new_cycle:
            saved.settings.first_epoch, saved.settings.epochs = first, args.epochs
            log.info(f"The checkpoint's {kind} cycle is finished: a new one begins")
        elif saved.finished(first):
            log.warning(
                f"Warning: cosine has reached its T_max and stays at min_lr {saved.settings.min_lr:g}; "
                f"add --use_scheduler --scheduler_type cosine --scheduler_t_max {args.epochs} to start a new cycle"
            )
        else:
            log.info(f"The checkpoint's schedule goes on: {saved.describe()}")
        saved.settings.steps_per_epoch = steps
        return saved
    gamma = args.scheduler_gamma
    if args.scheduler_type == "exponential" and "scheduler_gamma" not in typed and not args.config:
        args.scheduler_gamma = gamma = args.scheduler_gamma ** (1 / args.epochs)
    if checkpoint:
        before = saved.settings.type if saved else "no schedule"
        log.info(f"The checkpoint has {before}: a fresh {args.scheduler_type} over {args.epochs} epochs begins")
    return Schedule(
        ScheduleSettings(
            args.scheduler_type, args.learning_rate, args.min_lr, args.scheduler_patience, args.scheduler_factor,
            args.scheduler_step_size, gamma, args.scheduler_t_max, args.warmup_epochs, first, args.epochs, steps,
        )
    )  # fmt: skip
