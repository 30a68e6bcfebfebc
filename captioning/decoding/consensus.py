"""Consensus decoding: of the captions that a beam ended with, the one that agrees best with the evidence.

The most probable caption is not the one that scores best, since CIDEr-D rewards what a caption shares with the
references. The references are unknown, but two estimates of them are not: the beam's own captions, weighted by their
probability (minimum Bayes risk decoding, Kumar and Byrne, 2004), and the n-grams that a regression expects of an image,
fitted to the training images and captions (compare consensus re-ranking, Devlin et al., 2015). The regression is a part
of the checkpoint: a table of frequent n-grams and two matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from captioning.data.dataset import UNK, CaptionSet, Vocabulary
from captioning.decoding.beam_search import Hypothesis, Reading, beam_search
from captioning.io import log
from captioning.scoring.cider import NgramTable, caption_words, cider_of_each, weigh_references

CANDIDATES = 100  # captions of an image at most, best first; a beam of 20 ends with about as many
# Tuned on the validation images of Flickr8k by consensus_settings.py, in the history (docs/lab/log.md).
TEMPERATURE = 3.0  # divides the beam's log-probabilities: a beam is overconfident of its first captions
RIDGE, RANK = 0.3, 400  # of the regression
FEWEST_TRAINING_IMAGES = 100  # of which a regression can learn
FEWEST_VALIDATION_IMAGES = 50  # on which its weight can be settled
FEWEST_IMAGES = 5  # of them that have an n-gram of the table, or one of 1,200
WEIGHTS = 2.0 ** np.arange(0, 6.5, 0.5)  # of the regression that are tried, beside none: 1 to 64
PRIOR_WEIGHT, PRIOR_IMAGES = 10.0, 250  # what the weight is without validation images, and how many outweigh that
MOST_IMAGES = 40_000  # training images that the regression is fitted to
FIT_BATCH = 256  # images

Evidence = tuple[np.ndarray, np.ndarray]  # CIDEr of an image's candidates expected by the beam and by the regression


class NgramHead:
    """What the captions of an image say, as a regression expects it from the encoder's features.

    A ridge regression of reduced rank from the direction of an image's pooled features, seen from their mean, to the
    mean tf-idf vector of its captions.
    """

    def __init__(self, vocabulary_size: int, stored: Mapping[str, Any]):
        """Args:
        stored: what a checkpoint keeps: `keys` int64 (G,) and `idf` (G,) of the n-grams, those of one word first;
            `sizes` int64 (4,), how many there are of each length; `centre` (C,) of the features, `project` (C + 1, R),
            `expect` int8 (R, G), in `units` (R,); `log_images`, as in `NgramTable`; `weight` of
            the regression, against 1 for all the beam's captions together.
        """
        self.stored, self.weight = stored, float(stored["weight"])
        ends = stored["sizes"].cumsum()[:-1]
        keys, idf = (np.split(stored[name], ends) for name in ("keys", "idf"))
        idf = [each.astype(np.float64) for each in idf]
        self.table = NgramTable(keys, idf, vocabulary_size + 1, stored["log_images"])
        self.expect = stored["expect"].astype(np.float32) * stored["units"][:, None]

    def expected(self, pooled: np.ndarray) -> np.ndarray:
        """Return the weights (I, G) that the captions of images are expected to have. Args: pooled: features (I, C)."""
        expected: np.ndarray = direction(pooled, self.stored["centre"]) @ self.stored["project"] @ self.expect
        return expected

    def evidence(self, found: Sequence[list[Hypothesis]], pooled: np.ndarray) -> list[Evidence]:
        """Score the candidates of each image, which are its first H = CANDIDATES hypotheses at most.

        Args:
            found: the hypotheses of each image, best first.
            pooled: features (I, C) of the images.

        Returns:
            for each image the CIDEr-D (H,) of its candidates expected by the beam, and the CIDEr (H,) expected by the
            regression.
        """
        evidence = []
        for hypotheses, vector in zip(found, self.expected(pooled).astype(np.float64), strict=True):
            candidates = hypotheses[:CANDIDATES]
            ids = np.concatenate([np.array(each.ids, dtype=np.int64) for each in candidates])
            offsets = np.cumsum([0, *(len(each.ids) for each in candidates)])
            log_probabilities = np.array([each.log_probability for each in candidates])
            chances = np.exp((log_probabilities - log_probabilities.max()) / TEMPERATURE)
            by_beam = self.table.pairwise_cider(ids, offsets) @ (chances / chances.sum())
            evidence.append((by_beam, self.table.cider_to_vector(ids, offsets, vector)))
        return evidence


def grow_head(stored: Mapping[str, Any], known: int, words: int) -> dict[str, Any]:
    """Return what a checkpoint keeps of a head, for a vocabulary whose new words come after the known ones.

    Args:
        known, words: how many there were, and are now; the end of a caption comes after them.
    """
    before, word = np.divmod(stored["keys"], known + 1)
    return {**stored, "keys": before * (words + 1) + np.where(word == known, words, word)}


def search_by_consensus(
    reading: Reading, heads: Sequence[NgramHead], beam_size: int, max_length: int, length_penalty: float, attention: bool,
    no_repeat_ngram: int,
) -> list[list[Hypothesis]]:  # fmt: skip
    """Caption images, and sort what the beam ends with by its evidence.

    Args:
        reading, ...: as for `beam_search`.
        heads: of each decoder. Those of an ensemble each add their evidence.

    Returns:
        for every image its first CANDIDATES hypotheses at most, the one with the best evidence first.
    """
    pooled = reading.pooled  # of all images: the search leaves finished ones behind
    found = beam_search(reading, beam_size, max_length, length_penalty, attention, beam_size, no_repeat_ngram)
    values: list[np.ndarray] = [np.zeros(1)] * len(found)
    for head, features in zip(heads, pooled, strict=True):
        values = [
            value + by_beam + head.weight * by_regression
            for value, (by_beam, by_regression) in zip(values, head.evidence(found, features), strict=True)
        ]
    return [
        [hypotheses[n] for n in np.argsort(-value, kind="stable")]
        for hypotheses, value in zip(found, values, strict=True)
    ]


def direction(pooled: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return what the regression reads, (I, C + 1): the direction of features (I, C) from the centre (C,), and a one."""
    offsets = pooled - centre
    lengths = np.sqrt((offsets**2).sum(1, keepdims=True)).clip(1e-12)
    return np.concatenate([offsets / lengths, np.ones_like(lengths)], 1)


