"""Draw the README's pictures from a run on the demo set, small enough for a repository.

./setup.sh demo
python docs/draw_pictures.py saved_models/demo/efficientnet_lite0_attention/RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

PICTURES = {"attention_viz_sample_1.png": "attention.jpg", "sample_captions.png": "captions.jpg"}
WIDTH, QUALITY = 1100, 85  # pixels; JPEG, since a palette turns purple grey


def main(argv: list[str] | None = None) -> int:
    """Copy the run's pictures into this script's folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory that was tested with --save_attention_viz")
    run = parser.parse_args(argv).run
    missing = [name for name in PICTURES if not (run / name).is_file()]
    if missing:
        print(f"error: {run} has no {missing[0]}: --mode test --model_path {run} --save_attention_viz", file=sys.stderr)
        return 2
    for name, drawn in PICTURES.items():
        with Image.open(run / name) as picture:
            size = (WIDTH, round(picture.height * WIDTH / picture.width))
            small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        path = Path(__file__).with_name(drawn)
        small.save(path, quality=QUALITY, optimize=True)
        print(f"{path}: {path.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
