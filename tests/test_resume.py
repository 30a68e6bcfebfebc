"""Training that was interrupted ends with the weights of training that was not, bit for bit."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import draw_tiny
from run_files import only_run, skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
import training_utils
from captioning.data.dataset import load_caption_set
from captioning.encoders import features as feature_cache
from captioning.encoders.feature_store import RECORD
from captioning.runs.directories import lock_run_directory
from training_utils import Precision

FLAGS = [
    "--encoder", "efficientnet_lite0", "--embed_size", "16", "--hidden_size", "16", "--freq_threshold", "1",
    "--epochs", "3", "--batch_size", "8", "--label_smoothing", "0.1", "--drop_prob", "0.4",
]  # fmt: skip
CASES = [
    ("lstm", ["--num_layers", "2"]),
    ("attention", ["--num_layers", "1", "--attention_reg", "0.5", "--early_stopping", "2"]),
    ("attention", ["--num_layers", "1", "--views", "mirror", "--fine_tune", "1"]),
    *(  # one schedule that changes by step, and the one that remembers
        (decoder, ["--learning_rate", "0.01", "--use_scheduler", "--scheduler_type", kind])
        for decoder, kind in (("transformer", "one_cycle"), ("show_attend_tell", "reduce_lr_on_plateau"))
    ),
]


class Crash(BaseException):
    """Nothing in the program catches this, as nothing catches kill -9."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with the tiny set, where its features and the runs of `undisturbed` come to lie."""
    place = tmp_path_factory.mktemp("resume")
    draw_tiny(place / "tiny")
    return place


@pytest.fixture
def here(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    skip_pictures(monkeypatch)
    return shared


def run(shared: Path, place: str, decoder: str, *flags: str) -> int:
    where = {"data_dir": shared / "tiny", "feature_cache": shared / "features", "model_save_dir": place}
    typed = [word for name, folder in where.items() for word in (f"--{name}", str(folder))]
    return trainer.main(["--dataset_type", "custom", *typed, "--decoder", decoder, *FLAGS, *flags])


def undisturbed(shared: Path, decoder: str, *flags: str) -> Path:
    """A copy of what training gives that nothing interrupts; tests with the same flags share the training."""
    place = "-".join(("whole", decoder, *flags))
    if not (shared / place).exists():
        assert run(shared, str(shared / place), decoder, *flags) == 0
    shutil.copytree(shared / place, "whole")
    return only_run("whole")


def at_step(monkeypatch, number: int, act) -> None:
    """Have `act` called once, after the given optimizer step of this process."""
    plain, count = Precision.clip_and_update, [0]

    def step(self, *args):
        norm = plain(self, *args)
        count[0] += 1
        if count[0] == number:
            act()
        return norm

    monkeypatch.setattr(Precision, "clip_and_update", step)


def assert_same(first: Path, second: Path) -> None:
    for file in ("last.pt", "best.pt", "model_epoch_3.pt"):
        a, b = (torch.load(path / file, weights_only=True) for path in (first, second))
        assert a["epoch"] == b["epoch"] and a["loss_curve"] == b["loss_curve"] and a["best"] == b["best"]
        assert all(torch.equal(a["decoder"][name], b["decoder"][name]) for name in a["decoder"])
        for number, moments in a["optimizer"]["state"].items():
            assert all(torch.equal(value, b["optimizer"]["state"][number][key]) for key, value in moments.items())
    for file in ("loss_curve.json", "metrics_history.json"):
        assert (first / file).read_text() == (second / file).read_text()
    assert {p.name for p in first.iterdir()} == {p.name for p in second.iterdir()}


@pytest.mark.parametrize("decoder, flags", CASES, ids=lambda value: value if isinstance(value, str) else value[-1])
def test_a_signal_in_mid_epoch_loses_nothing(here, monkeypatch, capsys, decoder, flags):
    whole = undisturbed(here, decoder, *flags)
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))  # the second of the second epoch
        assert run(here, "parts", decoder, *flags) == 143
    parts = only_run("parts")
    saved = torch.load(parts / "last.pt", weights_only=True)
    assert (saved["epoch"], saved["progress"]["step"]) == (1, 2)
    assert f"--resume {parts}" in capsys.readouterr().err
    assert trainer.main(["--resume", str(parts)]) == 0
    assert_same(whole, parts)


