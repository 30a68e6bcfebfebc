"""Scores on worked examples and against the packages that define them; defect 9 of the original."""

import os
import stat
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu as nltk_corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

import metrics_utils
from captioning.scoring.cider import cider_of_each
from captioning.scoring.scores import ImageScores, bootstrap_intervals, corpus_bleu, paired_bootstrap
from metrics_utils import MetricFailed, meteor_scores, score_captions, score_images

REFERENCES = [["a dog runs over the grass", "the dog is running"], ["two men sit on a bench", "men on a bench"]]


def drawn_captions(images: int) -> tuple[list[str], list[list[str]]]:
    """Captions of common and rare words, long, short and empty, with one to five references each."""
    random = np.random.default_rng(0)
    words = ["a", "dog", "man", "runs", "on", "the", "grass", "red", "big", *(f"w{n}" for n in range(30))]
    draw = lambda most: " ".join(random.choice(words, random.integers(1, most), p=None))  # noqa: E731
    references = [[draw(14) for _ in range(random.integers(1, 6))] for _ in range(images)]
    hypotheses = [known[0] if n % 3 == 0 else draw(18) for n, known in enumerate(references)]
    return ["", *hypotheses[1:]], references


def coco_score(metric, hypotheses: list[str], references: list[list[str]], **options) -> tuple:
    """The score of a scorer of pycocoevalcap, and the scores by image."""
    known, generated = dict(enumerate(references)), {n: [text] for n, text in enumerate(hypotheses)}
    return metric.compute_score(known, generated, **options)


def coco_bleu(hypotheses: list[str], references: list[list[str]]) -> list[float]:
    return coco_score(Bleu(4), hypotheses, references, verbose=0)[0]