def fit_head(data: CaptionSet, vocabulary: Vocabulary, pooled: Callable[[np.ndarray], np.ndarray]) -> NgramHead:
    """Fit the regression to the training images, in closed form.

    It is a reduced-rank ridge regression (Izenman, 1975; Mukherjee and Zhu, 2011): of a ridge regression's predictions
    the RANK principal directions are kept.

    Args:
        pooled: returns the features (n, C) of the images at these positions (n,).

    Returns:
        a head, whose weight is 0 still.
    """
    train = data.splits["train"]
    if len(train) > MOST_IMAGES:
        train = np.sort(np.random.default_rng(0).choice(train, MOST_IMAGES, replace=False))
    keys, idf, entries, weights = frequent_ngrams(data, vocabulary, train)
    batches = [np.arange(start, min(start + FIT_BATCH, len(train))) for start in range(0, len(train), FIT_BATCH)]
    features = np.concatenate([pooled(train[batch]) for batch in batches])  # (T, C)
    centre = features.mean(0, dtype=np.float64).astype(np.float32)
    ngrams = sum(map(len, keys))
    squares = np.eye(len(centre) + 1) * RIDGE  # X'X + ridge, X (T, C + 1)
    products = np.zeros((len(centre) + 1, ngrams))  # X'Y, Y (T, G)
    for batch in batches:
        x = direction(features[batch], centre).astype(np.float64)  # (n, C + 1)
        low, high = np.searchsorted(entries, [batch[0] * ngrams, (batch[-1] + 1) * ngrams])
        y = np.bincount(entries[low:high] - batch[0] * ngrams, weights[low:high], len(batch) * ngrams)
        squares += x.T @ x
        products += x.T @ y.reshape(len(batch), ngrams)
    factor = np.linalg.cholesky(squares)
    scaled = np.linalg.solve(factor, products)  # (C + 1, G)
    directions = np.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -RANK:]  # (C + 1, R)
    expect = directions.T @ scaled  # (R, G)
    units = np.abs(expect).max(1).clip(1e-3) / 127
    stored = {
        "keys": np.concatenate(keys),
        "idf": np.concatenate(idf).astype(np.float32),
        "sizes": np.array(list(map(len, keys))),
        "centre": centre,
        "project": np.linalg.solve(factor.T, directions).astype(np.float32),
        "units": units.astype(np.float32),
        "expect": (expect / units[:, None]).round().astype(np.int8),
        "log_images": float(np.log(len(train))),
        "weight": 0.0,
    }
    return NgramHead(len(vocabulary), stored)


