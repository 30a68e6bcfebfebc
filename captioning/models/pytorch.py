"""A model of PyTorch, read from a checkpoint: encoder, decoder and vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioning.data.images import VIEW_SETS, ImageSource
from captioning.decoders.base import build_decoder
from captioning.decoders.ensemble import Ensemble
from captioning.distributed import pick_device
from captioning.encoders.base import encoder_of
from captioning.encoders.features import decoded, encoded_rows
from captioning.runs.checkpoints import load_decoder_weights


class PyTorchModel:
    """See `captioner.Model`."""

    out_of_memory = torch.OutOfMemoryError

    def __init__(self, checkpoint: Mapping[str, Any], path: Path, device: str, resnet_weights: str | None):
        """Build encoder and decoder.

        Args:
            checkpoint: what `load_checkpoint` read from `path`.
            device: `auto`, `cpu`, `cuda` or `mps`.
            resnet_weights: as `EncoderSpec.find_weights` takes it. A path in the checkpoint is not followed.

        Raises:
            UserError: no such device or weights, or weights that are not those of training.
        """
        flags = checkpoint["flags"]
        self.torch_device = pick_device(device)
        self.device, self.views = str(self.torch_device), VIEW_SETS[flags["views"]]
        self.spec = encoder_of(flags)
        weights, _ = self.spec.find_weights(resnet_weights, checkpoint["encoder"]["weights_hash"])
        self.encoder, self.expects_many, self.compiling = self.spec.build(weights), False, threading.Lock()
        self.encode = self.encoder.fast_form(self.torch_device, many=False)
        self.decoder = build_decoder(flags, len(checkpoint["vocabulary"]), self.spec)
        load_decoder_weights(self.decoder, checkpoint["decoder"], path)
        self.decoder.to(self.torch_device).eval()
        self.has_attention = self.decoder.has_attention

    def expect_many(self) -> None:
        """Take a second or two now, so that each image takes less time."""
        with self.compiling:
            if not self.expects_many:
                self.encode, self.expects_many = self.encoder.fast_form(self.torch_device), True

    def load_views(self, source: ImageSource) -> np.ndarray:
        """Return an image as uint8 (views, size, size, 3). Raises UnreadableImage."""
        return self.spec.load_views(source, self.views)

    def read(self, pixels: np.ndarray) -> Ensemble:
        """Read images, uint8 (I, views, size, size, 3)."""
        return Ensemble([(self.decoder, self.features(pixels[:, view])) for view in range(len(self.views))])

    def features(self, view: np.ndarray) -> torch.Tensor:
        """Encode one view of some images, uint8 (I, size, size, 3): (I, 49, C), or (I, C), rounded as a cache stores it."""
        rows = encoded_rows(self.encode(view), means=not self.decoder.uses_grid)
        return decoded(torch.from_numpy(rows)).to(self.torch_device)
