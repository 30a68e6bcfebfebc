"""Caption images from a checkpoint alone, without a data set or a feature cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from captioning.checkpoints import load_checkpoint, load_weights
from captioning.dataset import Vocabulary
from captioning.decoders import build_decoder
from captioning.decoding import beam_search, sample
from captioning.distributed import pick_device
from captioning.encoders import ENCODE_BATCH, MANY, encoder_of
from captioning.features import decoded, stored_form, stored_kind
from captioning.images import VIEW_SETS, UnreadableImage
from captioning.io import UserError
from captioning.runs import find_checkpoint
from captioning.settings import Settings


class Caption(NamedTuple):
    """One caption of an image."""

    words: list[str]
    log_probability: float  # natural logarithm, of all words and of ending there
    attention: np.ndarray | None  # (words, 49), each row sums to one

    @property
    def text(self) -> str:
        return " ".join(self.words)


class Captioned(NamedTuple):
    """An image with its captions, best first, or with the reason why it has none."""

    path: Path
    captions: list[Caption]
    problem: str | None


class Captioner:
    """A checkpoint, ready to caption images anywhere.

    The captions are those of `--mode test`: the same views of an image go through the encoder, and their features are
    rounded as the cache stores them.
    """

    def __init__(self, model_path: Path, device: str = "auto", resnet_weights: str | None = None, workers: int = 1):
        """Load encoder and decoder.

        Args:
            model_path: as `runs.find_checkpoint` takes it.
            resnet_weights: as `EncoderSpec.find_weights` takes it. A path in the checkpoint is not followed.
            workers: threads that decode images.

        Raises:
            UserError: no such checkpoint, device or weights, or weights that are not those of training.
        """
        self.path = find_checkpoint(model_path)
        checkpoint = load_checkpoint(self.path)
        self.device, self.workers = pick_device(device), workers
        self.flags, self.split, self.epoch = checkpoint["flags"], checkpoint["split"], checkpoint["epoch"]
        self.tuned = checkpoint["decoding"]
        self.no_repeat_ngram = 0  # as `decoding.beam_search` takes it
        flags = self.flags
        self.views = VIEW_SETS[flags["views"]]
        self.spec = encoder_of(flags)
        weights, _ = self.spec.find_weights(resnet_weights, checkpoint["encoder"]["weights_hash"])
        self.encoder, self.expects_many = self.spec.build(weights), False
        self.encode = self.encoder.fast_form(self.device, many=False)
        self.vocabulary = Vocabulary(checkpoint["vocabulary"])
        self.decoder = build_decoder(flags, len(self.vocabulary), self.spec)
        load_weights(self.decoder, checkpoint["decoder"], self.path)
        self.decoder.to(self.device)

    def __str__(self) -> str:
        flags = self.flags
        return f"{self.path} (epoch {self.epoch}, {flags['decoder']} on {flags['encoder']}, {flags['dataset_type']})"

    def expect_many(self) -> None:
        """Take a second or two now, so that each image takes less time."""
        if not self.expects_many:
            self.encode, self.expects_many = self.encoder.fast_form(self.device), True

    def decoding(self, settings: Settings) -> tuple[int, float]:
        """Return beam size and length penalty: explicit ones, else those tuned for the checkpoint, else the defaults."""
        if self.tuned and not settings.explicit & {"beam_size", "length_penalty"}:
            return self.tuned["beam_size"], self.tuned["length_penalty"]
        return settings.beam_size, settings.length_penalty

    def caption(
        self, paths: Sequence[Path], beam_size: int, length_penalty: float, count: int = 1, attention: bool = False,
        top_p: float | None = None,
    ) -> Iterator[Captioned]:  # fmt: skip
        """Caption images in their order, a batch at a time, however many there are.

        Args:
            count: number of different captions of each; the beam may find fewer.
            attention: keep the attention of each word, if the decoder has attention.
            top_p: draw the captions from the nucleus of this probability (`decoding.sample`) rather than search.

        Raises:
            UserError: the device's memory is too small.
        """
        if len(paths) * len(self.views) >= MANY:
            self.expect_many()
        for batch in self.decoded(paths):
            pixels = [found for _, found in batch if not isinstance(found, UnreadableImage)]
            captions = iter(self.decode(pixels, beam_size, length_penalty, count, attention, top_p) if pixels else ())
            for path, found in batch:
                if isinstance(found, UnreadableImage):
                    yield Captioned(path, [], str(found))
                else:
                    yield Captioned(path, next(captions), None)

    def decoded(self, paths: Sequence[Path]) -> Iterator[list[tuple[Path, np.ndarray | UnreadableImage]]]:
        """Yield images, ENCODE_BATCH at a time, as pixels (views, size, size, 3) or as the reason why they cannot be read.

        Threads decode one batch ahead.
        """

        def read(path: Path) -> np.ndarray | UnreadableImage:
            try:
                return self.spec.load_views(path, self.views)
            except UnreadableImage as error:
                return error

        with ThreadPoolExecutor(self.workers) as pool:
            ahead: deque[list[tuple[Path, Future[np.ndarray | UnreadableImage]]]] = deque()
            for start in range(0, len(paths), ENCODE_BATCH):
                ahead.append([(path, pool.submit(read, path)) for path in paths[start : start + ENCODE_BATCH]])
                if len(ahead) > 1:
                    yield [(path, future.result()) for path, future in ahead.popleft()]
            yield from ([(path, future.result()) for path, future in batch] for batch in ahead)

    def decode(
        self, pixels: list[np.ndarray], beam_size: int, length_penalty: float, count: int, attention: bool,
        top_p: float | None,
    ) -> list[list[Caption]]:  # fmt: skip
        """Caption up to ENCODE_BATCH decoded images, uint8 (views, size, size, 3) each."""
        try:
            members = []
            for view in np.stack(pixels, 1):
                grids = self.encode(view).to(torch.float16).cpu().numpy()  # (I, 49, C)
                rows = stored_form(grids, stored_kind(not self.decoder.uses_grid, self.flags["feature_type"]))
                members.append((self.decoder, decoded(torch.from_numpy(rows)).to(self.device)))
            if top_p is not None:
                return self.drawn(members[0][1], count, top_p)
            found = beam_search(
                members, beam_size, self.flags["max_length"], length_penalty, attention, count, self.no_repeat_ngram
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of {self.device} is too small: use a smaller --beam_size than {beam_size}, or --device cpu"
            ) from error
        return [
            [Caption(self.vocabulary.decode(h.ids), h.log_probability, h.attention) for h in hypotheses[:count]]
            for hypotheses in found
        ]

    def drawn(self, features: torch.Tensor, count: int, top_p: float) -> list[list[Caption]]:
        """Draw up to `count` different captions of each image at random; the likeliest come first."""
        samples = sample(self.decoder, features, count, self.flags["max_length"], top_p)
        captions = [
            Caption(self.vocabulary.decode(words), float(log_probability), None)
            for words, log_probability in zip(samples.words, samples.log_probabilities, strict=True)
        ]
        images = (captions[first : first + count] for first in range(0, len(captions), count))
        return [
            sorted({each.text: each for each in found}.values(), key=lambda each: -each.log_probability)
            for found in images
        ]
