"""Splits by image: which images train, validate and test, and what a model was trained on.

A split is settled once, when a model is trained, and then lies in the model's checkpoint by image name, size and
CRC-32: no image that a model was trained on is ever scored as a validation or test image.

Stored form, plain types: `{"train": part, "val": part, "test": part, "inherited": part}` with
`part = {"names": [str], "sizes": [int], "hashes": [int]}`. `inherited` are the training images of the models that this
one was trained on from.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from captioning.data.layouts import SPLITS, column_split, karpathy_split, split_lists
from captioning.io import CONTROL_CHARACTERS, UserError, log, printable, sha256

COCO_HELD_OUT = 5000  # validation and test images of COCO, as many as Karpathy's split has
# Shares of names in common from which on two sets of other files are one data set, encoded anew: see `same_names`.
SAME_SET, LEAST_SHARE = 0.9, 0.5
MOST_COPIES = 0.02  # of the images to score, that may be training images under other names
# 1000268201_693b08cb0e.jpg of Flickr8k is 1000268201.jpg of Flickr30k: the number is the photo's on Flickr. Of names that
# are a number alone those of 9 digits count, which are no dates and no counts.
FLICKR_NAME, FLICKR_DIGITS = re.compile(r"^([1-9]\d{4,})(_[0-9a-f]{10})?\.jpg$"), 9
Part = dict[str, Any]
StoredSplit = dict[str, Part]


def find_splits(
    places: Sequence[Path], names: Sequence[str], sizes: Sequence[int], seed: int, stored: StoredSplit | None,
    notes: list[str], copies: Callable[[], list[list[str]]] = list,
) -> tuple[dict[str, np.ndarray], str]:  # fmt: skip
    """Split images: as a checkpoint has them, else by the data set's own lists, else at random.

    Args:
        places: folders that may hold split lists, and the captions file, which may have a column `split`.
        names, sizes: of all captioned images; bytes of their files.
        stored: the split in a checkpoint. It rules wherever it knows an image.
        notes: receives what was left out and why.
        copies: returns groups of images whose files are equal.

    Returns:
        positions (int64, sorted) by split, and where they come from.

    Raises:
        UserError: a list names an image twice, or no image trains or validates.
    """
    leaking: set[str] = set()
    known, is_own = (None, False) if stored is None else stored_lists(stored, names, sizes, notes)
    found, place = listed_split(places) or ({}, "")
    listed = {split: match_names(part, names) for split, part in found.items()}
    if known and is_own:
        lists, source = known, "the checkpoint"
        part_of = {name: split for split in SPLITS for name in known[split]}
        moved = [name for split, part in listed.items() for name in part if part_of.get(name, split) != split]
        if moved:
            notes.append(
                f"{len(moved)} image(s) are in another split in {place} ({few(moved)}): the checkpoint's split rules"
            )
    else:
        if listed:
            lists, source = complete_lists(listed, names, seed, notes), place
        else:
            lists, source = drawn_split(names, seed, copies())
        if known:  # images of the checkpoint among others keep their part
            held = {name for part in known.values() for name in part}.intersection(names)
            lists = {s: [n for n in lists[s] if n not in held] + [n for n in known[s] if n in held] for s in SPLITS}
            source += f", {len(held)} image(s) as in the checkpoint"
        leaking = leave_training(lists, copies())
        if leaking:
            notes.append(
                f"{len(leaking)} training image(s) are copies of validation or test images, left out: {few(leaking)}"
            )
    position = {name: number for number, name in enumerate(names)}
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
    absent = [name for name in owner if name not in position]
    if absent:
        notes.append(f"{len(absent)} image(s) of the split are not in the data set, left out: {few(absent)}")
    unused = [name for name in names if name not in owner and name not in leaking]
    if unused:
        notes.append(f"{len(unused)} image(s) in no split, left out: {few(unused)}")
    require_splits(splits, source)
    return splits, source


def whole_set(
    names: Sequence[str], sizes: Sequence[int], stored: StoredSplit | None, notes: list[str]
) -> dict[str, np.ndarray]:
    """Return all images as one split, `all`. Raises UserError if a checkpoint's split has some as training images."""
    known, _ = (None, False) if stored is None else stored_lists(stored, names, sizes, notes)
    trained = set(known["train"]).intersection(names) if known else set()
    if trained:
        raise UserError(
            f"--split all: the model was trained on {len(trained)} of the {len(names)} images ({few(trained)}): a score on "
            "them says nothing. Leave the flag out, or give a folder without these images"
        )
    return {"all": np.arange(len(names))}


