"""The form in which features are kept: means in float16, regions as eight-bit codes.

Each region of each image and view has its own range: a code c stands for `lowest + c * step`, where step is a 255th of
the region's range. Both are float16 and follow the region's codes.
"""

from __future__ import annotations

import numpy as np
import torch

SCALE_BYTES = 4  # of a region: lowest and step


def stored_form(grids: torch.Tensor, means: bool) -> np.ndarray:
    """Return the rows that the cache stores of an encoder's grids, float (n, 49, C): their means or their codes."""
    rounded = grids.to(torch.float16).cpu().numpy()
    return rounded.astype(np.float32).mean(1).astype(np.float16) if means else quantize(rounded)


def decoded(rows: torch.Tensor) -> torch.Tensor:
    """Return the features in rows as `stored_form` made them, as floats on the same device."""
    return dequantize(rows) if rows.dtype == torch.uint8 else rows.float()


def quantize(grids: np.ndarray) -> np.ndarray:
    """Return the codes of regions, each followed by its scale: (n, 49, C) of any float -> uint8 (n, 49, C + 4)."""
    values = grids.astype(np.float32)
    lowest = values.min(-1, keepdims=True).astype(np.float16)
    step = ((values.max(-1, keepdims=True) - lowest) / 255).astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore"):  # a region that is the same everywhere has no step
        codes = np.nan_to_num((values - lowest) / step.astype(np.float32), posinf=0, neginf=0)
    scale = np.concatenate([lowest, step], -1).view(np.uint8)
    return np.concatenate([codes.round().clip(0, 255).astype(np.uint8), scale], -1)


def dequantize(rows: torch.Tensor) -> torch.Tensor:
    """Return the regions that `quantize` coded: uint8 (n, 49, C + 4) -> float (n, 49, C), on the same device."""
    stored = rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
    scale = stored.view(torch.float16).float()  # (n, 49, 2)
    return rows[..., :-SCALE_BYTES].float().mul_(scale[..., 1:]).add_(scale[..., :1])
