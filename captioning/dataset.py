"""Captioned images, their split, the tokenizer and the vocabulary.

Everything downstream knows an image by its position in `CaptionSet.names`. Captions are tokenized once and
kept as flat int32 arrays; there is no Python object per caption.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from captioning.images import IMAGE_ENDINGS
from captioning.io import UserError, write_atomic
from captioning.layouts import (
    SPLITS,
    files_in,
    find_captions_file,
    find_image_directory,
    karpathy_split,
    read_captions,
    split_lists,
)

PAD, SOS, EOS, UNK = range(4)
SPECIAL_TOKENS = ["<PAD>", "<SOS>", "<EOS>", "<UNK>"]
LONG_CAPTION = 100  # words; nothing is wrong with more, but one caption per row is what people mean
COCO_HELD_OUT = 5000  # validation and test images of COCO, as many as Karpathy's split has
# COCO_val2014_000000391895.jpg: the number is the image's id in COCO's own files.
COCO_NAME = re.compile(r"(?:[^/]+/)?COCO_(?:train|val|test)\d{4}_0*(\d{1,12})\.jpg")


# --------------------------------------------------------------------------------------------------
# Tokens and vocabulary


class Tokens(NamedTuple):
    """Tokenized texts: text i is `words[ids[offsets[i]:offsets[i + 1]]]`."""

    words: list[str]  # every distinct word, in order of first appearance
    ids: np.ndarray  # int32 (number of tokens,)
    offsets: np.ndarray  # int64 (number of texts + 1,)


def tokenize(texts: Iterable[str]) -> Tokens:
    """Lower-case, split with spaCy's English rules, drop punctuation.

    The one tokenizer of the project: the vocabulary, the training captions and both sides of every
    metric go through it. Punctuation is any token without a letter or digit; published scores drop it too.
    """
    import spacy  # takes seconds to import, and cached tokens make it unnecessary

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
    """`tokenize`, remembered on disk under the texts' own hash, so that later runs need not import spaCy."""
    if cache_directory is None:
        return tokenize(texts)
    version = importlib.metadata.version("spacy")
    digest = hashlib.sha256("\n".join([version, *texts]).encode("utf-8", "surrogatepass")).hexdigest()
    path = cache_directory / f"tokens-{digest[:16]}.bin"
    if path.is_file() and (saved := unpack_tokens(path.read_bytes(), len(texts))) is not None:
        return saved
    tokens = tokenize(texts)
    cache_directory.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(pack_tokens(tokens)))
    return tokens


# Of a token cache: bytes of words, number of ids, number of texts, CRC-32 of all that follows.
TOKEN_HEADER = struct.Struct("<QQQI")


def pack_tokens(tokens: Tokens) -> bytes:
    """Tokens as one block: header, words in UTF-8 with a line each, ids, offsets."""
    words = "\n".join(tokens.words).encode("utf-8")
    body = words + tokens.ids.astype("<i4").tobytes() + tokens.offsets.astype("<i8").tobytes()
    return TOKEN_HEADER.pack(len(words), len(tokens.ids), len(tokens.offsets) - 1, zlib.crc32(body)) + body


def unpack_tokens(raw: bytes, texts: int) -> Tokens | None:
    """Undo `pack_tokens`; None for anything else than a whole block of `texts` texts, whoever wrote it."""
    if len(raw) < TOKEN_HEADER.size:
        return None
    word_bytes, id_count, text_count, checksum = TOKEN_HEADER.unpack_from(raw)
    body = raw[TOKEN_HEADER.size :]
    if text_count != texts or len(body) != word_bytes + 4 * id_count + 8 * (texts + 1) or zlib.crc32(body) != checksum:
        return None
    ids = np.frombuffer(body, "<i4", id_count, word_bytes).astype(np.int32)
    offsets = np.frombuffer(body, "<i8", texts + 1, word_bytes + 4 * id_count).astype(np.int64)
    try:
        words = body[:word_bytes].decode("utf-8").split("\n") if word_bytes else []
    except UnicodeDecodeError:
        return None
    ids_fit = not len(ids) or (ids.min() >= 0 and ids.max() < len(words))
    offsets_fit = offsets[0] == 0 and offsets[-1] == len(ids) and (offsets[1:] >= offsets[:-1]).all()
    return Tokens(words, ids, offsets) if ids_fit and offsets_fit and len(set(words)) == len(words) else None


