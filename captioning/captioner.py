"""Caption images from a checkpoint alone, without a data set or a feature cache.

`Captioner.load` reads a model, a `Captioner` is called with images, and a `Captioned` is what it says of one. The
command line and the page use the same. docs/python.md tells it with examples.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, TypeGuard, Unpack, cast, overload

import numpy as np
from PIL import Image

from captioning.config.flags import FLAGS, chosen_beam
from captioning.data.dataset import Vocabulary
from captioning.data.images import ImageSource, UnreadableImage, grid_side, images_below, open_image
from captioning.decoding.beam_search import Reading, beam_search, sample
from captioning.decoding.confidence import confidence_of, table_of
from captioning.decoding.consensus import NgramHead, search_by_consensus
from captioning.io import UserError, not_installed, sha256
from captioning.runs import plots
from captioning.runs.directories import PRETRAINED_MODEL, find_checkpoint
from captioning.runs.forms import read_exported

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# --------------------------------------------------------------------------------------------------
# Results


@dataclass(frozen=True, eq=False)
class Word:
    """A word of a caption."""

    text: str
    probability: float  # given the image and the words before it
    attention: np.ndarray | None  # (7, 7) where the model looked for it, row by row from the top; sums to one

    def __repr__(self) -> str:
        return f"Word({self.text!r}, {self.probability:.3f})"


@dataclass(frozen=True, eq=False)
class Caption:
    """One caption of an image. Its probability is the product of its words' and of `end_probability`."""

    words: list[Word]
    log_probability: float  # natural logarithm, of all words and of ending there
    end_probability: float  # of ending after these words; 1 where the longest length of a caption ended it
    confidence: float | None = None  # the share of its content words that people are expected to say; None unless known

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def attention(self) -> np.ndarray | None:
        """The words' maps as `attention_visualization` takes them, (words, 49); None without words or attention."""
        maps = [word.attention.ravel() for word in self.words if word.attention is not None]
        return np.stack(maps) if maps else None

    def __repr__(self) -> str:
        return f"Caption({self.text!r}, log_probability={self.log_probability:.2f})"


@dataclass(frozen=True, eq=False)
class Captioned:
    """An image with its captions, best first, or with the reason why it has none.

    `text`, `words`, `log_probability` and `confidence` are those of the best caption. Of an image with a `problem` they
    raise UnreadableImage.
    """

    source: ImageSource  # as it was given
    captions: list[Caption]
    problem: str | None = None

    @property
    def path(self) -> Path | None:
        """The image's file, None of an image that was given as pixels."""
        return self.source if isinstance(self.source, Path) else None

    @property
    def best(self) -> Caption:
        if self.problem is not None:
            raise UnreadableImage(self.problem)
        return self.captions[0]

    @property
    def text(self) -> str:
        return self.best.text

    @property
    def words(self) -> list[Word]:
        return self.best.words

    @property
    def log_probability(self) -> float:
        return self.best.log_probability

    @property
    def confidence(self) -> float | None:
        return self.best.confidence

    @property
    def alternatives(self) -> list[Caption]:
        """The other captions, best first; there are some with `num_captions` above 1."""
        return self.captions[1:]

    def plot(self) -> Figure:
        """Draw the photo with its best caption and, if the model has attention, where it looked for each word.

        Raises:
            UnreadableImage: the image has a `problem`, or its file can no longer be read.
        """
        from attention_visualization import attention_figure

        best, name = self.best, "" if self.path is None else self.path.name
        photo = open_image(self.source, at_least=900)
        if best.attention is not None:
            return attention_figure(photo, [word.text for word in best.words], best.attention, name)
        return plots.captions_figure([{"image": photo, "name": name, "caption": best.text, "references": []}])

    def __repr__(self) -> str:
        if self.problem is not None:
            return f"Captioned(problem={self.problem!r})"
        return f"Captioned({'' if self.path is None else f'{str(self.path)!r}, '}{self.text!r})"


# --------------------------------------------------------------------------------------------------
# How captions are found


class Decoding(NamedTuple):
    """How captions are found: the flags of these names, resolved."""

    beam_size: int
    length_penalty: float
    num_captions: int
    no_repeat_ngram: int
    top_p: float | None
    consensus: str


