"""Each schedule's curve against its definition; runs under pytest and as a script."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import as_script
import pytest
import torch

from captioning.schedules import Schedule, ScheduleSettings

BASE = ScheduleSettings("step", 0.1, 1e-7, 3, 0.5, 7, 0.1, 10, 2, 0, 12, 5)


def curve(**changes):
    schedule = Schedule(replace(BASE, **changes))
    return [schedule.rate(epoch) for epoch in range(30)]


def pytorch_curve(make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler, rates = make(optimizer), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "changes, make",
    [
        ({"type": "step"}, lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.1)),
        ({"type": "exponential", "gamma": 0.8}, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8)),
        ({"type": "cosine", "t_max": 10}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10, 1e-7)),
    ],
)
def test_the_first_ten_epochs_are_pytorchs(changes, make):
    assert curve(**changes)[:10] == pytest.approx(pytorch_curve(make), rel=1e-9)


def test_cosine_does_not_climb_after_t_max():
    rates = curve(type="cosine", t_max=10, min_lr=1e-3)
    assert rates[10:] == [1e-3] * 20


@pytest.mark.parametrize("kind", ["step", "exponential", "cosine", "one_cycle"])
def test_no_schedule_falls_below_min_lr(kind):
    assert min(curve(type=kind, min_lr=0.02)) == pytest.approx(0.02)


def test_one_cycle_steps_per_batch_up_to_the_peak_and_down_to_min_lr():
    schedule = Schedule(replace(BASE, type="one_cycle", min_lr=1e-5))
    rates = [schedule.rate(epoch, step) for epoch in range(12) for step in range(5)]
    assert rates[0] == pytest.approx(0.1 / 25)
    assert rates.index(max(rates)) == 10 and max(rates) == pytest.approx(0.1)  # two warm-up epochs of five steps
    assert rates[-1] == pytest.approx(1e-5)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_plateau_is_pytorchs():
    losses = [3, 2, 2, 2, 2, 2, 2, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]
    ours = Schedule(replace(BASE, type="reduce_lr_on_plateau", patience=2))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, min_lr=1e-7)
    for loss in losses:
        ours.epoch_ended(loss)
        theirs.step(loss)
        assert ours.rate(0) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert ours.rate(0) < 0.1


def test_state_goes_on_where_it_was():
    schedule = Schedule(replace(BASE, type="reduce_lr_on_plateau", patience=0))
    for loss in (2.0, 2.0, 2.0):
        schedule.epoch_ended(loss)
    assert Schedule.from_state(schedule.state()).state() == schedule.state()


if __name__ == "__main__":
    sys.exit(as_script.run(__file__))
