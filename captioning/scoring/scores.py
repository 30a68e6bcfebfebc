"""Scores by image: names, corpus BLEU, intervals and paired bootstraps. Knows nothing of captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# What each figure is, for tables and reports. All are fractions; CIDEr may exceed 1.
METRIC_NAMES = {
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "sparcs": "SPARCS",
    "meteor": "METEOR",
    "rouge": "rouge-score F1",
    "wer": "WER (min. over references)",
    "unsupported": "unsupported words",
}
MEANS = ("cider", "sparcs", "rouge_l", "wer")  # means over images; the others are made of summed counts
BY_IMAGE = (*MEANS, "sentence_bleu4", "unsupported", "content")  # beside BLEU's counts, in a test's files of scores
WITH_INTERVAL = (*MEANS, "bleu4", "unsupported")
FEW_IMAGES = 50  # with fewer, scores depend much on which images they are
BLOCK = 1_000_000  # elements of a block of resampled images: 8 MB, a few such arrays at a time


class ImageScores(NamedTuple):
    """The scores of a set of captions, by image: those whose mean is the score, and BLEU's counts."""

    cider: np.ndarray  # (n,)
    sparcs: np.ndarray  # (n,)
    rouge_l: np.ndarray  # (n,)
    rouge: np.ndarray  # (n,)
    wer: np.ndarray  # (n,)
    guess: np.ndarray  # (n, 4) n-grams of the caption
    correct: np.ndarray  # (n, 4) of these, found in the references (clipped)
    length: np.ndarray  # (n,) words of the caption
    reference_length: np.ndarray  # (n,) words of the reference that is closest in length
    sentence_bleu4: np.ndarray  # (n,) smoothed
    unsupported: np.ndarray  # (n,) content words of the caption that no reference has
    content: np.ndarray  # (n,) content words of the caption

    def bleu_counts(self) -> np.ndarray:
        """Return what `corpus_bleu` sums over images: (n, 10)."""
        return np.column_stack([self.correct, self.guess, self.length, self.reference_length])

    def summands(self) -> np.ndarray:
        """Return what `scores_of_sums` sums over images: (n, 17)."""
        means = [getattr(self, name) for name in MEANS]
        counts = (np.ones(len(self.cider)), self.unsupported, self.content)
        return np.column_stack([*means, *counts, self.bleu_counts()])


def corpus_bleu(totals: np.ndarray) -> np.ndarray:
    """Return BLEU-1..4 (Papineni et al., 2002) of corpora: closest reference length, no smoothing.

    The formula is the COCO evaluation's, with the small constants by which it avoids dividing by zero. nltk counts
    captions of fewer than four words differently, which moves the score of a thousand captions by 4e-5.

    Args:
        totals: (..., 10) `ImageScores.bleu_counts` of each corpus, summed over its images.

    Returns:
        (4, ...)
    """
    tiny, small = 1e-15, 1e-9
    correct, guess = np.moveaxis(totals[..., :4], -1, 0), np.moveaxis(totals[..., 4:8], -1, 0)  # (4, ...)
    logs = np.log((correct + tiny) / (guess + small)).cumsum(0)
    orders = np.arange(1, 5).reshape(4, *[1] * (logs.ndim - 1))
    ratio = (totals[..., 8] + tiny) / (totals[..., 9] + small)
    bleu: np.ndarray = np.exp(logs / orders + np.minimum(0, 1 - 1 / ratio))
    return bleu


def resampled_sums(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Sum a table over images that are drawn with replacement, as many as there are (Koehn, 2004).

    Args:
        values: (n, c) a row for each image.

    Returns:
        (samples, c); the same for the same seed, whatever the columns.
    """
    number = len(values)
    rng, rows = np.random.default_rng(seed), max(1, BLOCK // number)
    sums = np.empty((samples, values.shape[1]))
    for start in range(0, samples, rows):
        block = sums[start : start + rows]
        drawn = rng.integers(number, size=(len(block), number))
        drawn += number * np.arange(len(block))[:, None]
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)  # that each image was drawn
        block[:] = times.astype(np.float64) @ values
    return sums


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the bounds within which 95 % of the values (samples,) lie."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def scores_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return the scores of `WITH_INTERVAL` (..., 6) of sets of images, from the sums of `ImageScores.summands`."""
    number = len(MEANS)
    images, unsupported, content = np.moveaxis(sums[..., number : number + 3], -1, 0)
    bleu4 = corpus_bleu(sums[..., number + 3 :])[3]
    counted = np.stack([bleu4, unsupported / np.maximum(1, content)], -1)
    return np.concatenate([sums[..., :number] / images[..., None], counted], -1)


def bootstrap_intervals(scores: ImageScores, samples: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return intervals of 95 % over the choice of images, of the scores of `WITH_INTERVAL`."""
    drawn = scores_of_sums(resampled_sums(scores.summands(), samples, seed))  # (samples, 6)
    return {name: interval(values) for name, values in zip(WITH_INTERVAL, drawn.T, strict=True)}


def by_rank(scores: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Return positions of the `size` best, middle and worst of the scores (n,); groups of few images may overlap."""
    order = np.argsort(-scores, kind="stable")
    middle = max(0, (len(order) - size) // 2)
    return {"Best": order[:size], "Median": order[middle : middle + size], "Worst": order[-size:]}


class Difference(NamedTuple):
    """How much more the second of two systems has than the first on the same images, with the interval of 95 %."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], samples: int = 10_000, seed: int = 0
) -> dict[str, Difference]:
    """Draw the same images with replacement for two systems and see how the difference of their scores varies.

    A system of several trainings, say of three seeds, has the mean of their scores. The interval covers the choice of
    images, not of seeds.

    Args:
        first, second: of each of a system's trainings `ImageScores.summands`, all with the images in the same order.

    Returns:
        the differences of the scores of `WITH_INTERVAL`.
    """
    tables = np.stack([*first, *second], 1)  # (n, trainings, c)

    def difference(sums: np.ndarray) -> np.ndarray:
        found = scores_of_sums(sums.reshape(-1, *tables.shape[1:]))  # (samples, trainings, 6)
        return np.asarray(found[:, len(first) :].mean(1) - found[:, : len(first)].mean(1))

    values = tables.reshape(len(tables), -1)
    (means,), drawn = difference(values.sum(0)), difference(resampled_sums(values, samples, seed))
    return {
        name: Difference(float(mean), *interval(each))
        for name, mean, each in zip(WITH_INTERVAL, means, drawn.T, strict=True)
    }
