"""The decoders with an LSTM that runs over a whole caption at once: without attention, and with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from captioning.data.batches import Batch
from captioning.data.dataset import PAD
from captioning.decoders.base import Decoder, DecoderOutput
from captioning.decoders.kernels import TOKEN_ROWS, Dropout, PackedLSTMLayer, matmul_dtype, pad_rows
from captioning.encoders.base import EncoderSpec


class LSTMState(NamedTuple):
    hidden: torch.Tensor  # (L, rows, H)
    cell: torch.Tensor  # (L, rows, H)
    regions: torch.Tensor  # (I, 49, E), or (I, 1, E) for the image as a whole
    keys: torch.Tensor | None  # (I, 49, A), None without attention

    def select_rows(self, rows: torch.Tensor) -> LSTMState:
        return self._replace(hidden=self.hidden[:, rows], cell=self.cell[:, rows])

    def select_images(self, images: torch.Tensor) -> LSTMState:
        return self._replace(regions=self.regions[images], keys=None if self.keys is None else self.keys[images])


class LSTMDecoder(Decoder):
    """Show and Tell (Vinyals et al., 2015): the image is the first input of an LSTM, then come the words.

    Image and last word also join the hidden state in the output layer (the deep output of Xu et al., 2015),
    since an LSTM that reads the image once soon forgets it.
    """

    description = "an LSTM that reads their mean"

    def __init__(
        self, vocabulary_size: int, feature_size: int, embed_size: int, hidden_size: int, num_layers: int,
        drop_prob: float,
    ):  # fmt: skip
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

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], vocabulary_size: int, spec: EncoderSpec) -> Self:
        return cls(
            vocabulary_size, spec.channels, flags["embed_size"], flags["hidden_size"], flags["num_layers"], flags["drop_prob"],
        )  # fmt: skip

    def begin(self, features: torch.Tensor) -> LSTMState:
        """See `Decoder.begin`. Args: features: (I, C)."""
        image = self.image(features)  # (I, E)
        hidden, cell = self.read_image(image)
        return LSTMState(hidden, cell, image.unsqueeze(1), None)

    def read_image(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the LSTM's first step, whose input is the image (I, E). Returns hidden and cell (L, I, H)."""
        zeros = image.new_zeros(self.lstm.num_layers, image.shape[0], self.lstm.hidden_size)
        return self.lstm_step(image, zeros, zeros)[1:]

    def lstm_step(
        self, inputs: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run all layers for one step of every row: the output (rows, H), and hidden and cell (L, rows, H).

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
        state = self.begin(features)
        words = self.embed(batch.inputs)  # (N, E)
        hidden = self.run_lstm(
            self.dropout(words), batch.batch_sizes, state.hidden[:, batch.row_image], state.cell[:, batch.row_image]
        )  # (N, H)
        return self.predict(hidden, words, state, batch)

    def run_lstm(
        self, packed: torch.Tensor, sizes: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> torch.Tensor:
        """Run all layers over a packed sequence. Args: packed (N, E), hidden and cell (L, R, H). Returns (N, H)."""
        if packed.device.type != "cpu":
            return self.lstm(PackedSequence(packed, sizes), (hidden.contiguous(), cell.contiguous()))[0].data
        layers, steps, tokens = self.lstm.num_layers, sizes.tolist(), len(packed)
        if matmul_dtype(packed) != packed.dtype:
            packed = pad_rows(packed, TOKEN_ROWS)
        for layer in range(layers):
            from_input, recurrent, bias, recurrent_bias = self.lstm.all_weights[layer]
            gates = F.linear(packed, from_input, bias + recurrent_bias).to(recurrent.dtype)
            _, packed = PackedLSTMLayer.apply(gates, recurrent, hidden[layer], cell[layer], steps)
            if layer < layers - 1:
                packed = self.dropout(packed)
        return packed[:tokens]

    def step(self, state: LSTMState, words: torch.Tensor) -> tuple[LSTMState, DecoderOutput]:
        embedded = self.embed(words)  # (rows, E)
        out, hidden, cell = self.lstm_step(self.dropout(embedded), state.hidden, state.cell)
        output = self.predict(out, embedded, state, None)
        return state._replace(hidden=hidden, cell=cell), output

    def predict(
        self, hidden: torch.Tensor, words: torch.Tensor, state: LSTMState, batch: Batch | None
    ) -> DecoderOutput:
        """Combine the LSTM's output (N, H), the embedded last words (N, E) and the image. Args: batch: None in decoding."""
        image = state.regions[:, 0]  # (I, E)
        if batch is None:  # the rows of an image lie together
            image = image.unsqueeze(1).expand(-1, hidden.shape[0] // image.shape[0], -1).flatten(0, 1)
        else:
            image = image[batch.row_image[batch.token_row]]
        return DecoderOutput(self.output_layer(self.output(self.dropout(hidden)) + words + image), None)

    def output_layer(self, total: torch.Tensor) -> torch.Tensor:
        return self.dropout(torch.tanh(total))


class AttentionDecoder(LSTMDecoder):
    """The LSTM above, which attends to the image's 49 regions at every word.

    Attention comes after the LSTM, as in Luong et al. (2015) and in adaptive attention (Lu et al., 2017),
    so that a whole caption is one LSTM call and one matrix product with its image's keys. Scores are
    scaled dot products; the context is gated by the hidden state (Xu et al., 2015, section 4.2.1) and joins
    hidden state and last word in the output layer (their deep output).
    """

    uses_grid = has_attention = True
    description = "an LSTM that attends to them at each word"

    def __init__(
        self, vocabulary_size: int, feature_size: int, embed_size: int, hidden_size: int, num_layers: int,
        drop_prob: float, attention_dim: int, regions: int = 49,
    ):  # fmt: skip
        super().__init__(vocabulary_size, feature_size, embed_size, hidden_size, num_layers, drop_prob)
        self.positions = nn.Parameter(torch.zeros(regions, embed_size))  # else "left" is the same as "right"
        self.key = nn.Linear(embed_size, attention_dim, bias=False)
        self.query = nn.Linear(hidden_size, attention_dim)
        self.gate = nn.Linear(hidden_size, embed_size)
        self.context = nn.Linear(embed_size, embed_size, bias=False)

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], vocabulary_size: int, spec: EncoderSpec) -> Self:
        return cls(
            vocabulary_size, spec.channels, flags["embed_size"], flags["hidden_size"], flags["num_layers"], flags["drop_prob"],
            flags["attention_dim"], spec.regions,
        )  # fmt: skip

    def begin(self, features: torch.Tensor) -> LSTMState:
        """See `Decoder.begin`. Args: features: (I, 49, C)."""
        regions = self.dropout(self.image(features) + self.positions)  # (I, 49, E)
        hidden, cell = self.read_image(regions.mean(1))
        return LSTMState(hidden, cell, regions, self.key(regions))

    def predict(
        self, hidden: torch.Tensor, words: torch.Tensor, state: LSTMState, batch: Batch | None
    ) -> DecoderOutput:
        """See `LSTMDecoder.predict`; the alphas are those of the word that is predicted."""
        assert state.keys is not None
        hidden = self.dropout(hidden)
        query = self.query(hidden)  # (N, A)
        images = state.keys.shape[0]
        if batch is None:  # the rows of an image lie together
            table = query.view(images, -1, query.shape[1])  # (I, S, A)
        else:
            table = query.new_zeros(images * batch.slots_per_image, query.shape[1])
            table = table.index_copy(0, batch.slots, query).view(images, -1, query.shape[1])
        scores = table @ state.keys.transpose(1, 2) / math.sqrt(query.shape[1])  # (I, S, 49)
        alphas = scores.softmax(-1)
        context = (alphas @ state.regions).flatten(0, 1)  # (I * S, E)
        alphas = alphas.flatten(0, 1)
        if batch is not None:
            context, alphas = context[batch.slots], alphas[batch.slots]
        gated = torch.sigmoid(self.gate(hidden)) * context  # (N, E)
        return DecoderOutput(self.output_layer(self.output(hidden) + self.context(gated) + words), alphas)
