"""The five learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from captioning.config.settings import Settings
from captioning.io import UserError, log


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

    def __init__(self, settings: ScheduleSettings, plateau: dict[str, Any] | None = None, inherited: bool = False):
        """Args: plateau: the memory of reduce_lr_on_plateau; inherited: whether a checkpoint had it."""
        self.settings, self.inherited = settings, inherited
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

    def rest(self) -> None:
        """Let an epoch pass that does not follow the schedule: the rest of its curve comes an epoch later."""
        self.settings.first_epoch += 1

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

    def flags(self) -> dict[str, Any]:
        """Return the flags that describe this schedule."""
        about = asdict(self.settings)
        return {
            "use_scheduler": True, "scheduler_type": about["type"],
            **{flag: about[name] for flag, name in SCHEDULE_FLAGS.items()},
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        return {"settings": asdict(self.settings), "plateau": dict(self.plateau)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Schedule:
        return cls(ScheduleSettings(**state["settings"]), dict(state["plateau"]), inherited=True)


def cosine(start: float, end: float, part: float) -> float:
    """Half a cosine from `start` (part 0) to `end` (part 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


# What ScheduleSettings calls a flag.
SCHEDULE_FLAGS = {
    "min_lr": "min_lr", "scheduler_patience": "patience", "scheduler_factor": "factor",
    "scheduler_step_size": "step_size", "scheduler_gamma": "gamma", "scheduler_t_max": "t_max",
    "warmup_epochs": "warmup_epochs",
}  # fmt: skip


def choose_schedule(settings: Settings, saved: Schedule | None, first: int, steps: int) -> Schedule | None:
    """Return the learning-rate schedule of a new run, by the table under 'Train longer' in docs/training.md.

    Args:
        saved: that of the checkpoint which the run trains on from, or None.
        first: epochs that were trained before the run.
        steps: of an epoch.

    Raises:
        UserError: an explicit flag of a schedule has no effect.
    """
    explicit = settings.explicit
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
    if first:
        before = saved.settings.type if saved else "no schedule"
        log.info(
            f"The checkpoint has {before}: a new {settings.scheduler_type} schedule over {settings.epochs} epochs begins at "
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
    """Warn where a schedule ends before training does, all further epochs at `min_lr`, and name the flags that help."""
    flat = next((epoch for epoch in range(first, last) if schedule.finished(epoch)), None)
    if flat is None:
        return
    about = schedule.settings
    reached = f"after epoch {flat}" if flat > first else "already"
    begun = first if flat == first or about.type == "one_cycle" else about.first_epoch  # of the curve that is advised
    fresh = "--use_scheduler --scheduler_type cosine " if about.type == "one_cycle" else ""
    log.warning(
        f"Warning: {about.type} reaches its end {reached}; epochs {flat + 1} to {last} run at min_lr {about.min_lr:g}. "
        f"Add {fresh}--scheduler_t_max {last - begun} for a curve over all of them"
    )
