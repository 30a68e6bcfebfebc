"""Attention after the LSTM against input feeding, at equal parameters: captions, speed, and a paired bootstrap.

    python benchmarks/decoder_order.py --data_dir data/flickr8k [--epochs 8] [--flags ...]

Both are trained by the main program with the same flags; only the decoder's class differs. The scores are of
the validation and test images together, so give a data set whose test images may be looked at.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.batches import Batch
from captioning.cider import cider_of_each
from captioning.dataset import build_vocabulary, load_caption_set
from captioning.decoders import AttentionDecoder, DecoderOutput, DecoderState
from captioning.runs import find_checkpoint
from captioning.scores import paired_bootstrap
from training_utils import Precision


class InputFeedingDecoder(AttentionDecoder):
    """Show, Attend and Tell's order (Xu et al., 2015): attend with the last hidden state, feed the context to the LSTM.

    Scores are scaled dot products here too, so that nothing but the order differs.
    """

    def __init__(self, words: int, channels: int, embed: int, hidden: int, layers: int, drop: float, attention: int):
        assert layers == 1
        super().__init__(words, channels, embed, hidden, layers, drop, attention)
        self.lstm = nn.LSTM(2 * embed, hidden)
        self.first_hidden, self.first_cell = nn.Linear(embed, hidden), nn.Linear(embed, hidden)

    def begin(self, features: torch.Tensor) -> DecoderState:
        regions = self.dropout(self.image(features) + self.positions)  # (I, 49, E)
        mean = regions.mean(1)
        hidden, cell = torch.tanh(self.first_hidden(mean)), self.first_cell(mean)
        return DecoderState(hidden.unsqueeze(0), cell.unsqueeze(0), regions, self.key(regions))

    def attend_and_step(
        self, words: torch.Tensor, state: DecoderState
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One time step of every row; rows of an image lie together. Args: words: (R, E)."""
        assert state.keys is not None
        hidden = state.hidden[0]  # (R, H)
        query = self.query(hidden).view(len(state.keys), -1, state.keys.shape[2])  # (I, R / I, A)
        weights = (query @ state.keys.transpose(1, 2) / math.sqrt(query.shape[2])).softmax(2)  # (I, R / I, 49)
        seen = torch.sigmoid(self.gate(hidden)) * (weights @ state.regions).flatten(0, 1)  # (R, E)
        out, hidden, cell = self.lstm_step(torch.cat([self.dropout(words), seen], 1), state.hidden, state.cell)
        code = self.output(self.dropout(out)) + self.context(seen) + words
        return code, weights.flatten(0, 1), hidden, cell

    def forward(self, features: torch.Tensor, batch: Batch) -> DecoderOutput:
        """A loop over time in which every row goes to the end: leaving it early costs more in gradients of slices."""
        rows, images = len(batch.row_image), len(features)
        captions = int(torch.bincount(batch.row_image).max())
        # The rows of an image side by side, with empty ones where an image has fewer captions than another.
        order = batch.row_image.argsort(stable=True)
        number = torch.arange(rows) - torch.searchsorted(batch.row_image[order], batch.row_image[order])
        place = torch.empty(rows, dtype=torch.long)
        place[order] = batch.row_image[order] * captions + number
        time = torch.repeat_interleave(torch.arange(len(batch.batch_sizes)), batch.batch_sizes)
        token = time * images * captions + place[batch.token_row]  # where each token lies in (T, I * captions)
        inputs = batch.inputs.new_zeros(len(batch.batch_sizes) * images * captions)
        words = self.embed(inputs.index_copy(0, token, batch.inputs)).view(
            len(batch.batch_sizes), -1, self.embed.weight.shape[1]
        )
        state = self.begin(features)
        state = state._replace(
            hidden=state.hidden.repeat_interleave(captions, 1), cell=state.cell.repeat_interleave(captions, 1)
        )
        codes, looks = [], []
        for step in words.unbind(0):
            code, weights, hidden, cell = self.attend_and_step(step, state)
            state = state._replace(hidden=hidden, cell=cell)
            codes.append(code)
            looks.append(weights)
        return DecoderOutput(self.squash(torch.cat(codes)[token]), torch.cat(looks)[token])

    def step(self, state: DecoderState, words: torch.Tensor) -> tuple[DecoderState, DecoderOutput]:
        code, weights, hidden, cell = self.attend_and_step(self.embed(words), state)
        return state._replace(hidden=hidden, cell=cell), DecoderOutput(self.squash(code), weights)


