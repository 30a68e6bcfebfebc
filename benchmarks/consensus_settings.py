"""What consensus decoding (`--consensus`) brings and costs: its settings on the validation images of a trained run.

python benchmarks/consensus_settings.py RUN [--data_dir DIR] [--feature_cache DIR]

One beam search serves all settings. The baselines, in the same run: the beam's likeliest caption, and a beam of 5.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.consensus import CANDIDATES, REGRESSION_WEIGHTS, TEMPERATURE, pick_best
from captioning.evaluation import search
from captioning.io import run_command
from metrics_utils import score_captions

SETTINGS = (
    *((temperature, 0.0) for temperature in (1.0, 2.0, 3.0, 4.0)),
    *((TEMPERATURE, weight) for weight in REGRESSION_WEIGHTS if weight),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Settings of consensus decoding, on the validation images of a run.")
    parser.add_argument("run", help="a run directory or checkpoint")
    parser.add_argument("--data_dir", help="where the data set lies, if elsewhere than in training")
    parser.add_argument("--feature_cache", help="and its encoded images")
    given = parser.parse_args(argv)
    flags = ["--mode", "test", "--split", "val", "--consensus", "regression", "--model_path", given.run]
    for name in ("data_dir", "feature_cache"):
        flags += [f"--{name}", value] if (value := getattr(given, name)) else []
    args, typed = trainer.parse_flags(flags)
    task, images, _ = trainer.load_task(args, typed, ["val"])
    consensus = task.consensus
    assert consensus is not None
    references = [task.data.references(image) for image in images]

    def show(name: str, captions: Sequence[str]) -> None:
        scores = score_captions(captions, references)
        words = len({word for caption in captions for word in caption.split()})
        cells = "".join(f"{100 * scores[key]:>9.1f}" for key in ("cider", "bleu4", "wer"))
        print(f"{name:<44}{cells}{words:>9}", flush=True)

    start = time.perf_counter()
    narrow = search(task, images, 5)
    narrow_seconds = time.perf_counter() - start
    start = time.perf_counter()
    found = search(task, images, args.beam_size, wanted=args.beam_size)
    wide_seconds = time.perf_counter() - start
    start = time.perf_counter()
    consensus.evidence(images, found)
    compare_seconds = time.perf_counter() - start
    print(f"\n{len(images)} validation images, views {args.views}; {CANDIDATES} candidates at most")
    print(f"{'':<44}{'CIDEr':>9}{'BLEU-4':>9}{'WER':>9}{'words':>9}")
    show("beam 5, the likeliest", [task.text(each[0]) for each in narrow])
    show(f"beam {args.beam_size}, the likeliest", [task.text(each[0]) for each in found])
    for temperature, weight in SETTINGS:
        best = pick_best(found, consensus.evidence(images, found, temperature), weight)
        show(f"temperature {temperature:g}, regression's weight {weight:g}", [task.text(each) for each in best])
    each = 1000 * np.array([narrow_seconds, wide_seconds, compare_seconds]) / len(images)
    print(f"ms an image: beam 5 {each[0]:.0f}, beam {args.beam_size} {each[1]:.0f} ({each[1] / each[0]:.1f} times), "
          f"comparing {each[2]:.0f} ({each[2] / each[0]:.1f} times)")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "Stopped."))
