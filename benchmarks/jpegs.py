"""How long a JPEG takes from the disk to 224x224 pixels, by several ways, on one thread, and how far the pixels differ.

python benchmarks/jpegs.py FOLDER        # of JPEGs; simplejpeg is measured where it is installed
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision.io
from PIL import Image
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioning.images import load_pixels

SIZE = 224


def whole(path: Path) -> np.ndarray:
    """Pillow, decoded at full scale: what the others are compared with."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def draft(path: Path) -> np.ndarray:
    """Pillow's draft mode down to just above the wanted size, less than the program asks for."""
    with Image.open(path) as image:
        image.draft("RGB", (SIZE, SIZE))
        return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def by_torchvision(path: Path) -> np.ndarray:
    pixels = torchvision.io.decode_image(str(path), torchvision.io.ImageReadMode.RGB)
    return v2.functional.resize(pixels, [SIZE, SIZE], antialias=True).permute(1, 2, 0).numpy()


def by_simplejpeg(path: Path) -> np.ndarray:
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(path.read_bytes(), "RGB", min_height=2 * SIZE, min_width=2 * SIZE, min_factor=1)
    return np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def main() -> None:
    torch.set_num_threads(1)
    paths = sorted(Path(sys.argv[1]).glob("*.jpg"))
    ways: dict[str, Callable[[Path], np.ndarray]] = {
        "Pillow, whole": whole,
        "the program (draft at twice the size)": lambda path: load_pixels(path, SIZE),
        "Pillow, draft at the size": draft,
        "torchvision": by_torchvision,
        "simplejpeg": by_simplejpeg,
    }
    print(f"{len(paths)} JPEGs\n{'way':<40}{'ms an image':>12}{'mean difference of a pixel':>28}")
    for name, read in ways.items():
        times, differences = [], []
        for path in paths:
            start = time.perf_counter()
            try:
                pixels = read(path)
            except ImportError:
                print(f"{name:<40}  not installed")
                break
            times.append(time.perf_counter() - start)
            differences.append(np.abs(pixels.astype(float) - whole(path)).mean())
        else:
            print(f"{name:<40}{1000 * statistics.median(times):>12.2f}{statistics.mean(differences):>28.2f}")


if __name__ == "__main__":
    main()
