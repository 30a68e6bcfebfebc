"""The feature cache on disk: rows of features in one file, with their index.

One folder per encoder, weights and transform, in it one per image directory:

    feature_cache/efficientnet_lite0-57934424-squash224/Images-1a2b3c4d/
        whole-grids.u8          rows (49, C + 4) of eight-bit codes, of the view `whole`: see `quantize`
        whole-grids.u8.index    for each row a record: whose features, of which version of the file, checksum
        mirror-means.f16        the grids' means (C,) in float16, which is all the `lstm` decoder reads, of another view

Rows are synced to the disk before their records are written: an interruption costs the images of one flush. Of several
processes each writes other rows of the same file. A changed image gets a new row; a damaged row is found by its
checksum. Of an index that was damaged itself, each record that fits no image is one of an image to be encoded.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from captioning.data.images import UnreadableImage
from captioning.io import UserError

RECORD = np.dtype(  # of an index; all zeros where the row was never finished
    [("name", "<u8"), ("size", "<i8"), ("mtime_ns", "<i8"), ("content", "<u4"), ("checksum", "<u4")]
)
SCALE_BYTES = 4  # of a region: lowest and step


class Version(NamedTuple):
    """What tells one version of an image file from another."""

    size: int
    mtime_ns: int
    content: int  # CRC-32 of its bytes, which a copy or an unpacked archive keeps


def version_of(path: Path) -> Version:
    """Raises UnreadableImage if the file cannot be read."""
    try:
        stat = path.stat()
        return Version(stat.st_size, stat.st_mtime_ns, zlib.crc32(path.read_bytes()))
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from error


def name_hash(path: Path) -> int:
    """Return the number that stands for an image's name in an index."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path.name), digest_size=8).digest(), "little")


class FeatureFile:
    """Rows of one shape with their index: of eight-bit codes if the file's name ends in .u8, else of float16."""

    def __init__(self, path: Path, row_shape: tuple[int, ...]):
        self.path, self.index_path, self.row_shape = path, Path(f"{path}.index"), row_shape
        self.dtype = np.dtype(np.uint8 if path.suffix == ".u8" else np.float16)
        self.row_bytes = self.dtype.itemsize * int(np.prod(row_shape))
        self.records = np.empty(0, RECORD)
        if path.is_file() and self.index_path.is_file():
            self.records = np.fromfile(self.index_path, RECORD, count=path.stat().st_size // self.row_bytes)
        self.rows = {name: row for row, name in enumerate(self.records["name"].tolist())}  # a name's last row counts

    def find(self, path: Path) -> int | None:
        """Return the row that holds the features of this very version of an image, or None.

        The image's bytes are read if its time differs. One that cannot be read is not found: encoding says why.
        """
        row = self.rows.get(name_hash(path))
        try:
            if row is None or self.records["size"][row] != (stat := path.stat()).st_size:
                return None
            same_time = self.records["mtime_ns"][row] == stat.st_mtime_ns
            return row if same_time or self.records["content"][row] == zlib.crc32(path.read_bytes()) else None
        except OSError:
            return None

    def map(self) -> np.ndarray:
        """Return all rows, memory-mapped read-only: (rows, *row_shape)."""
        shape = (len(self.records), *self.row_shape)
        return (
            np.asarray(np.memmap(self.path, self.dtype, "r", shape=shape)) if shape[0] else np.empty(shape, self.dtype)
        )

    def write(self, rows: Sequence[tuple[int, Path, Version, np.ndarray]]) -> None:
        """Write rows, sync them to the disk, then write their records.

        Args:
            rows: the number of each, its image, the version of the image's file, and the features.

        Raises:
            UserError: the disk is full or gone.
        """
        write_at(self.path, [(row * self.row_bytes, values.data) for row, _, _, values in rows])
        records = [(row, (name_hash(path), *version, zlib.crc32(values.data))) for row, path, version, values in rows]
        write_at(self.index_path, [(row * RECORD.itemsize, np.array(each, RECORD).tobytes()) for row, each in records])

    def forget(self, row: int) -> None:
        """Have the next run encode the image of this row again."""
        with suppress(UserError):
            write_at(self.index_path, [(row * RECORD.itemsize, bytes(RECORD.itemsize))])


def write_at(path: Path, pieces: Iterable[tuple[int, Any]]) -> None:
    """Write bytes at these positions of a file, making it if need be, and wait for the disk.

    Raises:
        UserError: the disk is full or gone.
    """
    try:
        with open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)) as file:
            for position, data in pieces:
                file.seek(position)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. What is encoded so far is kept: fix it and rerun"
        ) from error


# --------------------------------------------------------------------------------------------------
# Rows: means in float16, regions as eight-bit codes


def stored_form(grids: np.ndarray, means: bool) -> np.ndarray:
    """Return the rows that the cache stores of an encoder's grids, float (n, 49, C): their means or their codes."""
    rounded = grids.astype(np.float16)
    return rounded.astype(np.float32).mean(1).astype(np.float16) if means else quantize(rounded)


def quantize(grids: np.ndarray) -> np.ndarray:
    """Return the codes of regions, each followed by its scale: (n, 49, C) of any float -> uint8 (n, 49, C + 4).

    Each region has its own range: a code c stands for `lowest + c * step`, where step is a 255th of the range. Both are
    float16 and follow the codes.
    """
    values = grids.astype(np.float32)
    lowest = values.min(-1, keepdims=True).astype(np.float16)
    step = ((values.max(-1, keepdims=True) - lowest) / 255).astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore"):  # a region that is the same everywhere has no step
        codes = np.nan_to_num((values - lowest) / step.astype(np.float32), posinf=0, neginf=0)
    scale = np.concatenate([lowest, step], -1).view(np.uint8)
    return np.concatenate([codes.round().clip(0, 255).astype(np.uint8), scale], -1)


def dequantize(rows: np.ndarray) -> np.ndarray:
    """Return the regions that `quantize` coded: uint8 (n, 49, C + 4) -> float32 (n, 49, C). `features.decoded` does too."""
    scale = rows[..., -SCALE_BYTES:].copy().view(np.float16).astype(np.float32)  # (n, 49, 2)
    return rows[..., :-SCALE_BYTES].astype(np.float32) * scale[..., 1:] + scale[..., :1]
