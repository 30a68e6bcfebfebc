"""Plots are tested by what their axes hold, not by pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from captioning.runs import plots


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


def history(epochs: int, self_critical: int = 0) -> list[dict]:
    """Scores of each epoch, the last `self_critical` of them with a reward."""
    rows = [{"epoch": n, "cider": n / 10, "rouge_l": 0.4, "bleu4": 0.2, "wer": 0.9} for n in range(1, epochs + 1)]
    return [row | ({"reward": 0.5} if row["epoch"] > epochs - self_critical else {}) for row in rows]


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def legend(figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


@pytest.mark.parametrize("epochs", [1, 2, 100])
def test_losses_show_both_curves_and_the_best_epoch(epochs):
    figure = plots.losses_figure(curve(epochs), best_epoch=epochs)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["training"].get_xdata()) == list(range(1, epochs + 1))
    assert lines["validation"].get_ydata()[-1] == 5 / epochs
    (best,) = [line for label, line in lines.items() if label.startswith(f"best epoch: {epochs} ")]
    assert best.get_xdata()[0] == epochs and f"{5 / epochs:.3f}" in best.get_label()
    assert axes.get_xlabel() == "epoch" and axes.get_ylabel() == "loss"
    ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    assert ticks and all(float(tick).is_integer() for tick in ticks)


def test_no_best_epoch_is_marked_where_it_is_not_among_them():
    assert legend(plots.losses_figure(curve(3), None)) == legend(plots.losses_figure(curve(3), 7))


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_nothing_crosses_the_title_and_legend(epochs):
    rows = history(epochs, self_critical=epochs // 2)
    for figure in (
        plots.losses_figure(curve(epochs), 1, rows),
        plots.learning_rate_figure(curve(epochs), 1, rows),
        plots.scores_figure(rows, 1),
    ):
        figure.draw_without_rendering()  # places everything
        box = figure.legends[0].get_window_extent()
        assert figure.legends[0].get_title().get_text().split(" ")[0] in ("Loss", "Learning", "Scores")
        assert box.y0 > max(axes.get_tightbbox().y1 for axes in figure.axes)
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y1)


def test_self_critical_epochs_are_marked_and_break_the_line_of_the_training_loss():
    numbers = curve(8)
    numbers["training_losses"][6:] = [-50.0, -60.0]
    figure = plots.losses_figure(numbers, 8, history(8, self_critical=2))
    (axes,) = figure.axes
    np.testing.assert_array_equal(np.isnan(axes.lines[0].get_ydata()), [False] * 6 + [True] * 2)
    assert axes.get_ylim()[0] > -1, "a loss of another kind does not stretch the scale"
    for each in (figure, plots.learning_rate_figure(numbers, 8, history(8, 2)), plots.scores_figure(history(8, 2), 8)):
        assert legend(each)[-1].startswith("self-critical epochs")
        for axes in each.axes:
            assert [(band.get_x(), band.get_width()) for band in axes.patches] == [(6.5, 1), (7.5, 1)]
    assert not plots.losses_figure(curve(8), 8, history(8)).axes[0].patches


def test_a_loss_that_is_missing_or_not_finite_leaves_a_gap():
    broken = curve(4)
    broken["validation_losses"] = [None, float("inf"), 2.0, float("nan")]
    (axes,) = plots.losses_figure(broken, best_epoch=1).axes
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), [np.nan, np.nan, 2.0, np.nan])


@pytest.mark.parametrize(
    "rates, scale",
    [([1e-3, 5e-4, 2e-4], "linear"), ([1e-3, 1e-4, 1e-6], "log"), ([1e-3, 1e-5, 0.0], "linear")],  # log has no zero
)
def test_learning_rate_is_logarithmic_only_over_more_than_a_decade(rates, scale):
    (axes,) = plots.learning_rate_figure(curve(3, rates), None).axes
    assert axes.get_yscale() == scale
    assert list(axes.lines[0].get_ydata()) == rates
    assert axes.get_xlabel() == "epoch" and axes.get_ylabel().startswith("learning rate")


def test_the_curves_of_a_run_are_three_pictures_of_the_same_bytes_each_time(tmp_path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        plots.draw_curves(folder, curve(2), history(2, self_critical=1), 1)
    names = ["learning_rate.png", "training_losses.png", "validation_scores.png"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_cider_has_a_panel_of_its_own_scale():
    rows = history(3)
    rows[0].pop("bleu4")
    figure = plots.scores_figure(rows, best_epoch=2)
    upper, lower = ({line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in figure.axes)
    np.testing.assert_allclose(upper["CIDEr"], [10, 20, 30])
    np.testing.assert_allclose(lower["ROUGE-L"], [40, 40, 40])
    np.testing.assert_allclose(lower["BLEU-4"], [np.nan, 20, 20])
    assert "best epoch: 2 (CIDEr 20.0)" in upper and [axes.get_ylim()[0] for axes in figure.axes] == [0, 0]
    assert legend(figure) == ["CIDEr", "ROUGE-L", "BLEU-4", "best epoch: 2 (CIDEr 20.0)"]
    assert figure.axes[1].get_xlabel() == "epoch" and all("x100" in axes.get_ylabel() for axes in figure.axes)


def test_gallery_shows_every_sample_with_its_caption_and_two_references():
    figure = plots.captions_figure([sample(caption=f"caption {n}", references=["r1", "r2", "r3"]) for n in range(5)])
    assert [axes.get_label() for axes in figure.axes] == ["sample"] * 5
    assert all(f"caption {number}" in texts(figure) for number in range(5))
    assert "r2" in texts(figure) and "r3" not in texts(figure) and "+ 1 more" in texts(figure)
    assert "dog.jpg" in texts(figure)


def test_a_photo_of_another_shape_is_shown_whole():
    tall = Image.new("RGB", (100, 300), "teal")
    tall.paste("red", (0, 0, 100, 5))
    tall.paste("blue", (0, 295, 100, 300))
    figure = plots.captions_figure([sample(400, 300), sample(400, 300), sample(image=tall)])
    shown = np.asarray(figure.axes[2].images[0].get_array())
    assert (shown[0, shown.shape[1] // 2, :3] == (255, 0, 0)).all()
    assert (shown[-1, shown.shape[1] // 2, :3] == (0, 0, 255)).all()
    assert shown.shape[1] / shown.shape[0] == pytest.approx(1 / 3, rel=0.02)


def test_a_gallery_shows_captions_of_thirty_words_to_the_end_and_no_text_on_another():
    long = sample(caption=" ".join(f"word{n}" for n in range(30)), references=["some long reference " * 6] * 5)
    figure = plots.captions_figure([long] * 2 + [sample()] * 6)
    assert "word29" in texts(figure) and "…" not in texts(figure)
    figure.draw_without_rendering()
    boxes = [each.get_window_extent() for each in (*figure.texts, *figure.axes)]
    assert sum(one.overlaps(other) for one in boxes for other in boxes) == len(boxes), "each overlaps itself alone"
    assert all(box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)


def test_a_gallery_of_long_and_tall_photos_is_of_bounded_size(tmp_path):
    plots.save_figure(plots.captions_figure([sample(90, 10), sample(10, 90)] * 6), tmp_path / "captions.png")
    with Image.open(tmp_path / "captions.png") as picture:
        assert picture.format == "PNG" and max(picture.size) <= 2400


def test_gallery_takes_empty_and_odd_texts():
    odd = [sample(caption="", references=[]), sample(caption="costs $5 or $6_x", name="y" * 200)]
    figure = plots.captions_figure(odd)
    assert "(no words)" in texts(figure) and "$5 or $6_x" in texts(figure).replace("\n", " ")
