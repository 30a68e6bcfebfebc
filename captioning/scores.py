"""Scores by image: names, corpus BLEU, intervals and paired bootstraps. Knows nothing of captions."""

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
    "unsupported": "unsupported words",
}
MEANS = ("cider", "rouge_l", "wer")  # scores with an interval that are means over images; BLEU-4 is not
BLOCK = 1_000_000  # elements of a block of resampled images: 8 MB, a few such arrays at a time


class ImageScores(NamedTuple):
    """The scores of a set of captions, by image: those whose mean is the score, and BLEU's counts."""

    cider: np.ndarray  # (n,)
    rouge_l: np.ndarray  # (n,)
    rouge: np.ndarray  # (n,)
    wer: np.ndarray  # (n,)
    guess: np.ndarray  # (n, 4) n-grams of the caption
    correct: np.ndarray  # (n, 4) of these, found in the references (clipped)
    length: np.ndarray  # (n,) words of the caption
    reference_length: np.ndarray  # (n,) words of the reference that is closest in length
    sentence_bleu4: np.ndarray  # (n,) smoothed; NaN where a file was written before it was stored

    def bleu_counts(self) -> np.ndarray:
        """Return what `corpus_bleu` sums over images: (n, 10)."""
        return np.column_stack([self.correct, self.guess, self.length, self.reference_length])


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


def bootstrap_intervals(scores: ImageScores, samples: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return intervals of 95 % over the choice of images: `cider`, `rouge_l`, `wer`, `bleu4`."""
    means = np.column_stack([getattr(scores, name) for name in MEANS])
    sums = resampled_sums(np.column_stack([means, scores.bleu_counts()]), samples, seed)
    found = dict(zip(MEANS, sums[:, : len(MEANS)].T / len(means), strict=True))
    found["bleu4"] = corpus_bleu(sums[:, len(MEANS) :])[3]
    return {name: interval(values) for name, values in found.items()}


def by_rank(scores: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Return positions of the `size` best, middle and worst of the scores (n,); groups of few images may overlap."""
    order = np.argsort(-scores, kind="stable")
    middle = max(0, (len(order) - size) // 2)
    return {"Best": order[:size], "Median": order[middle : middle + size], "Worst": order[-size:]}


class Difference(NamedTuple):
    """How much better the second of two systems is on the same images, with the interval of 95 %."""

    mean: float
    low: float
    high: float


def paired_bootstrap(first: np.ndarray, second: np.ndarray, samples: int = 10_000, seed: int = 0) -> Difference:
    """Draw the same images with replacement for both and see how the difference of means varies.

    The interval covers the choice of images, not the seeds of training.

    Args:
        first, second: a score for each image (n,), in the same order.
    """
    differences = second - first
    means = resampled_sums(differences[:, None], samples, seed)[:, 0] / len(differences)
    return Difference(float(differences.mean()), *interval(means))


def paired_shares(
    first: np.ndarray, second: np.ndarray, samples: int = 10_000, seed: int = 0
) -> list[Difference | None]:
    """Do as `paired_bootstrap` for shares: a sum over images of parts, over that of wholes.

    Args:
        first, second: (n, k, 2) part and whole of each image, for k shares.

    Returns:
        k differences; None where a whole is 0 in all images.
    """
    sums = resampled_sums(np.concatenate([first, second], 1).reshape(len(first), -1), samples, seed)
    parts, wholes = np.moveaxis(sums.reshape(samples, 2, -1, 2), -1, 0)  # each (samples, 2, k)
    with np.errstate(invalid="ignore"):
        drawn = np.diff(parts / wholes, axis=1)[:, 0]
        whole = np.diff([table.sum(0)[:, 0] / table.sum(0)[:, 1] for table in (first, second)], axis=0)[0]
    # A sample of images may lack a rare whole.
    return [
        None if np.isnan(mean) else Difference(float(mean), *interval(values[np.isfinite(values)]))
        for mean, values in zip(whole, drawn.T, strict=True)
    ]


def paired_bleu4(first: ImageScores, second: ImageScores, samples: int = 10_000, seed: int = 0) -> Difference:
    """Do as `paired_bootstrap` for BLEU-4, which is not a mean over images but made of their summed counts."""
    counts = np.column_stack([first.bleu_counts(), second.bleu_counts()])

    def difference(totals: np.ndarray) -> np.ndarray:
        return np.asarray(corpus_bleu(totals[..., 10:])[3] - corpus_bleu(totals[..., :10])[3])

    return Difference(float(difference(counts.sum(0))), *interval(difference(resampled_sums(counts, samples, seed))))
