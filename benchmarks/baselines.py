"""The slow ways: what the project is measured against."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from captioning.batches import BatchMaker
from captioning.dataset import EOS, PAD, SOS
from captioning.decoders import Decoder
from captioning.encoders import ENCODE_BATCH, Encoder
from captioning.feature_store import FeatureFile, version_of
from captioning.images import load_views

Form = Callable[[np.ndarray], torch.Tensor]  # an encoder: uint8 (B, size, size, 3) -> float (B, regions, C)


class Pictures(Dataset[torch.Tensor]):
    """Images opened and resized by Pillow, as tensors in 0..255, one after another."""

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with Image.open(self.paths[number]) as image:
            pixels = np.array(image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float()


def naive_pass(encoder: Encoder, paths: Sequence[Path], batch_size: int, device: torch.device) -> float:
    """Seconds for these images of a DataLoader with a worker per core and an eager encoder in PyTorch's own layout.

    The clock starts at the second batch, when the workers are up and have filled their queues.
    """
    extra = [paths[n % len(paths)] for n in range(len(paths) + batch_size)]
    loader = DataLoader(Pictures(extra, encoder.spec.image_size), batch_size, num_workers=os.cpu_count() or 1)
    with torch.inference_mode():
        for number, pixels in enumerate(loader):
            if number == 0:
                start = time.perf_counter()
            else:
                encoder(pixels.to(device)).cpu()
    return time.perf_counter() - start


def frozen_graph(encoder: Encoder) -> Form:
    """The encoder as the project ran it on CPUs before OpenVINO: traced, and frozen."""
    example = torch.zeros(2, 3, encoder.spec.image_size, encoder.spec.image_size, dtype=torch.uint8)
    encoder.to(memory_format=torch.channels_last)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(encoder, example.to(memory_format=torch.channels_last), check_trace=False)
        run = torch.jit.freeze(traced)
    return torch.inference_mode()(lambda pixels: run(torch.from_numpy(pixels).permute(0, 3, 1, 2)))


def compiled(encoder: Encoder, pixels: np.ndarray) -> Form | None:
    """The encoder through `torch.compile` with frozen weights, for batches like this; None without a C++ compiler."""
    import torch._inductor.config as inductor

    encoder.to(memory_format=torch.channels_last)
    run = torch.compile(encoder)

    def encode(pixels: np.ndarray) -> torch.Tensor:
        with inductor.patch(freezing=True), torch.inference_mode():
            return run(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    try:
        encode(pixels)
    except Exception as error:
        print(f"Not compiled: {str(error).splitlines()[-1][:120]}")
        return None
    return encode


def onnx_runtime(encoder: Encoder, directory: Path) -> Form | None:
    """The encoder through ONNX Runtime; None where requirements-export.txt is not installed."""
    try:
        from captioning.modes.export import to_onnx

        example = torch.zeros(2, 3, encoder.spec.image_size, encoder.spec.image_size, dtype=torch.uint8)
        session = to_onnx(encoder, {"pixels": example}, {"pixels": {0: "R"}}, ["features"], directory / "encoder.onnx")
    except ImportError:
        return None
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.transpose(0, 3, 1, 2)})[0])


def view_by_view(
    encode: Form, paths: Sequence[Path], size: int, views: Sequence[str], files: Sequence[FeatureFile]
) -> None:
    """Encode as the project did before: a pass for each view, which opens every image anew, and the encoder in one thread.

    Threads read three batches ahead.
    """
    for view, file in zip(views, files, strict=True):

        def read(path: Path, view: str = view) -> np.ndarray:
            return load_views(path, size, [view])[0]

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for names, pixels in read_ahead(pool, read, paths):
                grids = encode(pixels)[: len(names)].to(torch.float16).numpy()
                file.append([path.name for path in names], [version_of(path) for path in names], grids)


def read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[Path], np.ndarray], paths: Sequence[Path]
) -> Iterator[tuple[Sequence[Path], np.ndarray]]:
    """Yield batches of ENCODE_BATCH images, the last filled up with black; three are read ahead."""
    ahead = deque[tuple[Sequence[Path], list]]()
    starts = range(0, len(paths), ENCODE_BATCH)
    for start in [*starts, *[len(paths)] * 3]:
        part = paths[start : start + ENCODE_BATCH]
        ahead.append((part, [pool.submit(read, path) for path in part]))
        if len(ahead) > 3 and (batch := ahead.popleft())[0]:
            squares = [future.result() for future in batch[1]]
            yield batch[0], np.stack(squares + [np.zeros_like(squares[0])] * (ENCODE_BATCH - len(squares)))


def padded(batches: BatchMaker, captions: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (R, length) of these captions, all padded to one length."""
    inputs = np.full((len(captions), length), PAD, dtype=np.int64)
    for row, caption in enumerate(captions):
        words = batches.lookup[batches.tokens[batches.starts[caption] :][: batches.lengths[caption]]]
        inputs[row, : len(words) + 1] = [SOS, *words]
    targets = np.concatenate([inputs[:, 1:], np.full((len(captions), 1), PAD)], 1)
    targets[np.arange(len(captions)), batches.lengths[captions]] = EOS
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def padded_loss(decoder: Decoder, features: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss per token of the same decoder, the original's way.

    Everything that belongs to an image (its projection, its keys) is computed for every caption, an LSTM cell
    is called for every layer of every step, all steps of the longest caption of the data set are run, and
    the vocabulary projection is within that loop.

    Args:
        features: (R, C) or (R, 49, C), one per caption.
        inputs, targets: (R, T), see `padded`.
    """
    state = decoder.begin(features)
    logits = []
    for words in inputs.unbind(1):
        state, output = decoder.step(state, words)
        logits.append(decoder.logits(output.hidden_out))
    return F.cross_entropy(torch.stack(logits, 1).flatten(0, 1), targets.flatten(), ignore_index=PAD)


def padded_step(
    decoder: Decoder, optimizer: torch.optim.Optimizer, features: torch.Tensor, inputs: torch.Tensor,
    targets: torch.Tensor,
) -> None:  # fmt: skip
    """A training step the original's way."""
    optimizer.zero_grad()
    padded_loss(decoder.train(), features, inputs, targets).backward()
    optimizer.step()
