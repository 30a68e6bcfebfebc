"""The decoders: an LSTM, and an LSTM with attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from captioning.batches import Batch
from captioning.dataset import PAD
from captioning.kernels import Dropout, PackedLSTMLayer, projected_cross_entropy

# --------------------------------------------------------------------------------------------------
# Decoders


class DecoderOutput(NamedTuple):
    code: torch.Tensor  # (N, E), a row per token; `logits` or `cross_entropy` project it to the vocabulary
    attention: torch.Tensor | None  # (N, 49) weights that sum to one, None without attention


class DecoderState(NamedTuple):
    """What decoding carries from word to word, for images x beams rows."""

    hidden: torch.Tensor  # (L, rows, H)
    cell: torch.Tensor  # (L, rows, H)
    regions: torch.Tensor  # (I, 49, E), or (I, 1, E) for the image as a whole; never repeated per beam
    keys: torch.Tensor | None  # (I, 49, A), None without attention


class LSTMDecoder(nn.Module):
    """Show and Tell (Vinyals et al., 2015): the image is the first input of an LSTM, then come the words.

    Image and last word also join the hidden state in the output layer (the deep output of Xu et al., 2015),
    since an LSTM that sees the image once soon forgets it; that layer is tied to the word embeddings (Press
    and Wolf, 2017).
    """

    uses_grid = False

    def __init__(
        self,
        vocabulary_size: int,
        feature_size: int,
        embed_size: int,
        hidden_size: int,
        num_layers: int,
        drop_prob: float,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocabulary_size, embed_size, padding_idx=PAD)
        self.image = nn.Sequential(nn.Linear(feature_size, embed_size), nn.LayerNorm(embed_size))
        self.lstm = nn.LSTM(embed_size, hidden_size, num_layers, dropout=drop_prob if num_layers > 1 else 0.0)
        self.output = nn.Linear(hidden_size, embed_size)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.dropout = Dropout(drop_prob)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        with torch.no_grad():
            self.embed.weight[PAD].zero_()
            for *_, bias, _ in self.lstm.all_weights:
                bias[hidden_size : 2 * hidden_size] += 1  # remember at first (Jozefowicz et al., 2015): the image

    def set_word_frequencies(self, counts: torch.Tensor) -> None:
        """Start the output bias at the log frequency of each word, which saves the first hundred steps.

        Args: counts: (V,) occurrences in the training captions.
        """
        with torch.no_grad():
            self.output_bias.copy_(torch.log((counts.float() + 1) / (counts.sum() + len(counts))))

    def begin(self, features: torch.Tensor) -> DecoderState:
        """Read the image. Args: features: (I, C). Returns the state of I rows."""
        image = self.image(features)  # (I, E)
        hidden, cell = self.read_image(image)
        return DecoderState(hidden, cell, image.unsqueeze(1), None)

    def read_image(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The LSTM's first step, whose input is the image (I, E). Returns hidden and cell (L, I, H)."""
        nothing = image.new_zeros(self.lstm.num_layers, image.shape[0], self.lstm.hidden_size)
        return self.lstm_step(image, nothing, nothing)[1:]

    def lstm_step(
        self, inputs: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All layers, one step of every row: the output (rows, H), and hidden and cell (L, rows, H).

        Layer by layer, since `nn.LSTM` copies its weights into another layout at every call on the CPU.
        """
        states = []
        for layer, weights in enumerate(self.lstm.all_weights):
            if layer:
                inputs = self.dropout(inputs)
            inputs, memory = torch.lstm_cell(inputs, (hidden[layer], cell[layer]), *weights)
            states.append((inputs, memory))
        return inputs, torch.stack([h for h, _ in states]), torch.stack([c for _, c in states])

    def forward(self, features: torch.Tensor, batch: Batch) -> DecoderOutput:
        """Teacher forcing over a batch of whole images.

        Args:
            features: (I, C), or (I, 49, C) for the attention decoder; one per image, not per caption.

        Returns:
            code (N, E) and attention (N, 49) of the real tokens, in the batch's packed order.
        """
        state = self.begin(features)
        words = self.embed(batch.inputs)  # (N, E)
        hidden = self.run_lstm(
            self.dropout(words), batch.batch_sizes, state.hidden[:, batch.row_image], state.cell[:, batch.row_image]
        )  # (N, H)
        return self.predict(hidden, words, state, batch)

    def run_lstm(
        self, packed: torch.Tensor, sizes: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> torch.Tensor:
        """All layers over a packed sequence. Args: packed (N, E), hidden and cell (L, R, H). Returns (N, H)."""
        if packed.device.type != "cpu":
            return self.lstm(PackedSequence(packed, sizes), (hidden.contiguous(), cell.contiguous()))[0].data
        layers, steps = self.lstm.num_layers, sizes.tolist()
        for layer in range(layers):
            from_input, recurrent, bias, recurrent_bias = self.lstm.all_weights[layer]
            gates = F.linear(packed, from_input, bias + recurrent_bias).to(recurrent.dtype)
            _, packed = PackedLSTMLayer.apply(gates, recurrent, hidden[layer], cell[layer], steps)
            if layer < layers - 1:
                packed = self.dropout(packed)
        return packed

    def step(self, state: DecoderState, words: torch.Tensor) -> tuple[DecoderState, DecoderOutput]:
        """Say one word more in every row. Args: words: (rows,) the last word of each."""
        embedded = self.embed(words)  # (rows, E)
        out, hidden, cell = self.lstm_step(self.dropout(embedded), state.hidden, state.cell)
        output = self.predict(out, embedded, state, None)
        return state._replace(hidden=hidden, cell=cell), output

    def predict(
        self, hidden: torch.Tensor, words: torch.Tensor, state: DecoderState, batch: Batch | None
    ) -> DecoderOutput:
        """From the LSTM's output (N, H) and the embedded last words (N, E) to the next words."""
        image = state.regions[:, 0]  # (I, E)
        if batch is None:  # decoding: beams of an image lie together
            image = image.repeat_interleave(hidden.shape[0] // image.shape[0], 0)
        else:
            image = image[batch.row_image[batch.token_row]]
        return DecoderOutput(self.squash(self.output(self.dropout(hidden)) + words + image), None)

    def squash(self, code: torch.Tensor) -> torch.Tensor:
        return self.dropout(torch.tanh(code))

    def logits(self, code: torch.Tensor) -> torch.Tensor:
        """(N, E) -> (N, V) through the tied embeddings."""
        return F.linear(code, self.embed.weight, self.output_bias)

    def cross_entropy(
        self,
        code: torch.Tensor,
        targets: torch.Tensor,
        label_smoothing: float = 0.0,
        token_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over tokens of the loss of `logits(code)` against `targets` (N,): see `projected_cross_entropy`."""
        return projected_cross_entropy(
            code, self.embed.weight, self.output_bias, targets, label_smoothing, token_weights
        )


class AttentionDecoder(LSTMDecoder):
    """The LSTM above, and at every word a look at the image's 49 regions.

    Attention comes after the LSTM, as in Luong et al. (2015) and in adaptive attention (Lu et al., 2017),
    so that a whole caption is one LSTM call and one matrix product with its image's keys. Scores are
    scaled dot products; the context is gated by the hidden state (Xu et al., 2015, section 4.2.1) and joins
    hidden state and last word in the output layer (their deep output).
    """

    uses_grid = True

    def __init__(
        self,
        vocabulary_size: int,
        feature_size: int,
        embed_size: int,
        hidden_size: int,
        num_layers: int,
        drop_prob: float,
        attention_dim: int,
        regions: int = 49,
    ):
        super().__init__(vocabulary_size, feature_size, embed_size, hidden_size, num_layers, drop_prob)
        self.positions = nn.Parameter(torch.zeros(regions, embed_size))  # learned, so that it can say "left"
        self.key = nn.Linear(embed_size, attention_dim, bias=False)
        self.query = nn.Linear(hidden_size, attention_dim)
        self.gate = nn.Linear(hidden_size, embed_size)
        self.context = nn.Linear(embed_size, embed_size, bias=False)

    def begin(self, features: torch.Tensor) -> DecoderState:
        """Read the image. Args: features: (I, 49, C). Returns the state of I rows."""
        regions = self.dropout(self.image(features) + self.positions)  # (I, 49, E)
        hidden, cell = self.read_image(regions.mean(1))
        return DecoderState(hidden, cell, regions, self.key(regions))

    def predict(
        self, hidden: torch.Tensor, words: torch.Tensor, state: DecoderState, batch: Batch | None
    ) -> DecoderOutput:
        """See `LSTMDecoder.predict`; the attention weights are of the word that is being predicted."""
        assert state.keys is not None
        hidden = self.dropout(hidden)
        query = self.query(hidden)  # (N, A)
        images = state.keys.shape[0]
        if batch is None:  # decoding: beams of an image lie together
            table = query.view(images, -1, query.shape[1])  # (I, S, A)
        else:
            table = query.new_zeros(images * batch.slots_per_image, query.shape[1])
            table = table.index_copy(0, batch.slots, query).view(images, -1, query.shape[1])
        scores = table @ state.keys.transpose(1, 2) / math.sqrt(query.shape[1])  # (I, S, 49)
        weights = scores.softmax(-1)
        context = (weights @ state.regions).flatten(0, 1)  # (I * S, E)
        weights = weights.flatten(0, 1)
        if batch is not None:
            context, weights = context[batch.slots], weights[batch.slots]
        seen = torch.sigmoid(self.gate(hidden)) * context  # (N, E)
        return DecoderOutput(self.squash(self.output(hidden) + self.context(seen) + words), weights)


def build_decoder(flags: Mapping[str, Any], vocabulary_size: int, feature_size: int, regions: int = 49) -> LSTMDecoder:
    """The decoder that these flags describe (`decoder`, `embed_size`, ...), on so many regions of so many channels."""
    sizes = {name: flags[name] for name in ("embed_size", "hidden_size", "num_layers", "drop_prob")}
    if flags["decoder"] == "attention":
        return AttentionDecoder(
            vocabulary_size, feature_size, **sizes, attention_dim=flags["attention_dim"], regions=regions
        )
    return LSTMDecoder(vocabulary_size, feature_size, **sizes)


def count_parameters(decoder: nn.Module) -> int:
    return sum(parameter.numel() for parameter in decoder.parameters())
