"""Each schedule's curve against its definition; runs under pytest and as a script."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import as_script
import pytest
import torch

from captioning.config.flags import SCHEDULERS
from captioning.config.settings import parse_flags
from captioning.io import UserError
from captioning.training.schedules import Schedule, ScheduleSettings, choose_schedule

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


@pytest.mark.parametrize("kind", ["step", "exponential", "cosine", "one_cycle"])
def test_schedules_end_at_min_lr_and_stay_there(kind):
    assert curve(type=kind, gamma=0.5, min_lr=0.02)[21:] == [pytest.approx(0.02)] * 9


def test_one_cycle_steps_per_batch_up_to_the_peak_and_down_to_min_lr():
    schedule = Schedule(replace(BASE, type="one_cycle", min_lr=1e-5))
    rates = [schedule.rate(epoch, step) for epoch in range(12) for step in range(5)]
    assert rates[0] == pytest.approx(0.1 / 25)
    assert rates.index(max(rates)) == 10 and max(rates) == pytest.approx(0.1)  # two warm-up epochs of five steps
    assert rates[-1] == pytest.approx(1e-5)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize("epochs, warmup", [(2, 1), (3, 2)])
def test_one_cycle_with_one_step_an_epoch_does_not_end_at_its_peak(epochs, warmup):
    about = replace(BASE, type="one_cycle", epochs=epochs, warmup_epochs=warmup, steps_per_epoch=1, min_lr=1e-5)
    rates = [Schedule(about).rate(epoch) for epoch in range(epochs)]
    assert max(rates) == pytest.approx(0.1) and rates[-1] == pytest.approx(1e-5)


def settings(*argv):
    return parse_flags(["--use_scheduler", *argv])


CHECKPOINT = {
    "epoch": 6, "schedule": None, "decoding": None, "consensus": None, "flags": parse_flags(["--learning_rate", "0.004"]).stored(),
}  # fmt: skip


def test_a_fresh_schedule_begins_at_the_runs_rate(capsys):
    """The rate of the checkpoint, not the default of --learning_rate."""
    later = settings("--scheduler_type", "step", "--model_path", "x.pt").with_checkpoint(CHECKPOINT, Path("x.pt"))
    assert later.stored()["learning_rate"] == 0.004  # for the run after this one
    schedule = choose_schedule(later, None, 6, 5)
    assert schedule.rate(6) == 0.004 and "at learning rate 0.004" in capsys.readouterr().out


def test_a_flag_of_a_schedule_needs_a_schedule():
    later = parse_flags(["--model_path", "x.pt", "--min_lr", "1e-5"]).with_checkpoint(CHECKPOINT, Path("x.pt"))
    with pytest.raises(UserError, match="--min_lr has no effect: the checkpoint has no schedule"):
        choose_schedule(later, None, 6, 5)


def test_training_past_the_end_of_a_schedule_is_told_at_the_start(capsys):
    choose_schedule(settings("--scheduler_type", "cosine", "--epochs", "12"), None, 0, 5)
    out = capsys.readouterr().out
    assert "epochs 11 to 12 run at min_lr 1e-07" in out and "--scheduler_t_max 12" in out


@pytest.mark.parametrize(
    "kind, advice", [("cosine", "Add --scheduler_t_max 14 "), ("one_cycle", "--scheduler_t_max 8 ")]
)
def test_the_advice_for_a_schedule_that_is_under_way_helps(capsys, kind, advice):
    """With the advised flags the rate falls until the last epoch."""
    state = Schedule(replace(BASE, type=kind, epochs=10, t_max=10)).state()
    resumed = ["--model_path", "x.pt", "--epochs", "8"]
    choose_schedule(parse_flags(resumed), Schedule.from_state(state), 6, 5)
    out = capsys.readouterr().out
    assert "reaches its end after epoch 10" in out and advice in out
    advised = out.split("Add ")[1].split(" for a curve")[0].split()
    schedule = choose_schedule(parse_flags([*resumed, *advised]), Schedule.from_state(state), 6, 5)
    rates = [schedule.rate(epoch) for epoch in range(6, 15)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 9
    assert "Warning" not in capsys.readouterr().out


def test_exponential_takes_a_tenth_over_the_whole_run_also_with_a_config(tmp_path):
    """The original took a tenth in each epoch."""
    (tmp_path / "x.yaml").write_text("epochs: 5\nuse_scheduler: true\nscheduler_type: exponential\n")
    schedule = choose_schedule(parse_flags(["--config", str(tmp_path / "x.yaml")]), None, 0, 5)
    assert schedule.rate(5) == pytest.approx(1e-5) and schedule.rate(1) > 6e-5
    typed = choose_schedule(settings("--scheduler_type", "exponential", "--scheduler_gamma", "0.5"), None, 0, 5)
    assert typed.rate(1) == pytest.approx(5e-5)


def test_an_epoch_that_does_not_follow_a_schedule_delays_it():
    """Self-critical epochs have rates of their own."""
    schedule, other = Schedule(replace(BASE, type="cosine")), Schedule(replace(BASE, type="cosine"))
    schedule.rest()
    assert schedule.rate(3) == other.rate(2) and schedule.rate(4) == other.rate(3)


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


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_state_goes_on_where_it_was(kind):
    """Within an epoch too, and with further losses."""
    schedule = Schedule(replace(BASE, type=kind, patience=1))
    for loss in (2.0, 2.0, 2.0, 2.0):
        schedule.epoch_ended(loss)
    again = Schedule.from_state(schedule.state())
    for each in (schedule, again):
        each.epoch_ended(2.0)
    places = [(epoch, step) for epoch in range(4, 12) for step in range(5)]
    assert [again.rate(*place) for place in places] == [schedule.rate(*place) for place in places]
    assert again.state() == schedule.state()


if __name__ == "__main__":
    sys.exit(as_script.run(__file__))
