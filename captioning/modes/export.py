"""`--mode export`: write a trained model as a folder to share, which captions without PyTorch (`models/exported.py`).

    model.safetensors   all weights, once: the decoder's and what consensus needs in float16, the frozen encoder's in float32
    encoder.onnx, begin.onnx, step.onnx     the graphs, whose weights are those of the file above
    config.json         the decoder's flags, its encoder, its training, and the files' SHA-256
    vocabulary.json     its words, by number
    split.json          which images it was trained, validated and tested on, by name, size and hash
    README.md           the model card

`checkpoints.load_exported` reads the folder back for testing and `--init_from`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from captioning.config.registry import without_path
from captioning.data.dataset import EOS, SOS, UNK
from captioning.decoders.base import Decoder, build_decoder, find_decoder
from captioning.encoders.base import encoder_of
from captioning.io import (
    EXPORTED_WEIGHTS,
    UserError,
    first_line,
    format_bytes,
    log,
    make_directory,
    not_installed,
    printable,
    require_free_space,
    sha256,
    temporary_name,
    write_atomic,
    write_json,
)
from captioning.models.exported import ExportedModel
from captioning.models.graphs import stored_tensors
from captioning.models.pytorch import PyTorchModel
from captioning.runs.checkpoints import load_decoder_weights
from captioning.runs.directories import decoding, is_number, read_test_rows, results_directory
from captioning.runs.forms import ENCODER_WEIGHTS, EXPORT_SCHEMA, EXPORTED, HEAD, read_exported
from captioning.scoring.scores import METRIC_NAMES

if TYPE_CHECKING:
    import onnx

MOST_DIFFERENCE = 0.01  # between PyTorch and the graphs, of a word's probability
SMALL = 32_768  # bytes of a weight that stays inside of its graph

RESEARCH_ONLY = (
    "images and captions were released for non-commercial research and education. The careful reading is that this goes "
    "for a model trained on them too."
)
DATA_NOTES = {
    "flickr8k": f"Flickr8k (Hodosh et al., 2013): {RESEARCH_ONLY}",
    "flickr30k": f"Flickr30k (Young et al., 2014): {RESEARCH_ONLY}",
    "coco": "COCO captions (Lin et al., 2014; Chen et al., 2015): the captions are under CC BY 4.0, each image is its Flickr "
    "user's, under the terms that Flickr shows for it.",
    "demo": "The project's drawn demo set: coloured shapes in front of simple landscapes, no photographs, Apache-2.0.",
    "custom": "The exporter's own images and captions. Say here whose they are, and what they allow.",
}


def export(checkpoint: dict[str, Any], path: Path, output: Path, resnet_weights: str | None) -> None:
    """Write a folder; it appears whole or not at all.

    Args:
        checkpoint: what `checkpoints.load_checkpoint` returned.
        path: its file; the scores of the card are those of its `test_metrics.json`.
        output: the folder, which must not exist, or be empty.
        resnet_weights: as `EncoderSpec.find_weights` takes it.

    Raises:
        UserError: the folder exists or cannot be written, or a package or weights are missing.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"--output {output} is there already, and nothing is overwritten: name a new folder")
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise not_installed(package)
    target = output.absolute()  # which has a name, also where "." was typed
    make_directory(target.parent, "--output")
    size = 4 * sum(tensor.numel() for tensor in checkpoint["decoder"].values())
    require_free_space(target.parent, size + 200_000_000, "the exported model")
    log.info("Writing the model and its graphs (half a minute) ...")
    fresh = temporary_name(target)
    try:
        fresh.mkdir()
        write_model(checkpoint, fresh, make_graphs(checkpoint, resnet_weights, path))
        tests = read_test_rows(results_directory(path) / "test_metrics.json")
        tests = [row for row in tests if (row["checkpoint"], row["epoch"]) == (path.name, checkpoint["epoch"])]
        card = model_card(checkpoint, tests)
        write_atomic(fresh / "README.md", lambda file: file.write(card.encode()))
        require_agreement(fresh / EXPORTED_WEIGHTS, checkpoint, resnet_weights)
        if target.exists():
            target.rmdir()  # empty, and Windows renames nothing over it
        os.replace(fresh, target)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}. Choose another --output") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    print(f"Exported {path} to {output}:")
    for file in sorted(output.iterdir()):
        print(f"  {file.name:<20} {format_bytes(file.stat().st_size):>9}")
    print(f"Use it: --model_path {output}")


