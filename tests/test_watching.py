"""What shows how training goes: messages, times, the log as CSV and TensorBoard's files, also of a resumed run."""

import csv
import os
import re
import signal
import time
from pathlib import Path

import pytest
from run_files import only_run, skip_pictures
from test_main import run as train
from test_resume import at_step

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.io import UserError, log
from captioning.runs import plots
from captioning.runs import report as reports
from captioning.runs.directories import training_rows
from captioning.runs.tensorboard import write_tensorboard
from experiment_utils import write_epoch_files

WRITE_REPORT = reports.write_report
CURVE = {"epochs": [1, 2], "training_losses": [2.0, 1.0], "validation_losses": [2.5, 1.5], "learning_rates": [0.1, 0.1]}


@pytest.fixture
def here(tiny_runs, tmp_path, monkeypatch):
    """An empty directory to train in, where drawing takes a tenth of a second; returns data whose features are cached."""
    monkeypatch.chdir(tmp_path)
    skip_pictures(monkeypatch)
    monkeypatch.setattr(plots, "draw_curves", lambda *_: time.sleep(0.1))
    yield tiny_runs["data"]
    log.setLevel("INFO")


def run(data: Path, *flags: str) -> int:
    return train(data, "--decoder", "attention", "--epochs", "2", "--batch_size", "8", *flags)


def test_tensorboard_has_each_epoch_once_also_after_resuming(here, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))  # in the second epoch
        assert run(here, "--tensorboard", "--quiet") == 143
    # A crash between TensorBoard's file and the next save leaves an epoch that is trained again.
    write_tensorboard(only_run(), training_rows(CURVE, []), {})
    assert trainer.main(["--resume", str(only_run())]) == 0
    events = accumulator.EventAccumulator(str(only_run() / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert {"loss/training", "loss/validation", "learning_rate", "validation/cider"} <= set(events.Tags()["scalars"])
    for tag in events.Tags()["scalars"]:
        assert [event.step for event in events.Scalars(tag)] == [1, 2]
    losses = [event.value for event in events.Scalars("loss/training")]
    with open(only_run() / "training_log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert losses == pytest.approx([float(row["training_loss"]) for row in rows])
    assert [event.step for event in events.Images("captions")] == [1, 2] == [int(row["epoch"]) for row in rows]
    assert len(events.Images("attention")) >= 1  # a model that says nothing has none


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        write_tensorboard(tmp_path, training_rows(CURVE, []), {})


def test_without_the_package_the_command_that_mends_it_is_named(here, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert run(here, "--tensorboard") == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not Path("saved_models").exists()


def test_quiet_says_what_came_out_and_verbose_where_the_time_went(here, tiny, monkeypatch, capsys):
    monkeypatch.setattr(reports, "write_report", WRITE_REPORT)  # which is to be quiet, too
    (tiny / "Images" / "stray.jpg").write_bytes(b"x")
    assert run(tiny, "--epochs", "1", "--quiet") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split()[0] for line in lines] == ["Note:", "[1/1]", "Best", "Report:", "Score"]
    assert lines[0].startswith("Note: 1 image(s) without captions")  # warnings stay
    assert trainer.main(["--mode", "test", "--model_path", "saved_models", "--quiet"]) == 0
    assert "CIDEr" in capsys.readouterr().out
    assert run(here, "--epochs", "1", "--verbose") == 0
    out = capsys.readouterr().out
    assert "Epoch 1 completed" in out and "  Time: " in out and re.search(r"drawing \d", out)


def test_a_typed_quiet_or_verbose_wins_over_a_config(tmp_path):
    (tmp_path / "flags.yaml").write_text("quiet: true\n")
    args = trainer.parse_flags(["--config", str(tmp_path / "flags.yaml"), "--verbose"])
    assert args.verbose and not args.quiet


def test_the_log_has_a_row_per_epoch_and_leaves_gaps(tmp_path):
    history = [{"epoch": 2, "split": "val", "beam_size": 1, "images": 5, "cider": 0.5}]
    assert training_rows(CURVE, history)[1]["cider"] == 0.5 and "cider" not in training_rows(CURVE, history)[0]
    write_epoch_files(tmp_path, CURVE, history)
    assert (tmp_path / "training_log.csv").read_text() == (
        "epoch,training_loss,validation_loss,learning_rate,cider\n1,2.0,2.5,0.1,\n2,1.0,1.5,0.1,0.5\n"
    )
