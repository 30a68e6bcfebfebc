"""What an image encoder is, frozen and with last stages that are trained.

To add an encoder, subclass `EncoderSpec`, make an instance of it and name that in `registry.ENCODERS`. A subclass
says where the weights come from (`locate_weights`) and of which parts the network consists (`load_stages`). With
`--fine_tune` the last of these parts are trained with the decoder (`TrainableStages`).
"""

from __future__ import annotations

import pickle
import threading
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from captioning.config import registry
from captioning.data.images import ImageSource, grid_side, load_views
from captioning.encoders.openvino import openvino_form
from captioning.io import UserError, first_line

ENCODE_BATCH = 32  # images that go through the encoder together
MANY = 64  # from so many images on OpenVINO saves more time than compiling for it takes (docs/lab/log.md)
WEIGHTS_PLACES = (Path("resources/models"), Path("../../resources/models"))
RANDOM, RANDOM_HASH = "random", "random0000000000"  # what --resnet_weights calls untrained weights, and their hash


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder, before its weights are read."""

    name: str  # as in the registry
    channels: int  # C of the regions
    mean: tuple[float, float, float]  # of the pixels 0..255, per channel
    std: tuple[float, float, float]
    image_size: int = 224
    grid: int = 7  # regions along each side; comments on shapes write 49 for their number, which is 64 with Lite2
    earlier: tuple[tuple[int, int], ...] = ()  # channels and grid of the stages before the last, for `without_last`
    trainable_stages: int = 0  # last stages that are left out, to be trained with the decoder: see `without_last`
    whole: EncoderSpec | None = None  # with all its stages, where some are left out
    interpolation: str = "bilinear"  # of the resizing, one of Pillow's
    terms: str = "the weights of its author"  # whose the weights are and what they allow, for the model card
    remedy: ClassVar[str] = "install those of training"  # what to do where a checkpoint was trained on other weights

    @property
    def regions(self) -> int:
        """Number of regions of an image."""
        return self.grid * self.grid

    @property
    def transform(self) -> str:
        """Name of what is done to an image: it is resized to a square, and goes through so many stages."""
        how = "" if self.interpolation == "bilinear" else f"-{self.interpolation}"
        return f"squash{self.image_size}{how}" + (f"-cut{self.trainable_stages}" if self.trainable_stages else "")

    def load_views(self, source: ImageSource, views: Sequence[str]) -> np.ndarray:
        """Return an image in these views, as `images.load_views` does, resized for this encoder."""
        return load_views(source, self.image_size, views, self.interpolation)

    def without_last(self, stages: int) -> EncoderSpec:
        """Return the encoder without its last `stages`, whose output is a larger grid.

        Raises:
            UserError: it has no such stages that could be trained by themselves.
        """
        if not stages:
            return self
        count = len(self.earlier)
        if stages > count:
            way_out = f"give at most {count}" if count else "--fine_tune 0 freezes all of it"
            raise UserError(
                f"--fine_tune {stages}: {self.name} has {count or 'no'} last stages that can be trained: {way_out}"
            )
        channels, grid = self.earlier[-stages]  # of the stage that becomes the last
        return replace(self, channels=channels, grid=grid, trainable_stages=stages, whole=self)

    @property
    def family(self) -> str:
        """The name in run directories."""
        return registry.folder_name(self.name)

    def locate_weights(self, named: str | None, expected: str | None) -> tuple[Path | None, str]:
        """Return the file of the weights, or None where there is none to read, and their hash (16 hex digits).

        Args: as for `find_weights`.
        """
        raise NotImplementedError

    def load_stages(self, weights: Path | None) -> Sequence[nn.Module]:
        """Build the network in parts that follow each other; the last one's output is the grid (B, C, grid, grid)."""
        raise NotImplementedError

    def find_weights(self, named: str | None = None, expected: str | None = None) -> tuple[Path | None, str]:
        """Locate the weights and hash them.

        Only the user names files: of what a checkpoint says of its encoder only the hash is used.

        Args:
            named: the user's --resnet_weights: a path, or 'random' for an untrained network; None for the usual places.
            expected: the hash of the weights that a checkpoint was trained on.

        Returns:
            the file (None where there is none to read) and the first 16 hex digits of its SHA-256.

        Raises:
            UserError: no weights can be had, a file whose name carries a hash does not match it, or not the expected ones.
        """
        path, digest = self.locate_weights(named, expected)
        if expected is not None and expected != digest:
            raise UserError(
                f"the checkpoint was trained on {self.name} weights {expected[:8]}, but {path or 'those here'} are "
                f"{digest[:8]}: {self.remedy}"
            )
        return path, digest

    def build(self, weights: Path | None) -> Encoder:
        """Build the encoder with the weights that `find_weights` found.

        Raises:
            UserError: the file does not hold this network's weights, or the network gives another shape than declared.
        """
        encoder = Encoder(self, self.load_stages(weights)[: -self.trainable_stages or None])
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        found, declared = tuple(encoder(blank).shape), (1, self.regions, self.channels)
        if found != declared:
            raise UserError(
                f"the encoder {self.name} gives {found} for one image where its EncoderSpec declares {declared} "
                "(images, grid x grid, channels): correct its channels, grid or image_size"
            )
        return encoder


