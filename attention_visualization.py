"""Attention pictures: where a decoder looked while it said each word of a caption.

Everything here takes a photo, words and weights; nothing knows of models or runs. The weights of a word
are 49 numbers that sum to one, the rows of a 7x7 grid laid over the whole photo one after the other.
The encoders look at the photo squashed to a square, so a map belongs on it stretched to its full size.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from plots import BLUE, DPI, GREY, ORANGE, new_figure, place_axes, place_text, save_figure, show_photo, shrunk, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

GRID = 7
CELLS = GRID * GRID
MAX_ENTROPY = math.log2(CELLS)  # bits, of a decoder that looks everywhere alike

# All in inches. The largest page has 1620 x 2280 pixels; a larger one is taken only if panels would get too small.
PAGE_WIDTH, MARGIN, GAP = 13.5, 0.35, 0.16
PAGE_HEIGHTS, ADVANCED_PAGE_HEIGHTS = (9.0, 12.0, 15.5, 19.0), (11.5, 13.0, 15.5, 19.0)
SMALLEST_PANEL = 1.4
HEADING = 0.34  # what a panel's heading needs above it
FOOTER = 1.15  # the colour bar and the line that explains it


# --------------------------------------------------------------------------------------------------
# Numbers


def upsample(weights: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch one word's weights smoothly over a picture.

    Args:
        weights: (49,) or (7, 7).

    Returns:
        (height, width) floats between the smallest and the largest weight; the middle of a cell's part
        of the picture has that cell's weight.

    Raises:
        ValueError: another shape, or an empty picture.
    """
    grid = np.asarray(weights, dtype=np.float32)
    if grid.shape not in ((CELLS,), (GRID, GRID)):
        raise ValueError(f"attention weights of one word have the shape (49,) or (7, 7), not {grid.shape}")
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {width} x {height} pixels has no room for a map")
    grid = np.ascontiguousarray(grid.reshape(GRID, GRID))
    smooth = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    return smooth.clip(grid.min(), grid.max())  # cubic curves overshoot, below zero too


def entropy(weights: np.ndarray) -> np.ndarray:
    """How widely each word looks: (words, 49) weights -> (words,) bits, 0 (one cell) to log2(49) = 5.61 (all alike).

    Raises:
        ValueError: no weights, or not one distribution per word.
    """
    rows = _check(weights)
    logarithms = np.log2(rows, where=rows > 0, out=np.zeros_like(rows))
    return np.abs((rows * logarithms).sum(1))


def peak(weights: np.ndarray) -> np.ndarray:
    """Where each word looks most: (words, 49) weights -> (words, 2), the middle of the strongest cell.

    x and y are fractions of the picture's width and height, from its upper left corner.

    Raises:
        ValueError: no weights, or not one distribution per word.
    """
    row, column = np.divmod(_check(weights).argmax(1), GRID)
    return (np.stack([column, row], axis=1) + 0.5) / GRID


