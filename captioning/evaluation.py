"""Captions of many images: what training, testing and tuning share."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import torch
from tqdm import tqdm

import attention_visualization
from captioning import distributed
from captioning.consensus import REGRESSION_WEIGHTS, Consensus, chosen
from captioning.dataset import CaptionSet, Vocabulary
from captioning.decoders import Decoder
from captioning.decoding import Hypothesis, beam_search
from captioning.features import Features
from captioning.io import bars_off, log
from metrics_utils import (
    cider_of_each,
)


@dataclasses.dataclass
class Task:
    """What training, testing and captioning work with."""

    args: argparse.Namespace
    device: torch.device
    data: CaptionSet
    vocabulary: Vocabulary
    members: list[tuple[Decoder, Features]]  # who captions: a decoder and a view of the images, or several
    consensus: Consensus | None = dataclasses.field(default=None, kw_only=True)  # who chooses among their captions

    def text(self, found: Hypothesis) -> str:
        return " ".join(self.vocabulary.decode(found.ids))


def caption(
    task: Task, images: np.ndarray, beam: int, attention: bool = False, length_penalty: float | None = None
) -> list[Hypothesis]:
    """The best caption of each image, as `search` finds it."""
    return [hypotheses[0] for hypotheses in search(task, images, beam, attention, length_penalty)]


def search(
    task: Task, images: np.ndarray, beam: int, attention: bool = False, length_penalty: float | None = None,
    wanted: int = 1,
) -> list[list[Hypothesis]]:  # fmt: skip
    """Captions of images, decoded freely, many images at a time; of several processes each takes its share.

    Args:
        images: positions (n,) in the caption set.
        length_penalty: another than the task's.
        wanted: keep all that the beam ends with, which are mostly at least so many; 1 for the best alone.
    """
    penalty = task.args.length_penalty if length_penalty is None else length_penalty
    captions: list[list[Hypothesis]] = []
    chunk = max(1, 384 // (beam * len(task.members)))
    mine = distributed.share(images)
    for start in tqdm(range(0, len(mine), chunk), "Captioning", unit="batch", disable=bars_off(), leave=False):
        part = mine[start : start + chunk]
        seen = [(decoder, features.gather(part, task.device)) for decoder, features in task.members]
        found = beam_search(seen, beam, task.args.max_length, penalty, attention, wanted)
        captions += found if wanted > 1 else [hypotheses[:1] for hypotheses in found]
    return distributed.gather(captions)


def by_consensus(
    task: Task, consensus: Consensus, images: np.ndarray, found: list[list[Hypothesis]]
) -> list[Hypothesis]:
    """Of what the beam found for each image, that which agrees best with the evidence.

    How much the regression counts is what gives the best CIDEr on the validation images; the less where it is equal.
    Few training images, or such as the encoder sees little in, make a poor regression, and only a trial tells.
    """
    val = task.data.splits["val"] if consensus.looks else images[:0]
    more = np.setdiff1d(val, images)
    all_images = np.concatenate([images, more])
    found = found + search(task, more, task.args.beam_size, wanted=task.args.beam_size)
    mine = distributed.share(np.arange(len(all_images)))
    evidence = distributed.gather(consensus.evidence(all_images[mine], [found[n] for n in mine]))
    weight = 0.0
    if consensus.looks:
        references = [task.data.references(image) for image in val]
        place = {image: n for n, image in enumerate(all_images.tolist())}
        ours = [place[image] for image in val.tolist()]

        def score(weight: float) -> float:
            best = chosen([found[n] for n in ours], [evidence[n] for n in ours], weight)
            return float(cider_of_each([task.text(each) for each in best], references).mean())

        cider = {weight: score(weight) for weight in REGRESSION_WEIGHTS}
        weight = max(cider, key=lambda weight: (cider[weight], -weight))
        tried = ", ".join(f"{weight:g}: {100 * value:.1f}" for weight, value in cider.items())
        log.info(f"Weight of the regression: {weight:g}, by CIDEr on {len(val)} validation images ({tried})")
    return chosen(found[: len(images)], evidence[: len(images)], weight)


def captions_of_images(task: Task, images: np.ndarray, beam: int, length_penalty: float | None = None) -> list[str]:
    """The same as texts."""
    return [task.text(found) for found in caption(task, images, beam, length_penalty=length_penalty)]


def images_to_draw(args: argparse.Namespace, data: CaptionSet, images: np.ndarray) -> np.ndarray:
    """Positions of the images of the attention pictures: the named ones, or a seeded choice of `images`."""
    if not args.save_attention_viz:
        return images[:0]
    if args.attention_viz_images:
        return attention_visualization.find_images(args.attention_viz_images, data.names)
    return np.random.default_rng(args.seed).permutation(images)[: args.attention_viz_samples]
