"""Seconds of a training epoch after the first, and the arithmetic it does per second.

An epoch is the time of a step times the steps of an epoch; the original's way is the time of encoding some
captions' images, scaled to a batch, and that of a padded step.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import naive_pass, padded, padded_step
from generated import PICTURES, draw_pictures, feature_file, fill_cache, write_data_set
from measure import Bench, Figure, faster, interleaved, large_product, quicker
from torch.utils._python_dispatch import TorchDispatchMode

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.dataset import load_caption_set
from captioning.encoders import find_encoder
from training_utils import Precision, StopRequest, multiplies_bf16

PART = "epoch"
BATCH = 128
SIZES = {
    "small": ["--embed_size", "512", "--hidden_size", "512", "--num_layers", "1"],
    "default": ["--embed_size", "512", "--hidden_size", "1024", "--num_layers", "3"],
}
ENOUGH = {("lstm", "small"): 45, ("attention", "small"): 25, ("lstm", "default"): 8, ("attention", "default"): 8}
ARITHMETIC = {"lstm": 0.70, "attention": 0.60}
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}


def restrict(training: trainer.Training, steps: int) -> tuple[int, list[np.ndarray]]:
    """Have an epoch be so many full batches; returns the steps of a whole epoch and these batches' captions."""
    size = training.args.batch_size
    images = np.random.default_rng(0).permutation(training.data.splits["train"])
    plan = training.batches.plan(images, size)
    owners = np.searchsorted(training.data.first_caption, np.concatenate(plan[:steps]), side="right") - 1
    training.data.splits["train"] = np.unique(owners)
    order = np.random.default_rng([training.args.seed, training.epoch]).permutation(training.data.splits["train"])
    return len(plan), training.batches.plan(order, size)


def epoch(training: trainer.Training) -> None:
    """An epoch as the main program trains it, over what `restrict` left of the images."""
    training.step = training.tokens = 0
    training.loss_sum.zero_()
    trainer.train_one_epoch(training, StopRequest())


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


def flags_for(bench: Bench, data_dir: Path, decoder: str, size: str) -> list[str]:
    return [
        "--dataset_type", "custom", "--data_dir", str(data_dir), "--decoder", decoder, "--batch_size", str(BATCH),
        "--encoder", "resnet50", "--resnet_weights", "random", "--feature_cache", str(bench.directory / "cache"),
        "--model_save_dir", str(bench.directory / "runs"), "--epochs", "1", "--device", bench.device.type,
        "--learning_rate", "0.001", *SIZES[size],
    ]  # fmt: skip


def prepare_features(bench: Bench, data_dir: Path, encoder: str = "resnet50") -> None:
    """Random features of all images in the cache that the main program will look into."""
    data = load_caption_set(data_dir)
    for kind in ("grid", "mean"):
        file = feature_file(bench.directory / "cache", encoder, data.image_dir, kind)
        if file.rows < len(data.names):
            fill_cache(file, data.paths())


def start(bench: Bench, flags: list[str]) -> trainer.Training:
    """The main program up to its first step."""
    args, typed = trainer.parse_flags(flags)
    with redirect_stdout(io.StringIO()):
        return trainer.start_training(args, typed, flags)


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


def check_precision(training: trainer.Training, precision: Precision) -> None:
    """Train an epoch and make sure that its matrix products run in this precision.

    Raises:
        AssertionError: a tenth of the operations or more runs in another one.
    """
    with ProductTypes() as seen:
        epoch(training)
    if seen.operations[precision.dtype] <= 0.9 * seen.operations.total():
        raise AssertionError(f"--precision {precision.name} has these operations by dtype: {dict(seen.operations)}")


def multiply_adds(training: trainer.Training, plan: list[np.ndarray]) -> int:
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
    decoder, flags = training.decoder, training.args
    spec = find_encoder(flags.encoder)
    channels, regions = spec.channels, spec.regions
    embed, hidden, words = flags.embed_size, flags.hidden_size, len(training.vocabulary)
    batches = [training.batches.make(captions) for captions in plan]
    images, tokens = sum(len(batch.images) for batch in batches), sum(len(batch.targets) for batch in batches)
    widths = [embed] + (flags.num_layers - 1) * [hidden]
    needed = sum(4 * hidden * (images * width + tokens * (width + hidden)) for width in widths)
    needed += tokens * (hidden * embed + embed * words)
    if not decoder.uses_grid:
        return 3 * needed + 2 * images * channels * embed
    attention = flags.attention_dim
    needed += images * regions * embed * attention
    needed += tokens * (hidden * attention + hidden * embed + embed * embed + regions * (attention + embed))
    return 3 * needed + 2 * images * regions * channels * embed