def _check(weights: np.ndarray, words: int | None = None) -> np.ndarray:
    """The weights as float64, of which each row is a distribution over the 49 cells."""
    rows = np.asarray(weights, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != CELLS or len(rows) == 0:
        raise ValueError(f"attention weights have the shape (words, 49) with at least one word, not {rows.shape}")
    if words is not None and len(rows) != words:
        raise ValueError(f"{words} words, but attention weights for {len(rows)}")
    if not (np.isfinite(rows).all() and (rows >= 0).all() and (np.abs(rows.sum(1) - 1) <= 1e-3).all()):
        raise ValueError("the attention weights of each word must be nonnegative and sum to one (within 0.001)")
    return rows


# --------------------------------------------------------------------------------------------------
# The two pictures


def draw_attention(
    image: Image.Image,
    words: Sequence[str],
    weights: np.ndarray,
    path: str | os.PathLike[str],
    title: str | None = None,
) -> None:
    """Write the basic picture as PNG: the photo, then one map per word.

    Args:
        image: the photo, of any size and aspect.
        words: the caption, at least one word.
        weights: (words, 49), each row a distribution.
        title: a line under the caption, e.g. the photo's file name.

    Raises:
        ValueError: words and weights do not fit, or a row is no distribution.
        UserError: the file cannot be written.
    """
    save_figure(attention_figure(image, words, weights, title), path)


def draw_attention_advanced(
    image: Image.Image,
    words: Sequence[str],
    weights: np.ndarray,
    path: str | os.PathLike[str],
    title: str | None = None,
) -> None:
    """Write the advanced picture as PNG: the path of the peak, the mean map, entropy per word, one map per word.

    Args and errors as in `draw_attention`.
    """
    save_figure(advanced_attention_figure(image, words, weights, title), path)


def attention_figure(image: Image.Image, words: Sequence[str], weights: np.ndarray, title: str | None = None) -> Figure:
    """The figure that `draw_attention` writes. Its axes are labelled `photo`, `word` (one each) and `scale`."""
    rows = _check(weights, len(words))
    grid = _fit_grid(len(words) + 1, _panel_aspect(image), [page - 1.2 - FOOTER for page in PAGE_HEIGHTS], largest=4.5)
    page_width = max(grid.columns * (grid.width + GAP) - GAP + 2 * MARGIN, 6.5)
    caption, header = _header(words, title, page_width)
    figure = new_figure(page_width, header + grid.total_height + FOOTER)
    _draw_header(figure, caption, title)
    axes = _photo_axes(figure, grid.place(0, header), "photo", shrunk(image))
    _heading(axes, "photo", _heading_size(["photo"], grid.width), style="italic")
    _draw_words(figure, grid, header, 1, _dimmed(image), words, rows)
    _draw_scale(figure)
    return figure


def advanced_attention_figure(
    image: Image.Image, words: Sequence[str], weights: np.ndarray, title: str | None = None
) -> Figure:
    """The figure that `draw_attention_advanced` writes.

    Its axes are labelled `path`, `mean`, `entropy`, `word` (one each) and `scale`.
    """
    rows = _check(weights, len(words))
    aspect = _panel_aspect(image)
    caption, header = _header(words, title, PAGE_WIDTH)
    photo_width = min(3.95, 4.6 * aspect)
    photo_height = photo_width / aspect
    axis_height = 0.7  # below the bars
    bars_height = min(8.0, max(photo_height - axis_height, 0.19 * len(words)))
    overview = HEADING + max(photo_height + 0.3, bars_height + axis_height) + 0.15
    room = [page - header - overview - FOOTER for page in ADVANCED_PAGE_HEIGHTS]
    grid = _fit_grid(len(words), aspect, room, largest=3.2)
    figure = new_figure(PAGE_WIDTH, header + overview + grid.total_height + FOOTER)
    _draw_header(figure, caption, title)

    dimmed, left, top = _dimmed(image), MARGIN, header + HEADING
    axes = _photo_axes(figure, (left, top, photo_width, photo_height), "path", dimmed)
    _draw_path(axes, dimmed, rows)
    left += photo_width + 2 * GAP
    axes = _photo_axes(figure, (left, top, photo_width, photo_height), "mean", dimmed)
    _draw_map(axes, dimmed, rows.mean(0))
    _heading(axes, "mean map", _heading_size(["mean map"], photo_width), note=f"{rows.mean(0).max():.0%}")
    left += photo_width + 2 * GAP + 1.35  # the words stand left of their bars
    axes = place_axes(figure, left, top, PAGE_WIDTH - MARGIN - 0.1 - left, bars_height, label="entropy")
    _draw_entropy(axes, words, entropy(rows))
    _draw_words(figure, grid, header + overview, 0, dimmed, words, rows)
    _draw_scale(figure)
    return figure


# --------------------------------------------------------------------------------------------------
# Layout


def _panel_aspect(image: Image.Image) -> float:
    """Width by height of the panels; a very long or tall photo is drawn smaller inside its panel."""
    return min(max(image.width / image.height, 0.5), 2.5)


class _Grid(NamedTuple):
    """Equal panels in lines, each with room for its heading; in inches."""

    columns: int
    lines: int
    width: float
    height: float

    @property
    def total_height(self) -> float:
        return self.lines * (HEADING + self.height + GAP)

    def place(self, number: int, top: float) -> tuple[float, float, float, float]:
        """Left, top, width and height of a panel of the grid that starts at `top`."""
        line, column = divmod(number, self.columns)
        left = MARGIN + column * (self.width + GAP)
        return left, top + HEADING + line * (HEADING + self.height + GAP), self.width, self.height


def _fit_grid(panels: int, aspect: float, heights: Sequence[float], largest: float) -> _Grid:
    """The largest panels for the page's width and the first of `heights` that does not make them too small."""

    def fit(columns: int, room: float) -> _Grid:
        lines = -(-panels // columns)
        from_width = (PAGE_WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
        from_height = (room / lines - HEADING - GAP) * aspect
        width = min(from_width, from_height, largest, largest * aspect)
        return _Grid(columns, lines, width, width / aspect)

    def merit(grid: _Grid) -> tuple[float, int]:
        filled = panels / (grid.lines * grid.columns)
        return grid.width * math.sqrt(filled), grid.columns  # large panels, few of them missing in the last line

    for room in heights:
        best = max((fit(columns, room) for columns in range(1, panels + 1)), key=merit)
        if best.width >= SMALLEST_PANEL:
            break
    return best


def _header(words: Sequence[str], title: str | None, page_width: float) -> tuple[list[str], float]:
    """The caption broken into lines, and the height in inches that it needs with the title."""
    caption = wrap(" ".join(words), page_width - 2 * MARGIN, 18, lines=3, bold=True)
    return caption, 0.25 + 0.32 * len(caption) + (0.3 if title else 0.05)


def _draw_header(figure: Figure, caption: list[str], title: str | None) -> None:
    place_text(figure, MARGIN, 0.25, "\n".join(caption), fontsize=18, fontweight="bold", linespacing=1.1)
    if title:
        line = wrap(title, figure.get_size_inches()[0] - 2 * MARGIN, 12, lines=1)
        place_text(figure, MARGIN, 0.29 + 0.32 * len(caption), "".join(line), fontsize=12, color=GREY)


def _heading_size(texts: Sequence[str], room: float) -> float:
    """The font size, the same for all panels, at which the longest of their headings fits into `room` inches."""
    longest = max(len(text) for text in texts)
    return min(14.0, max(8.5, room * 72 / (0.62 * max(longest, 1))))


def _heading(axes: Axes, text: str, size: float, note: str = "", style: str = "normal") -> None:
    """A panel's heading at its upper left, a grey note at its upper right."""
    axes.set_title(text, fontsize=size, loc="left", pad=4, style=style, fontweight="bold", parse_math=False)
    if note:
        axes.set_title(note, fontsize=min(size, 10), loc="right", pad=4, color=GREY)


def _shortened(word: str, letters: int) -> str:
    return word if len(word) <= letters else word[: letters - 1] + "…"


# --------------------------------------------------------------------------------------------------
# Panels


def _dimmed(image: Image.Image) -> Image.Image:
    """The photo half grey and darker, so that a map's colours stand out and the scene stays recognisable."""
    return ImageEnhance.Brightness(ImageEnhance.Color(shrunk(image)).enhance(0.25)).enhance(0.65)


def colours() -> ListedColormap:
    """Inferno without its near-black end, the more opaque the larger the weight: no weight shows the bare photo."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    share = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps["inferno"](0.25 + 0.75 * share)
    colours[:, 3] = 0.75 * share**0.7
    return ListedColormap(colours, name="attention")


def _photo_axes(figure: Figure, place: tuple[float, float, float, float], label: str, photo: Image.Image) -> Axes:
    axes = place_axes(figure, *place, label=label)
    show_photo(axes, photo)
    axes.set_adjustable("datalim")  # a photo narrower than its panel leaves the panel, and so the heading, its width
    return axes


def _draw_map(axes: Axes, dimmed: Image.Image, row: np.ndarray) -> None:
    smooth = upsample(row, 40 * GRID, 40 * GRID)  # fine enough to be stretched further
    extent = (0, dimmed.width, dimmed.height, 0)
    axes.imshow(smooth, cmap=colours(), vmin=0, vmax=row.max(), extent=extent, interpolation="bilinear")


def _draw_words(
    figure: Figure, grid: _Grid, top: float, first: int, dimmed: Image.Image, words: Sequence[str], rows: np.ndarray
) -> None:
    """One map per word, from panel `first` of the grid on."""
    room = grid.width - 0.48  # beside the percentage
    most = int(room * 72 / (0.62 * 8.5))  # letters that fit at the smallest size
    headings = [_shortened(f"{number} {word}", most) for number, word in enumerate(words, start=1)]
    size = _heading_size(headings, room)
    for number, (heading, row) in enumerate(zip(headings, rows, strict=True), start=first):
        axes = _photo_axes(figure, grid.place(number, top), "word", dimmed)
        _draw_map(axes, dimmed, row)
        _heading(axes, heading, size, note=f"{row.max():.0%}")


def _draw_scale(figure: Figure) -> None:
    """The one colour bar at the foot of the picture, and how to read it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, height = figure.get_size_inches()
    axes = place_axes(figure, MARGIN, height - 0.74, 2.6, 0.2, label="scale")
    axes.set_facecolor("#555555")  # stands for the dimmed photo behind the map
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours()), cax=axes, orientation="horizontal")
    bar.set_ticks([0, 0.5, 1], labels=["0", "half", "peak"], fontsize=11)
    axes.set_title("attention weight", fontsize=11, loc="left", pad=4)
    text = "Each map has its own scale, from 0 to its peak: the weight of its strongest of 49 cells, given in percent."
    lines = wrap(text, width - 2 * MARGIN - 3.0, 11, lines=4)
    place_text(figure, MARGIN + 3.0, height - 0.72 - 0.08 * (len(lines) - 1), "\n".join(lines), fontsize=11, color=GREY)


def _draw_path(axes: Axes, dimmed: Image.Image, rows: np.ndarray) -> None:
    """The strongest cell of each word, numbered, with an arrow wherever the gaze moves to another cell."""
    from matplotlib.patches import FancyArrowPatch

    width = axes.get_window_extent().width / DPI
    _heading(axes, "path of the peak", _heading_size(["path of the peak"], width))
    points = peak(rows) * [dimmed.width, dimmed.height]
    stops: dict[tuple[float, float], list[int]] = {}
    for number, (x, y) in enumerate(points, start=1):
        stops.setdefault((x, y), []).append(number)
    for start, end in itertools.pairwise(points):
        if (start != end).any():
            arrow = FancyArrowPatch(
                tuple(start), tuple(end), arrowstyle="-|>", mutation_scale=15, shrinkA=8, shrinkB=11,
                connectionstyle="arc3,rad=0.18", color="#F0E442", linewidth=1.8, zorder=3,
            )  # fmt: skip
            axes.add_patch(arrow)
    for (x, y), numbers in stops.items():
        first, last = 1 in numbers, len(rows) in numbers
        face = BLUE if first else ORANGE if last else "white"
        edge = ORANGE if last else BLUE if first else "black"
        ink, line_width, layer = ("white", 2.2, 5) if first or last else ("black", 1.2, 4)
        axes.text(
            x, y, "\n".join(wrap(_ranges(numbers), width / GRID, 8.5, lines=2)), fontsize=8.5, fontweight="bold",
            color=ink, ha="center", va="center", linespacing=1.0, zorder=layer,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": face, "edgecolor": edge, "linewidth": line_width},
        )  # fmt: skip
    for x, name, colour in ((0.0, "start", BLUE), (0.75, "end", ORANGE)):
        axes.annotate(f"■ {name}", (0, 0), xycoords="axes fraction", xytext=(72 * x, -5), textcoords="offset points",
                      color=colour, fontsize=11, fontweight="bold", va="top")  # fmt: skip


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> '1–3, 7'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _draw_entropy(axes: Axes, words: Sequence[str], bits: np.ndarray) -> None:
    """How widely each word looks, as bars from the first word down."""
    places = range(len(words))
    axes.barh(places, bits, height=0.72, color="#56B4E9")
    for place, value in zip(places, bits.tolist(), strict=True):
        axes.text(value - 0.08 if value > 1 else value + 0.08, place, f"{value:.1f}", fontsize=10,
                  ha="right" if value > 1 else "left", va="center")  # fmt: skip
    axes.axvline(MAX_ENTROPY, color=ORANGE, linestyle="--", linewidth=1.8)
    axes.set_title("entropy per word", fontsize=14, fontweight="bold", loc="left", pad=4)
    axes.set_title(f"max {MAX_ENTROPY:.2f}", fontsize=10, color=ORANGE, loc="right", pad=4)
    axes.set_xlim(0, 6)
    axes.set_ylim(len(words) - 0.5, -0.5)
    labels = [_shortened(f"{number} {word}", 15) for number, word in enumerate(words, start=1)]
    axes.set_yticks(places, labels, fontsize=10.5, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("bits (0: a single cell; dashed: log2(49),\nall cells alike)", fontsize=10.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
