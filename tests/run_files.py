"""Run directories and a data set that are written by hand, without a network, for tests of tables and reports."""

import html.parser
import json
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import experiment_utils
from metrics_utils import score_images, summarize

HUGE = 10**400  # a number of JSON that no float holds
CAPTIONS = [
    "a red dog runs",
    "a green cat sits on a mat",
    "a blue bird",
    "a red dog sits",
    "a cat runs",
    "one bird flies",
]
REFERENCES = [
    ["a red dog runs fast", "the dog runs"], ["a green cat sits on a mat", "a cat on a mat"], ["a blue bird sings"],
    ["a red cat sits", "a dog sits down"], ["a black horse jumps high"], ["one bird flies away", "a bird flies"],
]  # fmt: skip
NAMES = [f"p{n}.jpg" for n in range(6)]


def write_run(directory: Path, captions: list[str] | None = CAPTIONS, order=range(6), **flags) -> Path:
    """A run directory as training and testing leave it, without a network."""
    directory.mkdir(parents=True)
    config = {
        "dataset_type": "custom", "decoder_type": "lstm", "encoder": "efficientnet_lite0", "learning_rate": 0.001,
        "use_scheduler": False, "scheduler_type": "cosine", "seed": 0, "freq_threshold": 1, "best_metric": "cider",
        "num_workers": 16, "command": "python train.py --dataset_type custom",
    }  # fmt: skip
    (directory / "run_config.json").write_text(json.dumps(config | flags))
    curve = {"epochs": [1, 2, 3], "training_losses": [3.0, 2.0, 1.5], "validation_losses": [3.1, 2.2, 2.3]}
    (directory / "loss_curve.json").write_text(json.dumps(curve | {"learning_rates": [0.001] * 3}))
    history = [
        {"epoch": n, "is_best": n < 3, "split": "val", "beam_size": 1, "images": 2, "cider": c}
        for n, c in ((1, 0.1), (2, 0.5), (3, 0.4))
    ]
    (directory / "metrics_history.json").write_text(json.dumps(history))
    if captions is not None:
        each = score_images(captions, REFERENCES)
        rows = {field: values[list(order)].tolist() for field, values in each._asdict().items() if field != "rouge"}
        names = [NAMES[n] for n in order]
        bleu = {key: rows.pop(key) for key in ("guess", "correct", "length", "reference_length")}
        (directory / "test_scores.json").write_text(json.dumps({"image_id": names, "bleu": bleu, **rows}))
        said = [{"image_id": name, "caption": captions[n]} for name, n in zip(names, order, strict=True)]
        (directory / "test_captions.json").write_text(json.dumps(said))
        row = {
            "checkpoint": "best.pt", "epoch": 2, "split": "test", "images": 6, "views": "whole", "beam_size": 3,
            "length_penalty": 0.7, "consensus": None, "captions_file": "test_captions.json",
            "scores_file": "test_scores.json", **summarize(each), "cider_interval": [0.25, 1.75],
        }  # fmt: skip
        texts = [(name, text) for name, texts in zip(NAMES, REFERENCES, strict=True) for text in texts]
        known = [{"id": 0, "image_id": name, "caption": text} for name, text in texts]
        (directory / "test_references.json").write_text(json.dumps({"annotations": known}))
        (directory / "test_metrics.json").write_text(json.dumps([row]))
    return directory


def write_checkpoint(path: Path, epoch: object = None) -> Path:
    """The form of a checkpoint; of the epoch in its name where none is given."""
    epoch = int(path.stem.rpartition("_")[2]) if epoch is None else epoch
    torch.save({"epoch": epoch, "decoder": {"weight": torch.zeros(300)}}, path)
    return path


def write_runs(tmp_path: Path) -> Path:
    """Two tested runs, one that is not, and a dry run; returns their folder."""
    write_run(tmp_path / "runs" / "one")
    write_run(tmp_path / "runs" / "two", ["a dog"] * 6, decoder_type="attention", learning_rate=0.01, num_workers=2)
    write_run(tmp_path / "runs" / "three", None, decoder_type="attention")
    write_run(tmp_path / "runs" / "dry_run_four")
    for age, name in enumerate(("three", "two", "one", "dry_run_four")):
        os.utime(tmp_path / "runs" / name / "run_config.json", (1e9 - age, 1e9 - age))
    return tmp_path / "runs"


def write_data(tmp_path: Path) -> Path:
    """The pictures and references of the runs above; p4's picture is broken."""
    folder = tmp_path / "data"
    (folder / "Images").mkdir(parents=True)
    rows = ["image,caption"]
    for number, (name, captions) in enumerate(zip(NAMES, REFERENCES, strict=True)):
        noise = np.random.default_rng(number).integers(0, 255, (600, 900, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "Images" / name)
        rows += [f"{name},{caption}" for caption in captions]
    (folder / "Images" / "p4.jpg").write_bytes(b"no picture")
    (folder / "captions.txt").write_text("\n".join(rows) + "\n")
    return folder


def add_ensemble(run: Path, cider: float) -> None:
    """Add the row of a test of an ensemble of two models."""
    (row,) = json.loads((run / "test_metrics.json").read_text())
    members = {"checkpoint": ["best.pt", "models/<b>two</b>/best.pt"], "epoch": [3, 2]}
    (run / "ensemble_metrics.json").write_text(json.dumps([row | members | {"cider": cider}]))


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, without the pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(9)), b"IEND"]
    parts = (struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def skip_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no curves and no report: they take longer than training a tiny model does."""
    monkeypatch.setattr("captioning.runs.plots.draw_curves", lambda *_: None)
    for module in ("captioning.runs.report", "captioning.modes.test"):
        monkeypatch.setattr(f"{module}.write_report", lambda directory, *_: directory / "report.html")


def assert_room(out: str, directory: Path) -> None:
    """The room that a run printed is within a tenth of what it wrote; of hard links one counts."""
    number, unit = re.findall(r"will take up to ([\d.]+) (\w+);", out)[-1]
    written = sum({path.stat().st_ino: path.stat().st_size for path in directory.rglob("*")}.values())
    printed = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert printed == pytest.approx(written, rel=0.1), f"{printed} printed, {written} written"


def only_run(place: str | Path = "saved_models") -> Path:
    """The run directory below `place`."""
    (directory,) = Path(place).glob("*/*/*")
    return directory


def command(*words: object) -> int:
    return experiment_utils.main([str(word) for word in words])


class Page(html.parser.HTMLParser):
    """The tags, their attributes, and the text that a reader sees."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if not self.tags or self.tags[-1][0] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())
