"""Shrink the README's and the docs' pictures, so that they are small enough for a repository.

./setup.sh demo && cp .venv/photos/skimage/data/camera.png photographer.png
python flickr_image_caption_with_pytorch_resnet_lstm.py --mode caption --images photographer.png --save_attention_viz
python docs/draw_pictures.py captions_viz/attention_viz_sample_4.png saved_models/demo/efficientnet_lite0_attention/RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

WIDTH, QUALITY = 1100, 85  # pixels; JPEG, since a palette turns purple grey


def main(argv: list[str] | None = None) -> int:
    """Write the two pictures into this script's folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attention", type=Path, help="an attention picture, which --mode caption wrote")
    parser.add_argument("run", type=Path, help="a run directory that was tested")
    arguments = parser.parse_args(argv)
    pictures = {"attention.jpg": arguments.attention, "captions.jpg": arguments.run / "sample_captions.png"}
    missing = [path for path in pictures.values() if not path.is_file()]
    if missing:
        print(f"error: {missing[0]} is not there: run the commands that --help shows", file=sys.stderr)
        return 2
    for name, source in pictures.items():
        with Image.open(source) as picture:
            size = (WIDTH, round(picture.height * WIDTH / picture.width))
            small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        path = Path(__file__).with_name(name)
        small.save(path, quality=QUALITY, optimize=True)
        print(f"{path}: {path.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
