"""The main program from flags to captions, on a tiny set; defects 5, 7, 12 and 14 of the original."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import draw_tiny
from run_files import assert_room, only_run, skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.data.batches import Collator
from captioning.data.dataset import build_vocabulary, load_caption_set
from captioning.runs.checkpoints import load_checkpoint
from captioning.runs.directories import read_run
from captioning.training.building import note_unused_gpu, warn_of_small_data
from captioning.training.schedules import Schedule, ScheduleSettings

SMALL = "--encoder efficientnet_lite0 --embed_size 16 --hidden_size 16 --num_layers 1 --freq_threshold 1 --epochs 2"


def run(data: Path, *flags: str) -> int:
    """Train for two epochs; the cache lies beside the data."""
    where = ["--data_dir", str(data), "--feature_cache", str(data.parent / "cache")]
    return trainer.main(["--dataset_type", "custom", *where, *SMALL.split(), *flags])


@pytest.fixture
def here(tiny_runs, tmp_path, monkeypatch):
    """An empty directory to train in, without pictures; returns data whose features are cached."""
    monkeypatch.chdir(tmp_path)
    skip_pictures(monkeypatch)
    return tiny_runs["data"]


@pytest.mark.parametrize("decoder", ("lstm", "attention"))
def test_train_resume_and_test(tiny_runs, tmp_path, monkeypatch, capsys, decoder):
    monkeypatch.chdir(tmp_path)
    flags = ["--decoder", decoder, "--use_scheduler", "--scheduler_type", "cosine"]
    pictures = set()
    if decoder == "attention":
        flags += ["--save_attention_viz", "--advanced_attention_viz", "--attention_viz_samples", "1"]
        flags += ["--attention_viz_dpi", "50"]
        pictures = {"training_losses.png", "learning_rate.png", "attention_viz_sample_1.png", "report.html"}
    else:
        skip_pictures(monkeypatch)
    assert run(tiny_runs["data"], *flags) == 0
    skip_pictures(monkeypatch)
    first = only_run()
    names = {path.name for path in first.iterdir()}
    assert {"run_config.json", "run_summary.txt", "loss_curve.json", "metrics_history.json", "split.json"} <= names
    assert {"best.pt", "last.pt", "model_epoch_1.pt", "model_epoch_2.pt", *pictures} <= names
    curve = json.loads((first / "loss_curve.json").read_text())
    assert set(curve) == {"epochs", "training_losses", "validation_losses", "learning_rates"}
    assert all(len(values) == 2 for values in curve.values())
    assert curve["learning_rates"][1] < curve["learning_rates"][0]
    assert {"bleu", "wer", "rouge", "cider"} <= set(json.loads((first / "metrics_history.json").read_text())[0])
    checkpoint = torch.load(first / "model_epoch_2.pt", weights_only=True)
    assert checkpoint["flags"]["attention_dim"] == 512 and checkpoint["flags"]["decoder"] == decoder

    # Resume: no --decoder typed; schedule and histories come along, the old run is untouched.
    before = sorted((path.name, path.stat().st_mtime_ns) for path in first.iterdir())
    assert trainer.main(["--model_path", str(first / "model_epoch_2.pt"), "--epochs", "1"]) == 0
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in first.iterdir())
    (second,) = set(first.parent.iterdir()) - {first}
    resumed = json.loads((second / "loss_curve.json").read_text())
    assert resumed["epochs"] == [1, 2, 3] and resumed["training_losses"][:2] == curve["training_losses"]
    assert resumed["learning_rates"][2] < resumed["learning_rates"][1]
    assert (second / "best.pt").is_file()

    assert trainer.main(["--mode", "test", "--model_path", str(first.parent / "best.pt")]) == 0
    out = capsys.readouterr().out
    assert "Scheduler: CosineAnnealingLR (T_max=10)" in out and "BLEU-4" in out
    results = json.loads((second / "test_metrics.json").read_text())
    assert [entry["beam_size"] for entry in results] == [1, 3] and results[0]["images"] == 2
    captions = json.loads((second / results[0]["captions_file"]).read_text())
    assert {entry["image_id"] for entry in captions} <= {f"p{n:02d}.jpg" for n in range(20)}


def test_training_is_reproducible_bit_for_bit_also_when_it_trains_on(here, tiny_runs):
    for place in ("first", "second"):
        assert run(here, "--decoder", "attention", "--epochs", "1", "--model_save_dir", place) == 0
    earlier = tiny_runs["attention"] / "model_epoch_11.pt"
    assert trainer.main(["--model_path", str(earlier), "--epochs", "1", "--model_save_dir", "more"]) == 0
    for ours, theirs, epoch in ((only_run("first"), only_run("second"), 1), (only_run("more"), earlier.parent, 12)):
        a, b = (
            torch.load(folder / f"model_epoch_{epoch}.pt", weights_only=True)["decoder"] for folder in (ours, theirs)
        )
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("decoder", ("lstm", "attention"))
def test_a_dry_run_without_a_cache_leaves_nothing(here, capsys, decoder):
    assert run(here, "--decoder", decoder, "--feature_cache", "off", "--dry_run", "--device", "cpu") == 0
    assert "files of the dry run are deleted" in capsys.readouterr().out
    assert not list(Path().rglob("*.pt")) and not Path("feature_cache").exists()


def test_mistakes_are_one_line_and_exit_code_two(here, capsys):
    Path("not_a_model.pt").write_bytes(b"hello")
    for flags, message in (
        (["--model_path", "not_a_model.pt"], "cannot be read as a checkpoint"),
        (["--model_path", "absent/best.pt"], "is not there"),
        (["--dataset_type", "flickr8k"], "download_datasets.py"),
    ):
        assert trainer.main(flags) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and "Traceback" not in error
    assert not Path("saved_models").exists()


def test_a_save_directory_that_is_a_file(here, capsys):
    Path("taken").write_text("mine")
    assert run(here, "--model_save_dir", "taken") == 2
    assert "cannot write into" in capsys.readouterr().err and Path("taken").read_text() == "mine"


def test_early_stopping_and_keep_checkpoints_keep_best_and_last(here, capsys):
    flags = ["--epochs", "9", "--early_stopping", "1", "--best_metric", "val_loss", "--learning_rate", "50"]
    assert run(here, *flags, "--keep_checkpoints", "1") == 0
    assert "Stopped early: no better val_loss in 1 epochs" in capsys.readouterr().out
    last = load_checkpoint(only_run() / "last.pt")["epoch"]
    assert 2 <= last < 9
    assert {path.name for path in only_run().glob("*.pt")} == {"best.pt", "last.pt", f"model_epoch_{last}.pt"}


@pytest.mark.parametrize("flags", [["--keep_checkpoints", "1"], ["--epochs", "2"]])
def test_the_room_that_is_printed_is_what_is_written(here, monkeypatch, capsys, flags):
    """Here of a frozen encoder, where the first epoch is the best."""
    losses = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(
        trainer, "evaluate", lambda *_: (next(losses), {"cider": 0.0, "bleu4": 0.0, "rouge": 0.0, "wer": 0.0})
    )
    sizes = ["--embed_size", "128", "--hidden_size", "512", "--best_metric", "val_loss", "--epochs", "3"]
    assert run(here, *sizes, *flags) == 0
    assert_room(capsys.readouterr().out, only_run())


def test_an_unreadable_image_is_named(tiny, capsys):
    (tiny / "Images" / "p05.jpg").write_bytes(b"no picture")
    assert run(tiny) == 2
    captured = capsys.readouterr()
    assert "p05.jpg" in captured.out and "more than 1 %" in captured.err


def test_a_small_data_set_is_told_with_figures(tiny, capsys):
    data = load_caption_set(tiny)
    vocabulary = build_vocabulary(data, 20)
    collator = Collator(data, vocabulary, 40)
    warn_of_small_data(data, collator, steps=1, parameters=26_000_000)
    out = capsys.readouterr().out
    assert "32 training captions for 26,000,000 weights, 1 step(s) an epoch, " in out and "% of the training" in out
    assert "--init_from" in out and "--config own_photos_from_nothing" in out
    warn_of_small_data(data, Collator(data, build_vocabulary(data, 1), 40), steps=50, parameters=50_000)
    assert not capsys.readouterr().out


def test_a_gpu_that_pytorch_does_not_see_is_told(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    note_unused_gpu(torch.device("cpu"))
    assert "this PyTorch sees no GPU" in capsys.readouterr().out


def test_going_on_with_another_data_set_keeps_no_old_model(here, tiny_runs, tiny, tmp_path, capsys):
    """The score on the old set is no bar for the new one."""
    first, other = tiny_runs["attention"], draw_tiny(tmp_path / "other")
    for path in (other / "Images").iterdir():  # other photos under other names
        path.rename(path.with_name("x" + path.name))
    captions = (other / "captions.txt").read_text().replace("\np", "\nxp")
    (other / "captions.txt").write_text(captions)
    flags = ["--model_path", str(first), "--data_dir", str(other), "--epochs", "1"]
    assert trainer.main([*flags, "--model_save_dir", "saved_models", "--feature_cache", "cache"]) == 0
    saved, old = (torch.load(path / "best.pt", weights_only=True) for path in (only_run(), first))
    trained = saved["split"]["inherited"]["names"]
    assert saved["epoch"] == 13 and set(trained) == set(old["split"]["train"]["names"])
    for split, images in (("train", trained[4:]), ("val", trained[2:4]), ("test", trained[:2])):
        (tiny / f"{split}.txt").write_text("\n".join(images))
    assert trainer.main(["--mode", "test", "--model_path", str(only_run()), "--data_dir", str(tiny)]) == 2
    assert "was trained on" in capsys.readouterr().err


def test_a_model_is_not_tested_on_images_it_was_trained_on(tiny_runs, tiny, tmp_path, monkeypatch, capsys):
    """Lists that came into the folder later do not replace the split of the checkpoint."""
    skip_pictures(monkeypatch)
    trained = shutil.copytree(tiny_runs["attention"], tmp_path / "run")
    split = torch.load(trained / "best.pt", weights_only=True)["split"]
    names = [f"p{number:02d}.jpg" for number in range(20)]
    for split_name, images in (("train", names[10:]), ("val", names[8:10]), ("test", names[:8])):
        (tiny / f"{split_name}.txt").write_text("\n".join(images))
    assert trainer.main(["--mode", "test", "--model_path", str(trained), "--data_dir", str(tiny)]) == 0
    (file,) = trained.glob("test_captions_greedy.json")
    assert {row["image_id"] for row in json.loads(file.read_text())} == set(split["test"]["names"])
    assert "from the checkpoint" in capsys.readouterr().out


def test_self_critical_epochs_are_compared_by_cider_and_delay_the_schedule(here):
    """The validation loss, which they do not lower, threw them away; and they used up epochs of the schedule."""
    flags = ["--best_metric", "val_loss", "--use_scheduler", "--scheduler_type", "cosine", "--scheduler_t_max", "8"]
    assert run(here, *flags, "--min_lr", "1e-5", "--scst_epochs", "2") == 0
    first = load_checkpoint(only_run() / "last.pt")
    rows = first["metrics_history"]
    best = max((row for row in rows if row["is_best"]), key=lambda row: row["epoch"])
    assert first["best"] == {"metric": "cider", "epoch": best["epoch"], "score": best["cider"]}
    assert all(row["cider"] <= best["cider"] for row in rows[2:])
    assert read_run(only_run()).best["epoch"] == load_checkpoint(only_run() / "best.pt")["epoch"] == best["epoch"]
    assert run(here, "--model_path", str(only_run() / "last.pt"), *flags[2:5], "--model_save_dir", "more") == 0
    more = load_checkpoint(only_run("more") / "last.pt")
    rates = more["loss_curve"]["learning_rates"]
    cosine = [Schedule(ScheduleSettings(**first["schedule"]["settings"])).rate(epoch) for epoch in (4, 5)]
    assert rates[4:] == cosine and rates[4] < rates[1]
    assert (more["flags"]["scheduler_type"], more["flags"]["scheduler_t_max"], more["flags"]["min_lr"]) == (
        "cosine",
        8,
        1e-5,
    )
