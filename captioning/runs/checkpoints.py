"""Checkpoints: written whole or not at all, read without executing anything, and checked field by field.

A checkpoint comes from anybody: each field is compared with `CHECKPOINT`, and the weights with the decoder that the
flags describe. What is not refused: a forged `.pt` may take much memory or time while PyTorch reads it. An exported
folder cannot.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from captioning.config import registry
from captioning.config.flags import DEFAULTS, FLAGS, SCHEDULERS, Flag
from captioning.config.registry import LIMITS, size_problem
from captioning.data.splits import is_stored
from captioning.decoders.base import Decoder, build_decoder
from captioning.decoding.confidence import is_calibration
from captioning.encoders.base import encoder_of, read_tensors
from captioning.io import (
    CONTROL_CHARACTERS,
    EXPORTED_WEIGHTS,
    UserError,
    first_line,
    link_or_copy,
    log,
    read_json,
    sha256,
    write_atomic,
)

SCHEMA = 5  # of the checkpoint; a reader refuses any other
EXPORT_SCHEMA = 2  # of config.json in an exported folder
HEAD = "consensus."  # begins the names of consensus decoding's tensors in an exported folder
LARGEST_JSON = 64_000_000  # bytes of a file in an exported folder; the vocabulary of Flickr30k has 0.2 million


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write plain types and tensors, atomically, so that `torch.load(weights_only=True)` reads them."""
    write_atomic(path, lambda file: torch.save({"schema": SCHEMA, **checkpoint}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU without executing anything in it, whoever wrote it.

    Returns:
        every field of `CHECKPOINT` in its form, finite tensors of the shapes of the decoder that flags and vocabulary
        describe, and an optimizer state that fits them. The optimizer of an exported folder (given as its
        `model.safetensors`) is None: see `require_trainable`.

    Raises:
        UserError: not a checkpoint, a truncated, damaged or malformed one, or one of another program or version.
    """
    if path.suffix == ".safetensors":
        return load_exported(path)
    try:
        checkpoint = read_tensors(path)
    except Exception as error:  # unpickling and zip errors of every kind mean the same to the user
        raise UserError(
            f"{path} cannot be read as a checkpoint (truncated, or not written by this program): {first_line(error)}. "
            "Use another model_epoch_N.pt of its run"
        ) from error
    if type(checkpoint) is not dict or not {"schema", "decoder", "vocabulary", "flags"} <= checkpoint.keys():
        raise UserError(
            f"{path} is not a checkpoint of this program: give a model_epoch_N.pt, best.pt or a run directory"
        )
    require_schema(checkpoint["schema"], SCHEMA, path)
    checkpoint["flags"] = with_defaults(checkpoint["flags"])
    require_form(checkpoint, CHECKPOINT, path)
    decoder = check_architecture(checkpoint, path)
    check_moments(checkpoint["optimizer"]["state"], decoder, path)
    return checkpoint


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


def load_exported(path: Path) -> dict[str, Any]:
    """Read an exported folder (`modes/export.py`) as a checkpoint that has no optimizer state.

    Args:
        path: its `model.safetensors`; `config.json`, `vocabulary.json` and `split.json` lie beside it.

    Raises:
        UserError: something of it is missing, damaged or malformed.
    """
    from safetensors.torch import load_file

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
        if file != path:
            contents[name] = read_exported_json(file)
    try:
        tensors = {name: each.float() if each.is_floating_point() else each for name, each in load_file(path).items()}
    except Exception as error:  # safetensors and torch each raise their own
        raise UserError(f"{path} cannot be read as safetensors: {first_line(error)}. Export it again") from error
    weights = {name: each for name, each in tensors.items() if not name.startswith(HEAD)}
    head = {name.removeprefix(HEAD): each for name, each in tensors.items() if name.startswith(HEAD)}
    flags = {
        name: config["flags"][name] if name in EXPORTED["flags"] else DEFAULTS[name] for name in CHECKPOINT["flags"]
    }
    checkpoint = {
        "schema": SCHEMA, "epoch": config["epoch"], "decoder": weights,
        "encoder": config["encoder"], "vocabulary": contents["vocabulary.json"],
        "flags": flags, "optimizer": None, "scaler": {},
        "progress": {"first_epoch": config["epoch"], "step": 0, "loss_sum": 0.0, "reward_sum": 0.0, "tokens": 0},
        "schedule": None, "decoding": config["decoding"], "consensus": config["consensus"] and config["consensus"] | head,
        "confidence": config["confidence"], "split": contents["split.json"], "loss_curve": {name: [] for name in CHECKPOINT["loss_curve"]},
        "metrics_history": [], "best": {"score": 0.0, "epoch": config["epoch"], "metric": flags["best_metric"]},
    }  # fmt: skip
    require_form(checkpoint, {name: form for name, form in CHECKPOINT.items() if name != "optimizer"}, path)
    check_architecture(checkpoint, path)
    return checkpoint


def read_exported_json(path: Path) -> Any:
    if path.is_file() and path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} is larger than {LARGEST_JSON} bytes: it was not written by this program")
    return read_json(path)


def require_trainable(checkpoint: dict[str, Any], path: Path) -> None:
    """Make sure that a checkpoint can be trained on, or changed.

    Raises:
        UserError: it is an exported model.
    """
    if checkpoint["optimizer"] is None:
        raise UserError(
            f"{path.parent} is an exported model, which is for testing and captioning alone: it has no optimizer state. "
            "Give the run directory, or a model_epoch_N.pt, that it was exported from"
        )


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


def is_plain_tensor(value: Any, dtype: torch.dtype) -> bool:
    """A tensor of this type that is as large as it says (an expanded one is not contiguous)."""
    return (
        type(value) is torch.Tensor
        and (value.layout, value.device.type, value.dtype) == (torch.strided, "cpu", dtype)
        and value.is_contiguous()
    )


def is_tensor(value: Any) -> bool:
    """A plain float32 tensor of finite numbers."""
    return is_plain_tensor(value, torch.float32) and bool(value.isfinite().all())


def is_vocabulary(value: Any) -> bool:
    return (
        is_list(value, is_text) and value[:4] == ["<PAD>", "<SOS>", "<EOS>", "<UNK>"] and len(set(value)) == len(value)
    )


TEXT = Rule(is_text, "a text of one line")
NUMBERS = Rule(lambda value: is_list(value, real().fits), "a list of numbers")
ENCODER = Rule(lambda value: type(value) is str and registry.is_encoder(value), "an encoder of this program")
SCHEDULE = {
    "settings": {
        "type": one_of(*SCHEDULERS),
        "learning_rate": real(0), "min_lr": real(0), "patience": whole(), "factor": real(0, 1), "step_size": whole(1),
        "gamma": real(0, 1), "t_max": whole(1), "warmup_epochs": whole(), "first_epoch": whole(), "epochs": whole(1),
        "steps_per_epoch": whole(1),
    },
    "plateau": {"rate": real(0), "best": real(), "bad_epochs": whole()},
}  # fmt: skip
CONSENSUS: dict[str, Any] = {  # what `consensus.NgramHead` takes; `check_consensus` looks further
    **dict.fromkeys(
        ("keys", "sizes"), Rule(lambda value: is_plain_tensor(value, torch.int64), "a tensor of whole numbers")
    ),
    **dict.fromkeys(("idf", "centre", "project", "expect"), Rule(is_tensor, "a float32 tensor of finite numbers")),
    "log_images": real(0, 100),
    "weight": real(0, 1e6),
}
# The fields that the program reads, each with its form: a rule, or a table of forms, or either or None. Other fields are
# ignored.
CHECKPOINT: dict[str, Any] = {
    "epoch": whole(),
    "decoder": Rule(lambda value: is_table(value, is_tensor), "a table of float32 tensors with finite numbers"),
    "encoder": {"name": ENCODER, "weights_hash": TEXT, "transform": TEXT},
    "vocabulary": Rule(is_vocabulary, "a list of different words that begins with <PAD>, <SOS>, <EOS>, <UNK>"),
    "flags": {flag.name: value_of(flag) for flag in FLAGS.values() if flag.checkpoint},
    "optimizer": {"state": Rule(lambda value: type(value) is dict, "AdamW's moments by parameter")},
    "scaler": Rule(lambda value: is_table(value, is_scalar), "the state of a loss scaler"),
    "progress": {"first_epoch": whole(), "step": whole(), "loss_sum": real(-1e300, 1e300), "reward_sum": real(0, 1e300),
                 "tokens": whole()},
    "consensus": OrNone(CONSENSUS),
    "confidence": OrNone(Rule(is_calibration, "a table of rising scores and shares from 0 to 1, of beam or consensus,")),
    "decoding": OrNone({"beam_size": size("beam_size"), "length_penalty": real(0, LIMITS["length_penalty"]), "cider": real(), "images": whole()}),
    "schedule": OrNone(SCHEDULE),
    "split": Rule(is_stored, "a split by image name, size and hash"),
    "loss_curve": dict.fromkeys(("epochs", "training_losses", "validation_losses", "learning_rates"), NUMBERS),
    "metrics_history": Rule(
        lambda value: is_list(value, lambda entry: is_table(entry, is_scalar)), "a list of tables of scores"
    ),
    "best": {"score": real(), "epoch": whole(), "metric": TEXT},
}  # fmt: skip


# config.json of an exported folder; the exporting machine's paths are not in it.
EXPORTED: dict[str, Any] = {
    "schema": whole(),
    "epoch": whole(),
    "encoder": CHECKPOINT["encoder"],
    "decoding": CHECKPOINT["decoding"],
    "consensus": OrNone({name: CONSENSUS[name] for name in ("log_images", "weight")}),
    "confidence": CHECKPOINT["confidence"],
    "flags": {name: form for name, form in CHECKPOINT["flags"].items() if not FLAGS[name].place},
    "sha256": dict.fromkeys((EXPORTED_WEIGHTS, "vocabulary.json", "split.json"), TEXT),
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


class SkipInit(TorchFunctionMode):
    """Leave the weights of new layers as they are: on the meta device a first random number takes PyTorch a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def check_architecture(checkpoint: dict[str, Any], path: Path) -> Decoder:
    """Compare flags, vocabulary and weights, and return the decoder on the meta device, where it takes no memory.

    Raises:
        UserError: they describe different networks, or lists that belong together differ in length.
    """
    flags, weights, encoder = checkpoint["flags"], checkpoint["decoder"], checkpoint["encoder"]
    if flags["encoder"] != encoder["name"]:
        raise malformed(path, "its flags name another encoder than it holds")
    if problem := size_problem(flags):
        raise malformed(path, problem)
    try:
        spec = encoder_of(flags)
    except UserError as error:
        raise UserError(f"{path} needs an encoder that cannot be had here: {error}") from error
    if encoder["transform"] != spec.transform:
        raise UserError(
            f"{path}: encoder.transform is not {spec.transform}, which is that of {spec.name} here. Give the encoder the "
            "config that it had in training, or use another checkpoint"
        )
    with torch.device("meta"), SkipInit():
        decoder = build_decoder(flags, len(checkpoint["vocabulary"]), spec)
    expected = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} holds another architecture than its flags and vocabulary describe: {name} is "
                f"{found.get(name, 'absent')} rather than {expected.get(name, 'absent')}"
            )
    if checkpoint["schedule"] and len(checkpoint["schedule"]["settings"]) != len(SCHEDULE["settings"]):
        raise malformed(path, "schedule.settings has unknown fields")
    if checkpoint["consensus"]:
        check_consensus(checkpoint["consensus"], len(checkpoint["vocabulary"]) + 1, (spec.whole or spec).channels, path)
    if len(set(map(len, (checkpoint["loss_curve"][name] for name in CHECKPOINT["loss_curve"])))) != 1:
        raise malformed(path, "the lists of loss_curve are not equally long")
    return decoder


