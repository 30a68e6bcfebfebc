"""Any model of the package timm as an encoder: `--encoder timm:NAME` (requirements-timm.txt).

    timm:resnet18.a1_in1k         a name of timm's, whose weights are on the Hugging Face hub
    timm:hf-hub:OWNER/NAME        a model on the hub with a config.json of timm's, also OWNER/NAME@REVISION
    timm:local-dir:FOLDER         a folder that `timm.models.save_for_hf` wrote, or a copy of one from the hub

The regions are what the model's own pooling sees. timm builds and fills the networks; which file the weights are in,
its hash and whether it is safe to read are decided here. Nothing that a config.json says names a file or an address.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from captioning.encoders import RANDOM, RANDOM_HASH, WEIGHTS_PLACES, EncoderSpec
from captioning.io import UserError, first_line, install_command, log, read_json, sha256
from captioning.tensor_files import read_tensors

CONFIG = "config.json"
LARGEST_CONFIG = 4_000_000  # bytes; the names of ImageNet-22k's classes have 1.5 million
LARGEST_IMAGE = 2048  # pixels along a side
# In the order in which timm prefers them.
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")  # of weights


# By the encoder's name: what `find_cuts` found on a real network, for one on the meta device (`earlier_stages` comes first).
CUTS: dict[str, list[int]] = {}


class Model(NamedTuple):
    """What timm builds, and where its weights may be."""

    architecture: str  # with its tag, where timm knows one
    config: dict[str, Any] | None  # timm's pretrained_cfg, None for the one that timm has of this name
    arguments: dict[str, Any]  # of the network, beside its name
    repository: str | None = None  # on the hub, perhaps with @REVISION
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TimmSpec(EncoderSpec):
    """A model of timm's."""

    model: Model
    tokens: bool  # see `Grid`
    pooled: bool  # from a finer grid of its own
    parameters: int
    remedy: ClassVar[str] = "name the right file with --resnet_weights"

    @property
    def transform(self) -> str:
        """With a digest of all that changes features beside the weights: configs change while names stay."""
        facts = [self.model.architecture.split(".")[0], self.model.arguments, self.mean, self.std]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        return f"{super().transform}-{f'grid{self.grid}-' if self.pooled else ''}{digest}"

    def locate_weights(self, named: str | None, expected: str | None) -> tuple[Path | None, str]:
        """See `EncoderSpec.locate_weights`; they are downloaded where the hub's cache on this machine lacks them."""
        if named == RANDOM or (not named and expected == RANDOM_HASH):
            return None, RANDOM_HASH
        path = Path(named) if named else self.usual_file()
        path = weights_in(path) if path and path.is_dir() else path
        if path is None or not path.is_file():
            raise UserError(
                f"{named} is not there: name a file of {self.name}'s weights with --resnet_weights"
                if named
                else f"timm knows no weights of {self.name}: name their file with --resnet_weights, or choose another model"
            )
        return path, sha256(path)[:16]

    def usual_file(self, download: bool = True) -> Path | None:
        """Return the file of the weights, None where there is none."""
        if self.model.folder is not None:
            return weights_in(self.model.folder)
        return hub_file(self.model.repository, WEIGHTS_FILES, download) if self.model.repository else None

    def earlier_stages(self) -> tuple[tuple[int, int], ...]:
        """See `EncoderSpec.earlier_stages`."""
        return stage_grids(self.name.partition(":")[2], self.grid if self.pooled else None)

    def load_stages(self, weights: Path | None) -> Sequence[nn.Module]:
        """See `EncoderSpec.load_stages`: a CNN has as many as resolutions, everything else one."""
        model, config, arguments, _, _ = self.model
        if weights is not None and weights.stat().st_size < self.parameters:  # which no type of numbers makes so small
            raise UserError(f"{weights} is too small for the {self.parameters:,} weights of {self.name}")
        with torch.random.fork_rng(devices=[]):  # as in TorchvisionSpec
            torch.manual_seed(0)
            try:
                if weights is not None and weights.suffix != ".safetensors":
                    read_tensors(weights)  # refuses what timm would not
                filled: dict[str, Any] = {} if weights is None else {"pretrained_cfg_overlay": {"file": str(weights)}}
                network = build(model, config, arguments, pretrained=weights is not None, **filled)
            except Exception as error:  # of safetensors, pickle, torch and timm
                what = f"{weights} cannot be read as weights of" if weights else "timm cannot build"
                raise UserError(f"{what} {self.name}: {first_line(error)}") from error
            pixels = torch.randn(1, 3, self.image_size, self.image_size)
        if not self.tokens and not next(network.parameters()).is_meta:
            CUTS[self.name] = find_cuts(network, pixels)
        parts, cuts = parts_of(network), [] if self.tokens else CUTS[self.name]
        stages: list[nn.Module] = [nn.Sequential(*parts[first:last]) for first, last in itertools.pairwise(cuts)]
        stages = stages or [Grid(network, self.tokens)]
        pooling = [nn.AdaptiveAvgPool2d((self.uncut or self).grid)] if self.pooled else []
        stages[-1] = nn.Sequential(stages[-1], *norm_after_pooling(network), *pooling)
        return stages


