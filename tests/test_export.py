"""A model that is exported, read back and tampered with; tests/test_every_decoder.py runs it."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_targets import exported_checkpoint
from run_files import skip_pictures
from safetensors.torch import load_file, save_file
from tiny_encoder import in_place_of_resnet50

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.config import registry
from captioning.io import UserError
from captioning.modes import export as export_model
from captioning.runs.checkpoints import load_checkpoint, save_checkpoint
from captioning.runs.directories import TEST_KEYS
from captioning.runs.forms import GRAPHS


@pytest.fixture(autouse=True)
def small_encoder() -> Iterator[None]:
    with in_place_of_resnet50():
        yield


def checkpoint_file(folder: Path, name: str = "attention") -> Path:
    folder.mkdir()
    save_checkpoint(folder / "best.pt", exported_checkpoint(name))
    return folder / "best.pt"


def exported(folder: Path, name: str = "attention") -> Path:
    """A small model in `folder`/model, exported from `folder`/run."""
    path = checkpoint_file(folder / "run", name)
    export_model.export(load_checkpoint(path), path, folder / "model", None)
    return folder / "model"


@pytest.mark.parametrize("name", registry.DECODERS)
def test_what_is_read_back_is_what_was_exported(tmp_path, name, without_graphs):
    model = exported(tmp_path, name)
    assert {file.name for file in model.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "split.json", "vocabulary.json", *GRAPHS,
    }  # fmt: skip
    before, after = load_checkpoint(tmp_path / "run" / "best.pt"), load_checkpoint(model / "model.safetensors")
    assert before["decoder"].keys() == after["decoder"].keys()
    assert all(torch.equal(before["decoder"][key].half().float(), after["decoder"][key]) for key in before["decoder"])
    for key in ("epoch", "encoder", "vocabulary", "split"):
        assert before[key] == after[key]
    places = {"data_dir", "image_dir", "captions_file", "resnet_weights", "feature_cache"}
    assert {k: v for k, v in after["flags"].items() if k not in places}.items() <= before["flags"].items()
    assert not any(place in (model / "config.json").read_text() for place in places), "tells where things lay"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_nothing_is_overwritten(tmp_path, without_graphs):
    path = checkpoint_file(tmp_path / "run")
    checkpoint = load_checkpoint(path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file", "link"):
        with pytest.raises(UserError, match="is there already, and nothing is overwritten"):
            export_model.export(checkpoint, path, tmp_path / name, None)
    export_model.export(checkpoint, path, tmp_path / "empty", None)
    export_model.export(checkpoint, path, tmp_path / "new" / "below", None)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_a_broken_export_leaves_nothing(tmp_path, monkeypatch, without_graphs):
    path = checkpoint_file(tmp_path / "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_model, "model_card", full)
    with pytest.raises(UserError, match="No space left"):
        export_model.export(load_checkpoint(path), path, tmp_path / "model", None)
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def rewrite(model: Path, name: str, change) -> None:
    """Change one file and make its checksum right again, as a stranger would."""
    if name == "model.safetensors":
        tensors = load_file(model / name)
        change(tensors)
        save_file(tensors, model / name)
    else:
        value = json.loads((model / name).read_text())
        value = change(value) or value
        (model / name).write_text(json.dumps(value))
    if name != "config.json":
        config = json.loads((model / "config.json").read_text())
        config["sha256"][name] = hashlib.sha256((model / name).read_bytes()).hexdigest()
        (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("config.json", lambda c: c["flags"].update(hidden_size=3), "another architecture .* lstm.weight_ih_l0 is"),
        ("config.json", lambda c: c["flags"].update(dataset_type="../x"), "flags.dataset_type"),
        ("config.json", lambda c: c.update(schema=1), "written by another version"),
        ("config.json", lambda c: c["sha256"].update({"vocabulary.json": "0"}), "vocabulary.json is damaged"),
        ("config.json", lambda c: [c], "it is not an object"),
        ("vocabulary.json", lambda v: v[:-1], "output_bias is .6. rather than .5."),
        ("vocabulary.json", lambda v: [*v[:-1], "\x1b[2J"], "a list of different words"),
        ("split.json", lambda s: s.update(val=[3]), "split is a dict"),
        ("model.safetensors", lambda t: t.update({"key.weight": torch.full_like(t["key.weight"], float("nan"))}), "finite"),
        ("model.safetensors", lambda t: t.update({"key.weight": t["key.weight"].long()}), "float32"),
        ("model.safetensors", lambda t: t.pop("embed.weight") is None, "another architecture"),
    ],
)  # fmt: skip
def test_tampered_models_are_refused_in_one_line(tmp_path, name, change, message):
    model = exported(tmp_path)
    rewrite(model, name, change)
    with pytest.raises(UserError, match=message) as refused:
        load_checkpoint(model / "model.safetensors")
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


def test_damaged_and_missing_files_are_named(tmp_path):
    for name in ("model.safetensors", "vocabulary.json", "split.json"):
        (tmp_path / name).mkdir()
        model = exported(tmp_path / name)
        raw = bytearray((model / name).read_bytes())
        raw[-3] ^= 1
        (model / name).write_bytes(raw)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load_checkpoint(model / "model.safetensors")
        (model / name).unlink()
        with pytest.raises(UserError, match=f"{name} is not there"):
            load_checkpoint(model / "model.safetensors")
    (model / "config.json").unlink()
    with pytest.raises(UserError, match="config.json"):
        load_checkpoint(model / "model.safetensors")


def test_a_pickle_called_safetensors_is_not_loaded(tmp_path):
    model = exported(tmp_path)
    shutil.copyfile(tmp_path / "run" / "best.pt", model / "model.safetensors")
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    rewrite(model, "config.json", lambda config: config["sha256"].update({"model.safetensors": digest}))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_checkpoint(model / "model.safetensors")


def test_the_card_has_this_checkpoints_scores_and_the_terms(tmp_path):
    path = checkpoint_file(tmp_path / "run")
    entry = {"checkpoint": "best.pt", "epoch": 1, "split": "test|`<b>", "images": 10, "beam_size": 3, "cider": 0.512}
    entry = dict.fromkeys(TEST_KEYS) | entry
    (tmp_path / "run" / "test_metrics.json").write_text(json.dumps([entry, entry | {"epoch": 2, "cider": 0.9}]))
    export_model.export(load_checkpoint(path), path, tmp_path / "model", None)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| split | images | decoding | CIDEr |" in card and "| test\\|'&lt;b> | 10 | beam 3 | 51.2 |" in card
    assert "90.0" not in card and "non-commercial research" in card and "`0676ba61`" in card
    (tmp_path / "run" / "test_metrics.json").write_text('{"cider": 3}')
    with pytest.raises(UserError, match="expected a list"):
        export_model.export(load_checkpoint(path), path, tmp_path / "other", None)


def test_from_training_to_scores_of_the_exported_model(tiny_runs, tmp_path, monkeypatch, capsys):
    """One command each; an exported model captions as its checkpoint does, and training on from it is refused."""
    monkeypatch.chdir(tmp_path)
    skip_pictures(monkeypatch)
    run, tiny = tmp_path / "run", tiny_runs["data"]
    shutil.copytree(tiny_runs["attention"], run)
    assert trainer.main(["--mode", "test", "--model_path", str(run)]) == 0
    assert trainer.main(["--mode", "export", "--model_path", str(run), "--output", "shared"]) == 0
    assert trainer.main(["--mode", "test", "--model_path", "shared", "--data_dir", str(tiny)]) == 0
    first, second = (json.loads((folder / "test_metrics.json").read_text()) for folder in (run, Path("shared")))
    elsewhere = {"checkpoint": None, "captions_file": None}
    assert [entry | elsewhere for entry in first] == [entry | elsewhere for entry in second]
    assert trainer.main(["--mode", "export", "--model_path", "shared", "--output", "again"]) == 0
    assert Path("again/model.safetensors").read_bytes() == Path("shared/model.safetensors").read_bytes()
    assert "| test | 2 | beam 3 |" in Path("again/README.md").read_text()
    capsys.readouterr()
    assert trainer.main(["--model_path", "shared", "--data_dir", str(tiny)]) == 2
    assert "no optimizer state" in capsys.readouterr().err


def test_other_weights_of_the_encoder_are_refused(tmp_path):
    path = checkpoint_file(tmp_path / "run")
    with pytest.raises(UserError, match="trained on resnet50 weights 0676ba61, but those here are ffffffff"):
        export_model.export(load_checkpoint(path), path, tmp_path / "other", "other")


def test_a_network_for_one_number_of_rows_is_refused():
    class Fixed(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features.view(3, 2, 2)

    with pytest.raises(
        UserError, match=r"Fixed cannot be exported: it takes one size only in axis 0 of x.* tensor.shape\[axis\]"
    ):
        export_model.to_onnx(Fixed(), {"x": torch.zeros(3, 4)}, [{0: "B"}], ["y"])


def test_weights_that_are_alike_in_float16_only_are_stored_apart():
    """Those of the encoder are stored in float32, and what float16 does not hold is too."""
    alike = [np.full((2, 2), value, np.float32) for value in (1e5, 2e5)]
    assert export_model.fingerprint(alike[0]) != export_model.fingerprint(alike[1])
    assert export_model.fingerprint(alike[0] / 1e5) == export_model.fingerprint(alike[0] / 1e5 + 1e-6)
