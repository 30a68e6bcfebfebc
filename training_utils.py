"""Learning-rate schedules, checkpoints, and random numbers that a resumed run draws again."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from safe_io import UserError, write_atomic

SCHEMA = 1  # of the checkpoint; a reader refuses what it does not know


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Seed PyTorch for one training step, so that it draws the same whatever ran before it."""
    torch.manual_seed(zlib.crc32(f"{seed} {epoch} {step}".encode()))


def pick_device(name: str) -> torch.device:
    """`auto` is the fastest device at hand.

    Raises:
        UserError: the named device is not there.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise UserError(f"--device {name}: this PyTorch sees no such device here; use --device auto or cpu")
    return torch.device(name)


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


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write plain types and tensors, atomically, so that `torch.load(weights_only=True)` reads them."""
    write_atomic(path, lambda file: torch.save({"schema": SCHEMA, **checkpoint}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU without executing anything in it.

    Raises:
        UserError: no checkpoint, a truncated one, or one of another program or version.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and zip errors of every kind mean the same to the user
        raise UserError(
            f"{path} cannot be read as a checkpoint (truncated, or not one of ours): {str(error).splitlines()[0][:120]}. "
            "Use another model_epoch_N.pt of its run"
        ) from error
    wanted = ("decoder", "decoder_type", "vocabulary", "flags", "encoder", "epoch")
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in wanted):
        raise UserError(
            f"{path} is not a checkpoint of this program: give a model_epoch_N.pt, best.pt or a run directory"
        )
    if checkpoint.get("schema") != SCHEMA:
        raise UserError(f"{path} has checkpoint schema {checkpoint.get('schema')}, this program reads {SCHEMA}")
    return checkpoint


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Fill a decoder.

    Raises:
        UserError: the weights are of another architecture.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} holds another architecture: {str(error).splitlines()[-1].strip()[:200]}") from error
