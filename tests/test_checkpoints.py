"""Which checkpoints of a run there are, and which are deleted; what a checkpoint says of its encoder's weights."""

import copy
from pathlib import Path

import pytest
import torch
from fuzz_targets import sound_checkpoint

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.captioner import Captioner
from captioning.io import UserError
from captioning.runs.checkpoints import CheckpointSaver, load_checkpoint, save_checkpoint


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def epoch_of(path: Path) -> int:
    return load_checkpoint(path)["epoch"]


def test_the_newest_epochs_stay_and_nothing_else_is_ever_deleted(tmp_path):
    """Neither files whose names only look like epochs nor epochs of another run."""
    others = {f"model_epoch_{name}.pt" for name in ("mine_1", "good", "01", 2, 9)}
    for name in others:
        (tmp_path / name).write_text("mine")
    saver = CheckpointSaver(tmp_path, keep=2, first_epoch=2)  # epochs 1 and 2 were another run's
    saver.save_last(sound_checkpoint() | {"epoch": 2})
    for epoch, is_best in ((3, True), (4, True), (5, False), (6, False)):
        saver.save_epoch(sound_checkpoint() | {"epoch": epoch}, epoch, is_best)
    assert names(tmp_path) == others | {"best.pt", "last.pt", "model_epoch_5.pt", "model_epoch_6.pt"}
    assert (epoch_of(saver.best), epoch_of(saver.last)) == (4, 6)
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    saver.publish(6, False)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_all_epochs_stay_without_a_number(tmp_path):
    saver = CheckpointSaver(tmp_path)
    for epoch in (1, 2, 3):
        saver.save_epoch(sound_checkpoint() | {"epoch": epoch}, epoch, epoch == 2)
    assert names(tmp_path) == {"best.pt", "last.pt", *(f"model_epoch_{epoch}.pt" for epoch in (1, 2, 3))}
    saver.save_last(sound_checkpoint() | {"epoch": 3, "progress": sound_checkpoint()["progress"] | {"step": 1}})
    assert load_checkpoint(saver.last)["progress"]["step"] == 1
    assert load_checkpoint(saver.epoch_file(3))["progress"]["step"] == 0  # last.pt is a file of its own


def test_a_first_checkpoint_that_nobody_could_read_stops_the_run(tmp_path):
    """Before an epoch is trained: here --data_dir has a line break."""
    checkpoint = copy.deepcopy(sound_checkpoint())
    checkpoint["flags"]["data_dir"] = "a\nb"
    with pytest.raises(UserError, match="flags.data_dir is a str where a value that --data_dir takes belongs"):
        CheckpointSaver(tmp_path).save_last(checkpoint)


def test_a_flag_that_came_after_a_checkpoint_has_its_default(tmp_path):
    checkpoint = sound_checkpoint() | {"flags": sound_checkpoint()["flags"].copy()}
    del checkpoint["flags"]["num_heads"]
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    assert load_checkpoint(tmp_path / "best.pt")["flags"]["num_heads"] == 8


def test_a_path_in_a_checkpoint_is_not_followed(tmp_path, monkeypatch):
    """Else the author of a checkpoint could have any file opened."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "mine.pth").write_text("weights")
    checkpoint = copy.deepcopy(sound_checkpoint())
    checkpoint["flags"]["resnet_weights"] = str(tmp_path / "mine.pth")
    checkpoint["encoder"]["weights_hash"] = "e" * 16
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    settings = trainer.parse_flags(["--mode", "test", "--model_path", "best.pt"])
    settings = settings.with_checkpoint(load_checkpoint(tmp_path / "best.pt"), tmp_path / "best.pt")
    assert settings.resnet_weights is None
    with pytest.raises(UserError, match="name their file with --resnet_weights"):
        Captioner.load(tmp_path / "best.pt")
    with pytest.raises(UserError, match="name the right file with --resnet_weights"):
        Captioner.load(tmp_path / "best.pt", resnet_weights=str(tmp_path / "mine.pth"))
