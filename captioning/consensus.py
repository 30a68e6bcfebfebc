"""Consensus decoding: of the captions that a beam ended with, the one that agrees best with the evidence.

The most probable caption is not the one that scores best, since CIDEr-D rewards what a caption shares with the
references. The references are unknown, but two estimates of them are not: the beam's own captions, weighted by their
probability (minimum Bayes risk decoding, Kumar and Byrne, 2004), and the n-grams that a regression expects of an image,
fitted to the training images and captions (compare consensus re-ranking, Devlin et al., 2015). The regression is a part
of the checkpoint: a table of frequent n-grams and two matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from captioning.cider import NgramTable, caption_words, cider_of_each, weigh_references
from captioning.dataset import UNK, CaptionSet, Vocabulary
from captioning.decoding import Hypothesis

BEAM_SIZE = 20  # the default: consensus needs many captions to choose from
CANDIDATES = 100  # captions of an image at most, best first; a beam of 20 ends with about as many
# Tuned on the validation images of Flickr8k (docs/experiments.md).
TEMPERATURE = 3.0  # divides the beam's log-probabilities: a beam is overconfident of its first captions
RIDGE = 0.3  # of the regression
RANK = 96  # of the regression
FEWEST_IMAGES = 10  # training images whose captions have an n-gram of the table
MOST_NGRAMS = 20_000  # the most frequent
FIT_BATCH = 256  # images
MOST_VALIDATION_IMAGES = 1000

Evidence = tuple[np.ndarray, np.ndarray]  # CIDEr of an image's candidates expected by the beam and by the regression


class NgramHead:
    """What the captions of an image say, as a regression expects it from the encoder's features.

    A ridge regression of reduced rank from the direction of an image's pooled features, seen from their mean, to the
    mean tf-idf vector of its captions.
    """

    def __init__(self, vocabulary_size: int, tensors: Mapping[str, torch.Tensor], log_images: float, weight: float):
        """Args:
        tensors: `keys` int64 (G,) and `idf` (G,) of the n-grams, those of one word first; `sizes` int64 (4,) how many
            there are of each length; `centre` (C,) of the features, `project` (C + 1, R), `expect` (R, G).
        log_images: of `NgramTable`.
        weight: of the regression, against 1 for all the beam's captions together.
        """
        self.tensors, self.log_images, self.weight = dict(tensors), log_images, weight
        ends = self.tensors["sizes"].cumsum(0)[:-1].tolist()
        keys, idf = (np.split(self.tensors[name].numpy(), ends) for name in ("keys", "idf"))
        self.table = NgramTable(keys, [each.astype(np.float64) for each in idf], vocabulary_size + 1, log_images)
        self.project, self.expect = self.tensors["project"].float(), self.tensors["expect"].float()

    def expected(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return the weights (I, G) that the captions of images are expected to have. Args: pooled: features (I, C)."""
        return direction(pooled.float().cpu(), self.tensors["centre"].float()) @ self.project @ self.expect

    def evidence(self, found: Sequence[list[Hypothesis]], pooled: torch.Tensor) -> list[Evidence]:
        """Score the candidates of each image, which are its first H = CANDIDATES hypotheses at most.

        Args:
            found: the hypotheses of each image, best first.
            pooled: features (I, C) of the images.

        Returns:
            for each image the CIDEr-D (H,) of its candidates expected by the beam, and the CIDEr (H,) expected by the
            regression.
        """
        evidence = []
        for hypotheses, vector in zip(found, self.expected(pooled).numpy().astype(np.float64), strict=True):
            candidates = hypotheses[:CANDIDATES]
            ids = np.concatenate([np.array(each.ids, dtype=np.int64) for each in candidates])
            offsets = np.cumsum([0, *(len(each.ids) for each in candidates)])
            log_probabilities = np.array([each.log_probability for each in candidates])
            chances = np.exp((log_probabilities - log_probabilities.max()) / TEMPERATURE)
            by_beam = self.table.pairwise_cider(ids, offsets) @ (chances / chances.sum())
            evidence.append((by_beam, self.table.cider_to_vector(ids, offsets, vector)))
        return evidence

    def rank(self, found: Sequence[list[Hypothesis]], pooled: torch.Tensor) -> list[list[Hypothesis]]:
        """Sort each image's candidates by their evidence, best first. Args: as for `evidence`."""
        return [
            [hypotheses[n] for n in np.argsort(-(by_beam + self.weight * by_regression), kind="stable")]
            for hypotheses, (by_beam, by_regression) in zip(found, self.evidence(found, pooled), strict=True)
        ]

    def stored(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"tensors": self.tensors, "log_images": self.log_images, "weight": self.weight}


def direction(pooled: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Return what the regression reads, (I, C + 1): the direction of features (I, C) from the centre (C,), and a one."""
    directions = torch.nn.functional.normalize(pooled - centre)
    return torch.cat([directions, directions.new_ones(len(directions), 1)], 1)


def fit_head(data: CaptionSet, vocabulary: Vocabulary, pooled: Callable[[np.ndarray], torch.Tensor]) -> NgramHead:
    """Fit the regression to the training images, in closed form.

    Reduced-rank ridge regression (Izenman, 1975): of the ridge regression's predictions for the training images the RANK
    principal directions are kept.

    Args:
        pooled: returns the features (n, C) of images at these positions (n,).

    Returns:
        a head whose weight is 0 still.
    """
    train = data.splits["train"]
    batches = [train[start : start + FIT_BATCH] for start in range(0, len(train), FIT_BATCH)]
    table, owners, places, weights = training_ngrams(data, vocabulary)
    centre = sum(pooled(batch).double().sum(0) for batch in batches) / len(train)
    squares, products = 0, 0  # X'X and X'Y of directions X (T, C + 1) and tf-idf vectors Y (T, G)
    first = np.searchsorted(owners, np.arange(len(train) + 1))
    for number, batch in enumerate(batches):
        x = direction(pooled(batch).double(), centre)
