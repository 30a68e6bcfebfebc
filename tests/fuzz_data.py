"""Fuzz targets of data sets: captions and splits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_inputs import ENCODINGS, ODD_CAPTIONS, altered, mostly_sound, mutated, names, refuses
from hypothesis import strategies as st

from captioning.io import CONTROL_CHARACTERS
from captioning.layouts import SPLITS, read_captions
from captioning.splits import find_splits, is_stored


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