def require_agreement(path: Path, checkpoint: dict[str, Any], resnet_weights: str | None) -> None:
    """Compare what the graphs of a folder say of some noise with what PyTorch says of the same weights.

    Raises:
        UserError: they differ: the exporter translated something wrongly.
    """
    facts = read_exported(path)
    same = checkpoint | {"decoder": {name: shortened(each).float() for name, each in checkpoint["decoder"].items()}}
    models = PyTorchModel(same, path, "cpu", resnet_weights), ExportedModel(facts, path)
    size, views = facts["input"]["image_size"], len(models[1].views)
    noise = np.random.default_rng(0).integers(0, 256, (2, views, size, size, 3), dtype=np.uint8)
    readings = [model.read(noise) for model in models]
    for ids in ([SOS, SOS], [EOS, UNK], [UNK, EOS, EOS, UNK, EOS, UNK]):
        if len(ids) > readings[0].rows:  # several rows of each image
            for reading in readings:
                reading.select(np.arange(6) // 3)
        found = [reading.step(np.array(ids), len(facts["vocabulary"])) for reading in readings]
        ours, theirs = (np.exp(np.take_along_axis(each.log_probabilities, each.ids.argsort(1), 1)) for each in found)
        if not np.abs(ours - theirs).max() <= MOST_DIFFERENCE:
            raise UserError(
                f"the exported graphs differ from PyTorch by {np.abs(ours - theirs).max():.2g} in the probability of a "
                "word: nothing was kept. Write the decoder's step with other operators"
            )


def write_model(checkpoint: dict[str, Any], folder: Path, graphs: Mapping[str, onnx.ModelProto]) -> None:
    """Write weights, graphs, vocabulary, split and config into a folder."""
    from safetensors.torch import save

    head = checkpoint["consensus"] or {}
    arrays = {f"{HEAD}{name}": each for name, each in head.items() if isinstance(each, np.ndarray)}
    tensors = checkpoint["decoder"] | {name: torch.from_numpy(each) for name, each in arrays.items()}
    stored = {name: shortened(each) for name, each in tensors.items()}
    stored |= further_weights(graphs, checkpoint["decoder"])  # in float32: what the encoder gives is rounded next
    content = save(stored, metadata={"format": "pt"})
    weights = folder / EXPORTED_WEIGHTS
    write_atomic(weights, lambda file: file.write(content))
    for name, graph in graphs.items():
        (folder / name).write_bytes(refer_to_weights(graph, weights))
    write_json(folder / "vocabulary.json", checkpoint["vocabulary"])
    if checkpoint["split"] is not None:
        write_json(folder / "split.json", checkpoint["split"])
    name, spec = without_path(checkpoint["encoder"]["name"]), encoder_of(checkpoint["flags"])
    means = not (find_decoder(checkpoint["flags"]["decoder"]).uses_grid or spec.trainable_stages)
    config = {
        "schema": EXPORT_SCHEMA,
        "epoch": checkpoint["epoch"],
        "encoder": {key: checkpoint["encoder"][key] for key in EXPORTED["encoder"]} | {"name": name},
        "input": {"image_size": spec.image_size, "interpolation": spec.interpolation, "means": means},
        "decoding": checkpoint["decoding"],  # tuned beam size and length penalty, or null
        "confidence": checkpoint["confidence"],  # its calibration, or null
        "consensus": (head and {key: head[key] for key in ("log_images", "weight")}) or None,
        "flags": {key: checkpoint["flags"][key] for key in EXPORTED["flags"]} | {"encoder": name},
        "sha256": {file.name: sha256(file) for file in sorted(folder.iterdir())},
    }
    write_json(folder / "config.json", config)


def shortened(tensor: torch.Tensor) -> torch.Tensor:
    """Return floats in float16, unless one is too large for it; other tensors as they are."""
    half = tensor.half() if tensor.is_floating_point() else tensor
    return half if bool(half.isfinite().all()) else tensor


# --------------------------------------------------------------------------------------------------
# The model card


def model_card(checkpoint: dict[str, Any], scores: Sequence[Mapping[str, Any]]) -> str:
    """Return `README.md` in the form of model cards (Mitchell et al., 2019), with the Hugging Face hub's metadata."""
    flags, encoder = checkpoint["flags"], checkpoint["encoder"]
    spec = encoder_of(flags)
    parameters = sum(tensor.numel() for tensor in checkpoint["decoder"].values())
    data = flags["dataset_type"]
    last = "its last stage" if spec.trainable_stages == 1 else f"its last {spec.trainable_stages} stages"
    trained = f"{last}, trained with the decoder, and " if spec.trainable_stages else ""
    # Images that the models before it were trained on.
    before = len((checkpoint["split"] or {}).get("inherited", {"names": []})["names"])
    begun = f"from the weights of a model that was trained on {before:,} other images" if before else "from scratch"
    lines = [
        "---", "pipeline_tag: image-to-text", "library_name: pytorch", "language: en", "license: other",
        "license_name: see-below", *([f"datasets: [{data}]"] if data not in ("demo", "custom") else []),
        "tags: [image-captioning]", "---", "",
        f"# Image captioner: {flags['decoder']} decoder on {code(without_path(encoder['name']))}, trained on {data}", "",
        "Writes one English sentence about an image. A frozen encoder gives "
        f"{spec.grid} x {spec.grid} regions of {spec.channels} numbers; {trained}{find_decoder(flags['decoder']).description} "
        f"({parameters:,} parameters, {len(checkpoint['vocabulary']):,} words) writes the caption. Trained for "
        f"{checkpoint['epoch']} epochs, {begun}; `config.json` has all settings.", "",
        "## Use", "", "With the program that trained it, `flickr-caption`, from this folder or from the hub:", "",
        "```bash", "flickr-caption --mode caption --model_path THIS_FOLDER --images photo.jpg",
        "flickr-caption --mode caption --model_path hf-hub:OWNER/NAME --images photo.jpg",
        "flickr-caption --mode test --model_path THIS_FOLDER --data_dir DATA", "```", "",
        "Captioning needs neither PyTorch nor other weights: the three graphs (ONNX) read theirs from "
        f"`{EXPORTED_WEIGHTS}`. Testing and training on need PyTorch and the encoder's own weights: {spec.terms}; SHA-256 "
        f"begins `{code(encoder['weights_hash'])}`. Other weights are refused.", "",
        "## Scores", "", *score_table(scores), "",
        "## Limits and licences", "",
        "It repeats what its training captions say, with their biases (about gender, age, origin), and is often wrong "
        "with high confidence. Not for decisions about people.", "",
        f"- Data: {DATA_NOTES[data]}"
        + (f" The terms of the {before:,} images that the first model was trained on hold too: name them here." if before else ""),
        f"- Encoder: {spec.terms}; a copy is in `{EXPORTED_WEIGHTS}`"
        + (", of its last stages one that was trained." if spec.trainable_stages else "."),
        "- Code: Apache-2.0.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def score_table(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the rows of `test_metrics.json` as lines of a Markdown table, in hundredths."""
    if not scores:
        return ["Not tested yet."]
    names = [name for name in METRIC_NAMES if any(is_number(entry.get(name)) for entry in scores)]
    lines = [
        "| split | images | decoding | " + " | ".join(METRIC_NAMES[name] for name in names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for entry in scores:
        cells = [code(str(each)) for each in (entry["split"], entry["images"], decoding(entry))]
        cells += [f"{100 * entry[name]:.1f}" if is_number(entry.get(name)) else "" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "x100, on lower-cased tokens without punctuation; CIDEr depends on how many images are scored."]


def code(text: str) -> str:
    """Return a text as Markdown that means nothing but itself, in a table too."""
    return printable(text).replace("`", "'").replace("<", "&lt;").replace("|", "\\|")[:80]


# --------------------------------------------------------------------------------------------------
# Graphs


class EncoderGraph(nn.Module):
    """Pixels, uint8 (B, size, size, 3), to features (B, cells, C)."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.encoder(pixels.permute(0, 3, 1, 2))
        return features


class BeginGraph(nn.Module):
    """Features (W, I, cells, C) or (W, I, C) to their mean (I, D) behind trained stages, and the state of one row an image."""

    def __init__(self, decoder: Decoder, axes: dict[str, StateAxes]):
        super().__init__()
        self.decoder, self.axes = decoder, axes

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        views, images = features.shape[:2]
        decoder, read = self.decoder.after_stages(features.flatten(0, 1))
        state = tensors_of(decoder.begin(read))
        pooled = (read.mean(1) if read.dim() == 3 else read).unflatten(0, (views, images)).mean(0)
        return pooled, *(apart(state[name], *axes, (views, images, 1)) for name, axes in self.axes.items())


class StepGraph(nn.Module):
    """Words (I, S) and the state to the log-probabilities (I, S, V) of the next ones, what changed, and alphas (I, S, cells)."""

    def __init__(self, decoder: Decoder, kind: type, axes: dict[str, StateAxes], changing: Sequence[str]):
        """Args: kind: of the decoder's state; axes: of its tensors; changing: those that a step changes."""
        super().__init__()
        self.decoder, self.kind, self.axes, self.changing = decoder, kind, axes, changing

    def forward(self, words: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (axis, has_rows), images, rows = next(iter(self.axes.values())), words.shape[0], words.shape[1]
        views = tensors[0].shape[axis]
        fields: dict[str, Any] = dict.fromkeys(self.kind._fields)  # type: ignore[attr-defined]
        for (name, (axis, has_rows)), tensor in zip(self.axes.items(), tensors, strict=True):
            fields[name] = tensor.flatten(axis, axis + 1 + has_rows)
        ids = words.unsqueeze(0).expand(views, images, rows).flatten()
        state, output = self.decoder.step(self.kind(**fields), ids)
        logits = self.decoder.logits(output.hidden_out).unflatten(0, (views, images, rows))
        changed = (apart(getattr(state, name), *self.axes[name], (views, images, rows)) for name in self.changing)
        parts = (logits.softmax(-1).mean(0).log(), *changed)
        return parts if output.alphas is None else (*parts, output.alphas.unflatten(0, (views, images, rows))[0])


class StateAxes(NamedTuple):
    """Where a tensor of the state has its images or rows."""

    axis: int
    has_rows: bool


def apart(tensor: torch.Tensor, axis: int, has_rows: bool, sizes: tuple[int, int, int]) -> torch.Tensor:
    """Split the axis of all views' images or rows into views W, images I and, of rows, S of an image."""
    return tensor.unflatten(axis, sizes if has_rows else sizes[:2])


def tensors_of(state: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a decoder's state by name."""
    return {name: tensor for name, tensor in state._asdict().items() if tensor is not None}


def changed_axes(first: torch.Tensor, second: torch.Tensor) -> list[int]:
    return [axis for axis in range(first.dim()) if first.shape[axis] != second.shape[axis]]


class ScaleAndShift(nn.Module):
    """BatchNorm with fixed statistics, in a form that leaves the weights of the convolution before it alone."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        assert norm.running_var is not None and norm.running_mean is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer("scale", scale.detach()[:, None, None])
        self.register_buffer("shift", (norm.bias - norm.running_mean * scale).detach()[:, None, None])

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = grid * self.scale + self.shift
        return scaled


def without_norms(module: nn.Module) -> nn.Module:
    """Replace the BatchNorms of a network."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, ScaleAndShift(child))
        else:
            without_norms(child)
    return module


def make_graphs(checkpoint: dict[str, Any], resnet_weights: str | None, folder: Path) -> dict[str, onnx.ModelProto]:
    """Return the graphs, with their weights inside, of a model whose weights are rounded as they are stored.

    Raises:
        UserError: the encoder's weights are not those of training, or a network cannot be exported.
    """
    spec = encoder_of(checkpoint["flags"])
    weights, _ = spec.find_weights(resnet_weights, checkpoint["encoder"]["weights_hash"])
    encoder = without_norms(spec.build(weights))
    decoder = build_decoder(checkpoint["flags"], len(checkpoint["vocabulary"]), spec).requires_grad_(False).eval()
    load_decoder_weights(
        decoder, {name: shortened(each).float() for name, each in checkpoint["decoder"].items()}, folder
    )
    without_norms(decoder)
    size, views, images, rows = spec.image_size, 2, 3, 4
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (images, size, size, 3), dtype=np.uint8))
    encode = EncoderGraph(encoder)
    features = encode(pixels)
    features = features if decoder.uses_grid else features.mean(1)
    graphs = {"encoder.onnx": to_onnx(encode, {"pixels": pixels}, [{0: "B"}], ["features"])}

    inner, read = decoder.after_stages(features)
    state = inner.begin(read)
    ids = torch.full((images,), SOS)
    first, fewer, repeated = (
        tensors_of(state),
        tensors_of(inner.begin(read[1:])),
        tensors_of(state.select_rows(torch.arange(2 * images) // 2)),
    )
    after, _ = inner.step(state, ids)
    axes = {
        name: StateAxes(
            (changed_axes(first[name], fewer[name]) or [0])[0], bool(changed_axes(first[name], repeated[name]))
        )
        for name in first
    }
    grows = {name: [axis for axis in changed_axes(first[name], tensors_of(after)[name])] for name in first}
    changing = [name for name in first if getattr(after, name) is not getattr(state, name)]
    begin = BeginGraph(decoder, axes)
    stacked = torch.stack([features] * views)  # (W, I, ...)
    graphs["begin.onnx"] = to_onnx(begin, {"features": stacked}, [{0: "W", 1: "I"}], ["pooled", *axes])

    # An example after some words, in some rows: to the exporter an axis of length 0 or 1 is a constant.
    every = torch.stack([read] * views).flatten(0, 1)
    later = inner.begin(every).select_rows(torch.arange(views * images * rows) // rows)
    for _ in range(2):
        later, _ = inner.step(later, torch.full((views * images * rows,), SOS))
    tensors = {name: apart(tensor, *axes[name], (views, images, rows)) for name, tensor in tensors_of(later).items()}
    names = []
    for name, (axis, has_rows) in axes.items():
        places = {axis: "W", axis + 1: "I", **({axis + 2: "S"} if has_rows else {})}
        names.append(places | {each + (1 + has_rows) * (each > axis): "T" for each in grows[name]})
    step = StepGraph(inner, type(state), axes, changing)
    outputs = ["log_probabilities", *(f"next_{name}" for name in changing), *["alphas"] * decoder.has_attention]
    words = torch.full((images, rows), SOS)
    graphs["step.onnx"] = to_onnx(step, {"words": words, **tensors}, [{0: "I", 1: "S"}, *names], outputs)
    return graphs


def to_onnx(
    module: nn.Module, example: dict[str, torch.Tensor], axes: Sequence[dict[int, str]], outputs: list[str]
) -> onnx.ModelProto:
    """Return a network as a graph whose weights are inside.

    Args:
        example: its inputs, by name; those after the first are the module's `*tensors`.
        axes: of each input, the names of the numbers that may be any.

    Raises:
        UserError: the network was written for one such number.
    """
    sizes = {name: torch.export.Dim(name) for name in "BWIST"}
    shapes: tuple[Any, ...] = tuple({axis: sizes[name] for axis, name in each.items()} for each in axes)
    shapes = shapes if len(shapes) == 1 else (shapes[0], shapes[1:])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own names and internals
        try:
            program = torch.onnx.export(
                module.eval(), tuple(example.values()), dynamo=True, input_names=list(example), output_names=outputs,
                dynamic_shapes=shapes, external_data=False, verbose=False,
            )  # fmt: skip
            assert program is not None
            for entry, names in zip(program.model_proto.graph.input, axes, strict=True):
                for axis, name in names.items():  # the exporter makes a constant of a number that the network fixes
                    if entry.type.tensor_type.shape.dim[axis].dim_param != name:
                        raise ValueError(f"it takes one size only in axis {axis} of {entry.name}")
        except Exception as error:
            raise UserError(
                f"{type(module).__name__} cannot be exported: {first_line(error)[:200]}. A network that is exported reads "
                "sizes with tensor.shape[axis], since len(tensor) is a constant to the exporter"
            ) from error
    return program.model_proto


def further_weights(
    graphs: Mapping[str, onnx.ModelProto], decoder: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the weights of the graphs that are not the decoder's, by a name of their own."""
    from onnx import numpy_helper

    known = {fingerprint(tensor.numpy()) for tensor in decoder.values()}
    found: dict[str, torch.Tensor] = {}
    for model in graphs.values():
        for array in map(numpy_helper.to_array, model.graph.initializer):
            if (
                array.dtype == np.float32
                and array.nbytes > SMALL
                and not known & {fingerprint(array), fingerprint(array.T)}
            ):
                found[f"{ENCODER_WEIGHTS}{len(found)}"] = torch.from_numpy(array.copy())
                known.add(fingerprint(array))
    return found


def fingerprint(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    """Return what equal arrays have in common once they are stored as `shortened` does."""
    with np.errstate(over="ignore"):
        short = array.astype(np.float16)
    stored = np.ascontiguousarray(short if np.isfinite(short).all() else array)
    return stored.shape, hashlib.sha256(stored.tobytes()).digest()


def refer_to_weights(model: onnx.ModelProto, path: Path) -> bytes:
    """Return a graph that reads the weights that `model.safetensors` has from there; the others, which are small, stay.

    Nothing else is kept but what `models.graphs` lets pass.

    Args:
        path: of `model.safetensors`.
    """
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.numpy import load_file

    places = {name: place for place, (name, *_) in stored_tensors(path).items()}
    arrays = {name: array for name, array in load_file(path).items() if name in places}
    names = {fingerprint(array): name for name, array in arrays.items()}
    constants, nodes = [], []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        turned = fingerprint(array) not in names
        stored = names.get(fingerprint(array.T if turned else array))
        if stored is None or array.dtype != np.float32 or array.nbytes <= SMALL:
            constants.append(numpy_helper.from_array(array, tensor.name))
            continue
        kind = TensorProto.FLOAT16 if arrays[stored].dtype == np.float16 else TensorProto.FLOAT
        outside = TensorProto(name=f"{tensor.name}.stored", data_type=kind, dims=arrays[stored].shape)
        outside.data_location = TensorProto.EXTERNAL
        for key, value in zip(("location", "offset", "length"), (EXPORTED_WEIGHTS, *places[stored]), strict=True):
            outside.external_data.add(key=key, value=str(value))
        constants.append(outside)
        wide = f"{tensor.name}.wide" if turned else tensor.name
        nodes.append(helper.make_node("Cast", [outside.name], [wide], to=TensorProto.FLOAT))
        nodes += [helper.make_node("Transpose", [wide], [tensor.name])] if turned else []
    for node in model.graph.node:
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        nodes.append(helper.make_node(node.op_type, node.input, node.output, **attributes))
    inputs = [helper.make_value_info(each.name, each.type) for each in model.graph.input]
    outputs = [helper.make_value_info(each.name, each.type) for each in model.graph.output]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    opset = next(each.version for each in model.opset_import if not each.domain)
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=model.ir_version)
    content: bytes = plain.SerializeToString()
    return content