def match_names(entries: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the images that the entries of a list mean, which may have a folder or no ending; others as they are."""
    known = set(names)
    by_stem = {PurePosixPath(name).stem: name for name in names}
    found = []
    for entry in entries:
        base = entry.replace("\\", "/").rpartition("/")[2]
        found.append(next((each for each in (entry, base, by_stem.get(base)) if each in known), entry))
    return found


def complete_lists(
    listed: Mapping[str, Sequence[str]], names: Sequence[str], seed: int, notes: list[str]
) -> dict[str, list[str]]:
    """Add the lists that a data set lacks, and note how.

    A missing training list is all images that no list holds out, a missing validation list a tenth of the training
    list, drawn; a missing test list has no images.
    """
    lists = {split: list(part) for split, part in listed.items()}
    if "train" not in lists:
        held = {name for part in lists.values() for name in part}
        lists["train"] = [name for name in names if name not in held]
        notes.append("there is no list of training images: all that no other list names train")
    if "val" not in lists:
        pool = np.random.default_rng(seed).permutation(lists["train"]).tolist()
        count = max(1, round(0.1 * len(pool)))
        lists |= {"val": pool[:count], "train": pool[count:]}
        notes.append(f"there is no list of validation images: {count} of the training list, drawn with --seed {seed}")
    if "test" not in lists:
        lists["test"] = []
        notes.append("there is no list of test images: none are tested")
    return lists


def leave_training(lists: dict[str, list[str]], copies: Sequence[Sequence[str]]) -> set[str]:
    """Take training images out of their list whose files are equal to those of a held-out image; return them."""
    held_out, train = {*lists["val"], *lists["test"]}, set(lists["train"])
    leaking = {name for group in copies if held_out.intersection(group) for name in group if name in train}
    lists["train"] = [name for name in lists["train"] if name not in leaking]
    return leaking


def equal_files(folder: Path, names: Sequence[str], sizes: Sequence[int]) -> list[list[str]]:
    """Return groups of images whose files are equal, byte for byte; only files of one size are read."""
    by_size, groups = defaultdict(list), defaultdict(list)
    for name, size in zip(names, sizes, strict=True):
        by_size[size].append(name)
    for size, alike in by_size.items():
        beginnings = defaultdict(list)  # most files of one size differ early
        for name in alike if size and len(alike) > 1 else ():  # an empty file is no image
            with open(folder / name, "rb") as file:
                beginnings[file.read(4096)].append(name)
        for same in beginnings.values():
            for name in same if len(same) > 1 else ():
                groups[size, sha256(folder / name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def require_splits(splits: Mapping[str, np.ndarray], source: str) -> None:
    """Raise UserError if no image trains or validates, where there are such splits."""
    for split in ("train", "val"):
        if split in splits and not len(splits[split]):
            raise UserError(
                f"the {split} split has no images ({source}): training needs at least one; --mode test --split all scores a "
                "folder without lists"
            )


def listed_split(places: Sequence[Path]) -> tuple[dict[str, list[str]], str] | None:
    kinds = (split_lists, karpathy_split, column_split)
    return next((found for place in places for kind in kinds if (found := kind(place))), None)


def drawn_split(
    names: Sequence[str], seed: int, copies: Sequence[Sequence[str]] = ()
) -> tuple[dict[str, list[str]], str]:
    """Draw 80/10/10 % of the images; of COCO 5,000 each of val2014, whose other images train.

    Args:
        copies: groups of images that stay in one part.
    """
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    held_out_from = [name for name in shuffled if name.startswith("val2014/")]
    if held_out_from:
        held = min(COCO_HELD_OUT, len(held_out_from) // 2)
        lists = {"val": held_out_from[:held], "test": held_out_from[held : 2 * held]}
        lists["train"] = [name for name in names if not name.startswith("val2014/")] + held_out_from[2 * held :]
        return lists, (
            f"drawn from val2014 with --seed {seed}, {held} images each; Karpathy's own is in his dataset_coco.json"
        )
    held = max(1, round(0.1 * len(names)))
    lists = {"train": shuffled[2 * held :], "val": shuffled[:held], "test": shuffled[held : 2 * held]}
    for group in copies:
        part = next(split for split, drawn in lists.items() if group[0] in drawn)
        others = {split: [name for name in drawn if name not in group[1:]] for split, drawn in lists.items()}
        lists = others | {part: others[part] + list(group[1:])}
    return lists, f"drawn by image with --seed {seed}: 80 % / 10 % / 10 %"


def stored_lists(
    stored: StoredSplit, names: Sequence[str], sizes: Sequence[int], notes: list[str]
) -> tuple[dict[str, list[str]] | None, bool]:
    """Apply a checkpoint's split to a data set.

    An image is known by name and size, since many folders have an `IMG_1.jpg`. Where nearly all names are known
    (`same_names`), the set is the checkpoint's own, and files of other sizes are its images encoded anew.

    Returns:
        the names of each part (None where the set has none of the checkpoint's images), and whether the set is the
        checkpoint's own.
    """
    known_sizes = {name: size for split in SPLITS for name, size, _ in keys(stored[split])}
    named = [(name, size) for name, size in zip(names, sizes, strict=True) if name in known_sizes]
    changed = {name for name, size in named if known_sizes[name] != size}
    is_own = same_names(known_sizes, names)
    if not is_own:
        known_sizes = {name: size for name, size in known_sizes.items() if name not in changed}
        if len(changed) == len(named):
            if named:
                notes.append(
                    f"{len(named)} image(s) have names of the checkpoint's images, but other contents: {few(changed)}"
                )
            return None, False
    elif changed:
        notes.append(f"{len(changed)} image(s) have another size than at training: {few(changed)}")
    lists = {split: [name for name in stored[split]["names"] if name in known_sizes] for split in SPLITS}
    return lists, is_own


def same_names(known: Collection[str], names: Collection[str]) -> bool:
    """Return whether a data set is a checkpoint's own by its images' names.

    Nearly all its names are the checkpoint's, or it has nearly all of the checkpoint's and not many others: a download
    may have images that no split lists.

    Args:
        known: the checkpoint's.
        names: the data set's.
    """
    common = len(set(known) & set(names))
    return common >= SAME_SET * len(names) or common >= max(SAME_SET * len(known), LEAST_SHARE * len(names))


def few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")


# --------------------------------------------------------------------------------------------------
# What a model was trained on


def store_split(
    splits: Mapping[str, np.ndarray], names: Sequence[str], versions: np.ndarray,
    parent: StoredSplit | None,
) -> StoredSplit:  # fmt: skip
    """Return the stored form of a split.

    Args:
        versions: int64 (n, 2), the size and CRC-32 of every image, as `Features.versions`.
        parent: the split of the checkpoint that training went on from.
    """
    known = {split: [(names[i], *versions[i].tolist()) for i in splits[split]] for split in SPLITS}
    own = set(known["train"])
    known["inherited"] = [key for key in trained_on(parent) if key not in own] if parent else []
    return {
        part: {column: [key[n] for key in each] for n, column in enumerate(("names", "sizes", "hashes"))}
        for part, each in known.items()
    }


def same_split(first: StoredSplit, second: StoredSplit) -> bool:
    """Return whether two models hold out the same images, so that their scores can be compared."""
    return all(set(keys(first[part])) == set(keys(second[part])) for part in ("val", "test"))


def keys(part: Part) -> Iterable[tuple[str, int, int]]:
    """Return (name, size, CRC-32) of each image."""
    return zip(part["names"], part["sizes"], part["hashes"], strict=True)


def trained_on(stored: StoredSplit) -> list[tuple[str, int, int]]:
    """Return the keys of all images that a model has seen in training, its ancestors' included."""
    return [key for part in ("train", "inherited") for key in keys(stored[part])]


def seen_in_training(
    stored: StoredSplit, images: np.ndarray, names: Sequence[str], versions: np.ndarray
) -> tuple[list[int], list[int]]:
    """Return which of the images (n,) a model was trained on, and which are copies of such under other names.

    An image is known by name, size and CRC-32, or by its Flickr number, whatever its size.

    Args:
        versions: int64 (all images, 2), as `Features.versions`.
    """
    trained = set(trained_on(stored))
    contents = {key[1:] for key in trained}
    found = {i: (names[i], *version) for i, version in zip(images.tolist(), versions[images].tolist(), strict=True)}
    photos = dict(photo for name, *_ in trained for photo in FLICKR_NAME.findall(name))  # ending by number

    def is_known_photo(name: str) -> bool:
        return any(
            number in photos and (ending or photos[number] or len(number) >= FLICKR_DIGITS)
            for number, ending in FLICKR_NAME.findall(name)
        )

    seen = [i for i, key in found.items() if key in trained or is_known_photo(key[0])]
    return seen, [i for i in sorted(found.keys() - set(seen)) if found[i][1:] in contents]


def refuse_trained_images(
    stored: StoredSplit, images: np.ndarray, names: Sequence[str], versions: np.ndarray, source: object
) -> None:
    """Make sure that a model is not scored on images that it was trained on.

    Args:
        images: positions (n,) of the images to score.
        versions: int64 (all images, 2), as `Features.versions`.
        source: the model, for the message.

    Raises:
        UserError: it was trained on some of them, or on more than a few copies under other names.
    """
    seen, copies = seen_in_training(stored, images, names, versions)
    if copies and len(copies) <= MOST_COPIES * len(images):  # data sets have a few pictures twice
        log.warning(
            f"Note: {len(copies)} image(s) to score are copies of training images: {few(names[i] for i in copies)}"
        )
    else:
        seen += copies
    if seen:
        raise UserError(
            f"{source} was trained on {len(seen)} of the {len(images)} images to score ({few(names[i] for i in seen)}): a score on them "
            "says nothing. Score images that it has not seen, e.g. with split lists that leave these out"
        )


def is_stored(value: Any) -> bool:
    """Return whether a value from a file has the stored form."""

    def is_part(part: Any) -> bool:
        if type(part) is not dict or not {"names", "sizes", "hashes"} <= part.keys():
            return False
        names, numbers = part["names"], (part["sizes"], part["hashes"])
        return (
            isinstance(names, list)
            and all(type(name) is str and not CONTROL_CHARACTERS.search(name) for name in names)
            and all(
                isinstance(column, list) and len(column) == len(names) and all(type(n) is int for n in column)
                for column in numbers
            )
        )

    return type(value) is dict and {*SPLITS, "inherited"} == value.keys() and all(map(is_part, value.values()))
