"""Opening images, the views given to the encoders, and the geometry of the encoders' square grids."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from captioning.io import install_command

IMAGE_ENDINGS = {
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".heic", ".heif",
}  # fmt: skip
# Pillow goes by the content, not by the ending, and would hand PostScript called .jpg to Ghostscript.
IMAGE_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
if importlib.util.find_spec("PIL.AvifImagePlugin") and features.check("avif"):
    IMAGE_FORMATS += ("AVIF",)
with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
    IMAGE_FORMATS += ("HEIF",)
# The brand of a file, bytes 8 to 12, after "ftyp".
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")


# --------------------------------------------------------------------------------------------------
# Grids


def grid_side(cells: int) -> int:
    """Return the cells along each side of a square grid: 49 -> 7.

    Raises:
        ValueError: `cells` is not a square number.
    """
    side = math.isqrt(cells)
    if side < 1 or side * side != cells:
        raise ValueError(f"attention weights of one word are a square grid, e.g. (49,) or (7, 7); {cells} is none")
    return side


def cell_middles(cells: int) -> np.ndarray:
    """Return the centre (x, y) of each cell, (cells, 2), as fractions of the image's width and height."""
    side = grid_side(cells)
    row, column = np.divmod(np.arange(cells), side)
    return (np.stack([column, row], axis=1) + 0.5) / side


def peak(weights: np.ndarray) -> np.ndarray:
    """Return the centre of each word's strongest cell: (words, cells) weights -> (words, 2).

    x and y are fractions of the image's width and height, from its upper left corner.

    Raises:
        ValueError: no weights, or not one distribution per word.
    """
    rows = check_weights(weights)
    peaks: np.ndarray = cell_middles(rows.shape[1])[rows.argmax(1)]
    return peaks


def check_weights(weights: np.ndarray, words: int | None = None) -> np.ndarray:
    """Return the weights (words, cells) as float64, each row a distribution over the cells of a square grid.

    Args:
        words: how many rows are expected, None for any number.

    Raises:
        ValueError: another shape, or rows that are not distributions.
    """
    rows = np.asarray(weights, dtype=np.float64)
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"attention weights have the shape (words, cells) with at least one word, not {rows.shape}")
    grid_side(rows.shape[1])
    if words is not None and len(rows) != words:
        raise ValueError(f"{words} words, but attention weights for {len(rows)}")
    if not (np.isfinite(rows).all() and (rows >= 0).all() and (np.abs(rows.sum(1) - 1) <= 1e-3).all()):
        raise ValueError("the attention weights of each word must be nonnegative and sum to one (within 0.001)")
    return rows