def check_consensus(stored: dict[str, Any], words: int, channels: int, path: Path) -> None:
    """Make sure that the table and the matrices of consensus decoding belong together.

    Args:
        words: of the vocabulary, and the end token.
        channels: of the encoder's features.

    Raises:
        UserError: they do not.
    """
    keys, rank = stored["keys"], stored["expect"].shape[:1].numel()  # a tensor without axes fails below
    ngrams = keys.numel()
    shapes = {"keys": (ngrams,), "sizes": (4,), "idf": (ngrams,), "centre": (channels,), "project": (channels + 1, rank),
              "expect": (rank, ngrams)}  # fmt: skip
    if any(stored[name].shape != shape for name, shape in shapes.items()):
        raise malformed(path, "the tensors of consensus have sizes that do not belong together")
    sizes = stored["sizes"].tolist()
    if min(sizes) < 0 or sum(sizes) != ngrams:
        raise malformed(path, "consensus.sizes do not add up to its n-grams")
    shorter = 1  # n-grams that are a word shorter
    for part in keys.split(sizes):
        if len(part) and (bool((part.diff() < 1).any()) or part[0] < 0 or part[-1] >= shorter * words):
            raise malformed(path, "consensus.keys are not sorted numbers of n-grams")
        shorter = len(part)