class DecodingOptions(TypedDict, total=False):
    """The same as keyword arguments; what is not given, or None, has the value that `--mode caption` takes."""

    beam_size: int | None  # hypotheses kept; at least num_captions
    length_penalty: float | None  # more makes captions longer
    num_captions: int | None  # different captions of each image; the beam may find fewer
    no_repeat_ngram: int | None  # no caption has the same N words twice; 0 for no such rule
    consensus: str | None  # "on" takes the caption with the best evidence, where the model has any; or "off"
    top_p: float | None  # draw captions from the likeliest words that together have this probability


OneImage = ImageSource | str | os.PathLike[str]


class Model(Protocol):
    """What a captioner reads images with: `models.pytorch`, or `models.exported`, which needs no PyTorch."""

    device: str
    has_attention: bool

    @property
    def out_of_memory(self) -> type[Exception]:
        """What it raises where memory runs out."""

    def expect_many(self) -> None:
        """Take a second or two now, so that each image takes less time."""

    def load_views(self, source: ImageSource) -> np.ndarray:
        """Return an image as uint8 (views, size, size, 3). Raises UnreadableImage."""

    def read(self, pixels: np.ndarray) -> Reading:
        """Read images, uint8 (I, views, size, size, 3)."""


IMAGES_TOGETHER = 32  # that are read and decoded as one batch
MANY = 12  # images from which on `Model.expect_many` saves more time than it takes


