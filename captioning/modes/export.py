"""`--mode export`: write a trained decoder as a folder to share.

    model.safetensors   the decoder's weights, and what consensus decoding needs, in float16
    config.json         the decoder's flags, its encoder, its training, and the files' SHA-256
    vocabulary.json     its words, by number
    split.json          which images it was trained, validated and tested on, by name, size and hash
    README.md           the model card
    encoder.onnx, decoder_begin.onnx, decoder_step.onnx     with --onnx

Of the encoder's weights the folder has only the hash: they are other people's, under other terms, ten times the
size of a small decoder, and whoever has this program has them or gets them. With --onnx they are included, since
ONNX is for those who do not have this program.

`checkpoints.load_exported` reads the folder back.
"""

from __future__ import annotations

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
from captioning.data.dataset import SOS
from captioning.decoders.base import Decoder, build_decoder, find_decoder
from captioning.encoders.base import encoder_of
from captioning.io import (
    EXPORTED_WEIGHTS,
    UserError,
    format_bytes,
    install_command,
    log,
    make_directory,
    printable,
    require_free_space,
    sha256,
    temporary_name,
    write_atomic,
    write_json,
)
from captioning.runs.checkpoints import EXPORT_SCHEMA, EXPORTED, HEAD, load_decoder_weights
from captioning.runs.directories import decoding, is_number, read_test_rows, results_directory
from captioning.scoring.scores import METRIC_NAMES

if TYPE_CHECKING:
    import onnxruntime

MOST_DIFFERENCE = 1e-3  # between PyTorch and ONNX Runtime, of numbers of the size of one to ten
CHECKED_IMAGES, CHECKED_WORDS = 3, 4

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


