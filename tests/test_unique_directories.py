"""Run names and run directories; runs under pytest and as a script, which shows what it made."""

import os
import sys
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import as_script
import pytest

from captioning.io import UserError, read_json
from captioning.runs.directories import find_checkpoint
from experiment_utils import create_run_directory, rate_text, run_name, write_run_config

FLAGS = {
    "dataset_type": "flickr8k", "decoder": "lstm", "epochs": 15, "batch_size": 64, "learning_rate": 1e-3,
    "use_scheduler": True, "scheduler_type": "cosine", "save_attention_viz": False,
}  # fmt: skip
NOW = datetime(2024, 12, 1, 14, 30, 22)


def test_the_readmes_names():
    assert run_name(FLAGS, "20241201_143022") == "flickr8k_lstm_ep15_bs64_lr1e-03_cosine_20241201_143022"
    other = FLAGS | {"dataset_type": "flickr30k", "decoder": "attention", "epochs": 30, "batch_size": 128}
    other |= {"learning_rate": 1e-4, "use_scheduler": False, "save_attention_viz": True}
    assert run_name(other, "20241201_143045") == "flickr30k_attention_ep30_bs128_lr1e-04_att_20241201_143045"


def test_rates_that_would_round_alike_stay_apart():
    assert rate_text(5e-4) == "5e-04" and rate_text(1.5e-4) == "1.5e-04" and rate_text(1.4e-4) != rate_text(1e-4)


def test_two_runs_of_one_second_never_share_a_directory(tmp_path):
    made = [create_run_directory(tmp_path, FLAGS, "resnet", NOW) for _ in range(3)]
    assert len(set(made)) == 3 and all(path.parent == tmp_path / "flickr8k" / "resnet_lstm" for path in made)


def test_the_config_has_the_originals_names(tmp_path):
    write_run_config(tmp_path, FLAGS, ["epochs"], "python x")
    assert read_json(tmp_path / "run_config.json")["decoder_type"] == "lstm"


def test_model_path_finds_the_newest_run_that_has_the_file(tmp_path):
    for day in (1, 3, 2):
        directory = create_run_directory(tmp_path, FLAGS, "resnet", datetime(2024, 12, day))
        (directory / "model_epoch_10.pt").touch()
    dry = create_run_directory(tmp_path, FLAGS | {"dry_run": True}, "resnet", datetime(2024, 12, 9))
    (dry / "model_epoch_10.pt").touch()
    found = find_checkpoint(tmp_path / "flickr8k" / "resnet_lstm" / "model_epoch_10.pt")
    assert found.parent.name.endswith("20241203_000000")
    with pytest.raises(UserError, match="best.pt"):
        find_checkpoint(tmp_path / "flickr8k")


def test_of_two_runs_of_one_second_the_later_is_the_newest_whatever_its_checkpoints_are(tmp_path):
    made = [create_run_directory(tmp_path, FLAGS | {"epochs": epochs}, "resnet", NOW) for epochs in (2, 1, 2)]
    for second, directory in enumerate(made):
        write_run_config(directory, FLAGS, ["epochs"], "python x")
        os.utime(directory / "run_config.json", ns=(second, second))
    for directory in made:  # a best.pt carried over from the run before is the same file
        (directory / "best.pt").touch() if directory == made[0] else os.link(made[0] / "best.pt", directory / "best.pt")
    assert find_checkpoint(tmp_path) == made[2] / "best.pt"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for changes in ({}, {}, {"learning_rate": 5e-4}, {"use_scheduler": False, "save_attention_viz": True}):
            made = create_run_directory(Path(folder), FLAGS | changes, "resnet", NOW)
            write_run_config(made, FLAGS | changes, ["epochs"], "python x")
            print(made.relative_to(folder), [path.name for path in made.iterdir()])
    sys.exit(as_script.run(__file__))
