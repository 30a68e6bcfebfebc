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

    def __init__(self, data: CaptionSet, vocabulary: Vocabulary, looks: Features | None):
        """Args: looks: features (I, C) by which images are compared, or None for the beam's captions alone."""
        self.data, self.looks = data, looks
        self.train = data.splits["train"]
        self.cider = CiderReward(data, self.train)
        self.word_of = self.cider.words_of(vocabulary)

    def choose(self, images: np.ndarray, found: Sequence[list[Hypothesis]]) -> list[Hypothesis]:
        """One caption of each image.

        Args:
            images: positions (n,) in the caption set.
            found: the hypotheses of each, best first, among which the choice is.
        """
        bar = tqdm(found, "Comparing captions", unit="image", disable=bars_off(), leave=False)
        return [
            hypotheses[int(utility(*self.agreement(hypotheses, alike)).argmax())]
            for hypotheses, alike in zip(bar, self.similar(images), strict=True)
        ]

    def agreement(
        self, hypotheses: Sequence[Hypothesis], similar: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What speaks for each of an image's candidates, which are its first H = CANDIDATES hypotheses at most.

        Args:
            similar: positions (k,) of images that look alike.

        Returns:
            log-probabilities (H,), CIDEr-D (H, H) of each candidate against each, and its mean (H,) against the captions of
            the similar images, 0 where there are none.
        """
        candidates = hypotheses[:CANDIDATES]
        ours = [self.word_of[each.ids] for each in candidates]
        tokens, captions = self.data.tokens, captions_of(self.data, similar)
        starts, ends = tokens.offsets[captions], tokens.offsets[captions + 1]
        ids = np.concatenate([*ours, tokens.ids[concatenate_ranges(starts, ends)]])
        offsets = np.cumsum([0, *map(len, ours), *(ends - starts)])
        with_each, with_others = np.split(self.cider.agreement(ids, offsets, len(ours)), [len(ours)], axis=1)
        chances = np.array([each.log_probability for each in candidates])
        return chances, with_each, with_others.mean(1) if len(captions) else np.zeros(len(ours))

    def similar(self, images: np.ndarray) -> np.ndarray:
        """The training images that look most like each: positions (n, k), by the cosine of their centred features."""
        if self.looks is None or not len(images):  # one of several processes may have none
            return np.zeros((len(images), 0), dtype=np.int64)
        train = self.gather(self.looks, self.train)  # (T, C)
        centre = train.mean(0)
        train = torch.nn.functional.normalize(train.sub_(centre))
        nearest = []
        for start in range(0, len(images), ENCODE_BATCH):
            some = torch.nn.functional.normalize(self.gather(self.looks, images[start : start + ENCODE_BATCH]) - centre)
            closeness = some @ train.T  # (B, T)
            nearest.append(closeness.topk(min(NEIGHBOURS, len(self.train))).indices.numpy())
        return self.train[np.concatenate(nearest)]

    @staticmethod
    def gather(looks: Features, images: np.ndarray) -> torch.Tensor:
        """Their features (n, C), in batches, each of which goes through the encoder where there is no cache."""
        starts = range(0, len(images), ENCODE_BATCH)
        return torch.cat([looks.gather(images[start : start + ENCODE_BATCH]).cpu() for start in starts])


def utility(
    log_probabilities: np.ndarray, with_each: np.ndarray, with_others: np.ndarray, temperature: float = TEMPERATURE,
    weight: float = NEIGHBOUR_WEIGHT,
) -> np.ndarray:  # fmt: skip
    """The expected CIDEr-D (H,) of each candidate. Args: what `Consensus.agreement` returns, and the weights of both."""
    chances = np.exp((log_probabilities - log_probabilities.max()) / temperature)
    expected: np.ndarray = with_each @ (chances / chances.sum()) + weight * with_others
    return expected