def measure(bench: Bench) -> list[Figure]:
    data_dir, pictures = prepare_data(bench)
    prepare_features(bench, data_dir)
    encoder = find_encoder("resnet50").build(None).to(bench.device)
    paths = [pictures[n % len(pictures)] for n in range(bench.scale.captions_encoded)]
    encode = lambda: naive_pass(encoder, paths, len(paths), bench.device)  # noqa: E731
    figures = []
    for size, decoders in bench.scale.sizes.items():
        for decoder in decoders:
            figures += measure_decoder(bench, data_dir, decoder, size, encode)
    return figures


def measure_decoder(bench: Bench, data_dir: Path, decoder: str, size: str, encode: Callable[[], float]) -> list[Figure]:
    """One decoder at one size, in every precision that this device is made for."""
    scale, device = bench.scale, bench.device
    precisions = [Precision(name, device) for name in ("fp32", *(["bf16"] if multiplies_bf16(device) else []))]
    ways: dict[str, Callable[[], object]] = {"encode": encode}
    for precision in precisions:
        training = start(bench, [*flags_for(bench, data_dir, decoder, size), "--precision", precision.name])
        captions = int(training.data.caption_counts(training.data.splits["train"]).sum())
        steps, plan = restrict(training, scale.steps)
        check_precision(training, precision)
        ways[precision.name] = partial(epoch, training)
        ways[f"product {precision.name}"] = large_product(scale.matmul, precision.dtype, device)
    here = sum(map(len, plan))

    chosen = np.random.default_rng(1).permutation(np.concatenate(plan))[:BATCH]
    slow_steps = -(-captions // len(chosen))
    length = int(training.batches.lengths.max()) + 1
    inputs, targets = (part.to(device) for part in padded(training.batches, chosen, length))
    owner = np.searchsorted(training.data.first_caption, chosen, side="right") - 1
    plain_adam = torch.optim.Adam(training.decoder.parameters(), lr=training.args.learning_rate)

    def slow() -> None:
        features = training.views[0].gather(owner, device)
        padded_step(training.decoder, plain_adam, features, inputs, targets)

    seconds = interleaved(ways | {"slow": slow}, scale.repeats, device)

    part_of_batch = len(chosen) / scale.captions_encoded
    original = slow_steps * (seconds["encode"] * part_of_batch + seconds["slow"])
    cached = slow_steps * seconds["slow"]
    note = (
        f"ours {len(plan)} of {steps} steps, the other way 1 padded step of {slow_steps} ({length} time steps) and "
        f"{scale.captions_encoded} of {len(chosen)} images encoded, medians of {scale.repeats}"
    )
    what = f"{decoder}, {'512 x 1' if size == 'small' else '1024 x 3'}"
    work = 2 * multiply_adds(training, plan)
    names = [precision.name for precision in precisions]
    product = {name: 2 * scale.matmul**3 / seconds[f"product {name}"] for name in names}
    figures = []
    for name in names:
        ours_seconds = seconds[name] * captions / here
        against_original = quicker(
            PART, f"{what}, {name}: epoch / the original's way", ours_seconds, "the original's way", original, note=note
        )
        against_cached = quicker(
            PART, f"{what}, {name}: epoch / cached features", ours_seconds, "cached, padded, projection in the loop", cached
        )  # fmt: skip
        if name == names[-1]:  # what --precision auto takes
            against_original.must(">=", ENOUGH[decoder, size])
            if (decoder, size) == ("attention", "small"):
                against_cached.must(">=", 2.5)
        rates = faster(
            PART, f"{what}, {name}: captions/s", captions / ours_seconds, "the original's way", captions / original,
            "captions/s",
        )  # fmt: skip
        figures += [against_original, against_cached, rates]
        for against in dict.fromkeys(("fp32", name)):
            arithmetic = faster(
                PART, f"{what}, {name}: arithmetic / {against} product", work / seconds[name] / 1e9,
                f"{scale.matmul} x {scale.matmul} in {against}", product[against] / 1e9, "GFLOP/s",
            )  # fmt: skip
            arithmetic.limit = 1.0 if name == against else None
            if size == "small" and name == against == "fp32":
                arithmetic.must(">=", ARITHMETIC[decoder])
            figures.append(arithmetic)
    return figures
