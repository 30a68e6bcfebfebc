"""Fuzz targets of data sets and folders: captions, splits, archives, names of run directories."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_inputs import ENCODINGS, ODD_CAPTIONS, altered, mostly_sound, mutated, names, refuses
from hypothesis import strategies as st

from captioning.fetch import extract_archive
from captioning.io import CONTROL_CHARACTERS
from captioning.layouts import SPLITS, name_fault, read_captions
from captioning.runs import find_checkpoint
from captioning.splits import find_splits, is_stored, store_split, trained_on

# --------------------------------------------------------------------------------------------------
# Captions and splits


@st.composite
def caption_files(draw: st.DrawFn) -> tuple[str, bytes]:
    form = draw(st.sampled_from(["csv", "bars", "token", "karpathy"]))
    rows = draw(st.lists(st.tuples(mostly_sound, st.sampled_from(ODD_CAPTIONS) | st.text(max_size=20)), max_size=6))
    rows += [("a.jpg", "A dog ."), ("b.jpg", "Two dogs .")] if draw(st.booleans()) else []
    if form == "karpathy":
        images: list[Any] = [{"filename": n, "split": "train", "sentences": [{"raw": c}]} for n, c in rows]
        document = {"images": images} if draw(st.booleans()) else draw(altered({"images": images}))
        return "dataset.json", draw(mutated(json.dumps(document).encode(), 2))
    file, header, pattern = {
        "csv": ("captions.txt", draw(st.sampled_from(["image,caption", "caption,image", "image_name,n,comment", ""])), "{},{}"),
        "bars": ("results.csv", "image_name| comment_number| comment", "{}| 0| {}"),
        "token": ("Flickr8k.token.txt", "x.jpg#0\tA cat", "{}#0\t{}"),
    }[form]  # fmt: skip
    end = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
    text = end.join([header, *(pattern.format(*row) for row in rows)]) + draw(st.sampled_from([end, "", '"', "\x1a"]))
    return file, draw(mutated(text.encode(draw(st.sampled_from(ENCODINGS)), "replace"), 2))


def captions(value: tuple[str, bytes], folder: Path) -> bool:
    path = folder / value[0]
    path.write_bytes(value[1])
    read = refuses(lambda: read_captions(path))
    if read is None:
        return False
    found, notes = read
    for name, texts in found.groupby("image")["caption"]:
        parts = name.split("/")  # a file, or a file in one folder
        assert len(parts) <= 2 and all(os.path.basename(part) == part not in ("", ".", "..") for part in parts)
        assert not CONTROL_CHARACTERS.search(name)
        assert len(texts) and not any(CONTROL_CHARACTERS.search(text) or not text.strip() for text in texts)
        name.encode()
    assert not any(CONTROL_CHARACTERS.search(note) for note in notes)
    return True


@st.composite
def split_files(draw: st.DrawFn) -> tuple[dict[str, bytes], Any]:
    extra = st.sampled_from([[]] * 3) | st.lists(st.sampled_from([f"{i}.jpg" for i in range(6)]) | names, max_size=3)
    lists = {
        split: [*sound, *draw(extra)]
        for split, sound in zip(SPLITS, (["0.jpg", "1.jpg"], ["2.jpg"], ["3.jpg"]), strict=True)
    }
    saved: Any = None
    files: dict[str, bytes] = {}
    match draw(st.sampled_from(["lists", "karpathy", "saved"])):
        case "lists":
            encoding = draw(st.sampled_from(ENCODINGS))
            for split in SPLITS:
                files[f"{split}.txt"] = draw(mutated("\r\n".join(lists[split]).encode(encoding, "replace"), 1))
        case "karpathy":
            images: list[Any] = [{"filename": name, "split": split} for split in SPLITS for name in lists[split]]
            document = {"images": images} if draw(st.booleans()) else draw(altered({"images": images}))
            files["dataset.json"] = draw(mutated(json.dumps(document).encode(), 1))
        case "saved":
            saved = stored_split(**lists)
    return files, saved


def stored_split(**lists: list[str]) -> dict[str, Any]:
    """The stored form of a split of images whose sizes are the lengths of their names."""
    return {
        split: {"names": part, "sizes": [len(name) for name in part], "hashes": [7] * len(part)}
        for split, part in {**lists, "inherited": ["old.jpg"]}.items()
    }


def splits(value: tuple[dict[str, bytes], Any], folder: Path) -> bool:
    files, saved = value
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sound = saved is None or is_stored(saved)  # which the reader of checkpoints has made sure of
    return sound and split_names([f"{i}.jpg" for i in range(6)], [folder], saved) is not None


def split_names(known: list[str], places: list[Path], saved: Any) -> dict[str, list[str]] | None:
    """Split these images, whose sizes are the lengths of their names; return the names, or None if that is refused."""
    notes: list[str] = []
    read = refuses(lambda: find_splits(places, known, [len(name) for name in known], 0, saved, notes))
    if read is None:
        return None
    positions = np.concatenate([read[0][split] for split in SPLITS])
    assert len(set(positions.tolist())) == len(positions) <= len(known) and all(len(read[0][split]) for split in SPLITS)
    assert not any(CONTROL_CHARACTERS.search(note) for note in notes)
    return {split: [known[i] for i in images] for split, images in read[0].items()}


@st.composite
def stored_splits(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    lists = {split: [f"{split}{i}.jpg" for i in range(4)] for split in SPLITS}
    document: Any = stored_split(**lists)
    document = draw(altered(document)) if draw(st.integers(0, 3)) else document
    known = [name for part in lists.values() for name in part] if draw(st.booleans()) else []
    raw = json.dumps(document).encode("utf-8", "surrogatepass")
    more = draw(st.lists(names, max_size=3, unique=True))
    return draw(mutated(raw, 1)), known + [name for name in more if name_fault(name) is None]


def stored_split_file(value: tuple[bytes, list[str]], folder: Path) -> bool:
    """`split.json` of an exported folder: no image that was trained on becomes a validation or test image."""
    raw, known = value
    with contextlib.suppress(ValueError, RecursionError):
        saved = json.loads(raw)
        if is_stored(saved):
            found = split_names(known, [], saved)
            if found is not None:
                trained = {(name, size) for name, size, _ in trained_on(saved)}
                held_out = {(name, len(name)) for split in ("val", "test") for name in found[split]}
                assert not held_out & trained or not set(known) <= {name for name, _ in trained}
                positions = {split: np.array([known.index(n) for n in part]) for split, part in found.items()}
                assert is_stored(store_split(positions, known, np.zeros((len(known), 2), np.int64), saved))
            return found is not None
    return False


# --------------------------------------------------------------------------------------------------
# Archives


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    kinds = [tarfile.REGTYPE] * 6 + [
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
    ]
    contents = st.sampled_from([b"", b"content", bytes(30_000)])
    entries = draw(st.lists(st.tuples(names, st.sampled_from(kinds), contents), max_size=5))
    entries += [("good.jpg", tarfile.REGTYPE, b"good")]
    buffer = io.BytesIO()
    if draw(st.booleans()):
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, kind, content in entries:
                info = zipfile.ZipInfo(clean(name) or "empty")
                info.compress_type = draw(
                    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
                )
                mode = {tarfile.SYMTYPE: 0o120777, tarfile.CHRTYPE: 0o020666, tarfile.FIFOTYPE: 0o010666}.get(
                    kind, 0o100644
                )
                info.external_attr = mode << 16
                archive.writestr(info, content)
        return draw(mutated(buffer.getvalue()))
    form = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, kind, content in entries:
            entry = tarfile.TarInfo(clean(name))
            entry.type, entry.linkname = kind, draw(st.sampled_from(["/etc/passwd", "../evil", "good.jpg"]))
            entry.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(content))
    # Inside of the compression: a changed byte outside would only be a wrong checksum.
    raw = buffer.getvalue()
    raw = draw(mutated(raw)) if draw(st.booleans()) else repaired(draw(mutated(raw, 3)))
    packed = zlib.compressobj(wbits=31)
    whole = packed.compress(raw) + packed.flush()
    return whole if draw(st.integers(0, 3)) else draw(mutated(whole, 2))


def clean(name: str) -> str:
    return name.encode("utf-8", "replace").decode("utf-8")


def repaired(raw: bytes) -> bytes:
    """A tar whose headers have right checksums again, so that what else was changed in them is read."""
    data = bytearray(raw)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[at : at + 512]))[0]
    return bytes(data)


def archive(value: bytes, folder: Path) -> bool:
    (folder / "x").write_bytes(value)
    (folder / "sub").mkdir()
    out = folder / "sub" / "out"
    refuses(lambda: extract_archive(folder / "x", out, 20_000))
    written = [path for path in folder.rglob("*") if path not in (folder / "x", folder / "sub", out)]
    assert all(path.is_relative_to(out) and not path.is_symlink() for path in written)
    assert sum(path.stat().st_size for path in written if path.is_file()) <= 20_000
    assert not os.path.lexists("/evil") and not os.path.lexists(folder.parent / "evil")
    return out.exists()


# --------------------------------------------------------------------------------------------------
# Folders


@st.composite
def run_trees(draw: st.DrawFn) -> tuple[list[list[str]], list[str]]:
    part = st.sampled_from(["best.pt", "model_epoch_1.pt", "flickr8k", "run_20241201_143022", "dry_run_x"]) | names
    paths = st.lists(part, min_size=1, max_size=3)
    return draw(st.lists(paths, max_size=4)), draw(paths)


def run_directory(value: tuple[list[list[str]], list[str]], folder: Path) -> bool:
    tree, wanted = value
    base = folder / "saved_models"
    base.mkdir()
    for parts in tree:
        with contextlib.suppress(OSError, ValueError):  # names that no file can have
            path = base.joinpath(*(part.replace("/", "_").replace("..", "_") for part in parts))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        found = refuses(lambda: find_checkpoint(base.joinpath(*(part.lstrip("/") for part in wanted))), lines=2)
    assert found is None or found.is_file()
    return found is not None
