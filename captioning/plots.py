"""Pictures of a run: losses, learning rate, sample captions. Also what every picture of the project shares.

Figures are built with matplotlib's object API, never pyplot: no window, no global state, nothing to close.
Matplotlib itself is imported where it is used, because it takes a while and most commands draw nothing.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
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
BLUE, ORANGE, GREEN = (
    "#0072B2",
    "#D55E00",
    "#009E73",
)  # from Okabe and Ito's palette, told apart by colour-blind readers
MAX_SAMPLES = 12


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


def pixels_of(figure: Figure) -> np.ndarray:
    """What `save_figure` would write, as uint8 (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


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
    axes.set_axis_off()


def shrunk(image: Image.Image, longest: int = 900) -> Image.Image:
    """The image as RGB, reduced so that no side is longer than `longest` pixels."""
    small = image.convert("RGB")
    small.thumbnail((longest, longest))
    return small


def wrap(text: str, width: float, size: float, lines: int, bold: bool = False) -> list[str]:
    """Break text for a line `width` inches long at font size `size`; what exceeds `lines` lines ends in an ellipsis."""
    letter = size / 72 * (0.60 if bold else 0.52)  # a letter's mean width in DejaVu Sans
    letters = max(6, int(width / letter))
    broken = textwrap.wrap(text, letters)
    if len(broken) > lines:  # textwrap's own max_lines would drop a long file name altogether
        broken = [*broken[: lines - 1], broken[lines - 1][: letters - 2].rstrip() + " …"]
    return broken


# --------------------------------------------------------------------------------------------------
# Curves


def draw_curves(
    directory: Path, curve: Mapping[str, Sequence[Any]], history: Sequence[Mapping[str, Any]], best_epoch: int | None
) -> None:
    """All three pictures of a run's epochs, into its directory; args and errors as below."""
    plot_losses(curve, directory / "training_losses.png", best_epoch)
    plot_learning_rate(curve, directory / "learning_rate.png", best_epoch)
    plot_scores(history, directory / "validation_scores.png", best_epoch)


def plot_losses(curve: Mapping[str, Sequence[Any]], path: str | os.PathLike[str], best_epoch: int | None) -> None:
    """Draw training and validation loss by epoch (`training_losses.png`).

    Args:
        curve: the content of `loss_curve.json`: `epochs`, `training_losses`, `validation_losses`,
            `learning_rates`, lists of equal length. A loss that is None or not finite leaves a gap.
        best_epoch: the epoch whose weights became `best.pt`; marked where it is among the epochs.

    Raises:
        ValueError: the lists are empty or of different lengths.
        UserError: the file cannot be written.
    """
    save_figure(losses_figure(curve, best_epoch), path)


def plot_learning_rate(
    curve: Mapping[str, Sequence[Any]], path: str | os.PathLike[str], best_epoch: int | None
) -> None:
    """Draw the learning rate by epoch (`learning_rate.png`), logarithmically if it spans more than a decade.

    Args and errors as in `plot_losses`.
    """
    save_figure(learning_rate_figure(curve, best_epoch), path)


def plot_scores(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], best_epoch: int | None) -> None:
    """Draw the validation scores by epoch (`validation_scores.png`).

    Args:
        history: the content of `metrics_history.json`; a score that an epoch lacks leaves a gap.
        best_epoch: as in `plot_losses`.

    Raises:
        ValueError: there is no epoch.
        UserError: the file cannot be written.
    """
    save_figure(scores_figure(history, best_epoch), path)


def losses_figure(curve: Mapping[str, Sequence[Any]], best_epoch: int | None) -> Figure:
    """The figure that `plot_losses` writes."""
    epochs, training, validation = _columns(curve, "training_losses", "validation_losses")
    figure, axes = _curve_axes(epochs, "Loss by epoch", "loss")
    style = _line_style(epochs)
    axes.plot(epochs, training, color=BLUE, label="training", marker="o", **style)
    axes.plot(epochs, validation, color=ORANGE, label="validation", marker="s", **style)
    _mark_best(axes, epochs, validation, best_epoch, "validation {:.3f}")
    axes.legend(fontsize=12, frameon=False)
    return figure


def learning_rate_figure(curve: Mapping[str, Sequence[Any]], best_epoch: int | None) -> Figure:
    """The figure that `plot_learning_rate` writes."""
    from matplotlib.ticker import FuncFormatter

    epochs, rates = _columns(curve, "learning_rates")
    figure, axes = _curve_axes(epochs, "Learning rate by epoch", "learning rate")
    axes.plot(epochs, rates, color=BLUE, marker="o", label="learning rate", **_line_style(epochs))
    _mark_best(axes, epochs, rates, best_epoch, "rate {:.3g}")
    known = rates[np.isfinite(rates)]
    if len(known) and known.min() > 0 and known.max() > 10 * known.min():  # a rate of zero has no place on a log axis
        axes.set_yscale("log")
        axes.set_ylabel("learning rate (log scale)", fontsize=13)
    else:
        axes.set_ylim(0, 1.1 * known.max() if len(known) and known.max() > 0 else 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.6g}"))
    axes.legend(fontsize=12, frameon=False)
    return figure


