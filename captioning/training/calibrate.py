"""What a trained decoder learns from the validation images, for its checkpoint: consensus and confidence."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioning import distributed
from captioning.config.flags import CONSENSUS_BEAM
from captioning.decoders.ensemble import pool
from captioning.decoding.beam_search import Hypothesis
from captioning.decoding.confidence import BEAM, CONSENSUS, FEWEST, calibrate, score_of, supported_shares
from captioning.decoding.consensus import (
    FEWEST_TRAINING_IMAGES,
    FEWEST_VALIDATION_IMAGES,
    NgramHead,
    fit_head,
    settle_weight,
)
from captioning.encoders.base import ENCODE_BATCH
from captioning.encoders.features import Features
from captioning.io import duration, log
from captioning.runs.checkpoints import load_checkpoint, save_checkpoint
from captioning.training.caption_set import DecodingContext, caption, search

MOST_VALIDATION = 1000  # validation images at most
FEWEST_ANEW = 1000  # training images from which on a run with --init_from fits another regression; not measured yet


@torch.inference_mode()
def pooled_features(context: DecodingContext, images: np.ndarray) -> np.ndarray:
    """Return what consensus knows of images: the mean (n, C) over regions and members, behind trained stages."""
    batches = []
    for batch in np.array_split(images, len(images) // ENCODE_BATCH + 1):
        members = [(decoder.eval(), view.gather(batch, context.device)) for decoder, view in context.members]
        batches.append(pool([decoder.after_stages(features)[1] for decoder, features in members]))
    return np.concatenate(batches)


def keeps_head(stored: Mapping[str, Any], train: int, val: int) -> bool:
    """Whether a checkpoint's regression stays, since there are too few images for another, or fewer than it learned from.

    Args:
        train, val: numbers of training and validation images.
    """
    enough = min(FEWEST_ANEW, round(math.exp(stored["log_images"])))
    return train < max(FEWEST_TRAINING_IMAGES, enough) or val < FEWEST_VALIDATION_IMAGES


def learn_consensus(
    context: DecodingContext, val: np.ndarray, stored: Mapping[str, Any] | None
) -> tuple[NgramHead | None, dict[str, list[Hypothesis]]]:
    """Fit the regression of consensus decoding to the training images, and settle its weight on validation images.

    Args:
        context: whose members are views of the images for one decoder, trained already.
        val: positions (n,) of the validation images.
        stored: the regression that the checkpoint has already, which stays where there are too few images for another.

    Returns:
        the regression, None where it does not raise the CIDEr of the validation images, or has too few to learn from;
        and the captions of the validation images that a beam of CONSENSUS_BEAM finds alone, and by consensus.
    """
    started = time.perf_counter()
    train, kept = len(context.data.splits["train"]), None
    if stored and keeps_head(stored, train, len(val)):
        log.info(f"Consensus: kept as it was, with {train} training and {len(val)} validation images, of "
                 f"{FEWEST_ANEW} and {FEWEST_VALIDATION_IMAGES} that another takes")  # fmt: skip
        kept = NgramHead(len(context.vocabulary), stored)
        if len(val) < FEWEST:
            return kept, {}
    elif train < FEWEST_TRAINING_IMAGES or len(val) < FEWEST_VALIDATION_IMAGES:
        return None, {BEAM: caption(context, val, CONSENSUS_BEAM)} if len(val) >= FEWEST else {}

    head = kept or fit_head(context.data, context.vocabulary, functools.partial(pooled_features, context))
    context = replace(context, heads=[head])
    found = search(context, val, CONSENSUS_BEAM, consensus=True)
    captions = {BEAM: [max(hypotheses, key=lambda h: h.score) for hypotheses in found]}
    if kept:
        return kept, captions | {CONSENSUS: [hypotheses[0] for hypotheses in found]}
    references = list(map(context.data.references, val))
    head, chosen = settle_weight(head, found, pooled_features(context, val), context.text, references)
    log.info(f"Consensus: {len(head.stored['keys']):,} n-grams, in {duration(time.perf_counter() - started)}")
    return (head, captions | {CONSENSUS: chosen}) if head.weight else (None, captions)


def learn_from_validation(context: DecodingContext, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Learn from the validation images what a trained decoder's checkpoint has beside its weights.

    Args:
        context: as for `learn_consensus`.
        checkpoint: whose consensus and calibration stay where there are too few images for others.

    Returns:
        its fields `consensus` and `confidence`.
    """
    images, calibration = context.data.splits["val"], checkpoint["confidence"]
    if len(images) > MOST_VALIDATION:
        images = np.sort(np.random.default_rng(0).choice(images, MOST_VALIDATION, replace=False))
    head, captions = learn_consensus(context, images, checkpoint["consensus"])
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


def complete_checkpoint(
    path: Path, context: DecodingContext, views: list[Features], kept: Mapping[str, Any] | None
) -> None:
    """Write what `learn_from_validation` finds into the checkpoint of a finished run, unless it is there already.

    Args:
        kept: the consensus that every checkpoint of the run has, from the model that it started from.
        context: whose decoder has the checkpoint's weights.
        views: of the images, all that are averaged in testing.
    """
    checkpoint = load_checkpoint(path)
    consensus, confidence = checkpoint["consensus"], checkpoint["confidence"]
    is_own = consensus and not (kept and np.array_equal(consensus["expect"], kept["expect"]))
    if is_own or checkpoint["decoding"] or context.settings.dry_run:
        return
    (decoder, _), *_ = context.members
    learned = learn_from_validation(replace(context, members=[(decoder, view) for view in views]), checkpoint)
    is_new = learned["consensus"] is not consensus or learned["confidence"] != confidence
    if is_new and distributed.is_first():
        save_checkpoint(path, checkpoint | learned)