def parameters(decoder: nn.Module) -> int:
    return sum(parameter.numel() for parameter in decoder.parameters())


def time_steps(sizes: tuple[int, int, int, int, int, float, int], fewer: int) -> None:
    """Print the milliseconds of a training step of both, taking turns: 320 captions of 64 images, 11 words each."""
    torch.manual_seed(0)
    words, channels, embed, hidden, *rest = sizes
    rows, length = 320, 12
    batch = Batch(
        np.arange(64), torch.arange(64).repeat_interleave(5), torch.randint(4, words, (rows * length,)),
        torch.randint(4, words, (rows * length,)), torch.full((length,), rows), torch.arange(rows).repeat(length),
        (torch.arange(rows) * length).repeat(length) + torch.arange(length).repeat_interleave(rows), 5 * length,
    )  # fmt: skip
    features = torch.randn(64, 49, channels)
    precision = Precision("auto", torch.device("cpu"))
    decoders = {
        "after the LSTM": AttentionDecoder(words, channels, embed, hidden, *rest),
        "input feeding": InputFeedingDecoder(words, channels, embed, fewer, *rest),
    }
    optimizers = {name: torch.optim.AdamW(decoder.parameters(), fused=True) for name, decoder in decoders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(8):
        for name, decoder in decoders.items():
            start = time.perf_counter()
            with precision.autocast():
                loss = decoder.cross_entropy(decoder(features, batch).code, batch.targets) / len(batch.targets)
            precision.step(loss, optimizers[name], 5.0)
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name}: {1000 * statistics.median(times[2:]):.0f} ms a training step, {precision.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--feature_cache", default="feature_cache")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmark_results/decoder_order"))
    parser.add_argument("flags", nargs="*", help="further flags of the main program, after --")
    args = parser.parse_args()
    data = load_caption_set(args.data_dir)
    words, plain_build = len(build_vocabulary(data, 3)), trainer.build_decoder
    sizes = (words, 1280, 300, 512, 1, 0.5, 512)
    wanted = parameters(AttentionDecoder(*sizes))
    # The LSTM of input feeding has a wider input: as many hidden units as make up for it.
    fewer = min(range(256, 513), key=lambda h: abs(parameters(InputFeedingDecoder(*sizes[:3], h, *sizes[4:])) - wanted))
    scores, beams = {}, ("greedy", "beam 3")
    for name, hidden in (("after", 512), ("feeding", fewer)):
        trainer.build_decoder = plain_build if name == "after" else lambda _, *rest: InputFeedingDecoder(*rest)
        output = args.output / name
        flags = [
            "--dataset_type", "custom", "--data_dir", str(args.data_dir), "--feature_cache", args.feature_cache,
            "--encoder", "efficientnet_lite0", "--decoder", "attention", "--epochs", str(args.epochs),
            "--batch_size", "320", "--learning_rate", "0.002", "--embed_size", "300", "--hidden_size", str(hidden),
            "--num_layers", "1", "--drop_prob", "0.5", "--label_smoothing", "0.1", "--use_scheduler",
            "--scheduler_type", "one_cycle", "--warmup_epochs", "1", "--model_save_dir", str(output), *args.flags,
        ]  # fmt: skip
        trained = any(output.rglob("run_summary.txt"))  # by an earlier call
        if not trained and trainer.main(flags):
            sys.exit(1)
        if trainer.main(["--mode", "test", "--split", "val+test", "--model_path", str(output)]):
            sys.exit(1)
        run = find_checkpoint(output).parent
        results = json.loads((run / "test_metrics.json").read_text())
        for beam, result in zip(beams, results, strict=True):
            captions = json.loads((run / result["captions_file"]).read_text())
            known = [data.references(data.names.index(entry["image_id"])) for entry in captions]
            scores[name, beam] = cider_of_each([entry["caption"] for entry in captions], known)
            print(f"{name}, {beam}: CIDEr {100 * scores[name, beam].mean():.1f}")
    time_steps(sizes, fewer)
    for beam in beams:
        mean, low, high = (100 * value for value in paired_bootstrap(scores["feeding", beam], scores["after", beam]))
        print(
            f"{beam}: after the LSTM is {mean:+.1f} CIDEr better than input feeding (95 %: {low:+.1f} to {high:+.1f})"
        )


if __name__ == "__main__":
    main()
