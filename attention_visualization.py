"""Attention pictures: where a decoder looked while it said each word of a caption.

Everything here takes a photo, words and weights; nothing knows of models or runs. The weights of a word
are numbers that sum to one, the rows of a square grid (7x7 for the encoders that are there) laid over the whole
photo one after the other. The encoders look at the photo squashed to a square, so a map belongs on it stretched
to its full size. The weights of a word are of the step that predicts it: where the decoder looked to find it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from captioning.io import write_json
from captioning.plots import (
    BLUE,
    DPI,
    GREY,
    ORANGE,
    new_figure,
    place_axes,
    place_text,
    save_figure,
    show_photo,
    shrunk,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
from captioning.images import check_weights, grid_side, peak

FORMATS = ("png", "svg", "pdf")
CROPS = 6  # at most, of the strongest regions
CROP_CELLS = 3  # along each side of one that is cut out of a square photo

# All in inches. The largest page has 1620 x 2280 pixels; a larger one is taken only if panels would get too small.
PAGE_WIDTH, MARGIN, GAP = 13.5, 0.35, 0.16
PAGE_HEIGHTS, ADVANCED_PAGE_HEIGHTS = (9.0, 12.0, 15.5, 19.0), (11.5, 13.0, 15.5, 19.0)
SMALLEST_PANEL = 1.4
HEADING = 0.34  # what a panel's heading needs above it
SECTION = 0.34  # a line above a part of the advanced picture
FOOTER = 1.15  # the colour bar and the line that explains it


def upsample(weights: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch one word's weights smoothly over a picture.

    Args:
        weights: (cells,) or (side, side).

    Returns:
        (height, width) floats between the smallest and the largest weight; the middle of a cell's part
        of the picture has that cell's weight.

    Raises:
        ValueError: another shape, or an empty picture.
    """
    grid = np.asarray(weights, dtype=np.float32)
    side = grid_side(grid.size)
    if grid.shape not in ((grid.size,), (side, side)):
        raise ValueError(f"attention weights of one word are a square grid, e.g. (49,) or (7, 7), not {grid.shape}")
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {width} x {height} pixels has no room for a map")
    grid = np.ascontiguousarray(grid.reshape(side, side))
    smooth = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    return smooth.clip(grid.min(), grid.max())  # cubic curves overshoot, below zero too


def entropy(weights: np.ndarray) -> np.ndarray:
    """How widely each word looks: (words, cells) weights -> (words,) bits, 0 (one cell) to log2(cells) (all alike).

    Low entropy: the decoder knows where it looks. Of 49 cells the most is 5.61 bits.

    Raises:
        ValueError: no weights, or not one distribution per word.
    """
    rows = check_weights(weights)
    logarithms = np.log2(rows, where=rows > 0, out=np.zeros_like(rows))
    return np.abs((rows * logarithms).sum(1))


