"""The layouts of caption data sets: where images, captions and split lists lie, and how captions files are read."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from captioning.io import CONTROL_CHARACTERS, UserError, read_json

SPLITS = ("train", "val", "test")

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
KARPATHY_FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json", "dataset.json")


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
