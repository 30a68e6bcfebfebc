"""Decoders of PyTorch as `decoding.beam_search.Reading` takes a model: NumPy outside, tensors on the device inside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from captioning.data.dataset import PAD, SOS, UNK
from captioning.decoders.base import Decoder, DecoderState
from captioning.decoding.beam_search import Banned, NextWords

Member = tuple[Decoder, torch.Tensor]  # a decoder and its features of the images: (I, C) or (I, 49, C)


@torch.inference_mode()
def pool(views: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the mean (I, C) over regions and views of what a decoder reads, (I, 49, C) or (I, C) in each view."""
    return torch.stack([each.mean(1) if each.dim() == 3 else each for each in views]).mean(0).float().cpu().numpy()


class Ensemble:
    """Members that read the same words and average their probabilities of the next one.

    Members that share a decoder, such as the views of an image, run as one batch: the images of the first view, then
    those of the second, and so on. Of a step only the likeliest words leave the device.
    """

    @torch.inference_mode()
    def __init__(self, members: Sequence[Member]):
        """Read the images, of which each has one row at first. Puts the decoders in eval mode."""
        features_of: dict[Decoder, list[torch.Tensor]] = {}
        for member, frozen in members:
            decoder, features = member.eval().after_stages(frozen)
            features_of.setdefault(decoder, []).append(features)
        self.decoders, self.features = list(features_of), list(features_of.values())
        self.views = [len(views) for views in self.features]
        self.states: list[DecoderState] = [decoder.begin(torch.cat(views)) for decoder, views in features_of.items()]
        self.images = self.rows = len(members[0][1])
        self.vocabulary_size = members[0][0].vocabulary_size
        self.has_attention, self.device = members[0][0].has_attention, members[0][1].device

    @property
    def pooled(self) -> list[np.ndarray]:
        """See `Reading.pooled`."""
        return list(map(pool, self.features))

    def advance(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read one word in every row.

        Args:
            ids: int64 (rows,) the last word of each, `<SOS>` at first.

        Returns:
            log-probabilities (rows, V) of the next word, with `<PAD>`, `<SOS>` and `<UNK>` at minus infinity, and the
            first member's alphas (rows, 49), None without attention.
        """
        logits, alphas = [], []
        for number, (decoder, views) in enumerate(zip(self.decoders, self.views, strict=True)):
            self.states[number], output = decoder.step(self.states[number], ids.repeat(views))
            logits.append(decoder.logits(output.hidden_out).float().unflatten(0, (views, self.rows)))
            alphas.append(output.alphas)
        members = sum(self.views)
        if members == 1:
            log_probabilities = logits[0][0].log_softmax(-1)
        else:
            probabilities = torch.stack([each.softmax(-1).sum(0) for each in logits]).sum(0)
            log_probabilities = probabilities.div_(members).log_()
        log_probabilities[:, [PAD, SOS, UNK]] = -math.inf
        return log_probabilities, None if alphas[0] is None else alphas[0][: self.rows]

    @torch.inference_mode()
    def step(self, ids: np.ndarray, most: int, banned: Banned | None = None) -> NextWords:
        """See `Reading.step`."""
        best, words, alphas = self.choose(torch.from_numpy(ids).to(self.device), most, banned)
        maps = None if alphas is None else alphas.float().cpu().numpy()
        return NextWords(words.cpu().numpy(), best.cpu().numpy(), maps)

    def choose(
        self, ids: torch.Tensor, most: int, banned: Banned | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Do what `step` does, on the device."""
        log_probabilities, alphas = self.advance(ids)
        if banned is not None:
            rows, words = (torch.from_numpy(each).to(self.device) for each in banned)
            log_probabilities[rows, words] = -math.inf
        return *log_probabilities.topk(most), alphas

    @torch.inference_mode()
    def select(self, rows: np.ndarray, images: np.ndarray | None = None) -> None:
        """See `Reading.select`."""
        for number, views in enumerate(self.views):
            state = self.states[number].select_rows(self.in_every_view(rows, views, self.rows))
            if images is not None:
                state = state.select_images(self.in_every_view(images, views, self.images))
            self.states[number] = state
        self.rows, self.images = len(rows), self.images if images is None else len(images)

    def in_every_view(self, places: np.ndarray, views: int, size: int) -> torch.Tensor:
        """Return these places of the first view, and the same of every other. Args: size: places of a view."""
        return torch.from_numpy((places + size * np.arange(views)[:, None]).ravel()).to(self.device)