def check_moments(state: dict[Any, Any], decoder: Decoder, path: Path) -> None:
    """Make sure that AdamW can go on from a saved state.

    Raises:
        UserError: it belongs to other weights.
    """
    weights = dict(enumerate(decoder.parameters()))
    for number, moments in state.items():
        if number not in weights:
            raise malformed(path, "optimizer.state names a parameter that is not there")
        shapes = {"step": torch.Size(), "exp_avg": weights[number].shape, "exp_avg_sq": weights[number].shape}
        if not is_table(moments, is_tensor) or {name: tensor.shape for name, tensor in moments.items()} != shapes:
            raise malformed(path, f"optimizer.state.{number} does not fit its parameter")


def load_decoder_weights(decoder: Decoder, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Fill a decoder.

    Raises:
        UserError: the weights are of another architecture.
    """
    try:
        decoder.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} holds another architecture: {str(error).splitlines()[-1].strip()[:200]}") from error


class CheckpointSaver:
    """Owns the checkpoints of one run: `last.pt`, `best.pt`, `model_epoch_N.pt`, and which of these are deleted.

    Only files that this run wrote are ever deleted: `model_epoch_N.pt` of its own epochs. `best.pt` and `last.pt` are
    files of their own, hard links where the disk has them.
    """

    def __init__(self, directory: Path, keep: int = 0, first_epoch: int = 0):
        """Args:
        directory: the run directory, which exists.
        keep: the newest epochs whose files stay (`--keep_checkpoints`); 0 for all.
        first_epoch: epochs that were trained before this run, by the run of --model_path.
        """
        self.directory, self.keep, self.first_epoch = directory, keep, first_epoch
        self.last, self.best = directory / "last.pt", directory / "best.pt"
        self.checked = False

    def epoch_file(self, epoch: int) -> Path:
        return self.directory / f"model_epoch_{epoch}.pt"

    def save_last(self, checkpoint: dict[str, Any]) -> None:
        """Write `last.pt`; the first one is read back, so that no run trains for nothing.

        Raises:
            UserError: it cannot be written, or is not one that `load_checkpoint` reads.
        """
        save_checkpoint(self.last, checkpoint)
        if not self.checked:
            load_checkpoint(self.last)
            self.checked = True

    def save_epoch(self, checkpoint: dict[str, Any], epoch: int, is_best: bool) -> None:
        """Write the checkpoint of a finished epoch and `publish` it."""
        save_checkpoint(self.epoch_file(epoch), checkpoint)
        self.publish(epoch, is_best)

    def publish(self, epoch: int, is_best: bool) -> None:
        """Make the newest epoch's file `last.pt` and, where it is, `best.pt`; then delete the files of old epochs.

        Doing it again changes nothing: a resumed run does, since a crash may have come in between.
        """
        newest = self.epoch_file(epoch)
        if newest.is_file():
            if is_best:
                link_or_copy(newest, self.best)
            link_or_copy(newest, self.last)
        if self.keep:
            for old in range(self.first_epoch + 1, epoch - self.keep + 1):
                self.epoch_file(old).unlink(missing_ok=True)


def carry_best(checkpoint: dict[str, Any], path: Path, directory: Path) -> dict[str, Any] | None:
    """Take the old run's best checkpoint along, so that the new run has a best.pt even if it gets no better.

    Args:
        checkpoint: the one that the new run trains on from, read from `path`.
        directory: of the new run.

    Returns:
        its score and epoch, or None where its file is gone.
    """
    best = checkpoint["best"]
    # best.pt first: it may have tuned decoding, consensus and confidence, which the file of its epoch has not.
    for candidate in (path.parent / "best.pt", path, path.parent / f"model_epoch_{best['epoch']}.pt"):
        if candidate.is_file() and load_checkpoint(candidate)["epoch"] == best["epoch"]:
            link_or_copy(candidate, directory / "best.pt")
            return dict(best)
    log.warning(f"The old run's best checkpoint (epoch {best['epoch']}) is gone: this run finds its own best")
    return None
