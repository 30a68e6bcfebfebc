"""What a user can get wrong."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.checkpoints import load_checkpoint
from captioning.io import UserError, write_atomic


@pytest.mark.parametrize(
    ("command", "package"),
    [(f"{Path(trainer.__file__).name} --dry_run", "torch"), ("download_datasets.py --dataset demo", "filelock")],
)
def test_a_python_without_the_packages_says_how_to_get_them(tmp_path, command, package):
    script = Path(trainer.__file__).with_name(command.split()[0])
    bare = [sys.executable, "-S", script, *command.split()[1:]]  # -S: without site-packages
    ended = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and f"has no package {package}" in ended.stderr
    assert "python -m pip install -r requirements.txt" in ended.stderr


@pytest.fixture
def trained(tiny_runs, tmp_path, monkeypatch):
    """A copy of a trained run in an empty directory, which is where the program runs."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(tiny_runs["attention"], tmp_path / "run")


def test_checkpoints_that_cannot_be_used(trained, tmp_path, capsys):
    whole = (trained / "best.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save(checkpoint | {"schema": 99}, tmp_path / "future.pt")
    torch.save(checkpoint | {"flags": checkpoint["flags"] | {"hidden_size": 24}}, tmp_path / "other.pt")
    for name, message in (
        ("half.pt", "cannot be read as a checkpoint"),
        ("foreign.pt", "not a checkpoint of this program"),
        ("future.pt", "schema 99"),
        ("other.pt", "another architecture"),
    ):
        assert trainer.main(["--mode", "test", "--model_path", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_a_pickled_class_is_not_executed(tmp_path):
    """Defect 14."""

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"decoder": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_only_a_typed_flag_can_contradict_a_checkpoint(trained, capsys):
    """Defect 7."""
    assert trainer.main(["--model_path", str(trained), "--decoder", "lstm"]) == 2
    assert "--decoder lstm contradicts" in capsys.readouterr().err
    assert trainer.main(["--mode", "test", "--model_path", str(trained), "--hidden_size", "99"]) == 2


def test_a_schedule_flag_needs_a_schedule(trained, capsys):
    assert trainer.main(["--model_path", str(trained), "--min_lr", "1e-5"]) == 2
    assert "--min_lr has no effect: the checkpoint has no schedule" in capsys.readouterr().err


def test_a_second_test_adds_and_overwrites_nothing(trained):
    assert trainer.main(["--mode", "test", "--model_path", str(trained)]) == 0
    before = {path.name: path.read_bytes() for path in trained.glob("test_captions*.json")}
    assert trainer.main(["--mode", "test", "--model_path", str(trained), "--split", "val", "--beam_size", "2"]) == 0
    assert all((trained / name).read_bytes() == content for name, content in before.items())
    results = json.loads((trained / "test_metrics.json").read_text())
    assert [(entry["split"], entry["beam_size"]) for entry in results] == [
        ("test", 1), ("test", 3), ("val", 1), ("val", 2),
    ]  # fmt: skip


def test_a_run_config_is_read_back_and_the_command_line_wins(trained, capsys):
    config = str(trained / "run_config.json")
    args = trainer.parse_flags(["--config", config, "--epochs", "7"])
    assert (args.decoder, args.hidden_size, args.epochs, args.dataset_type) == ("attention", 16, 7, "custom")
    Path("bad.yaml").write_text("epochz: 3\n")
    with pytest.raises(SystemExit):
        trainer.parse_flags(["--config", "bad.yaml"])
    assert "unknown flag 'epochz'" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "best.pt"
    target.write_bytes(b"good")

    def full_disk(file):
        file.write(b"ba")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_atomic(target, full_disk)
    assert target.read_bytes() == b"good" and [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_a_file_system_that_became_read_only_is_one_message(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="cannot write .*Read-only"):
        write_atomic(tmp_path / "last.pt", lambda file: file.write(b"x"))
