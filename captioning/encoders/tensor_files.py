"""Read files of PyTorch: checkpoints and encoder weights."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch


def read_tensors(path: Path) -> Any:
    """Read what `torch.save` wrote, in either of PyTorch's two forms, onto the CPU. Nothing in it is executed.

    Raises:
        Exception: of many kinds, all of which mean that the file is damaged or not PyTorch's.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # PyTorch writes checksums and does not compare them
                raise zipfile.BadZipFile(f"its record {damaged} is damaged (checksum differs)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # over pickles that PyTorch did not write, which it then refuses
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose message says how to execute the file all the same
            raise ValueError("it holds something else than tensors and plain values") from error
