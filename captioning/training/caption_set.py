"""Captions of many images: what training, testing and tuning share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captioning import distributed
from captioning.config.settings import Settings
from captioning.data.dataset import CaptionSet, Vocabulary
from captioning.decoders.base import Decoder
from captioning.decoders.ensemble import Ensemble
from captioning.decoding.beam_search import Hypothesis, beam_search
from captioning.decoding.consensus import NgramHead, search_by_consensus
from captioning.encoders.features import Features
from captioning.io import UserError, bars_off

ROWS = 384  # images x beams x members that are decoded together


@dataclass
class DecodingContext:
    """What captioning a data set needs."""

    settings: Settings
    device: torch.device
    data: CaptionSet
    vocabulary: Vocabulary
    members: list[tuple[Decoder, Features]]  # a decoder with a view of the images, or an ensemble of several
    heads: list[NgramHead] = field(default_factory=list)  # of each decoder, for consensus; none for the beam alone
    calibration: dict[str, Any] | None = None  # of the captions' confidence; an ensemble has none

    def text(self, hypothesis: Hypothesis) -> str:
        return " ".join(self.vocabulary.decode(hypothesis.ids))


def search(
    context: DecodingContext, images: np.ndarray, beam: int, attention: bool = False, length_penalty: float | None = None,
    consensus: bool = False,
) -> list[list[Hypothesis]]:  # fmt: skip
    """Decode captions freely, many images at a time; of several processes each takes its shard.

    Args:
        images: positions (n,) in the caption set.
        length_penalty: another than the settings'.
        consensus: sort what the beam ends with by the evidence of `context.heads`, rather than by probability.

    Returns:
        for each image its best hypothesis, and with consensus the others.
    """
    settings = context.settings
    penalty = settings.length_penalty if length_penalty is None else length_penalty
    captions: list[list[Hypothesis]] = []
    chunk = max(1, ROWS // (beam * len(context.members)))
    mine = distributed.shard(images)
    starts = range(0, len(mine), chunk)
    for start in tqdm(starts, "Captioning", unit="batch", disable=bars_off(), leave=False):
        part = mine[start : start + chunk]
        reading = Ensemble([(decoder, features.gather(part, context.device)) for decoder, features in context.members])
        how = (beam, settings.max_length, penalty, attention)
        if consensus:
            captions += search_by_consensus(reading, context.heads, *how, settings.no_repeat_ngram)
        else:
            found = beam_search(reading, *how, no_repeat_ngram=settings.no_repeat_ngram)
            captions += [hypotheses[:1] for hypotheses in found]
    return distributed.gather(captions)


def caption(
    context: DecodingContext,
    images: np.ndarray,
    beam: int,
    attention: bool = False,
    length_penalty: float | None = None,
) -> list[Hypothesis]:
    """Return the best caption of each image, as `search` finds it, by consensus where the context has heads."""
    by_consensus = bool(context.heads) and beam > 1
    return [found[0] for found in search(context, images, beam, attention, length_penalty, by_consensus)]


def caption_texts(
    context: DecodingContext, images: np.ndarray, beam: int, length_penalty: float | None = None
) -> list[str]:
    """Return the captions of `caption` as texts."""
    return [context.text(found) for found in caption(context, images, beam, length_penalty=length_penalty)]


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
