"""Self-critical sequence training (Rennie et al., 2017): sampled captions, rewarded by CIDEr-D."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from captioning import distributed
from captioning.config.settings import Settings
from captioning.data.batches import pack_captions
from captioning.data.dataset import EOS, SOS, CaptionSet, Vocabulary
from captioning.decoders.base import Decoder, DecoderOutput
from captioning.decoders.ensemble import Ensemble
from captioning.scoring.cider import CiderReward


class SelfCritic:
    """Samples several captions of each image; one that is better than the image's others becomes more probable.

    The baseline of a sample is the mean reward of the image's other samples (Luo, 2020), which needs no greedy
    pass. Document frequencies are those of the training captions, whatever is scored later.
    """

    def __init__(self, data: CaptionSet, vocabulary: Vocabulary, settings: Settings):
        """Args: settings: of which `scst_samples`, at least 2 for an image, and `max_length` count."""
        self.samples, self.max_length = settings.scst_samples, settings.max_length
        self.reward = CiderReward(data, data.splits["train"])
        self.word_of = self.reward.words_of(vocabulary)

    def loss(
        self, decoder: Decoder, features: torch.Tensor | None, images: np.ndarray, autocast: torch.autocast
    ) -> tuple[torch.Tensor, float]:
        """Sample, reward, and run the decoder over the samples.

        Args:
            features: (I, C) or (I, 49, C) of the images, whose positions in the data are `images` (I,); of several
                processes each gives its own, which may be none.
            autocast: around the pass with gradients.

        Returns:
            this process's part of the loss per token, whose gradient is that of minus the expected reward, and the mean
            CIDEr-D of the samples of all processes.
        """
        if features is None:
            _, reward, samples = distributed.total(0, 0, 0)
            return torch.zeros(()), reward / samples
        drawn = sample(decoder, features, self.samples, self.max_length)
        rewards = self.rewards(drawn.words, drawn.lengths, drawn.ended, images)  # (I, S)
        others = (rewards.sum(1, keepdims=True) - rewards) / (self.samples - 1)
        advantage = (rewards - others).reshape(-1)
        starts = np.arange(len(drawn.words)) * drawn.words.shape[1]
        owner = np.repeat(np.arange(len(images)), self.samples)
        batch, order = pack_captions(drawn.words.reshape(-1), starts, drawn.lengths, owner)
        row = batch.token_row.numpy()
        weights = advantage[order][row]
        weights[(batch.targets.numpy() == EOS) & ~drawn.ended[order][row]] = 0  # an <EOS> that was never sampled
        batch = batch.to(features.device)
        tokens, reward, samples = distributed.total(len(row), rewards.sum(), rewards.size)
        with autocast:
            output: DecoderOutput = decoder(features, batch)
            token_weights = torch.from_numpy(weights).float().to(features.device)
            loss = decoder.cross_entropy(output.hidden_out, batch.targets, 0.0, token_weights) / tokens
        return loss, reward / samples

    def rewards(self, words: np.ndarray, lengths: np.ndarray, ended: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return the CIDEr-D (I, S) of samples (I x S, T); one that never ends earns nothing."""
        is_word = np.arange(words.shape[1]) < lengths[:, None]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        scores = self.reward.score(self.word_of[words[is_word]], offsets, np.repeat(images, self.samples))
        return np.where(ended, scores, 0.0).reshape(len(images), self.samples)


class Samples(NamedTuple):
    """Captions drawn at random, the `count` of an image one after another."""

    words: np.ndarray  # int64 (I x count, T) ids, <EOS> from the end on
    lengths: np.ndarray  # int64 (I x count,) words before <EOS>
    ended: np.ndarray  # bool (I x count,) whether <EOS> was drawn


@torch.inference_mode()
def sample(decoder: Decoder, features: torch.Tensor, count: int, max_length: int) -> Samples:
    """Draw captions word by word from the decoder's own distribution, in eval mode, seeded by `torch.manual_seed`.

    Args:
        features: (I, C) or (I, 49, C).
    """
    training = decoder.training
    ensemble = Ensemble([(decoder, features)])
    device = features.device
    drawn = torch.full((len(features) * count, max_length), EOS, device=device)
    rows = torch.arange(len(drawn), device=device)  # which rows of `drawn` go on
    ensemble.select((rows // count).cpu().numpy())
    words = torch.full_like(rows, SOS)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for time in range(max_length):
        log_probabilities, _ = ensemble.advance(words)
        sums = log_probabilities.exp().cumsum(1)  # (rows, V)
        points = torch.rand(len(rows), 1, device=device) * sums[:, -1:]
        words = torch.searchsorted(sums, points, right=True).squeeze(1).clamp(max=sums.shape[1] - 1)
        words = torch.where(ended, EOS, words)
        ended = words == EOS
        drawn[rows, time] = words
        going = ~ended.view(-1, count).all(1)  # an image's rows lie together, so they leave together
        left = int(going.sum())
        if left == 0:
            break
        if left < 0.8 * len(going):
            kept = going.nonzero().squeeze(1)
            stay = (kept.unsqueeze(1) * count + torch.arange(count, device=device)).flatten()
            ensemble.select(stay.cpu().numpy(), kept.cpu().numpy())
            rows, words, ended = rows[stay], words[stay], ended[stay]
    decoder.train(training)
    result = drawn.cpu().numpy()
    lengths = (result != EOS).sum(1)
    return Samples(result, lengths, lengths < max_length)
