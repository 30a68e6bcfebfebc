"""Caption images with a trained model, or build an image captioner from its parts.

    from pathlib import Path
    from captioning import Captioner

    captioner = Captioner(Path("saved_models/flickr8k"))
    for image in captioner.caption([Path("dog.jpg")], beam_size=3, length_penalty=0.7):
        print(image.path, image.captions[0].text)

A name is imported when it is first used (PEP 562), so that the package and its small modules load no PyTorch.
"""

import importlib
from typing import Any

__version__ = "0.2.0"
_MODULE_OF = {
    "Caption": "captioner", "Captioned": "captioner", "Captioner": "captioner", "CaptionSet": "dataset",
    "UserError": "io", "Vocabulary": "dataset", "beam_search": "decoding", "build_decoder": "decoders",
    "find_encoder": "encoders", "load_caption_set": "dataset", "sample": "decoding",
}  # fmt: skip
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"captioning.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
