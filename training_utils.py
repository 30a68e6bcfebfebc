"""What training needs beside the decoder: steps and their loss, precision, signals."""

from __future__ import annotations

import contextlib
import ctypes
import math
import signal
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from captioning import distributed
from captioning.config.settings import Settings
from captioning.data.batches import Batch, Collator
from captioning.decoders.base import Decoder, group_sizes
from captioning.encoders.features import DeviceFeatures, Features, gather_views
from captioning.io import Terminated, UserError, format_bytes, log
from captioning.runs.directories import reproducing_command
from captioning.training.schedules import Schedule
from captioning.training.self_critical import SelfCritic

MAX_BAD_BATCHES = 10  # batches of an epoch whose loss or gradient may be non-finite
TRIM_SECONDS = 20.0  # between two calls of `trim_memory`, which takes some hundredths of a second
STEPS_PER_SYNC = 100  # of a GPU or of several processes: looking at a step makes the device wait for it
NOBODY = np.zeros(0, dtype=np.int64)
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


class BatchSampler:
    """The training captions of each epoch, cut into steps."""

    def __init__(
        self, collator: Collator, images: np.ndarray, views: int, batch_size: int, seed: int,
        old_images: np.ndarray = NOBODY, old_per_epoch: int = 0,
    ):  # fmt: skip
        """Prepare the epochs of a training set.

        Args:
            images: positions (n,) of the training images.
            views: how many each image has.
            old_images: positions of images of which every epoch has the next `old_per_epoch` beside these.
        """
        self.collator, self.images, self.views, self.batch_size, self.seed = collator, images, views, batch_size, seed
        self.old_images, self.old_per_epoch = old_images, old_per_epoch
        self.steps = len(collator.plan(self.epoch_images(0), batch_size))

    def epoch_images(self, epoch: int) -> np.ndarray:
        """Return the positions of the images of an epoch."""
        turn = np.arange(epoch * self.old_per_epoch, (epoch + 1) * self.old_per_epoch)
        return np.concatenate([self.images, np.take(self.old_images, turn, mode="wrap")])

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Return the caption numbers (R,) of each step, in an order that depends on (seed, epoch) alone."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.epoch_images(epoch))
        return self.collator.plan(order, self.batch_size)

    def rank_batch(self, captions: np.ndarray, epoch: int, step: int) -> RankBatch:
        """Return this process's part of a step: whole images, with about as many tokens as any other's part.

        The view of an image depends on (seed, epoch, step) alone, not on the number of processes.
        """
        images, image_of = np.unique(self.collator.owner(captions), return_inverse=True)
        tokens = self.collator.lengths[captions] + 1  # the words and <EOS>
        drawn = np.random.default_rng([self.seed, epoch, step]).integers(self.views, size=len(images))
        mine = np.ones(len(images), dtype=bool)
        if distributed.size() > 1:
            mine = (
                distributed.balance_by_weight(np.bincount(image_of, tokens), distributed.size()) == distributed.rank()
            )
        batch = self.collator.collate(captions[mine[image_of]]) if mine.any() else None
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

    @classmethod
    def begin(cls, decoder: Decoder, settings: Settings, device: torch.device) -> TrainState:
        """Return the state before the first step."""
        precision, optimizer = Precision(settings.precision, device), make_optimizer(decoder, settings)
        loss_sum = torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        best = {"score": -math.inf, "epoch": 0, "metric": settings.best_metric}
        return cls(decoder, optimizer, precision, None, loss_sum, best)

    def is_start(self, settings: Settings) -> bool:
        """Return whether the model of `--init_from` is to be scored as it comes, as epoch 0."""
        return settings.init_from is not None and not (self.curve["epochs"] or self.step)

    def end_epoch(
        self, training: float | None, validation: float, rate: float | None, scores: dict[str, Any], metric: str,
        self_critical: bool,
    ) -> bool:  # fmt: skip
        """Record an epoch: its losses, its learning rate and its scores; return whether it is the best so far.

        Args:
            training, rate: None for epoch 0, which is the model of `--init_from` as it comes.
            metric: of `--best_metric`. From the first self-critical epoch on it is CIDEr, the reward, also of the best
                epoch before: the loss is not what these epochs lower.
        """
        if self_critical:
            scores["reward"] = self.reward_sum / max(1, self.step)
            if self.best["metric"] != "cider":
                known = [row["cider"] for row in self.history if row["epoch"] == self.best["epoch"]]
                self.best |= {"score": known[-1] if known else -math.inf, "metric": "cider"}
        if self.schedule is not None and training is not None:
            if self_critical:
                self.schedule.rest()
            else:
                self.schedule.epoch_ended(validation)
        self.epoch += training is not None
        self.step, self.tokens, self.reward_sum = 0, 0, 0.0
        self.loss_sum.zero_()
        for key, value in zip(self.curve, (self.epoch, training, validation, rate), strict=True):
            self.curve[key].append(value)
        metric = "cider" if self_critical else metric
        score = -validation if metric == "val_loss" else scores[metric]
        is_best = bool(score > self.best["score"])
        if is_best:
            self.best = {"score": score, "epoch": self.epoch, "metric": metric}
        self.history.append({"epoch": self.epoch, "is_best": is_best, **scores})
        return is_best

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from an epoch's end: the optimizer, the loss scaler and the histories."""
        if checkpoint["optimizer"] is not None:  # of a model whose weights alone are taken
            moments = {"state": checkpoint["optimizer"]["state"]}  # rates, decay and betas are the settings'
            self.optimizer.load_state_dict(self.optimizer.state_dict() | moments)
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

    def checkpoint(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that is needed to train on from this step, or to caption. Every process comes here.

        Args:
            constants: what every checkpoint of the run has.
        """
        (loss_sum,) = distributed.total(float(self.loss_sum))
        return {
            "epoch": self.epoch, **constants, "decoder": dict(self.decoder.state_dict()),
            "optimizer": self.optimizer.state_dict(), "scaler": self.precision.scaler.state_dict(),
            "schedule": self.schedule.state() if self.schedule else None,
            "progress": {
                "first_epoch": self.first_epoch, "step": self.step, "loss_sum": loss_sum,
                "reward_sum": self.reward_sum, "tokens": self.tokens,
            },
            "loss_curve": self.curve, "metrics_history": self.history, "best": self.best,
        }  # fmt: skip


FINE_TUNE_RATE = 0.3  # of the decoder's learning rate, for stages of the encoder that are trained (docs/lab/results.md)


def make_optimizer(decoder: Decoder, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW for a decoder; stages of the encoder that are trained with it are a group without weight decay."""
    parameters, (own, *stages) = list(decoder.parameters()), group_sizes(decoder)
    groups: list[dict[str, Any]] = [{"params": parameters[:own]}]
    if stages:
        groups.append({"params": parameters[own:], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, rate: float, is_random: bool, settings: Settings) -> None:
    """Set the decoder's learning rate, and in proportion that of trained stages, which rest while it is random."""
    asked = settings.fine_tune_learning_rate
    factor = FINE_TUNE_RATE if asked is None else asked / settings.learning_rate
    for group, share in zip(optimizer.param_groups, (1.0, 0.0 if is_random else factor), strict=False):
        group["lr"] = rate * share


def trim_memory() -> None:
    """Give back what the C library keeps of freed memory: batches of ever other sizes leave gaps, which grow (glibc)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


class StepMonitor:
    """Finds skipped batches, saves that are due and signals among the finished steps of an epoch.

    A sync makes the device wait. On a CPU every step is synced, on a GPU every hundredth. Several processes sync
    together, so that they act on the same findings.
    """

    def __init__(self, sampler: BatchSampler, directory: Path, settings: Settings, device: torch.device):
        """Args: directory: of the run."""
        self.sampler, self.directory, self.settings, self.stop = sampler, directory, settings, StopRequest()
        self.on_cpu, self.interval, self.bad = device.type == "cpu", STEPS_PER_SYNC, 0
        self.last_save = self.last_sync = self.last_trim = time.monotonic()
        self.finite: list[torch.Tensor] = []  # of the steps since the last sync

    def begin_epoch(self) -> None:
        self.bad, self.last_sync = 0, time.monotonic()

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
        if self.on_cpu and self.last_sync - self.last_trim > TRIM_SECONDS:
            trim_memory()
            self.last_trim = self.last_sync
        flags = (~torch.stack(self.finite)).tolist()
        asked, due, pace, *bad = distributed.largest(self.stop.signal or 0, self.save_due(), pace, *flags)
        self.interval = min(STEPS_PER_SYNC, max(1, int(5 / max(pace, 1e-3))))  # torchrun kills 30 s after a signal
        first = state.step - len(self.finite)
        self.finite.clear()
        for step in (first + number for number, failed in enumerate(bad) if failed):
            self.bad += 1
            skipped = self.sampler.collator.collate(plan[step])
            state.tokens -= len(skipped.targets)
            images = ", ".join(self.sampler.collator.names[image] for image in skipped.images[:3])
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
    decoder: Decoder, features: Features, collator: Collator, images: np.ndarray, batch_size: int,
    device: torch.device,
) -> float:  # fmt: skip
    """Return the plain cross-entropy per token of these images' captions, whatever the training loss adds."""
    decoder.eval()
    total, tokens = 0.0, 0.0
    for captions in distributed.shard(collator.plan(images, max(batch_size, 64))):
        batch = collator.collate(captions)
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

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Replace the gradients with those of the loss, which fp16 scales up."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def clip_and_update(self, optimizer: torch.optim.Optimizer, grad_clip: float) -> torch.Tensor:
        """Clip the gradients and update the weights; return the norm before, on the device.

        Where the norm is not a finite number the weights stay as they are: the fused optimizer is told so
        on the device, without waiting for it.
        """
        moving = [group for group in optimizer.param_groups if group["lr"]] or optimizer.param_groups
        parameters = [p for group in moving for p in group["params"]]  # resting stages do not scale the others down
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


class Stopped(Terminated):
    """Training was stopped by a signal, after saving where it stood."""

    def __init__(self, number: int, directory: Path):
        advice = f"Stopped. Continue where it stands: {reproducing_command(['--resume', str(directory)])}"
        super().__init__(number, advice)


class StopRequest:
    """A context manager that remembers the first SIGINT or SIGTERM, so that the current step is finished and saved.

    A second signal stops at once, unless it is torchrun passing on one that the processes of a job already received.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.when = 0.0

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGHUP"):  # a closed terminal does not end training
            self.before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self, directory: Path) -> None:
        """Raise Stopped if a signal came to any process."""
        (asked,) = distributed.largest(self.signal or 0)
        if asked:
            raise Stopped(int(asked), directory)

    def handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            if distributed.launched() and time.monotonic() - self.when < SAME_SIGNAL:
                return
            raise KeyboardInterrupt
        self.signal, self.when = number, time.monotonic()
        log.warning(f"\n{signal.Signals(number).name}: saving after this step; a second time stops at once")


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
