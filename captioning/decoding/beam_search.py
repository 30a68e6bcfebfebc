"""Beam search and sampling, on NumPy arrays: the model behind them may be PyTorch's or an exported one."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from captioning.data.dataset import EOS, SOS


class Hypothesis(NamedTuple):
    """One generated caption."""

    ids: list[int]  # words, without <SOS> and <EOS>
    log_probability: float  # of all its words and, where it ended by itself, of <EOS>
    score: float  # log_probability / length ** length_penalty, by which hypotheses are ranked
    attention: np.ndarray | None  # (words, 49) alphas, each row sums to one
    log_probabilities: list[float]  # of each word and, where it ended by itself, of <EOS>: they sum to log_probability


class NextWords(NamedTuple):
    """The likeliest next words of every row, the likeliest first."""

    ids: np.ndarray  # int64 (rows, M)
    log_probabilities: np.ndarray  # float32 (rows, M)
    alphas: np.ndarray | None  # (rows, 49) where the model looked, None without attention


Banned = tuple[np.ndarray, np.ndarray]  # rows and words, int64 (n,) each: this word may not follow in this row


class Reading(Protocol):
    """Images that a model has read, and captions of them in progress: `decoders.ensemble.Ensemble`, `models.exported`.

    A row is a caption. At first each image has one; the rows of an image lie next to each other, and every image has
    equally many. A model of several members or views averages their probabilities.
    """

    images: int
    vocabulary_size: int  # V
    has_attention: bool

    @property
    def pooled(self) -> list[np.ndarray]:
        """What consensus knows of the images: features (I, C), of each decoder."""

    def step(self, ids: np.ndarray, most: int, banned: Banned | None = None) -> NextWords:
        """Read one word in every row.

        Args:
            ids: int64 (rows,) the last word of each, `<SOS>` at first.
            most: how many of the next words to return, M; `<PAD>`, `<SOS>`, `<UNK>` and banned ones are at minus infinity.
        """

    def select(self, rows: np.ndarray, images: np.ndarray | None = None) -> None:
        """Go on with these rows, int64 (n,). Args: images: whose rows they are, None for all."""


def beam_search(
    reading: Reading,
    beam_size: int,
    max_length: int,
    length_penalty: float = 0.7,
    attention: bool = False,
    num_hypotheses: int = 1,
    no_repeat_ngram: int = 0,
) -> list[list[Hypothesis]]:
    """Caption a whole batch of images at once; beam size 1 is greedy decoding.

    Starts from `<SOS>`, as training does, ends at `<EOS>` and never gives `<PAD>`, `<SOS>` or `<UNK>`. An image is
    finished when no live hypothesis can still beat its best ended one; or, of several that are asked for, when none
    would beat the last of them with one word more, which saves a third of the steps. That is so whatever the other
    images of the batch do, so that results do not depend on which images share a batch. Where nothing ended after
    `max_length` words, the live hypotheses of so many words are returned, with the score of these words.

    Args:
        reading: the images, as a model has just read them.
        length_penalty: exponent of the length by which a log-probability is divided (Wu et al., 2016, simplified).
        attention: keep the alphas of every word.
        num_hypotheses: how many of an image; a beam of at least that size mostly finds them.
        no_repeat_ngram: no caption has the same n words twice; 0 for no such rule.

    Returns:
        for every image its hypotheses, best first and no two alike; at least one.
    """
    keeps_attention, images = attention and reading.has_attention, reading.images
    found: list[list[Hypothesis]] = [[] for _ in range(images)]
    alive = list(range(images))  # which images the rows below belong to
    words = np.full(images, SOS)
    scores = np.zeros((images, 1), np.float32)  # (I, K) log-probabilities of the live hypotheses, best first
    history = np.zeros((images, 1, 0), np.int64)  # (I, K, t) their words
    score_history = np.zeros((images, 1, 0), np.float32)  # (I, K, t) the log-probabilities of these words
    attention_history = np.zeros((images, 1, 0, 0), np.float32)  # (I, K, t, 49) their alphas
    ended_scores = np.full((images, num_hypotheses), -np.inf, np.float32)  # the best, best first

    def keep(image: np.ndarray, row: np.ndarray, log_probability: np.ndarray, each: np.ndarray) -> None:
        """Keep live hypotheses (n,) as they stand. Args: each: (n, length) of their words, and `<EOS>` where they ended."""
        ids, length = history[image, row].tolist(), each.shape[1]
        alphas = attention_history[image, row] if keeps_attention else [None] * len(ids)
        kept = zip(image.tolist(), ids, log_probability.tolist(), alphas, each.tolist(), strict=True)
        for i, words, value, maps, own in kept:
            own_maps = None if maps is None else maps[: len(words)]
            found[alive[i]].append(Hypothesis(words, value, value / length**length_penalty, own_maps, own))

    for time in range(max_length + 1):
        banned = repeats(history, no_repeat_ngram) if 0 < no_repeat_ngram <= time else None
        following = reading.step(words, min(2 * beam_size, reading.vocabulary_size), banned)
        count, beams = scores.shape
        total = following.log_probabilities.reshape(count, beams, -1) + scores[:, :, None]  # (I, K, M)
        most = total.shape[2]
        index = np.argsort(-total.reshape(count, -1), 1, kind="stable")[:, : 2 * beam_size]  # (I, 2B)
        best = np.take_along_axis(total.reshape(count, -1), index, 1)
        parent, word = index // most, np.take_along_axis(following.ids.reshape(count, -1), index, 1)
        gain = best - np.take_along_axis(scores, parent, 1)  # (I, 2B) log-probability of the word alone
        ends = word == EOS
        ended = np.where(ends, best, -np.inf)[:, :beam_size]
        if keeps_attention and following.alphas is not None:
            now = following.alphas.reshape(count, beams, 1, -1)
            attention_history = now if time == 0 else np.concatenate([attention_history, now], 2)

        image, place = np.nonzero(np.isfinite(ended))
        row = parent[image, place]
        keep(image, row, ended[image, place], np.concatenate([score_history[image, row], gain[image, place, None]], 1))
        if time == max_length:  # no caption takes another word
            unfinished = np.array([not found[number] for number in alive])
            image, row = np.nonzero(np.isfinite(scores) & unfinished[:, None])
            keep(image, row, scores[image, row], score_history[image, row])
            break
        # The first beam_size candidates that go on are the next live hypotheses.
        order = np.argsort(ends, 1, kind="stable")[:, :beam_size]
        scores = np.take_along_axis(np.where(ends, -np.inf, best), order, 1)
        ended_scores = np.concatenate([ended_scores, ended / (time + 1) ** length_penalty], 1)
        ended_scores = -np.sort(-ended_scores, 1)[:, :num_hypotheses]
        longest = max_length + 1 if num_hypotheses == 1 else time + 2  # that a live hypothesis is expected to grow
        can_win = scores[:, 0] / float(longest) ** length_penalty > ended_scores[:, -1]
        if beam_size == 1:
            can_win &= ~ends[:, 0]  # greedy decoding ends with its first <EOS>
        going = np.flatnonzero(can_win)
        if len(going) == 0:
            break
        image = going[:, None]
        order, scores, ended_scores = order[going], scores[going], ended_scores[going]
        parent, ids = parent[image, order], word[image, order]
        history = np.concatenate([history[image, parent], ids[:, :, None]], 2)
        score_history = np.concatenate([score_history[image, parent], gain[image, order][:, :, None]], 2)
        if keeps_attention:
            attention_history = attention_history[image, parent]
        reading.select((image * beams + parent).ravel(), going if len(going) < count else None)
        words, alive = ids.ravel(), [alive[i] for i in going.tolist()]
    return [sorted(hypotheses, key=lambda h: -h.score) for hypotheses in found]


def repeats(history: np.ndarray, n: int) -> Banned:
    """Return the words that would complete an n-gram of their hypothesis again.

    Args:
        history: int64 (I, K, t) the words so far, t >= n.
    """
    flat = history.reshape(-1, history.shape[2])
    known = np.lib.stride_tricks.sliding_window_view(flat, n, 1)  # (rows, t - n + 1, n): every n-gram so far
    last = flat[:, None, flat.shape[1] - n + 1 :]  # (rows, 1, n - 1): what the next word would complete
    row, place = np.nonzero((known[..., :-1] == last).all(-1))
    return row, known[row, place, -1]


def sample(
    reading: Reading, count: int, max_length: int, top_p: float, generator: np.random.Generator
) -> list[list[Hypothesis]]:
    """Draw captions word by word from the likeliest words.

    Args:
        count: captions of an image.
        top_p: keep to the likeliest words that together have this probability (nucleus sampling, Holtzman et al., 2020).

    Returns:
        for every image its different captions, the likeliest first. Their log-probabilities are those of the whole
        distribution; their score is the sum.
    """
    rows = reading.images * count
    reading.select(np.arange(rows) // count)
    words, ended = np.full(rows, SOS), np.zeros(rows, dtype=bool)
    drawn: list[list[tuple[int, float]]] = [[] for _ in range(rows)]
    for _ in range(max_length):
        following = reading.step(words, reading.vocabulary_size)
        chances = np.exp(following.log_probabilities.astype(np.float64))  # (rows, V), the largest first
        sums = chances.cumsum(1)
        sums = np.where(sums - chances < top_p, sums, 0.0)
        points = generator.random(rows)[:, None] * sums.max(1, keepdims=True)
        place = (sums <= points).argmin(1)  # of the first whose sum is above the point
        own = np.arange(rows)
        words = np.where(ended, EOS, following.ids[own, place])
        for row in np.flatnonzero(~ended).tolist():
            drawn[row].append((int(words[row]), float(following.log_probabilities[row, place[row]])))
        ended |= words == EOS
        if ended.all():
            break
    found: list[list[Hypothesis]] = []
    for first in range(0, rows, count):
        different: dict[tuple[int, ...], Hypothesis] = {}
        for draws in drawn[first : first + count]:
            ids, each = [word for word, _ in draws if word != EOS], [chance for _, chance in draws]
            different[tuple(ids)] = Hypothesis(ids, sum(each), sum(each), None, each)
        found.append(sorted(different.values(), key=lambda h: -h.score))
    return found
