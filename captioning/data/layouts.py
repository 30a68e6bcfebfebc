"""The layouts of caption data sets: where images, captions and split lists lie, and how captions files are read.

Captions come as a pandas table. It is filled line by line instead of by pandas' own parser, which reads neither unquoted
commas nor the row without its separator in Flickr30k's file, cannot name the line of a faulty row after a caption of
several lines, and takes "None" for a missing value.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.data.sidecars import captions_beside, photos_in
from captioning.io import CONTROL_CHARACTERS, DATA_SCRIPT, UserError, program, read_json

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "val", "test")

# Where the known data sets keep their parts, relative to the data directory; the first that exists is used.
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
# `name.jpg#0<TAB>caption`, the official Flickr form; Flickr8k has rows of `name.jpg.1#0`.
TOKEN_ROW = r"^(?P<image>[^\t]+)#\d+\t(?P<caption>.*)$"
# `image_name| comment_number| comment`, Kaggle's Flickr30k, one row of which lacks its second bar.
BAR_ROW = r"^(?P<image>[^|]*)\|\s*\d+\s*(?:\|\s*|\s+)(?P<caption>.*)$"
IMAGE_COLUMNS, CAPTION_COLUMNS = ("image", "image_name", "filename", "file_name"), ("caption", "comment", "text")
# Other names of a split, in Karpathy's files and in CSV columns.
SPLIT_NAMES = {"restval": "train", "dev": "val", "valid": "val", "validation": "val"}
KARPATHY_FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json", "dataset.json")


def files_in(directory: Path, folders: set[str]) -> set[str]:
    """Return the files in these folders below a directory, as captions name them: `a.jpg`, `val2014/a.jpg`."""
    return {
        f"{folder}/{entry.name}" if folder else entry.name
        for folder in folders
        if (directory / folder).is_dir()
        for entry in os.scandir(directory / folder)
        if entry.is_file()
    }


def default_folder(
    data_dir: Path | None, image_dir: Path | None, captions_file: Path | None, dataset_type: str
) -> Path | None:
    """Return `data_dir`, or `data/<dataset_type>` unless the next two say where everything is."""
    if data_dir is None and not (image_dir and captions_file):
        return Path("data") / dataset_type
    return data_dir


def find_captions_file(data_dir: Path | None) -> Path:
    """Return the first of CAPTION_FILES in `data_dir`, or else a folder there whose photos have captions beside them.

    Raises:
        UserError: there is none; the message says how to get or name one.
    """
    if data_dir is None or not data_dir.is_dir():
        raise UserError(
            f"data directory {data_dir} is not there: `{program(DATA_SCRIPT)}` fetches Flickr8k and Flickr30k, "
            "--data_dir DIR names a folder you have, --dataset_type demo draws a small set"
        )
    for name in CAPTION_FILES:
        if (data_dir / name).is_file():
            return data_dir / name
    for name in IMAGE_DIRECTORIES:
        if photos_in(data_dir / name):
            return data_dir / name
    raise UserError(
        f"no captions file in {data_dir}: expected one of {', '.join(CAPTION_FILES)}, or a .txt or .xmp beside each photo, "
        "or name yours with --captions_file"
    )


def find_image_directory(data_dir: Path | None, image_dir: Path | None, images: Sequence[str]) -> Path:
    """Return `image_dir`, or the folder of a known layout below `data_dir` that holds some of the named images.

    Raises:
        UserError: there is none.
    """
    if image_dir is not None:
        if not image_dir.is_dir():
            raise UserError(f"--image_dir {image_dir} is not a directory")
        return image_dir
    for name in IMAGE_DIRECTORIES:
        if data_dir and any((data_dir / name / image).is_file() for image in images[:50]):
            return data_dir / name
    raise UserError(
        f"no image of the captions file ({images[0]}, for example) in {data_dir} or its "
        f"{', '.join(IMAGE_DIRECTORIES[:-1])}: give their folder with --image_dir"
    )


def read_captions(path: Path, generated: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """Read one captions file of any known form, or the captions beside the photos of a folder.

    Args:
        generated: whether captions that the program itself wrote beside photos are read.

    Returns:
        a table with a row per caption in file order, columns `image` (file name) and `caption`, both str; and notes on
        what was left out.

    Raises:
        UserError: unreadable, or a malformed row (named with its line).
    """
    import pandas as pd  # 0.2 s, and only this needs it

    if path.is_dir():
        table = rows_table(captions_beside(path, generated))
        if table.empty:
            raise UserError(
                f"no person's caption is beside the photos of {path}: --generated_captions takes the program's own"
            )
    elif path.suffix == ".json":
        table = rows_table(json_rows(path))
    else:
        text = read_text(path)
        header = text[:200].split("\n", 1)[0].strip().lower()
        if path.suffix == ".token" or re.match(r"[^\t\n]+#\d+\t", text):
            table = lines_table(path, text, TOKEN_ROW, "image.jpg#0<TAB>caption")
            plain = {name: re.sub(r"(\.\w+)\.\d+$", r"\1", name) for name in table["image"].unique()}
            table["image"] = table["image"].map(plain)
        elif header.startswith("image_name|"):
            table = lines_table(path, text, BAR_ROW, "image| number| caption", first=2)
            table["image"] = table["image"].str.strip()
        else:
            table = rows_table(row[:3] for row in csv_rows(path, text))
    names = table["image"].unique()
    for name in names:
        if reason := name_fault(name):
            raise UserError(f"{path}, line {table.index[table['image'] == name][0]}: {reason}")
    captions = table["caption"].str.replace(CONTROL_CHARACTERS, " ", regex=True)
    worded = captions.str.contains(r"[^\W_]").astype(bool)  # a letter or a digit
    cleaned, empty = int((captions != table["caption"]).sum()), int((~worded).sum())
    table = pd.DataFrame({"image": table["image"], "caption": captions})[worded].reset_index(drop=True)
    if table.empty:
        raise UserError(f"{path} holds no captions")
    notes = []
    if cleaned:
        notes.append(f"{cleaned} caption(s) with line breaks or other control characters, which became spaces")
    if empty:
        notes.append(f"{empty} empty caption(s), left out")
    wordless = pd.Index(names).difference(table["image"], sort=False).tolist()
    if wordless:
        notes.append(f"{len(wordless)} image(s) with empty captions only, left out: {', '.join(wordless[:3])}")
    return table, notes


def name_fault(name: str) -> str | None:
    """Return why an image name of a captions file is refused, or None."""
    if not name:
        return "a row without an image name"
    folder, slash, file = name.rpartition("/")
    if (slash and not (folder and file)) or any(
        os.path.basename(part.replace("\\", "/")) != part or part in (".", "..") for part in (folder, file)
    ):
        return f"{name[:80]!r} is not a plain file name; images lie in one folder"
    if CONTROL_CHARACTERS.search(name) or len(name.encode()) > 255:
        return (
            f"the image name {name[:80]!r} has a line break or another control character, or is longer than file "
            "systems allow: rename the image"
        )
    return None


def rows_table(rows: Iterable[tuple[int, str, str]]) -> pd.DataFrame:
    """Return the rows (line, image, caption) as a table, indexed by line."""
    import pandas as pd

    # Python's own strings: JSON may hold lone surrogates, which other string types refuse.
    return pd.DataFrame(rows, columns=["line", "image", "caption"], dtype=object).set_index("line")


def lines_table(path: Path, text: str, pattern: str, form: str, first: int = 1) -> pd.DataFrame:
    """Return the table of a file with a caption per line, indexed by line, from the line `first` on.

    Raises:
        UserError: a line that is not of the `form` that `pattern` reads.
    """
    import pandas as pd

    lines = pd.Series(text.split("\n"), dtype=object)
    lines.index += 1
    lines = lines[(lines.str.strip() != "") & (lines.index >= first)]
    table = lines.str.extract(pattern)
    faulty = lines[table["caption"].isna()]
    if len(faulty):
        raise UserError(f"{path}, line {faulty.index[0]}: expected `{form}`, found {faulty.iloc[0][:60]!r}")
    return table


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 with its byte order mark, with any line ends.

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
            f"{path} holds NUL characters: UTF-16 without its mark, UTF-32, or not text; "
            f"convert it, e.g. `iconv -f utf-16le -t utf-8 {path.name}`"
        )
    try:
        return raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not {encoding.removesuffix('-sig')} text; convert it, e.g. `iconv -f latin1 -t utf-8 {path.name}`"
        ) from error


def json_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Read Karpathy's files or COCO's own, which come in two."""
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
    """Read `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`, Karpathy and Fei-Fei's form."""
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
    """Return an image's file name, with its folder where there are several, as in COCO."""
    name, folder = image["filename"], image.get("filepath", "")
    if not isinstance(name, str) or not isinstance(folder, str):
        raise TypeError("filename and filepath are texts")
    return f"{folder}/{name}" if folder else name


