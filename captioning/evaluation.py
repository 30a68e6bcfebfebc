"""Captions of many images: what training, testing and tuning share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from captioning import distributed
from captioning.cider import cider_of_each
from captioning.consensus import REGRESSION_WEIGHTS, Consensus, pick_best
from captioning.dataset import CaptionSet, Vocabulary
from captioning.decoders import LSTMDecoder
from captioning.decoding import Hypothesis, beam_search
from captioning.features import Features
from captioning.io import UserError, bars_off, log
from captioning.settings import Settings

ROWS = 384  # images x beams x members that are decoded together


@dataclass
class EvalContext:
    """What captioning a data set needs."""

    settings: Settings
    device: torch.device
    data: CaptionSet
    vocabulary: Vocabulary
    members: list[tuple[LSTMDecoder, Features]]  # a decoder with a view of the images, or an ensemble of several
    consensus: Consensus | None = field(default=None, kw_only=True)  # picks among the beam's captions

    def text(self, hypothesis: Hypothesis) -> str:
        return " ".join(self.vocabulary.decode(hypothesis.ids))


def search(
    context: EvalContext, images: np.ndarray, beam: int, attention: bool = False, length_penalty: float | None = None,
    wanted: int = 1,
) -> list[list[Hypothesis]]:  # fmt: skip
    """Decode captions freely, many images at a time; of several processes each takes its shard.

    Args:
        images: positions (n,) in the caption set.
        length_penalty: another than the settings'.
        wanted: keep all that the beam ends with, mostly at least so many; 1 keeps the best alone.

    Returns:
        for each image its hypotheses, best first.
    """
    penalty = context.settings.length_penalty if length_penalty is None else length_penalty
    captions: list[list[Hypothesis]] = []
    chunk = max(1, ROWS // (beam * len(context.members)))
    mine = distributed.share(images)
    starts = range(0, len(mine), chunk)
    for start in tqdm(starts, "Captioning", unit="batch", disable=bars_off(), leave=False):
        part = mine[start : start + chunk]
        members = [(decoder, features.gather(part, context.device)) for decoder, features in context.members]
        found = beam_search(members, beam, context.settings.max_length, penalty, attention, wanted)
        captions += found if wanted > 1 else [hypotheses[:1] for hypotheses in found]
    return distributed.gather(captions)


def caption(
    context: EvalContext, images: np.ndarray, beam: int, attention: bool = False, length_penalty: float | None = None
) -> list[Hypothesis]:
    """Return the best caption of each image, as `search` finds it."""
    return [hypotheses[0] for hypotheses in search(context, images, beam, attention, length_penalty)]


def caption_texts(
    context: EvalContext, images: np.ndarray, beam: int, length_penalty: float | None = None
) -> list[str]:
    """Return the captions of `caption` as texts."""
    return [context.text(found) for found in caption(context, images, beam, length_penalty=length_penalty)]


def by_consensus(
    context: EvalContext, consensus: Consensus, images: np.ndarray, found: list[list[Hypothesis]]
) -> tuple[list[Hypothesis], float]:
    """Pick, of what the beam found for each image, the caption that agrees best with the evidence.

    The weight of the regression is the one with the best CIDEr on the validation images, the smaller one where two are
    equal: a regression on few training images, or on poor features, is a poor one, and only a trial shows it.

    Returns:
        a caption for each image, and the weight.
    """
    val = context.data.splits["val"] if consensus.views else images[:0]
    more = np.setdiff1d(val, images)
    all_images = np.concatenate([images, more])
    beam = context.settings.beam_size
    found = found + search(context, more, beam, wanted=beam)
    mine = distributed.share(np.arange(len(all_images)))
    evidence = distributed.gather(consensus.evidence(all_images[mine], [found[n] for n in mine]))
    weight = 0.0
    if consensus.views:
        references = [context.data.references(image) for image in val]
        place = {image: n for n, image in enumerate(all_images.tolist())}
        ours = [place[image] for image in val.tolist()]

        def score(weight: float) -> float:
            best = pick_best([found[n] for n in ours], [evidence[n] for n in ours], weight)
            return float(cider_of_each([context.text(each) for each in best], references).mean())

        cider = {weight: score(weight) for weight in REGRESSION_WEIGHTS}
        weight = max(cider, key=lambda weight: (cider[weight], -weight))
        tried = ", ".join(f"{weight:g}: {100 * value:.1f}" for weight, value in cider.items())
        log.info(f"Weight of the regression: {weight:g}, by CIDEr on {len(val)} validation images ({tried})")
    return pick_best(found[: len(images)], evidence[: len(images)], weight), weight


def images_to_draw(settings: Settings, data: CaptionSet, images: np.ndarray) -> np.ndarray:
    """Return the positions of the images whose attention is drawn: the named ones, or a seeded choice of `images`.

    Raises:
        UserError: a name that is not in the data set.
    """
    if not settings.save_attention_viz:
        return images[:0]
    if settings.attention_viz_images:
        return find_images(settings.attention_viz_images, data.names)
    return np.random.default_rng(settings.seed).permutation(images)[: settings.attention_viz_samples]


def find_images(wanted: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Return the positions of the named images, in their order, each once.

    Raises:
        UserError: a name is not among `names`.
    """
    place = {name.rpartition("/")[2]: number for number, name in enumerate(names)}  # COCO's have a folder
    place |= {name: number for number, name in enumerate(names)}
    for name in wanted:
        if name not in place:
            close = difflib.get_close_matches(name, names, n=2, cutoff=0.5) or list(names[:2])
            raise UserError(
                f"--attention_viz_images: the data set has no captioned image {name!r}; it has {', '.join(close)}, ..."
            )
    return np.array([place[name] for name in dict.fromkeys(wanted)], dtype=np.int64)
