"""Consensus decoding: of the captions that a beam ended with, the one that agrees best with the evidence.

The likeliest caption is not the one that scores best. CIDEr-D rewards what a caption shares with what people
say of the image; nobody has told us that, but the beam's captions, weighted by their probability, are the
model's own guess (minimum Bayes risk decoding, Kumar and Byrne, 2004), and the captions of the training
images that look most alike are another (consensus re-ranking, Devlin et al., 2015). Nothing of the scored
images is looked at but their features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from caption_data import CaptionSet, Vocabulary, captions_of, concatenate_ranges
from caption_models import ENCODE_BATCH, Hypothesis
from cider_reward import CiderReward
from feature_cache import Features
from safe_io import bars_off

BEAM_SIZE = 20  # where none is asked for: consensus needs many captions to choose from
CANDIDATES = 100  # of an image, at most, the likeliest for their length: what a beam of 20 ends with
# Settled on the validation images of Flickr8k (docs/experiments.md).
TEMPERATURE = 3.0  # by which the beam's log-probabilities are divided: a beam is too sure of its first captions
NEIGHBOURS = 40  # training images
NEIGHBOUR_WEIGHT = 4.0  # of all their captions together, against one of all the beam's


class Consensus:
    """Chooses by expected CIDEr-D, with the document frequencies of the training captions."""

    def __init__(self, data: CaptionSet, vocabulary: Vocabulary, means: Features | None):
        """Args: means: features (I, C) by which images are compared, or None for the beam's captions alone."""
        self.data, self.means = data, means
        self.train = data.splits["train"]
        self.reward = CiderReward(data, self.train)
        self.word_of = self.reward.words_of(vocabulary)

    def choose(self, images: np.ndarray, found: Sequence[list[Hypothesis]]) -> list[Hypothesis]:
        """One caption of each image.

        Args:
            images: positions (n,) in the caption set.
            found: the hypotheses of each, best first, among which the choice is.
        """
        if not len(images):  # one of several processes may have none
            return []
        similar = self.similar(images) if self.means is not None else np.zeros((len(images), 0), dtype=np.int64)
        bar = tqdm(zip(found, similar, strict=True), "Comparing captions", len(found), disable=bars_off(), leave=False)
        return [hypotheses[int(self.expected(hypotheses[:CANDIDATES], alike).argmax())] for hypotheses, alike in bar]

    def expected(self, hypotheses: Sequence[Hypothesis], similar: np.ndarray) -> np.ndarray:
        """How well each of an image's captions (H,) agrees with them all and with those of `similar` images (k,)."""
        ours = [self.word_of[each.ids] for each in hypotheses]
        tokens = self.data.tokens
        captions = captions_of(self.data, similar)
        starts, ends = tokens.offsets[captions], tokens.offsets[captions + 1]
        theirs = tokens.ids[concatenate_ranges(starts, ends)]
        lengths = [*map(len, ours), *map(len, ours), *(ends - starts)]
        ids = np.concatenate([*ours, *ours, theirs])
        agreement = self.reward.agreement(ids, np.concatenate([[0], np.cumsum(lengths)]), len(ours))
        chances = np.array([each.log_probability for each in hypotheses]) / TEMPERATURE
        weights = np.exp(chances - chances.max())
        utility: np.ndarray = agreement[:, : len(ours)] @ (weights / weights.sum())
        if len(captions):
            utility = utility + NEIGHBOUR_WEIGHT * agreement[:, len(ours) :].mean(1)
        return utility

    def similar(self, images: np.ndarray) -> np.ndarray:
        """The training images that look most like each: positions (n, k), by the cosine of their centred features."""
        train = self.gather(self.train)  # (T, C)
        centre = train.mean(0)
        train = torch.nn.functional.normalize(train.sub_(centre))
        nearest = []
        for start in range(0, len(images), ENCODE_BATCH):
            some = torch.nn.functional.normalize(self.gather(images[start : start + ENCODE_BATCH]) - centre)
            closeness = some @ train.T  # (B, T)
            nearest.append(closeness.topk(min(NEIGHBOURS, len(self.train))).indices.numpy())
        return self.train[np.concatenate(nearest)]

    def gather(self, images: np.ndarray) -> torch.Tensor:
        """Their features (n, C), in batches."""
        assert self.means is not None
        starts = range(0, len(images), ENCODE_BATCH)  # without a cache each batch goes through the encoder
        return torch.cat([self.means.gather(images[start : start + ENCODE_BATCH]).cpu() for start in starts])
