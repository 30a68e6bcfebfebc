"""Image features: every image goes through the frozen encoder once, and is read from the cache ever after."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from captioning import distributed
from captioning.config.registry import folder_name
from captioning.data.images import UnreadableImage
from captioning.encoders.base import ENCODE_BATCH, Encoder, EncoderSpec
from captioning.encoders.feature_store import (
    RECORD,
    SCALE_BYTES,
    FeatureFile,
    Version,
    name_hash,
    stored_form,
    version_of,
)
from captioning.io import UserError, make_directory, progress_bar, require_free_space, wait_for_lock

BATCHES_AHEAD = 3  # that are read while others are encoded
MOST_STREAMS = 8  # batches encoded at the same time: each takes some 100 MB
SHARED_CACHE = "processes on several machines need a --feature_cache on a disk that they share"
FLUSH_BATCHES = 16  # between two syncs, of 512 rows: some seconds of work on two cores
CPU = torch.device("cpu")


class Features(Protocol):
    """Where a batch's image features come from."""

    unreadable: dict[int, str]  # image position -> why it could not be read
    versions: np.ndarray  # int64 (images, 2): size and CRC-32 of each image's file, -1 where it was not asked for

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        """Features of the images at these positions, float (I, 49, C) or (I, C), on this device."""


class CachedFeatures:
    """Features read from a file of the cache by image position. Implements `Features`."""

    def __init__(self, file: FeatureFile, paths: Sequence[Path], images: Sequence[int], unreadable: dict[int, str]):
        """Args: images: those that the file holds and that may be asked for."""
        self.file, self.paths, self.unreadable = file, paths, unreadable
        self.rows = np.full(len(paths), -1, dtype=np.int64)
        self.versions = np.full((len(paths), 2), -1, dtype=np.int64)
        for image in images:
            self.rows[image] = row = file.rows[name_hash(paths[image])]
            self.versions[image] = file.records["size"][row], file.records["content"][row]
        self.map = file.map()
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
        rows = self.rows[images]
        out = self.map[rows]
        for image, row, values in zip(images, rows, out, strict=True):
            if not self.verified[image]:
                if zlib.crc32(values.data) != self.file.records["checksum"][row]:
                    self.file.forget(row)
                    raise UserError(
                        f"the cached features of {self.paths[image].name} in {self.file.path.parent} are damaged "
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


def encoded_rows(grids: torch.Tensor, means: bool) -> np.ndarray:
    """Return the rows that the cache stores of an encoder's grids, float (n, 49, C): see `stored_form`."""
    return stored_form(grids.to(torch.float16).cpu().numpy(), means)


def decoded(rows: torch.Tensor) -> torch.Tensor:
    """Return the features in rows as `stored_form` made them, as floats (n, 49, C) or (n, C) on the same device."""
    if rows.dtype != torch.uint8:
        return rows.float()
    scale = rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    return rows[..., :-SCALE_BYTES].float().mul_(scale[..., 1:]).add_(scale[..., :1])


def gather_views(
    views: Sequence[Features], images: np.ndarray, drawn: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Features of the images, of each in the view of this number: float (I, 49, C) or (I, C)."""
    if len(views) == 1:
        return views[0].gather(images, device)
    order = np.argsort(drawn, kind="stable")
    parts = [views[v].gather(images[drawn == v], device) for v in np.unique(drawn)]
    return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(parts[0].device)]


@dataclass(frozen=True)
class FeatureRequest:
    """Whose features are wanted, from which encoder, and where they are kept."""

    cache: Path | None  # the cache's folder; None encodes each batch anew
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
    keep_on_device: str = "off"  # on, off or auto: a copy in a GPU's memory; auto where it takes half of what is free

    @property
    def directory(self) -> Path:
        """The cache's folder of these images."""
        encoder = f"{folder_name(self.spec.name)}-{self.weights_hash[:8]}-{self.spec.transform}"
        folder = self.folder.resolve()
        identity = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        return (self.cache or Path()) / encoder / f"{folder.name}-{identity}"

    def files(self) -> list[FeatureFile]:
        """Read what the cache has of each view."""
        kind = "means.f16" if self.means else "grids.u8"
        shape = (self.spec.channels,) if self.means else (self.spec.regions, self.spec.channels + SCALE_BYTES)
        return [FeatureFile(self.directory / f"{view}-{kind}", shape) for view in self.views]

    def read(self, image: int, views: Sequence[str]) -> tuple[Version, np.ndarray] | str:
        """Return the version of an image's file and what `EncoderSpec.load_views` returns, or why it cannot be read."""
        try:
            return version_of(self.paths[image]), self.spec.load_views(self.paths[image], views)
        except UnreadableImage as error:
            return str(error)


@dataclass
class LiveFeatures:
    """The plain path (`--feature_cache off`): every batch through the encoder. Implements `Features`."""

    request: FeatureRequest
    encode: Callable[[np.ndarray], torch.Tensor]
    view: str
    unreadable: dict[int, str]
    versions: np.ndarray

    @classmethod
    def of_views(cls, request: FeatureRequest) -> list[LiveFeatures]:
        """Return the features in each view; every image is opened once to see whether it can be read."""
        encode = request.build_encoder().fast_form(request.device)

        def look(image: int) -> Version | str:
            found = request.read(image, request.views[:1])
            return found if isinstance(found, str) else found[0]

        with ThreadPoolExecutor(request.workers) as pool:
            seen = distributed.gather(list(pool.map(look, distributed.shard(request.images))))
        found = dict(zip(request.images.tolist(), seen, strict=True))
        unreadable = {image: problem for image, problem in found.items() if isinstance(problem, str)}
        versions = np.full((len(request.paths), 2), -1, dtype=np.int64)
        for image in found.keys() - unreadable.keys():
            versions[image] = found[image].size, found[image].content
        return [cls(request, encode, view, unreadable, versions) for view in request.views]

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        request = self.request

        def read(image: int) -> np.ndarray:
            return request.spec.load_views(request.paths[image], [self.view])

        with ThreadPoolExecutor(request.workers) as pool:
            grids = self.encode(np.concatenate(list(pool.map(read, images))))
        return decoded(torch.from_numpy(encoded_rows(grids, request.means))).to(device)  # the same as from a cache


def open_features(request: FeatureRequest) -> list[Features]:
    """Return the features of images in each view, encoding those that the cache lacks in one pass over the images.

    Of several processes each encodes its shard of the images.

    Raises:
        UserError: the disk is too small, or the cache cannot be read or written.
    """
    paths, needed, device = request.paths, request.images.tolist(), request.device
    if request.cache is None:
        return [*LiveFeatures.of_views(request)]
    files = request.files()
    complete = distributed.from_first(lambda: not missing_rows(request, files))
    unreadable: dict[int, str] = {}
    if not complete:
        unreadable = encode_missing(request)
        files = request.files()
    lost = next((paths[image].name for image in missing_rows(request, files) if image not in unreadable), None)
    if lost is not None:
        raise UserError(
            f"rank {distributed.rank()} does not see the features of {lost} in {request.directory}, which another "
            f"process encoded (or the image changed meanwhile): {SHARED_CACHE}"
        )
    readable = [image for image in needed if image not in unreadable]
    on_device = request.keep_on_device == "on"
    if request.keep_on_device == "auto" and device.type == "cuda":
        size = len(readable) * sum(file.row_bytes for file in files)
        on_device = size <= torch.cuda.mem_get_info(device)[0] // 2
    cached = [CachedFeatures(file, paths, readable, unreadable) for file in files]
    return [DeviceFeatures(each, np.array(readable, np.int64), device) if on_device else each for each in cached]


Rows = dict[int, dict[int, int]]  # for some images the numbers of the views to encode, each with the row that it gets


def missing_rows(request: FeatureRequest, files: Sequence[FeatureFile]) -> Rows:
    """Return the rows of the images that the cache lacks in some view."""
    free = [itertools.count(len(file.records)) for file in files]
    rows = {
        image: {v: next(free[v]) for v, file in enumerate(files) if file.find(request.paths[image]) is None}
        for image in request.images.tolist()
    }
    return {image: views for image, views in rows.items() if views}


def encode_missing(request: FeatureRequest) -> dict[int, str]:
    """Encode what the cache lacks; while another run encodes into it, wait, to share what that run encodes.

    Returns:
        why some images could not be read.
    """
    directory, first = request.directory, distributed.is_first()
    if first:
        make_directory(directory, "the feature cache; --feature_cache DIR chooses another place, off does without")
    message = f"Another run is at work in {directory}; waiting for it, to share what it encodes ..."
    with wait_for_lock(directory / "lock", message) if first else nullcontext():  # the first locks it for all
        files = request.files()
        todo = distributed.from_first(lambda: missing_rows(request, files))
        if not directory.is_dir():
            raise UserError(f"rank {distributed.rank()} does not see {directory}, which rank 0 made: {SHARED_CACHE}")
        size = sum(map(len, todo.values())) * (files[0].row_bytes + RECORD.itemsize)
        require_free_space(directory, size, "encoding the images")
        unreadable = encode_images(request, files, todo) if todo else {}
        everywhere = distributed.all_gather(unreadable)  # when all have written
    return {image: problem for theirs in everywhere for image, problem in theirs.items()}


def encode_images(request: FeatureRequest, files: Sequence[FeatureFile], todo: Rows) -> dict[int, str]:
    """Encode this process's shard of the images into the files of the views; reading, encoding and writing overlap.

    Threads rather than worker processes: Pillow and the encoder release the interpreter lock, and nothing has to be
    pickled, so that Windows and macOS need no special care.

    Returns:
        why some images could not be read.
    """
    encoder, unreadable = request.build_encoder(), dict[int, str]()
    streams = min(torch.get_num_threads(), MOST_STREAMS) if request.device.type == "cpu" else 1
    encode = encoder.fast_form(request.device, streams=streams)
    mine, per_batch = distributed.shard([*todo]), max(1, ENCODE_BATCH // len(files))
    batches = [mine[start : start + per_batch] for start in range(0, len(mine), per_batch)]
    groups = [batches[start : start + FLUSH_BATCHES] for start in range(0, len(batches), FLUSH_BATCHES)]

    def encode_batch(images: Sequence[int]) -> list[tuple[int, int, Version, np.ndarray]]:
        """Return for each view of each image that can be read: both, the version of the image's file, and the features."""
        views = [[request.views[view] for view in todo[image]] for image in images]
        found = dict(zip(images, readers.map(request.read, images, views), strict=True))
        unreadable.update({image: problem for image, problem in found.items() if isinstance(problem, str)})
        read = {image: each for image, each in found.items() if not isinstance(each, str)}
        if not read:
            return []
        grids = encode(np.concatenate([squares for _, squares in read.values()]))
        places = [(image, view, version) for image, (version, _) in read.items() for view in todo[image]]
        return [(*place, values) for place, values in zip(places, encoded_rows(grids, request.means), strict=True)]

    bar = progress_bar(len(mine), f"Encoding images ({encoder.spec.name}, {', '.join(request.views)})", "image")
    with ThreadPoolExecutor(request.workers) as readers, ThreadPoolExecutor(streams + BATCHES_AHEAD) as encoders:
        try:
            following: Iterator[list[tuple[int, int, Version, np.ndarray]]] = iter(())
            for group, next_group in itertools.pairwise([[], *groups, []]):
                encoded, following = following, encoders.map(encode_batch, next_group)  # goes on while this is written
                rows: list[list[tuple[int, Path, Version, np.ndarray]]] = [[] for _ in files]
                for batch, found in zip(group, encoded, strict=True):
                    for image, view, version, values in found:
                        rows[view].append((todo[image][view], request.paths[image], version, values))
                    bar.update(len(batch))
                for file, its in zip(files, rows, strict=True):
                    file.write(its)
        finally:
            encoders.shutdown(wait=False, cancel_futures=True)
            bar.close()
    return unreadable
