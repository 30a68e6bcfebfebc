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
    from captioning.data.dataset import CaptionSet as CaptionSet
    from captioning.data.dataset import Vocabulary as Vocabulary
    from captioning.data.dataset import load_caption_set as load_caption_set
    from captioning.data.images import UnreadableImage as UnreadableImage
    from captioning.decoders.base import build_decoder as build_decoder
    from captioning.decoders.ensemble import Ensemble as Ensemble
    from captioning.decoding.beam_search import beam_search as beam_search
    from captioning.decoding.beam_search import sample as sample
    from captioning.encoders.base import find_encoder as find_encoder
    from captioning.io import UserError as UserError

__version__ = "0.2.0"
_MODULE_OF = {
    **dict.fromkeys(("Caption", "Captioned", "Captioner", "Word"), "captioner"),
    **dict.fromkeys(("CaptionSet", "Vocabulary", "load_caption_set"), "data.dataset"),
    **dict.fromkeys(("beam_search", "sample"), "decoding.beam_search"),
    "Ensemble": "decoders.ensemble",
    "UnreadableImage": "data.images",
    "UserError": "io",
    "build_decoder": "decoders.base",
    "find_encoder": "encoders.base",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"captioning.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
