"""Pictures of a run: losses, learning rate, sample captions. Also what every picture of the project shares.

Figures are built with matplotlib's object API, never pyplot: no window, no global state, nothing to close.
Matplotlib itself is imported where it is used, because it takes a while and most commands draw nothing.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from captioning.io import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120  # with the sizes below, a picture fills a screen and its text stays readable there
GREY = "#595959"
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito's palette for colour-blind readers
NEUTRAL = "#808080"  # marks and grid lines: readable on white and on a dark page behind a transparent figure
COLUMN = 3.4  # inches, the width of a column of a gallery


# --------------------------------------------------------------------------------------------------
# What every picture shares


def new_figure(width: float, height: float, dpi: int = DPI) -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the path's extension names (png, svg, pdf), whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib import rc_context

    form = Path(path).suffix[1:]
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)  # the same figure, the same bytes
    with rc_context({"svg.hashsalt": "figure", "pdf.fonttype": 42}):  # letters stay letters, as journals ask
        write_atomic(path, lambda file: figure.savefig(file, format=form, dpi=figure.dpi, metadata=undated))


def place_axes(figure: Figure, left: float, top: float, width: float, height: float, label: str) -> Axes:
    """Axes at a place given in inches from the figure's upper left corner; `label` tells what they show."""
    total_width, total_height = figure.get_size_inches()
    bottom = total_height - top - height
    return figure.add_axes(
        (left / total_width, bottom / total_height, width / total_width, height / total_height), label=label
    )


