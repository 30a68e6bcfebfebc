"""Words that captions invent and miss, on examples worked by hand."""

import pytest
from spacy.lang.en.stop_words import STOP_WORDS

from captioning.scoring.words import find_errors, sparcs, stop_words, unsupported_share, unsupported_words
from metrics_utils import person_scores

# The first caption invents a colour and a place, the second misses the number and says "running" for "run".
CAPTIONS = ["a black dog runs on the beach", "men running", ""]
REFERENCES = [
    ["a brown dog is running", "the dog runs fast", "a brown dog and a boy"],
    ["two men run", "two men in the snow"],
    ["a red car"],
]


def test_a_word_that_no_reference_has_is_unsupported_as_it_is_written():
    assert unsupported_words(CAPTIONS[0], REFERENCES[0]) == ["black", "beach"]
    assert unsupported_words(CAPTIONS[1], REFERENCES[1]) == ["running"]
    assert unsupported_words("two dogs and two cats", ["a dog"]) == ["dogs", "cats"]  # numbers are stop words
    assert unsupported_share(CAPTIONS, REFERENCES) == 3 / 6
    assert unsupported_share([""], [["a dog"]]) == unsupported_share(["it is"], [["a dog"]]) == 0


def test_sparcs_weighs_concepts_by_the_references_that_have_them():
    known = ["a dog runs on the beach", "two dogs running"]  # dog 1, run 1, beach 1/2
    assert sparcs("the dog runs", known) == pytest.approx(2 * 2 / (2 + 2.5))
    assert sparcs("a dog on the beach", known) == pytest.approx(2 * 1.5 / (1.5 + 2.5))
    assert sparcs("a cat runs", known) == pytest.approx(2 * 1 / (2 + 2.5))  # what nobody says weighs 1
    assert sparcs("a cat", known) == sparcs("", known) == sparcs("a dog", ["it is"]) == 0


def test_a_persons_unsupported_words_are_against_the_others():
    known = [["a dog runs", "a dog sits"], ["two men", "men"], ["only one"]]
    expected = pytest.approx((1 / 3 + 1 / 3) / 2)  # runs, then sits, of three words
    assert person_scores(known)["unsupported"] == expected
    assert find_errors(["a dog", "men", "one"], known, 3).person_unsupported == expected
    assert find_errors(["a dog"], [["a dog"]], 3).person_unsupported is None


def test_what_goes_wrong_most_comes_first():
    found = find_errors([*CAPTIONS, "a black cat"], [*REFERENCES, ["a white cat", "a cat"]], 3)
    assert found.invented == [("black", 2, 2), ("beach", 1, 1), ("running", 1, 1)]
    # Half of the references have each; that one person in three saw a boy is not held against the caption.
    assert found.missed == [("brown", 1, 1), ("car", 1, 1), ("red", 1, 1)]
    assert found.unsupported == 4 / 8


def test_stop_words_are_spacys():
    assert stop_words() == STOP_WORDS
