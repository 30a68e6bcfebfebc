"""Scores of generated captions, as the field computes them.

Everything here takes strings that `caption_data.tokenize` has split (lower case, no punctuation, words
joined by spaces): one hypothesis and all references for each image.
"""

from __future__ import annotations

import shutil
import statistics
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
    "meteor": "METEOR",
    "rouge": "rouge-score F1",
    "wer": "WER (min. over references)",
}


def bleu_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Corpus BLEU-1..4 (Papineni et al., 2002): closest reference length, no smoothing.

    The COCO evaluation's own code rather than nltk's, which counts captions of fewer than four words
    differently (by 4e-5 on a thousand Flickr8k captions).
    """
    from pycocoevalcap.bleu.bleu import Bleu

    generated = {image: [hypothesis] for image, hypothesis in enumerate(hypotheses)}
    known = {image: list(captions) for image, captions in enumerate(references)}
    scores = Bleu(4).compute_score(known, generated, verbose=0)[0]
    return [float(score) if score > 1e-6 else 0.0 for score in scores]  # without a match it leaves its epsilons


def word_error_rate(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over images of the smallest word error rate against any one reference (0 is perfect)."""
    import jiwer

    return statistics.fmean(
        min(jiwer.wer(reference, hypothesis) for reference in known)
        for hypothesis, known in zip(hypotheses, references, strict=True)
    )


def rouge_f1(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over images of rouge-score's ROUGE-L F1 against the best reference (not the papers' ROUGE-L)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return statistics.fmean(
        scorer.score_multi(known, hypothesis)["rougeL"].fmeasure
        for hypothesis, known in zip(hypotheses, references, strict=True)
    )


def coco_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], meteor: bool = False
) -> dict[str, float]:
    """ROUGE-L, CIDEr and, where Java is there and it is asked for, METEOR: the COCO evaluation's own code.

    CIDEr takes its document frequencies from the given references, so that it depends on how many images
    are scored; one image gives 0.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    generated = {image: [hypothesis] for image, hypothesis in enumerate(hypotheses)}
    known = {image: list(captions) for image, captions in enumerate(references)}
    scores = {
        "rouge_l": float(Rouge().compute_score(known, generated)[0]),
        "cider": float(Cider().compute_score(known, generated)[0]),
    }
    if meteor and has_java():
        from pycocoevalcap.meteor.meteor import Meteor

        scores["meteor"] = float(Meteor().compute_score(known, generated)[0])
    return scores


def has_java() -> bool:
    """METEOR runs in Java; without it the score is left out, by name."""
    return shutil.which("java") is not None


def score_captions(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], meteor: bool = False
) -> dict[str, float]:
    """Every score of these captions.

    Args:
        hypotheses: one caption per image.
        references: all captions of each image.
        meteor: METEOR too (15 s for 1,000 images; needs Java).

    Returns:
        `bleu1` .. `bleu4`, `bleu` (the same as `bleu4`, under the original's name), `rouge_l`, `cider`,
        `rouge`, `wer`, and `meteor` where it could be had.

    Raises:
        ValueError: nothing to score, or an image without references.
    """
    if not hypotheses or len(hypotheses) != len(references) or not all(references):
        raise ValueError("one hypothesis and at least one reference per image, and at least one image")
    bleu = bleu_scores(hypotheses, references)
    return {
        "bleu": bleu[3],
        **{f"bleu{n}": bleu[n - 1] for n in (1, 2, 3, 4)},
        **coco_scores(hypotheses, references, meteor),
        "rouge": rouge_f1(hypotheses, references),
        "wer": word_error_rate(hypotheses, references),
    }


def cider_of_each(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Every image's CIDEr (n,), whose mean is the score; document frequencies are those of all the references."""
    from pycocoevalcap.cider.cider import Cider

    generated = {image: [hypothesis] for image, hypothesis in enumerate(hypotheses)}
    each: np.ndarray = Cider().compute_score(dict(enumerate(map(list, references))), generated)[1]
    return each


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