class Captioner:
    """A model that captions images anywhere.

    The captions are those of `--mode test`: the same views of an image go through the encoder, and their features are
    rounded as the cache stores them. Several threads may call one captioner. That brings no speed, since each
    call uses all cores.
    """

    def __init__(self, model: Model, facts: Mapping[str, Any], path: Path, workers: int | None):
        """Args: facts: what `load_checkpoint` or `read_exported` read from `path`; workers: as in `load`."""
        self.model, self.path, self.device = model, path, model.device
        self.workers = workers or os.cpu_count() or 1
        self.flags, self.split, self.epoch = facts["flags"], facts["split"], facts["epoch"]
        self.tuned, self.calibration = facts["decoding"], facts["confidence"]
        self.vocabulary = Vocabulary(facts["vocabulary"])
        self.head = facts["consensus"] and NgramHead(len(self.vocabulary), facts["consensus"])
        self.generator = np.random.default_rng()  # of what top_p draws

    @classmethod
    def load(
        cls, name_or_path: str | os.PathLike[str] = PRETRAINED_MODEL, *, device: str = "auto", resnet_weights: str | None = None,
        workers: int | None = None,
    ) -> Captioner:  # fmt: skip
        """Load a model. An exported folder runs without PyTorch, on the processor, unless a device is named.

        Args:
            name_or_path: a checkpoint, a run directory, a folder of runs, an exported folder, or the name of a model
                that comes with the package (`directories.find_checkpoint`).
            device: `auto`, `cpu`, `cuda` or `mps`.
            resnet_weights: as `EncoderSpec.find_weights` takes it. A path in the checkpoint is not followed.
            workers: threads that decode images; as many as there are cores unless given.

        Raises:
            UserError: no such model, device or weights, or weights that are not those of training.
        """
        path = find_checkpoint(Path(name_or_path))
        if path.suffix == ".safetensors" and device in ("auto", "cpu"):
            from captioning.models.exported import ExportedModel

            facts = read_exported(path)
            return cls(ExportedModel(facts, path), facts, path, workers)
        if importlib.util.find_spec("torch") is None:
            raise not_installed("torch")
        from captioning.models.pytorch import PyTorchModel
        from captioning.runs.checkpoints import load_checkpoint

        facts = load_checkpoint(path)
        return cls(PyTorchModel(facts, path, device, resnet_weights), facts, path, workers)

    def __str__(self) -> str:
        flags = self.flags
        return f"{self.path} (epoch {self.epoch}, {flags['decoder']} on {flags['encoder']}, {flags['dataset_type']})"

    def fingerprint(self) -> str:
        """Return a hash of the model; an exported folder's config.json has those of its other files."""
        return sha256(self.path.with_name("config.json") if self.path.suffix == ".safetensors" else self.path)[:16]

    def decoding(self, **options: Unpack[DecodingOptions]) -> Decoding:
        """Resolve how captions are found: beam size and length penalty as given, else tuned, else the flags' defaults.

        Raises:
            TypeError: an unknown option.
            UserError: a value out of range, or options that contradict each other.
        """
        if unknown := options.keys() - set(Decoding._fields):
            raise TypeError(f"unknown option {min(unknown)}: captions are found by {', '.join(Decoding._fields)}")
        given = {name: checked(name, value) for name, value in options.items() if value is not None}
        searching = [name for name in ("beam_size", "length_penalty", "no_repeat_ngram", "consensus") if name in given]
        if searching and "top_p" in given:
            raise UserError(f"{searching[0]} has no effect with top_p, which samples captions: leave one of them out")
        values = {name: FLAGS[name].default for name in Decoding._fields} | given
        values |= chosen_beam(given, self.tuned, self.head is not None and values["consensus"] == "on")
        return Decoding(**values | {"beam_size": max(values["beam_size"], values["num_captions"])})

    def by_consensus(self, how: Decoding) -> bool:
        return bool(self.head) and how.consensus == "on" and how.beam_size > 1 and how.top_p is None

    def calibration_of(self, how: Decoding) -> Mapping[str, Any] | None:
        """Return what gives captions that are found in this way their confidence, None where they have none."""
        return table_of(self.calibration, self.by_consensus(how)) if how.top_p is None else None

    # Paths, files and arrays are iterable too: the first overload that fits decides. A path may be a folder's.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, images: str | os.PathLike[str], **options: Unpack[DecodingOptions]
    ) -> Captioned | Any: ...

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, images: ImageSource, **options: Unpack[DecodingOptions]
    ) -> Captioned: ...

    @overload
    def __call__(self, images: Iterable[OneImage], **options: Unpack[DecodingOptions]) -> list[Captioned]: ...

    def __call__(self, images: OneImage | Iterable[OneImage], **options: Unpack[DecodingOptions]) -> Any:
        """Caption an image, a folder or several of them.

        Args:
            images: a file, a PIL image, uint8 pixels (height, width, 3), grey or with transparency too, a binary file,
                or a folder, with all below it; or a list of any of these.
            options: see `DecodingOptions`.

        Returns:
            one result for one image, a list of results for a folder or a list. In a list an image that cannot be read
            has a `problem`.

        Raises:
            UnreadableImage: the one image cannot be read.
            UserError: an option out of range, or the device's memory is too small.
            TypeError: something that is no image, or an unknown option.
        """
        sources = [as_source(image) for image in (images if is_list(images) else [images])]
        if not is_list(images) and not is_folder(sources[0]):
            (result,) = self.caption(sources, **options)
            if result.problem is not None:
                raise UnreadableImage(result.problem)
            return result
        found: list[ImageSource] = []
        problems: list[Captioned] = []
        for source in sources:
            if is_folder(source):
                lines: list[str] = []
                found += images_below(source, lines)
                problems += [Captioned(source, [], line) for line in lines]
            else:
                found.append(source)
        return [*self.caption(found, **options), *problems]

    def caption(self, images: Sequence[OneImage], **options: Unpack[DecodingOptions]) -> Iterator[Captioned]:
        """Caption images in their order, a batch at a time, however many there are: for more than fit into a list.

        Args and errors as for a call with a list; folders are not looked into.
        """
        how = self.decoding(**options)
        sources = [as_source(image) for image in images]
        if len(sources) >= MANY:
            self.model.expect_many()
        for batch in self.decoded(sources):
            pixels = [found for _, found in batch if not isinstance(found, UnreadableImage)]
            captions = iter(self.decode(pixels, how) if pixels else ())
            for source, found in batch:
                if isinstance(found, UnreadableImage):
                    yield Captioned(source, [], str(found))
                else:
                    yield Captioned(source, next(captions))

    def decoded(
        self, sources: Sequence[ImageSource]
    ) -> Iterator[list[tuple[ImageSource, np.ndarray | UnreadableImage]]]:
        """Yield images, IMAGES_TOGETHER at a time, as pixels (views, size, size, 3) or as the reason why they cannot be read.

        Threads decode one batch ahead.
        """

        def read(source: ImageSource) -> tuple[ImageSource, np.ndarray | UnreadableImage]:
            try:
                return source, self.model.load_views(source)
            except UnreadableImage as error:
                return source, error

        with ThreadPoolExecutor(self.workers) as pool:
            starts = range(0, len(sources), IMAGES_TOGETHER)
            batches = (pool.map(read, sources[start : start + IMAGES_TOGETHER]) for start in starts)
            batch = next(batches, None)
            while batch is not None:
                ahead = next(batches, None)
                yield list(batch)
                batch = ahead

    def decode(self, pixels: list[np.ndarray], how: Decoding) -> list[list[Caption]]:
        """Caption up to IMAGES_TOGETHER decoded images, uint8 (views, size, size, 3) each.

        Raises:
            UserError: the device's memory is too small.
        """
        try:
            reading, longest = self.model.read(np.stack(pixels)), self.flags["max_length"]
            if how.top_p is not None:
                found = sample(reading, how.num_captions, longest, how.top_p, self.generator)
            elif self.head and self.by_consensus(how):
                search = (how.beam_size, longest, how.length_penalty, True, how.no_repeat_ngram)
                found = search_by_consensus(reading, [self.head], *search)
            else:
                search = (how.beam_size, longest, how.length_penalty, True, how.num_captions)
                found = beam_search(reading, *search, how.no_repeat_ngram)
        except self.model.out_of_memory as error:
            raise UserError(
                f"the memory of {self.device} is too small: use a smaller beam size than {how.beam_size}, or the device cpu"
            ) from error
        table = self.calibration_of(how)
        return [
            [self.caption_of(h.ids, h.log_probabilities, h.attention, table) for h in hypotheses[: how.num_captions]]
            for hypotheses in found
        ]

    def caption_of(
        self, ids: Iterable[int], log_probabilities: Sequence[float], attention: np.ndarray | None,
        table: Mapping[str, Any] | None = None,
    ) -> Caption:  # fmt: skip
        """Put a caption together. Args: as in `Hypothesis`; table: as `calibration_of` returns it."""
        texts, maps = self.vocabulary.decode(ids), cast(Iterable[np.ndarray | None], repeat(None))
        if attention is not None:
            side = grid_side(attention.shape[1])
            maps = attention.reshape(-1, side, side)  # (words, 49) -> (words, 7, 7)
        chances = [math.exp(min(each, 0.0)) for each in log_probabilities]  # float32 may round a mean to just above 0
        words = [Word(*parts) for parts in zip(texts, chances, maps, strict=False)]
        end = chances[-1] if len(chances) > len(words) else 1.0
        return Caption(words, float(sum(log_probabilities)), end, confidence_of(table, log_probabilities))


def checked(name: str, value: Any) -> Any:
    """Return the value of an option as the command line would parse it. Raises UserError where it would refuse it."""
    try:
        return FLAGS[name].parse(str(value))  # type: ignore[misc]  # none of these options is a switch
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None


def is_list(images: OneImage | Iterable[OneImage]) -> TypeGuard[Iterable[OneImage]]:
    one = isinstance(images, str | bytes | os.PathLike | Image.Image | np.ndarray) or hasattr(images, "read")
    return isinstance(images, Iterable) and not one


def as_source(image: Any) -> ImageSource:
    """Return an image as `open_image` takes it, or a folder as its path. Raises TypeError where it is neither."""
    if isinstance(image, str | os.PathLike):
        return Path(image)
    if isinstance(image, Image.Image | np.ndarray) or hasattr(image, "read"):
        return cast(ImageSource, image)
    what = "a path, a PIL image, uint8 pixels as a NumPy array, a binary file, or a list of these"
    raise TypeError(f"{type(image).__name__} is not an image: give {what}")


def is_folder(source: ImageSource) -> TypeGuard[Path]:
    return isinstance(source, Path) and os.path.isdir(source)
