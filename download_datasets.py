"""Download Flickr8k and Flickr30k, or draw the demo set, and check that the data sets are complete.

    python download_datasets.py                          # both Flickr sets, into data/flickr8k and data/flickr30k
    python download_datasets.py --dataset flickr8k
    python download_datasets.py --dataset demo           # drawn, nothing is downloaded
    python download_datasets.py --verify-only            # only check whether the sets are complete

Run the same command again to resume an interrupted download.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import os
import shutil
import sys
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from captioning.data.fetch import BadArchive, DownloadError, download_file, extract_archive
from captioning.io import (
    DATA_SCRIPT,
    UserError,
    make_directory,
    program,
    require_free_space,
    run_command,
    wait_for_lock,
)

LICENCE_NOTE = "note: Flickr's images are for non-commercial research and education only"


# --------------------------------------------------------------------------------------------------
# Sources


@dataclass(frozen=True)
class Mirror:
    """One source of an archive; several URLs are parts to be joined in this order."""

    file: str  # its name in the downloads folder, also of a file that the user puts there
    urls: tuple[str, ...]
    size: int  # bytes, roughly; more than twice as many are refused
    known_hash: str | None = None  # "md5:..." or "sha256:..."; None if none is published
    members: tuple[str, ...] = ("*.jpg",)  # the files to extract, as patterns of their names


@dataclass(frozen=True)
class Part:
    """One half of a data set: its images, or its captions and split lists."""

    mirrors: tuple[Mirror, ...]  # tried in this order
    unpacked: int  # bytes on disk, an upper bound


@dataclass(frozen=True)
class Source:
    """A data set: its number of images, and the sources of its parts."""

    images: int
    image_folder: str
    parts: dict[str, Part]  # "captions" and "images"


RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
PARTS_RELEASE = "https://github.com/awsaf49/flickr-dataset/releases/download/v1.0/"


def karpathy_mirrors(member: str) -> tuple[Mirror, ...]:
    known_hash = "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817"
    places = (
        "https://cs.stanford.edu/people/karpathy/deepimagesent/",
        "https://huggingface.co/datasets/gpantaz/karpathy_split/resolve/main/",
    )
    file = "caption_datasets.zip"
    return tuple(Mirror(file, (place + file,), 36_745_453, known_hash, (member,)) for place in places)


SOURCES = {
    "flickr8k": Source(8091, "Flicker8k_Dataset", {  # sic: as the official archive spells it
        "captions": Part((
            Mirror(
                "Flickr8k_text.zip", (RELEASE + "Flickr8k_text.zip",), 2_300_000,
                "md5:bf6c1abcb8e4a833b7f922104de18627", ("Flickr8k.token.txt", "Flickr_8k.*Images.txt"),
            ),
            *karpathy_mirrors("dataset_flickr8k.json"),
        ), unpacked=50_000_000),
        "images": Part((
            Mirror(
                "Flickr8k_Dataset.zip", (RELEASE + "Flickr8k_Dataset.zip",), 1_120_000_000,
                "md5:f18a1e2920de5bd84dae7cf08ec78978",
            ),
            Mirror("flickr8k.zip", (PARTS_RELEASE + "flickr8k.zip",), 1_120_000_000),
        ), unpacked=2_000_000_000),
    }),
    "flickr30k": Source(31_014, "flickr30k-images", {
        "captions": Part(karpathy_mirrors("dataset_flickr30k.json"), unpacked=200_000_000),
        "images": Part((
            Mirror(
                "flickr30k-images.tar.gz",
                ("https://uofi.app.box.com/shared/static/1cpolrtkckn4hxr1zhmfg0ln9veo6jpl.gz",), 4_440_000_000,
                "md5:985ac761bbb52ca49e0c474ae806c07c",
            ),
            Mirror(
                "flickr30k-images.zip",
                ("https://huggingface.co/datasets/nlphuji/flickr30k/resolve/main/flickr30k-images.zip",), 4_400_000_000,
            ),
            Mirror("flickr30k.zip", tuple(f"{PARTS_RELEASE}flickr30k_part0{n}" for n in range(3)), 4_440_000_000),
        ), unpacked=10_000_000_000),  # the last mirror may hold the images twice, as Kaggle's archive once did
    }),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Downloading


def download(mirror: Mirror, directory: Path) -> Path:
    """Fetch a mirror's archive into `directory` unless it is there with the right hash; return its path.

    Raises DownloadError, UserError: as `download_file`.
    """
    archive = directory / mirror.file
    if mirror.known_hash is None:
        print(f"  no checksum is published for {mirror.file}: relying on the check for completeness")
        if archive.exists():
            return archive
    if len(mirror.urls) == 1:
        print(f"  {mirror.urls[0]}", flush=True)
        download_file(mirror.urls[0], archive, mirror.known_hash, 2 * mirror.size)
        return archive
    parts = [directory / Path(urllib.parse.urlsplit(url).path).name for url in mirror.urls]
    for url, part in zip(mirror.urls, parts, strict=True):
        print(f"  {url}", flush=True)
        download_file(url, part, None, 2 * mirror.size)
    joined = archive.with_name(archive.name + ".joining")
    with open(joined, "wb") as whole:
        for part in parts:
            with open(part, "rb") as content:
                shutil.copyfileobj(content, whole, 1 << 20)
    os.replace(joined, archive)
    for part in parts:
        part.unlink()
    return archive


# --------------------------------------------------------------------------------------------------
# Completeness


def find_problems(directory: Path, images: int) -> dict[str, str]:
    """Return what the data set in `directory` lacks, read as training reads it: {} if it is complete.

    Args:
        images: the least number of image files.

    Returns:
        a reason under "captions" (captions or split lists) and under "images".
    """
    from captioning.data.layouts import find_captions_file, find_image_directory, read_captions
    from captioning.data.splits import find_splits, listed_split

    if not directory.is_dir():
        return dict.fromkeys(("captions", "images"), f"{directory} is not there")
    problems: dict[str, str] = {}
    names: list[str] = []
    used: set[str] = set()
    try:
        table, _ = read_captions(find_captions_file(directory))
        names = sorted(table["image"].unique())
        splits, _ = find_splits([directory], names, [0] * len(names), 0, None, [])
        used = {names[i] for positions in splits.values() for i in positions}
        listed, _ = listed_split([directory]) or ({}, "")
        if len(listed) < 3:
            problems["captions"] = f"{directory} has no lists of its training, validation and test images"
    except UserError as error:
        problems["captions"] = str(error)
    try:
        folder = find_image_directory(directory, None, names) if names else fullest_folder(directory)
        found = image_names(folder)
        missing = sorted(used - found)
        if len(found) < images:
            problems["images"] = f"{folder} has {len(found)} of {images} images"
        elif missing:
            problems["images"] = f"{folder} lacks {len(missing)} images of the splits, {missing[0]} for example"
    except UserError as error:
        problems["images"] = str(error)
    return problems


def image_names(folder: Path) -> set[str]:
    """Return the names of the JPEG files in `folder` that are not empty."""
    return {
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(".jpg") and entry.is_file() and entry.stat().st_size > 0
    }


def fullest_folder(directory: Path) -> Path:
    """Return the folder with the most JPEG files at or below `directory`: each mirror has another name for it."""
    counts = {
        Path(place): sum(name.lower().endswith(".jpg") for name in files) for place, _, files in os.walk(directory)
    }
    if not any(counts.values()):
        raise UserError(f"{directory} has no images")
    return max(counts, key=lambda place: counts[place])


# --------------------------------------------------------------------------------------------------
# Fetching a data set


def fetch(name: str, data_dir: Path, force: bool) -> None:
    """Complete the data set in `data_dir/name`; download only the parts that are missing, or all with `force`.

    The new parts are unpacked beside the old ones and checked before they replace them. A run that was killed starts
    again with the archives that it had downloaded.

    Raises:
        UserError: no mirror gave a part, the disk is full, or other files in `data_dir/name` are in the way.
    """
    source = SOURCES[name]
    target, fresh = data_dir / name, data_dir / f".{name}.new"
    problems = find_problems(target, source.images)
    if not problems and not force:
        print(f"{name}: complete already in {target} (--force downloads it again)")
        return
    parts = [part for part in source.parts if force or part in problems]
    shutil.rmtree(fresh, ignore_errors=True)
    make_directory(fresh, "unpacking")
    downloads = make_directory(data_dir / "downloads", "the downloaded archives")
    archives: list[Path] = []
    try:
        for part in parts:
            print(f"{name}: fetching its {part}")
            archives.append(fetch_part(name, part, downloads, fresh, source))
        print(f"{name}: checking")
        whole = len(parts) == len(source.parts)
        problems = find_problems(fresh, source.images) if whole else {}
        if not problems:
            swap_in(fresh, target)
            problems = find_problems(target, source.images)
        if problems:
            raise UserError(
                f"{target} is still incomplete: {'; '.join(problems.values())}. Files of another layout may be in the "
                f"way: move {target} aside and run again"
            )
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for archive in archives:
        archive.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another archive or a partial download is still in it
        downloads.rmdir()
    print(f"{name}: complete, {source.images} images and their captions are in {target}")


def fetch_part(name: str, part_name: str, downloads: Path, fresh: Path, source: Source) -> Path:
    """Download one part from the first mirror that has it, and unpack it into `fresh`; return the archive."""
    part = source.parts[part_name]
    unpacked = fresh / f".{part_name}"
    reasons: list[str] = []
    for mirror in part.mirrors:
        archive = downloads / mirror.file
        # While parts are joined, they are on the disk twice.
        here = sum(file.stat().st_size for file in downloads.glob(f"{mirror.file}*"))
        needed = max(0, mirror.size * min(2, len(mirror.urls)) - here) + min(part.unpacked, mirror.size * 5 // 4)
        require_free_space(downloads, needed, f"{name}'s {part_name}")
        try:
            download(mirror, downloads)
            print(f"  unpacking {archive.name}", flush=True)
            extract_archive(archive, unpacked, part.unpacked, mirror.members)
            if part_name == "images":
                place_images(unpacked, fresh / source.image_folder, source.images)
            else:
                place_captions(unpacked, fresh, mirror.members, archive)
        except (DownloadError, BadArchive) as error:
            archive.unlink(missing_ok=True)  # kept, it would only fail again
            shutil.rmtree(unpacked, ignore_errors=True)
            reason = f"{error}; deleted" if isinstance(error, BadArchive) else str(error)
            reasons.append(f"{mirror.urls[0]}: {reason}")
            print(f"  {reason}", file=sys.stderr)
            continue
        shutil.rmtree(unpacked, ignore_errors=True)
        return archive
    listed = "".join(f"\n  - {reason}" for reason in reasons)
    raise UserError(
        f"no mirror gave {name}'s {part_name}:{listed}\n"
        f"Run the same command again later, or download one of them by hand, save it as "
        f"{' or '.join(dict.fromkeys(str(downloads / mirror.file) for mirror in part.mirrors))}, and run again"
    )


def place_images(unpacked: Path, folder: Path, expected: int) -> None:
    try:
        fullest = fullest_folder(unpacked)
    except UserError as error:
        raise BadArchive("it holds no images") from error
    found = len(image_names(fullest))
    if found < expected:
        raise BadArchive(f"it holds {found} of {expected} images")
    os.replace(fullest, folder)
    for entry in folder.iterdir():  # an archive may hold its images twice, one folder inside the other
        if entry.is_dir():
            shutil.rmtree(entry)


def place_captions(unpacked: Path, fresh: Path, members: Sequence[str], archive: Path) -> None:
    files = [path for path in sorted(unpacked.rglob("*")) if path.is_file()]
    for pattern in members:
        if not any(fnmatch.fnmatchcase(path.name, pattern) for path in files):
            raise BadArchive(f"{archive} holds no {pattern}")
    for path in files:
        os.replace(path, fresh / path.name)


def swap_in(fresh: Path, target: Path) -> None:
    """Move every entry of `fresh` into `target` in place of an old one; other files stay."""
    target.mkdir(exist_ok=True)
    for entry in sorted(fresh.iterdir()):
        if (target / entry.name).is_dir():
            shutil.rmtree(target / entry.name)
        os.replace(entry, target / entry.name)


# --------------------------------------------------------------------------------------------------
# The command line


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog=LICENCE_NOTE[0].upper() + LICENCE_NOTE[1:] + "."
    )
    parser.add_argument(
        "--dataset", choices=["flickr8k", "flickr30k", "both", "demo"], default="both",
        help="which data set; demo draws a small one without downloading (default: both Flickr sets)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true",
        help="download or draw it again even if it is complete; the old files are kept until the new ones are checked",
    )  # fmt: skip
    parser.add_argument(
        "--verify-only", action="store_true",
        help="only check whether each data set is complete; the exit code is 0 if all are, else 1",
    )  # fmt: skip
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), metavar="DIR",
        help="the data sets go to DIR/flickr8k, DIR/flickr30k and DIR/demo (default: data)",
    )  # fmt: skip
    return parser


def run(arguments: argparse.Namespace) -> int:
    names = ["flickr8k", "flickr30k"] if arguments.dataset == "both" else [arguments.dataset]
    data_dir: Path = arguments.data_dir
    if arguments.verify_only:
        return verify(names, data_dir)
    make_directory(data_dir, "the data sets")
    message = f"Another download into {data_dir} is under way; waiting for it ..."
    with wait_for_lock(data_dir / ".download.lock", message):
        return get_datasets(names, data_dir, arguments.force)


def get_datasets(names: Sequence[str], data_dir: Path, force: bool) -> int:
    if names == ["demo"]:
        from captioning.data.demo_set import draw_demo_dataset

        draw_demo_dataset(data_dir / "demo", redraw=force)
        print(f"demo: complete, 800 drawn scenes and their captions are in {data_dir / 'demo'}")
    else:
        print(LICENCE_NOTE)
        for name in names:
            fetch(name, data_dir, force)
    elsewhere = "" if data_dir == Path("data") else f" --data_dir {data_dir / names[0]}"
    print(f"Next: {program()} --dataset_type {names[0]}{elsewhere}")
    return 0


def verify(names: Sequence[str], data_dir: Path) -> int:
    complete = True
    for name in names:
        problems = find_problems(data_dir / name, SOURCES[name].images if name in SOURCES else 800)
        reasons = "; ".join(dict.fromkeys(problems.values()))
        fix = f" (`{program(DATA_SCRIPT)} --dataset {name} --data_dir {data_dir}` gets what is missing)"
        print(f"{name}: {'incomplete: ' + reasons + fix if problems else 'complete'}")
        complete = complete and not problems
    return 0 if complete else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit code: 0 done, 1 incomplete (--verify-only), 2 an error, 130 Ctrl-C."""
    arguments = get_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # line by line in a log file too; a path may not be UTF-8
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    return run_command(lambda: run(arguments), "stopped; run the same command again to resume")


if __name__ == "__main__":
    sys.exit(main())
