"""The recipes under configs/ are flags that the program takes, and train."""

import re
import shlex
from pathlib import Path

import pytest
from run_files import skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.config.flags import ADAPTATION
from captioning.config.registry import DECODERS
from captioning.io import UserError

CONFIGS = Path(trainer.__file__).parent / "configs"
RECIPES = sorted(CONFIGS.glob("flickr*.yaml"))


def test_there_is_a_recipe_for_both_sets_and_decoders_on_both_machines():
    wanted = {
        f"{data}_{kind}_{place}"
        for data in ("flickr8k", "flickr30k")
        for kind in ("lstm", "attention")
        for place in ("cpu", "gpu")
    }
    wanted |= {f"flickr8k_{kind}_cpu" for kind in DECODERS}
    assert {path.stem for path in RECIPES} == wanted


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_what_its_name_says(path):
    args = trainer.parse_flags(["--config", str(path)])
    data, _, rest = path.stem.partition("_")
    decoder, _, place = rest.rpartition("_")
    assert (args.dataset_type, args.decoder) == (data, decoder)
    assert args.encoder == ("efficientnet_lite0" if place == "cpu" else "resnet50")
    assert args.warmup_epochs < args.epochs and args.views == "all"


def test_a_recipe_is_found_by_its_name_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trainer.parse_flags(["--config", "own_photos"]).init_from == Path("flickr8k_attention")
    (tmp_path / "own_photos").write_text("epochs: 7")
    assert trainer.parse_flags(["--config", "own_photos"]).epochs == 7
    with pytest.raises(UserError, match=r"Give a file of flags, or the name of a recipe: .*, own_photos, "):
        trainer.parse_flags(["--config", "configs/own_photos"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_in_a_recipe_is_accepted(path, monkeypatch):
    (command,) = re.findall(r"^#   python (.+)$", path.read_text("utf-8"), re.MULTILINE)
    script, *flags = shlex.split(command)
    monkeypatch.chdir(CONFIGS.parent)
    assert script == Path(trainer.__file__).name and f"configs/{path.name}" in flags
    trainer.parse_flags(flags)


def test_fewer_epochs_than_a_recipe_has_shorten_its_warm_up(capsys):
    recipe = ["--config", str(CONFIGS / "flickr8k_attention_cpu.yaml")]
    assert trainer.parse_flags([*recipe, "--epochs", "1"]).warmup_epochs == 0
    assert "Note: --warmup_epochs 0 instead of 1, by --epochs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        trainer.parse_flags([*recipe, "--epochs", "1", "--warmup_epochs", "1"])


def test_the_recipe_for_own_photos_trains_captions_and_needs_no_more_flags(tiny, monkeypatch, capsys):
    monkeypatch.chdir(tiny.parent)
    skip_pictures(monkeypatch)
    recipe = ["--config", str(CONFIGS / "own_photos_from_nothing.yaml"), "--data_dir", str(tiny)]
    assert trainer.main([*recipe, "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    assert "of the training words are <UNK>" not in out and "weights" not in out
    assert len(list(Path("saved_models").rglob("model_epoch_*.pt"))) == 2


def test_the_recipe_that_starts_from_a_trained_captioner_leaves_its_settings_to_the_program():
    settings = trainer.parse_flags(["--config", str(CONFIGS / "own_photos.yaml")])
    assert settings.adapts and {name: getattr(settings, name) for name in ADAPTATION} == ADAPTATION


def test_a_recipe_trains(tiny, monkeypatch, capsys):
    monkeypatch.chdir(tiny.parent)
    skip_pictures(monkeypatch)
    recipe = next(path for path in RECIPES if path.stem == "flickr8k_attention_cpu")
    tiny_set = ["--dataset_type", "custom", "--data_dir", str(tiny), "--freq_threshold", "1", "--views", "whole"]
    assert trainer.main(["--config", str(recipe), *tiny_set, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "Report: " in said and "A dry run: these scores mean nothing" in said
