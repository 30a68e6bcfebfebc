"""Show, Attend and Tell (Xu et al., 2015) as the paper has it, with soft attention: for those who reproduce it.

`lstm.AttentionDecoder` attends after the LSTM, so that a caption is one LSTM call. Here the LSTM reads at each word
what it attended to with the state before: every word waits for the last one, and training is slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from captioning.data.batches import Batch
from captioning.data.dataset import PAD
from captioning.decoders.base import Decoder, DecoderOutput
from captioning.decoders.kernels import Dropout
from captioning.decoders.lstm import LSTMState

if TYPE_CHECKING:
    from captioning.encoders.base import EncoderSpec


class ShowAttendTellDecoder(Decoder):
    """An LSTM that reads the last word and the context, a weighted mean of the regions as the encoder gives them.

    Names in the paper: `first_hidden` and `first_cell` are f_init, `key`, `query` and `score` the perceptron f_att,
    `gate` is f_beta, a single number per word, and `output`, `context` and `output_weight` are L_h, L_z and L_o. The tanh
    before L_o is that of the authors' code. The doubly stochastic term is `--attention_reg`.
    """

    uses_grid = has_attention = True
    description = "an LSTM that attends to them before it reads each word"

    def __init__(
        self, vocabulary_size: int, feature_size: int, embed_size: int, hidden_size: int, drop_prob: float,
        attention_dim: int,
    ):  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocabulary_size, embed_size, padding_idx=PAD)
        self.first_hidden = nn.Linear(feature_size, hidden_size)
        self.first_cell = nn.Linear(feature_size, hidden_size)
        self.key = nn.Linear(feature_size, attention_dim, bias=False)
        self.query = nn.Linear(hidden_size, attention_dim)
        self.score = nn.Linear(attention_dim, 1, bias=False)
        self.gate = nn.Linear(hidden_size, 1)
        self.lstm = nn.LSTMCell(embed_size + feature_size, hidden_size)
        self.output = nn.Linear(hidden_size, embed_size)
        self.context = nn.Linear(feature_size, embed_size, bias=False)
        self.output_weight = nn.Parameter(torch.empty(vocabulary_size, embed_size))
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.dropout = Dropout(drop_prob)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        nn.init.uniform_(self.output_weight, -0.1, 0.1)
        with torch.no_grad():
            self.embed.weight[PAD].zero_()

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any], vocabulary_size: int, spec: EncoderSpec) -> Self:
        return cls(
            vocabulary_size, spec.channels, flags["embed_size"], flags["hidden_size"], flags["drop_prob"],
            flags["attention_dim"],
        )  # fmt: skip

    def begin(self, features: torch.Tensor) -> LSTMState:
        """See `Decoder.begin`. Args: features: (I, 49, C)."""
        mean = features.mean(1)
        hidden, cell = torch.tanh(self.first_hidden(mean)), torch.tanh(self.first_cell(mean))  # (I, H)
        return LSTMState(hidden.unsqueeze(0), cell.unsqueeze(0), features, self.key(features))

    def step(self, state: LSTMState, words: torch.Tensor) -> tuple[LSTMState, DecoderOutput]:
        embedded = self.embed(words)  # (rows, E)
        rows, images = words.shape[0], state.regions.shape[0]
        slots = torch.arange(rows, device=words.device)  # the rows of an image lie together
        image = slots // (rows // images)
        hidden, cell, context, alphas = self.advance(
            embedded, state.hidden[0], state.cell[0], state, image, slots, rows // images
        )
        state = state._replace(hidden=hidden.unsqueeze(0), cell=cell.unsqueeze(0))
        return state, DecoderOutput(self.predict(hidden, embedded, context), alphas)

    def forward(self, features: torch.Tensor, batch: Batch) -> DecoderOutput:
        state, words = self.begin(features), self.embed(batch.inputs)  # (N, E)
        image = batch.row_image  # (R,)
        rank = (image.unsqueeze(1) == image).tril(-1).sum(1)  # (R,) how many earlier rows are of the same image
        per_image = int(rank.max()) + 1
        slots = image * per_image + rank
        hidden, cell = state.hidden[0, image], state.cell[0, image]  # (R, H)
        outputs = []
        for now in words.split(batch.batch_sizes.tolist()):
            n = len(now)
            hidden, cell, context, alphas = self.advance(
                now, hidden[:n], cell[:n], state, image[:n], slots[:n], per_image
            )
            outputs.append((hidden, context, alphas))
        hidden, context, alphas = (torch.cat(each) for each in zip(*outputs, strict=True))
        return DecoderOutput(self.predict(hidden, words, context), alphas)

    def advance(
        self, words: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, state: LSTMState, image: torch.Tensor,
        slots: torch.Tensor, per_image: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Attend with the state before a word, and read the word and the context.

        Args:
            words: (n, E); hidden, cell: (n, H).
            state: of which only what is of images is read.
            image: int64 (n,) each row's image; slots: int64 (n,) its place in an (I, per_image) table.

        Returns:
            hidden and cell (n, H), the context (n, C) and the alphas (n, 49).
        """
        assert state.keys is not None
        seen = state.keys.index_select(0, image) + self.query(hidden).unsqueeze(1)  # (n, 49, A)
        alphas = self.score(torch.tanh(seen)).squeeze(2).softmax(1)
        # The regions are not repeated for each row: they are most of the memory.
        table = alphas.new_zeros(state.regions.shape[0] * per_image, alphas.shape[1]).index_copy(0, slots, alphas)
        context = (table.view(-1, per_image, alphas.shape[1]) @ state.regions).flatten(0, 1)[slots]
        context = torch.sigmoid(self.gate(hidden)) * context
        hidden, cell = self.lstm(torch.cat([self.dropout(words), context], 1), (hidden, cell))
        return hidden, cell, context, alphas

    def predict(self, hidden: torch.Tensor, words: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return the deep output (n, E)."""
        return self.dropout(torch.tanh(self.output(self.dropout(hidden)) + self.context(context) + words))

    def output_vectors(self) -> torch.Tensor:
        """See `Decoder.output_vectors`; the paper ties no weights."""
        return self.output_weight