def test_self_critical_training_is_resumed_within_its_epoch(here, monkeypatch):
    """With two views and people's captions in the loss: samples, views and dropout are drawn again as they were."""
    flags = ["--epochs", "2", "--scst_epochs", "1", "--scst_ce_weight", "0.2", "--views", "mirror"]
    whole = undisturbed(here, "transformer", *flags)
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))  # the second of the third epoch
        assert run(here, "parts", "transformer", *flags) == 143
    saved = torch.load(only_run("parts") / "last.pt", weights_only=True)
    assert (saved["epoch"], saved["progress"]["step"]) == (2, 2)
    assert trainer.main(["--resume", str(only_run("parts"))]) == 0
    assert_same(whole, only_run("parts"))
    history = json.loads((whole / "metrics_history.json").read_text())
    assert ["reward" in entry for entry in history] == [False, False, True]


def test_a_second_interrupt_stops_at_once_and_the_last_save_serves(here, monkeypatch, capsys):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    whole = undisturbed(here, "lstm")
    with monkeypatch.context() as patch:
        at_step(patch, 6, twice)
        assert run(here, "parts", "lstm") == 130
    saved = torch.load(only_run("parts") / "last.pt", weights_only=True)
    assert (saved["epoch"], saved["progress"]["step"]) == (1, 0) and "--resume" in capsys.readouterr().err
    assert trainer.main(["--resume", str(only_run("parts"))]) == 0
    assert_same(whole, only_run("parts"))


def test_interrupted_encoding_keeps_what_is_written(here, monkeypatch):
    plain = feature_cache.FeatureFile.write

    def interrupt(file, rows):
        plain(file, rows)
        if rows:
            raise KeyboardInterrupt

    monkeypatch.setattr(feature_cache, "ENCODE_BATCH", 5)
    monkeypatch.setattr(feature_cache, "FLUSH_BATCHES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache.FeatureFile, "write", interrupt)
        assert run(here, "none", "lstm", "--feature_cache", "feature_cache") == 130
    (index,) = Path("feature_cache").rglob("*.index")
    assert index.stat().st_size == 5 * RECORD.itemsize and not Path("none").exists()


def test_a_crash_loses_at_most_the_minutes_since_the_last_save(here, monkeypatch):
    def crash():
        raise Crash

    whole = undisturbed(here, "attention")
    for number, minutes in ((1, "100"), (7, "100"), (7, "0.0000001"), (12, "0.0000001")):
        place = f"parts{number}{minutes}"
        with monkeypatch.context() as patch:
            at_step(patch, number, crash)
            with pytest.raises(Crash):
                run(here, place, "attention", "--checkpoint_minutes", minutes)
        assert trainer.main(["--resume", str(only_run(place))]) == 0
        assert_same(whole, only_run(place))


def test_a_crash_after_an_epoch(here, monkeypatch):
    whole = undisturbed(here, "lstm")

    def crash_in(function):
        plain, calls = getattr(trainer, function), [0]

        def crash(*args, **kwargs):
            calls[0] += 1
            if calls[0] == 2 or function == "load_decoder_weights":
                raise Crash
            return plain(*args, **kwargs)

        return crash

    for function in ("caption_texts", "write_outputs", "write_epoch_files", "load_decoder_weights", "save_epoch"):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, function, crash_in(function))
            with pytest.raises(Crash):
                run(here, function, "lstm")
        parts = only_run(function)
        assert trainer.main(["--resume", str(parts)]) == 0
        assert_same(whole, parts)


def test_resuming_a_finished_run_changes_nothing(here):
    whole = undisturbed(here, "lstm")
    before = {p.name: p.read_bytes() for p in whole.glob("*.json")}
    assert trainer.main(["--resume", str(whole)]) == 0
    assert before == {p.name: p.read_bytes() for p in whole.glob("*.json")}


