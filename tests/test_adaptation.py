"""`--init_from`: a new run on other data from a model's weights, with new words, and replay of what it knew."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_tiny
from PIL import Image
from run_files import command as command_line
from run_files import only_run, skip_pictures
from test_resume import assert_same, at_step

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.config.flags import ADAPTATION
from captioning.config.registry import DECODERS
from captioning.config.settings import parse_flags
from captioning.data.batches import Collator
from captioning.data.dataset import Vocabulary, frequent_words, join_sets, load_caption_set
from captioning.decoders.base import build_decoder
from captioning.decoding import consensus
from captioning.decoding.consensus import fit_head, grow_head
from captioning.encoders.base import encoder_of
from captioning.runs.checkpoints import load_checkpoint, save_checkpoint
from captioning.runs.directories import read_run
from captioning.training import calibrate, gain
from captioning.training.adaptation import grow_weights, train_on_seen_images
from training_utils import BatchSampler


@pytest.fixture(scope="module")
def own(tiny_runs, tmp_path_factory) -> Path:
    """Own photos: other pictures, names and words than those that the models of `tiny_runs` know."""
    place = tmp_path_factory.mktemp("own")
    shutil.copytree(tiny_runs["data"].parent / "cache", place / "cache")
    folder = draw_tiny(place / "photos")
    for path in (folder / "Images").iterdir():
        Image.open(path).rotate(90, expand=True).save(path.with_name("my_" + path.name))
        path.unlink()
    captions = (folder / "captions.txt").read_text()
    (folder / "captions.txt").write_text(captions.replace("\np", "\nmy_p").replace("picture", "painting"))
    return folder


@pytest.fixture
def photos(own, tmp_path, monkeypatch) -> Path:
    """The own photos, and an empty directory to train in."""
    monkeypatch.chdir(tmp_path)
    skip_pictures(monkeypatch)
    return own


def adapt(source: Path, photos: Path, place: str, *flags: str) -> int:
    where = ["--init_from", str(source), "--data_dir", str(photos), "--model_save_dir", place]
    where += ["--feature_cache", str(photos.parent / "cache")]
    return trainer.main([*where, "--epochs", "3", "--batch_size", "8", *flags])


@pytest.mark.parametrize("name, fine_tune", [*((name, 0) for name in DECODERS), ("attention", 1)])
def test_a_decoder_with_more_words_says_of_the_known_ones_what_it_said(name, fine_tune):
    flags = parse_flags(["--decoder", name, "--encoder", "efficientnet_lite0", "--hidden_size", "32"]).values()
    flags |= {"embed_size": 16, "fine_tune": fine_tune, "max_length": 12}
    spec, known = encoder_of(flags), 9
    decoder, larger = build_decoder(flags, known, spec), build_decoder(flags, known + 3, spec)
    counts = torch.arange(1.0, 13.0)
    larger.set_word_frequencies(counts)
    fresh_bias = larger.logits(torch.zeros(1, 16))[0].detach().clone()
    larger.load_state_dict(grow_weights(decoder.state_dict(), larger))
    regions = torch.randn(1, spec.regions, spec.channels)
    features = regions if decoder.uses_grid else regions.mean(1)
    for model in (decoder, larger):
        model.eval()
    with torch.no_grad():
        (_, before), (_, after) = (model.step(model.begin(features), torch.tensor([7])) for model in (decoder, larger))
        assert torch.equal(before.hidden_out, after.hidden_out)
        logits = larger.logits(after.hidden_out)
        assert torch.allclose(decoder.logits(before.hidden_out), logits[:, :known], atol=1e-6)
        assert logits.isfinite().all() and len(set(logits[0, known:].tolist())) == 3  # new words are not all alike
        assert torch.equal(larger.logits(torch.zeros(1, 16))[0, known:], fresh_bias[known:])  # their log frequency


def test_a_run_on_own_photos_and_resumed(photos, tiny_runs, monkeypatch, capsys):
    """From a run directory; with replay from where the source's data are; the same after a signal in mid-epoch."""
    source = load_checkpoint(tiny_runs["attention"] / "best.pt")
    assert adapt(tiny_runs["attention"], photos, "whole", "--replay", "0.4") == 0
    run, out = only_run("whole"), capsys.readouterr().out
    assert "Replay: 11 images an epoch of 16 that the model was trained on" in out  # of 2 captions, for 32 new ones
    assert (
        f"New words, seen at least {ADAPTATION['freq_threshold']} time(s): 1 (painting)" in out
        and "batch_size" not in out.split("given:")[1]
    )
    saved = load_checkpoint(run / "best.pt")
    assert saved["vocabulary"] == [*source["vocabulary"], "painting"]
    kept = ("decoder", "hidden_size", "encoder", "views", "max_length", "drop_prob")
    assert [saved["flags"][name] for name in kept] == [source["flags"][name] for name in kept]
    assert saved["flags"]["learning_rate"] == ADAPTATION["learning_rate"]
    curve = load_checkpoint(run / "model_epoch_3.pt")["loss_curve"]
    assert curve["epochs"] == [0, 1, 2, 3] and curve["training_losses"][0] is curve["learning_rates"][0] is None
    assert saved["split"]["inherited"] == source["split"]["train"]
    assert all(name.startswith("my_") for name in saved["split"]["val"]["names"] + saved["split"]["test"]["names"])
    config = json.loads((run / "run_config.json").read_text())
    assert config["init_from"] == str(tiny_runs["attention"] / "best.pt") and config["replay"] == 0.4
    assert f"--init_from {tiny_runs['attention']}" in config["command"]

    assert "[0/3] as it comes, validation " in out and "Validation loss: " in out
    assert "Validation, 2 images: CIDEr" in out and "too few images to tell" in out and "Test, 2 images" in out
    summary = read_run(run)
    assert summary.facts["Gain"].startswith("Validation loss: ") and summary.last_epoch == 3
    assert (run / "training_log.csv").read_text().splitlines()[1].startswith("0,,")

    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert adapt(tiny_runs["attention"], photos, "parts", "--replay", "0.4") == 143
    parts = only_run("parts")
    assert load_checkpoint(parts / "last.pt")["progress"]["step"] > 0
    assert trainer.main(["--resume", str(parts)]) == 0
    assert_same(run, parts)

    assert trainer.main(["--mode", "test", "--model_path", str(run), "--beam_size", "2"]) == 0
    more = ["--model_path", str(run), "--epochs", "1", "--model_save_dir", "more", "--scst_epochs", "1"]
    assert trainer.main(more) == 0
    assert "Replay: 11 images" in capsys.readouterr().out
    assert trainer.main([*more, "--replay_data_dir", "gone"]) == 2
    assert "give the folder of these with --replay_data_dir, or --replay 0" in capsys.readouterr().err
    assert trainer.main([*more, "--replay", "0"]) == 0
    assert "Replay:" not in capsys.readouterr().out


