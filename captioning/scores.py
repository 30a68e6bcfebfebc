"""Scores image by image: names, corpus BLEU, intervals and paired bootstraps. Knows nothing of captions."""

from __future__ import annotations

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
    "meteor": "METEOR",
    "spice": "SPICE",
    "rouge": "rouge-score F1",
    "wer": "WER (min. over references)",
}


class ImageScores(NamedTuple):
    """What the scores of a caption set are made of, image by image: means over (n,), and BLEU's counts."""

    cider: np.ndarray  # (n,)
    rouge_l: np.ndarray  # (n,)
    rouge: np.ndarray  # (n,)
    wer: np.ndarray  # (n,)
    guess: np.ndarray  # (n, 4) n-grams of the caption
    correct: np.ndarray  # (n, 4) of these, found in the references (clipped)
    length: np.ndarray  # (n,) words of the caption
    reference_length: np.ndarray  # (n,) words of the reference that is closest in length


def corpus_bleu(scores: ImageScores, images: np.ndarray) -> np.ndarray:
    """BLEU-1..4 of the images (..., k) as one corpus (Papineni et al., 2002): closest reference length, no smoothing.

    nltk counts captions of fewer than four words differently (by 4e-5 on a thousand Flickr8k captions); this is
    the COCO evaluation's.

    Returns:
        (4, ...): a score for each row of `images`.
    """
    correct, guess = scores.correct[images].sum(-2), scores.guess[images].sum(-2)  # (..., 4)
    precision = np.moveaxis(correct / np.maximum(guess, 1), -1, 0)  # (4, ...)
    with np.errstate(divide="ignore"):
        logs = np.log(precision).cumsum(0) / np.arange(1, 5).reshape(4, *[1] * (precision.ndim - 1))
    length, wanted = scores.length[images].sum(-1), scores.reference_length[images].sum(-1)
    penalty = np.exp(np.minimum(0, 1 - wanted / np.maximum(length, 1)))
    bleu: np.ndarray = np.exp(logs) * penalty
    return bleu


def bootstrap_intervals(scores: ImageScores, samples: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Intervals of 95 % over the choice of images (Koehn, 2004): `cider`, `rouge_l`, `wer`, `bleu4`."""
    drawn = np.random.default_rng(seed).integers(len(scores.cider), size=(samples, len(scores.cider)))
    found = {name: getattr(scores, name)[drawn].mean(1) for name in ("cider", "rouge_l", "wer")}
    found["bleu4"] = corpus_bleu(scores, drawn)[3]
    return {name: tuple(np.quantile(values, (0.025, 0.975)).tolist()) for name, values in found.items()}


def by_rank(scores: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Positions of the `size` best, middle and worst of the scores (n,); groups of few images may overlap."""
    order = np.argsort(-scores, kind="stable")
    middle = max(0, (len(order) - size) // 2)
    return {"Best": order[:size], "Median": order[middle : middle + size], "Worst": order[-size:]}


class Difference(NamedTuple):
    """How much better the second of two systems is on the same images, with the interval of 95 %."""

    mean: float
    low: float
    high: float


def paired_bootstrap(first: np.ndarray, second: np.ndarray, samples: int = 10_000, seed: int = 0) -> Difference:
    """Draw the same images with replacement for both (Koehn, 2004) and see how the difference of means varies.

    The interval covers the choice of images, not the seeds of training.

    Args:
        first, second: a score for each image (n,), in the same order.
    """
    differences = second - first
    drawn = np.random.default_rng(seed).integers(len(differences), size=(samples, len(differences)))
    low, high = np.quantile(differences[drawn].mean(1), (0.025, 0.975))
    return Difference(float(differences.mean()), float(low), float(high))


def paired_bleu4(first: ImageScores, second: ImageScores, samples: int = 10_000, seed: int = 0) -> Difference:
    """`metrics_utils.paired_bootstrap` for BLEU-4, which is no mean over images but made of their summed counts."""

    def difference(images: np.ndarray) -> np.ndarray:
        return np.asarray(corpus_bleu(second, images)[3] - corpus_bleu(first, images)[3])

    number, rng = len(first.length), np.random.default_rng(seed)
    parts = [difference(rng.integers(number, size=(100, number))) for _ in range(samples // 100)]
    low, high = np.quantile(np.concatenate(parts), (0.025, 0.975))
    return Difference(float(difference(np.arange(number))), float(low), float(high))
