"""What training needs beside the decoder: the loss of a step, precision, schedules, signals, seeds, TensorBoard."""

from __future__ import annotations

import argparse
import math
import signal
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from captioning import distributed
from captioning.batches import Batch, BatchMaker
from captioning.decoders import Decoder
from captioning.features import DeviceFeatures, Features, gather_views
from captioning.io import UserError, format_bytes, log
from captioning.runs import training_rows
from captioning.scst import SelfCritic

if TYPE_CHECKING:
    from captioning.dataset import CaptionSet


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Seed PyTorch for one training step, so that it draws the same whatever ran before it, and each process its own."""
    own = f" {distributed.rank()}" if distributed.rank() else ""
    torch.manual_seed(zlib.crc32(f"{seed} {epoch} {step}{own}".encode()))


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


MAX_BAD_BATCHES = 10  # in an epoch, whose loss or gradient is no finite number


class Share(NamedTuple):
    """What one process does of a step: all of it where it is alone."""

    batch: Batch | None  # its images' captions; None where there are fewer images than processes
    views: np.ndarray  # int64 (I,) the view of each of its images
    tokens: int  # of the whole step
    captions: int  # of the whole step


def take_share(batches: BatchMaker, captions: np.ndarray, views: int, seeds: list[int]) -> Share:
    """This process's part of a step's captions: whole images, with about as many tokens as everybody's.

    Args:
        captions: numbers (R,) of all captions of the step.
        views: how many there are; which one an image is seen in does not depend on the number of processes.
        seeds: of this step's random numbers.
    """
    images, image_of = np.unique(batches.owner(captions), return_inverse=True)
    tokens = batches.lengths[captions] + 1  # the words and <EOS>
    drawn = np.random.default_rng(seeds).integers(views, size=len(images))
    mine = np.ones(len(images), dtype=bool)
    if distributed.size() > 1:
        mine = distributed.deal(np.bincount(image_of, tokens), distributed.size()) == distributed.rank()
    batch = batches.make(captions[mine[image_of]]) if mine.any() else None
    return Share(batch, drawn[mine], int(tokens.sum()), len(captions))


class StepLoss(nn.Module):
    """From a share of a step to the loss whose gradient moves the decoder.

    A module, so that PyTorch's `DistributedDataParallel` can be put around it. That takes the mean of the
    processes' gradients; each process's loss is its part of the sum over all tokens, times their number, so
    that the mean is the gradient that one process would have found.
    """

    def __init__(self, decoder: Decoder, critic: SelfCritic | None, args: argparse.Namespace, precision: Precision):
        super().__init__()
        self.decoder, self.critic, self.args, self.precision = decoder, critic, args, precision

    def forward(
        self, share: Share, views: list[Features], device: torch.device, self_critical: bool
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Returns the loss to go back from, this process's part of the step's loss per token, and the mean reward."""
        loss, reward = torch.zeros((), device=device), 0.0
        features = None
        if share.batch is not None:
            features = gather_views(views, share.batch.images, share.views, device)  # (I, 49, C) or (I, C)
        if self_critical and self.critic is not None:
            images = share.batch.images if share.batch is not None else np.zeros(0, dtype=np.int64)
            loss, reward = self.critic.loss(self.decoder, features, images, self.precision.autocast())
        weight = self.args.scst_ce_weight if self_critical else 1.0
        if weight and share.batch is not None and features is not None:
            loss = loss + weight * self.cross_entropy(features, share.batch.to(device), share)
        part = loss.detach()
        if share.batch is None:  # every parameter needs a gradient, if only of zeros
            loss = loss + sum(parameter.sum() * 0 for parameter in self.decoder.parameters())
        return loss * distributed.size(), part, reward

    def cross_entropy(self, features: torch.Tensor, batch: Batch, share: Share) -> torch.Tensor:
        """The loss per token of people's captions, with what the flags add to it."""
        with self.precision.autocast():
            output = self.decoder(features, batch)
            loss = self.decoder.cross_entropy(output.hidden_out, batch.targets, self.args.label_smoothing) / share.tokens
            if self.args.attention_reg and output.alphas is not None:
                # Doubly stochastic attention (Xu et al., 2015, section 4.2.1): every region is looked at once in all.
                looked = output.alphas.new_zeros(len(batch.row_image), output.alphas.shape[1])
                looked = looked.index_add(0, batch.token_row, output.alphas)  # (R, 49)
                loss = loss + self.args.attention_reg * ((1 - looked) ** 2).mean(1).sum() / share.captions
        return loss


def shared_out(step_loss: StepLoss) -> nn.Module:
    """The same with its gradients meaned over all processes, where there are several."""
    if distributed.size() == 1:
        return step_loss
    # Without device_ids, with which it would move the batch's sizes to the GPU too.
    return DistributedDataParallel(step_loss)


