"""Scores of generated captions, as the field computes them.

Everything here takes strings that `captioning.data.dataset.tokenize` has split (lower case, no punctuation, words joined by
spaces): one hypothesis and all references for each image.

METEOR runs in Java. It raises `MetricFailed` rather than an error of its own, so that whatever happens there costs
METEOR only.
"""

from __future__ import annotations

import gzip
import math
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from captioning.io import printable
from captioning.scoring.cider import cider_of_each
from captioning.scoring.scores import ImageScores, corpus_bleu
from captioning.scoring.words import leave_one_out, sparcs, unsupported_counts

JAVA_SECONDS = 60.0  # for Java to start and to read its tables: about 5 on a laptop
METEOR_SECONDS = 0.1  # ... and for each caption: about 0.01
METEOR_COUNTS = 23  # numbers of a caption that METEOR's score is made of


def score_images(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> ImageScores:
    """Score captions one by one, with the COCO evaluation's own code where it has it.

    CIDEr takes its document frequencies from the given references: see `cider_of_each`.

    Args:
        hypotheses: one caption per image.
        references: all captions of each image.

    Raises:
        ValueError: nothing to score, or an image without references.
    """
    if not hypotheses or len(hypotheses) != len(references) or not all(references):
        raise ValueError("one hypothesis and at least one reference per image, and at least one image")
    import jiwer
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.rouge.rouge import Rouge
    from rouge_score.rouge_scorer import RougeScorer

    bleu, rouge, rouge_scorer = BleuScorer(n=4), Rouge(), RougeScorer(["rougeL"])
    smooth = SmoothingFunction().method2  # one more in every count of pairs and longer n-grams (Lin and Och, 2004)
    rouge_l, rouge_f1, wer, sentence_bleu4 = [], [], [], []
    for hypothesis, known in zip(hypotheses, references, strict=True):
        bleu += (hypothesis, list(known))
        rouge_l.append(rouge.calc_score([hypothesis], list(known)))
        rouge_f1.append(rouge_scorer.score_multi(known, hypothesis)["rougeL"].fmeasure)  # not the papers' ROUGE-L
        wer.append(min(jiwer.wer(reference, hypothesis) for reference in known))
        words = [text.split() for text in known]
        sentence_bleu4.append(float(sentence_bleu(words, hypothesis.split(), smoothing_function=smooth)))
    counts = bleu.ctest
    unsupported, content = unsupported_counts(hypotheses, references).T
    closest = [min((abs(length - c["testlen"]), length) for length in c["reflen"])[1] for c in counts]
    return ImageScores(
        cider=cider_of_each(hypotheses, references),
        sparcs=np.array(list(map(sparcs, hypotheses, references))),
        rouge_l=np.array(rouge_l),
        rouge=np.array(rouge_f1),
        wer=np.array(wer),
        guess=np.array([c["guess"] for c in counts]),
        correct=np.array([c["correct"] for c in counts]),
        length=np.array([c["testlen"] for c in counts]),
        reference_length=np.array(closest),
        sentence_bleu4=np.array(sentence_bleu4),
        unsupported=unsupported,
        content=content,
    )


def score_captions(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return every score of these captions that needs no Java: see `summarize`."""
    return summarize(score_images(hypotheses, references))


def summarize(scores: ImageScores) -> dict[str, float]:
    """Return `bleu1` .. `bleu4`, `bleu` (the original's name of `bleu4`), `rouge_l`, `cider`, `sparcs`, `rouge`, `wer`, `unsupported`."""
    bleu = corpus_bleu(scores.bleu_counts().sum(0))
    means = {name: float(getattr(scores, name).mean()) for name in ("rouge_l", "cider", "sparcs", "rouge", "wer")}
    means["unsupported"] = float(scores.unsupported.sum() / max(1, scores.content.sum()))
    return {"bleu": float(bleu[3]), **{f"bleu{n}": float(bleu[n - 1]) for n in (1, 2, 3, 4)}, **means}


def person_scores(references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return a person's own scores: each caption against the others of its image, averaged over the captions.

    The references are one fewer than a model has, which costs a person some points. Empty where no image has
    two captions.
    """
    turns = [score_captions(captions, others) for captions, others in leave_one_out(references)]
    return {name: statistics.fmean(scores[name] for scores in turns) for name in turns[0]} if turns else {}


def variety(hypotheses: Sequence[str], training_captions: set[str] | None) -> dict[str, float]:
    """Return `distinct_words` of all captions, `mean_length` in words, and the share `in_training` if that is known."""
    found = {
        "distinct_words": float(len({word for text in hypotheses for word in text.split()})),
        "mean_length": statistics.fmean(len(text.split()) for text in hypotheses),
    }
    if training_captions is not None:
        found["in_training"] = statistics.fmean(text in training_captions for text in hypotheses)
    return found


# --------------------------------------------------------------------------------------------------
# METEOR


class MetricFailed(Exception):
    """A metric has no score; the message says why, in one line."""


def meteor_scores(systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the METEOR of several systems' captions of the same images, by the COCO evaluation's own jar.

    A first process counts matches for each caption, a second one makes scores of the counts. Both read all of their
    input before anything waits for an answer, so that nothing which Java prints can shift one answer against another.

    Args:
        systems: for each system a caption per image.
        references: all captions of each image.

    Raises:
        MetricFailed: there is no Java that runs, or METEOR did not answer as it should.
    """
    from pycocoevalcap.meteor import meteor

    jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    command = [find_java(), "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    lines = []
    for hypotheses in systems:
        for hypothesis, known in zip(hypotheses, references, strict=True):
            lines.append(" ||| ".join(["SCORE", *(text.replace("|||", " ") for text in (*known, hypothesis))]))
    seconds = JAVA_SECONDS + METEOR_SECONDS * len(lines)
    counts = numbers(run_program(command, seconds, lines), METEOR_COUNTS, len(lines))
    images = len(references)
    lines = [" ||| ".join(["EVAL", *counts[start : start + images]]) for start in range(0, len(counts), images)]
    with tempfile.TemporaryDirectory() as folder:  # an empty table of paraphrases, which scores are not made of
        table = Path(folder) / "paraphrases.gz"
        table.write_bytes(gzip.compress(b""))
        answers = numbers(run_program([*command, "-a", str(table)], seconds, lines), 1, len(lines) * (images + 1))
    return [float(answers[(images + 1) * (n + 1) - 1]) for n in range(len(systems))]  # the last is of all captions


def find_java() -> str:
    """Return the path of Java. Raises MetricFailed where there is none."""
    java = shutil.which("java")
    if java is None:
        raise MetricFailed("it needs Java, and there is none on the PATH")
    return java


def run_program(command: list[str], seconds: float, lines: Sequence[str]) -> str:
    """Run a program to its end, with `lines` as its input, and return what it printed on standard output.

    Raises:
        MetricFailed: it cannot be started, takes longer than `seconds`, or ends with an error.
    """
    name, text = Path(command[0]).name, "".join(f"{line}\n" for line in lines)
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, timeout=seconds, encoding="utf-8", errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise MetricFailed(f"{name} did not end within {seconds:.0f} s") from None
    except OSError as error:
        raise MetricFailed(f"{name} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        reason = printable((done.stderr or done.stdout).strip().split("\n")[0][:200])
        raise MetricFailed(f"{name} ended with exit code {done.returncode}: {reason}")
    return done.stdout


def numbers(text: str, each: int, count: int) -> list[str]:
    """Return the lines that are `each` numbers, without the messages that Java prints among them.

    Raises:
        MetricFailed: there are not `count` such lines.
    """

    def is_answer(line: str) -> bool:
        try:
            return len(line.split()) == each and all(math.isfinite(float(word)) for word in line.split())
        except ValueError:
            return False

    found = [line for line in text.splitlines() if is_answer(line)]
    if len(found) != count:
        raise MetricFailed(f"Java gave {len(found)} answers instead of {count}")
    return found
