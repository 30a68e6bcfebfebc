"""Captions and images: data-set layouts, splits by image, the tokenizer, the vocabulary, and batches of whole images.

Everything downstream speaks of an image by its position in `CaptionSet.names`. Captions are tokenized
once and kept as flat int32 arrays; there is no Python object per caption.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image, ImageOps

from safe_io import CONTROL_CHARACTERS, UserError, read_json, write_atomic

PAD, SOS, EOS, UNK = range(4)
SPECIAL_TOKENS = ["<PAD>", "<SOS>", "<EOS>", "<UNK>"]
SPLITS = ("train", "val", "test")
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
# Pillow looks at the content, not at the ending, and would hand PostScript called .jpg to Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")

# Where the known data sets keep their parts, relative to the data directory; the first that is there is used.
IMAGE_DIRECTORIES = (
    "Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset",
    "flickr30k_images", "flickr30k-images", "flickr30k_images/flickr30k_images", ".",
)  # fmt: skip
CAPTION_FILES = (
    "captions.txt", "captions.csv", "Flickr8k.token.txt", "results.csv", "flickr30k_images/results.csv",
    "results_20130124.token", "dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json", "dataset.json",
    "annotations/captions_train2014.json", "captions_train2014.json",
)  # fmt: skip
SPLIT_LISTS = (
    ("Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt"),
    ("flickr30k_train.txt", "flickr30k_val.txt", "flickr30k_test.txt"),
    ("train.txt", "val.txt", "test.txt"),
)
LONG_CAPTION = 100  # words; nothing is wrong with more, but one caption per row is what people mean
KARPATHY_FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json", "dataset.json")
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


def files_in(directory: Path, folders: set[str]) -> set[str]:
    """The files in these folders below a directory, as captions name them: `a.jpg`, `val2014/a.jpg`."""
    return {
        f"{folder}/{entry.name}" if folder else entry.name
        for folder in folders
        if (directory / folder).is_dir()
        for entry in os.scandir(directory / folder)
        if entry.is_file()
    }


def find_captions_file(data_dir: Path | None) -> Path:
    if data_dir is None or not data_dir.is_dir():
        raise UserError(
            f"data directory {data_dir} is not there: `python download_datasets.py` fetches Flickr8k and Flickr30k, "
            "--data_dir DIR names a folder you have, --dataset_type demo draws a small set"
        )
    for name in CAPTION_FILES:
        if (data_dir / name).is_file():
            return data_dir / name
    raise UserError(
        f"no captions file in {data_dir}: expected one of {', '.join(CAPTION_FILES)}, or name yours with --captions_file"
    )


def find_image_directory(data_dir: Path | None, image_dir: Path | None, captions: dict[str, list[str]]) -> Path:
    if image_dir is not None:
        if not image_dir.is_dir():
            raise UserError(f"--image_dir {image_dir} is not a directory")
        return image_dir
    sample = list(itertools.islice(captions, 50))
    for name in IMAGE_DIRECTORIES if data_dir is not None else ():
        assert data_dir is not None
        if any((data_dir / name / image).is_file() for image in sample):
            return data_dir / name
    raise UserError(
        f"no image of the captions file ({sample[0]}, for example) in {data_dir} or its "
        f"{', '.join(IMAGE_DIRECTORIES[:-1])}: give their folder with --image_dir"
    )


def read_captions(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Read one captions file of any known form.

    Returns:
        captions by image name, in file order; and notes on what was left out.

    Raises:
        UserError: unreadable, or a malformed row (named with its line).
    """
    if path.suffix == ".json":
        rows: Iterable[tuple[int, str, str]] = json_rows(path)
    else:
        text = read_text(path)
        header = text[:200].split("\n", 1)[0].strip().lower()
        if path.suffix == ".token" or re.match(r"[^\t\n]+#\d+\t", text):
            rows = token_file_rows(path, text)
        elif header.startswith("image_name|"):
            rows = bar_rows(path, text)
        else:
            rows = csv_rows(path, text)
    captions: dict[str, list[str]] = {}
    empty = cleaned = 0
    for line, name, caption in rows:
        if not name:
            raise UserError(f"{path}, line {line}: a row without an image name")
        folder, slash, file = name.rpartition("/")
        if (slash and not (folder and file)) or any(
            os.path.basename(part.replace("\\", "/")) != part or part in (".", "..") for part in (folder, file)
        ):
            raise UserError(f"{path}, line {line}: {name[:80]!r} is not a plain file name; images lie in one folder")
        if CONTROL_CHARACTERS.search(name) or len(name.encode()) > 255:
            raise UserError(
                f"{path}, line {line}: the image name {name[:80]!r} has a line break or another control character, or "
                "is longer than file systems allow: rename the image"
            )
        known = captions.setdefault(name, [])
        caption, controls = CONTROL_CHARACTERS.subn(" ", caption)
        cleaned += controls > 0
        if not any(map(str.isalnum, caption)):
            empty += 1
        else:
            known.append(caption)
    notes = []
    if cleaned:
        notes.append(f"{cleaned} caption(s) with line breaks or other control characters, which became spaces")
    if empty:
        notes.append(f"{empty} empty caption(s), left out")
    wordless = [name for name, known in captions.items() if not known]
    if wordless:
        notes.append(f"{len(wordless)} image(s) with empty captions only, left out: {', '.join(wordless[:3])}")
    captions = {name: known for name, known in captions.items() if known}
    if not captions:
        raise UserError(f"{path} holds no captions")
    return captions, notes


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark, with whatever line ends.

    Raises:
        UserError: unreadable, or in another encoding (the message says how to convert it).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    marked = raw[:2] in (b"\xff\xfe", b"\xfe\xff") and raw[2:4] != b"\0\0"  # UTF-32's mark begins like UTF-16's
    encoding = "utf-16" if marked else "utf-8-sig"
    if not marked and b"\0" in raw:
        raise UserError(
            f"{path} holds NUL characters: UTF-16 without its mark, UTF-32, or no text at all; "
            f"convert it, e.g. `iconv -f utf-16le -t utf-8 {path.name}`"
        )
    try:
        return raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not {encoding} text; convert it, e.g. `iconv -f latin1 -t utf-8 {path.name}`"
        ) from error


