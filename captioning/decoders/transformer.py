"""A transformer decoder (Vaswani et al., 2017) over the regions, pre-norm, with learned positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from captioning.data.batches import Batch
from captioning.data.dataset import PAD
from captioning.decoders.base import Decoder, DecoderOutput
from captioning.decoders.kernels import Dropout

if TYPE_CHECKING:
    from captioning.encoders.base import EncoderSpec


class TransformerState(NamedTuple):
    past: torch.Tensor  # (L, rows, t, 2E) keys and values of the t words so far
    regions: torch.Tensor  # (L, I, 49, 2E) keys and values of the regions

    def select_rows(self, rows: torch.Tensor) -> TransformerState:
        return self._replace(past=self.past[:, rows])

    def select_images(self, images: torch.Tensor) -> TransformerState:
        return self._replace(regions=self.regions[:, images])


class Table(NamedTuple):
    """Where tokens lie in a table of groups: attention alone needs one, all other layers work on the tokens."""

    groups: int
    length: int
    slots: torch.Tensor | None = None  # int64 (N,) in groups x length; None where the table is full and in order

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (groups, length, D), zeros where there is no token."""
        if self.slots is not None:
            empty = values.new_zeros(self.groups * self.length, values.shape[1])
            values = empty.index_copy(0, self.slots, values)
        return values.view(self.groups, self.length, values.shape[1])

    def collect(self, values: torch.Tensor) -> torch.Tensor:
        """(groups, length, D) -> (N, D)."""
        values = values.flatten(0, 1)
        return values if self.slots is None else values[self.slots]


