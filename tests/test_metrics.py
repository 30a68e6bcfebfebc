"""Scores on worked examples; defect 9 of the original."""

import subprocess
import sys
import threading

import numpy as np
import pycocoevalcap.meteor.meteor as meteor
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioning.scores import bootstrap_intervals, paired_bootstrap
from metrics_utils import (
    coco_form,
    meteor_score,
    person_scores,
    score_captions,
    score_images,
    variety,
    word_error_rates,
)

REFERENCES = [["a dog runs over the grass", "the dog is running"], ["two men sit on a bench", "men on a bench"]]


def drawn_captions(images: int) -> tuple[list[str], list[list[str]]]:
    """Captions of common and rare words, long, short and empty, with one to five references each."""
    random = np.random.default_rng(0)
    words = ["a", "dog", "man", "runs", "on", "the", "grass", "red", "big", *(f"w{n}" for n in range(30))]
    draw = lambda most: " ".join(random.choice(words, random.integers(1, most), p=None))  # noqa: E731
    references = [[draw(14) for _ in range(random.integers(1, 6))] for _ in range(images)]
    hypotheses = [known[0] if n % 3 == 0 else draw(18) for n, known in enumerate(references)]
    return ["", *hypotheses[1:]], references


def test_scores_are_pycocoevalcaps_own():
    hypotheses, references = drawn_captions(60)
    generated, known = coco_form(hypotheses, references)
    scores = score_captions(hypotheses, references)
    bleu = Bleu(4).compute_score(known, generated, verbose=0)[0]
    assert [scores[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu, abs=1e-6)
    assert scores["cider"] == pytest.approx(Cider().compute_score(known, generated)[0], abs=1e-9)
    assert scores["rouge_l"] == pytest.approx(Rouge().compute_score(known, generated)[0], abs=1e-9)


def test_a_perfect_caption_is_perfect():
    scores = score_captions([known[0] for known in REFERENCES], REFERENCES)
    assert (
        scores["wer"] == 0 and scores["rouge"] == 1 and scores["bleu4"] == pytest.approx(1) and scores["rouge_l"] == 1
    )


def test_word_errors_are_against_the_nearest_reference():
    assert word_error_rates(["the dog is sleeping", "men on a bench"], REFERENCES).tolist() == [1 / 4, 0]


def test_bleu_by_hand():
    # 4 of 5 words, 2 of 4 pairs; the closest reference has 6 words: exp(1 - 6/5).
    scores = score_captions(["a dog runs on grass"], [["a dog runs over the grass"]])
    penalty = 2.718281828 ** (1 - 6 / 5)
    assert scores["bleu1"] == pytest.approx(penalty * 4 / 5, abs=1e-6)
    assert scores["bleu2"] == pytest.approx(penalty * (4 / 5 * 2 / 4) ** 0.5, abs=1e-6)


def test_no_match_is_zero():
    scores = score_captions(["x"], [["a dog runs"]])
    assert [scores[f"bleu{n}"] for n in (1, 2, 3, 4)] == [0, 0, 0, 0]


def test_cider_weighs_words_by_rarity():
    common = score_captions(["a dog runs over the grass", "a man"], REFERENCES)["cider"]
    assert 0 < common < score_captions([known[0] for known in REFERENCES], REFERENCES)["cider"]


def test_an_image_without_references_is_refused():
    with pytest.raises(ValueError):
        score_captions(["a"], [[]])


def test_intervals_hold_the_score_and_shrink_with_more_images():
    widths = []
    for images in (40, 640):
        hypotheses, references = drawn_captions(images)
        each = score_images(hypotheses, references)
        scores, bounds = score_captions(hypotheses, references), bootstrap_intervals(each)
        assert all(bounds[name][0] < scores[name] < bounds[name][1] for name in ("cider", "rouge_l", "wer", "bleu4"))
        widths.append(bounds["rouge_l"][1] - bounds["rouge_l"][0])
    assert widths[1] < 0.4 * widths[0]  # a fourth, but for chance


def test_paired_differences_are_narrower_than_the_scores():
    scores = np.random.default_rng(0).random(300)
    found = paired_bootstrap(scores, scores + 0.01)
    assert found.mean == pytest.approx(0.01) and found.low == pytest.approx(found.high)


def test_a_person_is_scored_against_the_others():
    known = [["a dog runs", "a dog runs"], ["two men sit", "one bird flies"], ["only one"]]
    scores = person_scores(known)
    assert scores["wer"] == pytest.approx((0 + 1) / 2) and person_scores([["only one"]]) == {}


def test_variety_counts_words_and_copies():
    found = variety(["a dog runs", "a dog"], {"a dog"})
    assert found == {"distinct_words": 3, "mean_length": 2.5, "in_training": 0.5}


def test_stopping_meteor_leaves_nothing_to_wait_for(monkeypatch):
    class Interrupted(meteor.Meteor):
        def __init__(self):
            self.lock = threading.Lock()
            self.meteor_p = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
            self.meteor_p.stdin.write("unread")
            made.append(self)

        def compute_score(self, known, generated):
            self.lock.acquire()  # as the package does, which does not let go of it
            raise KeyboardInterrupt

    made: list[meteor.Meteor] = []
    monkeypatch.setattr(meteor, "Meteor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        meteor_score(["a dog"], [["a dog"]])
    (scorer,) = made
    assert not scorer.lock.locked() and scorer.meteor_p.wait(timeout=10) != 0
