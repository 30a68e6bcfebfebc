"""Consensus decoding: of the captions that a beam ended with, the one that agrees best with the evidence.

The likeliest caption is not the one that scores best. CIDEr-D rewards what a caption shares with what people
say of the image. Nobody has told us that, but there are two guesses: the beam's captions, weighted by their
probability (minimum Bayes risk decoding, Kumar and Byrne, 2004), and a regression from images to captions,
fitted to the training images. It is a finer form of the captions of images that look alike (consensus
re-ranking, Devlin et al., 2015). Nothing of the scored images is looked at but their features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from captioning.cider import CiderReward
from captioning.dataset import CaptionSet, Vocabulary
from captioning.decoding import Hypothesis
from captioning.encoders import ENCODE_BATCH
from captioning.features import Features
from captioning.io import bars_off

BEAM_SIZE = 20  # where none is asked for: consensus needs many captions to choose from
CANDIDATES = 100  # of an image, at most, the likeliest for their length: what a beam of 20 ends with
# Settled on the validation images of Flickr8k (docs/experiments.md).
TEMPERATURE = 3.0  # by which the beam's log-probabilities are divided: a beam is too sure of its first captions
RIDGE = 0.1  # of the regression
REGRESSION_WEIGHTS = (0.0, 2.0, 4.0, 8.0, 12.0)  # of what it expects, against one of all the beam's captions together
REGRESSION_IMAGES = 10_000  # of more training images so many are drawn: time grows with their cube


def regression_images(train: np.ndarray) -> np.ndarray:
    """Which of the training images (T,) the regression is fitted to: the same at each call."""
    if len(train) <= REGRESSION_IMAGES:
        return train
    return np.sort(np.random.default_rng(0).choice(train, REGRESSION_IMAGES, replace=False))


class Consensus:
    """Compares by expected CIDEr-D, with the document frequencies of the training captions."""

    def __init__(self, data: CaptionSet, vocabulary: Vocabulary, looks: Sequence[Features]):
        """Args: looks: views of images, (I, C) each, for the regression; none for the beam's captions alone."""
        self.looks = looks
        self.cider = CiderReward(data, data.splits["train"])
        self.fitted = regression_images(data.splits["train"])
        self.word_of = self.cider.words_of(vocabulary)

    def evidence(
        self, images: np.ndarray, found: Sequence[list[Hypothesis]], temperature: float = TEMPERATURE
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """What speaks for each candidate; an image's candidates are its first H = CANDIDATES hypotheses at most.

        Args:
            images: positions (n,) in the caption set.
            found: the hypotheses of each, best first.

        Returns:
            for each image the CIDEr-D (H,) that the beam's captions, and the CIDEr (H,) that the regression expects of each
            candidate; of the regression 0 where there is none.
        """
        evidence = []
        bar = tqdm(found, "Comparing captions", unit="image", disable=bars_off(), leave=False)
        for hypotheses, shares in zip(bar, self.regress(images), strict=True):
            candidates = hypotheses[:CANDIDATES]
            words = [self.word_of[each.ids] for each in candidates]
            ids, offsets = np.concatenate(words), np.cumsum([0, *map(len, words)])
            log_probabilities = np.array([each.log_probability for each in candidates])
            chances = np.exp((log_probabilities - log_probabilities.max()) / temperature)
            by_beam = self.cider.agreement(ids, offsets) @ (chances / chances.sum())
            by_regression = np.zeros(len(candidates))
            if self.looks:
                by_regression = self.cider.likeness(ids, offsets, self.fitted, shares)
            evidence.append((by_beam, by_regression))
        return evidence

    def regress(self, images: np.ndarray) -> np.ndarray:
        """How much each fitted image's captions tell of each of `images`: shares (n, F), which may be negative.

        Kernel ridge regression (Saunders et al., 1998), whose kernel is the exponential of the cosine of two images' centred features.
        What it predicts is linear in the captions, so that these shares are all there is to find.
        """
        if not self.looks or not len(images):  # one of several processes may have no images
            return np.zeros((len(images), 0))
        known = self.gather(self.fitted)  # (F, C)
        centre = known.mean(0)
        known = torch.nn.functional.normalize(known - centre)
        asked = torch.nn.functional.normalize(self.gather(images) - centre)  # (n, C)
        kernel = (known @ known.T).sub_(1).exp_()  # (F, F), up to 800 MB
        kernel.diagonal().add_(RIDGE)
        shares: np.ndarray = torch.linalg.solve(kernel, torch.exp(known @ asked.T - 1)).T.numpy()
        return shares

    def gather(self, images: np.ndarray) -> torch.Tensor:
        """Their features (n, C), float64, the mean of all views, in batches that an encoder without a cache can take."""
        batches = [images[start : start + ENCODE_BATCH] for start in range(0, len(images), ENCODE_BATCH)]
        means = [torch.stack([view.gather(batch).cpu() for view in self.looks]).double().mean(0) for batch in batches]
        return torch.cat(means)


def chosen(
    found: Sequence[list[Hypothesis]], evidence: Sequence[tuple[np.ndarray, np.ndarray]], weight: float
) -> list[Hypothesis]:
    """The best caption of each image. Args: what the beam found, `Consensus.evidence` of it, and the regression's weight."""
    return [
        hypotheses[int((by_beam + weight * by_regression).argmax())]
        for hypotheses, (by_beam, by_regression) in zip(found, evidence, strict=True)
    ]