def report_bad_batch(where: str, bad: int, directory: Path, args: argparse.Namespace) -> None:
    """Name a batch that was skipped, the `bad`th of its epoch.

    Raises:
        UserError: it is one too many.
    """
    if bad > MAX_BAD_BATCHES:
        raise UserError(
            f"{where} is the {bad}th of this epoch whose loss or gradient is not a finite number. The weights in "
            f"{directory} are good: train on from them with a lower --learning_rate (now {args.learning_rate:g}) "
            f"or a smaller --grad_clip, e.g. --model_path {directory / 'last.pt'} --learning_rate {args.learning_rate / 10:g}"
        )
    log.warning(f"\nSkipped {where}: its loss or gradient is not a finite number ({bad} of at most {MAX_BAD_BATCHES})")


def advise_on_memory(device: torch.device, args: argparse.Namespace, directory: Path, views: Sequence[Features]) -> str:
    """What to do after a GPU's memory ran out: which flag, and a value that needs less.

    A step's memory grows with the captions in it, so that half of them take about half of what is not weights.
    """
    smaller = max(1, args.batch_size // 2)
    copies = [view.rows for view in views if isinstance(view, DeviceFeatures)]
    size = sum(rows.numel() * rows.element_size() for rows in copies)
    spent = f" (at its peak {format_bytes(torch.cuda.max_memory_allocated())})" if device.type == "cuda" else ""
    return (
        f"the memory of {device} ran out{spent} in a step of --batch_size {args.batch_size}. A step of half as many captions "
        f"takes about half: go on from the last save with --model_path {directory / 'last.pt'} --batch_size {smaller}"
        + (f", or free the {format_bytes(size)} of features kept there with --features_on_device off" if size else "")
    )


@torch.inference_mode()
def validation_loss(
    decoder: Decoder,
    features: Features,
    batches: BatchMaker,
    images: np.ndarray,
    batch_size: int,
    device: torch.device,
) -> float:
    """Plain cross-entropy per token of these images' captions, whatever the training loss adds."""
    decoder.eval()
    total, tokens = 0.0, 0.0
    for captions in distributed.share(batches.plan(images, max(batch_size, 64))):
        batch = batches.make(captions)
        output = decoder(features.gather(batch.images, device), batch.to(device))
        total += float(decoder.cross_entropy(output.hidden_out, batch.targets.to(device)))
        tokens += len(batch.targets)
    total, tokens = distributed.total(total, tokens)
    return total / tokens


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


def require_tensorboard() -> None:
    """Make sure before hours of training that its files can be written.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tensorboard needs a package that is not installed ({error}): python -m pip install tensorboard==2.21.0"
        ) from None


def write_tensorboard(
    directory: Path,
    curve: Mapping[str, Sequence[Any]],
    history: Sequence[Mapping[str, Any]],
    data: CaptionSet,
    spoken: Sequence[tuple[int, Sequence[str], np.ndarray | None]],
) -> None:
    """Add the last epoch to `directory/tensorboard`: losses, learning rate, scores, captions, attention.

    Each epoch is a file of its own that voids what was written of it or of later ones before, so that an epoch
    may be written twice. Where there is no such folder yet, the curves of earlier epochs are written too.

    Args:
        curve, history: the content of `loss_curve.json` and `metrics_history.json`.
        spoken: an image's position in `data`, its caption's words, and where each word looked ((words, 49) or None).

    Raises:
        UserError: the files cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    from attention_visualization import attention_figure
    from captioning import plots
    from captioning.images import UnreadableImage, open_image

    folder = directory / "tensorboard"
    rows = training_rows(curve, history)
    epoch = rows[-1]["epoch"]
    samples, looked = [], None
    for image, words, attention in spoken:
        name = data.names[image]
        try:
            picture = open_image(data.image_dir / name, at_least=400)
        except UnreadableImage:
            continue
        references = data.references(image)
        samples.append({"image": picture, "name": name, "caption": " ".join(words), "references": references})
        if looked is None and attention is not None and words:
            looked = attention_figure(picture, words, attention, name)
    pictures = {"captions": plots.captions_figure(samples)} if samples else {}
    if looked is not None:
        pictures["attention"] = looked
    try:
        first_time = not folder.is_dir()
        with SummaryWriter(str(folder), purge_step=epoch) as writer:  # type: ignore[no-untyped-call]
            for row in rows if first_time else rows[-1:]:
                for name, value in row.items():
                    if name != "epoch" and value is not None:
                        group = "loss/" if name.endswith("_loss") else "" if name == "learning_rate" else "validation/"
                        writer.add_scalar(group + name.removesuffix("_loss"), value, row["epoch"])  # type: ignore[no-untyped-call]
            for name, figure in pictures.items():
                writer.add_image(name, plots.pixels_of(figure), epoch, dataformats="HWC")  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}. Free some space, or go on without --tensorboard") from error