class Vocabulary:
    """Words and their ids: the four special tokens, then words by falling frequency (ties alphabetically)."""

    def __init__(self, words: Sequence[str]):
        if list(words[:4]) != SPECIAL_TOKENS or len(set(words)) != len(words):
            raise ValueError(f"a vocabulary starts with {SPECIAL_TOKENS} and has no word twice")
        self.words = list(words)
        self.id_of = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def from_counts(cls, words: Sequence[str], counts: np.ndarray, threshold: int) -> Vocabulary:
        """Keep the words that were counted at least `threshold` times."""
        kept = sorted((-int(count), word) for word, count in zip(words, counts, strict=True) if count >= threshold)
        return cls(SPECIAL_TOKENS + [word for _, word in kept])

    def __len__(self) -> int:
        return len(self.words)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Ids up to `<EOS>`, as words; other special tokens are left out."""
        ended = itertools.takewhile(lambda number: number != EOS, (int(number) for number in ids))
        return [self.words[number] for number in ended if number > UNK]


# --------------------------------------------------------------------------------------------------
# The caption set


class ImagePaths(Sequence[Path]):
    """Paths made when they are asked for: kept ones would take half a kilobyte each."""

    def __init__(self, directory: Path, names: Sequence[str]):
        self.directory, self.names = directory, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> ImagePaths: ...

    def __getitem__(self, index: int | slice) -> Path | ImagePaths:
        if isinstance(index, slice):
            return ImagePaths(self.directory, self.names[index])
        return self.directory / self.names[index]


@dataclass
class CaptionSet:
    """Images with their tokenized captions and their split."""

    image_dir: Path
    names: list[
        str
    ]  # image file names, COCO's with their folder, sorted; a position in this list is how an image is known
    first_caption: np.ndarray  # int64 (images + 1,): image i has captions first_caption[i]:first_caption[i + 1]
    tokens: Tokens  # one text per caption
    splits: dict[str, np.ndarray]  # 'train' | 'val' | 'test' -> int64 positions
    split_source: str
    captions_file: Path
    notes: list[str] = field(default_factory=list)  # what was left out and why, one line each

    def paths(self) -> Sequence[Path]:
        """Every image's path, by position."""
        return ImagePaths(self.image_dir, self.names)

    def image_id(self, image: int) -> str | int:
        """What the COCO evaluation calls an image: COCO's number, else the file name."""
        found = COCO_NAME.fullmatch(self.names[image])
        return int(found[1]) if found else self.names[image]

    def references(self, image: int) -> list[str]:
        """All captions of an image, tokenized and joined with spaces, as the metrics take them."""
        words, ids, offsets = self.tokens
        captions = range(self.first_caption[image], self.first_caption[image + 1])
        return [" ".join(words[i] for i in ids[offsets[c] : offsets[c + 1]]) for c in captions]

    def caption_counts(self, images: np.ndarray) -> np.ndarray:
        """Number of captions of each given image."""
        return self.first_caption[images + 1] - self.first_caption[images]

    def facts(self) -> dict[str, Any]:
        """Return what has to be the same in all processes that train on this set, as plain values by name."""
        words, ids, offsets = self.tokens
        arrays = (ids, offsets, self.first_caption, *(self.splits[split] for split in SPLITS))
        crc = zlib.crc32("\n".join([*self.names, *words]).encode("utf-8", "surrogatepass"))
        for array in arrays:
            crc = zlib.crc32(array.tobytes(), crc)
        return {
            "the number of captioned images": len(self.names),
            "the hash of the captions and the split": f"{crc:08x}",
            "the folder of the images": str(self.image_dir.resolve()),
        }

    def drop_images(self, bad: set[int]) -> None:
        """Take images out of every split (they keep their position).

        Raises:
            UserError: a split has no image left.
        """
        self.splits = {
            split: np.array([image for image in images if image not in bad], dtype=np.int64)
            for split, images in self.splits.items()
        }
        require_splits(self.splits, self.split_source)


