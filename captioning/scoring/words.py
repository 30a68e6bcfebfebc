"""What captions get wrong: the words they invent and miss, against what people say of the same images.

Texts are tokenized (`captioning.data.dataset.tokenize`), with their words joined by spaces. Lists in, counts out: the files
of a test are read by `captioning.runs.directories`.
"""

from __future__ import annotations

import functools
import importlib.util
import runpy
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Errors:
    """What a set of captions gets wrong."""

    unsupported: float  # see `unsupported_share`
    person_unsupported: float | None  # None where no image has two references
    invented: list[tuple[str, int, int]]  # word, captions that say it without any reference, captions that say it
    missed: list[tuple[str, int, int]]  # word, images where it is expected and not said, images where it is expected


# --------------------------------------------------------------------------------------------------
# Words that no reference has


@functools.cache
def stop_words() -> frozenset[str]:
    """Return spaCy's English stop words; its numbers to twelve and words of place such as "front" are among them.

    The file of that list is run by itself: importing spaCy takes seconds and brings PyTorch.
    """
    spacy = importlib.util.find_spec("spacy")
    if spacy is None or spacy.origin is None:
        raise ModuleNotFoundError("No module named 'spacy'", name="spacy")
    return frozenset(runpy.run_path(str(Path(spacy.origin).parent / "lang" / "en" / "stop_words.py"))["STOP_WORDS"])


def content_words(text: str) -> list[str]:
    """Return the words of a text that are no stop words, in their order."""
    return [word for word in text.split() if word not in stop_words()]


def unsupported_words(caption: str, references: Sequence[str]) -> list[str]:
    """Return the content words of a caption that none of its image's references has, as they are written."""
    known = {word for text in references for word in text.split()}
    return [word for word in content_words(caption) if word not in known]


def unsupported_counts(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the number of unsupported words and of content words of each caption: int64 (images, 2)."""
    pairs = zip(captions, references, strict=True)
    counts = [(len(unsupported_words(text, known)), len(content_words(text))) for text, known in pairs]
    return np.array(counts, np.int64).reshape(-1, 2)


def unsupported_share(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the share of all content words of the captions that no reference of their image has; 0 without any."""
    unsupported, content = unsupported_counts(captions, references).sum(0).tolist()
    return unsupported / max(1, content)


@functools.cache
def stemmer() -> Callable[[str], str]:
    """Return Porter's stemmer (1980), as nltk has it, which remembers its words."""
    from nltk.stem import PorterStemmer

    return functools.cache(PorterStemmer().stem)


def concepts(text: str) -> set[str]:
    """Return the stems of a text's content words."""
    return set(map(stemmer(), content_words(text)))


def sparcs(caption: str, references: Sequence[str]) -> float:
    """Return SPARCS (Feinglass and Yang, 2021): how well a caption says what the references of its image agree on.

    A concept weighs as much as the share of references that have it; one that none has weighs 1 in the caption. The
    score is the F1 of the weights, 0 to 1. Their stop words are nltk's, ours spaCy's.
    """
    said = Counter(concept for text in references for concept in concepts(text))
    weights = {concept: times / len(references) for concept, times in said.items()}
    own = concepts(caption)
    right = sum(weights.get(concept, 0.0) for concept in own)
    total = sum(weights.get(concept, 1.0) for concept in own) + sum(weights.values())  # F1 = 2 right / total
    return 2 * right / total if right else 0.0


def leave_one_out(references: Sequence[Sequence[str]]) -> list[tuple[list[str], list[list[str]]]]:
    """Return a person's captions, to be judged as a model's: each against the others of its image, one fewer.

    Images with one caption are left out. An image with fewer captions than others has some of them twice.

    Returns:
        captions and references for each turn, as many turns as an image has captions at most.
    """
    known = [captions for captions in references if len(captions) > 1]
    return [
        (
            [captions[turn % len(captions)] for captions in known],
            [[text for n, text in enumerate(captions) if n != turn % len(captions)] for captions in known],
        )
        for turn in range(max(map(len, known), default=0))
    ]


def find_errors(captions: Sequence[str], references: Sequence[Sequence[str]], size: int) -> Errors:
    """Return what captions get wrong, and the share of a person's words that is unsupported.

    A word is expected where at least half of an image's references have it: nobody has to say the word that one person
    of five chose.

    Args:
        captions: one for each image.
        references: all captions of each image by people.
        size: the length of each list of words.
    """
    said, invented, expected, missed = (Counter[str]() for _ in range(4))  # images, by word
    for caption, known in zip(captions, references, strict=True):
        words = set(content_words(caption))
        people = Counter(word for text in known for word in set(content_words(text)))
        common = {word for word, times in people.items() if 2 * times >= len(known)}
        said.update(words)
        invented.update(words - set(people))
        expected.update(common)
        missed.update(common - words)

    def ranked(wrong: Counter[str], total: Counter[str]) -> list[tuple[str, int, int]]:
        rows = [(word, times, total[word]) for word, times in wrong.items()]
        return sorted(rows, key=lambda row: (-row[1], -row[2], row[0]))[:size]

    shares = [unsupported_share(*turn) for turn in leave_one_out(references)]
    person = statistics.fmean(shares) if shares else None
    unsupported = unsupported_share(captions, references)
    return Errors(unsupported, person, ranked(invented, said), ranked(missed, expected))