def place_text(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    """Text whose upper edge lies at a place given in inches from the figure's upper left corner."""
    total_width, total_height = figure.get_size_inches()
    style = {"verticalalignment": "top", "parse_math": False, **style}  # a "$" in a caption is a dollar
    figure.text(left / total_width, 1 - top / total_height, text, **style)


def show_photo(axes: Axes, image: Image.Image) -> None:
    """A photo at its own aspect, as large as fits into the axes, without ticks or frame."""
    # Pillow resamples photos better than imshow, whose filters leave halos or jagged edges.
    room = axes.get_window_extent()
    scale = min(room.width / image.width, room.height / image.height)
    fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    axes.imshow(np.asarray(fitted), extent=(0, image.width, image.height, 0), interpolation="bilinear")
    axes.set(xticks=[], yticks=[])  # hidden ticks would still take a third of the drawing time
    axes.set_axis_off()


def shrunk(image: Image.Image, longest: int = 900) -> Image.Image:
    """The image as RGB, reduced so that no side is longer than `longest` pixels."""
    small = image.convert("RGB")
    small.thumbnail((longest, longest))
    return small


def text_width(text: str, size: float, bold: bool = False) -> float:
    """The width of one line in inches at font size `size`."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 72


def wrap(text: str, width: float, size: float, lines: int, bold: bool = False) -> list[str]:
    """Break text into lines at most `width` inches long at font size `size`.

    Text beyond `lines` lines is cut; the last line then ends in an ellipsis.
    """

    def fitting(text: str, end: str = "") -> int:
        letters = range(1, len(text) + 1)
        return max(1, bisect_left(letters, True, key=lambda n: text_width(text[:n] + end, size, bold) > width))

    broken: list[str] = []
    rest = " ".join(text.split())[: 500 * lines]  # no line has room for 500 letters
    while rest:
        fit = fitting(rest)
        if fit < len(rest) and len(broken) == lines - 1:
            return [*broken, rest[: fitting(rest, "…")].rstrip() + "…"]
        if fit < len(rest):
            fit = max(rest.rfind(" ", 0, fit + 1), 0) or fit  # a word longer than a line is broken
        broken.append(rest[:fit].rstrip())
        rest = rest[fit:].lstrip()
    return broken


# --------------------------------------------------------------------------------------------------
# Curves


def draw_curves(
    directory: Path, curve: Mapping[str, Sequence[Any]], history: Sequence[Mapping[str, Any]], best_epoch: int | None
) -> None:
    """Write all three pictures of a run's epochs into its directory: losses, learning rate, validation scores.

    Args:
        curve: the content of `loss_curve.json`: `epochs`, `training_losses`, `validation_losses`,
            `learning_rates`, lists of equal length. A value that is None or not finite leaves a gap.
        history: the content of `metrics_history.json`; a score that an epoch lacks leaves a gap. An epoch
            with a `reward` is self-critical and lies on a grey band.
        best_epoch: the epoch whose weights became `best.pt`; marked where it is among the epochs.

    Raises:
        UserError: a file cannot be written.
    """
    save_figure(losses_figure(curve, best_epoch, history), directory / "training_losses.png")
    save_figure(learning_rate_figure(curve, best_epoch, history), directory / "learning_rate.png")
    save_figure(scores_figure(history, best_epoch), directory / "validation_scores.png")


def losses_figure(
    curve: Mapping[str, Sequence[Any]], best_epoch: int | None, history: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """Training and validation loss by epoch; args and errors as in `draw_curves`.

    The training loss of a self-critical epoch is near zero and of another kind: the line breaks there.
    """
    epochs, training, validation = _columns(curve, "training_losses", "validation_losses")
    self_critical = _self_critical(history)
    training[np.isin(epochs, self_critical)] = np.nan
    figure, (axes,) = _curve_axes(epochs, "loss")
    _plot(axes, epochs, training, "training", BLUE, "o")
    _plot(axes, epochs, validation, "validation", ORANGE, "s")
    _mark_best([axes], epochs, validation, best_epoch, "validation {:.3f}")
    _finish(figure, "Loss by epoch", self_critical, "self-critical epochs (training loss not comparable)")
    return figure


def learning_rate_figure(
    curve: Mapping[str, Sequence[Any]], best_epoch: int | None, history: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """The learning rate by epoch, logarithmic if it spans more than a decade; args and errors as in `draw_curves`."""
    epochs, rates = _columns(curve, "learning_rates")
    figure, (axes,) = _curve_axes(epochs, "learning rate")
    _plot(axes, epochs, rates, "learning rate", BLUE, "o")
    _mark_best([axes], epochs, rates, best_epoch, "rate {:.3g}")
    known = rates[np.isfinite(rates)]
    if len(known) and known.min() > 0 and known.max() > 10 * known.min():  # a rate of zero has no place on a log axis
        axes.set_yscale("log")
        axes.set_ylabel("learning rate (log scale)")
    else:
        axes.set_ylim(0, 1.1 * known.max() if len(known) and known.max() > 0 else 1)
        axes.yaxis.set_major_formatter("{x:.6g}")
    _finish(figure, "Learning rate by epoch", _self_critical(history))
    return figure


def scores_figure(history: Sequence[Mapping[str, Any]], best_epoch: int | None) -> Figure:
    """The validation scores by epoch, CIDEr in a panel of its own scale; args and errors as in `draw_curves`."""
    keys = ("cider", "rouge_l", "bleu4")
    epochs, cider, rouge, bleu = _columns(
        {"epochs": [row["epoch"] for row in history], **{key: [row.get(key) for row in history] for key in keys}}, *keys
    )
    figure, (upper, lower) = _curve_axes(epochs, "CIDEr (x100)", "score (x100)")
    _plot(upper, epochs, 100 * cider, "CIDEr", BLUE, "o")
    _plot(lower, epochs, 100 * rouge, "ROUGE-L", ORANGE, "s")
    _plot(lower, epochs, 100 * bleu, "BLEU-4", GREEN, "^")
    _mark_best([upper, lower], epochs, 100 * cider, best_epoch, "CIDEr {:.1f}")
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
    _finish(figure, "Scores of greedy captions of the validation images", _self_critical(history))
    return figure


def _columns(curve: Mapping[str, Sequence[Any]], *keys: str) -> list[np.ndarray]:
    """The epochs and the named lists as arrays; whatever is not a finite number becomes NaN, which is not drawn."""
    epochs = np.asarray(curve["epochs"], dtype=np.int64)
    columns = [np.array(curve[key], dtype=np.float64) for key in keys]
    return [epochs, *(np.where(np.isfinite(column), column, np.nan) for column in columns)]


def _self_critical(history: Sequence[Mapping[str, Any]]) -> list[int]:
    """The epochs that were trained on rewards."""
    return [row["epoch"] for row in history if "reward" in row]


def _curve_axes(epochs: np.ndarray, *y_labels: str) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per label, one above the other over the same epochs."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9, 3 + 2.5 * len(y_labels))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    panels = figure.subplots(len(y_labels), sharex=True, squeeze=False)[:, 0].tolist()
    margin = max(0.5, 0.02 * (epochs[-1] - epochs[0]))  # a single epoch stands in the middle, not on the axis
    for axes, label in zip(panels, y_labels, strict=True):
        axes.set_label("curve")
        axes.set_ylabel(label)
        axes.yaxis.label.set_size(13)
        axes.tick_params(labelsize=11)
        axes.grid(color=NEUTRAL, alpha=0.3, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    panels[-1].set_xlabel("epoch", fontsize=13)
    figure.align_ylabels()
    return figure, panels


def _plot(axes: Axes, epochs: np.ndarray, values: np.ndarray, label: str, color: str, marker: str) -> None:
    axes.plot(
        epochs, values, color=color, label=label, marker=marker, linewidth=2, markersize=6 if len(epochs) <= 30 else 3
    )


def _mark_best(
    panels: Sequence[Axes], epochs: np.ndarray, values: np.ndarray, best_epoch: int | None, note: str
) -> None:
    """A dashed line at the best epoch, whose value the legend has."""
    if best_epoch is None or best_epoch not in epochs:
        return
    value = values[list(epochs).index(best_epoch)]
    label = f"best epoch: {best_epoch}" + (f" ({note.format(value)})" if np.isfinite(value) else "")
    for axes in panels:
        axes.axvline(best_epoch, color=NEUTRAL, linestyle="--", linewidth=1.2, zorder=0, label=label)
        label = ""  # once in the legend


def _finish(figure: Figure, title: str, self_critical: Sequence[int], note: str = "self-critical epochs") -> None:
    """Shade the self-critical epochs, and put title and legend above the panels, where no line crosses them."""
    for axes in figure.axes:
        for epoch in self_critical:
            label = note if axes is figure.axes[0] and epoch == self_critical[0] else None
            axes.axvspan(epoch - 0.5, epoch + 0.5, color=NEUTRAL, alpha=0.15, linewidth=0, zorder=-1, label=label)
    handles = [handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0]]
    handles.sort(key=lambda handle: "epoch" in str(handle.get_label()))  # curves first, marks of epochs last
    figure.legend(
        handles=handles, loc="outside upper left", ncols=3, fontsize=11, frameon=False,
        title=title, title_fontproperties={"size": 15, "weight": "bold"}, alignment="left",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Sample captions


def captions_figure(samples: Sequence[Mapping[str, Any]]) -> Figure:
    """A gallery of photos, the captions a model gave them below.

    Args:
        samples: `{"image": PIL image, "name": a line of text, "caption": str, "references": list of str}` each;
            the first two references are shown. With a `group` each, consecutive samples of one group stand
            in rows of their own under the group's name.
    """
    groups = [(name, list(found)) for name, found in groupby(samples, lambda each: each.get("group", ""))]
    columns = min(max(len(found) for _, found in groups), 4)
    rows = [
        (name if first == 0 else "", [(each, _caption_lines(each)) for each in found[first : first + columns]])
        for name, found in groups
        for first in range(0, len(found), columns)
    ]
    aspect = float(np.median([each["image"].width / each["image"].height for _, row in rows for each, _ in row]))
    photo = COLUMN / min(max(aspect, 0.8), 1.5)
    heights = [
        0.42 * bool(name) + photo + 0.45 + max(0.21 * len(caption) + 0.165 * len(small) for _, (caption, small) in row)
        for name, row in rows
    ]
    gap, margin = 0.3, 0.35
    figure = new_figure(2 * margin + columns * (COLUMN + gap) - gap, margin + sum(heights))
    top = margin
    for (name, row), height in zip(rows, heights, strict=True):
        upper = top + 0.42 * bool(name)
        if name:
            place_text(figure, margin, top, name, fontsize=16, fontweight="bold", color=GREY)
        for column, (sample, (caption, small)) in enumerate(row):
            left = margin + column * (COLUMN + gap)
            axes = place_axes(figure, left, upper, COLUMN, photo, label="sample")
            show_photo(axes, shrunk(sample["image"]))
            below = upper + photo + 0.08
            place_text(figure, left, below, "\n".join(caption), fontsize=12.5, fontweight="bold", linespacing=1.15)
            below += 0.06 + 0.21 * len(caption)
            place_text(figure, left, below, "\n".join(small), fontsize=9.5, color=GREY, linespacing=1.25)
        top += height
    return figure


def _caption_lines(sample: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A sample's caption, and its references and name in small print, broken into lines of a column's width."""
    references = sample["references"]
    small = [line for text in references[:2] for line in wrap("– " + text, COLUMN, 9.5, lines=4)]
    if len(references) > 2:
        small.append(f"+ {len(references) - 2} more")
    small += wrap(sample["name"], COLUMN, 9.5, lines=3)
    return wrap(sample["caption"] or "(no words)", COLUMN, 12.5, lines=8, bold=True), small
