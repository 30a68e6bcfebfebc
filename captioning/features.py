"""Image features: every image goes through the frozen encoder once, and is read from the cache ever after."""

from __future__ import annotations

import hashlib
import os
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from captioning import distributed
from captioning.encoders import ENCODE_BATCH, Encoder, EncoderSpec
from captioning.feature_store import ROWS_PER_FILE, Entry, FeatureFile, FeatureStore, Version, row_dtype, version_of
from captioning.images import UnreadableImage
from captioning.io import (
    DATA_SCRIPT,
    Progress,
    UserError,
    log,
    make_directory,
    program,
    require_free_space,
    wait_for_lock,
)
from captioning.quantization import SCALE_BYTES, dequantize, quantize
from captioning.registry import folder_name

BATCHES_AHEAD = 3  # that are read while others are encoded
MOST_STREAMS = 8  # batches encoded at the same time: each takes some 100 MB
SHARED_CACHE = "processes on several machines need a --feature_cache on a disk that they share"
FLUSH_ROWS = 512  # between two syncs: some seconds of work on two cores


CPU = torch.device("cpu")


class Features(Protocol):
    """Where a batch's image features come from."""

    unreadable: dict[int, str]  # image position -> why it could not be read
    versions: np.ndarray  # int64 (images, 2): size and CRC-32 of each image's file, -1 where it was not asked for

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        """Features of the images at these positions, float (I, 49, C) or (I, C), on this device."""


class CachedFeatures:
    """Features read from the store by image position. Implements `Features`."""

    def __init__(
        self, store: FeatureStore, paths: Sequence[Path], unreadable: dict[int, str], holders: dict[int, FeatureFile]
    ):
        """Args: holders: which part of the store has an image, for every image that will be asked for."""
        self.store, self.paths, self.unreadable = store, paths, unreadable
        self.rows = np.full(len(paths), -1, dtype=np.int64)  # as if all parts' files were one
        self.checksums = np.zeros(len(paths), dtype=np.int64)
        self.versions = np.full((len(paths), 2), -1, dtype=np.int64)
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
            self.versions[image] = entry.size, entry.content
        for part in store.parts:
            part.entries.clear()  # half a kilobyte an image, and not needed any more
        self.verified = np.zeros(len(paths), dtype=bool)

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        """See `Features.gather`. Raises UserError: see `rows_of`."""
        rows = self.rows_of(images)
        if device.type == "cuda":  # as they are stored, so few bytes, from pinned memory, while the processor goes on
            return decoded(rows.pin_memory().to(device, non_blocking=True))
        return decoded(rows).to(device)

    def rows_of(self, images: np.ndarray) -> torch.Tensor:
        """Return rows as the cache stores them; each row's checksum is compared the first time it is used.

        Raises:
            UserError: a row was damaged since it was written.
        """
        out = np.empty((len(images), *self.store.row_shape), row_dtype(self.store.kind))
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
        return torch.from_numpy(out)


class DeviceFeatures:
    """A copy of cached features in a device's memory, so that a batch is one gather there. Implements `Features`."""

    def __init__(self, cached: CachedFeatures, images: np.ndarray, device: torch.device):
        self.unreadable, self.versions = cached.unreadable, cached.versions
        self.place = np.full(len(cached.paths), -1, dtype=np.int64)
        self.place[images] = np.arange(len(images))
        rows = cached.rows_of(images[:0])
        self.rows = rows.new_empty((len(images), *rows.shape[1:]), device=device)
        for start in range(0, len(images), ENCODE_BATCH):
            self.rows[start : start + ENCODE_BATCH] = cached.rows_of(images[start : start + ENCODE_BATCH])

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        return decoded(self.rows[torch.from_numpy(self.place[images]).to(self.rows.device)]).to(device)


def decoded(rows: torch.Tensor) -> torch.Tensor:
    """Return the features in rows as the cache stores them, as floats on the same device."""
    return dequantize(rows) if rows.dtype == torch.uint8 else rows.float()


