"""Opening images, the views that encoders see, and the geometry of the encoders' square grids."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    pass
from PIL import ImageOps

# --------------------------------------------------------------------------------------------------
# Numbers


def grid_side(cells: int) -> int:
    """How many cells a square grid of so many has along each side: 49 -> 7.

    Raises:
        ValueError: no square number.
    """
    side = math.isqrt(cells)
    if side < 1 or side * side != cells:
        raise ValueError(f"attention weights of one word are a square grid, e.g. (49,) or (7, 7); {cells} is none")
    return side


def cell_middles(cells: int) -> np.ndarray:
    """(cells, 2): x and y of each cell's middle as fractions of the picture's width and height."""
    side = grid_side(cells)
    row, column = np.divmod(np.arange(cells), side)
    return (np.stack([column, row], axis=1) + 0.5) / side


def peak(weights: np.ndarray) -> np.ndarray:
    """Where each word looks most: (words, cells) weights -> (words, 2), the middle of the strongest cell.

    x and y are fractions of the picture's width and height, from its upper left corner.

    Raises:
        ValueError: no weights, or not one distribution per word.
    """
    rows = check_weights(weights)
    return cell_middles(rows.shape[1])[rows.argmax(1)]


def check_weights(weights: np.ndarray, words: int | None = None) -> np.ndarray:
    """The weights as float64, of which each row is a distribution over the cells of a square grid."""
    rows = np.asarray(weights, dtype=np.float64)
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"attention weights have the shape (words, cells) with at least one word, not {rows.shape}")
    grid_side(rows.shape[1])
    if words is not None and len(rows) != words:
        raise ValueError(f"{words} words, but attention weights for {len(rows)}")
    if not (np.isfinite(rows).all() and (rows >= 0).all() and (np.abs(rows.sum(1) - 1) <= 1e-3).all()):
        raise ValueError("the attention weights of each word must be nonnegative and sum to one (within 0.001)")
    return rows


IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
# Pillow looks at the content, not at the ending, and would hand PostScript called .jpg to Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")


# --------------------------------------------------------------------------------------------------
# Pictures


class UnreadableImage(Exception):
    """An image file that Pillow cannot decode; the message says which and why."""


def open_image(path: Path, at_least: int | None = None) -> Image.Image:
    """A picture in one of `IMAGE_FORMATS`, upright (EXIF), as RGB, transparency on white, the first frame of several.

    Args:
        at_least: let the JPEG decoder work at a reduced scale that keeps both sides at least this long.

    Raises:
        UnreadableImage: truncated, no image at all, or more pixels than Pillow's bomb limit allows.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if at_least:
                image.draft("RGB", (at_least, at_least))
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or upright.mode == "I":  # 16 bits a channel
                scaled = np.asarray(upright, dtype=np.float64) / 257
                upright = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever their format's parser raised
        raise UnreadableImage(f"{path}: {error}") from error


class View(NamedTuple):
    """One way of looking at a picture: the part of it that is squashed to a square, perhaps mirrored."""

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


def load_pixels(path: Path, size: int, view: str = "whole") -> np.ndarray:
    """A picture, or one of `VIEWS` of it, squashed to `size` x `size`, uint8 (size, size, 3): what the encoders see.

    Squashing rather than cropping keeps everything in view, and an attention map stretched back over
    the picture lies where it belongs.
    """
    image = open_image(path, at_least=2 * size)
    (width, height), (box, mirrored) = image.size, VIEWS[view]
    if image.size != (size, size) or view != "whole":
        part = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        image = image.resize((size, size), Image.Resampling.BILINEAR, part)  # Pillow's filter widens when it shrinks
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels
