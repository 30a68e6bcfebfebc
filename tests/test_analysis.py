"""Words that captions invent and miss, and their nearest training captions, on examples worked by hand."""

from collections import Counter

import numpy as np
import pytest
from pycocoevalcap.rouge.rouge import my_lcs
from spacy.lang.en.stop_words import STOP_WORDS

from captioning.analysis import (
    SHARES,
    Tally,
    count_words,
    find_errors,
    nearest_texts,
    unsupported_share,
    unsupported_words,
    word_shares,
)
from captioning.dataset import tokenize
from captioning.scores import paired_bootstrap, shares_of_sums
from captioning.word_groups import FORMS, LISTS, stop_words
from metrics_utils import person_scores

# The first caption invents a colour and a place, the second misses the number and says "running" for "runs".
CAPTIONS = ["a black dog runs on the beach", "men running", ""]
REFERENCES = [
    ["a brown dog is running", "the dog runs fast", "a brown dog and a boy"],
    ["two men run", "two men in the snow"],
    ["a red car"],
]


def test_words_are_counted_where_they_are_said_and_where_they_should_be():
    counts = count_words(CAPTIONS, REFERENCES)
    assert counts.by_word == {
        # said, right, expected, found, known
        "black": (1, 0, 0, 0, 0), "dog": (1, 1, 1, 1, 1), "run": (2, 2, 2, 2, 2), "beach": (1, 0, 0, 0, 0),
        "brown": (0, 0, 1, 0, 1), "fast": (0, 0, 0, 0, 1), "boy": (0, 0, 0, 0, 1),
        "men": (1, 1, 1, 1, 1), "two": (0, 0, 1, 0, 1), "snow": (0, 0, 1, 0, 1),
        "red": (0, 0, 1, 0, 1), "car": (0, 0, 1, 0, 1),
    }  # fmt: skip
    colours = counts.of_group("colours")
    assert colours == (1, 0, 2, 0, 2) and colours.precision == 0 and colours.recall == 0
    assert counts.by_group["colours"].tolist() == [[1, 0, 1, 0, 1], [0] * 5, [0, 0, 1, 0, 1]]
    assert counts.of_group("places").precision == 0 and counts.of_group("places").recall == 0  # beach, snow
    assert counts.of_group("counts").precision is None and counts.of_group("counts").recall == 0
    assert counts.of_group("people").recall == 1  # that one person in three saw a boy is not held against the caption


def test_a_word_that_no_reference_has_is_unsupported_as_it_is_written():
    assert unsupported_words(CAPTIONS[0], REFERENCES[0]) == ["black", "beach"]
    assert unsupported_words(CAPTIONS[1], REFERENCES[1]) == ["running"]
    assert unsupported_words("two dogs and two cats", ["a dog"]) == ["dogs", "cats"]  # numbers are stop words
    assert unsupported_share(CAPTIONS, REFERENCES) == 3 / 6
    assert unsupported_share([""], [["a dog"]]) == unsupported_share(["it is"], [["a dog"]]) == 0


def test_a_persons_unsupported_words_are_against_the_others():
    known = [["a dog runs", "a dog sits"], ["two men", "men"], ["only one"]]
    assert person_scores(known)["unsupported"] == pytest.approx((1 / 3 + 1 / 3) / 2)  # runs, then sits, of three words


def test_what_goes_wrong_most_comes_first():
    found = find_errors([*CAPTIONS, "a black cat"], [*REFERENCES, ["a white cat", "a cat"]], 3)
    assert found.invented == [("black", 2, 2), ("beach", 1, 1)]
    assert found.missed == [("brown", 1, 1), ("car", 1, 1), ("red", 1, 1)]
    assert found.unsaid == [("brown", 1), ("car", 1), ("red", 1)]
    colours = found.groups[0]
    assert colours.name == "colours" and colours.model == (2, 0, 3, 0, 3)
    assert colours.words[0] == ("black", (2, 0, 0, 0, 0)) and len(colours.words) == 3
    # In three turns "brown" is said twice, each time with another who says it, and the one with "white" has two turns.
    assert colours.person == Tally(said=4, right=2, expected=4, found=2, known=4)
    assert found.unsupported == 4 / 8
    assert find_errors(["a dog"], [["a dog"]], 3).person_unsupported is None


def test_differences_of_shares_are_those_of_sums_over_images():
    said = CAPTIONS, ["a brown dog runs", "two men run", ""]
    worse, better = (word_shares(captions, REFERENCES).reshape(3, -1) for captions in said)
    found = dict(zip(SHARES, paired_bootstrap([worse], [better], shares_of_sums, samples=300), strict=True))
    assert found["unsupported"].mean == pytest.approx(0 - 3 / 6)
    assert found["colours: recall"].mean == pytest.approx(1 / 2) and found["colours: precision"].mean == 1
    assert found["things: precision"] is None and found["counts: precision"] is None  # nothing said, in one or both
    assert found["colours: recall"].low <= 1 / 2 <= found["colours: recall"].high
    same = paired_bootstrap([better], [better], shares_of_sums, samples=50)
    assert all(difference is None or difference == (0, 0, 0) for difference in same)


def test_the_nearest_training_caption_is_the_nearest_of_all():
    random = np.random.default_rng(0)
    draw = lambda most: " ".join(random.choice([*"abcdefgh"], random.integers(0, most)))  # noqa: E731
    texts, captions = [draw(9) for _ in range(50)], ["", "unheard a b", *(draw(9) for _ in range(10))]
    candidates = np.arange(3, 50, 2)
    for caption, found in zip(captions, nearest_texts(captions, tokenize(texts), candidates), strict=True):
        alike = {
            n: 2 * my_lcs(caption.split(), texts[n].split()) / max(1, len(caption.split() + texts[n].split()))
            for n in candidates.tolist()
        }
        assert found.text in alike and found.similarity == alike[found.text] == max(alike.values())
    assert my_lcs([*"abcbdab"], [*"bdcaba"]) == 4  # Cormen et al.'s example
    assert nearest_texts(["a b c"], tokenize(["a b", "c b a", "a b c"]), np.arange(3)) == [(2, 1.0)]


def test_a_word_is_in_one_list_and_no_two_tokens():
    forms = [form for text in LISTS.values() for forms in text.split() for form in forms.split("/")]
    assert [form for form, times in Counter(forms).items() if times > 1] == [] and len(FORMS) == len(forms)
    assert tokenize(forms).words == forms


def test_stop_words_are_spacys():
    assert stop_words() == STOP_WORDS
