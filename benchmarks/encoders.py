"""What each encoder costs: the time of an image, against ResNet50 in the same run, and its room in the cache.

python benchmarks/encoders.py [--images 64] [--repeats 3] [--encoder NAME ...]

Weights change no time: those that would have to be downloaded are random. What an encoder brings is the user's
to measure, by the validation CIDEr of two runs (docs/experiments.md has what was measured here).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from measure import interleaved

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioning.distributed import pick_device
from captioning.encoders import ENCODE_BATCH, ENCODERS, PACKAGED_WEIGHTS, build_encoder, find_weights
from captioning.flags import ENCODER_NAMES

BASELINE = "resnet50"


def pass_over(name: str, images: int, device: torch.device) -> Callable[[], None]:
    """The encoder's fast form over so many images, ENCODE_BATCH at a time."""
    spec = ENCODERS[name]
    weights, _ = find_weights(name, None if spec.network in PACKAGED_WEIGHTS else "random")
    encode = build_encoder(name, weights).fast_form(device)
    size = (min(images, ENCODE_BATCH), spec.image_size, spec.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)

    def repeat() -> None:
        for _ in range(max(1, images // ENCODE_BATCH)):
            encode(pixels).cpu()

    return repeat


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What each encoder costs, against ResNet50.")
    parser.add_argument("--images", type=int, default=64, help="of a pass (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="passes, of which the median counts (default: 3)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--encoder", nargs="+", choices=ENCODER_NAMES, default=ENCODER_NAMES)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    names = list(dict.fromkeys([BASELINE, *args.encoder]))
    images = max(1, args.images // ENCODE_BATCH) * min(args.images, ENCODE_BATCH)
    seconds = interleaved({name: pass_over(name, args.images, device) for name in names}, args.repeats, device)
    print(f"{images} images, {device}, {torch.get_num_threads()} threads; cache: kB an image and view, with attention")
    print(f"{'encoder':<28}{'images/s':>10}{'time / ' + BASELINE:>18}{'grid':>8}{'channels':>10}{'cache':>8}")
    for name in names:
        spec, ratio = ENCODERS[name], seconds[name] / seconds[BASELINE]
        room = 2 * spec.regions * spec.channels / 1000  # float16
        rate, grid = images / seconds[name], f"{spec.grid} x {spec.grid}"
        print(f"{name:<28}{rate:>10.1f}{ratio:>18.2f}{grid:>8}{spec.channels:>10}{room:>8.0f}")


if __name__ == "__main__":
    main()