def gather_views(
    views: Sequence[Features], images: np.ndarray, drawn: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Features of the images, of each in the view of this number: float (I, 49, C) or (I, C)."""
    if len(views) == 1:
        return views[0].gather(images, device)
    order = np.argsort(drawn, kind="stable")
    parts = [views[v].gather(images[drawn == v], device) for v in np.unique(drawn)]
    return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(parts[0].device)]


class JoinedFeatures:
    """The features of two data sets as those of one, where the second's images come after the first's.

    Implements `Features`; see `dataset.join_sets`.
    """

    def __init__(self, first: Features, second: Features):
        self.parts, self.size = (first, second), len(first.versions)
        self.unreadable = first.unreadable | {i + self.size: problem for i, problem in second.unreadable.items()}
        self.versions = np.concatenate([first.versions, second.versions])

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        second = (images >= self.size).astype(np.int64)
        return gather_views(self.parts, images - self.size * second, second, device)


def fits_on(device: torch.device, size: int) -> bool:
    """Whether `size` bytes are at most half of a GPU's free memory."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 2


@dataclass(frozen=True)
class FeatureRequest:
    """Whose features are wanted, from which encoder, and where they are kept."""

    caches: Sequence[Path]  # the cache's folders, one per disk, or none for no cache
    spec: EncoderSpec
    weights_hash: str
    build_encoder: Callable[[], Encoder]  # called only when something has to be encoded
    paths: Sequence[Path]  # of all images of the caption set; no two have the same name
    folder: Path  # under which they all lie
    images: np.ndarray  # int64 positions of the images to encode; the others are left alone
    device: torch.device
    means: bool  # the mean over the 49 regions rather than the regions
    workers: int  # threads that decode images while the encoder runs
    views: Sequence[str] = ("whole",)  # of `images.VIEWS`
    feature_type: str = "float16"  # of the regions: float16 or int8
    keep_on_device: str = "off"  # auto, on or off: a copy of the features in the memory of a GPU

    def directories(self, view: str) -> list[Path]:
        """The cache's folders of a view, one per disk."""
        folder = self.folder.resolve()
        transform = self.spec.transform + ("" if view == "whole" else f"-{view}")
        identity = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        place = Path(f"{folder_name(self.spec.name)}-{self.weights_hash[:8]}-{transform}") / f"{folder.name}-{identity}"
        return [cache / place for cache in self.caches]

    @property
    def kind(self) -> str:
        return stored_kind(self.means, self.feature_type)

    def store(self, view: str, kind: str | None = None) -> FeatureStore:
        """Read what the cache has of a view. Args: kind: another than `kind`."""
        kind, channels = kind or self.kind, self.spec.channels
        regions = (self.spec.regions, channels + (SCALE_BYTES if kind == "grid8" else 0))
        return FeatureStore(self.directories(view), kind, (channels,) if kind == "mean" else regions)


class LiveFeatures:
    """The plain path (`--feature_cache off`): every batch through the encoder. Implements `Features`."""

    def __init__(self, request: FeatureRequest, encode: Callable[[np.ndarray], torch.Tensor], view: str):
        self.request, self.encode, self.view = request, encode, view
        self.unreadable: dict[int, str] = {}
        self.versions = np.full((len(request.paths), 2), -1, dtype=np.int64)

    @classmethod
    def of_views(cls, request: FeatureRequest) -> list[LiveFeatures]:
        """Return the features in each view; every image is opened once to see whether it can be read."""
        encode = request.build_encoder().fast_form(request.device)
        views = [cls(request, encode, view) for view in request.views]

        def look(image: int) -> tuple[str | None, tuple[int, int]]:
            """Return why an image cannot be read, or None, and the size and CRC-32 of its file."""
            try:
                version, _ = read_image(request.paths[image], request.spec, request.views[:1])
            except UnreadableImage as error:
                return str(error), (-1, -1)
            return None, (version.size, version.content)

        with ThreadPoolExecutor(request.workers) as pool:
            found = distributed.gather(list(pool.map(look, distributed.shard(request.images))))
        for features in views:
            features.unreadable |= {
                int(i): problem for i, (problem, _) in zip(request.images, found, strict=True) if problem
            }
            features.versions[request.images] = [version for _, version in found]
        return views

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        request = self.request

        def read(image: int) -> np.ndarray:
            return request.spec.load_views(request.paths[image], [self.view])

        with ThreadPoolExecutor(request.workers) as pool:
            grid = self.encode(np.concatenate(list(pool.map(read, images)))).to(device)
        return (grid.mean(1) if request.means else grid.clone()).float()  # a clone may be trained through


Found = tuple[FeatureStore, dict[int, FeatureFile]]  # a view's store, and which part of it has which image


def open_features(request: FeatureRequest) -> list[Features]:
    """Return the features of images in each view, encoding those that the cache lacks in one pass over the images.

    Of several processes each encodes its shard of the images.

    Raises:
        UserError: too many images cannot be read, the disk is too small, or the cache cannot be written.
    """
    paths, needed, device = request.paths, request.images, request.device
    if not request.caches:
        live = LiveFeatures.of_views(request)
        check_unreadable(live[0].unreadable, len(needed))
        return [*live]
    directories = [directory for view in request.views for directory in request.directories(view)]

    def look() -> list[Found]:
        stores = [request.store(view) for view in request.views]
        return [
            (store, {int(i): part for i in needed if (part := store.find(paths[i])) is not None}) for store in stores
        ]

    def missing() -> dict[int, list[int]]:
        """Return for each image that lacks some the numbers of the views that nobody has encoded yet."""
        seen[:] = look()
        lacking = {int(i): [v for v, (_, holders) in enumerate(seen) if int(i) not in holders] for i in needed}
        return {image: views for image, views in lacking.items() if views}

    def complete() -> bool:
        """Return whether nothing has to be written: everything is here, with the images' times, or cannot be noted."""
        if missing():
            return False
        retimed = {part.directory for store, _ in seen for part in store.parts if part.retimed}
        return not any(os.access(directory, os.W_OK) for directory in retimed)

    def prepare() -> dict[int, list[int]]:
        """Return what nobody has encoded yet, and note images' new times; the first process does it for all."""
        todo = missing()
        for store, _ in seen:
            store.note_times()
        return todo

    seen: list[Found] = []  # by the first process
    unreadable: dict[int, str] = {}
    try:
        done = distributed.from_first(complete)
    except OSError as error:
        raise UserError(
            f"cannot read the feature cache {directories[0]}: {error.strerror}. --feature_cache DIR chooses another "
            "place, off does without"
        ) from error
    with nullcontext() if done else waiting_locks(directories):  # a complete cache may lie on a read-only disk
        todo = {} if done else distributed.from_first(prepare)
        unseen = [directory for directory in directories if not directory.is_dir()]
        if unseen:
            raise UserError(f"rank {distributed.rank()} does not see {unseen[0]}, which rank 0 made: {SHARED_CACHE}")
        stores = [store for store, _ in seen] or [request.store(view) for view in request.views]
        disks, processes = len(request.caches), distributed.size()
        numbers = range(-(-disks // processes) * processes)  # of the parts: all disks take part
        shares = np.array_split(np.array(distributed.shard([*todo]), dtype=np.int64), len(numbers) // processes)
        for number, share in zip(distributed.shard(numbers), shares, strict=True):
            files = [store.part(number) for store in stores]
            mine = {image: todo[image] for image in share.tolist()}
            size = sum(map(len, mine.values())) * (files[0].row_bytes + 128)  # in all views
            require_free_space(files[0].directory, size, "encoding the images")
            if mine and request.kind != "grid":
                mine = derive_from_grids(request, files, mine)
            if mine:
                unreadable |= encode_images(request, request.build_encoder(), files, mine)
        distributed.wait_for_all()
    for theirs in distributed.all_gather(unreadable):
        unreadable |= theirs
    check_unreadable(unreadable, len(needed))
    opened: list[Features] = []
    found = look() if todo or not seen else seen
    size = sum(len(holders) * store.row_bytes for store, holders in found)  # of all views, or none
    on_device = request.keep_on_device == "on" or (request.keep_on_device == "auto" and fits_on(device, size))
    for view, (store, holders) in zip(request.views, found, strict=True):
        lost = [i for i in needed.tolist() if i not in holders and i not in unreadable]
        if lost:
            raise UserError(
                f"rank {distributed.rank()} does not see the features of {paths[lost[0]].name} in "
                f"{request.directories(view)[0]}, which another process encoded (or the image changed "
                f"meanwhile): {SHARED_CACHE}"
            )
        cached = CachedFeatures(store, paths, unreadable, holders)
        good = np.array(list(holders), dtype=np.int64)
        opened.append(DeviceFeatures(cached, good, device) if on_device else cached)
    return opened


@contextmanager
def waiting_locks(directories: Sequence[Path]) -> Iterator[None]:
    """Hold the store; where another run is encoding into it, say so and wait.

    Of several processes of one run the first holds it for all.
    """
    with ExitStack() as held:
        for directory in sorted(directories) if distributed.is_first() else ():
            make_directory(directory, "the feature cache; --feature_cache DIR chooses another place, off does without")
            message = f"Another run is at work in {directory}; waiting for it, to share what it encodes ..."
            held.enter_context(wait_for_lock(directory / "lock", message))
        yield


def derive_from_grids(
    request: FeatureRequest, files: Sequence[FeatureFile], todo: dict[int, list[int]]
) -> dict[int, list[int]]:
    """Fill means or eight-bit regions from float16 grids that are already there; returns the images and views that still need the encoder."""
    paths, done = request.paths, set[tuple[int, int]]()
    for view, file in enumerate(files):
        for grid in request.store(request.views[view], "grid").parts:
            wanted = [i for i, views in todo.items() if view in views and (i, view) not in done]
            have = [i for i in wanted if grid.holds(paths[i])]
            maps = grid.maps()
            for start in range(0, len(have), FLUSH_ROWS):
                found: list[tuple[str, Entry, np.ndarray]] = []
                for i in have[start : start + FLUSH_ROWS]:
                    entry = grid.entries[paths[i].name]
                    row = np.ascontiguousarray(maps[entry.row // ROWS_PER_FILE][entry.row % ROWS_PER_FILE])  # (49, C)
                    if zlib.crc32(row.data) == entry.checksum:  # a damaged one is encoded again
                        found.append((paths[i].name, entry, row))
                        done.add((i, view))
                if found:
                    names, entries, rows = zip(*found, strict=True)
                    versions = [Version(*entry[1:4]) for entry in entries]
                    file.append(names, versions, stored_form(np.stack(rows), file.kind))
    left = {i: [view for view in views if (i, view) not in done] for i, views in todo.items()}
    return {i: views for i, views in left.items() if views}


def stored_kind(means: bool, feature_type: str) -> str:
    """Return what the cache keeps (see `feature_store`) for decoders that read means, or regions of this type."""
    return "mean" if means else {"float16": "grid", "int8": "grid8"}[feature_type]


def stored_form(grids: np.ndarray, kind: str) -> np.ndarray:
    """Return the rows that the cache stores of these grids, float16 (n, 49, C)."""
    return mean_of(grids) if kind == "mean" else quantize(grids) if kind == "grid8" else grids


def mean_of(grids: np.ndarray) -> np.ndarray:
    """(n, 49, C) float16 -> (n, C) float16, summed in float32: the same whether the grid was stored or not."""
    return grids.astype(np.float32).mean(1).astype(np.float16)


Encoded = tuple[int, Version, np.ndarray]  # an image, the version of its file, its features in each wanted view


def encode_images(
    request: FeatureRequest, encoder: Encoder, files: Sequence[FeatureFile], todo: dict[int, list[int]]
) -> dict[int, str]:
    """Encode images and append the features in each view to the file of that view; reading, encoding and writing overlap.

    Threads rather than worker processes: Pillow and the encoder release the interpreter lock, and nothing has to be
    pickled, so that Windows and macOS need no special care.

    Args:
        files: one for each of the request's views.
        todo: for each image the numbers of the views that are wanted.

    Returns:
        why some images could not be read.
    """
    streams = min(torch.get_num_threads(), MOST_STREAMS) if request.device.type == "cpu" else 1
    encode = encoder.fast_form(request.device, streams=streams)
    paths, unreadable = request.paths, dict[int, str]()
    # For each view: names, versions and features of the images that are encoded, but not yet written.
    pending: list[list[tuple[str, Version, np.ndarray]]] = [[] for _ in files]

    def encode_batch(reading: list[tuple[int, Future[tuple[Version, np.ndarray]]]]) -> list[Encoded]:
        """Encode images as soon as they are read."""
        read: list[tuple[int, Version, np.ndarray]] = []
        for image, future in reading:
            try:
                read.append((image, *future.result()))
            except UnreadableImage as error:
                unreadable[image] = str(error)
        if not read:
            return []
        grids = encode(np.concatenate([squares for *_, squares in read])).to(torch.float16).cpu().numpy()  # (B, 49, C)
        features = stored_form(grids, request.kind)
        ends = np.cumsum([len(squares) for *_, squares in read])
        return [
            (image, version, rows)
            for (image, version, _), rows in zip(read, np.split(features, ends[:-1]), strict=True)
        ]

    def flush() -> None:
        for file, rows in zip(files, pending, strict=True):
            if rows:
                names, versions, features = zip(*rows, strict=True)
                file.append(names, versions, np.stack(features))
                rows.clear()

    def take(count: int, batch: Future[list[Encoded]]) -> None:
        for image, version, rows in batch.result():
            for view, row in zip(todo[image], rows, strict=True):
                pending[view].append((paths[image].name, version, row))
        if sum(map(len, pending)) >= FLUSH_ROWS:
            flush()
        bar.update(count)

    images = list(todo)
    per_batch = max(1, ENCODE_BATCH // len(files))
    bar = Progress(len(images), f"Encoding images ({encoder.spec.name}, {', '.join(request.views)})", "image")
    with ThreadPoolExecutor(request.workers) as readers, ThreadPoolExecutor(streams) as encoders:
        ahead: deque[tuple[int, Future[list[Encoded]]]] = deque()
        try:
            for start in range(0, len(images), per_batch):
                chunk = images[start : start + per_batch]
                reading = [
                    (i, readers.submit(read_image, paths[i], encoder.spec, [request.views[view] for view in todo[i]]))
                    for i in chunk
                ]
                ahead.append((len(chunk), encoders.submit(encode_batch, reading)))
                if len(ahead) > streams + BATCHES_AHEAD:
                    take(*ahead.popleft())
            while ahead:
                take(*ahead.popleft())
        finally:  # Ctrl-C keeps what is encoded
            flush()
            bar.close()
    return unreadable


def read_image(path: Path, spec: EncoderSpec, views: Sequence[str]) -> tuple[Version, np.ndarray]:
    """Return the version of an image's file, and what `EncoderSpec.load_views` returns. Raises UnreadableImage."""
    return version_of(path), spec.load_views(path, views)


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
            f"(`{program(DATA_SCRIPT)} --force`), or remove these images' rows from the captions file"
        )
    log.warning(f"{len(unreadable)} unreadable image(s) left out.")