@functools.cache
def stage_grids(name: str, grid: int | None) -> tuple[tuple[int, int], ...]:
    """Return channels and side of each stage of a model of timm's but the last, by a blank image."""
    spec, found = find_timm(name, grid), []
    features = torch.zeros(1, 3, spec.image_size, spec.image_size)
    with torch.no_grad():
        for stage in spec.load_stages(None)[:-1]:
            features = stage(features)
            found.append((features.shape[1], features.shape[2]))
    return tuple(found)


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
    model = find_model(name)
    try:
        with torch.device("meta"), torch.no_grad():
            network = build(model.architecture, model.config, model.arguments)
            data = timm.data.resolve_data_config(model=network)
            depth, side, width = (int(number) for number in data["input_size"])
            if depth != 3 or side != width or not 0 < side <= LARGEST_IMAGE:
                raise ValueError(f"it takes images of {depth} x {side} x {width}, not square ones of three colours")
            blank = torch.zeros(1, 3, side, side)
            features = network.forward_features(blank)
            if not isinstance(features, torch.Tensor):
                raise ValueError("its features are several grids or none")
            tokens = not is_grid(features)
            shape = tuple(Grid(network, tokens)(blank).shape)
        mean, std = (tuple(255 * float(value) for value in data[part]) for part in ("mean", "std"))
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(f"its features are {shape}, not a square grid")
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError("its mean and std are not three finite numbers each")
    except Exception as error:  # of any of timm's models
        raise UserError(
            f"timm:{name} cannot be an encoder ({first_line(error)}): take a CNN, a ViT or a Swin with square images; "
            "--encoder list PATTERN shows them with their grids"
        ) from error
    if grid and grid > shape[2]:
        raise UserError(f"--grid {grid} is finer than the {shape[2]} x {shape[2]} regions of timm:{name}: give fewer")
    licence = str(network.pretrained_cfg.get("license") or "")
    stated = f"under {licence!r}" if re.fullmatch(r"[\w .,+/()-]{1,60}", licence) else "under no licence that it states"
    return TimmSpec(
        f"timm:{name}", shape[1], mean, std, side, grid or shape[2],
        interpolation=data["interpolation"] if data["interpolation"] in ("bilinear", "lanczos", "nearest") else "bicubic",
        terms=f"timm's {model.architecture}, {stated} by its config, which nobody checked",
        model=model, tokens=tokens, pooled=bool(grid and grid < shape[2]),
        parameters=sum(value.numel() for value in network.parameters()),
    )  # fmt: skip


def import_timm() -> Any:
    """Raises UserError: it is not installed."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"timm is not installed: {install_command('timm')}, or use an encoder without timm:") from error
    return timm


# --------------------------------------------------------------------------------------------------
# Names


def find_model(name: str) -> Model:
    """Find what a name stands for; of a model on the hub its config.json is downloaded if it is not here."""
    timm = import_timm()
    source, _, rest = name.partition(":")
    if not rest:
        known = set(timm.list_models()) | set(timm.list_models(pretrained=True))
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean timm:{close[0]}? " if close else ""
            raise UserError(f"timm has no model {name}: {hint}--encoder list PATTERN names those that match")
        config = timm.models.get_pretrained_cfg(name)
        return Model(name, None, {}, config.hf_hub_id if config else None)
    if source == "hf-hub":
        path = hub_file(rest, (CONFIG,))
        assert path is not None
        return Model(*read_config(path), repository=rest)
    path = Path(rest).expanduser()
    places = [path, *(place / path.name for place in WEIGHTS_PLACES)]
    folder = next((place for place in places if (place / CONFIG).is_file()), None)
    if folder is None:
        raise UserError(
            f"no {CONFIG} in {path}: timm:local-dir: takes a folder with it and the weights, which may also lie in "
            f"{WEIGHTS_PLACES[0]}/"
        )
    return Model(*read_config(folder / CONFIG), folder=folder)


def read_config(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read a config.json of timm's; it comes from anybody.

    Returns:
        the architecture, timm's pretrained_cfg without anything that names a file or an address, and the arguments.

    Raises:
        UserError: not one of timm's.
    """
    from timm.models import is_model
    from timm.models._hub import _parse_model_cfg

    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG} bytes")
        config, architecture, arguments = _parse_model_cfg(read_json(path), {})
        if not is_model(architecture):
            raise ValueError(f"timm has no architecture {architecture!r}")
        reserved = {*inspect.signature(build).parameters, *build_options(), "features_only"} & set(arguments)
        if reserved:
            raise ValueError(f"its model_args have {min(reserved)}, which is not the network's")
        config = {name: value for name, value in config.items() if name not in SOURCES}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise UserError(f"{path} is not a config of timm's: {first_line(error)}") from error
    return architecture, config, dict(arguments)


