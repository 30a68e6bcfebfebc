"""Batches of whole images as packed sequences, without padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from captioning.data.dataset import EOS, SOS, UNK, CaptionSet, Vocabulary, concatenate_ranges


class Batch(NamedTuple):
    """Captions of whole images as one packed sequence: no padding anywhere.

    Rows (captions) are sorted by falling length; tokens lie time step after time step, so that step t
    holds the first `batch_sizes[t]` rows, which are all that have not ended. This is the layout of
    `torch.nn.utils.rnn.PackedSequence`. I images, R captions, N tokens, T time steps.
    """

    images: np.ndarray  # int64 (I,) positions in the caption set
    row_image: torch.Tensor  # int64 (R,) each caption's image, 0 to I - 1
    inputs: torch.Tensor  # int64 (N,) <SOS>, w1, ..., wn of every caption
    targets: torch.Tensor  # int64 (N,) w1, ..., wn, <EOS>
    batch_sizes: torch.Tensor  # int64 (T,) rows at each time step, on the CPU
    token_row: torch.Tensor  # int64 (N,) each token's caption, 0 to R - 1
    slots: torch.Tensor  # int64 (N,) each token's place in an (I, S) table of the images' tokens
    slots_per_image: int  # S

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`, but for `batch_sizes`, which PyTorch takes from the CPU."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("row_image", "inputs", "targets", "token_row", "slots")
        }
        return self._replace(**moved)


class Collator:
    """Makes batches of whole images from a split.

    Args:
        max_length: words of a caption that are used; the rest is cut off.
    """

    def __init__(self, data: CaptionSet, vocabulary: Vocabulary, max_length: int):
        self.names = data.names
        self.first_caption = data.first_caption
        self.words = len(vocabulary)
        self.lookup = np.array([vocabulary.id_of.get(word, UNK) for word in data.tokens.words], dtype=np.int32)
        self.tokens = data.tokens.ids
        self.starts = data.tokens.offsets[:-1]
        self.lengths = np.minimum(np.diff(data.tokens.offsets), max_length)

    def plan(self, images: np.ndarray, batch_size: int) -> list[np.ndarray]:
        """Group the captions of `images`, in their order, into batches of at most `batch_size` captions.

        Returns arrays of caption numbers. An image with more captions than `batch_size` is spread over several.
        """
        captions = concatenate_ranges(self.first_caption[images], self.first_caption[images + 1])
        cuts, position, filled = [], 0, 0
        for count in (self.first_caption[images + 1] - self.first_caption[images]).tolist():
            if filled and filled + count > batch_size:
                cuts.append(position)
                filled = 0
            position += count
            filled += count
            while filled > batch_size:
                filled -= batch_size
                cuts.append(position - filled)
        return np.split(captions, cuts) if len(captions) else []

    def word_counts(self, images: np.ndarray) -> torch.Tensor:
        """Count each word, and `<EOS>`, as a target in the captions of `images`: float32 (V,)."""
        counts = torch.zeros(self.words)
        for captions in self.plan(images, 4096):
            counts += torch.bincount(self.collate(captions).targets, minlength=self.words)
        return counts

    def owner(self, captions: np.ndarray) -> np.ndarray:
        """Return the image of each caption: (R,) -> int64 (R,)."""
        return np.searchsorted(self.first_caption, captions, side="right") - 1

    def collate(self, captions: np.ndarray) -> Batch:
        """Return the batch of the captions with these numbers."""
        owner = self.owner(captions)
        return pack_captions(self.tokens, self.starts[captions], self.lengths[captions], owner, self.lookup)[0]


def pack_captions(
    words: np.ndarray, starts: np.ndarray, lengths: np.ndarray, owner: np.ndarray, lookup: np.ndarray | None = None
) -> tuple[Batch, np.ndarray]:
    """Pack the captions of one flat array, caption c at `words[starts[c]:starts[c] + lengths[c]]`.

    Args:
        words: int (tokens,) vocabulary ids, or indices into `lookup`, which holds vocabulary ids.
        owner: int64 (R,) the image of each caption.

    Returns:
        the batch, and for each of its rows the index of the given caption, int64 (R,).
    """
    order = np.argsort(-lengths, kind="stable")
    starts, owner, steps = starts[order], owner[order], lengths[order] + 1  # the words and <EOS>
    images, row_image = np.unique(owner, return_inverse=True)
    running = np.arange(steps.max())[:, None] < steps[None, :]  # (T, R)
    time, row = np.nonzero(running)  # packed order: step by step
    word = starts[row] + time
    after, before = words[np.minimum(word, len(words) - 1)], words[word - 1]
    if lookup is not None:
        after, before = lookup[after], lookup[before]
    targets = np.where(time == steps[row] - 1, EOS, after)
    inputs = np.where(time == 0, SOS, before)
    # Where each token lies among its image's tokens: the image's earlier rows, then its own time.
    by_image = np.argsort(row_image, kind="stable")
    earlier = np.cumsum(steps[by_image]) - steps[by_image]
    first = earlier[np.searchsorted(row_image[by_image], np.arange(len(images)))]
    base = np.empty(len(order), dtype=np.int64)
    base[by_image] = earlier - first[row_image[by_image]]
    per_image = int(np.bincount(row_image, weights=steps).max())
    slots = row_image[row] * per_image + base[row] + time
    as_tensor = lambda values: torch.from_numpy(values.astype(np.int64))  # noqa: E731
    batch = Batch(
        images, as_tensor(row_image), as_tensor(inputs), as_tensor(targets),
        as_tensor(running.sum(1)), as_tensor(row), as_tensor(slots), per_image,
    )  # fmt: skip
    return batch, order
