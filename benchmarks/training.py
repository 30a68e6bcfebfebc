"""Seconds of a training epoch after the first, and the arithmetic it does per second.

An epoch is the time of a step times the steps of an epoch; the original's way is the time of encoding some
captions' images, scaled to a batch, and that of a padded step.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import naive_pass, padded, padded_step
from generated import PICTURES, draw_pictures, feature_file, fill_cache, write_data_set
from measure import Bench, Figure, compared, interleaved, large_product
from torch.utils._python_dispatch import TorchDispatchMode

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.dataset import load_caption_set
from captioning.encoders import find_encoder
from captioning.settings import parse_flags
from training_utils import Precision, StepMonitor, StopRequest, TrainLoader, multiplies_bf16

PART = "epoch"
BATCH = 128
SIZES = {
    "small": ["--embed_size", "512", "--hidden_size", "512", "--num_layers", "1"],
    "default": ["--embed_size", "512", "--hidden_size", "1024", "--num_layers", "3"],
}
ENOUGH = {("lstm", "small"): 45, ("attention", "small"): 25, ("lstm", "default"): 8, ("attention", "default"): 8}
ARITHMETIC = {"lstm": 0.70, "attention": 0.60}
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}


class Trial:
    """A training of the main program before its first step, and epochs of it that can be cut to a few batches."""

    def __init__(self, flags: list[str]):
        with redirect_stdout(io.StringIO()):
            self.run, self.state = trainer.build_run(parse_flags(flags))
        self.context, self.decoder, self.loader = self.run.context, self.state.decoder, self.run.loader
        self.batches = self.loader.batches

    def load(self, images: np.ndarray, batch_size: int) -> None:
        """Have epochs consist of these images, in batches of so many captions."""
        settings = self.run.settings
        self.loader = TrainLoader(self.batches, images, len(self.run.views), batch_size, settings.seed)

    def shorten(self, steps: int) -> None:
        """Have epochs consist of so many full batches."""
        images, size = self.run.loader.images, self.run.loader.batch_size
        plan = self.batches.plan(np.random.default_rng(0).permutation(images), size)
        self.load(np.unique(self.batches.owner(np.concatenate(plan[:steps]))), size)

    def epoch(self, number: int = 0) -> None:
        """Train an epoch as the main program does."""
        state, settings = self.state, self.run.settings
        state.epoch, state.step, state.tokens = number, 0, 0
        state.loss_sum.zero_()
        monitor = StepMonitor(self.loader, Path(), settings, StopRequest(), self.context.device)
        trainer.train_one_epoch(state, self.loader, self.run.step_loss, settings, monitor, lambda: None, self.run.clock)


def prepare_data(bench: Bench) -> tuple[Path, list[Path]]:
    """The data set that is measured on, and pictures to encode; generated once for all parts."""
    if bench.data_dir:
        return bench.data_dir, load_caption_set(bench.data_dir).paths()[:PICTURES]
    pictures = sorted((bench.directory / "pictures").glob("*.jpg"))
    pictures = pictures or draw_pictures(bench.directory / "pictures", min(PICTURES, bench.scale.images))
    folder = bench.directory / "data"
    if not folder.is_dir():
        write_data_set(folder, bench.scale.images, pictures)
    return folder, pictures


def prepare_features(bench: Bench) -> Path:
    """Put random features of all images into the cache that the main program will read; return the data set."""
    data_dir, _ = prepare_data(bench)
    data = load_caption_set(data_dir)
    for kind in ("grid", "mean"):
        file = feature_file(bench.directory / "cache", "resnet50", data.image_dir, kind)
        if file.rows < len(data.names):
            fill_cache(file, data.paths())
    return data_dir


def flags_for(bench: Bench, data_dir: Path, decoder: str, size: str, encoder: str = "resnet50") -> list[str]:
    return [
        "--dataset_type", "custom", "--data_dir", str(data_dir), "--decoder", decoder, "--batch_size", str(BATCH),
        "--encoder", encoder, *(["--resnet_weights", "random"] if encoder == "resnet50" else []), *SIZES[size],
        "--feature_cache", str(bench.directory / "cache"), "--model_save_dir", str(bench.directory / "runs"),
        "--epochs", "1", "--device", bench.device.type, "--learning_rate", "0.001",
    ]  # fmt: skip


class ProductTypes(TorchDispatchMode):
    """Counts the operations of matrix products by the dtype of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket in PRODUCTS:
            left, right = [value for value in args if isinstance(value, torch.Tensor)][-2:]
            self.operations[left.dtype] += 2 * left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


def check_precision(trial: Trial, precision: Precision) -> None:
    """Train an epoch and make sure that its matrix products run in this precision.

    Raises:
        AssertionError: a tenth of the operations or more runs in another one.
    """
    with ProductTypes() as seen:
        trial.epoch()
    if seen.operations[precision.dtype] <= 0.9 * seen.operations.total():
        raise AssertionError(f"--precision {precision.name} has these operations by dtype: {dict(seen.operations)}")


