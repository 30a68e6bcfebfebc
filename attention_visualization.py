"""Attention pictures: where a decoder attended while it predicted each word of a caption.

The functions take a photo, words and weights, and know nothing about models; the last two caption a data set's images
first. A word's weights sum to one and form a square grid (7x7 of most encoders), row by row, over the whole photo.
Encoders see the photo squashed to a square, so a map is stretched to the photo's full size. A word's weights are those
of the step that predicts it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from captioning.data.images import (
    ImageSource,
    UnreadableImage,
    check_weights,
    entropy,
    grid_side,
    open_image,
    peak,
    upsample,
)
from captioning.io import log, printable, write_json
from captioning.runs import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from captioning.config.settings import Settings
    from captioning.training.caption_set import DecodingContext

ABOVE_CHANCE = 4  # a region is strong if its cell has this many times the weight of an even distribution
CROPS, CROP_CELLS = 4, 3  # strongest regions at most, and cells along the side of one in a square photo

# All in inches.
PAGE_WIDTH, MARGIN, GAP, LARGEST_PANEL = 13.5, 0.35, 0.16, 4.5
HEADING, SECTION, FOOTER = 0.34, 0.34, 1.15  # above a panel, above the regions, below all for the colour bar


def strongest_regions(weights: np.ndarray, most: int = CROPS) -> list[tuple[int, int]]:
    """The regions with the most attention: up to `most` (word, cell) in falling order of weight.

    A cell counts from `ABOVE_CHANCE` times 1/cells on; there may be none. No two cells touch, and no word has two.

    Args:
        weights: (words, cells), each row a distribution.
    """
    rows = check_weights(weights)
    side = grid_side(rows.shape[1])
    found: list[tuple[int, int]] = []
    for place in np.argsort(-rows, axis=None, kind="stable"):
        word, cell = divmod(int(place), rows.shape[1])
        if len(found) == most or rows[word, cell] < ABOVE_CHANCE / rows.shape[1]:
            break
        y, x = divmod(cell, side)
        if all(word != other and max(abs(y - at // side), abs(x - at % side)) > 1 for other, at in found):
            found.append((word, cell))
    return found


def attention_numbers(name: str, words: Sequence[str], weights: np.ndarray) -> dict[str, Any]:
    """The content of `attention_viz_sample_N.json`: the numbers behind the pictures.

    Args:
        name: the image's.
        weights: (words, cells).

    Raises:
        ValueError: words and weights differ in number, or a row is not a distribution.
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
    directory: Path, number: int, source: ImageSource, name: str, words: Sequence[str], weights: np.ndarray | None,
    settings: Settings,
) -> bool:  # fmt: skip
    """Write `attention_viz_sample_N`, with the flag also `advanced_attention_viz_sample_N`, and N's numbers as JSON.

    Args:
        number: N.
        source: the photo, of any size and aspect.
        name: the photo's, which stands under the caption.
        words: the caption.
        weights: (words, cells), each row a distribution; None of an empty caption.
        settings: whose flags of attention pictures are read.

    Returns:
        whether there was something to draw; else a warning says why not.

    Raises:
        ValueError: words and weights differ in number, or a row is not a distribution.
        UserError: a file cannot be written.
    """
    if not words or weights is None:
        log.warning(f"No attention picture of {name}: its caption is empty")
        return False
    form, dpi = settings.attention_viz_format, settings.attention_viz_dpi
    try:
        photo = open_image(source, at_least=largest_panel(dpi))
    except UnreadableImage as problem:  # it could be read when its features were made
        log.warning(f"No attention picture: {printable(str(problem))}")
        return False
    figure = attention_figure(photo, words, weights, name, dpi)
    plots.save_figure(figure, directory / f"attention_viz_sample_{number}.{form}")
    if settings.advanced_attention_viz:
        figure = advanced_attention_figure(photo, words, weights, name, dpi)
        plots.save_figure(figure, directory / f"advanced_attention_viz_sample_{number}.{form}")
    write_json(directory / f"attention_viz_sample_{number}.json", attention_numbers(name, words, weights))
    return True