def scores_figure(history: Sequence[Mapping[str, Any]], best_epoch: int | None) -> Figure:
    """The figure that `plot_scores` writes."""
    shown = (("cider", "CIDEr", BLUE, "o"), ("rouge_l", "ROUGE-L", ORANGE, "s"), ("bleu4", "BLEU-4", GREEN, "^"))
    keys = [key for key, *_ in shown]
    epochs, *columns = _columns(
        {"epochs": [row["epoch"] for row in history], **{key: [row.get(key) for row in history] for key in keys}}, *keys
    )
    figure, axes = _curve_axes(epochs, "Scores of greedy captions of the validation images", "score (x100)")
    for (_, name, color, marker), values in zip(shown, columns, strict=True):
        axes.plot(epochs, 100 * values, color=color, marker=marker, label=name, **_line_style(epochs))
    _mark_best(axes, epochs, 100 * columns[0], best_epoch, "CIDEr {:.1f}")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=12, frameon=False)
    return figure


def _mark_best(axes: Axes, epochs: np.ndarray, values: np.ndarray, best_epoch: int | None, note: str) -> None:
    """A ring around the best epoch's value and a dashed line through it, where it is among the epochs."""
    if best_epoch is None or best_epoch not in epochs:
        return
    value = values[list(epochs).index(best_epoch)]
    axes.axvline(best_epoch, color=GREY, linestyle="--", linewidth=1.2, zorder=0)
    label = f"best epoch: {best_epoch}" + (f" ({note.format(value)})" if np.isfinite(value) else "")
    axes.plot(
        [best_epoch], [value], color="black", label=label, marker="o", markersize=15, markerfacecolor="none",
        markeredgewidth=2, linestyle="none",
    )  # fmt: skip


def _columns(curve: Mapping[str, Sequence[Any]], *keys: str) -> list[np.ndarray]:
    """The epochs and the named lists as arrays; whatever is not a finite number becomes NaN, which is not drawn."""
    epochs = np.asarray(curve["epochs"], dtype=np.int64)
    columns = [np.array(curve[key], dtype=np.float64) for key in keys]
    if len(epochs) == 0 or any(column.shape != epochs.shape for column in columns):
        sizes = {key: len(curve[key]) for key in ("epochs", *keys)}
        raise ValueError(f"a curve needs lists of one length and at least one epoch, got {sizes}")
    return [epochs, *(np.where(np.isfinite(column), column, np.nan) for column in columns)]


def _curve_axes(epochs: np.ndarray, title: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9, 5.5)
    axes = place_axes(figure, left=1.1, top=0.6, width=7.6, height=4.1, label="curve")
    axes.set_title(title, fontsize=15, fontweight="bold", loc="left", pad=12)
    axes.set_xlabel("epoch", fontsize=13)
    axes.set_ylabel(y_label, fontsize=13)
    axes.tick_params(labelsize=11)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    margin = max(0.5, 0.02 * (epochs[-1] - epochs[0]))  # a single epoch stands in the middle, not on the axis
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    return figure, axes


def _line_style(epochs: np.ndarray) -> dict[str, Any]:
    return {"linewidth": 2, "markersize": 6 if len(epochs) <= 30 else 3}


# --------------------------------------------------------------------------------------------------
# Sample captions


def plot_captions(samples: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw a gallery of photos with the captions a model gave them; of more than 12 samples the first 12.

    Args:
        samples: `{"image": PIL image, "name": its file name, "caption": str, "references": list of str}` each;
            the first two references are shown.

    Raises:
        ValueError: there is no sample.
        UserError: the file cannot be written.
    """
    save_figure(captions_figure(samples), path)


def captions_figure(samples: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure that `plot_captions` writes: one axes per sample, with its text below."""
    if not samples:
        raise ValueError("a gallery needs at least one sample")
    samples = samples[:MAX_SAMPLES]
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3, 9: 3}.get(len(samples), 4)
    rows = -(-len(samples) // columns)
    width, photo, text, gap, margin = 3.4, 2.5, 1.95, 0.3, 0.35
    figure = new_figure(
        2 * margin + columns * width + (columns - 1) * gap, 2 * margin + rows * (photo + text) + (rows - 1) * gap
    )
    for number, sample in enumerate(samples):
        row, column = divmod(number, columns)
        left, top = margin + column * (width + gap), margin + row * (photo + text + gap)
        axes = place_axes(figure, left, top, width, photo, label="sample")
        axes.set_anchor("SW")  # so that photos of any aspect share their captions' left edge and stand on them
        show_photo(axes, shrunk(sample["image"]))
        top += photo + 0.1
        caption = wrap(sample["caption"] or "(no words)", width, 12.5, lines=4, bold=True)
        place_text(figure, left, top, "\n".join(caption), fontsize=12.5, fontweight="bold", linespacing=1.15)
        top += 0.06 + 0.21 * len(caption)
        references = [wrap("– " + text, width, 9.5, lines=2) for text in sample["references"][:2]]
        lines = [line for reference in references for line in reference]
        lines += wrap(sample["name"], width, 9.5, lines=1)
        place_text(figure, left, top, "\n".join(lines), fontsize=9.5, color=GREY, linespacing=1.25)
    return figure
