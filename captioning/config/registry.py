"""The encoders and decoders by name. To add one, write it in a module of any package and add a line here.

Nothing heavy is imported, so that the parser can take its choices from here before PyTorch is loaded. What an
encoder has to offer is in `captioning.encoders.base.EncoderSpec`, a decoder in `captioning.decoders.base.Decoder`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """Where an encoder or a decoder is defined."""

    target: str  # "module:ATTRIBUTE": an instance of EncoderSpec, or a subclass of Decoder
    flags: tuple[str, ...] = ()  # flags that only such entries read
    defaults: Mapping[str, Any] = {}  # of flags, where they differ from those of captioning/config/flags.py


NAMED = ("resnet_weights",)  # the user may name the file of the weights
ATTENDS = ("attention_reg", "save_attention_viz")  # of every decoder with attention
ENCODERS = {
    "resnet50": Entry("captioning.encoders.torchvision:RESNET50", NAMED),
    "resnet101": Entry("captioning.encoders.torchvision:RESNET101", NAMED),
    "resnet152": Entry("captioning.encoders.torchvision:RESNET152", NAMED),
    "convnext_base": Entry("captioning.encoders.torchvision:CONVNEXT_BASE", NAMED),
    "efficientnet_lite0": Entry("captioning.encoders.efficientnet_lite:EFFICIENTNET_LITE0"),
    "efficientnet_lite2": Entry("captioning.encoders.efficientnet_lite:EFFICIENTNET_LITE2"),
}
# Whole libraries of encoders, each a function of what follows the colon and of --grid: `--encoder timm:resnet18.a1_in1k`.
LIBRARIES = {"timm:NAME": Entry("captioning.encoders.timm:find_timm", (*NAMED, "grid"))}
LIBRARY_NAME = re.compile(
    r"timm:(hf-hub:[\w.-]+/[\w.-]+(@[\w.-]+)?|local-dir:[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+|[\w.-]+)"
)
DECODERS = {
    "lstm": Entry("captioning.decoders.lstm:LSTMDecoder", ("num_layers",)),
    "attention": Entry("captioning.decoders.lstm:AttentionDecoder", ("num_layers", "attention_dim", *ATTENDS)),
    "show_attend_tell": Entry(
        "captioning.decoders.show_attend_tell:ShowAttendTellDecoder",
        ("attention_dim", *ATTENDS),
        {"attention_reg": 1.0},
    ),
    "transformer": Entry("captioning.decoders.transformer:TransformerDecoder", ("num_layers", "num_heads", *ATTENDS)),
}

# The largest values that the parser and the reader of checkpoints take: what needs more memory or time than any
# machine has, or overflows, is refused before anything is built.
LIMITS = {
    "max_length": 1000,
    "embed_size": 16384,
    "hidden_size": 16384,
    "attention_dim": 16384,
    "grid": 64,
    "num_layers": 32,
    "fine_tune": 8,
    "num_heads": 128,
    "beam_size": 1000,
    "batch_size": 1_000_000,
    "epochs": 100_000,
    "freq_threshold": 1_000_000,
    "length_penalty": 100,  # max_length to this power is still a float
    "seed": 2**63 - 1,
}


def load(entry: Entry) -> Any:
    """Import what an entry names."""
    module, _, attribute = entry.target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def is_encoder(name: str) -> bool:
    """Return whether an encoder may have this name; whether its library knows it, only the library says."""
    return name in ENCODERS or LIBRARY_NAME.fullmatch(name) is not None


def library_of(name: str) -> str:
    """Return the key of `LIBRARIES` that an encoder's name belongs to, else the name itself."""
    return f"{name.partition(':')[0]}:NAME" if ":" in name else name


def without_path(encoder: str) -> str:
    """Return an encoder's name without the path of the folder that it lies in."""
    return re.sub(r"(?<=^timm:local-dir:).*?([^/\\]*)[/\\]*$", r"\1", encoder)


def folder_name(encoder: str) -> str:
    """Return an encoder's name as a part of directory names, whatever characters it has."""
    return re.sub(r"[^\w.-]+", "-", without_path(encoder))[:100]


def idle_flags(entries: Mapping[str, Entry], name: str) -> set[str]:
    """Return the flags that other entries read and the one of this name does not."""
    return {flag for entry in entries.values() for flag in entry.flags}.difference(entries[library_of(name)].flags)


def size_problem(flags: Mapping[str, Any]) -> str | None:
    """Say why no decoder can be built in the sizes of these flags; None where it can."""
    size, heads = flags["embed_size"], flags["num_heads"]
    if "num_heads" in DECODERS[flags["decoder"]].flags and size % heads:
        return f"--embed_size {size} cannot be divided among --num_heads {heads}: give a multiple"
    return None
