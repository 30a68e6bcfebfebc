"""Any model of the package timm as an encoder: `--encoder timm:NAME` (requirements-timm.txt).

    timm:resnet18.a1_in1k         a name of timm's, whose weights are on the Hugging Face hub
    timm:hf-hub:OWNER/NAME        a model on the hub with a config.json of timm's, also OWNER/NAME@REVISION
    timm:local-dir:FOLDER         a folder that `timm.models.save_for_hf` wrote, or a copy of one from the hub

timm builds and fills the networks. Their file of weights is found here, whatever a config.json says, for its hash.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from captioning.encoders.base import RANDOM, RANDOM_HASH, WEIGHTS_PLACES, EncoderSpec
from captioning.io import UserError, first_line, install_command, printable, sha256

CONFIG = "config.json"
# In the order in which timm prefers them.
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HEADS = ("global_pool", "pre_logits", "head")  # the layers of a CNN of timm's after what it pools


@dataclass(frozen=True, kw_only=True)
class TimmSpec(EncoderSpec):
    """A model of timm's."""

    model: str  # as `timm.create_model` names it
    repository: str | None  # of the weights on the hub, perhaps with @REVISION
    config_hash: str  # of all that changes features beside the weights: configs change while names stay
    tokens: bool  # see `Grid`
    pooled: bool  # from a finer grid of its own
    remedy: ClassVar[str] = "name the right file with --resnet_weights"

    @property
    def transform(self) -> str:
        return f"{super().transform}-{f'grid{self.grid}-' if self.pooled else ''}{self.config_hash}"

    def locate_weights(self, named: str | None, expected: str | None) -> tuple[Path | None, str]:
        """See `EncoderSpec.locate_weights`; they are downloaded where the hub's cache on this machine lacks them."""
        if named == RANDOM or (not named and expected == RANDOM_HASH):
            return None, RANDOM_HASH
        if self.repository and not named:
            found = [hub_file(self.repository, WEIGHTS_FILES)]
        else:
            place = Path(named or self.model.partition(":")[2])
            found = [file for file in (place, *map(place.joinpath, WEIGHTS_FILES)) if file.is_file()]
        if not found:
            missing = f"{named} is not there" if named else f"there are no weights of {self.name}"
            raise UserError(f"{missing}: name their file with --resnet_weights, or choose another model")
        return found[0], sha256(found[0])[:16]

    def load_stages(self, weights: Path | None) -> Sequence[nn.Module]:
        """See `EncoderSpec.load_stages`: one, or as many as a CNN has resolutions if some of them are cut off."""
        with torch.random.fork_rng(devices=[]):  # as in TorchvisionSpec
            torch.manual_seed(0)
            try:
                network = build(self.model, weights)
            except Exception as error:  # of safetensors, pickle, torch and timm
                what = f"{weights} cannot be read as weights of" if weights else "timm cannot build"
                raise UserError(f"{what} {self.name}: {first_line(error)}") from error
            pixels = torch.randn(1, 3, self.image_size, self.image_size)
        whole = Grid(network, self.tokens, (self.whole or self).grid if self.pooled else None)
        if not self.trainable_stages:
            return [whole]
        stages = split(network)
        with torch.no_grad():
            if not pixels.is_meta and not torch.equal(nn.Sequential(*stages)(pixels), network.forward_features(pixels)):
                raise UserError(f"{self.name} is more than a sequence of its layers: --fine_tune 0 freezes all of it")
        return [*stages[:-1], nn.Sequential(stages[-1], whole.norm, whole.pool)]


@functools.cache
def find_timm(name: str, grid: int | None = None) -> TimmSpec:
    """Describe a model of timm's, built without memory for its weights.

    Args:
        name: what follows `timm:`.
        grid: cells along each side to pool to, None for the model's own.

    Raises:
        UserError: timm is not installed or has no such model, a config is not there, or the model has no grid.
    """
    timm = import_timm()
    model, repository = find_model(name)
    try:
        with torch.device("meta"), torch.no_grad():
            network = build(model)
            data = timm.data.resolve_data_config(model=network)
            depth, side, width = data["input_size"]
            if depth != 3 or side != width:
                raise ValueError(f"it takes images of {depth} x {side} x {width}, not square ones of three colours")
            blank = torch.zeros(1, 3, side, side)
            features = network.forward_features(blank)
            tokens = features.dim() != 4 or features.shape[2] != features.shape[3]  # or (B, g, g, C)
            shape = tuple(Grid(network, tokens)(blank).shape)
            earlier = () if tokens else earlier_grids(network, blank, features.shape)
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(f"its features are {shape}, not a square grid")
        mean, std = ((255 * red, 255 * green, 255 * blue) for red, green, blue in (data["mean"], data["std"]))
    except Exception as error:  # of any of timm's models, or of a config.json
        advice = "take a CNN, a ViT or a Swin with square images; --encoder list PATTERN shows them with their grids"
        raise UserError(f"timm:{name} cannot be an encoder ({first_line(error)}): {advice}") from error
    if grid and grid > shape[2]:
        raise UserError(f"--grid {grid} is finer than the {shape[2]} x {shape[2]} regions of timm:{name}: give fewer")
    config, architecture = network.pretrained_cfg, network.pretrained_cfg["architecture"]
    facts = json.dumps([architecture, network.pretrained_model_args, mean, std], sort_keys=True)
    return TimmSpec(
        f"timm:{name}", shape[1], mean, std, side, grid or shape[2], earlier,
        interpolation=data["interpolation"] if data["interpolation"] in ("bilinear", "lanczos", "nearest") else "bicubic",
        terms=f"timm's {architecture}; licence by its config, which nobody checked: {printable(config.get('license') or '?')}",
        model=model, repository=repository, config_hash=hashlib.sha256(facts.encode()).hexdigest()[:8],
        tokens=tokens, pooled=bool(grid and grid < shape[2]),
    )  # fmt: skip


