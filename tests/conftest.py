"""A tiny data set, and a main program that runs in a directory of its own."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

torch.set_num_threads(1)  # everything is tiny here, and threads that wait for each other take longer

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}


def draw_tiny(place: Path) -> Path:
    """Twenty pictures in the Flickr8k layout, without split lists; returns the data directory."""
    folder = place / "tiny"
    (folder / "Images").mkdir(parents=True)
    rows = ["image,caption"]
    for number in range(20):
        name, color = f"p{number:02d}.jpg", list(COLORS)[number % 4]
        noise = np.random.default_rng(number).integers(0, 20, (40, 60, 3))
        Image.fromarray((np.array(COLORS[color]) * 0.9 + noise).astype(np.uint8)).save(folder / "Images" / name)
        rows += [f"{name},A {color} picture number {word} ." for word in ("one", "two")]
    (folder / "captions.txt").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The data directory of `draw_tiny`."""
    return draw_tiny(tmp_path)