def coco_rows(path: Path, content: Any) -> Iterator[tuple[int, str, str]]:
    """Read `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    The images of captions_X.json are in the folder X.
    """
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


def csv_rows(path: Path, text: str) -> Iterator[tuple[int, str, str, str]]:
    """Read `image,caption` with a header, or the columns image_name, comment_number, comment.

    Yields:
        line, image, caption, and the column `split` ("" where there is none).
    """
    reader = csv.reader(io.StringIO(text), strict=True)
    line = 1  # where a row begins: a quoted caption may go over several lines
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        image = next((header.index(name) for name in IMAGE_COLUMNS if name in header), None)
        caption = next((header.index(name) for name in CAPTION_COLUMNS if name in header), None)
        split = header.index("split") if "split" in header else None
        if image is None or caption is None:
            raise UserError(
                f"{path}, line 1: expected the header `image,caption`, found {','.join(header)[:60]!r} "
                "(see 'Your own photos' in README.md)"
            )
        line = reader.line_num + 1
        for row in reader:
            # An unquoted comma belongs to the caption when that is the last column.
            last = caption == len(header) - 1
            blank = not "".join(row).strip() and len(row) < len(header)
            if not blank and (len(row) < len(header) or (len(row) > len(header) and not last)):
                raise UserError(
                    f"{path}, line {line}: expected {len(header)} comma-separated fields "
                    f"({','.join(header)[:60]!r}), found {len(row)}: {','.join(row)[:60]!r}"
                )
            if not blank:
                part = "" if split is None else row[split].strip().lower()
                yield line, row[image].strip(), ",".join(row[caption:]) if last else row[caption], part
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f'{path}, line {line}: {error}; quote captions as in "a ""big"" dog"') from error


