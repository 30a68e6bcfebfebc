"""torchvision's ResNets and ConvNeXt, whose weights are downloaded once or lie in one of the usual places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from captioning.encoders.base import (
    RANDOM,
    RANDOM_HASH,
    WEIGHTS_PLACES,
    EncoderSpec,
    earlier_grids,
    load_encoder_weights,
)
from captioning.io import UserError, log, sha256

Spec = TypeVar("Spec", bound=EncoderSpec)
IMAGENET_MEAN, IMAGENET_STD = (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)
IMAGENET_TERMS = (
    "torchvision's weights (IMAGENET1K), trained on ImageNet, whose terms allow non-commercial research and education"
)


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
            load_encoder_weights(network, weights)
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


def hash_in_name(file: str) -> str:
    """Return the first digits of the SHA-256 that a file name of torchvision promises: resnet50-0676ba61.pth."""
    return Path(file).stem.rpartition("-")[2]


def torchvision_spec(kind: type[Spec], network: str, channels: Sequence[int], *hashes: str) -> Spec:
    """Describe a network of torchvision's. Args: channels: of each stage; hashes: in the names of its weights' files."""
    files = tuple(f"{network}-{each}.pth" for each in hashes)
    return kind(
        network, channels[-1], IMAGENET_MEAN, IMAGENET_STD, earlier=earlier_grids(224, channels[:-1]),
        terms=IMAGENET_TERMS, network=network, files=files,  # type: ignore[call-arg]
    )  # fmt: skip


RESNET_CHANNELS = (256, 512, 1024, 2048)
RESNET50 = torchvision_spec(ResNetSpec, "resnet50", RESNET_CHANNELS, "0676ba61", "19c8e357", "11ad3fa6")
RESNET101 = torchvision_spec(ResNetSpec, "resnet101", RESNET_CHANNELS, "63fe2227", "cd907fc2")
RESNET152 = torchvision_spec(ResNetSpec, "resnet152", RESNET_CHANNELS, "394f9c45", "f82ba261")
CONVNEXT_BASE = torchvision_spec(ConvNeXtSpec, "convnext_base", (128, 256, 512, 1024), "6075fbad")
