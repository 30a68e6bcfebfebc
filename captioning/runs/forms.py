"""What the fields of a model must be, whoever wrote them; and exported folders, which are read without PyTorch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from captioning.config import registry
from captioning.config.flags import DEFAULTS, FLAGS, Flag
from captioning.config.registry import LIMITS, size_problem
from captioning.data.splits import is_stored
from captioning.decoding.confidence import is_calibration
from captioning.io import CONTROL_CHARACTERS, EXPORTED_WEIGHTS, UserError, first_line, read_json, sha256

EXPORT_SCHEMA = 3  # of config.json in an exported folder; a reader refuses any other
HEAD = "consensus."  # begins the names of consensus decoding's tensors in an exported folder
ENCODER_WEIGHTS = "encoder."  # ... and those of the frozen encoder, which only its graphs read
GRAPHS = ("encoder.onnx", "begin.onnx", "step.onnx")  # of an exported folder: see `models.exported`
LARGEST_GRAPH = 16_000_000  # bytes of a graph, which has no weights but small ones
LARGEST_JSON = 64_000_000  # bytes of a file in an exported folder; the vocabulary of Flickr30k has 0.2 million


class Rule(NamedTuple):
    """What a field of a checkpoint must be."""

    fits: Callable[[Any], bool]
    expected: str


class OrNone(NamedTuple):
    """A field that may be None."""

    form: Any


def whole(low: int = 0, high: int = 2**63 - 1) -> Rule:
    bounds = f"at least {low}" + (f" and at most {high}" if high < 2**63 - 1 else "")
    return Rule(lambda value: type(value) is int and low <= value <= high, f"a whole number, {bounds}")


def size(flag: str) -> Rule:
    """A size whose limit is that of the flag."""
    return whole(1, LIMITS[flag])


def real(low: float = -math.inf, high: float = math.inf) -> Rule:
    bounds = f" from {low:g} to {high:g}" if (low, high) != (-math.inf, math.inf) else ""
    return Rule(lambda value: type(value) in (int, float) and low <= value <= high, f"a number{bounds}")


def one_of(*choices: str) -> Rule:
    return Rule(lambda value: type(value) is str and value in choices, f"one of {', '.join(choices)}")


def value_of(flag: Flag) -> Rule:
    """What the command line takes, in the form that `Settings.stored` gives it."""

    def fits(value: Any) -> bool:
        if value is None or flag.parse is None:
            return value is None and flag.default is None if flag.parse else type(value) is bool
        try:
            parsed = flag.parse(str(value))
        except (argparse.ArgumentTypeError, ValueError):
            return False
        kinds = (int, float) if type(parsed) is float else (str,) if isinstance(parsed, Path) else (type(parsed),)
        return type(value) in kinds and (not flag.choices or value in flag.choices)

    return Rule(fits, f"a value that --{flag.name} takes")


def is_text(value: Any) -> bool:
    return type(value) is str and CONTROL_CHARACTERS.search(value) is None


def is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return type(value) is list and all(map(fits, value))


def is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return type(value) is dict and all(is_text(key) and fits(entry) for key, entry in value.items())


def is_scalar(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float) or is_text(value)


def is_array(value: Any, kind: type) -> bool:
    """An array of this type, of finite numbers."""
    return type(value) is np.ndarray and value.dtype == kind and bool(np.isfinite(value).all())


def is_vocabulary(value: Any) -> bool:
    return (
        is_list(value, is_text) and value[:4] == ["<PAD>", "<SOS>", "<EOS>", "<UNK>"] and len(set(value)) == len(value)
    )


TEXT = Rule(is_text, "a text of one line")
NUMBERS = Rule(lambda value: is_list(value, real().fits), "a list of numbers")
GAPS = Rule(lambda value: is_list(value, lambda entry: entry is None or real().fits(entry)), "a list of numbers")
ENCODER = Rule(lambda value: type(value) is str and registry.is_encoder(value), "an encoder of this program")
CONSENSUS: dict[str, Any] = {  # what `consensus.NgramHead` takes; `check_consensus` looks further
    **dict.fromkeys(("keys", "sizes"), Rule(lambda value: is_array(value, np.int64), "an array of whole numbers")),
    **dict.fromkeys(
        ("idf", "centre", "project", "units"),
        Rule(lambda value: is_array(value, np.float32), "an array of finite numbers"),
    ),
    "expect": Rule(lambda value: is_array(value, np.int8), "an array of eight-bit numbers"),
    "log_images": real(0, 100),
    "weight": real(0, 1e6),
}
# The fields of a model that a run's checkpoint and an exported folder share, each with its form: a rule, or a table of
# forms, or either or None.
MODEL: dict[str, Any] = {
    "epoch": whole(),
    "encoder": {"name": ENCODER, "weights_hash": TEXT, "transform": TEXT},
    "vocabulary": Rule(is_vocabulary, "a list of different words that begins with <PAD>, <SOS>, <EOS>, <UNK>"),
    "flags": {flag.name: value_of(flag) for flag in FLAGS.values() if flag.checkpoint},
    "consensus": OrNone(CONSENSUS),
    "confidence": OrNone(Rule(is_calibration, "a table of rising scores and shares from 0 to 1, of beam or consensus,")),
    "decoding": OrNone({"beam_size": size("beam_size"), "length_penalty": real(0, LIMITS["length_penalty"]), "cider": real(), "images": whole()}),
    "split": Rule(is_stored, "a split by image name, size and hash"),
}  # fmt: skip


# config.json of an exported folder; the exporting machine's paths are not in it.
EXPORTED: dict[str, Any] = {
    "schema": whole(),
    "epoch": whole(),
    "encoder": MODEL["encoder"],
    # What becomes of an image before `encoder.onnx`, and whether the decoder reads the mean of its regions.
    "input": {
        "image_size": whole(1, 4096),
        "interpolation": one_of("nearest", "bilinear", "bicubic", "lanczos"),
        "means": Rule(lambda value: type(value) is bool, "true or false"),
    },
    "decoding": MODEL["decoding"],
    "consensus": OrNone({name: CONSENSUS[name] for name in ("log_images", "weight")}),
    "confidence": MODEL["confidence"],
    "flags": {name: form for name, form in MODEL["flags"].items() if not FLAGS[name].place},
    "sha256": dict.fromkeys((EXPORTED_WEIGHTS, "vocabulary.json", "split.json", *GRAPHS), TEXT),
}


def require_form(value: Any, form: Any, path: Path, where: str = "") -> None:
    """Compare a field of a checkpoint with its form.

    Raises:
        UserError: it differs; the message names the field and what belongs there.
    """
    if isinstance(form, OrNone):
        if value is not None:
            require_form(value, form.form, path, where)
    elif isinstance(form, Rule):
        if not form.fits(value):
            raise malformed(path, f"{where} is a {type(value).__name__} where {form.expected} belongs")
    elif type(value) is not dict or not form.keys() <= value.keys():
        raise malformed(path, f"{where or 'it'} lacks some of {', '.join(form)}")
    else:
        for key, part in form.items():
            require_form(value[key], part, path, f"{where}.{key}".lstrip("."))


def malformed(path: Path, problem: str) -> UserError:
    exported = path.suffix in (".json", ".safetensors")
    hint = "Export or fetch it again" if exported else "Use another model_epoch_N.pt of its run"
    return UserError(f"{path} is a malformed checkpoint: {problem}. {hint}")


def require_schema(found: Any, read: int, path: Path) -> None:
    """Raise UserError if a file is of another commit of this program."""
    if type(found) is not int or found != read:
        raise UserError(
            f"{path} was written by another version of this program (schema {str(found)[:20]}, this one reads {read}): "
            "train or export it again"
        )


def with_defaults(flags: Any) -> Any:
    """Return flags with the default of each that came after they were written."""
    return DEFAULTS | flags if type(flags) is dict else flags


def check_consensus(stored: dict[str, Any], words: int, channels: int, path: Path) -> None:
    """Make sure that the table and the matrices of consensus decoding belong together.

    Args:
        words: of the vocabulary, and the end token.
        channels: of the encoder's features.

    Raises:
        UserError: they do not.
    """
    keys, rank = stored["keys"], len(stored["expect"]) if stored["expect"].ndim else 0
    ngrams = keys.size
    shapes = {"keys": (ngrams,), "sizes": (4,), "idf": (ngrams,), "centre": (channels,), "project": (channels + 1, rank),
              "units": (rank,), "expect": (rank, ngrams)}  # fmt: skip
    if any(stored[name].shape != shape for name, shape in shapes.items()):
        raise malformed(path, "the tensors of consensus have sizes that do not belong together")
    sizes = stored["sizes"]
    if sizes.min() < 0 or sum(sizes.tolist()) != ngrams:
        raise malformed(path, "consensus.sizes do not add up to its n-grams")
    shorter = 1  # n-grams that are a word shorter
    for part in np.split(keys, sizes.cumsum()[:-1]):
        if len(part) and ((np.diff(part) < 1).any() or part[0] < 0 or part[-1] >= shorter * words):
            raise malformed(path, "consensus.keys are not sorted numbers of n-grams")
        shorter = len(part)


def check_model(model: dict[str, Any], channels: int | None, path: Path) -> None:
    """Make sure that flags, encoder and consensus belong together.

    Args:
        channels: of what the decoder reads; None where only PyTorch knows it.

    Raises:
        UserError: they do not.
    """
    if model["flags"]["encoder"] != model["encoder"]["name"]:
        raise malformed(path, "its flags name another encoder than it holds")
    if problem := size_problem(model["flags"]):
        raise malformed(path, problem)
    if model["consensus"]:
        channels = len(model["consensus"]["centre"]) if channels is None else channels
        check_consensus(model["consensus"], len(model["vocabulary"]) + 1, channels, path)


# --------------------------------------------------------------------------------------------------
# Exported folders


def read_exported(path: Path) -> dict[str, Any]:
    """Read an exported folder (`modes/export.py`) but for its weights and graphs, whose hashes are compared.

    Args:
        path: its `model.safetensors`; the other files lie beside it.

    Returns:
        the fields of `MODEL`, with every flag that a checkpoint has, and `input` of `EXPORTED`.

    Raises:
        UserError: something of it is missing, damaged or malformed.
    """
    from safetensors import safe_open

    place = path.with_name("config.json")
    config = read_exported_json(place)
    if type(config) is not dict:
        raise malformed(place, "it is not an object of JSON")
    require_schema(config.get("schema"), EXPORT_SCHEMA, place)
    config["flags"] = with_defaults(config.get("flags"))
    require_form(config, EXPORTED, place)
    contents: dict[str, Any] = {}
    for name in EXPORTED["sha256"]:
        file = path.with_name(name)
        if not file.is_file():
            raise UserError(f"{file} is not there: {path.parent} is not a complete exported model. Export it again")
        if sha256(file) != config["sha256"][name]:
            raise UserError(f"{file} is damaged (its SHA-256 is not that of {place}): copy or export it again")
        if file.suffix == ".json":
            contents[name] = read_exported_json(file)
    head = None
    if config["consensus"]:
        try:
            with safe_open(path, "numpy") as file:
                names = [name for name in file.keys() if name.startswith(HEAD)]  # noqa: SIM118  # it is no dict
                head = {name.removeprefix(HEAD): file.get_tensor(name) for name in names}
        except Exception as error:  # safetensors raises its own
            raise UserError(f"{path} cannot be read as safetensors: {first_line(error)}. Export it again") from error
        floats = {name: each.astype(np.float32) for name, each in head.items() if each.dtype.kind == "f"}
        head = config["consensus"] | head | floats
    flags = {name: config["flags"][name] if name in EXPORTED["flags"] else DEFAULTS[name] for name in MODEL["flags"]}
    model = {
        "epoch": config["epoch"], "encoder": config["encoder"], "vocabulary": contents["vocabulary.json"], "flags": flags,
        "consensus": head, "confidence": config["confidence"], "decoding": config["decoding"],
        "split": contents["split.json"], "input": config["input"],
    }  # fmt: skip
    require_form(model, MODEL, path)
    check_model(model, None, path)
    return model


def read_exported_json(path: Path) -> Any:
    if path.is_file() and path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} is larger than {LARGEST_JSON} bytes: it was not written by this program")
    return read_json(path)
