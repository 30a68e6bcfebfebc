"""The slow ways: what the project is measured against."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from captioning.batches import BatchMaker
from captioning.dataset import EOS, PAD, SOS
from captioning.decoders import Decoder
from captioning.encoders import Encoder


class Pictures(Dataset[torch.Tensor]):
    """Images opened and resized by Pillow, as tensors in 0..255, one after another."""

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.paths[number]) as image:
            pixels = np.array(image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float()


def naive_pass(encoder: Encoder, paths: Sequence[Path], batch_size: int, device: torch.device) -> float:
    """Seconds for these images of a DataLoader with a worker per core and an eager encoder in PyTorch's own layout.

    The clock starts at the second batch, when the workers are up and have filled their queues.
    """
    extra = [paths[n % len(paths)] for n in range(len(paths) + batch_size)]
    loader = DataLoader(Pictures(extra, encoder.spec.image_size), batch_size, num_workers=os.cpu_count() or 1)
    with torch.inference_mode():
        for number, pixels in enumerate(loader):
            if number == 0:
                start = time.perf_counter()
            else:
                encoder(pixels.to(device)).cpu()
    return time.perf_counter() - start


def padded(batches: BatchMaker, captions: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (R, length) of these captions, all padded to one length."""
    inputs = np.full((len(captions), length), PAD, dtype=np.int64)
    for row, caption in enumerate(captions):
        words = batches.lookup[batches.tokens[batches.starts[caption] :][: batches.lengths[caption]]]
        inputs[row, : len(words) + 1] = [SOS, *words]
    targets = np.concatenate([inputs[:, 1:], np.full((len(captions), 1), PAD)], 1)
    targets[np.arange(len(captions)), batches.lengths[captions]] = EOS
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def padded_loss(decoder: Decoder, features: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss per token of the same decoder, the original's way.

    Everything that belongs to an image (its projection, its keys) is computed for every caption, an LSTM cell
    is called for every layer of every step, all steps of the longest caption of the data set are run, and
    the vocabulary projection is within that loop.

    Args:
        features: (R, C) or (R, 49, C), one per caption.
        inputs, targets: (R, T), see `padded`.
    """
    state = decoder.begin(features)
    logits = []
    for words in inputs.unbind(1):
        state, output = decoder.step(state, words)
        logits.append(decoder.logits(output.hidden_out))
    return F.cross_entropy(torch.stack(logits, 1).flatten(0, 1), targets.flatten(), ignore_index=PAD)


def padded_step(
    decoder: Decoder, optimizer: torch.optim.Optimizer, features: torch.Tensor, inputs: torch.Tensor,
    targets: torch.Tensor,
) -> None:  # fmt: skip
    """A training step the original's way."""
    optimizer.zero_grad()
    padded_loss(decoder.train(), features, inputs, targets).backward()
    optimizer.step()
