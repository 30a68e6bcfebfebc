"""Captioned images, their split, the tokenizer and the vocabulary.

An image is its position in `CaptionSet.names` everywhere else. Captions are tokenized once and kept as flat int32
arrays, without a Python object per caption.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from captioning.data.images import IMAGE_ENDINGS
from captioning.data.layouts import (
    files_in,
    find_captions_file,
    find_image_directory,
    read_captions,
)
from captioning.data.splits import StoredSplit, equal_files, find_splits, require_splits, whole_set
from captioning.io import UserError, write_atomic

PAD, SOS, EOS, UNK = range(4)
SPECIAL_TOKENS = ["<PAD>", "<SOS>", "<EOS>", "<UNK>"]
LONG_CAPTION = 100  # words; longer ones are legal, but often several captions in one row
# COCO_val2014_000000391895.jpg: the number is the image's id in COCO's own files.
COCO_NAME = re.compile(r"(?:[^/]+/)?COCO_(?:train|val|test)\d{4}_0*(\d{1,12})\.jpg")


# --------------------------------------------------------------------------------------------------
# Tokens and vocabulary


class Tokens(NamedTuple):
    """Tokenized texts: text i is `words[ids[offsets[i]:offsets[i + 1]]]`."""

    words: list[str]  # every distinct word, in order of first appearance
    ids: np.ndarray  # int32 (number of tokens,)
    offsets: np.ndarray  # int64 (number of texts + 1,)

    def text(self, number: int) -> str:
        """Return a text, its words joined with spaces."""
        return " ".join(self.words[i] for i in self.ids[self.offsets[number] : self.offsets[number + 1]])


def tokenize(texts: Iterable[str]) -> Tokens:
    """Lower-case, split with spaCy's English rules, drop punctuation (tokens without a letter or digit).

    It is the project's only tokenizer: for the vocabulary, the training captions and both sides of every metric.
    Published scores drop punctuation too.
    """
    import spacy  # takes seconds to import; cached tokens do without

    split = spacy.blank("en").tokenizer
    number: dict[str, int] = {}
    ids: list[int] = []
    offsets = [0]
    for text in texts:
        for token in split(" ".join(text.lower().split())):
            word = token.text.strip()
            if any(map(str.isalnum, word)):
                ids.append(number.setdefault(word, len(number)))
        offsets.append(len(ids))
    return Tokens(list(number), np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64))


def tokenize_cached(texts: Sequence[str], cache_directory: Path | None) -> Tokens:
    """Return `tokenize(texts)`, cached on disk under the texts' hash, so that later runs need not import spaCy."""
    if cache_directory is None:
        return tokenize(texts)
    version = importlib.metadata.version("spacy")
    digest = hashlib.sha256("\n".join([version, *texts]).encode("utf-8", "surrogatepass")).hexdigest()
    path = cache_directory / f"tokens-{digest[:16]}.npz"
    # A file that is not there or damaged (zipfile has checksums) is written again, whatever the error.
    with contextlib.suppress(Exception), np.load(path) as saved:
        words = saved["words"].tobytes().decode("utf-8")
        return Tokens(words.split("\n") if words else [], saved["ids"], saved["offsets"])
    tokens = tokenize(texts)
    characters = np.frombuffer("\n".join(tokens.words).encode("utf-8"), np.uint8)
    # Saving time is all it is for: the feature cache says what is wrong with the folder.
    with contextlib.suppress(OSError, UserError):
        cache_directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: np.savez(file, words=characters, ids=tokens.ids, offsets=tokens.offsets))
    return tokens