def attention_figure(
    image: Image.Image, words: Sequence[str], weights: np.ndarray, title: str | None = None, dpi: int = plots.DPI
) -> Figure:
    """The basic picture: the photo, then one map per word. Its axes are labelled `photo`, `word` (each) and `scale`.

    Args and errors as in `save_pictures`; title: a line under the caption.
    """
    rows = check_weights(weights, len(words))
    aspect = _panel_aspect(image)
    columns, width = _fit_grid(len(words) + 1, aspect)
    lines, height = -(-(len(words) + 1) // columns), width / aspect
    page = max(columns * (width + GAP) - GAP + 2 * MARGIN, 6.5)
    figure, top = _new_page(page, lines * (HEADING + height + GAP), words, title, rows.shape[1], dpi)
    photo = plots.shrunk(image, largest_panel(dpi))
    dimmed = dim(photo)
    first, *panels = _grid(figure, top, len(words) + 1, columns, width, height, "word")
    first.set_label("photo")
    _show(first, photo)
    _set_headings([first], ["photo"], style="italic")
    for axes, row in zip(panels, rows, strict=True):
        _draw_map(axes, dimmed, row)
    _set_headings(panels, [f"{number} {word}" for number, word in enumerate(words, 1)], rows.max(1).tolist())
    return figure


def advanced_attention_figure(
    image: Image.Image, words: Sequence[str], weights: np.ndarray, title: str | None = None, dpi: int = plots.DPI
) -> Figure:
    """The advanced picture: the path of the peak, the mean map, the entropy per word, the strongest regions.

    Its axes are labelled `path`, `mean`, `entropy`, `crop` (each) and `scale`. Args and errors as in `attention_figure`.
    """
    rows = check_weights(weights, len(words))
    cells, chosen = rows.shape[1], strongest_regions(rows)
    width = min(3.95, 4.6 * _panel_aspect(image))
    height = width / _panel_aspect(image)
    crop = (2 * width + 3 * GAP) / CROPS - GAP
    regions = HEADING + height + 0.4  # where the part below the photos begins
    left_height = regions + SECTION + (HEADING + crop + GAP if chosen else 0)
    axis, bars_height = 0.75, min(0.2 * len(words), 12.0)  # below the bars, and the least for them
    figure, top = _new_page(PAGE_WIDTH, max(left_height, HEADING + bars_height + axis), words, title, cells, dpi)

    dimmed = dim(plots.shrunk(image, largest_panel(dpi)))
    path, mean = (
        plots.place_axes(figure, left, top + HEADING, width, height, label)
        for left, label in ((MARGIN, "path"), (MARGIN + width + 2 * GAP, "mean"))
    )
    _draw_path(path, dimmed, rows)
    _draw_map(mean, dimmed, rows.mean(0))
    _set_headings([path], ["path of the peak"])
    _set_headings([mean], ["mean map"], [rows.mean(0).max()])

    share = f"{ABOVE_CHANCE} times the even share ({ABOVE_CHANCE / cells:.1%})"
    note = f"Strongest regions: at least {share}" if chosen else f"No strong region: no cell has {share}"
    plots.place_text(figure, MARGIN, top + regions + 0.06, note, fontsize=13, color=plots.GREY, fontweight="bold")
    panels = _grid(figure, top + regions + SECTION, len(chosen), CROPS, crop, crop, "crop")
    for axes, (_, cell) in zip(panels, chosen, strict=True):
        _draw_crop(axes, image, cell, grid_side(cells))
    _set_headings(panels, [f"{word + 1} {words[word]}" for word, _ in chosen], [rows[place] for place in chosen])

    left = MARGIN + 2 * width + 4 * GAP + 1.4  # the words stand left of their bars
    bars_height = max(bars_height, min(left_height - HEADING - axis, 0.4 * len(words)))
    bars = plots.place_axes(figure, left, top + HEADING, PAGE_WIDTH - MARGIN - 0.1 - left, bars_height, label="entropy")
    _draw_entropy(bars, words, entropy(rows), cells)
    return figure


# --------------------------------------------------------------------------------------------------
# Layout


def _panel_aspect(image: Image.Image) -> float:
    """Width by height of the panels; a very long or tall photo is drawn smaller inside its panel."""
    return min(max(image.width / image.height, 0.5), 2.5)


def _fit_grid(panels: int, aspect: float) -> tuple[int, float]:
    """The number of columns on a page that is about as high as it is wide, and the panels' width."""
    columns = min(panels, math.ceil(math.sqrt(1.2 * panels / aspect)))
    width = (PAGE_WIDTH - 2 * MARGIN + GAP) / columns - GAP
    return columns, min(width, LARGEST_PANEL * min(1, aspect))


def _new_page(
    width: float, body: float, words: Sequence[str], title: str | None, cells: int, dpi: int
) -> tuple[Figure, float]:
    """A figure with the caption and title above a body of this size, and the colour bar below it.

    Returns:
        the figure, and where the body begins, in inches from the figure's upper edge.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    room = width - 2 * MARGIN
    caption = plots.wrap(" ".join(words), room, 18, lines=3, bold=True)
    top = 0.25 + 0.32 * len(caption) + (0.3 if title else 0.05)
    height = top + body + FOOTER
    figure = plots.new_figure(width, height, dpi)
    plots.place_text(figure, MARGIN, 0.25, "\n".join(caption), fontsize=18, fontweight="bold", linespacing=1.1)
    if title:
        name = plots.wrap(title, room, 12, lines=1)
        plots.place_text(figure, MARGIN, 0.29 + 0.32 * len(caption), "".join(name), fontsize=12, color=plots.GREY)

    axes = plots.place_axes(figure, MARGIN, height - 0.74, 2.6, 0.2, label="scale")
    axes.set_facecolor("#666666")  # stands for the dimmed photo behind the map
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), ListedColormap(colours())), cax=axes, orientation="horizontal"
    )
    bar.set_ticks([0, 0.5, 1], labels=["0", "half", "peak"], fontsize=11)
    axes.set_title("attention weight", fontsize=11, loc="left", pad=4)
    text = (
        f"Each map has its own scale, from 0 to its peak: the weight of its strongest of {cells} cells, in percent. "
        "It shows where the decoder attended to predict the word."
    )
    lines = plots.wrap(text, room - 3.0, 11, lines=4)
    plots.place_text(
        figure, MARGIN + 3.0, height - 0.72 - 0.08 * (len(lines) - 1), "\n".join(lines), fontsize=11, color=plots.GREY
    )
    return figure, top


def _grid(figure: Figure, top: float, panels: int, columns: int, width: float, height: float, label: str) -> list[Axes]:
    """Equal panels line by line from `top` on, each with room for its heading above it."""
    places = (divmod(number, columns) for number in range(panels))
    return [
        plots.place_axes(
            figure, MARGIN + column * (width + GAP), top + HEADING + line * (HEADING + height + GAP), width, height, label
        )
        for line, column in places
    ]  # fmt: skip


def _set_headings(
    panels: Sequence[Axes], texts: Sequence[str], peaks: Sequence[float] | None = None, **style: Any
) -> None:
    """A bold heading at the upper left of each panel, all of one size, and its peak at the upper right."""
    if not panels:
        return
    room = panels[0].get_position().width * panels[0].get_figure().get_size_inches()[0]  # type: ignore[union-attr]
    room -= 0 if peaks is None else 0.48
    size = min(14.0, max(8.5, 14 * room / max(plots.text_width(text, 14, bold=True) for text in texts)))
    for number, (axes, text) in enumerate(zip(panels, texts, strict=True)):
        (line,) = plots.wrap(text, room, size, lines=1, bold=True)
        axes.set_title(line, fontsize=size, loc="left", pad=4, fontweight="bold", parse_math=False, **style)
        if peaks is not None:
            axes.set_title(f"{peaks[number]:.0%}", fontsize=min(size, 10), loc="right", pad=4, color=plots.GREY)


# --------------------------------------------------------------------------------------------------
# Panels


def largest_panel(dpi: int) -> int:
    """Return the pixels that a side of the largest panel has at this resolution, and some more."""
    return max(900, 900 * dpi // plots.DPI)


def dim(photo: Image.Image) -> Image.Image:
    """The photo nearly grey and in middle tones, so that a map's colours stand out on dark and light photos alike.

    The luminance is stretched to the full range, brought to a median of one half by a gamma curve, and compressed
    to what stays visible below the map; a quarter of the colour is kept.
    """
    pixels = np.asarray(photo.convert("RGB"), dtype=np.float32) / 255
    luminance = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    low, high = np.percentile(luminance, [1, 99])
    spread = max(high - low, 0.25)  # noise in an even photo stays small
    even = ((luminance - (low + high - spread) / 2) / spread).clip(0, 1)
    gamma = np.log(0.5) / np.log(np.median(even).clip(0.05, 0.95))
    tones = 0.18 + 0.44 * even ** gamma.clip(0.4, 2.5)
    mixed = tones[..., None] + 0.25 * (pixels - luminance[..., None])
    return Image.fromarray((255 * mixed.clip(0, 1)).astype(np.uint8))


# Red, green and blue of matplotlib's inferno without its near-black end, at equal steps.
INFERNO = (
    (87, 16, 110), (117, 27, 110), (147, 38, 103), (177, 50, 90), (204, 66, 72), (228, 90, 49), (243, 120, 25),
    (251, 153, 6), (251, 190, 35), (243, 229, 93), (252, 255, 164),
)  # fmt: skip


def colours() -> np.ndarray:
    """Return the colours (256, 4) of weights, 0 .. 1 each: the more opaque the larger, and none shows the bare photo."""
    share = np.linspace(0, 1, 256)
    steps = np.linspace(0, 1, len(INFERNO))
    channels = [np.interp(share, steps, channel) / 255 for channel in np.transpose(INFERNO)]
    return np.stack([*channels, 0.75 * share**0.7], 1)


def _show(axes: Axes, photo: Image.Image) -> None:
    plots.show_photo(axes, photo)
    axes.set_adjustable("datalim")  # a photo narrower than its panel leaves the panel, and so the heading, its width


def _draw_map(axes: Axes, dimmed: Image.Image, row: np.ndarray) -> None:
    _show(axes, dimmed)
    from matplotlib.colors import ListedColormap

    smooth = upsample(row, 280, 280)  # fine enough to be stretched further
    extent = (0, dimmed.width, dimmed.height, 0)
    axes.imshow(smooth, cmap=ListedColormap(colours()), vmin=0, vmax=row.max(), extent=extent, interpolation="bilinear")


def _draw_crop(axes: Axes, image: Image.Image, cell: int, side: int) -> None:
    """A square cut out of the photo around a cell, which gets a frame."""
    from matplotlib.patches import Rectangle

    row, column = divmod(cell, side)
    width, height = image.width / side, image.height / side
    length = round(min(CROP_CELLS * math.sqrt(width * height), image.width, image.height))
    left = round(min(max((column + 0.5) * width - length / 2, 0), image.width - length))
    upper = round(min(max((row + 0.5) * height - length / 2, 0), image.height - length))
    _show(axes, image.crop((left, upper, left + length, upper + length)).convert("RGB"))
    corner = (column * width - left, row * height - upper)
    for color, line in (("black", 3.4), ("white", 1.6)):  # to be seen on light and dark
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=line))
    axes.set_xlim(0, length)  # a cell of a very long photo may be wider than its crop
    axes.set_ylim(length, 0)


def _draw_path(axes: Axes, dimmed: Image.Image, rows: np.ndarray) -> None:
    """The strongest cell of each word, numbered, with an arrow wherever the peak moves to another cell."""
    from matplotlib.patches import FancyArrowPatch

    _show(axes, dimmed)
    cell = axes.get_window_extent().width / axes.get_figure().dpi / grid_side(rows.shape[1])  # type: ignore[union-attr]
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
        axes.text(
            x, y, "\n".join(plots.wrap(", ".join(map(str, numbers)), cell, 8.5, lines=2)), fontsize=8.5, fontweight="bold",
            ha="center", va="center", linespacing=1.0, zorder=4,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "black", "linewidth": 1.2},
        )  # fmt: skip


def _draw_entropy(axes: Axes, words: Sequence[str], bits: np.ndarray, cells: int) -> None:
    """The entropy of each word's attention, as bars from the first word down."""
    places, most = range(len(words)), math.log2(cells)
    size = min(10.5, 60 * axes.get_window_extent().height / axes.get_figure().dpi / len(words))  # type: ignore[union-attr]
    axes.barh(places, bits, height=0.72, color="#56B4E9")
    for place, value in zip(places, bits.tolist(), strict=True):
        axes.text(value - 0.08 if value > 1 else value + 0.08, place, f"{value:.1f}", fontsize=size,
                  ha="right" if value > 1 else "left", va="center")  # fmt: skip
    axes.axvline(most, color=plots.ORANGE, linestyle="--", linewidth=1.8)
    axes.set_title("entropy per word", fontsize=14, fontweight="bold", loc="left", pad=4)
    axes.set_title(f"max {most:.2f}", fontsize=10, color=plots.ORANGE, loc="right", pad=4)
    axes.set_xlim(0, 1.07 * most or 1)  # a single cell has no entropy
    axes.set_ylim(len(words) - 0.5, -0.5)
    labels = [plots.wrap(f"{number} {word}", 1.4, size, lines=1)[0] for number, word in enumerate(words, start=1)]
    axes.set_yticks(places, labels, fontsize=size, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"bits (0: all weight on one cell;\ndashed: the same weight on all {cells})", fontsize=10.5)
    axes.spines[["top", "right", "left"]].set_visible(False)


# --------------------------------------------------------------------------------------------------
# Pictures of a data set's images


def save_attention_pictures(context: DecodingContext, images: np.ndarray, directory: Path) -> None:
    """Draw `attention_viz_sample_N` (and the advanced ones) of images, N from 1, with their numbers as JSON."""
    from captioning import distributed
    from captioning.training.caption_set import caption

    settings, data = context.settings, context.data
    unreadable = [image for _, features in context.members for image in features.unreadable]
    images = images[~np.isin(images, unreadable)]
    hypotheses = caption(context, images, settings.beam_size, attention=True)
    if not distributed.is_first():
        return
    drawn = 0
    for n, (image, found) in enumerate(zip(images, hypotheses, strict=True), 1):
        words, name = context.vocabulary.decode(found.ids), data.names[image]
        drawn += save_pictures(directory, n, data.image_dir / name, name, words, found.attention, settings)
    if drawn:
        log.info(f"Attention pictures of {drawn} images: {directory / 'attention_viz_sample_*'}")


def epoch_figures(context: DecodingContext) -> dict[str, Figure]:
    """Return the figures of an epoch for TensorBoard: captions of four validation images, attention of the first.

    Of several processes each captions its shard; all must come here.
    """
    from captioning.training.caption_set import caption

    data = context.data
    images = np.random.default_rng(context.settings.seed).permutation(data.splits["val"])[:4]
    samples, figures = [], {}
    for image, found in zip(images, caption(context, images, 1, attention=True), strict=True):
        name, words = data.names[image], context.vocabulary.decode(found.ids)
        try:
            picture = open_image(data.image_dir / name, at_least=400)
        except UnreadableImage:
            continue
        references = data.references(image)
        samples.append({"image": picture, "name": name, "caption": " ".join(words), "references": references})
        if "attention" not in figures and found.attention is not None and words:
            figures["attention"] = attention_figure(picture, words, found.attention, name)
    return ({"captions": plots.captions_figure(samples)} if samples else {}) | figures
