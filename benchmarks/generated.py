"""Data of any size to measure with: captions, JPEGs, and feature caches full of numbers.

Captions follow a small grammar with Zipf's frequencies in every word class, tuned to Flickr8k: of 30,000
captions some 3,500 words come three times or more, and the mean length is 11 words.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captioning.encoders import find_encoder
from captioning.feature_store import ROWS_PER_FILE, Entry, FeatureFile, version_of
from captioning.features import FeatureRequest

WORD_CLASSES = {"determiner": 5, "preposition": 25, "adjective": 1800, "verb": 1500, "noun": 4200}
PHRASES = (0.04, 0.30, 0.33, 0.20, 0.08, 0.03, 0.012, 0.005, 0.003)  # chances of 0, 1, ... prepositional phrases
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
PICTURES = 64  # distinct ones; data sets link to them under many names
CAPTIONS_EACH = 5
BLOCK = 512  # distinct rows of generated features


def made_up_word(number: int) -> str:
    """A word of three syllables, which no tokenizer takes apart."""
    base = len(SYLLABLES)
    return "".join(SYLLABLES[number // base**place % base] for place in (2, 1, 0))


class Grammar:
    """Draws captions such as `a tall dog runs on the big hill`, in made-up words."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        words = map(made_up_word, range(sum(WORD_CLASSES.values())))
        self.words = {kind: [next(words) for _ in range(count)] for kind, count in WORD_CLASSES.items()}

    def draw(self, kind: str, count: int) -> list[str]:
        chances = 1 / (np.arange(len(self.words[kind])) + 3.0) ** 1.34
        numbers = np.searchsorted(np.cumsum(chances / chances.sum()), self.random.random(count))
        return [self.words[kind][min(n, len(self.words[kind]) - 1)] for n in numbers]

    def captions(self, count: int) -> list[str]:
        phrases = self.random.choice(len(PHRASES), count, p=PHRASES)
        nouns = count + int(phrases.sum())
        supply = {kind: iter(self.draw(kind, nouns)) for kind in WORD_CLASSES}
        tall = iter(self.random.random(nouns) < 0.5)

        def thing() -> list[str]:
            kinds = ("determiner", "adjective", "noun") if next(tall) else ("determiner", "noun")
            return [next(supply[kind]) for kind in kinds]

        captions = []
        for phrase_count in phrases:
            words = [*thing(), next(supply["verb"])]
            for _ in range(phrase_count):
                words += [next(supply["preposition"]), *thing()]
            captions.append(" ".join(words))
        return captions


def draw_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of about 500x375, as detailed as photographs: noise of several sizes, some 60 kB each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        random = np.random.default_rng(number)
        width, height = (500, 375) if number % 3 else (375, 500)
        picture = np.zeros((height, width, 3), np.float32)
        for cells, strength in ((4, 90), (16, 40), (64, 25), (width, 8)):
            noise = random.normal(0, strength, (cells, cells, 3)).clip(-127, 127) + 128
            layer = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
            picture += np.asarray(layer, np.float32) - 128
        path = folder / f"picture{number:04d}.jpg"
        Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def write_data_set(folder: Path, images: int, pictures: list[Path]) -> None:
    """Write a data set with its split, 6/7 of it for training as in Flickr8k.

    Args:
        pictures: what the images link to; without any they are empty files, for runs whose features are cached.
    """
    (folder / "Images").mkdir(parents=True)
    names = [f"image{number:06d}.jpg" for number in range(images)]
    for number, name in enumerate(names):
        if pictures:
            os.link(pictures[number % len(pictures)], folder / "Images" / name)
        else:
            (folder / "Images" / name).touch()
    captions = iter(Grammar(0).captions(images * CAPTIONS_EACH))
    with open(folder / "captions.txt", "w", encoding="utf-8") as file:
        file.write("image,caption\n")
        file.writelines(f"{name},{next(captions)}\n" for name in names for _ in range(CAPTIONS_EACH))
    held = max(1, images // 14)
    parts = {"val": names[:held], "test": names[held : 2 * held], "train": names[2 * held :]}
    for split, part in parts.items():
        (folder / f"{split}.txt").write_text("\n".join(part) + "\n")


def feature_file(cache: Path, encoder: str, images: Path, kind: str) -> FeatureFile:
    """Return the store that the main program reads for this encoder (ResNet50 with random weights) and folder."""
    spec = find_encoder(encoder)
    _, weights_hash = spec.find_weights("random" if encoder == "resnet50" else None)
    request = FeatureRequest(
        caches=[cache], spec=spec, weights_hash=weights_hash, build_encoder=spec.build, paths=[], folder=images,
        images=np.empty(0, np.int64), device=torch.device("cpu"), means=kind == "mean", workers=1,
    )  # fmt: skip
    file = request.store("whole").part(0)
    file.directory.mkdir(parents=True, exist_ok=True)
    return file


def fill_cache(file: FeatureFile, paths: list[Path]) -> None:
    """Random features, positive as those of an encoder, for these images; a block of rows comes again and again."""
    rows = np.abs(np.random.default_rng(0).standard_normal((BLOCK, *file.row_shape), np.float32)).astype(np.float16)
    for start in range(0, len(paths), BLOCK):
        part = paths[start : start + BLOCK]
        file.append([path.name for path in part], [version_of(path) for path in part], rows[: len(part)])


def fill_cache_sparsely(file: FeatureFile, paths: list[Path]) -> None:
    """Features of zeros that take no room on the disk: files with a size and no content."""
    checksum = zlib.crc32(bytes(file.row_bytes))
    for first in range(0, len(paths), ROWS_PER_FILE):
        with open(file.file(first // ROWS_PER_FILE), "wb") as rows:
            rows.truncate(min(ROWS_PER_FILE, len(paths) - first) * file.row_bytes)
    with open(file.index_path, "w", encoding="utf-8") as index:
        for row, path in enumerate(paths):
            index.write(json.dumps([path.name, *Entry(row, *version_of(path), checksum)]) + "\n")