class Vocabulary:
    """Words and their ids: the four special tokens, then words by descending frequency (ties alphabetically).

    With `--init_from` the other model's words come first, then the new ones.
    """

    def __init__(self, words: Sequence[str]):
        if list(words[:4]) != SPECIAL_TOKENS or len(set(words)) != len(words):
            raise ValueError(f"a vocabulary starts with {SPECIAL_TOKENS} and has no word twice")
        self.words = list(words)
        self.id_of = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words of `ids` up to `<EOS>`, without the other special tokens."""
        ended = itertools.takewhile(lambda number: number != EOS, (int(number) for number in ids))
        return [self.words[number] for number in ended if number > UNK]


# --------------------------------------------------------------------------------------------------
# The caption set


@dataclass
class CaptionSet:
    """Images with their tokenized captions and their split."""

    image_dir: Path
    names: list[str]  # image file names, sorted, COCO's with their folder; an image is its position in this list
    first_caption: np.ndarray  # int64 (images + 1,): image i has captions first_caption[i]:first_caption[i + 1]
    tokens: Tokens  # one text per caption
    splits: dict[str, np.ndarray]  # 'train' | 'val' | 'test' -> int64 positions
    split_source: str
    captions_file: Path
    notes: list[str] = field(default_factory=list)  # what was left out and why, a line each

    def paths(self) -> list[Path]:
        """Return every image's path, by position."""
        return [self.image_dir / name for name in self.names]

    def image_id(self, image: int) -> str | int:
        """Return the `image_id` of the COCO evaluation: COCO's number, else the file name."""
        found = COCO_NAME.fullmatch(self.names[image])
        return int(found[1]) if found else self.names[image]

    def references(self, image: int) -> list[str]:
        """Return an image's captions, tokenized and joined with spaces, as the metrics take them."""
        return [self.tokens.text(n) for n in range(self.first_caption[image], self.first_caption[image + 1])]

    def caption_counts(self, images: np.ndarray) -> np.ndarray:
        """Return the number of captions of each image: (I,) -> int64 (I,)."""
        return self.first_caption[images + 1] - self.first_caption[images]

    def dump_split(self) -> str:
        """Return the split as JSON text, names by split, for `split.json` in the run directory."""
        named = {split: [self.names[i] for i in images] for split, images in self.splits.items()}
        return json.dumps({"source": self.split_source, **named}, indent=1)

    def facts(self) -> dict[str, Any]:
        """Return what has to be the same in all processes that train on this set, as plain values by name."""
        words, ids, offsets = self.tokens
        arrays = (ids, offsets, self.first_caption, *self.splits.values())
        crc = zlib.crc32("\n".join([*self.names, *words]).encode("utf-8", "surrogatepass"))
        for array in arrays:
            crc = zlib.crc32(array.tobytes(), crc)
        return {
            "the number of captioned images": len(self.names),
            "the hash of the captions and the split": f"{crc:08x}",
            "the folder of the images": str(self.image_dir.resolve()),
        }

    def drop_images(self, bad: set[int]) -> None:
        """Remove images from every split; their positions in `names` stay.

        Raises:
            UserError: a split has no image left.
        """
        self.splits = {
            split: np.array([image for image in images if image not in bad], dtype=np.int64)
            for split, images in self.splits.items()
        }
        require_splits(self.splits, self.split_source)


def join_sets(first: CaptionSet, second: CaptionSet) -> CaptionSet:
    """Return the images of both sets, with the split of the first.

    The second's images come after the first's, and their names are whole paths.
    """
    number = {word: place for place, word in enumerate([*dict.fromkeys(first.tokens.words + second.tokens.words)])}
    ids = np.array([number[word] for word in second.tokens.words], dtype=np.int32)[second.tokens.ids]

    def appended(ends: np.ndarray, more: np.ndarray) -> np.ndarray:
        return np.concatenate([ends, more[1:] + ends[-1]])

    return replace(
        first,
        names=first.names + [str(path.absolute()) for path in second.paths()],
        first_caption=appended(first.first_caption, second.first_caption),
        tokens=Tokens(
            list(number), np.concatenate([first.tokens.ids, ids]), appended(first.tokens.offsets, second.tokens.offsets)
        ),
    )


def frequent_words(data: CaptionSet, threshold: int) -> Vocabulary:
    """Return the words that the training captions have at least `threshold` times."""
    captions = captions_of(data, data.splits["train"])
    ids = data.tokens.ids[concatenate_ranges(data.tokens.offsets[captions], data.tokens.offsets[captions + 1])]
    words = data.tokens.words
    counts = np.bincount(ids, minlength=len(words)).tolist()
    kept = sorted((-count, word) for word, count in zip(words, counts, strict=True) if count >= threshold)
    return Vocabulary(SPECIAL_TOKENS + [word for _, word in kept])


def build_vocabulary(data: CaptionSet, threshold: int) -> Vocabulary:
    """Return the vocabulary of the training captions; a word of validation or test images only is `<UNK>`.

    Raises:
        UserError: no word reaches the threshold.
    """
    vocabulary = frequent_words(data, threshold)
    if len(vocabulary) == len(SPECIAL_TOKENS):
        raise UserError(
            f"no word appears {threshold} times in the training captions of {data.captions_file}: "
            "lower --freq_threshold, e.g. --freq_threshold 1"
        )
    return vocabulary