def json_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """The rows of Karpathy's files or of COCO's own, which come in two."""
    content = read_json(path)
    if not isinstance(content, dict) or "annotations" not in content:
        yield from karpathy_rows(path, content)
        return
    yield from coco_rows(path, content)
    other = path.with_name("captions_val2014.json")
    if path.name == "captions_train2014.json":
        if not other.is_file():
            raise UserError(f"{other} is not there: COCO's captions come in two files, {path.name} and {other.name}")
        yield from coco_rows(other, read_json(other))


def karpathy_rows(path: Path, content: Any) -> Iterator[tuple[int, str, str]]:
    """`{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`, Karpathy and Fei-Fei's form."""
    try:
        for number, image in enumerate(content["images"], start=1):
            name = karpathy_name(image)
            for sentence in image["sentences"]:
                if not isinstance(sentence["raw"], str):
                    raise TypeError("raw is a text")
                yield number, name, sentence["raw"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a Karpathy caption file (images / filename / sentences / raw)") from error


def karpathy_name(image: Any) -> str:
    """An image's file name, with its folder where there are several, as COCO has."""
    name, folder = image["filename"], image.get("filepath", "")
    if not isinstance(name, str) or not isinstance(folder, str):
        raise TypeError("filename and filepath are texts")
    return f"{folder}/{name}" if folder else name


def coco_rows(path: Path, content: Any) -> Iterator[tuple[int, str, str]]:
    """`{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`; the images of captions_X.json lie in X."""
    part = re.fullmatch(r"captions_(\w+)\.json", path.name)
    folder = f"{part[1]}/" if part else ""
    try:
        names = {image["id"]: folder + image["file_name"] for image in content["images"]}
        for number, note in enumerate(content["annotations"], start=1):
            if not isinstance(note["caption"], str):
                raise TypeError("caption is a text")
            yield number, names[note["image_id"]], note["caption"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a COCO caption file (images / id, file_name; annotations / image_id, caption)"
        ) from error


def token_file_rows(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """`name.jpg#0<TAB>caption`, the official Flickr form."""
    for line, row in enumerate(io.StringIO(text), start=1):
        row = row.rstrip("\n")
        if not row.strip():
            continue
        match = re.fullmatch(r"([^\t]+)#\d+\t(.*)", row)
        if not match:
            raise UserError(f"{path}, line {line}: expected `image.jpg#0<TAB>caption`, found {row[:60]!r}")
        yield line, re.sub(r"(\.\w+)\.\d+$", r"\1", match[1]), match[2]  # Flickr8k has rows of `x.jpg.1`


def bar_rows(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """`image_name| comment_number| comment`, Kaggle's Flickr30k, one row of which lacks its second bar."""
    for line, row in enumerate(io.StringIO(text), start=1):
        row = row.rstrip("\n")
        if line == 1 or not row.strip():
            continue
        name, _, rest = row.partition("|")
        match = re.fullmatch(r"\s*\d+\s*(?:\|\s*|\s+)(.*)", rest)
        if not match:
            raise UserError(f"{path}, line {line}: expected `image| number| caption`, found {row[:60]!r}")
        yield line, name.strip(), match[1]


def csv_rows(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """`image,caption` with a header, or the columns image_name, comment_number, comment."""
    reader = csv.reader(io.StringIO(text), strict=True)
    line = 1  # where a row begins: a quoted caption may go over several lines
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        image = next(
            (header.index(name) for name in ("image", "image_name", "filename", "file_name") if name in header), None
        )
        caption = next((header.index(name) for name in ("caption", "comment", "text") if name in header), None)
        if image is None or caption is None:
            raise UserError(
                f"{path}, line 1: expected the header `image,caption`, found {','.join(header)[:60]!r} "
                "(see 'Your own photos' in README.md)"
            )
        line = reader.line_num + 1
        for row in reader:
            # A comma that nobody quoted belongs to the caption when that is the last column.
            last = caption == len(header) - 1
            blank = not "".join(row).strip() and len(row) < len(header)
            if not blank and (len(row) < len(header) or (len(row) > len(header) and not last)):
                raise UserError(
                    f"{path}, line {line}: expected {len(header)} comma-separated fields "
                    f"({','.join(header)[:60]!r}), found {len(row)}: {','.join(row)[:60]!r}"
                )
            if not blank:
                yield line, row[image].strip(), ",".join(row[caption:]) if last else row[caption]
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f'{path}, line {line}: {error}; quote captions as in "a ""big"" dog"') from error


# --------------------------------------------------------------------------------------------------
# Pictures


class UnreadableImage(Exception):
    """An image file that Pillow cannot decode; the message says which and why."""


def open_image(path: Path, at_least: int | None = None) -> Image.Image:
    """A picture in one of `IMAGE_FORMATS`, upright (EXIF), as RGB, transparency on white, the first frame of several.

    Args:
        at_least: let the JPEG decoder work at a reduced scale that keeps both sides at least this long.

    Raises:
        UnreadableImage: truncated, no image at all, or more pixels than Pillow's bomb limit allows.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if at_least:
                image.draft("RGB", (at_least, at_least))
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or upright.mode == "I":  # 16 bits a channel
                scaled = np.asarray(upright, dtype=np.float64) / 257
                upright = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever their format's parser raised
        raise UnreadableImage(f"{path}: {error}") from error


class View(NamedTuple):
    """One way of looking at a picture: the part of it that is squashed to a square, perhaps mirrored."""

    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom, as parts of the sides
    mirrored: bool = False


VIEWS = {
    "whole": View(),
    "mirror": View(mirrored=True),
    "top_left_mirror": View((0.0, 0.0, 0.85, 0.85), mirrored=True),
    "top_right": View((0.15, 0.0, 1.0, 0.85)),
    "bottom_left_mirror": View((0.0, 0.15, 0.85, 1.0), mirrored=True),
    "bottom_right": View((0.15, 0.15, 1.0, 1.0)),
}
VIEW_SETS = {"whole": ("whole",), "mirror": ("whole", "mirror"), "all": tuple(VIEWS)}  # --views


def load_pixels(path: Path, size: int, view: str = "whole") -> np.ndarray:
    """A picture, or one of `VIEWS` of it, squashed to `size` x `size`, uint8 (size, size, 3): what the encoders see.

    Squashing rather than cropping keeps everything in view, and an attention map stretched back over
    the picture lies where it belongs.
    """
    image = open_image(path, at_least=2 * size)
    (width, height), (box, mirrored) = image.size, VIEWS[view]
    if image.size != (size, size) or view != "whole":
        part = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        image = image.resize((size, size), Image.Resampling.BILINEAR, part)  # Pillow's filter widens when it shrinks
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels


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


def split_lists(place: Path) -> tuple[dict[str, list[str]], str] | None:
    for files in SPLIT_LISTS:
        if all((place / name).is_file() for name in files):
            lists = {
                split: [line.strip() for line in read_text(place / name).split("\n") if line.strip()]
                for split, name in zip(SPLITS, files, strict=True)
            }
            return lists, f"{', '.join(files)} in {place}"
    return None


def karpathy_split(place: Path) -> tuple[dict[str, list[str]], str] | None:
    for file in KARPATHY_FILES:
        if (place / file).is_file():
            lists: dict[str, list[str]] = {split: [] for split in SPLITS}
            try:
                for image in read_json(place / file)["images"]:
                    split = "train" if image["split"] == "restval" else image["split"]
                    lists[split].append(karpathy_name(image))
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{place / file} is not a Karpathy caption file: no images, split or filename"
                ) from error
            return lists, f"Karpathy's {file} in {place}"
    return None


def require_splits(splits: dict[str, np.ndarray], source: str) -> None:
    for split, images in splits.items():
        if len(images) == 0:
            raise UserError(
                f"the {split} split has no images ({source}): training needs at least one image in each split"
            )


# --------------------------------------------------------------------------------------------------
# Batches of whole images


class Batch(NamedTuple):
    """Captions of whole images as one packed sequence: no padding anywhere.

    Rows (captions) are sorted by falling length; tokens lie time step after time step, so that step t
    holds the first `batch_sizes[t]` rows, which are all that have not ended. This is the layout of
    `torch.nn.utils.rnn.PackedSequence`.
    """

    images: np.ndarray  # int64 (I,) positions in the caption set
    row_image: torch.Tensor  # int64 (R,) which of the I images a caption belongs to
    inputs: torch.Tensor  # int64 (N,) <SOS>, w1, ..., wn of every caption
    targets: torch.Tensor  # int64 (N,) w1, ..., wn, <EOS>
    batch_sizes: torch.Tensor  # int64 (T,) rows still running at each step, on the CPU
    token_row: torch.Tensor  # int64 (N,) the row of each token
    slots: torch.Tensor  # int64 (N,) place of each token in an (I, S) table of the images' tokens
    slots_per_image: int  # S

    def to(self, device: torch.device) -> Batch:
        """The same batch with its index tensors on `device` (batch_sizes stay: PyTorch wants them on the CPU)."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("row_image", "inputs", "targets", "token_row", "slots")
        }
        return self._replace(**moved)


class BatchMaker:
    """Cuts a split into batches of whole images with at most `batch_size` captions each."""

    def __init__(self, data: CaptionSet, vocabulary: Vocabulary, max_length: int):
        self.first_caption = data.first_caption
        self.words = len(vocabulary)
        self.lookup = np.array([vocabulary.id_of.get(word, UNK) for word in data.tokens.words], dtype=np.int32)
        self.tokens = data.tokens.ids
        self.starts = data.tokens.offsets[:-1]
        self.lengths = np.minimum(np.diff(data.tokens.offsets), max_length)

    def plan(self, images: np.ndarray, batch_size: int) -> list[np.ndarray]:
        """Cut `images`, in their order, into runs whose captions number at most `batch_size`.

        Returns arrays of caption numbers; an image with more captions than that is spread over several.
        """
        captions = concatenate_ranges(self.first_caption[images], self.first_caption[images + 1])
        cuts, position, filled = [], 0, 0
        for count in (self.first_caption[images + 1] - self.first_caption[images]).tolist():
            if filled and filled + count > batch_size:
                cuts.append(position)
                filled = 0
            position += count
            filled += count
            while filled > batch_size:
                filled -= batch_size
                cuts.append(position - filled)
        return np.split(captions, cuts) if len(captions) else []

    def word_counts(self, images: np.ndarray) -> torch.Tensor:
        """How often each word, and `<EOS>`, is a target in these images' captions: (V,)."""
        counts = torch.zeros(self.words)
        for captions in self.plan(images, 4096):
            counts += torch.bincount(self.make(captions).targets, minlength=self.words)
        return counts

    def owner(self, captions: np.ndarray) -> np.ndarray:
        """The image, int64 (R,), of each of these captions (R,)."""
        return np.searchsorted(self.first_caption, captions, side="right") - 1

    def make(self, captions: np.ndarray) -> Batch:
        """Pack the given captions (numbers) with their images."""
        owner = self.owner(captions)
        # The words are looked up by `lookup` once they are few.
        return pack_captions(self.tokens, self.starts[captions], self.lengths[captions], owner, self.lookup)[0]


def pack_captions(
    words: np.ndarray, starts: np.ndarray, lengths: np.ndarray, owner: np.ndarray, lookup: np.ndarray | None = None
) -> tuple[Batch, np.ndarray]:
    """Pack captions that lie in one flat array, caption c at `words[starts[c]:starts[c] + lengths[c]]`.

    Args:
        words: int (tokens,) vocabulary ids, or what `lookup` makes such.
        owner: int64 (R,) the image of each caption.

    Returns:
        the batch, and which of the given captions each of its rows is, int64 (R,).
    """
    order = np.argsort(-lengths, kind="stable")
    starts, owner, steps = starts[order], owner[order], lengths[order] + 1  # the words and <EOS>
    images, row_image = np.unique(owner, return_inverse=True)
    running = np.arange(steps.max())[:, None] < steps[None, :]  # (T, R)
    time, row = np.nonzero(running)  # packed order: step by step
    word = starts[row] + time
    after, before = words[np.minimum(word, len(words) - 1)], words[word - 1]
    if lookup is not None:
        after, before = lookup[after], lookup[before]
    targets = np.where(time == steps[row] - 1, EOS, after)
    inputs = np.where(time == 0, SOS, before)
    # Where each token lies among its image's tokens: the image's earlier rows, then its own time.
    by_image = np.argsort(row_image, kind="stable")
    earlier = np.cumsum(steps[by_image]) - steps[by_image]
    first = earlier[np.searchsorted(row_image[by_image], np.arange(len(images)))]
    base = np.empty(len(order), dtype=np.int64)
    base[by_image] = earlier - first[row_image[by_image]]
    per_image = int(np.bincount(row_image, weights=steps).max())
    slots = row_image[row] * per_image + base[row] + time
    as_tensor = lambda values: torch.from_numpy(values.astype(np.int64))  # noqa: E731
    batch = Batch(
        images, as_tensor(row_image), as_tensor(inputs), as_tensor(targets),
        as_tensor(running.sum(1)), as_tensor(row), as_tensor(slots), per_image,
    )  # fmt: skip
    return batch, order


def saved_split_of(data: CaptionSet) -> dict[str, list[str]] | None:
    """The names that a drawn split held out, for the checkpoint; None where the data set brings its own lists."""
    if not data.split_source.startswith(("drawn", "the split kept")):
        return None
    return {split: [data.names[i] for i in data.splits[split]] for split in ("val", "test")}


def dump_split(data: CaptionSet) -> str:
    """The split as JSON text, names by split, for `split.json` in the run directory."""
    named = {split: [data.names[i] for i in images] for split, images in data.splits.items()}
    return json.dumps({"source": data.split_source, **named}, indent=1)