def test_the_model_as_it_comes_is_best_until_something_beats_it(photos, tiny_runs, monkeypatch, capsys):
    """Also after a crash before it was scored, and where the run is trained further."""
    source = load_checkpoint(tiny_runs["attention"] / "best.pt")
    worse = ["--learning_rate", "3", "--early_stopping", "2"]
    assert adapt(tiny_runs["attention"], photos, "whole", *worse) == 0
    whole, out = only_run("whole"), capsys.readouterr().out
    best = load_checkpoint(whole / "best.pt")
    assert best["epoch"] == best["best"]["epoch"] == 0 and best["vocabulary"] == [*source["vocabulary"], "painting"]
    for name, tensor in source["decoder"].items():
        assert torch.equal(best["decoder"][name][: len(tensor)] if tensor.dim() else best["decoder"][name], tensor)
    assert "Best epoch: 0 by val_loss" in out and "Nothing was gained" in out and "--replay 0.9" in out
    assert load_checkpoint(whole / "last.pt")["epoch"] == 2  # stopped early
    rows = json.loads((whole / "metrics_history.json").read_text())
    assert [(row["epoch"], row["is_best"]) for row in rows] == [(0, True), (1, False), (2, False)]

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapt(tiny_runs["attention"], photos, "parts", *worse)
    assert trainer.main(["--resume", str(only_run("parts"))]) == 0
    assert (only_run("parts") / "loss_curve.json").read_text() == (whole / "loss_curve.json").read_text()
    assert load_checkpoint(only_run("parts") / "best.pt")["epoch"] == 0

    assert trainer.main(["--model_path", str(whole), "--epochs", "1", "--model_save_dir", "more"]) == 0
    assert load_checkpoint(only_run("more") / "last.pt")["loss_curve"]["epochs"] == [0, 1]
    assert command_line("list", "more") == 0 and re.search(r"\b0 of 1\b", capsys.readouterr().out)