def captions_of(data: CaptionSet, images: np.ndarray) -> np.ndarray:
    """Return the caption numbers of `images`, in their order."""
    return concatenate_ranges(data.first_caption[images], data.first_caption[images + 1])


def concatenate_ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return [starts[0], ..., ends[0] - 1, starts[1], ..., ends[1] - 1, ...]."""
    lengths = ends - starts
    if lengths.sum() == 0:
        return np.zeros(0, dtype=np.int64)
    shifts = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return np.arange(lengths.sum(), dtype=np.int64) + shifts


# --------------------------------------------------------------------------------------------------
# Reading


def load_caption_set(
    data_dir: Path | None,
    image_dir: Path | None = None,
    captions_file: Path | None = None,
    seed: int = 0,
    stored: StoredSplit | None = None,
    token_cache: Path | None = None,
    whole: bool = False,
    generated: bool = False,
) -> CaptionSet:
    """Find and read a data set in any of the layouts of docs/data.md.

    Args:
        data_dir: where to look; `image_dir` and `captions_file` override what is found there.
        seed: of the random split of a data set without split lists.
        stored: the split in a checkpoint, which rules wherever it knows an image: see captioning/data/splits.py.
        token_cache: a directory for tokenized captions, or None.
        whole: whether all images are one split, `all`, whatever lists there are.
        generated: whether captions that the program itself wrote beside photos are read.

    Raises:
        UserError: no usable data set; the message says what was looked for and how to get it.
    """
    captions_path = captions_file or find_captions_file(data_dir)
    table, notes = read_captions(captions_path, generated)
    captioned = table["image"].unique().tolist()
    directory = find_image_directory(data_dir, image_dir, captioned)
    on_disk = files_in(directory, {name.rpartition("/")[0] for name in captioned})
    missing = sorted(set(captioned) - on_disk)
    if len(missing) == len(captioned):
        raise UserError(
            f"none of the {len(captioned)} images that {captions_path} names is in {directory} "
            f"(looked for {missing[0]}, for example): give the right --image_dir"
        )
    if len(missing) > 0.01 * len(captioned):
        raise UserError(
            f"{len(missing)} of the {len(captioned)} images that {captions_path} names are missing from {directory}, "
            f"{missing[0]} for example: complete the folder, or remove their rows from the captions file"
        )
    if missing:
        notes.append(f"{len(missing)} captioned image(s) not on disk, left out: {', '.join(missing[:3])}")
    table = table[table["image"].isin(on_disk)].sort_values("image", kind="stable")
    per_image = table.groupby("image").size()  # sorted by name
    names = per_image.index.tolist()
    files = {name.rpartition("/")[2]: name for name in names}
    twice = next((name for name in names if files[name.rpartition("/")[2]] != name), None)
    if twice:
        raise UserError(
            f"{captions_path}: {twice} and {files[twice.rpartition('/')[2]]} have the same file name; rename one"
        )
    uncaptioned = sum(Path(name).suffix.lower() in IMAGE_ENDINGS for name in on_disk.difference(captioned))
    if uncaptioned:
        notes.append(f"{uncaptioned} image(s) without captions, left out")

    duplicates = int(table.duplicated().sum())
    if duplicates:  # Flickr8k itself has some, and published scores count them
        notes.append(f"{duplicates} caption(s) that their image has already, kept")
    tokens = tokenize_cached(table["caption"].tolist(), token_cache)
    first_caption = np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64)
    long = int((np.diff(tokens.offsets) > LONG_CAPTION).sum())
    if long:
        notes.append(f"{long} caption(s) of more than {LONG_CAPTION} words: training reads --max_length words of each")
    beside = captions_path if captions_path.is_dir() else captions_path.parent
    search = [place for place in (data_dir, beside, captions_path) if place is not None]
    sizes = [(directory / name).stat().st_size for name in names]
    copies = functools.cache(lambda: equal_files(directory, names, sizes))
    if whole:
        splits, source = whole_set(names, sizes, stored, notes), "--split all"
    else:
        splits, source = find_splits(search, names, sizes, seed, stored, notes, copies)
    return CaptionSet(directory, names, first_caption, tokens, splits, source, captions_path, notes)
