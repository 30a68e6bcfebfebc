"""Plots are tested by what their axes hold, not by pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from captioning import plots


def curve(epochs: int, rates: list[float] | None = None) -> dict[str, list]:
    return {
        "epochs": list(range(1, epochs + 1)),
        "training_losses": [4 / epoch for epoch in range(1, epochs + 1)],
        "validation_losses": [5 / epoch for epoch in range(1, epochs + 1)],
        "learning_rates": rates or [1e-3] * epochs,
    }


def sample(width: int = 60, height: int = 40, **changes) -> dict:
    plain = {"caption": "a dog runs", "references": ["a dog runs fast", "one brown dog"], "name": "dog.jpg"}
    return {"image": Image.new("RGB", (width, height), "teal"), **plain, **changes}


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def assert_whole_picture(path) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG" and max(picture.size) <= 2400
        picture.load()
    assert [file.name for file in path.parent.iterdir()] == [path.name], "a temporary file stayed"


@pytest.mark.parametrize("epochs", [1, 2, 100])
def test_losses_show_both_curves_and_the_best_epoch(epochs):
    figure = plots.losses_figure(curve(epochs), best_epoch=epochs)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["training"].get_xdata()) == list(range(1, epochs + 1))
    assert lines["validation"].get_ydata()[-1] == 5 / epochs
    (best,) = [line for label, line in lines.items() if label.startswith(f"best epoch: {epochs} ")]
    assert best.get_xdata()[0] == epochs and best.get_ydata()[0] == 5 / epochs
    assert axes.get_xlabel() == "epoch" and axes.get_ylabel() == "loss"
    ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    assert ticks and all(float(tick).is_integer() for tick in ticks)


@pytest.mark.parametrize("best_epoch", [None, 7])
def test_no_best_epoch_is_marked_where_none_is_known_or_it_is_outside(best_epoch):
    (axes,) = plots.losses_figure(curve(3), best_epoch).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]


def test_a_loss_that_is_missing_or_not_finite_leaves_a_gap(tmp_path):
    broken = curve(4)
    broken["validation_losses"] = [None, float("inf"), 2.0, float("nan")]
    (axes,) = plots.losses_figure(broken, best_epoch=1).axes
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), [np.nan, np.nan, 2.0, np.nan])
    plots.plot_losses(broken, tmp_path / "training_losses.png", best_epoch=1)
    assert_whole_picture(tmp_path / "training_losses.png")


@pytest.mark.parametrize(
    ("rates", "scale"),
    [
        ([1e-3, 1e-3, 1e-3], "linear"),
        ([1e-3, 5e-4, 2e-4], "linear"),
        ([1e-3, 1e-4, 1e-6], "log"),
        ([1e-3, 1e-5, 0.0], "linear"),  # zero cannot stand on a logarithmic axis
    ],
)
def test_learning_rate_is_logarithmic_only_over_more_than_a_decade(rates, scale):
    (axes,) = plots.learning_rate_figure(curve(3, rates), None).axes
    assert axes.get_yscale() == scale
    assert list(axes.lines[0].get_ydata()) == rates
    assert axes.get_xlabel() == "epoch" and axes.get_ylabel().startswith("learning rate")


def test_curves_of_different_lengths_or_without_an_epoch_raise():
    with pytest.raises(ValueError, match="one length"):
        plots.losses_figure({**curve(3), "validation_losses": [1.0]}, None)
    with pytest.raises(ValueError, match="at least one epoch"):
        plots.learning_rate_figure({key: [] for key in curve(1)}, None)


def test_learning_rate_file(tmp_path):
    plots.plot_learning_rate(curve(1), tmp_path / "learning_rate.png", 1)
    assert_whole_picture(tmp_path / "learning_rate.png")


def test_scores_show_three_curves_and_the_best_epoch_on_cider():
    history = [{"epoch": n, "cider": n / 10, "rouge_l": 0.4, "bleu4": 0.2, "wer": 0.9} for n in (1, 2, 3)]
    history[0].pop("bleu4")
    (axes,) = plots.scores_figure(history, best_epoch=2).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    np.testing.assert_allclose(lines["CIDEr"], [10, 20, 30])
    np.testing.assert_allclose(lines["BLEU-4"], [np.nan, 20, 20])
    assert lines["best epoch: 2 (CIDEr 20.0)"] == [20] and axes.get_ylim()[0] == 0
    assert axes.get_xlabel() == "epoch" and "x100" in axes.get_ylabel()


def test_pixels_are_those_of_the_file(tmp_path):
    pixels = plots.pixels_of(plots.learning_rate_figure(curve(3), 1))
    plots.plot_learning_rate(curve(3), tmp_path / "rate.png", 1)
    with Image.open(tmp_path / "rate.png") as picture:
        np.testing.assert_array_equal(pixels, np.asarray(picture.convert("RGB")))


def test_gallery_shows_every_sample_with_its_caption_and_two_references():
    samples = [sample(caption=f"caption {number}", references=["r1", "r2", "r3"]) for number in range(5)]
    figure = plots.captions_figure(samples)
    assert [axes.get_label() for axes in figure.axes] == ["sample"] * 5
    assert all(f"caption {number}" in texts(figure) for number in range(5))
    assert "r2" in texts(figure) and "r3" not in texts(figure) and "dog.jpg" in texts(figure)


def test_gallery_stops_at_twelve_and_needs_one(tmp_path):
    assert len(plots.captions_figure([sample()] * 15).axes) == 12
    with pytest.raises(ValueError):
        plots.captions_figure([])
    plots.plot_captions([sample(90, 10), sample(10, 90)] * 6, tmp_path / "captions.png")
    assert_whole_picture(tmp_path / "captions.png")


def test_gallery_takes_empty_and_odd_texts(tmp_path):
    odd = [sample(caption="", references=[]), sample(caption="costs $5 or $6_x", name="y" * 200)]
    figure = plots.captions_figure(odd)
    assert "(no words)" in texts(figure) and "$5 or $6_x" in texts(figure).replace("\n", " ")
    plots.plot_captions(odd, tmp_path / "captions.png")
    assert_whole_picture(tmp_path / "captions.png")


def test_wrap_keeps_the_lines_it_may_and_says_where_it_cut():
    assert plots.wrap("a dog", 5, 10, lines=1) == ["a dog"]
    cut = plots.wrap("word " * 100, 2, 10, lines=3)
    assert len(cut) == 3 and cut[-1].endswith("…") and not cut[0].endswith("…")
    (name,) = plots.wrap("x" * 300, 2, 10, lines=1)
    assert name.startswith("xxx") and name.endswith("…")


def test_nothing_goes_through_pyplot(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, plots; assert 'matplotlib' not in sys.modules\n"
        "plots.plot_learning_rate({'epochs': [1], 'learning_rates': [1.0]}, sys.argv[1], 1)\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rate.png")],
        check=True, cwd=plots.__file__.rpartition("plots.py")[0] or ".",
    )  # fmt: skip
