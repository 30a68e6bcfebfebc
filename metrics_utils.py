"""Scores of generated captions, as the field computes them.

Everything here takes strings that `caption_data.tokenize` has split (lower case, no punctuation, words
joined by spaces): one hypothesis and all references for each image.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from captioning.io import UserError, first_line
from captioning.scores import ImageScores, corpus_bleu


def score_images(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> ImageScores:
    """Score captions one by one, with the COCO evaluation's own code where it has it.

    CIDEr takes its document frequencies from the given references, so that it depends on how many images are
    scored; one image gives 0.

    Args:
        hypotheses: one caption per image.
        references: all captions of each image.

    Raises:
        ValueError: nothing to score, or an image without references.
    """
    if not hypotheses or len(hypotheses) != len(references) or not all(references):
        raise ValueError("one hypothesis and at least one reference per image, and at least one image")
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    generated, known = coco_form(hypotheses, references)
    bleu = BleuScorer(n=4)
    for hypothesis, captions in zip(hypotheses, references, strict=True):
        bleu += (hypothesis, list(captions))
    counts = bleu.ctest
    closest = [min((abs(length - c["testlen"]), length) for length in c["reflen"])[1] for c in counts]
    return ImageScores(
        np.asarray(Cider().compute_score(known, generated)[1]), np.asarray(Rouge().compute_score(known, generated)[1]),
        rouge_f1(hypotheses, references), word_error_rates(hypotheses, references),
        np.array([c["guess"] for c in counts]), np.array([c["correct"] for c in counts]),
        np.array([c["testlen"] for c in counts]), np.array(closest),
    )  # fmt: skip


def coco_form(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """The dictionaries that pycocoevalcap takes."""
    return {i: [text] for i, text in enumerate(hypotheses)}, {i: list(texts) for i, texts in enumerate(references)}


def word_error_rates(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """The smallest word error rate of each caption against any one reference (n,); 0 is perfect."""
    import jiwer

    return np.array(
        [
            min(jiwer.wer(reference, hypothesis) for reference in known)
            for hypothesis, known in zip(hypotheses, references, strict=True)
        ]
    )


def rouge_f1(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """rouge-score's ROUGE-L F1 of each caption against its best reference (n,); not the papers' ROUGE-L."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return np.array(
        [
            scorer.score_multi(known, hypothesis)["rougeL"].fmeasure
            for hypothesis, known in zip(hypotheses, references, strict=True)
        ]
    )


def has_java() -> bool:
    """METEOR and SPICE run in Java; without it METEOR is left out, by name."""
    return shutil.which("java") is not None


def meteor_score(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR by the COCO evaluation's own jar: 15 s for 1,000 images; needs Java."""
    from pycocoevalcap.meteor.meteor import Meteor

    generated, known = coco_form(hypotheses, references)
    scorer = Meteor()
    try:
        return float(scorer.compute_score(known, generated)[0])
    except BaseException:  # Ctrl-C leaves its lock held, for which its __del__ would wait for ever
        scorer.meteor_p.kill()
        with suppress(OSError):
            scorer.meteor_p.stdin.close()
        if scorer.lock.locked():
            scorer.lock.release()
        raise


def spice_score(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """SPICE, which fetches Stanford CoreNLP when it is used for the first time, and takes minutes.

    Raises:
        UserError: no Java, or what it needs could not be fetched.
    """
    if not has_java():
        raise UserError("--spice needs Java (any version from 8 on), and there is none on the path")
    from pycocoevalcap.spice.spice import Spice

    generated, known = coco_form(hypotheses, references)
    try:
        return float(Spice().compute_score(known, generated)[0])
    except Exception as error:  # subprocess, urllib and zipfile errors
        raise UserError(f"--spice failed ({first_line(error)}): leave it out, or give it network and 8 GB") from error


def score_captions(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Every score of these captions that needs no Java: see `summarize`."""
    return summarize(score_images(hypotheses, references))


def summarize(scores: ImageScores) -> dict[str, float]:
    """`bleu1` .. `bleu4`, `bleu` (the same as `bleu4`, under the original's name), `rouge_l`, `cider`, `rouge`, `wer`."""
    bleu = corpus_bleu(scores, np.arange(len(scores.cider)))
    means = {name: float(getattr(scores, name).mean()) for name in ("rouge_l", "cider", "rouge", "wer")}
    return {"bleu": float(bleu[3]), **{f"bleu{n}": float(bleu[n - 1]) for n in (1, 2, 3, 4)}, **means}


def person_scores(references: Sequence[Sequence[str]]) -> dict[str, float]:
    """A person's own scores: each caption against the others of its image, in turn, the mean over the turns.

    The references are one fewer than a model has, which costs a person some points. Empty where no image has
    two captions.
    """
    known = [captions for captions in references if len(captions) > 1]
    turns = []
    for turn in range(max(map(len, known), default=0)):
        hypotheses = [captions[turn % len(captions)] for captions in known]
        others = [[text for n, text in enumerate(captions) if n != turn % len(captions)] for captions in known]
        turns.append(score_captions(hypotheses, others))
    return {name: statistics.fmean(scores[name] for scores in turns) for name in turns[0]} if turns else {}


def variety(hypotheses: Sequence[str], training_captions: set[str]) -> dict[str, float]:
    """`distinct_words` of all captions together, `mean_length` in words, and the share `in_training` that stands there."""
    return {
        "distinct_words": float(len({word for text in hypotheses for word in text.split()})),
        "mean_length": statistics.fmean(len(text.split()) for text in hypotheses),
        "in_training": statistics.fmean(text in training_captions for text in hypotheses),
    }


def cider_of_each(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Every image's CIDEr (n,), whose mean is the score; document frequencies are those of all the references."""
    from pycocoevalcap.cider.cider import Cider

    generated, known = coco_form(hypotheses, references)
    each: np.ndarray = Cider().compute_score(known, generated)[1]
    return each