def upsample(weights: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretch one word's weights smoothly over a picture.

    Args:
        weights: (cells,) or (side, side).

    Returns:
        (height, width) floats between the smallest and the largest weight; the middle of each cell has
        its weight.
    """
    side = grid_side(weights.size)
    grid = np.ascontiguousarray(weights.reshape(side, side), dtype=np.float32)
    smooth = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    return smooth.clip(grid.min(), grid.max())  # cubic curves overshoot, below zero too


def entropy(weights: np.ndarray) -> np.ndarray:
    """How spread each word's attention is: (words, cells) weights -> (words,) bits.

    0 bits: all weight on one cell; log2(cells), 5.61 bits for 49 cells: the same weight on every cell.

    Raises:
        ValueError: no weights, or not one distribution per word.
    """
    rows = check_weights(weights)
    logarithms = np.log2(rows, where=rows > 0, out=np.zeros_like(rows))
    bits: np.ndarray = np.abs((rows * logarithms).sum(1))
    return bits


# --------------------------------------------------------------------------------------------------
# Images


class UnreadableImage(Exception):
    """An image that cannot be read or decoded; the message says which and why."""


ImageSource = Path | BinaryIO | Image.Image | np.ndarray
FIRST_USE = threading.Lock()  # an image that Pillow opened is read from its file when it is first used


def open_image(source: ImageSource, at_least: int | None = None) -> Image.Image:
    """Open an image of one of `IMAGE_FORMATS`: upright (EXIF), RGB, transparency on white, the first frame of several.

    Args:
        source: a file's path, an image's bytes as a binary file, an image that is open already, or uint8 pixels
            (height, width), (height, width, 3) or (height, width, 4).
        at_least: let the JPEG decoder work at a reduced scale that keeps both sides at least this long.

    Raises:
        UnreadableImage: no permission, a read error, truncated, not an image, pixels of another kind, or more pixels
            than Pillow's decompression bomb limit.
    """
    try:
        if isinstance(source, np.ndarray):
            return rgb(image_of(source))
        if isinstance(source, Image.Image):
            with FIRST_USE:
                source.load()
            return rgb(source)
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            if at_least:
                image.draft("RGB", (at_least, at_least))
            image.load()
            return rgb(image)
    except Exception as error:  # Pillow's decoders raise whatever their format's parser raised
        name = source if isinstance(source, Path) else "the image"
        reason = missing_reader(source) if isinstance(error, UnidentifiedImageError) else None
        raise UnreadableImage(f"{name}: {reason or getattr(error, 'strerror', None) or error}") from error


def missing_reader(source: ImageSource) -> str | None:
    """Return what is to be installed for the format of a file, or None."""
    if isinstance(source, Path):
        with open(source, "rb") as file:
            return missing_reader(file)
    if isinstance(source, Image.Image | np.ndarray):
        return None
    source.seek(0)
    head = source.read(12)
    brand = head[8:] if head[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS and "HEIF" not in IMAGE_FORMATS:
        return f"HEIC needs a package that is not installed: {install_command('heic')}"
    if brand in AVIF_BRANDS and "AVIF" not in IMAGE_FORMATS:
        return 'AVIF needs a newer Pillow: python -m pip install "pillow>=11.3"'
    return None


def rgb(image: Image.Image) -> Image.Image:
    """Return an image upright, as RGB, on white where it is transparent."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode == "I":  # 16 bits a channel
        scaled = np.asarray(upright, dtype=np.float64) / 257
        upright = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    elif upright.mode == "F" and np.asarray(upright).max() <= 1:  # floats of 0 to 1, else of 0 to 255
        upright = upright.point(lambda value: value * 255)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def image_of(pixels: np.ndarray) -> Image.Image:
    """Return pixels as an image. Raises ValueError where they are not of the form that `open_image` names."""
    grey = pixels.ndim == 2 or pixels.shape[2:] == (1,)
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))) or not pixels.size:
        form = "(height, width), (height, width, 3) or (height, width, 4) of uint8, 0 to 255"
        raise ValueError(f"an array {pixels.shape} of {pixels.dtype}: expected {form}")
    return Image.fromarray(pixels.reshape(pixels.shape[:2]) if grey else pixels)


def images_below(folder: str | os.PathLike[str], problems: list[str]) -> Iterator[Path]:
    """Yield image files by their endings, also in folders below; links to folders are not followed.

    Args:
        problems: gets a line for each folder that cannot be read, and one where there are no images.
    """
    found = False
    for place, folders, names in os.walk(folder, onerror=lambda error: problems.append(str(error))):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS and os.path.isfile(path):
                found = True
                yield Path(path)
    if not found:
        problems.append(f"{folder}: no images in this folder (looked for {', '.join(sorted(IMAGE_ENDINGS))})")


class View(NamedTuple):
    """The part of an image that is resized to the encoder's square, perhaps mirrored."""

    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom, as parts of the sides
    mirrored: bool = False


VIEWS = {
    "whole": View(),
    "mirror": View(mirrored=True),
    "top_left_mirror": View((0.0, 0.0, 0.85, 0.85), mirrored=True),
    "top_right": View((0.15, 0.0, 1.0, 0.85)),
    "bottom_left_mirror": View((0.0, 0.15, 0.85, 1.0), mirrored=True),
    "bottom_right": View((0.15, 0.15, 1.0, 1.0)),
}
VIEW_SETS = {"whole": ("whole",), "mirror": ("whole", "mirror"), "all": tuple(VIEWS)}  # --views


def load_views(
    source: ImageSource, size: int, views: Sequence[str] = ("whole",), interpolation: str = "bilinear"
) -> np.ndarray:
    """Open an image once and return some of `VIEWS`, each resized for the encoder: uint8 (views, size, size, 3).

    The aspect ratio is not kept: nothing is cropped away, and an attention map that is stretched back over the image
    fits it.

    Raises:
        UnreadableImage: see `open_image`.
    """
    image = open_image(source, at_least=2 * size)
    width, height = image.size
    squares = np.empty((len(views), size, size, 3), np.uint8)
    resized: dict[tuple[float, ...], np.ndarray] = {}  # a view and its mirror image are resized once
    for square, (box, mirrored) in zip(squares, (VIEWS[view] for view in views), strict=True):
        if box not in resized:
            part = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
            whole = image.size == (size, size) and box == View().box
            how = Image.Resampling[interpolation.upper()]  # Pillow's filters widen when they shrink
            resized[box] = np.asarray(image if whole else image.resize((size, size), how, part))
        square[:] = resized[box][:, ::-1] if mirrored else resized[box]
    return squares
