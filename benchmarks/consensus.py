"""Consensus decoding of a trained model: what beam, rank and ridge of its regression are worth, and what it costs.

    python benchmarks/consensus.py --model_path RUN --feature_cache CACHE

CIDEr (x100) of the validation and test images together. Each row settles its weight on the validation images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioning import consensus
from captioning.building import load_context
from captioning.cider import cider_of_each
from captioning.decoding import Hypothesis
from captioning.evaluation import EvalContext, search
from captioning.io import prepare_process
from captioning.settings import parse_flags
from captioning.validation import pooled_features

ROWS = [(20, 0.3, 160), (20, 0.1, 160), (20, 3.0, 160), (20, 0.3, 256), (20, 0.3, 96)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--feature_cache", default="feature_cache")
    parser.add_argument("--rows", nargs="+", default=ROWS, type=lambda text: tuple(map(float, text.split(","))),
                        metavar="BEAM,RIDGE,RANK")  # fmt: skip
    args = parser.parse_args(argv)
    flags = ["--model_path", args.model_path, "--feature_cache", args.feature_cache]
    settings = parse_flags(["--mode", "tune", *flags])  # which reads the training images too
    context, images, _ = load_context(settings, ["val", "test"])
    known = {split: pooled_features(context, context.data.splits[split]) for split in ("train", "val", "test")}
    place = {image: n for n, image in enumerate(context.data.splits["train"].tolist())}
    of_training = lambda batch: known["train"][[place[image] for image in batch.tolist()]]  # noqa: E731
    print("beam  ridge  rank  weight  likeliest  consensus")
    found: dict[int, list[list[Hypothesis]]] = {}
    for beam, ridge, rank in args.rows:
        consensus.RIDGE, consensus.RANK = ridge, int(rank)
        head = consensus.fit_head(context.data, context.vocabulary, of_training)
        if beam not in found:
            found[beam] = time_search(replace(context, heads=[head] * len(context.members)), images, int(beam))
        val = len(known["val"])
        references = list(map(context.data.references, images))
        head, _ = consensus.settle_weight(head, found[beam][:val], known["val"], context.text, references[:val])
        evidence = head.evidence(found[beam], torch.cat([known["val"], known["test"]]))
        best = [
            hypotheses[int((a + head.weight * b).argmax())]
            for hypotheses, (a, b) in zip(found[beam], evidence, strict=True)
        ]
        likeliest = [max(hypotheses, key=lambda h: h.score) for hypotheses in found[beam]]
        scores = [100 * cider_of_each(list(map(context.text, each)), references).mean() for each in (likeliest, best)]
        print(f"{beam:4.0f}  {ridge:5g}  {rank:4.0f}  {head.weight:6g}  {scores[0]:9.1f}  {scores[1]:9.1f}", flush=True)


def time_search(context: EvalContext, images: np.ndarray, beam: int) -> list[list[Hypothesis]]:
    """Return what a beam ends with, and print the time of consensus as a multiple of the same beam's without."""
    some, seconds = images[:60], ([], [])
    for _ in range(3):
        for way, times in enumerate(seconds):
            started = time.perf_counter()
            search(context, some, beam, consensus=bool(way))
            times.append(time.perf_counter() - started)
    plain, chosen = map(np.median, seconds)
    took = f"{chosen / plain:.2f} times as long ({plain:.1f} s for {len(some)} images without)"
    print(f"beam {beam}: consensus takes {took}")
    return search(context, images, beam, consensus=True)


if __name__ == "__main__":
    prepare_process()
    main()