def multiply_adds(trial: Trial, plan: list[np.ndarray]) -> int:
    """Multiply-adds that training on these batches needs, in matrix products over real tokens.

    With N tokens of I images (each with R regions of C channels; R = 1 for lstm), V words, E embed size, H hidden
    size, A attention size, and L layers whose input has size X (E in the first, else H), the forward pass takes

        image projection    I R C E         (twice this in all: features need no gradient)
        first LSTM step     I 4H X          per layer; its recurrent part multiplies zeros and is not counted
        LSTM                N 4H (X + H)    per layer
        output, vocabulary  N (H E + E V)
        attention: keys I R E A, queries N H A, gate N H E, context N E E, scores and weighted sum N R (A + E)

    and, but for the image projection, three times this with the gradients of inputs and of weights.
    """
    flags, words = trial.run.settings, len(trial.context.vocabulary)
    spec = find_encoder(flags.encoder)
    embed, hidden, attention = flags.embed_size, flags.hidden_size, flags.attention_dim
    batches = [trial.batches.make(captions) for captions in plan]
    images, tokens = sum(len(batch.images) for batch in batches), sum(len(batch.targets) for batch in batches)
    widths = [embed] + (flags.num_layers - 1) * [hidden]
    needed = sum(4 * hidden * (images * width + tokens * (width + hidden)) for width in widths)
    needed += tokens * (hidden * embed + embed * words)
    regions = spec.regions if trial.decoder.uses_grid else 1
    if trial.decoder.uses_grid:
        needed += images * regions * embed * attention
        needed += tokens * (hidden * attention + hidden * embed + embed * embed + regions * (attention + embed))
    return int(3 * needed + 2 * images * regions * spec.channels * embed)


def measure(bench: Bench) -> list[Figure]:
    data_dir, pictures = prepare_features(bench), prepare_data(bench)[1]
    encoder = find_encoder("resnet50").build(None).to(bench.device)
    paths = [pictures[n % len(pictures)] for n in range(bench.scale.captions_encoded)]
    encode = lambda: naive_pass(encoder, paths, len(paths), bench.device)  # noqa: E731
    return [
        figure
        for size, decoders in bench.scale.sizes.items()
        for decoder in decoders
        for figure in measure_decoder(bench, data_dir, decoder, size, encode)
    ]


def measure_decoder(bench: Bench, data_dir: Path, decoder: str, size: str, encode: Callable[[], float]) -> list[Figure]:
    """One decoder at one size, in every precision that this device is made for."""
    scale, device = bench.scale, bench.device
    names = ["fp32", *(["bf16"] if multiplies_bf16(device) else [])]
    ways: dict[str, Callable[[], object]] = {"encode": encode}
    for name in names:
        trial = Trial([*flags_for(bench, data_dir, decoder, size), "--precision", name])
        trial.shorten(scale.steps)
        precision = Precision(name, device)
        check_precision(trial, precision)
        ways |= {name: trial.epoch, f"product {name}": large_product(scale.matmul, precision.dtype, device)}
    plan, whole = trial.loader.plan(0), trial.run.loader
    captions, here = sum(map(len, whole.plan(0))), sum(map(len, plan))

    chosen = np.random.default_rng(1).permutation(np.concatenate(plan))[:BATCH]
    slow_steps = -(-captions // len(chosen))
    length = int(trial.batches.lengths.max()) + 1
    inputs, targets = (part.to(device) for part in padded(trial.batches, chosen, length))
    plain_adam = torch.optim.Adam(trial.decoder.parameters(), lr=0.001)

    def slow() -> None:
        features = trial.run.views[0].gather(trial.batches.owner(chosen), device)
        padded_step(trial.decoder, plain_adam, features, inputs, targets)

    seconds = interleaved(ways | {"slow": slow}, scale.repeats, device)

    cached = slow_steps * seconds["slow"]
    original = cached + slow_steps * seconds["encode"] * len(chosen) / scale.captions_encoded
    note = (
        f"ours {len(plan)} of {whole.steps} steps, the other way 1 padded step of {slow_steps} ({length} time steps) "
        f"and {scale.captions_encoded} of {len(chosen)} images encoded, medians of {scale.repeats}"
    )
    what = f"{decoder}, {'512 x 1' if size == 'small' else '1024 x 3'}"
    work = 2 * multiply_adds(trial, plan)
    product = {name: 2 * scale.matmul**3 / seconds[f"product {name}"] for name in names}
    figures = []
    for name in names:
        about, ours = f"{what}, {name}", seconds[name] * captions / here
        against_original = compared(
            PART, f"{about}: epoch / the original's way", ours, "s", "the original's way", original, note
        )
        against_cached = compared(
            PART, f"{about}: epoch / cached features", ours, "s", "cached, padded, projection in the loop", cached
        )
        if name == names[-1]:  # what --precision auto takes
            against_original.must(">=", ENOUGH[decoder, size])
            if (decoder, size) == ("attention", "small"):
                against_cached.must(">=", 2.5)
        rates = compared(
            PART, f"{about}: captions/s", captions / ours, "captions/s", "the original's way", captions / original
        )
        figures += [against_original, against_cached, rates]
        for against in dict.fromkeys(("fp32", name)):
            arithmetic = compared(
                PART, f"{about}: arithmetic / {against} product", work / seconds[name] / 1e9, "GFLOP/s",
                f"{scale.matmul} x {scale.matmul} in {against}", product[against] / 1e9,
            )  # fmt: skip
            arithmetic.limit = 1.0 if name == against else None
            if size == "small" and name == against == "fp32":
                arithmetic.must(">=", ARITHMETIC[decoder])
            figures.append(arithmetic)
    return figures