def build_options() -> set[str]:
    """Return the options of `timm.create_model` itself, none of which describes a network."""
    return set(inspect.signature(import_timm().create_model).parameters) - {"kwargs"}


def build(architecture: str, config: dict[str, Any] | None, arguments: dict[str, Any], **options: Any) -> Any:
    """Have timm build a network in eval mode."""
    return import_timm().create_model(architecture, pretrained_cfg=config, **options, **arguments).eval()


def weights_in(folder: Path) -> Path | None:
    """Return the file of the weights in a folder."""
    named = [folder / file for file in WEIGHTS_FILES]
    return next((path for path in [*named, *sorted(folder.glob("*.safetensors"))] if path.is_file()), None)


def hub_file(repository: str, files: Sequence[str], download: bool = True) -> Path | None:
    """Return the first of these files that a model on the hub has: from the cache on this machine, else downloaded.

    Raises:
        UserError: it cannot be downloaded, or has none of them.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    name, _, revision = repository.partition("@")
    for file in files:
        if isinstance(found := try_to_load_from_cache(name, file, revision=revision or None), str):
            return Path(found)
    if not download:
        return None
    log.info(f"Downloading {files[0]} of {repository} from the Hugging Face hub ...")
    for file in files:
        try:
            return Path(hf_hub_download(name, file, revision=revision or None))
        except RemoteEntryNotFoundError:
            continue
        except Exception as error:  # of the network, the hub and the disk
            raise UserError(
                f"{repository} could not be downloaded from the Hugging Face hub ({first_line(error)}). Ways out: "
                f"{'name its weights with --resnet_weights FILE; ' if files is WEIGHTS_FILES else ''}copy the hub's cache "
                "(HF_HOME) of a machine that has it; copy the model's folder here and use --encoder timm:local-dir:FOLDER; "
                "or use --encoder efficientnet_lite0, whose weights are installed already"
            ) from error
    raise UserError(f"{repository} has no {' or '.join(files)} on the Hugging Face hub: choose another model")


# --------------------------------------------------------------------------------------------------
# Grids


class Grid(nn.Module):
    """A whole model as one stage: its features (B, C, g, g) before its own pooling."""

    def __init__(self, model: Any, tokens: bool):
        """Args: tokens: whether `forward_features` gives a sequence of tokens, or channels last."""
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Args: pixels: (B, 3, size, size)."""
        if not self.tokens:
            features: torch.Tensor = self.model.forward_features(pixels)
            return features
        (features,) = self.model.forward_intermediates(
            pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return features


class OverChannels(nn.Module):
    """A layer for channels last, applied to (B, C, g, g)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.layer(grid.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


def is_grid(features: torch.Tensor) -> bool:
    """Whether these are (B, C, g, g); channels last are (B, g, g, C)."""
    return features.dim() == 4 and features.shape[2] == features.shape[3]


def norm_after_pooling(model: Any) -> list[nn.Module]:
    """Return the norm that the model applies to its pooled features, as one of each cell, or none.

    ConvNeXt and others have it in their head, ViTs that average their tokens as `fc_norm` (and then no other at their
    end). Its scale and shift were trained with what came before, and it makes channels of any size one size.
    """
    from timm.layers import ClNormMlpClassifierHead, NormMlpClassifierHead

    head, norm = getattr(model, "head", None), getattr(model, "fc_norm", None)
    if isinstance(head, NormMlpClassifierHead):
        return [head.norm]
    if isinstance(head, ClNormMlpClassifierHead):
        norm = head.norm
    return [] if norm is None or isinstance(norm, nn.Identity) else [OverChannels(norm)]


def parts_of(model: Any) -> list[nn.Module]:
    """Return a model's children in their order, and in the place of a sequence what it consists of."""
    children = (list(child) if isinstance(child, nn.Sequential) else [child] for child in model.children())
    return list(itertools.chain.from_iterable(children))


@torch.no_grad()
def find_cuts(model: Any, pixels: torch.Tensor) -> list[int]:
    """Find where a CNN's resolution falls.

    A model's children in their order are its stages if they give, to the bit, what `forward_features` gives.

    Args:
        pixels: (1, 3, size, size), on which that is tried.

    Returns:
        the first of `parts_of(model)` in each stage, and the end of the last; none where they do not follow each other.
        The last stage has weights: VGG's last pooling is no stage.
    """
    target, grid, parts = model.forward_features(pixels), pixels, parts_of(model)
    sides = [0]
    whole = 0  # parts up to the last place where everything is there: untrained blocks may change nothing
    for number, part in enumerate(parts, 1):
        try:
            grid = part(grid)
        except Exception:  # the head's, on something that is no grid any more
            break
        if not isinstance(grid, torch.Tensor) or not is_grid(grid):
            break
        sides.append(grid.shape[2])
        if torch.equal(grid, target):
            whole = number
    learning = max((n for n in range(whole) if any(True for _ in parts[n].parameters())), default=0)
    return [0, *(n for n in range(1, learning + 1) if sides[n + 1] < sides[n]), whole] if whole else []