@pytest.mark.parametrize(
    "few, losses, gained, said",
    [
        (1, [3.0, 2.99], [0.01, 0.09], "CIDEr 40.0 as it came, 45.0 now (+5.0, 95 % interval +1.0 to +9.0)"),
        (1, [3.0, 2.0], [0.11, -0.01], "By the test images no gain can be told"),
        (1, [3.0, 2.0], [-0.09, -0.01], "The model as it came is better here: --model_path a"),
        (3, [3.0, 2.9], [-0.09, -0.01], "(too few images to tell) By the validation loss it got better"),
        (3, [3.0, 2.99], [0.01, 0.09], "By the validation loss no gain can be told"),
    ],
)
def test_the_end_says_what_was_gained(tmp_path, monkeypatch, few, losses, gained, said):
    """By the test images, or the loss where these and the validation images are too few."""
    checkpoint = {"epoch": 1, "loss_curve": {"validation_losses": losses}}
    monkeypatch.setattr(gain, "load_checkpoint", lambda _: checkpoint)
    cider = {"model_epoch_0.pt": np.array([0.1, 0.7]), "best.pt": np.array([0.1, 0.7]) + gained}
    monkeypatch.setattr(gain, "cider_of", lambda _, path, __: cider[path.name])
    monkeypatch.setattr(gain, "FEW_IMAGES", few)
    (tmp_path / "model_epoch_0.pt").touch()
    splits = {"val": np.arange(0), "test": np.arange(2)}
    context = SimpleNamespace(settings=parse_flags(["--init_from", "a"]), data=SimpleNamespace(splits=splits))
    lines = gain.report_gain(context, tmp_path)
    assert lines[0] == f"Validation loss: {losses[0]:.3f} as it came, {losses[1]:.3f} now" and said in " ".join(lines)
    assert (min(gained) > 0 if few == 1 else losses[1] < 2.95) == ("What helps: more captions" not in lines[-1])


def test_few_photos_keep_the_consensus_and_many_fit_another(photos, tiny_runs, monkeypatch, capsys):
    """Its n-grams are numbered anew for the larger vocabulary; also when resumed, tuned, and trained further."""
    monkeypatch.setattr(consensus, "FEWEST_IMAGES", 2)
    monkeypatch.setattr(consensus, "WEIGHTS", np.array([4.0]))
    monkeypatch.setattr(consensus, "PRIOR_IMAGES", 0)
    source = load_checkpoint(tiny_runs["attention"] / "best.pt")
    pooled = lambda images: np.random.default_rng(1).normal(5, 1, (20, 1280)).astype(np.float32)[images]  # noqa: E731
    head = fit_head(load_caption_set(tiny_runs["data"]), Vocabulary(source["vocabulary"]), pooled).stored
    save_checkpoint(Path("source.pt"), source | {"consensus": head | {"weight": 0.5}})
    larger = grow_head(head, len(source["vocabulary"]), len(source["vocabulary"]) + 1)

    def assert_kept(path: Path) -> None:
        found = load_checkpoint(path)["consensus"]
        assert found["weight"] == 0.5 and all(np.array_equal(found[name], larger[name]) for name in ("keys", "expect"))

    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert adapt(Path("source.pt"), photos, "few", "--epochs", "1") == 143
    run = only_run("few")
    assert_kept(run / "last.pt")
    assert trainer.main(["--resume", str(run)]) == 0
    assert_kept(run / "best.pt")
    assert "Consensus: kept as it was, with 16 training and 2 validation images, of 1000" in capsys.readouterr().out
    assert trainer.main(["--mode", "test", "--model_path", str(run)]) == 0
    assert json.loads((run / "test_metrics.json").read_text())[-1]["consensus"] == "regression"
    assert trainer.main(["--model_path", str(run), "--epochs", "1", "--model_save_dir", "more"]) == 0
    assert_kept(only_run("more") / "last.pt")
    monkeypatch.setattr("captioning.modes.tune.BEAMS", (1,))
    assert trainer.main(["--mode", "tune", "--model_path", str(run)]) == 0
    assert_kept(run / "best.pt")

    for name in ("FEWEST_ANEW", "FEWEST_TRAINING_IMAGES", "FEWEST_VALIDATION_IMAGES"):
        monkeypatch.setattr(calibrate, name, 1)
    assert adapt(Path("source.pt"), photos, "many", "--epochs", "1") == 0
    assert_kept(only_run("many") / "model_epoch_0.pt")
    found = load_checkpoint(only_run("many") / "best.pt")["consensus"]
    assert found["weight"] == 4.0 and not np.array_equal(found["expect"], larger["expect"])


