"""What captions get wrong: the words they invent and miss, against what people say of the same images.

Texts are tokenized (`captioning.dataset.tokenize`), with their words joined by spaces. Lists in, counts out: the files
of a test are read by `captioning.runs`.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pycocoevalcap.rouge.rouge import my_lcs

from captioning.word_groups import FORMS, GROUPS, OTHER, stop_words

if TYPE_CHECKING:
    from captioning.dataset import Tokens


# What `word_shares` gives.
SHARES = ("unsupported", *(f"{group}: {kind}" for group in GROUPS for kind in ("precision", "recall")))


class Tally(NamedTuple):
    """In how many images a word is said and should be; of a group of words, the sum over its words."""

    said: int  # the caption has it
    right: int  # the caption has it, and so has at least one reference
    expected: int  # at least half of the references have it
    found: int  # at least half of the references have it, and so has the caption
    known: int  # at least one reference has it

    @property
    def precision(self) -> float | None:
        """The share of the captions that say it where a reference has it; None where no caption says it."""
        return self.right / self.said if self.said else None

    @property
    def recall(self) -> float | None:
        """The share of the images where half of the references have it whose caption says it; None without any.

        Half of them, since nobody has to say the word that one person of five chose. A share rather than a number, so
        that it means something where an image has one caption or two.
        """
        return self.found / self.expected if self.expected else None


@dataclass(frozen=True)
class WordCounts:
    """What captions say, by word and by group of words."""

    by_word: dict[str, Tally]  # the forms of a word under the first of them
    by_group: dict[str, np.ndarray]  # of every group int64 (images, 5): the columns of `Tally`

    def of_group(self, group: str) -> Tally:
        return Tally(*self.by_group[group].sum(0).tolist())


@dataclass(frozen=True)
class GroupErrors:
    """How well captions say the words of one group."""

    name: str
    model: Tally
    person: Tally | None  # None where no image has two references
    words: list[tuple[str, Tally]]  # the most frequent


@dataclass(frozen=True)
class Errors:
    """What a set of captions gets wrong."""

    groups: list[GroupErrors]  # in the order of `GROUPS`
    invented: list[tuple[str, int, int]]  # word, captions that say it without any reference, captions that say it
    missed: list[tuple[str, int, int]]  # word, images where it is expected and not said, images where it is expected
    unsaid: list[tuple[str, int]]  # word that no caption says, images where a reference has it
    unsupported: float  # see `unsupported_share`
    person_unsupported: float | None


class Nearest(NamedTuple):
    """The text that is closest to a caption."""

    text: int  # its number
    similarity: float  # 0 .. 1


# --------------------------------------------------------------------------------------------------
# Words said and missed


def count_words(captions: Sequence[str], references: Sequence[Sequence[str]]) -> WordCounts:
    """Count for every word in how many images it is said and should be; how often a caption has it does not matter.

    Args:
        captions: one for each image.
        references: all captions of each image by people.
    """
    by_word: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(5, np.int64))
    by_group = {group: np.zeros((len(captions), 5), np.int64) for group in GROUPS}
    for image, (caption, known) in enumerate(zip(captions, references, strict=True)):
        said = claims(caption)
        people = Counter(word for text in known for word in claims(text))
        for word in said | {*people}:
            is_said, is_known, is_expected = word in said, people[word] > 0, 2 * people[word] >= len(known)
            row = (is_said, is_said and is_known, is_expected, is_expected and is_said, is_known)
            by_word[word] += row
            by_group[group_of(word)][image] += row
    return WordCounts({word: Tally(*row.tolist()) for word, row in by_word.items()}, by_group)


def claims(text: str) -> set[str]:
    """Return the words of a text that claim something of the picture, each in the first of its forms.

    These are the words of the lists, numbers among them, and all others that are no stop words.
    """
    return {FORMS[w][0] if w in FORMS else w for w in text.split() if w in FORMS or w not in stop_words()}


def group_of(word: str) -> str:
    """Return the group of a word of `claims`."""
    return FORMS[word][1] if word in FORMS else OTHER


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
    """Return what captions get wrong, and how a person does in the same.

    Args:
        captions, references: as `count_words`.
        size: the length of each list of words.
    """
    counts, turns = count_words(captions, references), leave_one_out(references)
    person = [count_words(*turn) for turn in turns]
    words = sorted(counts.by_word.items(), key=lambda pair: (-pair[1].said - pair[1].expected, pair[0]))
    groups = []
    for group in GROUPS:
        tallies = [each.of_group(group) for each in person]
        frequent = [pair for pair in words if group_of(pair[0]) == group and pair[1].said + pair[1].expected]
        sums = Tally(*map(sum, zip(*tallies, strict=True))) if tallies else None
        groups.append(GroupErrors(group, counts.of_group(group), sums, frequent[:size]))
    invented = [(word, t.said - t.right, t.said) for word, t in words if t.said > t.right]
    missed = [(word, t.expected - t.found, t.expected) for word, t in words if t.expected > t.found]
    unsaid = [(word, t.known) for word, t in words if not t.said]
    shares = [unsupported_share(*turn) for turn in turns]
    return Errors(
        groups,
        sorted(invented, key=lambda row: -row[1])[:size],
        sorted(missed, key=lambda row: -row[1])[:size],
        sorted(unsaid, key=lambda row: -row[1])[:size],
        unsupported_share(captions, references),
        statistics.fmean(shares) if shares else None,
    )


# --------------------------------------------------------------------------------------------------
# Words that no reference has


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


def word_shares(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the part and the whole of each of `SHARES` in each image: int64 (images, shares, 2)."""
    by_group = count_words(captions, references).by_group
    rates = [by_group[group][:, [[1, 0], [3, 2]]] for group in GROUPS]  # right of said, found of expected
    return np.concatenate([unsupported_counts(captions, references)[:, None], *rates], axis=1)


# --------------------------------------------------------------------------------------------------
# Copies


def nearest_texts(captions: Sequence[str], tokens: Tokens, texts: np.ndarray) -> list[Nearest]:
    """Return for each caption the closest of some texts.

    The similarity is ROUGE-L (Lin, 2004) with equal weights: 2 x the longest common subsequence of words, over the
    words of both. Words in common bound it from above, so that few subsequences have to be computed.

    Args:
        tokens: of a data set.
        texts: int64 (T,) numbers of the texts to choose from, at least one.
    """
    number = {word: n for n, word in enumerate(tokens.words)}
    starts, ends = tokens.offsets[texts], tokens.offsets[texts + 1]
    found = []
    for caption in captions:
        words = [number.get(word, -1) for word in caption.split()]
        has = np.zeros(len(tokens.words) + 1, bool)
        has[words] = True
        has[-1] = False  # words that the data set lacks
        shared = np.concatenate([[0], np.cumsum(has[tokens.ids])])
        sizes = np.maximum(1, len(words) + ends - starts)
        bounds = 2 * np.minimum(shared[ends] - shared[starts], len(words)) / sizes
        best = Nearest(int(texts[0]), 0.0)
        for place in np.argsort(-bounds, kind="stable").tolist():
            if bounds[place] <= best.similarity:
                break
            common = my_lcs(words, tokens.ids[starts[place] : ends[place]].tolist())
            if 2 * common / sizes[place] > best.similarity:
                best = Nearest(int(texts[place]), float(2 * common / sizes[place]))
        found.append(best)
    return found