def import_timm() -> Any:
    """Raises UserError: it is not installed."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"timm is not installed: {install_command('timm')}, or use an encoder without timm:") from error
    return timm


def build(model: str, weights: Path | None = None) -> Any:
    """Have timm build a network in eval mode, from this file of weights whatever its config says."""
    source = {"file": str(weights), "source": "", "state_dict": None} if weights else None
    return import_timm().create_model(model, weights is not None, pretrained_cfg_overlay=source).eval()


def find_model(name: str) -> tuple[str, str | None]:
    """Return a model's name for `timm.create_model`, and the repository of its weights if they are on the hub."""
    timm = import_timm()
    source, _, rest = name.partition(":")
    if source == "hf-hub":
        return f"local-dir:{hub_file(rest, (CONFIG,)).parent}", rest
    if source == "local-dir":
        path = Path(rest).expanduser()
        for folder in (path, *(place / path.name for place in WEIGHTS_PLACES)):
            if (folder / CONFIG).is_file():
                return f"local-dir:{folder}", None
        takes = f"takes a folder with it and the weights, which may also lie in {WEIGHTS_PLACES[0]}/"
        raise UserError(f"no {CONFIG} in {path}: timm:local-dir: {takes}")
    known = set(timm.list_models()) | set(timm.list_models(pretrained=True))
    if name not in known:
        raise UserError(f"timm has no model {name}: --encoder list PATTERN names those that match")
    config = timm.models.get_pretrained_cfg(name)
    return name, config.hf_hub_id if config else None


def hub_file(repository: str, files: Sequence[str]) -> Path:
    """Return the first of these files that a model on the hub has: from the cache on this machine, else downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    name, _, revision = repository.partition("@")
    for cached, file in itertools.product((True, False), files):
        try:
            return Path(hf_hub_download(name, file, revision=revision or None, local_files_only=cached))
        except Exception as error:  # of the network, the hub and the disk
            if isinstance(error, LocalEntryNotFoundError if cached else RemoteEntryNotFoundError):
                continue
            raise UserError(
                f"{repository} could not be downloaded from the Hugging Face hub ({first_line(error)}). Ways out: copy "
                "the hub's cache (HF_HOME) of a machine that has it; copy the model's folder here and use --encoder "
                "timm:local-dir:FOLDER; or use --encoder efficientnet_lite0, whose weights are installed already"
            ) from error
    raise UserError(f"{repository} has no {' or '.join(files)} on the Hugging Face hub: choose another model")


# --------------------------------------------------------------------------------------------------
# Grids


class Grid(nn.Module):
    """A whole model as one stage: its features (B, C, g, g) before its own pooling."""

    def __init__(self, network: Any, tokens: bool, grid: int | None = None):
        """Args: tokens: whether `forward_features` gives tokens or channels last; grid: to pool to, None for its own."""
        super().__init__()
        from timm.layers import ClNormMlpClassifierHead, NormMlpClassifierHead

        self.network, self.tokens = network, tokens
        # ConvNeXt and others norm what they have pooled in their head, ViTs that average their tokens in `fc_norm`. Its
        # scale and shift were trained with what came before, and it makes channels of any size one size.
        head = getattr(network, "head", None)
        norm = head.norm if isinstance(head, (ClNormMlpClassifierHead, NormMlpClassifierHead)) else None
        self.norm = norm or getattr(network, "fc_norm", None) or nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(grid) if grid else nn.Identity()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Args: pixels: (B, 3, size, size)."""
        if self.tokens:
            (features,) = self.network.forward_intermediates(
                pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
            )
            features = self.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # such a norm is for channels last
        else:
            features = self.norm(self.network.forward_features(pixels))
        grid: torch.Tensor = self.pool(features)
        return grid


def split(network: Any) -> list[nn.Module]:
    """Cut a CNN where timm's `feature_info` takes the features of each resolution, the last where the network pools.

    timm's `features_only` makes such a list too, but it leaves out what comes after the last of these places, such as
    EfficientNet's last convolution.
    """
    places = {info["module"] for info in network.feature_info}
    stages: list[list[nn.Module]] = [[]]
    for name, layer in itertools.takewhile(lambda child: child[0] not in HEADS, network.named_children()):
        for inner, part in layer.named_children() if isinstance(layer, nn.Sequential) else [("", layer)]:
            stages[-1].append(part)
            if f"{name}.{inner}" in places:
                stages.append([])
        if name in places:
            stages.append([])
    learning = [any(True for part in parts for _ in part.parameters()) for parts in stages[:-1]]
    last = len(stages) - 2 - learning[::-1].index(True)  # VGG's last pooling is no stage
    stages[last:] = [list(itertools.chain(*stages[last:]))]
    return [nn.Sequential(*parts) for parts in stages]


def earlier_grids(network: Any, pixels: torch.Tensor, last: torch.Size) -> tuple[tuple[int, int], ...]:
    """Return channels and side of each stage but the last, () where the layers do not follow each other."""
    try:
        grids = list(itertools.accumulate(split(network), lambda grid, stage: stage(grid), initial=pixels))
    except Exception:  # of any network that is not a sequence
        return ()
    return tuple((grid.shape[1], grid.shape[2]) for grid in grids[1:-1]) if grids[-1].shape == last else ()