def test_scores_are_pycocoevalcaps_own():
    hypotheses, references = drawn_captions(60)
    scores, cider = score_captions(hypotheses, references), coco_score(Cider(), hypotheses, references)
    assert [scores[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx(coco_bleu(hypotheses, references), abs=1e-6)
    assert scores["cider"] == pytest.approx(cider[0], abs=1e-9)
    assert cider_of_each(hypotheses, references) == pytest.approx(cider[1], abs=1e-9)
    assert scores["rouge_l"] == pytest.approx(coco_score(Rouge(), hypotheses, references)[0], abs=1e-9)


TEXTS = st.lists(st.sampled_from("abc"), max_size=6).map(" ".join)
IMAGES = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4)


@given(st.lists(IMAGES, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_bleu_is_pycocoevalcaps_whatever_matches(corpora):
    """Several corpora at once, with captions that are empty or match nothing."""
    hypotheses, references = map(list, zip(*(image for corpus in corpora for image in corpus), strict=True))
    counts = score_images(hypotheses, references).bleu_counts()
    ends = np.cumsum([len(corpus) for corpus in corpora])
    ours = corpus_bleu(np.array([part.sum(0) for part in np.split(counts, ends[:-1])]))
    for corpus, bleu in zip(corpora, ours.T, strict=True):
        assert bleu == pytest.approx(coco_bleu(*map(list, zip(*corpus, strict=True))), abs=1e-6)


def nltk_bleu(hypotheses: list[str], references: list[list[str]], order: int) -> float:
    words = [[text.split() for text in known] for known in references]
    return nltk_corpus_bleu(words, [text.split() for text in hypotheses], [1 / order] * order)


def test_corpus_bleu_is_nltks_but_for_captions_under_four_words():
    hypotheses, references = drawn_captions(300)
    long = [n for n, text in enumerate(hypotheses) if len(text.split()) >= 4]
    hypotheses, references = [hypotheses[n] for n in long], [references[n] for n in long]
    scores = score_captions(hypotheses, references)
    for n in (1, 2, 3, 4):
        assert scores[f"bleu{n}"] == pytest.approx(nltk_bleu(hypotheses, references, n), abs=1e-6)
    hypotheses, references = [*hypotheses, "a dog"], [*references, ["a dog runs"]]
    difference = score_captions(hypotheses, references)["bleu4"] - nltk_bleu(hypotheses, references, 4)
    assert 1e-5 < difference < 1e-3  # nltk counts one n-gram where a caption is too short for any


def test_sentence_bleu_is_smoothed_by_one():
    # 4 of 5 words, 2 of 4 pairs, 1 of 3 and 0 of 2 longer ones; the reference has 6 words.
    found = score_images(["a dog runs on grass", "", "x"], [["a dog runs over the grass"], ["a"], ["a dog"]])
    expected = np.exp(1 - 6 / 5) * (4 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert found.sentence_bleu4 == pytest.approx([expected, 0, 0])


def test_a_perfect_caption_is_perfect():
    scores = score_captions([known[0] for known in REFERENCES], REFERENCES)
    assert scores["wer"] == 0 and scores["rouge"] == scores["rouge_l"] == 1 and scores["bleu4"] == pytest.approx(1)


def test_word_errors_are_against_the_nearest_reference():
    assert score_images(["the dog is sleeping", "men on a bench"], REFERENCES).wer.tolist() == [1 / 4, 0]


def test_an_image_without_references_is_refused():
    with pytest.raises(ValueError):
        score_captions(["a"], [[]])


def random_scores(images: int, seed: int) -> ImageScores:
    random = np.random.default_rng(seed)
    length = random.integers(1, 20, images)
    guess = np.maximum(length[:, None] - np.arange(4), 0)
    means = random.random((6, images))
    counts = guess, (guess * random.random((images, 4))).astype(int), length, random.integers(5, 15, images)
    content = random.integers(1, 9, images)
    return ImageScores(*means[:5], *counts, means[5], (content * random.random(images)).astype(int), content)


def test_intervals_are_those_of_resampled_images():
    scores = random_scores(50, 0)
    drawn = np.random.default_rng(3).integers(50, size=(300, 50))
    found = bootstrap_intervals(scores, samples=300, seed=3)
    assert found["wer"] == pytest.approx(np.quantile(scores.wer[drawn].mean(1), (0.025, 0.975)))
    bleu = [corpus_bleu(scores.bleu_counts()[row].sum(0))[3] for row in drawn]
    assert found["bleu4"] == pytest.approx(np.quantile(bleu, (0.025, 0.975)))
    shares = scores.unsupported[drawn].sum(1) / scores.content[drawn].sum(1)
    assert found["unsupported"] == pytest.approx(np.quantile(shares, (0.025, 0.975)))
    assert found == bootstrap_intervals(scores, samples=300, seed=3)


def test_of_several_trainings_the_mean_is_compared_on_the_same_resampled_images():
    first, second = [random_scores(50, seed) for seed in (0, 1, 2)], [random_scores(50, seed) for seed in (3, 4)]
    drawn = np.random.default_rng(7).integers(50, size=(300, 50))

    def scores(side: list[ImageScores], images: np.ndarray) -> np.ndarray:
        each = [[*(values[images].mean() for values in (s.cider, s.sparcs, s.rouge_l, s.wer)),
                 corpus_bleu(s.bleu_counts()[images].sum(0))[3],
                 s.unsupported[images].sum() / s.content[images].sum()] for s in side]  # fmt: skip
        return np.mean(each, 0)

    found = paired_bootstrap([each.summands() for each in first], [each.summands() for each in second], 300, seed=7)
    everything = np.arange(50)
    expected = np.array([scores(second, images) - scores(first, images) for images in drawn])
    assert [each.mean for each in found.values()] == pytest.approx(
        scores(second, everything) - scores(first, everything)
    )
    bounds = np.array([each[1:] for each in found.values()]).T
    assert bounds == pytest.approx(np.quantile(expected, (0.025, 0.975), axis=0))


def test_a_person_is_scored_against_the_others():
    known = [["a dog runs", "a dog runs"], ["two men sit", "one bird flies"], ["only one"]]
    scores = metrics_utils.person_scores(known)
    assert scores["wer"] == pytest.approx((0 + 1) / 2) and metrics_utils.person_scores([["only one"]]) == {}


def test_variety_counts_words_and_copies():
    found = metrics_utils.variety(["a dog runs", "a dog"], {"a dog"})
    assert found == {"distinct_words": 3, "mean_length": 2.5, "in_training": 0.5}


# --------------------------------------------------------------------------------------------------
# METEOR

METEOR = """
for line in sys.stdin:
    {noise}
    command, *parts = line.strip().split(" ||| ")
    if command == "SCORE":
        print(*[float(len(parts[-1].split()))] * 23)
    else:
        print(*[stats.split()[0] for stats in parts], sum(float(stats.split()[0]) for stats in parts), sep="\\n")
"""


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Make a Python program the Java of the PATH."""
    if os.name == "nt":
        pytest.skip("a script is not a program on Windows")

    def write(program: str) -> None:
        (tmp_path / "java").write_text(f"#!{sys.executable}\nimport sys\n{program}")
        (tmp_path / "java").chmod(stat.S_IRWXU)

    monkeypatch.setenv("PATH", str(tmp_path))
    return write


def test_what_java_prints_shifts_no_score(fake_java):
    systems, references = [["a dog", "a"], ["a b c", "d"]], [["x", "y"], ["z"]]
    fake_java(METEOR.format(noise="print('OpenJDK warning: 3'); print('x' * 10_000, file=sys.stderr)"))
    assert meteor_scores(systems, references) == [3, 4]


@pytest.mark.parametrize(
    "program, message",
    [
        ("print('The operation could not be completed', file=sys.stderr); sys.exit(1)", "exit code 1: The operation"),
        ("import time; print(flush=True); time.sleep(60)", "did not end within 0 s"),
        (METEOR.format(noise="print(*[1.0] * 23)"), "4 answers instead of 2"),
        ("sys.stdin.read()", "0 answers instead of 2"),
    ],
)
def test_java_that_fails_or_hangs_costs_that_metric_only(fake_java, monkeypatch, program, message):
    fake_java(program)
    monkeypatch.setattr(metrics_utils, "JAVA_SECONDS", 0.1 if "sleep" in program else 60)
    with pytest.raises(MetricFailed, match=message):
        meteor_scores([["a", "b"]], [["a"], ["b"]])


def test_a_missing_java_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MetricFailed, match="there is none on the PATH"):
        meteor_scores([["a"]], [["a"]])