def export(checkpoint: dict[str, Any], path: Path, output: Path, onnx: bool, resnet_weights: str | None) -> None:
    """Write a folder; it appears whole or not at all.

    Args:
        checkpoint: what `checkpoints.load_checkpoint` returned.
        path: its file; the scores of the card are those of its `test_metrics.json`.
        output: the folder, which must not exist, or be empty.
        onnx: write encoder and decoder as ONNX too.
        resnet_weights: as `EncoderSpec.find_weights` takes it; used with `onnx` only.

    Raises:
        UserError: the folder exists or cannot be written, or a package or weights for ONNX are missing.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"--output {output} is there already, and nothing is overwritten: name a new folder")
    if onnx:
        require_onnx()
    target = output.absolute()  # which has a name, also where "." was typed
    make_directory(target.parent, "--output")
    size = 4 * sum(tensor.numel() for tensor in checkpoint["decoder"].values())
    require_free_space(target.parent, (3 * size + 200_000_000) if onnx else size + 20_000_000, "the exported model")
    fresh = temporary_name(target)
    try:
        fresh.mkdir()
        write_model(checkpoint, fresh)
        networks = write_onnx(checkpoint, fresh, resnet_weights) if onnx else []
        tests = read_test_rows(results_directory(path) / "test_metrics.json")
        tests = [row for row in tests if (row["checkpoint"], row["epoch"]) == (path.name, checkpoint["epoch"])]
        card = model_card(checkpoint, tests, networks)
        write_atomic(fresh / "README.md", lambda file: file.write(card.encode()))
        if target.exists():
            target.rmdir()  # empty, and Windows renames nothing over it
        os.replace(fresh, target)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}. Choose another --output") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for network in networks:
        print(f"{network.file}: at most {network.difference:.1e} from PyTorch (on {CHECKED_IMAGES} images)")
    print(f"Exported {path} to {output}:")
    for file in sorted(output.iterdir()):
        print(f"  {file.name:<20} {format_bytes(file.stat().st_size):>9}")
    print(f"Use it: --model_path {output}")


def write_model(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write weights, vocabulary, split and config into a folder."""
    from safetensors.torch import save

    head = checkpoint["consensus"] or {}
    tensors = checkpoint["decoder"] | {f"{HEAD}{name}": each for name, each in head.items() if torch.is_tensor(each)}
    content = save({name: shortened(each) for name, each in tensors.items()}, metadata={"format": "pt"})
    write_atomic(folder / EXPORTED_WEIGHTS, lambda file: file.write(content))
    write_json(folder / "vocabulary.json", checkpoint["vocabulary"])
    if checkpoint["split"] is not None:
        write_json(folder / "split.json", checkpoint["split"])
    name = without_path(checkpoint["encoder"]["name"])
    config = {
        "schema": EXPORT_SCHEMA,
        "epoch": checkpoint["epoch"],
        "encoder": {key: checkpoint["encoder"][key] for key in EXPORTED["encoder"]} | {"name": name},
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


def model_card(checkpoint: dict[str, Any], scores: Sequence[Mapping[str, Any]], networks: Sequence[OnnxNetwork]) -> str:
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
        "## Use", "", "With the program that trained it, image-captioning-trainer, from this folder or from the hub:", "",
        "```bash", "flickr-caption --mode caption --model_path THIS_FOLDER --images photo.jpg",
        "flickr-caption --mode caption --model_path hf-hub:OWNER/NAME --images photo.jpg",
        "flickr-caption --mode test --model_path THIS_FOLDER --data_dir DATA", "```", "",
        f"It needs the encoder's weights, which are not in `{EXPORTED_WEIGHTS}`: {spec.terms}; SHA-256 begins `{code(encoder['weights_hash'])}`. "
        "Other weights are refused.", "",
        *(onnx_card(checkpoint, networks) if networks else []),
        "## Scores", "", *score_table(scores), "",
        "## Limits and licences", "",
        "It repeats what its training captions say, with their biases (about gender, age, origin), and is often wrong "
        "with high confidence. Not for decisions about people.", "",
        f"- Data: {DATA_NOTES[data]}"
        + (f" The terms of the {before:,} images that the first model was trained on hold too: name them here." if before else ""),
        f"- Encoder: {spec.terms}"
        + ("; they are inside of `encoder.onnx`." if networks else ".")
        + (f" Trained copies of a part of them are in `{EXPORTED_WEIGHTS}`." if spec.trainable_stages else ""),
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


def onnx_card(checkpoint: dict[str, Any], networks: Sequence[OnnxNetwork]) -> list[str]:
    flags, spec = checkpoint["flags"], encoder_of(checkpoint["flags"])
    return [
        "### ONNX", "",
        "Three networks; R is any number of rows, one image each (for a beam, repeat the image's rows), T the number of "
        "words so far, 0 at first.", "",
        "| file | in | out |", "|---|---|---|",
        *(f"| `{network.file}` | {network.inputs} | {network.outputs} |" for network in networks), "",
        f"`pixels` is RGB, resized ({spec.interpolation}) to {spec.image_size} x {spec.image_size} whatever the image's shape. Start with word 1 "
        "(`<SOS>`), feed back the chosen word and each output `next_X` as `X`, stop at word 2 (`<EOS>`) or after "
        f"{flags['max_length']} words; never choose 0, 1 or 3. `vocabulary.json` has the words by number.", "",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# ONNX


class OnnxNetwork(NamedTuple):
    """A network as it was written, for the model card and the terminal."""

    file: str
    inputs: str  # Markdown, as `hidden` (1, R, 512)
    outputs: str
    difference: float  # the largest from PyTorch


class Begin(nn.Module):
    """Features (R, cells, C) to the tensors of the state of R rows."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = self.decoder.begin(features if self.decoder.uses_grid else features.mean(1))
        return tuple(tensors_of(state).values())


class Step(nn.Module):
    """The last word of each row and the tensors of the state to the next log-probabilities and what changed; a row is an image."""

    def __init__(self, decoder: Decoder, state: Any):
        """Args: state: one that `decoder.begin` gave."""
        super().__init__()
        self.decoder, self.kind = decoder, type(state)
        self.names = list(tensors_of(state))
        after, _ = decoder.step(state, torch.full((CHECKED_IMAGES,), SOS))
        self.changing = [name for name in self.names if getattr(after, name) is not getattr(state, name)]

    def forward(self, words: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fields = dict.fromkeys(self.kind._fields) | dict(zip(self.names, tensors, strict=True))
        state, output = self.decoder.step(self.kind(**fields), words)
        changed = [getattr(state, name) for name in self.changing]
        parts = (self.decoder.logits(output.hidden_out).log_softmax(-1), *changed)
        return parts if output.alphas is None else (*parts, output.alphas)


def tensors_of(state: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a decoder's state by name."""
    return {name: tensor for name, tensor in state._asdict().items() if tensor is not None}


def require_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--onnx needs {package}, which is not installed: {install_command('export')}")


def write_onnx(checkpoint: dict[str, Any], folder: Path, resnet_weights: str | None) -> list[OnnxNetwork]:
    """Write encoder, begin and step, and run them beside PyTorch.

    Raises:
        UserError: the encoder's weights are not those of training, or a difference is above MOST_DIFFERENCE.
    """
    spec = encoder_of(checkpoint["flags"])
    weights, _ = spec.find_weights(resnet_weights, checkpoint["encoder"]["weights_hash"])
    encoder = spec.build(weights)
    decoder = build_decoder(checkpoint["flags"], len(checkpoint["vocabulary"]), spec).eval()
    load_decoder_weights(decoder, checkpoint["decoder"], folder)
    size = spec.image_size
    noise = np.random.default_rng(0).integers(0, 256, (CHECKED_IMAGES, 3, size, size), dtype=np.uint8)
    pixels = torch.from_numpy(noise)
    with torch.inference_mode(False), torch.no_grad():
        log.info("Writing encoder.onnx, decoder_begin.onnx and decoder_step.onnx (a minute) ...")
        features = encoder(pixels)
        encode = to_onnx(encoder, {"pixels": pixels}, {"pixels": {0: "R"}}, ["features"], folder / "encoder.onnx")
        in_encoder = compare([features], encode.run(None, {"pixels": noise}))

        begin = Begin(decoder).eval()
        first = decoder.begin(features if decoder.uses_grid else features.mean(1))
        ours, fewer = tensors_of(first), begin(features[:-1])
        start = to_onnx(
            begin, {"features": features}, {"features": {0: "R"}}, list(ours), folder / "decoder_begin.onnx"
        )
        theirs = dict(zip(ours, start.run(None, {"features": features.numpy()}), strict=True))
        in_begin = compare(list(ours.values()), list(theirs.values()))

        step = Step(decoder, first).eval()
        words = torch.full((CHECKED_IMAGES,), SOS)
        # An example after some words: to the exporter an axis of length 0 or 1 is a constant.
        later = [dict(ours)]
        for _ in range(2):
            later.append(later[-1] | dict(zip(step.changing, step(words, *later[-1].values())[1:], strict=False)))
        # Where a tensor has its rows, its shape changes with their number; where it has its words, with each of them.
        axes = {
            name: dict.fromkeys(changed_axes(ours[name], less), "R")
            | dict.fromkeys(changed_axes(ours[name], later[1][name]), "T")
            for name, less in zip(ours, fewer, strict=True)
        }
        outputs = ["log_probabilities", *(f"next_{name}" for name in step.changing)]
        outputs += ["attention"] if decoder.has_attention else []
        advance = to_onnx(
            step, {"words": words, **later[2]}, {"words": {0: "R"}, **axes}, outputs, folder / "decoder_step.onnx"
        )
        in_step = []
        for _ in range(CHECKED_WORDS):  # each on its own numbers, so that differences add up as in use
            here = step(words, *ours.values())
            there = advance.run(None, {"words": words.numpy(), **theirs})
            in_step.append(compare(here, there))
            words = here[0].argmax(1)
            ours |= zip(step.changing, here[1:], strict=False)
            theirs |= zip(step.changing, there[1:], strict=False)
    networks = [
        OnnxNetwork("encoder.onnx", *signature(encode), in_encoder),
        OnnxNetwork("decoder_begin.onnx", *signature(start), in_begin),
        OnnxNetwork("decoder_step.onnx", *signature(advance), float(np.max(in_step))),  # NaN, if there is one
    ]
    for network in networks:
        if not network.difference <= MOST_DIFFERENCE:
            raise UserError(
                f"{network.file} differs from PyTorch by {network.difference:.1e}, more than {MOST_DIFFERENCE}: "
                "nothing was kept"
            )
    return networks


def signature(session: onnxruntime.InferenceSession) -> tuple[str, str]:
    """Return the inputs and outputs of a network in words, as `hidden` (1, R, 512)."""

    def describe(values: Sequence[Any]) -> str:
        shapes = (", ".join(map(str, value.shape)) for value in values)
        kinds = (value.type.removeprefix("tensor(").removesuffix(")") for value in values)
        named = zip((value.name for value in values), kinds, shapes, strict=True)
        return ", ".join(f"`{name}`{'' if kind == 'float' else f' {kind}'} ({shape})" for name, kind, shape in named)

    return describe(session.get_inputs()), describe(session.get_outputs())


def to_onnx(
    module: nn.Module, example: dict[str, torch.Tensor], axes: dict[str, dict[int, str]], outputs: list[str], path: Path
) -> onnxruntime.InferenceSession:
    """Write a network whose rows and words can be any number, and open it with ONNX Runtime on the CPU.

    Args:
        example: its inputs, by name; those after the first are the module's `*tensors`.
        axes: for each input the name of the number that an axis is, R for rows and T for words so far.

    Raises:
        UserError: the network was written for one such number.
    """
    import onnxruntime

    sizes = {name: torch.export.Dim(name) for name in ("R", "T")}
    shapes: tuple[Any, ...] = tuple({axis: sizes[name] for axis, name in each.items()} for each in axes.values())
    shapes = shapes if len(shapes) == 1 else (shapes[0], shapes[1:])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own names and internals
        program = torch.onnx.export(
            module, tuple(example.values()), dynamo=True, input_names=list(example), output_names=outputs,
            dynamic_shapes=shapes, external_data=False, verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    if any(isinstance(entry.shape[axis], int) for entry in session.get_inputs() for axis in axes[entry.name]):
        raise UserError(
            f"{path.name} takes one number of rows or words only: a network that is exported has to read it with "
            "tensor.shape[axis], since len(tensor) is a constant to the exporter"
        )
    return session


def changed_axes(first: torch.Tensor, second: torch.Tensor) -> list[int]:
    return [axis for axis in range(first.dim()) if first.shape[axis] != second.shape[axis]]


def compare(ours: Sequence[torch.Tensor], theirs: Sequence[np.ndarray]) -> float:
    """Return the largest difference of two lists of arrays."""
    return float(np.max(np.concatenate([np.abs(a.numpy() - b).ravel() for a, b in zip(ours, theirs, strict=True)])))
