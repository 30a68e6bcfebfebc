"""Every image through the frozen encoder once in its life: a memory-mapped store of its features.

One folder per encoder, weights and transform, in it one per image directory:

    feature_cache/efficientnet_lite0-57934424-squash224/Images-1a2b3c4d/     (squash224-mirror: another view)
        grid.000.f16, grid.001.f16, ...   float16 rows (49, C), ROWS_PER_FILE to a file
        grid.jsonl                        a line per row: whose features, of which version of the file, checksum
        mean.000.f16, mean.jsonl          the grids' means (C,), which is all the `lstm` decoder wants
        grid-p1.000.f16, grid-p1.jsonl    another part: of several processes each writes its own

Parts are dealt out to the folders that `--feature_cache` names, so that they can lie on several disks. Rows are appended and synced to the disk before the index names them: whatever interrupts an encoding pass
costs the images of one flush. A changed image is encoded again; a damaged row is found by its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from captioning import distributed
from captioning.encoders import ENCODE_BATCH, Encoder, EncoderSpec
from captioning.images import UnreadableImage, load_pixels
from captioning.io import UserError, bars_off, log, make_directory, require_free_space

ROWS_PER_FILE = 4096  # half a gigabyte of EfficientNet-Lite0 grids
BATCHES_AHEAD = 3
INDEX_LINE = 4096  # bytes; a file name has 255 at most, which JSON writes in six times as many
SHARED_CACHE = "processes on several machines need a --feature_cache on a disk that they share"
FLUSH_IMAGES = 512  # images between two syncs: a dozen seconds of work on two cores


CPU = torch.device("cpu")


class Features(Protocol):
    """Where a batch's image features come from."""

    unreadable: dict[int, str]  # image position -> why it could not be read

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        """Features of the images at these positions, float (I, 49, C) or (I, C), on this device."""


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