def strongest_regions(weights: np.ndarray, most: int = CROPS) -> list[tuple[int, int]]:
    """What was looked at hardest: up to `most` (word, cell) in falling order of weight, of (words, cells) weights.

    Two cells that touch are one region, and no word has two. A cell counts from twice the weight on that all cells
    alike would have; the strongest of all is always there.
    """
    rows = check_weights(weights)
    side = grid_side(rows.shape[1])
    found: list[tuple[int, int]] = []
    for place in np.argsort(-rows, axis=None, kind="stable"):
        word, cell = divmod(int(place), rows.shape[1])
        if len(found) == most or (found and rows[word, cell] < 2 / rows.shape[1]):
            break
        y, x = divmod(cell, side)
        if all(
            word != other_word and max(abs(y - other // side), abs(x - other % side)) > 1 for other_word, other in found
        ):
            found.append((word, cell))
    return found


def attention_numbers(name: str, words: Sequence[str], weights: np.ndarray) -> dict[str, Any]:
    """What the pictures are drawn from, for `attention_viz_sample_N.json`.

    Args:
        name: the image's.
        weights: (words, cells).

    Raises:
        ValueError: words and weights do not fit, or a row is no distribution.
    """
    rows = check_weights(weights, len(words))
    side = grid_side(rows.shape[1])
    return {
        "image": name,
        "words": list(words),
        "grid": side,  # cells along each side of the photo
        "maps": rows.reshape(-1, side, side).round(6).tolist(),  # word, row from the top, column from the left
        "peaks": peak(rows).round(4).tolist(),  # x, y as fractions of the photo's width and height
        "entropies": entropy(rows).round(4).tolist(),  # bits
        "max_entropy": round(math.log2(side * side), 4),
    }


# --------------------------------------------------------------------------------------------------
# The two pictures


def save_pictures(
    directory: Path, number: int, image: Image.Image, name: str, words: Sequence[str], weights: np.ndarray,
    advanced: bool = False, form: str = "png", dpi: int = DPI,
) -> None:  # fmt: skip
    """Write `attention_viz_sample_N`, with `advanced` also `advanced_attention_viz_sample_N`, and N's numbers as JSON.

    Args:
        number: N.
        image: the photo, of any size and aspect.
        name: the photo's, which stands under the caption.
        words: the caption, at least one word.
        weights: (words, cells), each row a distribution.
        form: one of `FORMATS`, which is also the files' extension.
        dpi: dots per inch of a png, and of the photos inside of an svg or pdf.

    Raises:
        ValueError: words and weights do not fit, or a row is no distribution.
        UserError: a file cannot be written.
    """
    figure = attention_figure(image, words, weights, name, dpi)
    save_figure(figure, directory / f"attention_viz_sample_{number}.{form}")
    if advanced:
        figure = advanced_attention_figure(image, words, weights, name, dpi)
        save_figure(figure, directory / f"advanced_attention_viz_sample_{number}.{form}")
    write_json(directory / f"attention_viz_sample_{number}.json", attention_numbers(name, words, weights))


def attention_figure(
    image: Image.Image, words: Sequence[str], weights: np.ndarray, title: str | None = None, dpi: int = DPI
) -> Figure:
    """The basic picture: the photo, then one map per word. Its axes are labelled `photo`, `word` (each) and `scale`.

    Args and errors as in `save_pictures`; title: a line under the caption.
    """
    rows = check_weights(weights, len(words))
    grid = _fit_grid(len(words) + 1, _panel_aspect(image), [page - 1.2 - FOOTER for page in PAGE_HEIGHTS], largest=4.5)
    page_width = max(grid.columns * (grid.width + GAP) - GAP + 2 * MARGIN, 6.5)
    caption, header = _header(words, title, page_width)
    figure = new_figure(page_width, header + grid.total_height + FOOTER, dpi)
    _draw_header(figure, caption, title)
    photo = _fitted(image, dpi)
    axes = _photo_axes(figure, grid.place(0, header), "photo", photo)
    _heading(axes, "photo", _heading_size(["photo"], grid.width), style="italic")
    _draw_words(figure, grid, header, 1, _dimmed(photo), words, rows)
    _draw_scale(figure, rows.shape[1])
    return figure


def advanced_attention_figure(
    image: Image.Image, words: Sequence[str], weights: np.ndarray, title: str | None = None, dpi: int = DPI
) -> Figure:
    """The advanced picture: the path of the peak, the mean map, entropy per word, the strongest regions, all maps.

    Its axes are labelled `path`, `mean`, `entropy`, `crop` (each), `word` (each) and `scale`.
    """
    rows = check_weights(weights, len(words))
    aspect = _panel_aspect(image)
    caption, header = _header(words, title, PAGE_WIDTH)
    photo_width = min(3.95, 4.6 * aspect)
    photo_height = photo_width / aspect
    axis_height = 0.7  # below the bars
    bars_height = min(8.0, max(photo_height - axis_height, 0.19 * len(words)))
    overview = HEADING + max(photo_height + 0.3, bars_height + axis_height) + 0.15
    crop_width = (PAGE_WIDTH - 2 * MARGIN + GAP) / CROPS - GAP
    crops = _Grid(CROPS, 1, crop_width, crop_width)
    above = header + overview + SECTION + crops.total_height + SECTION
    grid = _fit_grid(len(words), aspect, [page - above - FOOTER for page in ADVANCED_PAGE_HEIGHTS], largest=3.2)
    figure = new_figure(PAGE_WIDTH, above + grid.total_height + FOOTER, dpi)
    _draw_header(figure, caption, title)

    photo = _fitted(image, dpi)
    dimmed, left, top = _dimmed(photo), MARGIN, header + HEADING
    axes = _photo_axes(figure, (left, top, photo_width, photo_height), "path", dimmed)
    _draw_path(figure, axes, dimmed, rows)
    left += photo_width + 2 * GAP
    axes = _photo_axes(figure, (left, top, photo_width, photo_height), "mean", dimmed)
    _draw_map(axes, dimmed, rows.mean(0))
    _heading(axes, "mean map", _heading_size(["mean map"], photo_width), note=f"{rows.mean(0).max():.0%}")
    left += photo_width + 2 * GAP + 1.35  # the words stand left of their bars
    axes = place_axes(figure, left, top, PAGE_WIDTH - MARGIN - 0.1 - left, bars_height, label="entropy")
    _draw_entropy(axes, words, entropy(rows), rows.shape[1])
    _section(figure, header + overview, "Strongest regions: what was looked at hardest, and for which word")
    _draw_crops(figure, crops, header + overview + SECTION, image, words, rows)
    _section(figure, above - SECTION, "Word by word")
    _draw_words(figure, grid, above, 0, dimmed, words, rows)
    _draw_scale(figure, rows.shape[1])
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


def _section(figure: Figure, top: float, text: str) -> None:
    place_text(figure, MARGIN, top + 0.06, text, fontsize=13, color=GREY, fontweight="bold")


def _heading_size(texts: Sequence[str], room: float) -> float:
    """The font size, the same for all panels, at which the longest of their headings fits into `room` inches."""
    longest = max(len(text) for text in texts)
    return min(14.0, max(8.5, room * 72 / (0.62 * max(longest, 1))))


def _letters(room: float) -> int:
    """How many letters of a heading fit into `room` inches at the smallest size."""
    return int(room * 72 / (0.62 * 8.5))


def _heading(axes: Axes, text: str, size: float, note: str = "", style: str = "normal") -> None:
    """A panel's heading at its upper left, a grey note at its upper right."""
    axes.set_title(text, fontsize=size, loc="left", pad=4, style=style, fontweight="bold", parse_math=False)
    if note:
        axes.set_title(note, fontsize=min(size, 10), loc="right", pad=4, color=GREY)


def _shortened(word: str, letters: int) -> str:
    return word if len(word) <= letters else word[: letters - 1] + "…"


# --------------------------------------------------------------------------------------------------
# Panels


def _fitted(image: Image.Image, dpi: int) -> Image.Image:
    """The photo with as many pixels as its largest panel shows at this resolution, and some more."""
    return shrunk(image, max(900, 900 * dpi // DPI))


def _dimmed(photo: Image.Image) -> Image.Image:
    """The photo half grey and darker, so that a map's colours stand out and the scene stays recognisable."""
    return ImageEnhance.Brightness(ImageEnhance.Color(photo).enhance(0.25)).enhance(0.65)


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
    smooth = upsample(row, 280, 280)  # fine enough to be stretched further
    extent = (0, dimmed.width, dimmed.height, 0)
    axes.imshow(smooth, cmap=colours(), vmin=0, vmax=row.max(), extent=extent, interpolation="bilinear")


def _draw_words(
    figure: Figure, grid: _Grid, top: float, first: int, dimmed: Image.Image, words: Sequence[str], rows: np.ndarray
) -> None:
    """One map per word, from panel `first` of the grid on."""
    room = grid.width - 0.48  # beside the percentage
    headings = [_shortened(f"{number} {word}", _letters(room)) for number, word in enumerate(words, start=1)]
    size = _heading_size(headings, room)
    for number, (heading, row) in enumerate(zip(headings, rows, strict=True), start=first):
        axes = _photo_axes(figure, grid.place(number, top), "word", dimmed)
        _draw_map(axes, dimmed, row)
        _heading(axes, heading, size, note=f"{row.max():.0%}")


def _draw_crops(
    figure: Figure, grid: _Grid, top: float, image: Image.Image, words: Sequence[str], rows: np.ndarray
) -> None:
    """The strongest regions cut out of the photo as squares, each with a frame around its cell."""
    from matplotlib.patches import Rectangle

    side = grid_side(rows.shape[1])
    cell_width, cell_height = image.width / side, image.height / side
    length = round(min(CROP_CELLS * math.sqrt(cell_width * cell_height), image.width, image.height))
    chosen = strongest_regions(rows)
    room = grid.width - 0.48  # beside the percentage
    headings = [_shortened(f"{word + 1} {words[word]}", _letters(room)) for word, _ in chosen]
    size = _heading_size(headings, room)
    for number, (heading, (word, cell)) in enumerate(zip(headings, chosen, strict=True)):
        row, column = divmod(cell, side)
        left = round(min(max((column + 0.5) * cell_width - length / 2, 0), image.width - length))
        upper = round(min(max((row + 0.5) * cell_height - length / 2, 0), image.height - length))
        cut = image.crop((left, upper, left + length, upper + length)).convert("RGB")
        axes = _photo_axes(figure, grid.place(number, top), "crop", cut)
        corner = (column * cell_width - left, row * cell_height - upper)
        for color, width in (("black", 3.4), ("white", 1.6)):  # to be seen on light and dark
            axes.add_patch(Rectangle(corner, cell_width, cell_height, fill=False, edgecolor=color, linewidth=width))
        axes.set_xlim(0, length)  # a cell of a very long photo may be wider than its crop
        axes.set_ylim(length, 0)
        _heading(axes, heading, size, note=f"{rows[word, cell]:.0%}")


def _draw_scale(figure: Figure, cells: int) -> None:
    """The one colour bar at the foot of the picture, and how to read it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, height = figure.get_size_inches()
    axes = place_axes(figure, MARGIN, height - 0.74, 2.6, 0.2, label="scale")
    axes.set_facecolor("#555555")  # stands for the dimmed photo behind the map
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours()), cax=axes, orientation="horizontal")
    bar.set_ticks([0, 0.5, 1], labels=["0", "half", "peak"], fontsize=11)
    axes.set_title("attention weight", fontsize=11, loc="left", pad=4)
    text = (
        f"Each map has its own scale, from 0 to its peak: the weight of its strongest of {cells} cells, in percent. "
        "It shows where the decoder looked to find the word."
    )
    lines = wrap(text, width - 2 * MARGIN - 3.0, 11, lines=4)
    place_text(figure, MARGIN + 3.0, height - 0.72 - 0.08 * (len(lines) - 1), "\n".join(lines), fontsize=11, color=GREY)


def _draw_path(figure: Figure, axes: Axes, dimmed: Image.Image, rows: np.ndarray) -> None:
    """The strongest cell of each word, numbered, with an arrow wherever the gaze moves to another cell."""
    from matplotlib.patches import FancyArrowPatch

    width = axes.get_window_extent().width / figure.dpi
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
            x, y, "\n".join(wrap(_ranges(numbers), width / grid_side(rows.shape[1]), 8.5, lines=2)), fontsize=8.5, fontweight="bold",
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


def _draw_entropy(axes: Axes, words: Sequence[str], bits: np.ndarray, cells: int) -> None:
    """How widely each word looks, as bars from the first word down."""
    places, most = range(len(words)), math.log2(cells)
    axes.barh(places, bits, height=0.72, color="#56B4E9")
    for place, value in zip(places, bits.tolist(), strict=True):
        axes.text(value - 0.08 if value > 1 else value + 0.08, place, f"{value:.1f}", fontsize=10,
                  ha="right" if value > 1 else "left", va="center")  # fmt: skip
    axes.axvline(most, color=ORANGE, linestyle="--", linewidth=1.8)
    axes.set_title("entropy per word", fontsize=14, fontweight="bold", loc="left", pad=4)
    axes.set_title(f"max {most:.2f}", fontsize=10, color=ORANGE, loc="right", pad=4)
    axes.set_xlim(0, 1.07 * most or 1)  # a single cell has no entropy
    axes.set_ylim(len(words) - 0.5, -0.5)
    labels = [_shortened(f"{number} {word}", 15) for number, word in enumerate(words, start=1)]
    axes.set_yticks(places, labels, fontsize=10.5, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"bits; few: it knows where it looks\n(0: one cell; dashed: all {cells} alike)", fontsize=10.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
