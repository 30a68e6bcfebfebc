"""Checkpoints: written whole or not at all, read without executing anything, and checked field by field.

A checkpoint comes from anybody: each field is compared with `CHECKPOINT`, and the weights with the decoder that the
flags describe. What is not refused: a forged `.pt` may take much memory or time while PyTorch reads it. An exported
folder cannot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from captioning.config.flags import SCHEDULERS
from captioning.decoders.base import Decoder, build_decoder
from captioning.encoders.base import encoder_of, read_tensors
from captioning.io import UserError, first_line, link_or_copy, log, write_atomic
from captioning.runs.forms import (
    ENCODER_WEIGHTS,
    GAPS,
    HEAD,
    MODEL,
    NUMBERS,
    TEXT,
    OrNone,
    Rule,
    check_model,
    is_list,
    is_scalar,
    is_table,
    malformed,
    one_of,
    read_exported,
    real,
    require_form,
    require_schema,
    whole,
    with_defaults,
)

SCHEMA = 6  # of the checkpoint; a reader refuses any other


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write plain types and tensors, atomically, so that `torch.load(weights_only=True)` reads them."""
    head = checkpoint["consensus"]
    tensors = head and {
        name: torch.from_numpy(each) if isinstance(each, np.ndarray) else each for name, each in head.items()
    }
    write_atomic(path, lambda file: torch.save({"schema": SCHEMA, **checkpoint, "consensus": tensors}, file))


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
    if type(checkpoint.get("consensus")) is dict:
        checkpoint["consensus"] = {name: as_array(each) for name, each in checkpoint["consensus"].items()}
    require_form(checkpoint, CHECKPOINT, path)
    decoder = check_architecture(checkpoint, path)
    check_moments(checkpoint["optimizer"]["state"], decoder, path)
    return checkpoint


def load_exported(path: Path) -> dict[str, Any]:
    """Read an exported folder as a checkpoint that has no optimizer state.

    Args:
        path: its `model.safetensors`.

    Raises:
        UserError: see `read_exported`; or the weights are not those of its decoder.
    """
    from safetensors.torch import load_file

    model = read_exported(path)
    try:
        tensors = {
            name: each.float() if each.is_floating_point() else each
            for name, each in load_file(path).items()
            if not name.startswith((HEAD, ENCODER_WEIGHTS))
        }
    except Exception as error:  # safetensors and torch each raise their own
        raise UserError(f"{path} cannot be read as safetensors: {first_line(error)}. Export it again") from error
    del model["input"]
    checkpoint = model | {
        "schema": SCHEMA, "decoder": tensors, "optimizer": None, "scaler": {}, "schedule": None,
        "progress": {"first_epoch": model["epoch"], "step": 0, "loss_sum": 0.0, "reward_sum": 0.0, "tokens": 0},
        "loss_curve": {name: [] for name in CHECKPOINT["loss_curve"]}, "metrics_history": [],
        "best": {"score": 0.0, "epoch": model["epoch"], "metric": model["flags"]["best_metric"]},
    }  # fmt: skip
    require_form(checkpoint, {name: form for name, form in CHECKPOINT.items() if name != "optimizer"}, path)
    check_architecture(checkpoint, path)
    return checkpoint


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


def as_array(value: Any) -> Any:
    """Return a plain tensor as an array, anything else as it is."""
    return value.numpy() if type(value) is torch.Tensor and is_plain_tensor(value, value.dtype) else value


SCHEDULE = {
    "settings": {
        "type": one_of(*SCHEDULERS),
        "learning_rate": real(0), "min_lr": real(0), "patience": whole(), "factor": real(0, 1), "step_size": whole(1),
        "gamma": real(0, 1), "t_max": whole(1), "warmup_epochs": whole(), "first_epoch": whole(), "epochs": whole(1),
        "steps_per_epoch": whole(1),
    },
    "plateau": {"rate": real(0), "best": real(), "bad_epochs": whole()},
}  # fmt: skip
# The fields of a checkpoint that the program reads; others are ignored.
CHECKPOINT: dict[str, Any] = MODEL | {
    "decoder": Rule(lambda value: is_table(value, is_tensor), "a table of float32 tensors with finite numbers"),
    "optimizer": {"state": Rule(lambda value: type(value) is dict, "AdamW's moments by parameter")},
    "scaler": Rule(lambda value: is_table(value, is_scalar), "the state of a loss scaler"),
    "progress": {"first_epoch": whole(), "step": whole(), "loss_sum": real(-1e300, 1e300), "reward_sum": real(0, 1e300),
                 "tokens": whole()},
    "schedule": OrNone(SCHEDULE),
    "loss_curve": {"epochs": NUMBERS, "training_losses": GAPS, "validation_losses": NUMBERS, "learning_rates": GAPS},
    "metrics_history": Rule(
        lambda value: is_list(value, lambda entry: is_table(entry, is_scalar)), "a list of tables of scores"
    ),
    "best": {"score": real(), "epoch": whole(), "metric": TEXT},
}  # fmt: skip


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
    check_model(checkpoint | {"consensus": None}, None, path)
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
    check_model(checkpoint, (spec.whole or spec).channels, path)
    if len(set(map(len, (checkpoint["loss_curve"][name] for name in CHECKPOINT["loss_curve"])))) != 1:
        raise malformed(path, "the lists of loss_curve are not equally long")
    return decoder


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