class FeatureFile:
    """Append-only rows of one kind ('grid' or 'mean') with their index: one part of a `FeatureStore`."""

    def __init__(self, directory: Path, kind: str, row_shape: tuple[int, ...], part: int = 0):
        self.directory, self.kind, self.row_shape = directory, kind, row_shape
        self.stem = f"{kind}-p{part}" if part else kind
        self.row_bytes = 2 * int(np.prod(row_shape))
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
        return self.directory / f"{self.stem}.{number:03d}.f16"

    def holds(self, path: Path) -> bool:
        """Whether the features of this very version of an image are here; its bytes are read if the time differs."""
        entry = self.entries.get(path.name)
        if entry is None:
            return False
        stat = path.stat()
        if (entry.size, entry.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return True
        if entry.size != stat.st_size or entry.content != zlib.crc32(path.read_bytes()):
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
        """Write float16 rows (n, *row_shape), sync them to the disk, then name them in the index."""
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
        """Have the next run encode this image again."""
        self.entries[name] = Entry(0, -1, -1, 0, 0)
        self.add_lines([name])

    def maps(self) -> list[np.ndarray]:
        """The files, memory-mapped read-only, each (rows, *row_shape) float16."""
        counts = [min(ROWS_PER_FILE, self.rows - first) for first in range(0, self.rows, ROWS_PER_FILE)]
        return [
            np.memmap(self.file(number), np.float16, "r", shape=(count, *self.row_shape))
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
            f"cannot write {path}: {error.strerror}. What is encoded so far is kept: mend that and run again"
        ) from error


class FeatureStore:
    """All rows of one kind, in as many parts as processes and disks have made of them."""

    def __init__(self, directories: Sequence[Path], kind: str, row_shape: tuple[int, ...]):
        """Args: directories: one per disk; part n lies in directory n modulo their number."""
        self.directories, self.kind, self.row_shape = directories, kind, row_shape
        found = {(directory, path.name) for directory in directories for path in directory.glob(f"{kind}*.jsonl")}
        numbers = {(place, int(match[1] or 0)) for place, name in found if (match := PART_NAME.fullmatch(name))}
        # Where the folders were named otherwise before, a part lies where it lies.
        self.parts = [FeatureFile(place, kind, row_shape, number) for place, number in sorted(numbers)]

    @property
    def row_bytes(self) -> int:
        return 2 * int(np.prod(self.row_shape))

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


# grid.jsonl, mean-p3.jsonl
PART_NAME = re.compile(r"(?:grid|mean)(?:-p([1-9]\d{0,5}))?\.jsonl")


class CachedFeatures:
    """Features read from the store by image position. Implements `Features`."""

    def __init__(
        self, store: FeatureStore, paths: Sequence[Path], unreadable: dict[int, str], holders: dict[int, FeatureFile]
    ):
        """Args: holders: which part of the store has an image, for every image that will be asked for."""
        self.store, self.paths, self.unreadable = store, paths, unreadable
        self.rows = np.full(len(paths), -1, dtype=np.int64)  # as if all parts' files were one
        self.checksums = np.zeros(len(paths), dtype=np.int64)
        self.maps: list[np.ndarray] = []
        self.first_map = []  # of each part
        first_row = {}
        for part in store.parts:
            first_row[part.stem, part.directory] = len(self.maps) * ROWS_PER_FILE
            self.first_map.append(len(self.maps))
            self.maps += part.maps()
        for image, part in holders.items():
            entry = part.entries[paths[image].name]
            self.rows[image] = first_row[part.stem, part.directory] + entry.row
            self.checksums[image] = entry.checksum
        for part in store.parts:
            part.entries.clear()  # half a kilobyte an image, and not needed any more
        self.verified = np.zeros(len(paths), dtype=bool)

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        """See `Features.gather`; each row's checksum is compared the first time it is used.

        Raises:
            UserError: a row was damaged since it was written.
        """
        out = np.empty((len(images), *self.store.row_shape), dtype=np.float16)
        for place, image in enumerate(images):
            number, offset = divmod(int(self.rows[image]), ROWS_PER_FILE)
            out[place] = self.maps[number][offset]
            if not self.verified[image]:
                if zlib.crc32(out[place].data) != self.checksums[image]:
                    part = self.store.parts[bisect_right(self.first_map, number) - 1]
                    part.forget(self.paths[image].name)
                    raise UserError(
                        f"the cached features of {self.paths[image].name} in {part.directory} are damaged "
                        "(checksum differs): run the same command again, and that image is encoded anew"
                    )
                self.verified[image] = True
        rows = torch.from_numpy(out)
        if device.type == "cuda":  # half the bytes to copy, from pinned memory, while the processor goes on
            rows = rows.pin_memory().to(device, non_blocking=True)
        return rows.float().to(device)


class DeviceFeatures:
    """A copy of cached features in a device's memory, so that a batch is one gather there. Implements `Features`."""

    def __init__(self, cached: CachedFeatures, images: np.ndarray, device: torch.device):
        self.unreadable = cached.unreadable
        self.place = np.full(len(cached.paths), -1, dtype=np.int64)
        self.place[images] = np.arange(len(images))
        self.rows = torch.empty(len(images), *cached.store.row_shape, dtype=torch.float16, device=device)
        for start in range(0, len(images), ENCODE_BATCH):
            self.rows[start : start + ENCODE_BATCH] = cached.gather(images[start : start + ENCODE_BATCH], device)

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        return self.rows[torch.from_numpy(self.place[images]).to(self.rows.device)].float().to(device)


def gather_views(
    views: Sequence[Features], images: np.ndarray, drawn: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Features of the images, of each in the view of this number: float (I, 49, C) or (I, C)."""
    if len(views) == 1:
        return views[0].gather(images, device)
    order = np.argsort(drawn, kind="stable")
    parts = [views[v].gather(images[drawn == v], device) for v in np.unique(drawn)]
    return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(parts[0].device)]


def fits_on(device: torch.device, size: int) -> bool:
    """Whether `size` bytes are at most half of a GPU's free memory."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 2


class LiveFeatures:
    """The plain path (`--feature_cache off`): every batch through the encoder. Implements `Features`."""

    def __init__(
        self, encoder: Encoder, device: torch.device, paths: Sequence[Path], needed: np.ndarray, means: bool,
        workers: int, view: str,
    ):  # fmt: skip
        self.encode = encoder.fast_form(device)
        self.paths, self.size, self.means, self.view = paths, encoder.spec.image_size, means, view
        self.pool = ThreadPoolExecutor(workers)
        problems = list(self.pool.map(self.problem_of, [paths[i] for i in distributed.shard(needed)]))
        found = zip(needed.tolist(), distributed.gather(problems), strict=True)
        self.unreadable = {image: problem for image, problem in found if problem}

    def problem_of(self, path: Path) -> str | None:
        try:
            load_pixels(path, self.size, self.view)
        except UnreadableImage as error:
            return str(error)
        return None

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        pixels = list(self.pool.map(lambda image: load_pixels(self.paths[image], self.size, self.view), images))
        grid = self.encode(np.stack(pixels)).to(device)
        return (grid.mean(1) if self.means else grid.clone()).float()  # a clone may be trained through


def cache_folders(text: str) -> list[Path]:
    """The folders of a `--feature_cache`: one, or several with the system's `os.pathsep` between; none for `off`."""
    return [] if text == "off" else [Path(part) for part in dict.fromkeys(text.split(os.pathsep)) if part]


def open_features(
    caches: Sequence[Path],
    spec: EncoderSpec,
    weights_hash: str,
    build_encoder: Callable[[], Encoder],
    paths: Sequence[Path],
    folder: Path,
    needed: np.ndarray,
    device: torch.device,
    means: bool,
    workers: int,
    compile_encoder: str = "off",
    keep_on_device: str = "off",
    view: str = "whole",
) -> Features:
    """Features of images, encoding those that the cache lacks.

    Args:
        caches: the cache's directories, one per disk, or none for no cache.
        build_encoder: called only when something has to be encoded.
        paths: of all images of the caption set; no two have the same name.
        folder: the directory under which they all lie.
        needed: positions of the images that are wanted; the others are left alone.
        means: the mean over the 49 regions (the `lstm` decoder) rather than the regions.
        workers: threads that decode images while the encoder runs.
        compile_encoder: auto, on or off, see `Encoder.fast_form`.
        keep_on_device: auto, on or off: a copy of the features in the memory of a GPU.
        view: one of `caption_data.VIEWS`.

    Of several processes each encodes its share of the images.

    Raises:
        UserError: too many images cannot be read, the disk is too small, or the cache cannot be written.
    """
    if not caches:
        live = LiveFeatures(build_encoder(), device, paths, needed, means, workers, view)
        check_unreadable(live.unreadable, len(needed))
        return live
    folder = folder.resolve()
    transform = spec.transform + ("" if view == "whole" else f"-{view}")
    identity = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    place = Path(f"{spec.name}-{weights_hash[:8]}-{transform}") / f"{folder.name}-{identity}"
    directories = [cache / place for cache in caches]

    def read(means: bool = means) -> FeatureStore:
        return FeatureStore(
            directories, *(("mean", (spec.channels,)) if means else ("grid", (spec.regions, spec.channels)))
        )

    def look() -> tuple[FeatureStore, dict[int, FeatureFile]]:
        store = read()
        return store, {int(i): part for i in needed if (part := store.find(paths[i])) is not None}

    def prepare() -> list[int]:
        """What nobody has encoded yet; the first process finds out for all, since it also mends the indexes."""
        store, holders = look()
        store.note_times()
        seen.append((store, holders))
        return [int(i) for i in needed if int(i) not in holders]

    seen: list[tuple[FeatureStore, dict[int, FeatureFile]]] = []  # by the first process
    unreadable: dict[int, str] = {}
    with waiting_locks(directories):
        todo = distributed.from_first(prepare)
        unseen = [directory for directory in directories if not directory.is_dir()]
        if unseen:
            raise UserError(f"rank {distributed.rank()} does not see {unseen[0]}, which rank 0 made: {SHARED_CACHE}")
        store = seen[0][0] if seen else read()
        worth_it = spec.compile_from is not None and len(todo) >= spec.compile_from
        compiled = compile_encoder == "on" or (compile_encoder == "auto" and worth_it)
        numbers = range(-(-len(caches) // distributed.size()) * distributed.size())  # of the parts: all disks take part
        for number, mine in zip(
            distributed.shard(numbers),
            split_evenly(distributed.shard(todo), len(numbers) // distributed.size()),
            strict=True,
        ):
            file = store.part(number)
            if means and mine:
                mine = derive_means(read(means=False), file, paths, mine)
            if mine:
                require_free_space(file.directory, len(mine) * (file.row_bytes + 128), "encoding the images")
                unreadable |= encode_images(build_encoder(), device, file, paths, mine, workers, compiled, view)
        distributed.wait_for_all()
    for theirs in distributed.all_gather(unreadable):
        unreadable |= theirs
    check_unreadable(unreadable, len(needed))
    store, holders = look() if todo or not seen else seen[0]
    missing = [i for i in needed.tolist() if i not in holders and i not in unreadable]
    if missing:
        raise UserError(
            f"rank {distributed.rank()} does not see the features of {paths[missing[0]].name} in {directories[0]}, which "
            f"another process encoded (or the image changed meanwhile): {SHARED_CACHE}"
        )
    cached = CachedFeatures(store, paths, unreadable, holders)
    good = np.array(list(holders), dtype=np.int64)
    if keep_on_device == "on" or (keep_on_device == "auto" and fits_on(device, len(good) * store.row_bytes)):
        return DeviceFeatures(cached, good, device)
    return cached


def split_evenly(items: list[int], parts: int) -> list[list[int]]:
    """The items in their order, in so many runs of about the same length."""
    return [[int(item) for item in run] for run in np.array_split(np.array(items, dtype=np.int64), parts)]


def version_of(path: Path) -> Version:
    stat = path.stat()
    return Version(stat.st_size, stat.st_mtime_ns, zlib.crc32(path.read_bytes()))


@contextmanager
def waiting_locks(directories: Sequence[Path]) -> Iterator[None]:
    """Hold the store; where another run is encoding into it, say so and wait.

    Of several processes of one run the first holds it for all.
    """
    with ExitStack() as held:
        for directory in sorted(directories) if distributed.is_first() else ():
            make_directory(directory, "the feature cache; --feature_cache DIR chooses another place, off does without")
            lock = FileLock(directory / "lock")
            try:
                held.enter_context(lock.acquire(timeout=0.1))
            except Timeout:
                log.info(f"Another run is at work in {directory}; waiting for it, to share what it encodes ...")
                held.enter_context(lock.acquire())
        yield


def derive_means(grids: FeatureStore, mean: FeatureFile, paths: Sequence[Path], todo: list[int]) -> list[int]:
    """Fill means from grids that are already there; returns the images that still need the encoder."""
    done: set[int] = set()
    for grid in grids.parts:
        have = [i for i in todo if i not in done and grid.holds(paths[i])]
        maps = grid.maps()
        for start in range(0, len(have), FLUSH_IMAGES):
            entries = [grid.entries[paths[i].name] for i in have[start : start + FLUSH_IMAGES]]
            places = [divmod(entry.row, ROWS_PER_FILE) for entry in entries]
            rows = np.stack([maps[number][offset] for number, offset in places])  # (n, 49, C)
            versions = [Version(*entry[1:4]) for entry in entries]
            mean.append([paths[i].name for i in have[start : start + FLUSH_IMAGES]], versions, mean_of(rows))
        done.update(have)
    return [i for i in todo if i not in done]


def mean_of(grids: np.ndarray) -> np.ndarray:
    """(n, 49, C) float16 -> (n, C) float16, summed in float32: the same whether the grid was stored or not."""
    return grids.astype(np.float32).mean(1).astype(np.float16)


def encode_images(
    encoder: Encoder,
    device: torch.device,
    file: FeatureFile,
    paths: Sequence[Path],
    todo: list[int],
    workers: int,
    compiled: bool = False,
    view: str = "whole",
) -> dict[int, str]:
    """Run the encoder over the images `todo` and append to `file`; returns why some could not be read."""
    encode = encoder.fast_form(device, compiled)
    unreadable: dict[int, str] = {}
    names: list[str] = []
    stamps: list[Version] = []
    pending: list[np.ndarray] = []
    left_out = 0

    def flush() -> None:
        if pending:
            file.append(names, stamps, np.concatenate(pending))
            for done in (names, stamps, pending):
                done.clear()

    bar = tqdm(total=len(todo), desc=f"Encoding images ({encoder.spec.name}, {view})", unit="image", disable=bars_off())
    try:
        for part, versions, pixels in decoded_batches(paths, todo, encoder.spec.image_size, workers, unreadable, view):
            if part:
                grids = encode(pixels)[: len(part)].to(torch.float16).cpu().numpy()  # (n, 49, C)
                pending.append(grids if file.kind == "grid" else mean_of(grids))
                names += [paths[i].name for i in part]
                stamps += versions
                if len(names) >= FLUSH_IMAGES:
                    flush()
            bar.update(len(part) + len(unreadable) - left_out)
            left_out = len(unreadable)
    finally:  # Ctrl-C keeps what is encoded
        flush()
        bar.close()
    return unreadable


def decoded_batches(
    paths: Sequence[Path], todo: list[int], size: int, workers: int, unreadable: dict[int, str], view: str
) -> Iterator[tuple[list[int], list[Version], np.ndarray]]:
    """Yield (images, their versions, pixels uint8 (ENCODE_BATCH, size, size, 3)); threads decode a few batches ahead.

    The last batch is filled up with black: an image's features are the same, to the bit, whichever images
    share its batch, and a pass that was interrupted ends as one that was not.

    Threads rather than worker processes: Pillow releases the interpreter lock while it decodes and
    resizes, and nothing has to be pickled, so that Windows and macOS need no special care.
    """

    def read(path: Path) -> tuple[Version, np.ndarray]:
        return version_of(path), load_pixels(path, size, view)

    chunks = [todo[start : start + ENCODE_BATCH] for start in range(0, len(todo), ENCODE_BATCH)]
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[list[tuple[int, Future[tuple[Version, np.ndarray]]]]] = deque()
        for chunk in [*chunks, *[[]] * BATCHES_AHEAD]:
            ahead.append([(i, pool.submit(read, paths[i])) for i in chunk])
            if len(ahead) <= BATCHES_AHEAD:
                continue
            images: list[int] = []
            versions: list[Version] = []
            pixels = np.zeros((ENCODE_BATCH, size, size, 3), np.uint8)
            for image, future in ahead.popleft():
                try:
                    version, pixels[len(images)] = future.result()
                except UnreadableImage as error:
                    unreadable[image] = str(error)
                    continue
                images.append(image)
                versions.append(version)
            yield images, versions, pixels


def check_unreadable(unreadable: dict[int, str], total: int) -> None:
    """Name the images that are left out; too many of them mean that something is wrong with the data.

    Raises:
        UserError: more than 1 % cannot be read.
    """
    if not unreadable:
        return
    for problem in list(unreadable.values())[:10]:
        log.warning(f"Cannot read {problem}")
    if len(unreadable) > 0.01 * total:
        raise UserError(
            f"{len(unreadable)} of {total} images cannot be read (more than 1 %): download the data set again "
            "(`python download_datasets.py --force`), or remove these images' rows from the captions file"
        )
    log.warning(f"{len(unreadable)} unreadable image(s) left out.")
