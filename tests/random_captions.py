"""A set of captions in memory, for tests of n-grams and rewards."""

from pathlib import Path

import numpy as np

from captioning.data.dataset import CaptionSet, Tokens

WORDS = [f"w{n}" for n in range(30)]


def random_set(**images: int) -> CaptionSet:
    """So many images in each split, with one to five captions of words that are common and rare."""
    total, random = sum(images.values()), np.random.default_rng(0)
    counts = random.integers(1, 6, total)
    texts = [(30 * random.random(random.integers(1, 12)) ** 2).astype(np.int32) for _ in range(counts.sum())]
    tokens = Tokens(WORDS, np.concatenate(texts), np.concatenate([[0], np.cumsum([len(text) for text in texts])]))
    ends = np.cumsum(list(images.values()))
    splits = dict(zip(images, np.split(np.arange(total), ends[:-1]), strict=True))
    first = np.concatenate([[0], np.cumsum(counts)])
    return CaptionSet(Path(), [f"{n}.jpg" for n in range(total)], first, tokens, splits, "lists", Path("captions.txt"))
