"""What training needs beside the decoder: steps and their loss, precision, schedules, signals."""

from __future__ import annotations

import math
import signal
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from captioning import distributed
from captioning.batches import Batch, BatchMaker
from captioning.decoders import Decoder
from captioning.features import DeviceFeatures, Features, gather_views
from captioning.io import UserError, format_bytes, log
from captioning.scst import SelfCritic
from captioning.settings import Settings

MAX_BAD_BATCHES = 10  # batches of an epoch whose loss or gradient may be non-finite
STEPS_PER_SYNC = 100  # of a GPU or of several processes: looking at a step makes the device wait for it
SAME_SIGNAL = 5.0  # seconds within which a second signal may be the first one, passed on by torchrun


# --------------------------------------------------------------------------------------------------
# Steps


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Seed PyTorch for one training step: a resumed run draws what an undisturbed one draws."""
    own = f" {distributed.rank()}" if distributed.rank() else ""
    torch.manual_seed(zlib.crc32(f"{seed} {epoch} {step}{own}".encode()))


class RankBatch(NamedTuple):
    """The part of a step that one process computes: all of it where there is one process."""

    batch: Batch | None  # captions of its images; None where there are fewer images than processes
    views: np.ndarray  # int64 (I,) the view of each of its images
    tokens: int  # of the whole step
    captions: int  # of the whole step


class TrainLoader:
    """The training captions of each epoch, cut into steps."""

    def __init__(self, batches: BatchMaker, images: np.ndarray, views: int, batch_size: int, seed: int):
        """Args: images: positions (n,) of the training images; views: how many each image has."""
        self.batches, self.images, self.views, self.batch_size, self.seed = batches, images, views, batch_size, seed
        self.steps = len(batches.plan(images, batch_size))

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Return the caption numbers (R,) of each step, in an order that depends on (seed, epoch) alone."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.images)
        return self.batches.plan(order, self.batch_size)

    def rank_batch(self, captions: np.ndarray, epoch: int, step: int) -> RankBatch:
        """Return this process's part of a step: whole images, with about as many tokens as any other's part.

        The view of an image depends on (seed, epoch, step) alone, not on the number of processes.
        """
        images, image_of = np.unique(self.batches.owner(captions), return_inverse=True)
        tokens = self.batches.lengths[captions] + 1  # the words and <EOS>
        drawn = np.random.default_rng([self.seed, epoch, step]).integers(self.views, size=len(images))
        mine = np.ones(len(images), dtype=bool)
        if distributed.size() > 1:
            mine = (
                distributed.balance_by_weight(np.bincount(image_of, tokens), distributed.size()) == distributed.rank()
            )
        batch = self.batches.make(captions[mine[image_of]]) if mine.any() else None
        return RankBatch(batch, drawn[mine], int(tokens.sum()), len(captions))


class StepLoss(nn.Module):
    """The loss of a step.

    A module, so that `DistributedDataParallel` can wrap it. DDP averages gradients across processes; each process's
    loss is its part of the sum over all tokens, times the number of processes, so that the average is the gradient
    that one process would have found.
    """

    def __init__(
        self, decoder: Decoder, views: Sequence[Features], critic: SelfCritic | None, precision: Precision,
        settings: Settings,
    ):  # fmt: skip
        """Args: views: the features of each view; critic: None without self-critical training."""
        super().__init__()
        self.decoder, self.views, self.critic = decoder, views, critic
        self.precision, self.settings = precision, settings

    def forward(self, rank_batch: RankBatch, self_critical: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return the loss to differentiate, this process's part of the loss per token, and the mean reward."""
        batch, device = rank_batch.batch, self.precision.device
        loss, reward, features = torch.zeros((), device=device), 0.0, None
        if batch is not None:
            features = gather_views(self.views, batch.images, rank_batch.views, device)  # (I, 49, C) or (I, C)
        if self_critical and self.critic is not None:
            images = batch.images if batch is not None else np.zeros(0, dtype=np.int64)
            loss, reward = self.critic.loss(self.decoder, features, images, self.precision.autocast())
        weight = self.settings.scst_ce_weight if self_critical else 1.0
        if weight and batch is not None and features is not None:
            loss = loss + weight * self.cross_entropy(features, batch.to(device), rank_batch)
        part = loss.detach()
        if batch is None:  # DDP waits for a gradient of every parameter
            loss = loss + sum(parameter.sum() * 0 for parameter in self.decoder.parameters())
        return loss * distributed.size(), part, reward

    def cross_entropy(self, features: torch.Tensor, batch: Batch, rank_batch: RankBatch) -> torch.Tensor:
        """Return the loss per token of the references, with label smoothing and the doubly stochastic term."""
        settings = self.settings
        with self.precision.autocast():
            output = self.decoder(features, batch)
            loss = (
                self.decoder.cross_entropy(output.hidden_out, batch.targets, settings.label_smoothing)
                / rank_batch.tokens
            )
            if settings.attention_reg and output.alphas is not None:
                # Xu et al. (2015), section 4.2.1: over a caption, the weights of each region should sum to one.
                sums = output.alphas.new_zeros(len(batch.row_image), output.alphas.shape[1])
                sums = sums.index_add(0, batch.token_row, output.alphas)  # (R, 49)
                penalty = ((1 - sums) ** 2).mean(1).sum() / rank_batch.captions
                loss = loss + settings.attention_reg * penalty
        return loss