class TrainableStages(nn.Module):
    """The last stages of an encoder, which are trained with the decoder: regions in, regions out.

    Always in eval mode: BatchNorm keeps the statistics of its pretraining, only its scale and shift learn.
    """

    def __init__(self, spec: EncoderSpec, weights: Path | None):
        """Args: spec: of the encoder before these stages; weights: of the whole encoder, None for random ones."""
        super().__init__()
        self.stages = nn.Sequential(*spec.load_stages(weights)[-spec.trainable_stages :])
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.num_batches_tracked = False, None  # the statistics stay, uncounted
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels:
                module.forward = in_float32(module.forward)  # type: ignore[method-assign, assignment]
        self.train(False)

    def train(self, mode: bool = True) -> TrainableStages:
        """Stay in eval mode, whatever `mode` is."""
        super().train(False)
        return self

    def forward(self, regions: torch.Tensor) -> torch.Tensor:
        """Args: regions: (I, 196, C) of the frozen stages, row by row. Returns: (I, 49, C) of the last stage."""
        grid = regions.transpose(1, 2).unflatten(2, 2 * (grid_side(regions.shape[1]),))  # (I, C, 14, 14), channels last
        return self.stages(grid).flatten(2).transpose(1, 2)


def in_float32(convolution: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a depthwise convolution that autocast leaves alone on a CPU.

    oneDNN's bf16 gradients of these take longer than all the rest of EfficientNet-Lite0's last stages.
    """

    def forward(grid: torch.Tensor) -> torch.Tensor:
        if grid.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return convolution(grid)
        with torch.autocast("cpu", enabled=False):
            return convolution(grid.float())

    return forward


class Encoder(nn.Module):
    """A frozen network: pixels in, a square grid of features out, 7x7 of most.

    Always in eval mode (BatchNorm's running statistics never move) and without gradients.
    """

    def __init__(self, spec: EncoderSpec, stages: Sequence[nn.Module]):
        super().__init__()
        self.spec, self.stages = spec, nn.ModuleList(stages)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode, whatever `mode` is."""
        super().train(False)
        return self

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Args: pixels: uint8 or float (B, 3, size, size), 0..255. Returns: (B, regions, C), row by row."""
        grid = (pixels.float() - self.mean) / self.std
        for stage in self.stages:
            grid = stage(grid)  # (B, channels of the stage, side, side)
        return grid.flatten(2).transpose(1, 2)

    def fast_form(
        self, device: torch.device, many: bool = True, streams: int = 1
    ) -> Callable[[np.ndarray], torch.Tensor]:
        """Return the encoder as a function of uint8 arrays (B, size, size, 3), in the form that is fastest on `device`.

        The pixels stay channels-last, as Pillow delivers them. A GPU runs it in float16, the type that the cache stores.

        Args:
            many: at least MANY images will be encoded: on a CPU, compiling the encoder for OpenVINO pays.
            streams: batches that as many threads of the caller encode at the same time.

        Returns:
            a function that gives float (B, 49, C) on `device`.
        """
        self.to(device).to(memory_format=torch.channels_last)
        if many and device.type == "cpu" and (form := openvino_form(self, self.spec.image_size, streams)):
            return form

        one_at_a_time = threading.Lock()  # PyTorch uses all threads for a batch

        @torch.inference_mode()
        def encode(pixels: np.ndarray) -> torch.Tensor:
            count = len(pixels)
            if many:  # PyTorch chooses its algorithms by the size of the batch, so that it is always the same
                filler = np.zeros((-count % ENCODE_BATCH, *pixels.shape[1:]), np.uint8)
                pixels = np.concatenate([pixels, filler])
            with one_at_a_time, torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
                parts = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).split(ENCODE_BATCH)
                return torch.cat([self(part) for part in parts])[:count]

        return encode


def encoder_of(flags: Mapping[str, Any]) -> EncoderSpec:
    """Return the encoder that these flags describe, as far as it is frozen."""
    return find_encoder(flags["encoder"], flags["grid"]).without_last(flags["fine_tune"])


def find_encoder(name: str, grid: int | None = None) -> EncoderSpec:
    """Return the encoder of this name in the registry or in one of its libraries, which pool to `grid` x `grid`.

    Raises:
        UserError: the library is not installed, or does not have it.
    """
    if name in registry.ENCODERS:
        spec: EncoderSpec = registry.load(registry.ENCODERS[name])
    else:
        spec = registry.load(registry.LIBRARIES[registry.library_of(name)])(name.partition(":")[2], grid)
    return spec


def earlier_grids(image_size: int, channels: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return `EncoderSpec.earlier` of a network whose first stage divides the image's side by 4, each further one by 2."""
    return tuple((depth, image_size // (4 << stage)) for stage, depth in enumerate(channels))


# --------------------------------------------------------------------------------------------------
# Files of weights


def read_tensors(path: Path) -> Any:
    """Read what `torch.save` wrote, in either of PyTorch's two forms, onto the CPU. Nothing in it is executed.

    Raises:
        Exception: of many kinds, all of which mean that the file is damaged or not PyTorch's.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # PyTorch writes checksums and does not compare them
                raise zipfile.BadZipFile(f"its record {damaged} is damaged (checksum differs)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # over pickles that PyTorch did not write, which it then refuses
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose message says how to execute the file all the same
            raise ValueError("it holds something else than tensors and plain values") from error


def load_encoder_weights(network: nn.Module, path: Path) -> None:
    """Fill an encoder from a file of PyTorch or safetensors, without executing anything in it.

    Raises:
        UserError: not a file of weights, a damaged one, or another network's.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = read_tensors(path)  # EfficientNet-Lite's are of before PyTorch 1.6
        missing, unexpected = network.load_state_dict(state, strict=False)
    except Exception as error:  # unpickling, zip and shape errors all mean the same to the user
        raise UserError(f"{path} cannot be read as {type(network).__name__} weights: {first_line(error)}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # older files lack these counters
    if missing or unexpected:
        raise UserError(f"{path} is not a {type(network).__name__}: {(missing + unexpected)[0]} is missing or unknown")