def test_an_exported_folder_and_what_is_not_there(photos, tiny_runs, capsys, without_graphs):
    calibration = {"beam": {"scores": [-2.0, -1.0], "shares": [0.25, 0.75], "images": 100}}
    save_checkpoint(Path("source.pt"), load_checkpoint(tiny_runs["lstm"] / "best.pt") | {"confidence": calibration})
    export = ["--mode", "export", "--model_path", "source.pt", "--output", "shared"]
    assert trainer.main(export) == 0
    assert adapt(Path("shared"), photos, "one", "--replay", "0.2", "--epochs", "1") == 0
    out = capsys.readouterr().out
    assert "Confidence: that of the model that the run started from, with 2 validation images" in out
    assert load_checkpoint(only_run("one") / "best.pt")["confidence"] == calibration
    assert trainer.main(["--model_path", "one", "--epochs", "1", "--model_save_dir", "further"]) == 0
    assert load_checkpoint(only_run("further") / "last.pt")["confidence"] == calibration
    assert trainer.main(["--mode", "export", "--model_path", "one", "--output", "card"]) == 0
    card = Path("card/README.md").read_text()
    assert "a model that was trained on 16 other images" in card and "from scratch" not in card
    assert "The terms of the 16 images that the first model was trained on hold too" in card
    assert "Warning: --replay is 0: the data that shared" in out and "not in data" in out and "Replay:" not in out
    flags = load_checkpoint(only_run("one") / "best.pt")["flags"]
    assert (flags["replay"], flags["replay_data_dir"], flags["init_from"]) == (
        0.0,
        None,
        str(Path("shared/model.safetensors")),
    )
    wrong = {
        ("--replay", "0.2", "--replay_data_dir", "nowhere"): "--replay_data_dir nowhere is no data set",
        ("--replay", "0.2", "--replay_data_dir", str(photos)): "none of the 16 images that the model was trained on is in",
        ("--hidden_size", "32"): "leave the flag out, or train a new model without --init_from",
        ("--attention_reg", "0.5"): "whose decoder is lstm",
    }  # fmt: skip
    for words, message in wrong.items():
        assert adapt(Path("shared"), photos, "none", *words) == 2
        assert message in capsys.readouterr().err
    assert adapt(Path("nobody"), photos, "none") == 2
    assert "the model nobody is not there" in capsys.readouterr().err
    assert not Path("none").exists()