def build_vocabulary(data: CaptionSet, threshold: int) -> Vocabulary:
    """Count words in the training captions alone: a word only seen in validation or test stays `<UNK>`.

    Raises:
        UserError: no word reaches the threshold.
    """
    captions = captions_of(data, data.splits["train"])
    ids = data.tokens.ids[concatenate_ranges(data.tokens.offsets[captions], data.tokens.offsets[captions + 1])]
    counts = np.bincount(ids, minlength=len(data.tokens.words))
    vocabulary = Vocabulary.from_counts(data.tokens.words, counts, threshold)
    if len(vocabulary) == len(SPECIAL_TOKENS):
        raise UserError(
            f"no word appears {threshold} times in the training captions of {data.captions_file}: "
            "lower --freq_threshold, e.g. --freq_threshold 1"
        )
    return vocabulary


def captions_of(data: CaptionSet, images: np.ndarray) -> np.ndarray:
    """The caption numbers of the given images, in their order."""
    return concatenate_ranges(data.first_caption[images], data.first_caption[images + 1])


def concatenate_ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[starts[0], ..., ends[0] - 1, starts[1], ..., ends[1] - 1, ...] without a Python loop."""
    lengths = ends - starts
    if lengths.sum() == 0:
        return np.zeros(0, dtype=np.int64)
    shifts = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return np.arange(lengths.sum(), dtype=np.int64) + shifts


# --------------------------------------------------------------------------------------------------
# Reading what is on disk


def load_caption_set(
    data_dir: Path | None,
    image_dir: Path | None = None,
    captions_file: Path | None = None,
    seed: int = 0,
    saved_split: dict[str, Any] | None = None,
    token_cache: Path | None = None,
) -> CaptionSet:
    """Find and read a data set in any of the layouts of `docs/architecture.md`.

    Args:
        data_dir: where to look; `image_dir` and `captions_file` override what would be found there.
        seed: of the split that is drawn where the data set brings none.
        saved_split: a drawn split kept by a checkpoint (`{"val": [names], "test": [names]}`); it wins
            over drawing anew, so that an image that was trained on is never tested on.
        token_cache: a directory for tokenized captions, or None.

    Raises:
        UserError: nothing usable is there; the message says what was looked for and how to get it.
    """
    captions_path = captions_file or find_captions_file(data_dir)
    captions, notes = read_captions(captions_path)
    directory = find_image_directory(data_dir, image_dir, captions)
    on_disk = files_in(directory, {name.rpartition("/")[0] for name in captions})
    missing = sorted(name for name in captions if name not in on_disk)
    if len(missing) == len(captions):
        raise UserError(
            f"none of the {len(captions)} images that {captions_path} names is in {directory} "
            f"(looked for {missing[0]}, for example): give the right --image_dir"
        )
    if len(missing) > 0.01 * len(captions):
        raise UserError(
            f"{len(missing)} of the {len(captions)} images that {captions_path} names are missing from {directory}, "
            f"{missing[0]} for example: complete the folder, or remove their rows from the captions file"
        )
    if missing:
        notes.append(f"{len(missing)} captioned image(s) not on disk, left out: {', '.join(missing[:3])}")
    names = sorted(set(captions) & on_disk)
    files = {name.rpartition("/")[2]: name for name in names}
    twice = next((name for name in names if files[name.rpartition("/")[2]] != name), None)
    if twice:
        raise UserError(
            f"{captions_path}: {twice} and {files[twice.rpartition('/')[2]]} have the same file name; rename one"
        )
    uncaptioned = sum(Path(name).suffix.lower() in IMAGE_ENDINGS and name not in captions for name in on_disk)
    if uncaptioned:
        notes.append(f"{uncaptioned} image(s) without captions, left out")

    duplicates = sum(len(known) - len(set(known)) for known in captions.values())
    if duplicates:  # people do say the same: Flickr8k itself has some, and published scores count them
        notes.append(f"{duplicates} caption(s) that their image has already, kept")
    tokens = tokenize_cached([caption for name in names for caption in captions[name]], token_cache)
    first_caption = np.concatenate([[0], np.cumsum([len(captions[name]) for name in names])]).astype(np.int64)
    long = int((np.diff(tokens.offsets) > LONG_CAPTION).sum())
    if long:
        notes.append(f"{long} caption(s) of more than {LONG_CAPTION} words: training reads --max_length words of each")
    search = [place for place in (data_dir, captions_path.parent) if place is not None]
    splits, source = find_splits(search, names, seed, saved_split, notes)
    return CaptionSet(directory, names, first_caption, tokens, splits, source, captions_path, notes)


# --------------------------------------------------------------------------------------------------
# Splits, always by image


def find_splits(
    places: Sequence[Path], names: list[str], seed: int, saved: dict[str, Any] | None, notes: list[str]
) -> tuple[dict[str, np.ndarray], str]:
    position = {name: number for number, name in enumerate(names)}
    lists, source = None, ""
    for place in places:
        lists, source = split_lists(place) or karpathy_split(place) or (None, "")
        if lists:
            break
    if lists is None and saved:
        held_out = set(saved["val"]) | set(saved["test"])
        known = [name for name in names if name not in held_out]
        lists, source = {"train": known, "val": saved["val"], "test": saved["test"]}, "the split kept in the checkpoint"
    if lists is None:
        shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
        held = max(1, round(0.1 * len(names)))
        lists = {"train": shuffled[2 * held :], "val": shuffled[:held], "test": shuffled[held : 2 * held]}
        source = f"drawn by image with --seed {seed}: 80 % / 10 % / 10 %"
        for_tests = [name for name in shuffled if name.startswith("val2014/")]
        if for_tests:
            held = min(COCO_HELD_OUT, len(for_tests) // 2)
            lists = {"val": for_tests[:held], "test": for_tests[held : 2 * held]}
            lists["train"] = [name for name in names if not name.startswith("val2014/")] + for_tests[2 * held :]
            source = (
                f"drawn from val2014 with --seed {seed}, {held} images each; Karpathy's own is in his dataset_coco.json"
            )
    owner: dict[str, str] = {}
    for split in SPLITS:
        for name in lists[split]:
            if owner.setdefault(name, split) != split:
                raise UserError(
                    f"{source}: {name!r} is in both {owner[name]} and {split}; an image belongs to one split"
                )
    splits = {
        split: np.array(sorted(position[name] for name in set(lists[split]) if name in position), dtype=np.int64)
        for split in SPLITS
    }
    absent = sum(name not in position for name in owner)
    if absent:
        notes.append(f"{absent} image(s) of the split lists are not in the data set, left out")
    unused = len(names) - sum(map(len, splits.values()))
    if unused:
        notes.append(f"{unused} image(s) in no split, left out")
    require_splits(splits, source)
    return splits, source


def require_splits(splits: dict[str, np.ndarray], source: str) -> None:
    for split, images in splits.items():
        if len(images) == 0:
            raise UserError(
                f"the {split} split has no images ({source}): training needs at least one image in each split"
            )


def saved_split_of(data: CaptionSet) -> dict[str, list[str]] | None:
    """The names that a drawn split held out, for the checkpoint; None where the data set brings its own lists."""
    if not data.split_source.startswith(("drawn", "the split kept")):
        return None
    return {split: [data.names[i] for i in data.splits[split]] for split in ("val", "test")}


def dump_split(data: CaptionSet) -> str:
    """The split as JSON text, names by split, for `split.json` in the run directory."""
    named = {split: [data.names[i] for i in images] for split, images in data.splits.items()}
    return json.dumps({"source": data.split_source, **named}, indent=1)