def frequent_ngrams(
    data: CaptionSet, vocabulary: Vocabulary, train: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Return the n-grams that at least FEWEST_IMAGES images, or one of 1,200, have, without those with unknown words.

    Args:
        train: positions (T,) of the images.

    Returns:
        keys and idf, as `NgramTable` takes them, with the vocabulary's numbers as words; and the mean tf-idf vectors of
        the images: int64 (M,) sorted places in a table (T, G), and the weight at each.
    """
    ids, offsets = caption_words(data, train)
    ids = np.array([vocabulary.id_of.get(word, UNK) for word in data.tokens.words])[ids]
    counts, words = data.caption_counts(train), len(vocabulary) + 1
    image = np.repeat(np.arange(len(train)), counts)
    keys, idf, images, places, weights = [], [], [], [], []
    place, first = np.zeros(1, dtype=np.int64), 0  # of each (n - 1)-gram in the table
    fewest = np.log(max(FEWEST_IMAGES, len(train) / 1200)) - 1e-9
    for grams, each, entry_weights, norms in weigh_references(ids, offsets, counts, words):
        before, word = np.divmod(grams.keys, words)
        frequent = np.log(len(train)) - each >= fewest
        kept = frequent & (word != UNK) & (place[before] >= 0)
        keys.append(place[before[kept]] * words + word[kept])
        idf.append(each[kept])
        place = np.where(kept, np.cumsum(kept) - 1, -1)
        entry = np.flatnonzero(kept[grams.gram])
        text = grams.text[entry]
        images.append(image[text])
        places.append(first + place[grams.gram[entry]])
        weights.append(entry_weights[entry] / np.where(norms > 0, norms, 1)[text] / counts[image[text]])
        first += len(keys[-1])
    pairs, entry = np.unique(np.concatenate(images) * first + np.concatenate(places), return_inverse=True)
    return keys, idf, pairs, np.bincount(entry, np.concatenate(weights), len(pairs))


def settle_weight(
    head: NgramHead, found: Sequence[list[Hypothesis]], pooled: np.ndarray, texts: Callable[[Hypothesis], str],
    references: Sequence[Sequence[str]],
) -> tuple[NgramHead, list[Hypothesis]]:  # fmt: skip
    """Return the head with the weight that suits validation images, and what it then takes of each.

    The CIDEr of so few captions jumps from weight to weight: of each weight the mean with its neighbours counts, and
    the best is drawn to PRIOR_WEIGHT, on a scale of ratios, as if PRIOR_IMAGES more images had settled on that. A
    regression that gains nothing gets none: it was fitted to few images, or to features that tell little.

    Args:
        found, pooled: as for `NgramHead.evidence`.
        texts: returns the text of a hypothesis.
        references: of each image.
    """
    evidence = head.evidence(found, pooled)

    def choose(weight: float) -> list[Hypothesis]:
        return [
            hypotheses[int((by_beam + weight * by_regression).argmax())]
            for hypotheses, (by_beam, by_regression) in zip(found, evidence, strict=True)
        ]

    def score(weight: float) -> float:
        return float(cider_of_each(list(map(texts, choose(weight))), references).mean())

    none, scores = score(0.0), np.array([score(weight) for weight in WEIGHTS])
    smooth = np.convolve(np.pad(scores, 2, "edge"), np.array([1, 2, 3, 2, 1]) / 9, "valid")
    trust = len(found) / (len(found) + PRIOR_IMAGES)
    best = float(WEIGHTS[smooth.argmax()] ** trust * PRIOR_WEIGHT ** (1 - trust)) if smooth.max() > none else 0.0
    tried = ", ".join(
        f"{weight:.3g}: {100 * value:.1f}" for weight, value in zip((0, *WEIGHTS), (none, *scores), strict=True)
    )
    log.info(f"Weight of the regression: {best:.3g}, by CIDEr on {len(found)} validation images ({tried})")
    return NgramHead(head.table.words - 1, {**head.stored, "weight": best}), choose(best)