def test_settings_for_few_photos_unless_given(tmp_path):
    (tmp_path / "flags.yaml").write_text("init_from: a\nbatch_size: 7\n")
    settings = parse_flags(["--config", str(tmp_path / "flags.yaml"), "--freq_threshold", "5"])
    assert {name: getattr(settings, name) for name in ADAPTATION} == ADAPTATION | {"batch_size": 7, "freq_threshold": 5}
    assert parse_flags(["--init_from", "a", "--scst_epochs", "1"]).early_stopping == 0  # the two exclude each other
    assert settings.adapts
    assert not parse_flags(["--config", str(tmp_path / "flags.yaml"), "--mode", "test", "--model_path", "b"]).adapts
    assert parse_flags([]).dataset_type != ADAPTATION["dataset_type"]


def test_images_that_the_source_was_trained_on_are_never_held_out(photos, tiny_runs, capsys):
    """Nine under their names and one as a copy with another name: all of them are training images."""
    photos = shutil.copytree(photos, Path("photos"))
    known = load_checkpoint(tiny_runs["attention"] / "best.pt")["split"]["train"]["names"]
    rows = ""
    for number, name in enumerate(known[:10]):
        new = name if number else "my_copy.jpg"
        (photos / "Images" / new).write_bytes((tiny_runs["data"] / "Images" / name).read_bytes())
        rows += f"{new},a picture that it knows\n"
    with open(photos / "captions.txt", "a") as file:
        file.write(rows)
    assert adapt(tiny_runs["attention"], photos, "drawn", "--epochs", "1") == 0
    split = load_checkpoint(only_run("drawn") / "best.pt")["split"]
    held_out = split["val"]["names"] + split["test"]["names"]
    assert held_out and all(name.startswith("my_p") for name in held_out)
    assert {*known[1:10], "my_copy.jpg"} <= set(split["train"]["names"])
    assert "are training images instead" in capsys.readouterr().out
    for split, names in {"train": ["my_p01.jpg"], "test": ["my_p02.jpg"], "val": known[1:10]}.items():
        (photos / f"{split}.txt").write_text("\n".join(names))
    assert adapt(tiny_runs["attention"], photos, "lists") == 2
    assert "the val split has no images (without 9 images that" in capsys.readouterr().err


def test_the_old_photos_in_another_size(photos, tiny_runs, capsys):
    """Replay finds them by name. Among own photos they are only reported: they may be other photos of the same name."""
    shutil.copytree(tiny_runs["data"], "larger", ignore=shutil.ignore_patterns("*.txt.*"))
    for path in Path("larger/Images").iterdir():
        Image.open(path).resize((90, 90)).save(path)
    flags = ["--epochs", "1", "--replay", "0.4", "--replay_data_dir", "larger", "--feature_cache", "cache"]
    assert adapt(tiny_runs["attention"], photos, "one", *flags) == 0
    assert "Replay: 11 images an epoch of 16 that the model was trained on" in capsys.readouterr().out
    source, data = tiny_runs["attention"] / "best.pt", load_caption_set(Path("larger"), seed=1)
    splits, known = dict(data.splits), load_checkpoint(source)["split"]
    train_on_seen_images(known, data, np.zeros((20, 2), dtype=np.int64), source)
    assert "and other contents" in capsys.readouterr().out and data.splits == splits


def test_a_joined_set_has_the_captions_of_both(photos, tiny_runs):
    new, old = load_caption_set(photos), load_caption_set(tiny_runs["data"])
    both, first = join_sets(new, old), len(new.names)
    assert [both.references(i) for i in range(len(both.names))] == [
        each.references(i) for each in (new, old) for i in range(len(each.names))
    ]
    assert list(both.paths())[:first] == list(new.paths())
    assert [path.samefile(other) for path, other in zip(both.paths()[first:], old.paths(), strict=True)] == [True] * 20
    collator = Collator(both, Vocabulary(frequent_words(both, 1).words), 12)
    sampler = BatchSampler(collator, np.arange(5), 1, 8, 0, first + np.arange(7), 3)
    turns = [set(sampler.epoch_images(epoch).tolist()) - set(range(5)) for epoch in range(7)]
    assert all(len(turn) == 3 for turn in turns)
    assert turns[0] | turns[1] | turns[2] == set(range(first, first + 7))  # all of them in turn
    planned = np.concatenate(sampler.plan(1))
    assert set(collator.owner(planned).tolist()) == set(range(5)) | turns[1]
