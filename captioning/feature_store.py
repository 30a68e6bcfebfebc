"""The feature cache on disk: append-only rows of features with their index.

One folder per encoder, weights and transform, in it one per image directory:

    feature_cache/efficientnet_lite0-57934424-squash224/Images-1a2b3c4d/     (squash224-mirror: another view)
        grid.000.f16, grid.001.f16, ...   float16 rows (49, C), ROWS_PER_FILE to a file
        grid.jsonl                        a line per row: whose features, of which version of the file, checksum
        grid8.000.u8, ..., grid8.jsonl    the same in eight bits: see `captioning.quantization`
        mean.000.f16, mean.jsonl          the grids' means (C,), which is all the `lstm` decoder reads
        grid-p1.000.f16, grid-p1.jsonl    another part: of several processes each writes its own

Parts are distributed over the folders that `--feature_cache` names, so that they can lie on several disks. Rows are
appended and synced to the disk before the index names them: an interruption costs the images of one flush. A changed
image is encoded again; a damaged row is found by its checksum.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from captioning.images import UnreadableImage
from captioning.io import UserError

ROWS_PER_FILE = 4096  # half a gigabyte of EfficientNet-Lite0 grids
INDEX_LINE = 4096  # bytes; a file name has 255 at most, which JSON writes in six times as many
PART_NAME = re.compile(r"(grid|grid8|mean)(?:-p([1-9]\d{0,5}))?\.jsonl")  # grid.jsonl, mean-p3.jsonl


class Version(NamedTuple):
    """What tells one version of an image file from another."""

    size: int
    mtime_ns: int
    content: int  # CRC-32 of its bytes, which a copy or an unpacked archive keeps


class Entry(NamedTuple):
    """One line of an index: which row holds an image's features, of which version of it, and their CRC-32."""

    row: int
    size: int
    mtime_ns: int
    content: int
    checksum: int


def row_dtype(kind: str) -> np.dtype[Any]:
    """Return the type of the numbers in rows of this kind."""
    return np.dtype(np.uint8 if kind == "grid8" else np.float16)