def wrap_ddp(step_loss: StepLoss) -> nn.Module:
    """Average gradients across processes, where there are several."""
    if distributed.size() == 1:
        return step_loss
    # Without device_ids, with which DDP would move the batch's sizes to the GPU too.
    return DistributedDataParallel(step_loss)


@dataclass
class TrainState:
    """Everything a checkpoint restores. It changes while training runs; settings do not."""

    decoder: Decoder
    optimizer: torch.optim.Optimizer
    precision: Precision  # its loss scaler has a state
    schedule: Schedule | None
    loss_sum: torch.Tensor  # over this process's tokens of the epoch, on the device, float64 where it has that
    best: dict[str, Any]  # score, epoch, metric
    first_epoch: int = 0  # epochs that were trained before this run
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    reward_sum: float = 0.0  # of self-critical training: the samples' mean CIDEr-D, summed over steps
    tokens: int = 0  # of these steps
    history: list[dict[str, Any]] = field(default_factory=list)  # a row of scores per epoch
    curve: dict[str, list[Any]] = field(
        default_factory=lambda: {"epochs": [], "training_losses": [], "validation_losses": [], "learning_rates": []}
    )

    def last_epoch(self, settings: Settings) -> int:
        return self.first_epoch + int(settings.epochs + settings.scst_epochs)

    def is_self_critical(self, settings: Settings) -> bool:
        """Return whether the current epoch is one of self-critical training, which come last."""
        return bool(self.epoch >= self.first_epoch + settings.epochs)

    def stopped_early(self, settings: Settings) -> bool:
        since = self.epoch - max(self.best["epoch"], self.first_epoch)
        return bool(settings.early_stopping) and since >= settings.early_stopping

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from an epoch's end: the optimizer, the loss scaler and the histories."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = self.first_epoch = checkpoint["epoch"]
        self.curve, self.history = checkpoint["loss_curve"], checkpoint["metrics_history"]

    def restore_progress(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on within a run: the place in the epoch, the schedule and the best score."""
        progress = checkpoint["progress"]
        self.first_epoch, self.step, self.tokens = progress["first_epoch"], progress["step"], progress["tokens"]
        self.loss_sum += progress["loss_sum"] if distributed.is_first() else 0.0
        self.reward_sum, self.best = progress["reward_sum"], checkpoint["best"]
        self.schedule = Schedule.from_state(checkpoint["schedule"]) if checkpoint["schedule"] else None

    def progress(self) -> dict[str, Any]:
        """Where training stands within the epoch. Every process comes here."""
        (loss_sum,) = distributed.total(float(self.loss_sum))
        return {
            "first_epoch": self.first_epoch, "step": self.step, "loss_sum": loss_sum, "reward_sum": self.reward_sum,
            "tokens": self.tokens,
        }  # fmt: skip


class StepMonitor:
    """Looks at the finished steps of an epoch: skipped batches, saves that are due, signals.

    A look makes the device wait. On a CPU every step is looked at, on a GPU every hundredth. Several processes look
    together, so that they act on the same findings.
    """

    def __init__(
        self, loader: TrainLoader, names: Sequence[str], directory: Path, settings: Settings, stop: StopRequest,
        device: torch.device,
    ):  # fmt: skip
        """Args: names: of all images, for messages; directory: of the run."""
        self.loader, self.names, self.directory, self.settings, self.stop = loader, names, directory, settings, stop
        self.on_cpu, self.interval, self.bad = device.type == "cpu", STEPS_PER_SYNC, 0
        self.last_save = self.last_sync = time.monotonic()
        self.finite: list[torch.Tensor] = []  # of the steps since the last sync

    def save_due(self) -> bool:
        return time.monotonic() - self.last_save > 60 * self.settings.checkpoint_minutes

    def due(self, finite: torch.Tensor, last: bool) -> bool:
        """Note whether a step was finite (bool scalar, on the device); return whether to sync now."""
        self.finite.append(finite)
        urgent = distributed.size() == 1 and (self.stop.signal is not None or self.save_due())
        return self.on_cpu or last or urgent or len(self.finite) >= self.interval

    def sync(self, state: TrainState, plan: Sequence[np.ndarray]) -> tuple[int, bool]:
        """Take the tokens of skipped batches from the state; return the signal that came (0: none) and whether to save.

        Args:
            plan: the caption numbers of each step of the epoch.

        Raises:
            UserError: too many batches of this epoch were skipped.
        """
        pace = (time.monotonic() - self.last_sync) / len(self.finite)
        self.last_sync = time.monotonic()
        flags = (~torch.stack(self.finite)).tolist()
        asked, due, pace, *bad = distributed.largest(self.stop.signal or 0, self.save_due(), pace, *flags)
        self.interval = min(STEPS_PER_SYNC, max(1, int(5 / max(pace, 1e-3))))  # torchrun kills 30 s after a signal
        first = state.step - len(self.finite)
        self.finite.clear()
        for step in (first + number for number, failed in enumerate(bad) if failed):
            self.bad += 1
            skipped = self.loader.batches.make(plan[step])
            state.tokens -= len(skipped.targets)
            images = ", ".join(self.names[image] for image in skipped.images[:3])
            self.report_bad_batch(f"batch {step + 1} of epoch {state.epoch + 1} ({images}, ...)")
        if due:
            self.last_save = time.monotonic()
        return int(asked), bool(due)

    def report_bad_batch(self, where: str) -> None:
        if self.bad > MAX_BAD_BATCHES:
            rate, last = self.settings.learning_rate, self.directory / "last.pt"
            raise UserError(
                f"{where} is the {self.bad}th of this epoch whose loss or gradient is not a finite number. The weights "
                f"in {self.directory} are good: train on from them with a lower --learning_rate (now {rate:g}) or a "
                f"smaller --grad_clip, e.g. --model_path {last} --learning_rate {rate / 10:g}"
            )
        log.warning(
            f"\nSkipped {where}: its loss or gradient is not a finite number ({self.bad} of at most {MAX_BAD_BATCHES})"
        )


def advise_on_memory(device: torch.device, batch_size: int, directory: Path, views: Sequence[Features]) -> str:
    """Say what to do after a device's memory ran out: which flag, and a value that needs less.

    A step's memory grows with its captions, so half of them take about half of what is not weights.
    """
    copies = [view.rows for view in views if isinstance(view, DeviceFeatures)]
    kept = sum(rows.numel() * rows.element_size() for rows in copies)
    spent = f" (at its peak {format_bytes(torch.cuda.max_memory_allocated())})" if device.type == "cuda" else ""
    return (
        f"the memory of {device} ran out{spent} in a step of --batch_size {batch_size}. A step of half as many captions "
        f"takes about half: continue from the last save with --model_path {directory / 'last.pt'} "
        f"--batch_size {max(1, batch_size // 2)}"
        + (f", or free the {format_bytes(kept)} of features kept there with --features_on_device off" if kept else "")
    )


@torch.inference_mode()
def validation_loss(
    decoder: Decoder, features: Features, batches: BatchMaker, images: np.ndarray, batch_size: int,
    device: torch.device,
) -> float:  # fmt: skip
    """Return the plain cross-entropy per token of these images' captions, whatever the training loss adds."""
    decoder.eval()
    total, tokens = 0.0, 0.0
    for captions in distributed.shard(batches.plan(images, max(batch_size, 64))):
        batch = batches.make(captions)
        output = decoder(features.gather(batch.images, device), batch.to(device))
        total += float(decoder.cross_entropy(output.hidden_out, batch.targets.to(device)))
        tokens += len(batch.targets)
    total, tokens = distributed.total(total, tokens)
    return total / tokens


# --------------------------------------------------------------------------------------------------
# Precision


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


# --------------------------------------------------------------------------------------------------
# Signals


class Stopped(Exception):
    """Training was stopped by a signal, after saving where it stood."""

    def __init__(self, number: signal.Signals, directory: Path):
        super().__init__(number.name)
        self.signal, self.directory = number, directory


class StopRequest:
    """A context manager that remembers the first SIGINT or SIGTERM, so that the current step is finished and saved.

    A second signal stops at once, unless it is torchrun passing on one that the processes of a job already received.
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
        rising = min(s.warmup_epochs * s.steps_per_epoch, max(0, total - 1))  # the last step is never the peak
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


# What ScheduleSettings calls a flag.
SCHEDULE_FLAGS = {
    "min_lr": "min_lr", "scheduler_patience": "patience", "scheduler_factor": "factor",
    "scheduler_step_size": "step_size", "scheduler_gamma": "gamma", "scheduler_t_max": "t_max",
    "warmup_epochs": "warmup_epochs",
}  # fmt: skip


def choose_schedule(settings: Settings, checkpoint: Mapping[str, Any] | None, steps: int) -> Schedule | None:
    """Return the learning-rate schedule of a new run, by the table under 'Train longer' in the README.

    Args:
        checkpoint: what the run trains on from, or None.
        steps: of an epoch.

    Raises:
        UserError: an explicit flag of a schedule has no effect.
    """
    explicit = settings.explicit
    first = checkpoint["epoch"] if checkpoint else 0
    saved = Schedule.from_state(checkpoint["schedule"]) if checkpoint and checkpoint["schedule"] else None
    if not settings.epochs:  # self-critical epochs alone: kept for a run that trains on
        return saved
    if not settings.use_scheduler and saved is None:
        idle = sorted(explicit & {*SCHEDULE_FLAGS, "scheduler_type"})
        if idle:
            raise UserError(f"--{idle[0]} has no effect: the checkpoint has no schedule; add --use_scheduler")
        return None
    if saved is not None and (not settings.use_scheduler or settings.scheduler_type == saved.settings.type):
        return continue_schedule(saved, settings, first, steps)
    rate, gamma = settings.learning_rate, settings.scheduler_gamma
    if settings.scheduler_type == "exponential" and "scheduler_gamma" not in explicit:
        gamma **= 1 / settings.epochs  # a tenth over the whole run rather than in each epoch
    if checkpoint:
        if "learning_rate" not in explicit:
            rate = checkpoint["flags"]["learning_rate"]
        before = saved.settings.type if saved else "no schedule"
        log.info(
            f"The checkpoint has {before}: a fresh {settings.scheduler_type} over {settings.epochs} epochs begins at "
            f"learning rate {rate:g}"
        )
    values = {name: getattr(settings, flag) for flag, name in SCHEDULE_FLAGS.items()} | {"gamma": gamma}
    fresh = Schedule(
        ScheduleSettings(
            type=settings.scheduler_type, learning_rate=rate, first_epoch=first, epochs=settings.epochs,
            steps_per_epoch=steps, **values,
        )
    )  # fmt: skip
    warn_of_flat_rate(fresh, first, first + settings.epochs)
    return fresh


def continue_schedule(saved: Schedule, settings: Settings, first: int, steps: int) -> Schedule:
    """Go on with a checkpoint's schedule; explicit flags change it."""
    about = saved.settings
    new_cycle = saved.finished(first) and (about.type == "one_cycle" or "scheduler_t_max" in settings.explicit)
    for flag, name in SCHEDULE_FLAGS.items():
        if flag in settings.explicit:
            setattr(about, name, getattr(settings, flag))
    if "learning_rate" in settings.explicit:
        about.learning_rate = saved.plateau["rate"] = settings.learning_rate
        log.info(f"The new base learning rate is {settings.learning_rate:g}")
    about.steps_per_epoch = steps
    if new_cycle:
        about.first_epoch, about.epochs = first, settings.epochs
        log.info(f"The checkpoint's {about.type} cycle is finished: a new one begins")
    elif not saved.finished(first):
        log.info(f"The checkpoint's schedule goes on: {saved.describe()}")
    warn_of_flat_rate(saved, first, first + settings.epochs)
    return saved


def warn_of_flat_rate(schedule: Schedule, first: int, last: int) -> None:
    """Warn where a schedule ends before training does: all further epochs run at `min_lr`."""
    flat = next((epoch for epoch in range(first, last) if schedule.finished(epoch)), None)
    if flat is None:
        return
    about = schedule.settings
    reached = f"after epoch {flat}" if flat > first else "already"
    log.warning(
        f"Warning: {about.type} reaches its end {reached}; epochs {flat + 1} to {last} run at min_lr {about.min_lr:g}. "
        f"Add --use_scheduler --scheduler_type {about.type} --scheduler_t_max {last - first} for a curve over all of them"
    )


# --------------------------------------------------------------------------------------------------
# Monitoring


class Stopwatch:
    """Adds up the seconds that each part of the program takes; the time since the lap before is the part's.

    A GPU works on while the program goes on: its time shows in whatever part waits for it.
    """

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.reported: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now

    def share(self, part: str) -> float:
        """How much of all time so far went into this part, from 0 to 1."""
        return self.seconds.get(part, 0.0) / max(sum(self.seconds.values()), 1e-9)

    def report(self) -> str:
        """The parts and their seconds since the report before, e.g. `steps 12.1 s, drawing 0.4 s`."""
        spent = {part: seconds - self.reported.get(part, 0.0) for part, seconds in self.seconds.items()}
        self.reported = dict(self.seconds)
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in spent.items() if seconds >= 0.05)
