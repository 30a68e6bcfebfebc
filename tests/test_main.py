"""The main program from flags to captions, on a tiny set; defects 5, 7, 12 and 14 of the original."""

import json
from pathlib import Path

import pytest
import torch

import flickr_image_caption_with_pytorch_resnet_lstm as trainer

SMALL = [
    "--encoder",
    "efficientnet_lite0",
    "--embed_size",
    "16",
    "--hidden_size",
    "16",
    "--num_layers",
    "1",
    "--freq_threshold",
    "1",
    "--epochs",
    "2",
]


def run(tiny: Path, *flags: str) -> int:
    return trainer.main(["--dataset_type", "custom", "--data_dir", str(tiny), *SMALL, *flags])


@pytest.fixture
def here(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    return tiny


def newest() -> Path:
    return max(Path("saved_models").glob("custom/*/*"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("decoder", ("lstm", "attention"))
def test_train_resume_and_test(here, capsys, decoder):
    viz = ["--save_attention_viz", "--advanced_attention_viz"] if decoder == "attention" else []
    assert run(here, "--decoder", decoder, "--use_scheduler", "--scheduler_type", "cosine", *viz) == 0
    first = newest()
    names = {path.name for path in first.iterdir()}
    assert {
        "run_config.json",
        "run_summary.txt",
        "training_losses.png",
        "learning_rate.png",
        "loss_curve.json",
    } <= names
    assert {"metrics_history.json", "best.pt", "last.pt", "model_epoch_1.pt", "model_epoch_2.pt", "split.json"} <= names
    curve = json.loads((first / "loss_curve.json").read_text())
    assert set(curve) == {"epochs", "training_losses", "validation_losses", "learning_rates"}
    assert (
        all(len(values) == 2 for values in curve.values()) and curve["learning_rates"][1] < curve["learning_rates"][0]
    )
    assert {"bleu", "wer", "rouge", "cider"} <= set(json.loads((first / "metrics_history.json").read_text())[0])
    checkpoint = torch.load(first / "model_epoch_2.pt", weights_only=True)
    assert checkpoint["flags"]["attention_dim"] == 512 and checkpoint["decoder_type"] == decoder

    # Resume: no --decoder typed; schedule and histories come along, the old run is untouched.
    before = sorted((path.name, path.stat().st_mtime_ns) for path in first.iterdir())
    assert trainer.main(["--model_path", str(first / "model_epoch_2.pt"), "--epochs", "1"]) == 0
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in first.iterdir())
    second = newest()
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


def test_training_is_reproducible_bit_for_bit(here):
    for _ in range(2):
        assert run(here, "--decoder", "attention") == 0
    first, second = (torch.load(path / "last.pt", weights_only=True) for path in newest().parent.iterdir())
    assert all(torch.equal(first["decoder"][name], second["decoder"][name]) for name in first["decoder"])


def test_resuming_is_training_on(here):
    assert run(here) == 0
    whole = torch.load(newest() / "model_epoch_2.pt", weights_only=True)
    assert trainer.main(["--model_path", str(newest() / "model_epoch_1.pt"), "--epochs", "1"]) == 0
    parts = torch.load(newest() / "model_epoch_2.pt", weights_only=True)
    assert all(torch.equal(whole["decoder"][name], parts["decoder"][name]) for name in whole["decoder"])


@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_the_plain_path_without_a_cache(here, decoder):
    assert run(here, "--decoder", decoder, "--feature_cache", "off", "--dry_run") == 0
    assert not Path("feature_cache").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--decoder", "lstm", "--save_attention_viz"], "no effect with --decoder lstm"),
        (["--scheduler_type", "cosine"], "without --use_scheduler"),
        (["--mode", "test"], "needs --model_path"),
        (["--learning_rate", "nan"], "out of range"),
        (["--batch_size", "0"], "at least 1"),
    ],
)
def test_flags_without_effect_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        trainer.main(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


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


def test_an_unreadable_image_is_named(here, capsys):
    (here / "Images" / "p05.jpg").write_bytes(b"no picture")
    assert run(here) == 2
    captured = capsys.readouterr()
    assert "p05.jpg" in captured.out and "more than 1 %" in captured.err