class FeatureFile:
    """Append-only rows of one kind ('grid', 'grid8' or 'mean') with their index: one part of a `FeatureStore`."""

    def __init__(self, directory: Path, kind: str, row_shape: tuple[int, ...], part: int = 0):
        self.directory, self.kind, self.row_shape, self.part = directory, kind, row_shape, part
        self.stem = f"{kind}-p{part}" if part else kind
        self.dtype, self.ending = row_dtype(kind), "u8" if kind == "grid8" else "f16"
        self.row_bytes = self.dtype.itemsize * int(np.prod(row_shape))
        self.index_path = directory / f"{self.stem}.jsonl"
        self.entries: dict[str, Entry] = {}  # by image name
        self.retimed: list[str] = []  # images whose modification time is another than the index has
        self.rows = 0  # rows named by the index, whether or not a later version replaced them
        self.index_bytes = 0  # length of the index up to its last whole line
        self.read_index()

    def read_index(self) -> None:
        """Read what other processes and earlier runs have finished; a torn or impossible line ends it."""
        if not self.index_path.is_file():
            return
        on_disk = self.count_rows()
        with open(self.index_path, "rb") as lines:
            while line := lines.readline(INDEX_LINE):
                try:
                    name, *numbers = json.loads(line)
                    entry = Entry(*numbers)
                except (ValueError, TypeError, RecursionError):
                    break
                whole = type(name) is str and all(type(number) is int for number in entry)
                if not whole or not line.endswith(b"\n") or not 0 <= entry.row < on_disk or entry.checksum >> 32:
                    break
                self.entries[name] = entry
                self.rows = max(self.rows, entry.row + 1)
                self.index_bytes += len(line)

    def count_rows(self) -> int:
        """Rows that lie on the disk without a gap, whatever the index says: those that `maps` can map."""
        rows = 0
        while rows % ROWS_PER_FILE == 0 and self.file(rows // ROWS_PER_FILE).is_file():
            size = self.file(rows // ROWS_PER_FILE).stat().st_size
            if size < self.row_bytes:
                break
            rows += min(size // self.row_bytes, ROWS_PER_FILE)
        return rows

    def file(self, number: int) -> Path:
        return self.directory / f"{self.stem}.{number:03d}.{self.ending}"

    def holds(self, path: Path) -> bool:
        """Return whether the features of this very version of an image are here.

        The image's bytes are read if its time differs. One that cannot be read is not here: encoding says why.
        """
        entry = self.entries.get(path.name)
        if entry is None:
            return False
        try:
            stat = path.stat()
            if (entry.size, entry.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                return True
            if entry.size != stat.st_size or entry.content != zlib.crc32(path.read_bytes()):
                return False
        except OSError:
            return False
        self.entries[path.name] = entry._replace(mtime_ns=stat.st_mtime_ns)
        self.retimed.append(path.name)
        return True

    def note_times(self) -> None:
        """Remember the modification times of images that `holds` knew by their bytes."""
        if self.retimed:
            self.add_lines(self.retimed)
            self.retimed = []

    def add_lines(self, names: Sequence[str]) -> None:
        """Write these images' entries to the index."""
        text = "".join(json.dumps([name, *self.entries[name]]) + "\n" for name in names).encode("utf-8")
        write_synced(self.index_path, self.index_bytes, text)
        self.index_bytes += len(text)

    def append(self, names: Sequence[str], versions: Sequence[Version], rows: np.ndarray) -> None:
        """Write rows (n, *row_shape), sync them to the disk, then name them in the index."""
        written = 0
        while written < len(rows):
            number, offset = divmod(self.rows + written, ROWS_PER_FILE)
            part = rows[written : written + ROWS_PER_FILE - offset]
            write_synced(self.file(number), offset * self.row_bytes, np.ascontiguousarray(part).data)
            written += len(part)
        for name, version, row in zip(names, versions, rows, strict=True):
            self.entries[name] = Entry(self.rows, *version, zlib.crc32(np.ascontiguousarray(row).data))
            self.rows += 1
        self.add_lines(names)

    def forget(self, name: str) -> None:
        """Have the next run encode this image again, beside what other runs have added meanwhile."""
        with suppress(OSError, UserError), FileLock(self.directory / "lock", timeout=10):
            fresh = FeatureFile(self.directory, self.kind, self.row_shape, self.part)
            fresh.entries[name] = Entry(0, -1, -1, 0, 0)
            fresh.add_lines([name])

    def maps(self) -> list[np.ndarray]:
        """The files, memory-mapped read-only, each (rows, *row_shape)."""
        counts = [min(ROWS_PER_FILE, self.rows - first) for first in range(0, self.rows, ROWS_PER_FILE)]
        return [
            np.memmap(self.file(number), self.dtype, "r", shape=(count, *self.row_shape))
            for number, count in enumerate(counts)
        ]


def write_synced(path: Path, position: int, data: bytes | memoryview) -> None:
    """Write at a position, cut off what lay behind, and wait for the disk.

    Raises:
        UserError: the disk is full or gone.
    """
    try:
        with open(path, "r+b" if path.exists() else "w+b") as file:
            file.seek(position)
            file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. What is encoded so far is kept: fix it and rerun"
        ) from error


class FeatureStore:
    """All rows of one kind, in as many parts as processes and disks have made of them."""

    def __init__(self, directories: Sequence[Path], kind: str, row_shape: tuple[int, ...]):
        """Args: directories: one per disk; part n lies in directory n modulo their number."""
        self.directories, self.kind, self.row_shape = directories, kind, row_shape
        found = [(directory, path.name) for directory in directories for path in directory.glob(f"{kind}*.jsonl")]
        named = {(place, match) for place, name in found if (match := PART_NAME.fullmatch(name))}
        numbers = {(place, int(match[2] or 0)) for place, match in named if match[1] == kind}
        # Where the folders were named otherwise before, a part lies where it lies.
        self.parts = [FeatureFile(place, kind, row_shape, number) for place, number in sorted(numbers)]

    @property
    def row_bytes(self) -> int:
        return row_dtype(self.kind).itemsize * int(np.prod(self.row_shape))

    def part(self, number: int) -> FeatureFile:
        """The part that is written under this number."""
        place = self.directories[number % len(self.directories)]
        made = FeatureFile(place, self.kind, self.row_shape, number)
        return next((part for part in self.parts if part.index_path == made.index_path), made)

    def find(self, path: Path) -> FeatureFile | None:
        """The part that holds the features of this very version of an image."""
        return next((part for part in self.parts if part.holds(path)), None)

    def note_times(self) -> None:
        """See `FeatureFile.note_times`."""
        for part in self.parts:
            part.note_times()


def version_of(path: Path) -> Version:
    """Raises UnreadableImage if the file cannot be read."""
    try:
        stat = path.stat()
        return Version(stat.st_size, stat.st_mtime_ns, zlib.crc32(path.read_bytes()))
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from error