def split_lists(place: Path) -> tuple[dict[str, list[str]], str] | None:
    """Return the image names of each split that has a list in `place`, and their source; None without lists."""
    for files in SPLIT_LISTS:
        there = {split: name for split, name in zip(SPLITS, files, strict=True) if (place / name).is_file()}
        if there:
            lists = {
                split: [line.strip() for line in read_text(place / name).split("\n") if line.strip()]
                for split, name in there.items()
            }
            return lists, f"{', '.join(there.values())} in {place}"
    return None


def karpathy_split(place: Path) -> tuple[dict[str, list[str]], str] | None:
    """Return the image names of each split from Karpathy's file in `place`, and their source; None without one.

    Raises:
        UserError: the file is not one of Karpathy's.
    """
    for file in KARPATHY_FILES:
        if (place / file).is_file():
            lists: dict[str, list[str]] = {split: [] for split in SPLITS}
            try:
                for image in read_json(place / file)["images"]:
                    lists[SPLIT_NAMES.get(image["split"], image["split"])].append(karpathy_name(image))
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{place / file} is not a Karpathy caption file: no images, split or filename"
                ) from error
            return lists, f"Karpathy's {file} in {place}"
    return None


def column_split(path: Path) -> tuple[dict[str, list[str]], str] | None:
    """Return the image names of each split in the column `split` of a captions file, and their source; None without one.

    Raises:
        UserError: a row has another word there.
    """
    text = read_text(path) if path.is_file() and path.suffix != ".json" else ""
    header = {name.strip(' "').lower() for name in text.partition("\n")[0].split(",")}
    if "split" not in header or not header.intersection(IMAGE_COLUMNS):
        return None
    lists: dict[str, dict[str, None]] = {}
    for line, name, _, word in csv_rows(path, text):
        part = SPLIT_NAMES.get(word, word)
        if part in SPLITS:
            lists.setdefault(part, {})[name] = None
        elif part:  # an image without a part is one that no list has
            raise UserError(
                f"{path}, line {line}: the column split has {word[:40]!r}: expected {', '.join(SPLITS)}, or another header"
            )
    return {part: [*names] for part, names in lists.items()}, f"the column split of {path}"
