"""What a decoder is: what training, decoding and export ask of it.

To add a decoder, subclass `Decoder` and name the class in `registry.DECODERS`. Nobody asks a decoder for anything
else than `Decoder` and `DecoderState` declare. In shapes, I is the number of images of a batch, N the number of tokens,
V the number of words, E `--embed_size`, H `--hidden_size`, L `--num_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import nn

from captioning.config import registry
from captioning.data.batches import Batch
from captioning.decoders.kernels import ProjectedCrossEntropy
from captioning.encoders.base import EncoderSpec, TrainableStages


class DecoderOutput(NamedTuple):
    """What a decoder gives for each token."""

    hidden_out: torch.Tensor  # (N, E); `logits` or `cross_entropy` project it to the vocabulary
    alphas: torch.Tensor | None  # (N, 49) attention weights that sum to one, None without attention


class DecoderState(Protocol):
    """What decoding carries from word to word: a NamedTuple of tensors, None where there is none.

    A row is a caption in progress. `Decoder.begin` gives one row per image; the rows of an image stay next to each
    other, and every image has equally many. A tensor is either of rows or of images. What the rows of an
    image share (its regions, say) should be of images, so that a beam does not repeat it. An axis may be as long as
    there are words so far: `step` then adds one, and export finds it by that.
    """

    def select_rows(self, rows: torch.Tensor) -> Self:
        """Return the state of these rows, int64 (n,), some of which may be repeated or left out; images stay."""

    def select_images(self, images: torch.Tensor) -> Self:
        """Return the state without what belongs to other images than these, int64 (n,); rows stay."""

    def _asdict(self) -> dict[str, Any]: ...


class Decoder(nn.Module):
    """The interface of every decoder: a subclass writes the methods that raise NotImplementedError here.

    Its state dict has float32 tensors only. One with an entry for each word has words on its first axis, where
    `--init_from` adds new ones.

    The output layer is tied to the word embeddings (Press and Wolf, 2017): a subclass makes `embed` and `output_bias`,
    or overrides `output_vectors`, or `set_word_frequencies`, `logits` and `cross_entropy`.
    """

    uses_grid: ClassVar[bool] = False  # whether it takes the regions (I, 49, C) rather than their mean (I, C)
    has_attention: ClassVar[bool] = False  # whether its outputs have alphas
    description: ClassVar[str] = "a decoder"  # for the model card: "a decoder that ..."
    embed: nn.Embedding  # (V, E)
    output_bias: nn.Parameter  # (V,)

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], vocabulary_size: int, spec: EncoderSpec) -> Self:
        """Build the decoder for V words and this encoder. Also called on the meta device, to learn its shapes.

        Args: flags: by name; those that only this decoder reads are in its registry entry.
        """
        raise NotImplementedError

    def begin(self, features: torch.Tensor) -> DecoderState:
        """Read the images. Args: features: (I, C) or (I, 49, C). Returns the state of I rows."""
        raise NotImplementedError

    def step(self, state: Any, words: torch.Tensor) -> tuple[DecoderState, DecoderOutput]:
        """Read one word in every row. Args: words: int64 (rows,) the last word of each, `<SOS>` at first."""
        raise NotImplementedError

    def forward(self, features: torch.Tensor, batch: Batch) -> DecoderOutput:
        """Run over a batch of whole images with teacher forcing: the same function as `begin` and `step`.

        Args:
            features: (I, C) or (I, 49, C), one per image, not per caption.

        Returns:
            the output of every token, in the batch's packed order.
        """
        raise NotImplementedError

    def after_stages(self, features: torch.Tensor) -> tuple[Decoder, torch.Tensor]:
        """Return the decoder that comes after trained stages, and the features that these make of the frozen ones'."""
        return self, features

    @property
    def vocabulary_size(self) -> int:
        return len(self.output_bias)

    def set_word_frequencies(self, counts: torch.Tensor) -> None:
        """Start the output bias at the log frequency of each word, which saves the first hundred steps.

        Args: counts: (V,) occurrences in the training captions.
        """
        with torch.no_grad():
            self.output_bias.copy_(torch.log((counts.float() + 1) / (counts.sum() + len(counts))))

    def output_vectors(self) -> torch.Tensor:
        """Return the weights (V, E) of the output layer."""
        return self.embed.weight

    def logits(self, hidden_out: torch.Tensor) -> torch.Tensor:
        """(N, E) -> (N, V)."""
        return F.linear(hidden_out, self.output_vectors(), self.output_bias)

    def cross_entropy(
        self,
        hidden_out: torch.Tensor,
        targets: torch.Tensor,
        label_smoothing: float = 0.0,
        token_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of `logits(hidden_out)` against `targets` (N,), summed over tokens: see `ProjectedCrossEntropy`."""
        loss: torch.Tensor = ProjectedCrossEntropy.apply(
            hidden_out, self.output_vectors(), self.output_bias, targets, token_weights, label_smoothing
        )
        return loss


def find_decoder(name: str) -> type[Decoder]:
    """Return the decoder class of this name in the registry."""
    kind: type[Decoder] = registry.load(registry.DECODERS[name])
    return kind


class FineTuned(Decoder):
    """A decoder with the last stages of the encoder before it, which are trained with it (`--fine_tune`)."""

    uses_grid = True  # the larger grid of the frozen stages

    def __init__(self, decoder: Decoder, stages: nn.Module):
        super().__init__()
        self.decoder, self.stages = decoder, stages
        self.has_attention = decoder.has_attention  # type: ignore[misc]

    def features(self, regions: torch.Tensor) -> torch.Tensor:
        """(I, 196, C) of the frozen stages -> what the decoder reads, (I, 49, C) or (I, C)."""
        grid = self.stages(regions)
        return grid if self.decoder.uses_grid else grid.mean(1)

    def after_stages(self, features: torch.Tensor) -> tuple[Decoder, torch.Tensor]:
        return self.decoder, self.features(features)

    def begin(self, features: torch.Tensor) -> DecoderState:
        return self.decoder.begin(self.features(features))

    def step(self, state: Any, words: torch.Tensor) -> tuple[DecoderState, DecoderOutput]:
        return self.decoder.step(state, words)

    def forward(self, features: torch.Tensor, batch: Batch) -> DecoderOutput:
        output: DecoderOutput = self.decoder(self.features(features), batch)
        return output

    @property
    def vocabulary_size(self) -> int:
        return self.decoder.vocabulary_size

    def set_word_frequencies(self, counts: torch.Tensor) -> None:
        self.decoder.set_word_frequencies(counts)

    def logits(self, hidden_out: torch.Tensor) -> torch.Tensor:
        return self.decoder.logits(hidden_out)

    def cross_entropy(self, *arguments: Any, **named: Any) -> torch.Tensor:
        return self.decoder.cross_entropy(*arguments, **named)


def group_sizes(decoder: Decoder) -> list[int]:
    """Return how many of a decoder's parameters, in their order, are its own, and how many those of trained stages."""
    stages = len(list(decoder.stages.parameters())) if isinstance(decoder, FineTuned) else 0
    return [len(list(decoder.parameters())) - stages, *([stages] if stages else [])]


def build_decoder(
    flags: Mapping[str, Any], vocabulary_size: int, spec: EncoderSpec, weights: Path | None = None
) -> Decoder:
    """Build the decoder that these flags describe, for so many words and this encoder.

    Args:
        weights: the file of the encoder's weights, from which stages that are trained start; None for random ones.
    """
    decoder = find_decoder(flags["decoder"]).from_flags(flags, vocabulary_size, spec.whole or spec)
    return FineTuned(decoder, TrainableStages(spec, weights)) if spec.trainable_stages else decoder


def count_parameters(decoder: nn.Module) -> int:
    return sum(parameter.numel() for parameter in decoder.parameters())