class TransformerLayer(nn.Module):
    """Self-attention over the words so far, cross-attention over the regions, and two linear layers."""

    def __init__(self, size: int, inner_size: int, heads: int, drop_prob: float):
        super().__init__()
        self.heads = heads
        self.self_norm, self.cross_norm, self.inner_norm = (nn.LayerNorm(size) for _ in range(3))
        self.words = nn.Linear(size, 3 * size)  # queries, keys, values
        self.self_out = nn.Linear(size, size)
        self.query = nn.Linear(size, size)
        self.cross_out = nn.Linear(size, size)
        self.inner = nn.Linear(size, inner_size)
        self.inner_out = nn.Linear(inner_size, size)
        self.dropout = Dropout(drop_prob)

    def split(self, values: torch.Tensor) -> torch.Tensor:
        """(groups, length, E) -> (groups, heads, length, E / heads)."""
        return values.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None, regions: torch.Tensor, by_row: Table, by_image: Table,
        weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Run the layer over tokens.

        Args:
            x: (N, E).
            past: (rows, t, 2E) keys and values of the words before; None where `x` has all words, which then see no
                later ones: padding at the ends of rows needs no other mask.
            regions: (I, 49, 2E) keys and values.
            weights: return the weights of cross-attention.

        Returns:
            x (N, E), keys and values of all words (rows, t + length, 2E), and None or the weights (N, 49), averaged over
            heads.
        """
        size = x.shape[1]
        query, now = self.words(self.self_norm(x)).split([size, 2 * size], 1)
        known = by_row.spread(now)
        if past is not None:
            known = torch.cat([past, known], 1)
        keys, values = known.chunk(2, 2)
        context = F.scaled_dot_product_attention(
            self.split(by_row.spread(query)), self.split(keys), self.split(values), is_causal=past is None
        )
        x = x + self.dropout(self.self_out(by_row.collect(context.transpose(1, 2).flatten(2))))

        query = self.split(by_image.spread(self.query(self.cross_norm(x))))
        keys, values = map(self.split, regions.chunk(2, 2))
        alphas = None
        if weights:
            scores = (query @ keys.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(3)  # (I, heads, S, 49)
            context, alphas = scores @ values, by_image.collect(scores.mean(1))
        else:
            context = F.scaled_dot_product_attention(query, keys, values)
        x = x + self.dropout(self.cross_out(by_image.collect(context.transpose(1, 2).flatten(2))))
        return x + self.dropout(self.inner_out(F.gelu(self.inner(self.inner_norm(x))))), known, alphas


class TransformerDecoder(Decoder):
    """A stack of layers of width E, H wide between their two last linear layers.

    The alphas are the last layer's. A caption longer than the table of positions goes on at its last one.
    """

    uses_grid = has_attention = True
    description = "a transformer that attends to them at each word"

    def __init__(
        self, vocabulary_size: int, feature_size: int, embed_size: int, hidden_size: int, num_layers: int,
        drop_prob: float, num_heads: int, words: int, regions: int = 49,
    ):  # fmt: skip
        """Args: words: positions, those of `<SOS>` and of the longest caption's words."""
        super().__init__()
        self.embed = nn.Embedding(vocabulary_size, embed_size, padding_idx=PAD)
        self.positions = nn.Embedding(words, embed_size)
        self.image = nn.Sequential(nn.Linear(feature_size, embed_size), nn.LayerNorm(embed_size))
        self.places = nn.Parameter(torch.zeros(regions, embed_size))  # else "left" is the same as "right"
        self.layers = nn.ModuleList(
            TransformerLayer(embed_size, hidden_size, num_heads, drop_prob) for _ in range(num_layers)
        )
        self.regions = nn.Linear(embed_size, num_layers * 2 * embed_size)  # every layer's keys and values
        self.norm = nn.LayerNorm(embed_size)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.dropout = Dropout(drop_prob)
        with torch.no_grad():
            for table in (self.embed, self.positions):
                nn.init.normal_(table.weight, std=0.02)
            self.embed.weight[PAD].zero_()
            for name, weight in self.layers.named_parameters():
                if name.endswith("_out.weight"):  # all layers together add as much as one would (Radford et al., 2019)
                    weight.div_(math.sqrt(3 * num_layers))

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], vocabulary_size: int, spec: EncoderSpec) -> Self:
        return cls(
            vocabulary_size, spec.channels, flags["embed_size"], flags["hidden_size"], flags["num_layers"], flags["drop_prob"],
            flags["num_heads"], flags["max_length"] + 1, spec.regions,
        )  # fmt: skip

    def begin(self, features: torch.Tensor) -> TransformerState:
        """See `Decoder.begin`. Args: features: (I, 49, C)."""
        regions = self.dropout(self.image(features) + self.places)  # (I, 49, E)
        known = self.regions(regions).unflatten(2, (len(self.layers), -1)).movedim(2, 0)
        return TransformerState(known[:, :, :0], known)

    def step(self, state: TransformerState, words: torch.Tensor) -> tuple[TransformerState, DecoderOutput]:
        rows, images = words.shape[0], state.regions.shape[1]
        time = torch.full_like(words, state.past.shape[2])
        by_row, by_image = Table(rows, 1), Table(images, rows // images)  # the rows of an image lie together
        past, output = self.run(words, time, state.past, state.regions, by_row, by_image)
        return state._replace(past=torch.stack(past)), output

    def forward(self, features: torch.Tensor, batch: Batch) -> DecoderOutput:
        regions, length, device = self.begin(features).regions, len(batch.batch_sizes), features.device
        time = torch.arange(length, device=device).repeat_interleave(
            batch.batch_sizes.to(device), output_size=len(batch.inputs)
        )
        by_row = Table(len(batch.row_image), length, batch.token_row * length + time)
        by_image = Table(len(features), batch.slots_per_image, batch.slots)
        return self.run(batch.inputs, time, None, regions, by_row, by_image)[1]

    def run(
        self, words: torch.Tensor, time: torch.Tensor, past: torch.Tensor | None, regions: torch.Tensor, by_row: Table,
        by_image: Table,
    ) -> tuple[list[torch.Tensor], DecoderOutput]:  # fmt: skip
        """Run all layers over the words (N,) at their times (N,). Returns the layers' keys and values, and the output."""
        time = time.clamp(max=self.positions.num_embeddings - 1)
        x = self.dropout((self.embed(words) + self.positions(time)) * math.sqrt(self.embed.embedding_dim))
        after, alphas, last = [], None, len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x, known, alphas = layer(x, None if past is None else past[i], regions[i], by_row, by_image, i == last)
            after.append(known)
        return after, DecoderOutput(self.dropout(self.norm(x)), alphas)
