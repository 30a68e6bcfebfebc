"""CIDEr-D of many captions at once: the reward of self-critical training, and the evidence of consensus decoding.

pycocoevalcap's scorer walks over dictionaries of strings. Here n-grams are integers, and a batch takes a few sorts and
searches; the figures are the same (tested to 1e-9). `cider_of_each` is pycocoevalcap's own, for scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from captioning.data.dataset import CaptionSet, Vocabulary, captions_of, concatenate_ranges

N = 4  # n-grams of one to four words
SIGMA = 6.0  # words: width of the penalty on a length other than the reference's (CIDEr-D, Vedantam et al., 2015)


def cider_of_each(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return every image's CIDEr (n,), whose mean is the score.

    Document frequencies are those of the given references, so that the score depends on how many images there are; of
    one image alone it is 0.

    Args:
        hypotheses: a caption for each image, words joined by spaces.
        references: all captions of each image.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for hypothesis, known in zip(hypotheses, references, strict=True):
        scorer += (hypothesis, list(known))
    if not any(text.split() for known in references for text in known):  # which the scorer does not expect
        return np.zeros(len(hypotheses))
    each: np.ndarray = scorer.compute_score()[1]
    return each


class Grams(NamedTuple):
    """The distinct n-grams, of one length, of some texts, and how often each text has them."""

    keys: np.ndarray  # int64 (G,) sorted: number of the (n-1)-gram before its last word x words + last word
    text: np.ndarray  # int64 (M,) entries by text, then by n-gram
    gram: np.ndarray  # int64 (M,) place in keys
    times: np.ndarray  # int64 (M,)


class References(NamedTuple):
    """The n-grams, of one length, of the reference captions, with their weights."""

    pairs: np.ndarray  # int64 (M,) sorted: caption x G + n-gram
    weights: np.ndarray  # float64 (M,) tf-idf of each pair
    norms: np.ndarray  # float64 (captions,)


def count_grams(ids: np.ndarray, offsets: np.ndarray, words: int) -> list[Grams]:
    """Count the n-grams of texts, for n from 1 to N, with an end token (word number `words` - 1) after each text.

    Args:
        ids: int (tokens,) below `words` - 1.
        offsets: int (texts + 1,) where each text begins.
    """
    lengths = np.diff(offsets) + 1
    text = np.repeat(np.arange(len(lengths)), lengths)
    flat = np.insert(ids.astype(np.int64), offsets[1:], words - 1)
    left = np.cumsum(lengths)[text] - np.arange(len(flat))  # words from here to the end of the text
    gram = np.zeros_like(flat)  # number of the n-gram that begins at each place
    found = []
    for n in range(N):
        here = np.flatnonzero(left > n)
        keys, gram[here] = np.unique(gram[here] * words + flat[here + n], return_inverse=True)
        pairs, count = np.unique(text[here] * len(keys) + gram[here], return_counts=True)
        found.append(Grams(keys, pairs // max(1, len(keys)), pairs % max(1, len(keys)), count))
    return found


class NgramTable:
    """N-grams of one to four words with their inverse document frequencies, by which captions are weighed.

    An n-gram that is not in the table weighs as if one image had it; to the references it is unknown.
    """

    def __init__(self, keys: list[np.ndarray], idf: list[np.ndarray], words: int, log_images: float):
        """Args:
        keys: for n from 1 to N, int64 (G,), as in `Grams`, of n-grams whose first n - 1 words are in the table too.
        idf: for n from 1 to N, float64 (G,).
        words: how many there are, and the end token.
        log_images: the natural logarithm of the number of images, which is the largest idf.
        """
        self.keys, self.idf, self.words, self.log_images = keys, idf, words, log_images

    def weigh(self, ids: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[Grams, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the n-grams of captions with their weights, for n from 1 to N.

        Args:
            ids: int (tokens,) words, by their numbers in the table.
            offsets: int (R + 1,) where each caption begins.

        Yields:
            the captions' n-grams, the place of each in the table (-1 where it is absent), the tf-idf of each entry and
            the norm of each caption.
        """
        known = np.zeros(1, dtype=np.int64)  # places of the 0-grams
        for keys, idf, grams in zip(self.keys, self.idf, count_grams(ids, offsets, self.words), strict=True):
            before = known[grams.keys // self.words]
            at = find(keys, before * self.words + grams.keys % self.words)
            known = np.where(before >= 0, at, -1)
            weights = grams.times * np.where(known >= 0, idf[known] if len(idf) else 0.0, self.log_images)[grams.gram]
            yield grams, known, weights, np.sqrt(np.bincount(grams.text, weights**2, len(offsets) - 1))

    def pairwise_cider(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Compare captions with each other, each as the only reference.

        Args:
            ids, offsets: as for `weigh`.

        Returns:
            (R, R) CIDEr-D, float64, times 10, of the row's caption against the column's.
        """
        lengths = np.diff(offsets)
        similarity = np.zeros((len(lengths), len(lengths)))
        for grams, _, weights, norms in self.weigh(ids, offsets):
            table, product = np.zeros((len(lengths), len(grams.keys))), np.zeros_like(similarity)
            # The lesser count of two texts is the sum over k = 1, 2, ... of whether both have the n-gram k times.
            for k in range(1, grams.times.max(initial=0) + 1):
                has = grams.times >= k
                texts = grams.text[has], grams.gram[has]
                once, reference = table.copy(), table.copy()
                once[texts], reference[texts] = (weights / grams.times)[has], weights[has]
                product += once @ reference.T
            norm = norms[:, None] * norms
            similarity += product / np.where(norm > 0, norm, 1)
        difference = lengths[:, None] - lengths
        return 10 * similarity * np.exp(-(difference**2) / (2 * SIGMA**2)) / N

    def cider_to_vector(self, ids: np.ndarray, offsets: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """Compare captions with the tf-idf weights that are expected of an image's captions.

        It is CIDEr rather than CIDEr-D (Vedantam et al., 2015, section 4), since an expectation has neither counts to
        clip at nor a length.

        Args:
            ids, offsets: as for `weigh`.
            vector: (G,) of the table's n-grams, one length after another; of each length the mean of vectors of
                length one.

        Returns:
            (R,) float64, times 10.
        """
        similarity, first = np.zeros(len(offsets) - 1), 0
        for keys, (grams, known, weights, norms) in zip(self.keys, self.weigh(ids, offsets), strict=True):
            expected = np.append(vector[first : first + len(keys)], 0.0)[known]  # -1 is the 0 at the end
            product = np.bincount(grams.text, weights * expected[grams.gram], len(norms))
            similarity += product / np.where(norms > 0, norms, 1)
            first += len(keys)
        return 10 * similarity / N


class CiderReward(NgramTable):
    """CIDEr-D against the captions of some images, with the document frequencies of these captions.

    Every caption has an end token as its last word, so that a caption without its end earns less.
    """

    def __init__(self, data: CaptionSet, images: np.ndarray):
        """Args: images: int64 (I,) positions of the images whose captions are the references."""
        self.data_words = data.tokens.words
        self.place = np.full(len(data.names), -1, dtype=np.int64)
        self.place[images] = np.arange(len(images))
        counts = data.caption_counts(images)
        self.first = np.concatenate([[0], np.cumsum(counts)])  # of each image's captions, in this class's numbering
        words = len(self.data_words) + 2  # one for all words that the data lacks, and the end token
        super().__init__([], [], words, float(np.log(len(images))))
        ids, offsets = caption_words(data, images)
        self.lengths = np.diff(offsets)
        self.references: list[References] = []
        for grams, idf, weights, norms in weigh_references(ids, offsets, counts, words):
            self.keys.append(grams.keys)
            self.idf.append(idf)
            self.references.append(References(grams.text * len(idf) + grams.gram, weights, norms))

    def words_of(self, vocabulary: Vocabulary) -> np.ndarray:
        """Return the place in the data of each word of a vocabulary: int64 (V,)."""
        number = {word: place for place, word in enumerate(self.data_words)}
        return np.array([number.get(word, len(number)) for word in vocabulary.words])

    def score(self, ids: np.ndarray, offsets: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Compare captions with all captions of their images.

        Args:
            ids: int (tokens,) words by their place in `data.tokens.words`.
            offsets: int (R + 1,) where each caption begins.
            images: int64 (R,) the image that each caption is of.

        Returns:
            (R,) CIDEr-D, float64, times 10 as everywhere.
        """
        place = self.place[images]
        references = self.first[place + 1] - self.first[place]  # (R,)
        pair_reference = concatenate_ranges(self.first[place], self.first[place + 1])  # (P,) a pair per reference
        pair_row = np.repeat(np.arange(len(images)), references)
        first_pair = np.cumsum(references) - references
        similarity = np.zeros(len(pair_row))
        for size, reference, (grams, known, weights, norms) in zip(
            map(len, self.keys), self.references, self.weigh(ids, offsets), strict=True
        ):
            # Every n-gram of a caption that the references have, against every reference of its image.
            entry = np.flatnonzero(known[grams.gram] >= 0)
            row = grams.text[entry]
            pair = concatenate_ranges(first_pair[row], first_pair[row] + references[row])
            entry = np.repeat(entry, references[row])
            at = find(reference.pairs, pair_reference[pair] * size + known[grams.gram[entry]])
            hit = at >= 0
            its_weight = reference.weights[at[hit]]
            product = np.minimum(weights[entry[hit]], its_weight) * its_weight
            norm = norms[pair_row] * reference.norms[pair_reference]
            similarity += np.bincount(pair[hit], product, len(pair_row)) / np.where(norm > 0, norm, 1)
        difference = np.diff(offsets)[pair_row] - self.lengths[pair_reference]
        similarity *= np.exp(-(difference**2) / (2 * SIGMA**2)) / N
        return 10 * np.bincount(pair_row, similarity, len(images)) / references


def caption_words(data: CaptionSet, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of all captions of some images, by their places in `data.tokens.words`, and where each begins."""
    captions = captions_of(data, images)
    starts, ends = data.tokens.offsets[captions], data.tokens.offsets[captions + 1]
    return data.tokens.ids[concatenate_ranges(starts, ends)], np.concatenate([[0], np.cumsum(ends - starts)])


def weigh_references(
    ids: np.ndarray, offsets: np.ndarray, counts: np.ndarray, words: int
) -> Iterator[tuple[Grams, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the n-grams of reference captions with their weights, for n from 1 to N.

    Args:
        ids, offsets: as for `count_grams`.
        counts: int (I,) captions of each image.

    Yields:
        the n-grams, the idf of each by the number of images that have it, the tf-idf of each entry, and the norm of
        each caption.
    """
    image = np.repeat(np.arange(len(counts)), counts)
    for grams in count_grams(ids, offsets, words):
        size = len(grams.keys)
        images = np.bincount(np.unique(image[grams.text] * size + grams.gram) % max(1, size), minlength=size)
        idf = np.log(len(counts)) - np.log(images)
        weights = grams.times * idf[grams.gram]
        yield grams, idf, weights, np.sqrt(np.bincount(grams.text, weights**2, len(offsets) - 1))


def find(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the place of each key in the sorted `values`, -1 where it is absent."""
    at = np.searchsorted(values, keys)
    return np.where(np.append(values, -1)[at] == keys, at, -1)
