"""An exported folder (`modes/export.py`), run by ONNX Runtime: captions without PyTorch.

Three graphs share the weights in `model.safetensors`. In their shapes W is the number of views, I of images, S of rows
of an image, T of words so far:

    encoder.onnx   pixels uint8 (B, size, size, 3) -> features (B, cells, C)
    begin.onnx     features (W, I, cells, C) or their mean (W, I, C) -> pooled (I, D), and the state
    step.onnx      words (I, S) and the state -> log_probabilities (I, S, V), the next state and, with attention,
                   alphas (I, S, cells) of the first view

The state is any number of tensors, of rows (..., W, I, S, ...) or of images (..., W, I, ...). `step` gives back the
first kind as `next_NAME`; axes that are called T grow by a word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors import safe_open

from captioning.data.dataset import PAD, SOS, UNK
from captioning.data.images import VIEW_SETS, ImageSource, load_views
from captioning.decoding.beam_search import Banned, NextWords
from captioning.encoders.feature_store import dequantize, stored_form
from captioning.io import EXPORTED_WEIGHTS, UserError, first_line
from captioning.models.graphs import Stored, check_graph, stored_tensors
from captioning.runs.forms import GRAPHS

ENCODE_BATCH = 8  # views that go through the encoder together: the processor's cache holds their activations


class ExportedModel:
    """See `captioner.Model`."""

    out_of_memory = MemoryError
    device = "cpu"

    def __init__(self, model: Mapping[str, Any], path: Path):
        """Check and load the graphs.

        Args:
            model: what `forms.read_exported` read from `path`.

        Raises:
            UserError: a graph is not one that `--mode export` writes.
        """
        self.input, self.views = model["input"], VIEW_SETS[model["flags"]["views"]]
        self.vocabulary_size = len(model["vocabulary"])
        tensors = stored_tensors(path)
        self.encoder, self.begin, self.advance = (open_graph(path.with_name(name), tensors) for name in GRAPHS)
        names = [entry.name for entry in self.advance.get_inputs()[1:]]
        made = [entry.name for entry in self.begin.get_outputs()]
        given = [entry.name for entry in self.advance.get_outputs()]
        self.changing = [name.removeprefix("next_") for name in given if name.startswith("next_")]
        self.has_attention = "alphas" in given
        expected = ["log_probabilities", *(f"next_{name}" for name in self.changing), *["alphas"] * self.has_attention]
        # Where a tensor of the state has its images, and whether rows follow.
        self.axes = {
            entry.name: entry.shape.index("I") for entry in self.advance.get_inputs()[1:] if "I" in entry.shape
        }
        self.has_rows = {entry.name: "S" in entry.shape for entry in self.advance.get_inputs()}
        read = [[entry.name for entry in each.get_inputs()] for each in (self.encoder, self.begin)]
        if (
            read != [["pixels"], ["features"]]
            or self.advance.get_outputs()[0].shape != ["I", "S", self.vocabulary_size]
            or made != ["pooled", *names]
            or given != expected
            or set(self.axes) != set(names)
            or not set(names) >= set(self.changing)
        ):
            raise UserError(f"{path.parent}: its graphs do not belong together. Export it again")

    def expect_many(self) -> None:
        """Do nothing: it is as fast as it can be."""

    def load_views(self, source: ImageSource) -> np.ndarray:
        """Return an image as uint8 (views, size, size, 3). Raises UnreadableImage."""
        return load_views(source, self.input["image_size"], self.views, self.input["interpolation"])

    def read(self, pixels: np.ndarray) -> ExportedReading:
        """Read images, uint8 (I, views, size, size, 3)."""
        images = pixels.swapaxes(0, 1).reshape(-1, *pixels.shape[2:])  # (W x I, size, size, 3), view by view
        batches = (images[start : start + ENCODE_BATCH] for start in range(0, len(images), ENCODE_BATCH))
        grids = np.concatenate([run(self.encoder, {"pixels": batch})[0] for batch in batches])  # (W x I, cells, C)
        rows = stored_form(grids, self.input["means"])
        features = rows.astype(np.float32) if self.input["means"] else dequantize(rows)
        return ExportedReading(self, features.reshape(len(self.views), len(pixels), *features.shape[1:]))


class ExportedReading:
    """See `beam_search.Reading`."""

    def __init__(self, model: ExportedModel, features: np.ndarray):
        """Args: features: (W, I, cells, C) or (W, I, C)."""
        self.model, self.images, self.rows = model, features.shape[1], features.shape[1]
        self.vocabulary_size, self.has_attention = model.vocabulary_size, model.has_attention
        pooled, *state = run(model.begin, {"features": features})
        self.pooled = [pooled]
        self.state = dict(zip([entry.name for entry in model.begin.get_outputs()][1:], state, strict=True))

    def step(self, ids: np.ndarray, most: int, banned: Banned | None = None) -> NextWords:
        words = ids.reshape(self.images, -1)  # (I, S)
        log_probabilities, *rest = run(self.model.advance, {"words": words, **self.state})
        self.state |= zip(self.model.changing, rest, strict=False)
        log_probabilities = log_probabilities.reshape(len(ids), -1)  # (rows, V)
        log_probabilities[:, [PAD, SOS, UNK]] = -np.inf
        if banned is not None:
            log_probabilities[banned] = -np.inf
        if most < self.vocabulary_size:
            likeliest = np.argpartition(-log_probabilities, most, 1)[:, :most]
        else:
            likeliest = np.broadcast_to(np.arange(self.vocabulary_size), log_probabilities.shape)
        values = np.take_along_axis(log_probabilities, likeliest, 1)
        order = np.argsort(-values, 1, kind="stable")
        alphas = rest[-1].reshape(len(ids), -1) if self.has_attention else None
        return NextWords(np.take_along_axis(likeliest, order, 1), np.take_along_axis(values, order, 1), alphas)

    def select(self, rows: np.ndarray, images: np.ndarray | None = None) -> None:
        before = self.rows // self.images  # of an image
        image, row = np.divmod(rows.reshape(self.images if images is None else len(images), -1), before)  # (I, S) each
        for name, tensor in self.state.items():
            axis = self.model.axes[name]
            if self.model.has_rows[name]:
                self.state[name] = tensor[(slice(None),) * axis + (image, row)]
            elif images is not None:
                self.state[name] = tensor.take(images, axis)
        self.images, self.rows = len(image), len(rows)


def run(session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a graph. Raises UserError where it fails, MemoryError where that is for want of memory."""
    try:
        outputs: list[np.ndarray] = session.run(
            None, {name: np.ascontiguousarray(each) for name, each in inputs.items()}
        )
        return outputs
    except Exception as error:  # ONNX Runtime raises its own, of no common base
        if "allocate" in str(error) or "bad_alloc" in str(error):
            raise MemoryError(first_line(error)) from error
        raise UserError(
            f"a graph of the exported model cannot be run: {first_line(error)[:200]}. Export it again"
        ) from error


def open_graph(path: Path, tensors: Mapping[tuple[int, int], Stored]) -> onnxruntime.InferenceSession:
    """Check a graph and load it, with its weights.

    Raises:
        UserError: it is not one that `--mode export` writes.
    """
    content = path.read_bytes()
    weights = check_graph(content, path, tensors)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    options.log_severity_level = 4  # what fails is raised: nothing is printed beside it
    try:
        # Not by their path, which ONNX Runtime refuses where the file is a link, as in the hub's cache.
        with safe_open(path.with_name(EXPORTED_WEIGHTS), "numpy") as file:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(file.get_tensor(name)) for name in weights.values()]
        options.add_external_initializers(list(weights), values)
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own, of no common base
        raise UserError(f"{path} cannot be loaded: {first_line(error)[:200]}. Export it again") from error
