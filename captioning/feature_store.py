"""The feature cache on disk: rows of features in one file, with their index.

One folder per encoder, weights and transform, in it one per image directory:

    feature_cache/efficientnet_lite0-57934424-squash224/Images-1a2b3c4d/
        whole-grids.f16         rows (49, C) of float16, of the view `whole`
        whole-grids.f16.jsonl   their index, a line per row: whose features, of which version of the file, checksum
        whole-grids.u8          the same in eight bits, (49, C + 4): see `captioning.quantization`
        mirror-means.f16        the grids' means (C,), which is all the `lstm` decoder reads, of another view

Rows are synced to the disk before the index names them, so that an interruption costs one flush of each process. Of
several processes each writes other rows of the same file, and the first writes the index. A changed image is encoded
again; a damaged row is found by its checksum.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock

from captioning import distributed
from captioning.images import UnreadableImage
from captioning.io import UserError

INDEX_LINE = 4096  # bytes; a file name has 255 at most, which JSON writes in six times as many


class Entry(NamedTuple):
    """One line of an index: which row holds an image's features, of which version of its file, and their CRC-32."""

    row: int
    size: int
    mtime_ns: int
    content: int  # CRC-32 of the file's bytes, which a copy or an unpacked archive keeps
    checksum: int


def entry_of(path: Path) -> Entry:
    """Return the version of an image's file, without a row. Raises UnreadableImage if it cannot be read."""
    try:
        stat = path.stat()
        return Entry(-1, stat.st_size, stat.st_mtime_ns, zlib.crc32(path.read_bytes()), 0)
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from error


class FeatureFile:
    """Rows of one shape with their index: of eight-bit codes if the file's name ends in .u8, else of float16."""

    def __init__(self, path: Path, row_shape: tuple[int, ...]):
        self.path, self.row_shape = path, row_shape
        self.index_path = Path(f"{path}.jsonl")
        self.dtype = np.dtype(np.uint8 if path.suffix == ".u8" else np.float16)
        self.row_bytes = self.dtype.itemsize * int(np.prod(row_shape))
        self.entries: dict[str, Entry] = {}  # of the index, by image name
        self.retimed: dict[str, Entry] = {}  # of images whose modification time is another than the index has
        self.pending: dict[str, tuple[Entry, np.ndarray]] = {}  # rows that `flush` will write
        self.rows = 0  # up to the last that the index names, whether or not a later one replaced it
        self.index_bytes = 0  # length of the index up to its last whole line
        if path.is_file() and self.index_path.is_file():
            self.read_index(path.stat().st_size // self.row_bytes)

    def read_index(self, on_disk: int) -> None:
        """Read what earlier runs have finished; a torn or impossible line ends it. Args: on_disk: rows of the file."""
        with open(self.index_path, "rb") as lines:
            while line := lines.readline(INDEX_LINE):
                try:
                    name, *numbers = json.loads(line)
                    entry = Entry(*numbers)
                except (ValueError, TypeError, RecursionError):
                    return
                whole = type(name) is str and all(type(number) is int for number in entry)
                if not (whole and line.endswith(b"\n") and 0 <= entry.row < on_disk):
                    return
                if entry.content >> 32 or entry.checksum >> 32:
                    return
                self.entries[name] = entry
                self.rows = max(self.rows, entry.row + 1)
                self.index_bytes += len(line)

    def holds(self, path: Path) -> bool:
        """Return whether the features of this very version of an image are here.

        The image's bytes are read if its time differs. One that cannot be read is not here: encoding says why.
        """
        entry = self.entries.get(path.name)
        try:
            if entry is None or entry.size != (stat := path.stat()).st_size:
                return False
            if entry.mtime_ns != stat.st_mtime_ns:
                if entry.content != zlib.crc32(path.read_bytes()):
                    return False
                self.entries[path.name] = self.retimed[path.name] = entry._replace(mtime_ns=stat.st_mtime_ns)
        except OSError:
            return False
        return True

    def map(self) -> np.ndarray:
        """Return all rows, memory-mapped read-only: (rows, *row_shape)."""
        if not self.rows:
            return np.empty((0, *self.row_shape), self.dtype)
        return np.asarray(np.memmap(self.path, self.dtype, "r", shape=(self.rows, *self.row_shape)))

    def put(self, name: str, version: Entry, row: int, values: np.ndarray) -> None:
        """Have `flush` write an image's features into this row."""
        self.pending[name] = version._replace(row=row, checksum=zlib.crc32(values.data)), values

    def flush(self) -> None:
        """Write rows and sync them to the disk, then name those of all processes in the index.

        Every process calls this, and the first has locked the folder.

        Raises:
            UserError: the disk is full or gone.
        """
        if self.pending:
            with synced(self.path) as file:
                for entry, values in self.pending.values():
                    file.seek(entry.row * self.row_bytes)
                    file.write(values.data)
        written = {name: entry for name, (entry, _) in self.pending.items()}
        self.pending.clear()
        for entries in distributed.all_gather(written):
            if entries and distributed.is_first():
                self.add_lines(entries)

    def add_lines(self, entries: Mapping[str, Entry]) -> None:
        text = "".join(json.dumps([name, *entry]) + "\n" for name, entry in entries.items()).encode("utf-8")
        with synced(self.index_path) as file:
            file.seek(self.index_bytes)
            file.write(text)
            file.truncate()
        self.index_bytes += len(text)

    def revise(self, entries: Mapping[str, Entry]) -> None:
        """Replace entries beside what other runs have added meanwhile; where the folder cannot be written, leave it."""
        with suppress(OSError, UserError), FileLock(self.path.parent / "lock", timeout=10):
            FeatureFile(self.path, self.row_shape).add_lines(entries)

    def note_times(self) -> None:
        """Remember the modification times of images that `holds` knew by their bytes."""
        if self.retimed:
            self.revise(self.retimed)

    def forget(self, name: str) -> None:
        """Have the next run encode this image again."""
        self.revise({name: Entry(0, -1, -1, 0, 0)})


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write anywhere in it, making it if need be; wait for the disk at the end.

    Raises:
        UserError: the disk is full or gone.
    """
    try:
        with open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. What is encoded so far is kept: fix it and rerun"
        ) from error
