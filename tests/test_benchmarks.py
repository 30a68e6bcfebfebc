"""The benchmarks run at their tiniest scale; nothing is timed here."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import adaptation
import bench
import stress

from captioning.data.dataset import load_caption_set


def test_every_rate_is_measured(tmp_path: Path) -> None:
    """Start-up and memory, which take whole processes, are left out."""
    about = bench.Bench(bench.TINY, torch.device("cpu"), tmp_path, None)
    figures = [figure for part in ("encoding", "training", "decoding") for figure in bench.PARTS[part](about)]
    assert all(math.isfinite(figure.times) and math.isfinite(figure.share) for figure in figures)
    rows = ["efficientnet_lite0", "attention, 24 x 1, fp32", "features of attention", "attention, 24 x 1, beam 2"]
    assert all(any(figure.name.startswith(row) for figure in figures) for row in rows)


def test_a_rate_above_its_limit_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [bench.Figure("too fast", 3.0, "views/s", 1.0, "one by one", 2.0, "JPEG decoding")]
    monkeypatch.setitem(bench.PARTS, "encoding", lambda _: figures)
    with pytest.raises(SystemExit, match="above the physical limit.*too fast: 150%"):
        bench.main(["--only", "encoding"], bench.TINY)


def test_odd_files_are_counted_by_their_reader(capsys: pytest.CaptureFixture[str]) -> None:
    assert stress.main(["--only", "fuzz", "--match", "split", "--count", "3"]) == 0
    rows = {line[:58].strip(): line[58:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["fuzz: split lists"][:2] == ["3", "3"] and rows["together"][3] == "0"


def test_a_withheld_theme_is_nowhere_but_among_the_own_photos(tiny: Path, tmp_path: Path) -> None:
    data = load_caption_set(tiny)
    themed = {data.names[i] for i in adaptation.themed_images(data, "red")}
    assert themed == {f"p{number:02d}.jpg" for number in range(0, 20, 4)}
    others, own = adaptation.write_sets(tmp_path / "sets", data, "red", [2, 90])
    written = {size: load_caption_set(folder) for size, folder in {0: others, **own}.items()}
    assert set(written) == {0, 2, 4} and set(written[0].names) == set(data.names) - themed
    for size in (2, 4):
        names = {split: {written[size].names[i] for i in images} for split, images in written[size].splits.items()}
        assert len(names["train"] | names["val"]) == size and len(names["test"]) == 1
        assert len(set.union(*names.values())) == size + 1 and set.union(*names.values()) <= themed
