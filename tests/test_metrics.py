"""Scores on worked examples; defect 9 of the original."""

import pytest

from metrics_utils import bleu_scores, coco_scores, score_captions, word_error_rate

REFERENCES = [["a dog runs over the grass", "the dog is running"], ["two men sit on a bench", "men on a bench"]]


def test_a_perfect_caption_is_perfect():
    scores = score_captions([known[0] for known in REFERENCES], REFERENCES)
    assert (
        scores["wer"] == 0 and scores["rouge"] == 1 and scores["bleu4"] == pytest.approx(1) and scores["rouge_l"] == 1
    )


def test_word_errors_are_against_the_nearest_reference():
    assert word_error_rate(["the dog is sleeping"], REFERENCES[:1]) == pytest.approx(1 / 4)
    assert word_error_rate(["the dog is sleeping", "men on a bench"], REFERENCES) == pytest.approx(1 / 8)


def test_bleu_by_hand():
    # 4 of 5 words, 2 of 4 pairs; the closest reference has 6 words: exp(1 - 6/5).
    bleu = bleu_scores(["a dog runs on grass"], [["a dog runs over the grass"]])
    penalty = 2.718281828 ** (1 - 6 / 5)
    assert bleu[0] == pytest.approx(penalty * 4 / 5, abs=1e-6)
    assert bleu[1] == pytest.approx(penalty * (4 / 5 * 2 / 4) ** 0.5, abs=1e-6)


def test_no_match_is_zero():
    assert bleu_scores(["x"], [["a dog runs"]]) == [0, 0, 0, 0]


def test_cider_weighs_words_by_rarity():
    common = coco_scores(["a dog runs over the grass", "a man"], REFERENCES)["cider"]
    assert 0 < common < coco_scores([known[0] for known in REFERENCES], REFERENCES)["cider"]


def test_an_image_without_references_is_refused():
    with pytest.raises(ValueError):
        score_captions(["a"], [[]])
