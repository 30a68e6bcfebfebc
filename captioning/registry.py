"""The encoders and decoders by name. Importing this imports no PyTorch."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One encoder or decoder."""

    target: str  # 'module:ATTRIBUTE', imported when it is asked for
    flags: tuple[str, ...] = ()  # flags that only such entries read


STAGES = "_stages"  # ends the names of encoders that give what every stage sees
ENCODERS: dict[str, Entry] = {
    name + form: Entry("captioning.encoders:ENCODERS", () if name.startswith("efficientnet") else ("resnet_weights",))
    for form in ("", STAGES)
    for name in ("resnet50", "resnet101", "resnet152", "convnext_base", "efficientnet_lite0", "efficientnet_lite2")
}
DECODERS: dict[str, Entry] = {
    "lstm": Entry("captioning.decoders:LSTMDecoder"),
    "attention": Entry(
        "captioning.decoders:AttentionDecoder", ("attention_dim", "attention_reg", "save_attention_viz")
    ),
}


def load(entry: Entry) -> Any:
    module, _, name = entry.target.partition(":")
    return getattr(importlib.import_module(module), name)