def test_what_resume_refuses(here, capsys):
    directory = undisturbed(here, "lstm")
    with pytest.raises(SystemExit):
        trainer.main(["--resume", str(directory), "--epochs", "9"])
    assert "--model_path" in capsys.readouterr().err
    lock = lock_run_directory(directory)
    assert trainer.main(["--resume", str(directory)]) == 2
    assert "another process is training" in capsys.readouterr().err
    lock.release()
    assert trainer.main(["--resume", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    (directory / "last.pt").unlink()
    assert trainer.main(["--resume", str(directory)]) == 2
    assert "Start again: python flickr" in capsys.readouterr().err


def poison(monkeypatch, images: set[int]) -> None:
    plain = feature_cache.CachedFeatures.gather

    def gather(self, wanted, device):
        features = plain(self, wanted, device)
        features[[int(image) in images for image in wanted]] = torch.nan
        return features

    monkeypatch.setattr(feature_cache.CachedFeatures, "gather", gather)


def test_a_batch_without_a_finite_loss_is_named_and_skipped(here, monkeypatch, capsys):
    poison(monkeypatch, {int(load_caption_set(here / "tiny").splits["train"][0])})
    assert run(here, "bad", "lstm") == 0
    out = capsys.readouterr().out
    assert out.count("Skipped batch") == 3 and "of at most 10" in out  # once in each epoch
    saved = torch.load(only_run("bad") / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["decoder"].values())
    assert all(loss == loss for loss in saved["loss_curve"]["training_losses"])


def test_too_many_such_batches_end_training_with_good_weights(here, monkeypatch, capsys):
    poison(monkeypatch, set(range(20)))
    monkeypatch.setattr(training_utils, "MAX_BAD_BATCHES", 2)
    assert run(here, "bad", "lstm") == 2
    assert "lower --learning_rate" in capsys.readouterr().err
    saved = torch.load(only_run("bad") / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["decoder"].values())


@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_reduced_precision_trains_and_resumes(here, monkeypatch, precision):
    flags = ["--precision", precision, "--learning_rate", "0.01"]
    whole = undisturbed(here, "attention", *flags)
    curve = json.loads((whole / "loss_curve.json").read_text())["training_losses"]
    assert curve[2] < curve[0]
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run(here, "parts", "attention", *flags) == 130
    assert trainer.main(["--resume", str(only_run("parts"))]) == 0
    assert_same(whole, only_run("parts"))


def test_when_memory_runs_out_a_smaller_batch_is_named(here, monkeypatch, capsys):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    at_step(monkeypatch, 2, out_of_memory)
    assert run(here, "full", "lstm", "--batch_size", "8") == 2
    directory, error = only_run("full"), capsys.readouterr().err
    again = f"--model_path {directory / 'last.pt'} --batch_size 4"
    assert error.startswith("error: the memory of cpu ran out") and again in error and "Traceback" not in error
    assert trainer.main([*again.split(), "--epochs", "1"]) == 0


def test_a_run_is_resumed_on_its_own_data_alone(here, monkeypatch, capsys, tmp_path):
    """It went on with other images, and compared their scores with those of the first."""
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(here, "parts", "lstm") == 143
    parts = only_run("parts")
    before = {path.name: path.read_bytes() for path in parts.iterdir()}
    other = draw_tiny(tmp_path / "other")
    for path in (other / "Images").iterdir():
        path.rename(path.with_name("my_" + path.name))
    captions = (other / "captions.txt").read_text()
    (other / "captions.txt").write_text(captions.replace("\np", "\nmy_p"))
    assert trainer.main(["--resume", str(parts), "--data_dir", str(other)]) == 2
    error = capsys.readouterr().err
    assert "lacks 18 of the 18 training and validation images" in error and f"--init_from {parts / 'last.pt'}" in error
    assert before == {path.name: path.read_bytes() for path in parts.iterdir()}
    shutil.copytree(here / "tiny", tmp_path / "moved")
    assert trainer.main(["--resume", str(parts), "--data_dir", str(tmp_path / "moved")]) == 0
