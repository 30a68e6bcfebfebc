"""Captions of many images: what training, testing and tuning share."""

from __future__ import annotations

import difflib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captioning import distributed
from captioning.checkpoints import save_checkpoint
from captioning.confidence import BEAM, CONSENSUS, FEWEST, calibrate, score_of, supported_shares
from captioning.consensus import (
    FEWEST_TRAINING_IMAGES,
    FEWEST_VALIDATION_IMAGES,
    NgramHead,
    fit_head,
    pool,
    search_by_consensus,
    settle_weight,
)
from captioning.dataset import CaptionSet, Vocabulary
from captioning.decoders import Decoder
from captioning.decoding import Hypothesis, beam_search
from captioning.encoders import ENCODE_BATCH
from captioning.features import Features
from captioning.flags import CONSENSUS_BEAM
from captioning.io import UserError, bars_off, duration, log
from captioning.settings import Settings

ROWS = 384  # images x beams x members that are decoded together
MOST_VALIDATION = 1000  # validation images at most on which consensus and confidence are settled


@dataclass
class EvalContext:
    """What captioning a data set needs."""

    settings: Settings
    device: torch.device
    data: CaptionSet
    vocabulary: Vocabulary
    members: list[tuple[Decoder, Features]]  # a decoder with a view of the images, or an ensemble of several
    heads: list[NgramHead] = field(default_factory=list)  # of each member, for consensus; none for the beam alone
    calibration: dict[str, Any] | None = None  # of the captions' confidence; an ensemble has none

    def text(self, hypothesis: Hypothesis) -> str:
        return " ".join(self.vocabulary.decode(hypothesis.ids))


def search(
    context: EvalContext, images: np.ndarray, beam: int, attention: bool = False, length_penalty: float | None = None,
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
        members = [(decoder, features.gather(part, context.device)) for decoder, features in context.members]
        how = (beam, settings.max_length, penalty, attention)
        if consensus:
            captions += search_by_consensus(members, context.heads, *how, settings.no_repeat_ngram)
        else:
            found = beam_search(members, *how, no_repeat_ngram=settings.no_repeat_ngram)
            captions += [hypotheses[:1] for hypotheses in found]
    return distributed.gather(captions)


def caption(
    context: EvalContext, images: np.ndarray, beam: int, attention: bool = False, length_penalty: float | None = None
) -> list[Hypothesis]:
    """Return the best caption of each image, as `search` finds it, by consensus where the context has heads."""
    by_consensus = bool(context.heads) and beam > 1
    return [found[0] for found in search(context, images, beam, attention, length_penalty, by_consensus)]


def caption_texts(
    context: EvalContext, images: np.ndarray, beam: int, length_penalty: float | None = None
) -> list[str]:
    """Return the captions of `caption` as texts."""
    return [context.text(found) for found in caption(context, images, beam, length_penalty=length_penalty)]


@torch.inference_mode()
def pooled_features(context: EvalContext, images: np.ndarray) -> torch.Tensor:
    """Return what consensus knows of images: the mean (n, C) over regions and members, behind trained stages."""
    batches = []
    for batch in np.array_split(images, len(images) // ENCODE_BATCH + 1):
        members = [(decoder.eval(), view.gather(batch, context.device)) for decoder, view in context.members]
        batches.append(torch.stack([pool(decoder.after_stages(features)[1]) for decoder, features in members]).mean(0))
    return torch.cat(batches).cpu()


def learn_consensus(context: EvalContext, val: np.ndarray) -> tuple[NgramHead | None, dict[str, list[Hypothesis]]]:
    """Fit the regression of consensus decoding to the training images, and settle its weight on validation images.

    Args:
        context: whose members are views of the images for one decoder, trained already.
        val: positions (n,) of the validation images.

    Returns:
        the regression, None where it does not raise the CIDEr of the validation images, or has too few to learn from;
        and the captions of the validation images that a beam of CONSENSUS_BEAM finds alone, and by consensus.
    """
    started = time.perf_counter()
    if len(context.data.splits["train"]) < FEWEST_TRAINING_IMAGES or len(val) < FEWEST_VALIDATION_IMAGES:
        return None, {BEAM: caption(context, val, CONSENSUS_BEAM)} if len(val) >= FEWEST else {}

    head = fit_head(context.data, context.vocabulary, functools.partial(pooled_features, context))
    context = replace(context, heads=[head] * len(context.members))
    found = search(context, val, CONSENSUS_BEAM, consensus=True)
    references = list(map(context.data.references, val))
    head, chosen = settle_weight(head, found, pooled_features(context, val), context.text, references)
    log.info(f"Consensus: {head.table.size:,} n-grams, in {duration(time.perf_counter() - started)}")
    captions = {BEAM: [max(hypotheses, key=lambda h: h.score) for hypotheses in found]}
    return (head, captions | {CONSENSUS: chosen}) if head.weight else (None, captions)


def learn_decoding(context: EvalContext, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Learn from the validation images what a trained decoder's checkpoint has beside its weights.

    Args:
        context: as for `learn_consensus`.
        checkpoint: whose calibration stays where there are too few validation images for another.

    Returns:
        its fields `consensus` and `confidence`.
    """
    images, calibration = context.data.splits["val"], checkpoint["confidence"]
    if len(images) > MOST_VALIDATION:
        images = np.sort(np.random.default_rng(0).choice(images, MOST_VALIDATION, replace=False))
    head, captions = learn_consensus(context, images)
    if len(images) >= FEWEST:
        references = list(map(context.data.references, images))
        calibration = {
            way: calibrate(
                np.array([score_of(each.log_probabilities) for each in found]),
                supported_shares(list(map(context.text, found)), references),
            )
            for way, found in captions.items()
        }
        for way, table in calibration.items():
            low, high = table["shares"][0], table["shares"][-1]
            log.info(f"Confidence, {way}: {low:.2f} to {high:.2f}, calibrated on {table['images']} validation images")
    else:
        too_few = f"with {len(images)} validation images, of {FEWEST} that calibrating takes"
        kept = "that of the model that the run started from" if calibration else "none"
        log.info(f"Confidence: {kept}, {too_few}")
    return {"consensus": head and head.stored, "confidence": calibration}


def add_consensus(context: EvalContext, views: list[Features], checkpoint: dict[str, Any], path: Path) -> None:
    """Write what `learn_decoding` finds into the checkpoint of a finished run, unless it is there already.

    Args:
        context: whose decoder has the checkpoint's weights.
        views: of the images, all that are averaged in testing.
    """
    if checkpoint["consensus"] or context.settings.dry_run:
        return
    (decoder, _), *_ = context.members
    learned = learn_decoding(replace(context, members=[(decoder, view) for view in views]), checkpoint)
    if any(learned.values()) and distributed.is_first():
        save_checkpoint(path, checkpoint | learned)


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
