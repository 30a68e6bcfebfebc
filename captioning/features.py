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
from filelock import FileLock, Timeout

from captioning import distributed
from captioning.encoders import ENCODE_BATCH, Encoder, EncoderSpec
from captioning.feature_store import ROWS_PER_FILE, FeatureFile, FeatureStore, Version, version_of
from captioning.images import UnreadableImage, load_pixels
from captioning.io import Progress, UserError, log, make_directory, require_free_space
from captioning.registry import folder_name

BATCHES_AHEAD = 3
SHARED_CACHE = "processes on several machines need a --feature_cache on a disk that they share"
FLUSH_IMAGES = 512  # images between two syncs: a dozen seconds of work on two cores


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
        self.unreadable, self.versions = cached.unreadable, cached.versions
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
        self.spec, self.paths, self.means, self.view = encoder.spec, paths, means, view
        self.pool = ThreadPoolExecutor(workers)
        found = distributed.gather(list(self.pool.map(self.look, [paths[i] for i in distributed.shard(needed)])))
        self.unreadable = {int(i): problem for i, (problem, _) in zip(needed, found, strict=True) if problem}
        self.versions = np.full((len(paths), 2), -1, dtype=np.int64)
        self.versions[needed] = [version for _, version in found]

    def load(self, path: Path) -> np.ndarray:
        return load_pixels(path, self.spec.image_size, self.view, self.spec.interpolation)

    def look(self, path: Path) -> tuple[str | None, tuple[int, int]]:
        """Return why an image cannot be read, or None, and the size and CRC-32 of its file."""
        try:
            self.load(path)
            version = version_of(path)
        except UnreadableImage as error:
            return str(error), (-1, -1)
        return None, (version.size, version.content)

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        pixels = list(self.pool.map(lambda image: self.load(self.paths[image]), images))
        grid = self.encode(np.stack(pixels)).to(device)
        return (grid.mean(1) if self.means else grid.clone()).float()  # a clone may be trained through


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
    compile_encoder: str = "off"  # auto, on or off: see `Encoder.fast_form`
    keep_on_device: str = "off"  # auto, on or off: a copy of the features in the memory of a GPU
    views: int = 1  # that will be opened: they share the memory


def open_features(request: FeatureRequest, view: str = "whole") -> Features:
    """Return the features of images in one view, encoding those that the cache lacks.

    Of several processes each encodes its shard of the images.

    Args:
        view: one of `images.VIEWS`.

    Raises:
        UserError: too many images cannot be read, the disk is too small, or the cache cannot be written.
    """
    caches, spec, paths, folder = request.caches, request.spec, request.paths, request.folder
    needed, device, means, workers = request.images, request.device, request.means, request.workers
    build_encoder = request.build_encoder
    if not caches:
        live = LiveFeatures(build_encoder(), device, paths, needed, means, workers, view)
        check_unreadable(live.unreadable, len(needed))
        return live
    folder = folder.resolve()
    transform = spec.transform + ("" if view == "whole" else f"-{view}")
    identity = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    place = Path(f"{folder_name(spec.name)}-{request.weights_hash[:8]}-{transform}") / f"{folder.name}-{identity}"
    directories = [cache / place for cache in caches]

    def read(means: bool = means) -> FeatureStore:
        return FeatureStore(
            directories, *(("mean", (spec.channels,)) if means else ("grid", (spec.regions, spec.channels)))
        )

    def look() -> tuple[FeatureStore, dict[int, FeatureFile]]:
        store = read()
        return store, {int(i): part for i in needed if (part := store.find(paths[i])) is not None}

    def missing() -> list[int]:
        """Return what nobody has encoded yet."""
        seen[:] = [look()]
        return [int(i) for i in needed if int(i) not in seen[0][1]]

    def complete() -> bool:
        """Return whether nothing has to be written: everything is here, with the images' times, or cannot be noted."""
        if missing():
            return False
        retimed = {part.directory for part in seen[0][0].parts if part.retimed}
        return not any(os.access(directory, os.W_OK) for directory in retimed)

    def prepare() -> list[int]:
        """Return what nobody has encoded yet, and note images' new times; the first process does it for all."""
        todo = missing()
        seen[0][0].note_times()
        return todo

    seen: list[tuple[FeatureStore, dict[int, FeatureFile]]] = []  # by the first process
    unreadable: dict[int, str] = {}
    try:
        done = distributed.from_first(complete)
    except OSError as error:
        raise UserError(
            f"cannot read the feature cache {directories[0]}: {error.strerror}. --feature_cache DIR chooses another "
            "place, off does without"
        ) from error
    with nullcontext() if done else waiting_locks(directories):  # a complete cache may lie on a read-only disk
        todo = [] if done else distributed.from_first(prepare)
        unseen = [directory for directory in directories if not directory.is_dir()]
        if unseen:
            raise UserError(f"rank {distributed.rank()} does not see {unseen[0]}, which rank 0 made: {SHARED_CACHE}")
        store = seen[0][0] if seen else read()
        worth_it = spec.compile_from is not None and len(todo) >= spec.compile_from
        compiled = request.compile_encoder == "on" or (request.compile_encoder == "auto" and worth_it)
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
    lost = [i for i in needed.tolist() if i not in holders and i not in unreadable]
    if lost:
        raise UserError(
            f"rank {distributed.rank()} does not see the features of {paths[lost[0]].name} in {directories[0]}, which "
            f"another process encoded (or the image changed meanwhile): {SHARED_CACHE}"
        )
    cached = CachedFeatures(store, paths, unreadable, holders)
    good = np.array(list(holders), dtype=np.int64)
    size = request.views * len(good) * store.row_bytes
    if request.keep_on_device == "on" or (request.keep_on_device == "auto" and fits_on(device, size)):
        return DeviceFeatures(cached, good, device)
    return cached


def split_evenly(items: list[int], parts: int) -> list[list[int]]:
    """The items in their order, in so many runs of about the same length."""
    return [[int(item) for item in run] for run in np.array_split(np.array(items, dtype=np.int64), parts)]


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

    bar = Progress(len(todo), f"Encoding images ({encoder.spec.name}, {view})", "image")
    try:
        for part, versions, pixels in decoded_batches(paths, todo, encoder.spec, workers, unreadable, view):
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
    paths: Sequence[Path], todo: list[int], spec: EncoderSpec, workers: int, unreadable: dict[int, str], view: str
) -> Iterator[tuple[list[int], list[Version], np.ndarray]]:
    """Yield (images, their versions, pixels uint8 (ENCODE_BATCH, size, size, 3)); threads decode a few batches ahead.

    The last batch is filled up with black: an image's features are the same, to the bit, whichever images
    share its batch, and a pass that was interrupted ends as one that was not.

    Threads rather than worker processes: Pillow releases the interpreter lock while it decodes and
    resizes, and nothing has to be pickled, so that Windows and macOS need no special care.
    """

    def read(path: Path) -> tuple[Version, np.ndarray]:
        return version_of(path), load_pixels(path, size, view, spec.interpolation)

    size = spec.image_size
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
