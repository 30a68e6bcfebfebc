"""Whether attention maps mean something: the pointing game (Zhang et al., 2018) on the demo set.

There we know where each shape was drawn. A shape word (circle, square, ...) hits where its attention peak, the middle
of the strongest cell, lies in the box of the shape that it names; it is near where it lies at most half a cell away,
that is, where the strongest cell touches the box. A share says little alone: large shapes in the middle are hit by any
map that likes the middle. So it stands beside what a peak gets that is any cell alike (`uniform`), and what the
peaks of other pictures' shape words get (`shuffled`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attention_visualization import cell_middles, peak
from demo_dataset import SHAPES
from safe_io import UserError, read_json

Boxes = dict[str, tuple[float, float, float, float]]  # shape word -> x0, y0, x1, y1 as fractions of the picture


def read_boxes(path: Path) -> dict[str, Boxes]:
    """The `shapes.json` of a demo set: for each image's name the box of each shape on it.

    Raises:
        UserError: unreadable, or another form.
    """
    scenes = read_json(path)
    if not isinstance(scenes, dict) or not all(isinstance(s, list) and all(map(is_shape, s)) for s in scenes.values()):
        raise UserError(
            f"{path} is no table of drawn shapes: draw the set again with download_datasets.py --dataset demo --force"
        )
    return {name: {shape["shape"]: tuple(shape["box"]) for shape in scene} for name, scene in scenes.items()}


def is_shape(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("shape") not in SHAPES or not isinstance(value.get("box"), list):
        return False
    box = value["box"]
    return len(box) == 4 and all(type(edge) in (int, float) and 0 <= edge <= 1 for edge in box)


def play(
    captions_file: Path, names: Sequence[str], words: Sequence[Sequence[str]], weights: Sequence[np.ndarray | None]
) -> dict[str, float]:
    """Play the game with captions of a demo set; returns what `score` does.

    Args:
        captions_file: the set's, beside which its `shapes.json` lies.
        names, words, weights: of each image, see `score`.

    Raises:
        UserError: `shapes.json` cannot be used.
    """
    boxes = read_boxes(captions_file.with_name("shapes.json"))
    return score(words, weights, [boxes.get(name, {}) for name in names])


def score(
    words: Sequence[Sequence[str]], weights: Sequence[np.ndarray | None], boxes: Sequence[Boxes]
) -> dict[str, float]:
    """Score the captions of a set of images.

    Args:
        words: each image's caption.
        weights: its attention, (words, cells); None for an empty caption.
        boxes: where its shapes are. Each kind of shape is there once at most; a word for one that is not there
            is a wrong word, of whose map nothing can be asked, and does not count.

    Returns:
        `pointing_game_words`, how many shape words there are, and as shares of them `pointing_game` (hit) and
        `pointing_game_near`, both also with `_uniform` and `_shuffled`; nothing without a shape word, and
        `_shuffled` is left out where all are in one image.
    """
    owners: list[int] = []
    peaks: list[np.ndarray] = []
    edges: list[tuple[float, float, float, float]] = []
    for number, (caption, rows, known) in enumerate(zip(words, weights, boxes, strict=True)):
        for word, row in zip(caption, () if rows is None else rows, strict=True):
            if word in known:
                owners.append(number)
                peaks.append(peak(row[None])[0])
                edges.append(known[word])
                middles = cell_middles(len(row))
    if not owners:
        return {}
    left, top, right, bottom = np.array(edges).T[:, :, None]  # (N, 1) each
    half = 0.5 / np.sqrt(len(middles))

    def inside(points: np.ndarray, margin: float) -> np.ndarray:
        """(N, P): whether each word's box, that much larger on all sides, holds each of the points (P, 2)."""
        x, y = points.T
        across = (left - margin <= x) & (x <= right + margin)
        return across & (top - margin <= y) & (y <= bottom + margin)

    others = np.array(owners)[:, None] != np.array(owners)
    result: dict[str, float] = {"pointing_game_words": len(owners)}
    for name, margin in (("pointing_game", 0.0), ("pointing_game_near", half)):
        hits = inside(np.array(peaks), margin)  # each word's box against each word's peak
        result[name] = float(hits.diagonal().mean())
        result[f"{name}_uniform"] = float(inside(middles, margin).mean())
        if others.any():
            result[f"{name}_shuffled"] = float(hits[others].mean())
    return result


def describe(result: Mapping[str, float]) -> str:
    """The outcome as a line for people."""

    def chance(name: str) -> str:
        shuffled = result.get(f"{name}_shuffled")
        text = f"any cell alike {result[f'{name}_uniform']:.1%}"
        return text + (f", other pictures' maps {shuffled:.1%}" if shuffled is not None else "")

    return (
        f"Pointing game: of {result['pointing_game_words']} shape words, {result['pointing_game']:.1%} have their "
        f"attention peak on the shape they name ({chance('pointing_game')}), {result['pointing_game_near']:.1%} on it "
        f"or within half a cell ({chance('pointing_game_near')})"
    )
