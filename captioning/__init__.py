"""Caption images with a trained model, or build an image captioner from its parts.

    from captioning import Captioner

    captioner = Captioner.load("saved_models/flickr8k")
    print(captioner("dog.jpg").text)

A name is imported when it is first used (PEP 562), so that the package and its small modules load no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors know of the names below
    from captioning.captioner import Caption as Caption
    from captioning.captioner import Captioned as Captioned
    from captioning.captioner import Captioner as Captioner
    from captioning.captioner import Word as Word
    from captioning.dataset import CaptionSet as CaptionSet
    from captioning.dataset import Vocabulary as Vocabulary
    from captioning.dataset import load_caption_set as load_caption_set
    from captioning.decoders import build_decoder as build_decoder
    from captioning.decoding import beam_search as beam_search
    from captioning.decoding import sample as sample
    from captioning.encoders import find_encoder as find_encoder
    from captioning.images import UnreadableImage as UnreadableImage
    from captioning.io import UserError as UserError

__version__ = "0.2.0"
_MODULE_OF = {
    "Caption": "captioner", "Captioned": "captioner", "Captioner": "captioner", "CaptionSet": "dataset",
    "UnreadableImage": "images", "UserError": "io", "Vocabulary": "dataset", "Word": "captioner",
    "beam_search": "decoding", "build_decoder": "decoders", "find_encoder": "encoders", "load_caption_set": "dataset",
    "sample": "decoding",
}  # fmt: skip
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"captioning.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
