"""Run directories: how their files are read, and how a `--model_path` finds its checkpoint.

Needs neither PyTorch nor pandas. Tables of runs are made in `captioning.runs.table`, files are written by
`experiment_utils`.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np

from captioning.config.flags import CONFIG_NAMES, FLAGS, NOT_CONFIGURABLE
from captioning.io import (
    EXPORTED_WEIGHTS,
    UserError,
    first_line,
    log,
    printable,
    program,
    read_json,
    remove_stale_files,
)
from captioning.scoring.scores import BY_IMAGE, METRIC_NAMES, ImageScores

if TYPE_CHECKING:
    from filelock import BaseFileLock

DRY_RUN = "dry_run_"  # begins the names of runs that are not results
PRETRAINED = Path(__file__).parent.parent / "pretrained"  # models that come with the package, each an exported folder
PRETRAINED_MODEL = "flickr8k_attention"  # the one of them that captions images unless another is named
# The lists of loss_curve.json, which are of equal length, and the columns of `training_rows`.
CURVE = {"epochs": "epoch", "training_losses": "training_loss", "validation_losses": "validation_loss"}
CURVE["learning_rates"] = "learning_rate"
# What every row of test_metrics.json has, beside its scores.
TEST_KEYS = (
    "checkpoint", "epoch", "split", "images", "views", "beam_size", "length_penalty", "consensus", "captions_file",
    "scores_file",
)  # fmt: skip


def reproducing_command(words: list[str]) -> str:
    """Return the main script's command line with these arguments, quoted for a shell."""
    return f"{program()} {shlex.join(words)}".rstrip()


def command_to_test(directory: Path) -> str:
    """Return the command that tests a run."""
    return reproducing_command(["--mode", "test", "--model_path", str(directory)])


def command_to_tune(checkpoint: Path) -> str:
    """Return the command that tunes a checkpoint, or, of an exported folder, the run that it was exported from."""
    exported = checkpoint.suffix == ".safetensors"
    command = reproducing_command(["--mode", "tune", "--model_path", "RUN" if exported else str(checkpoint)])
    return f"{command}{', before RUN is exported,' if exported else ''}"


# --------------------------------------------------------------------------------------------------
# Reading a run


@dataclass
class StoredRun:
    """The content of a run directory."""

    directory: Path
    flags: dict[str, Any]  # of run_config.json, under our names: plain values and lists of them
    facts: dict[str, str]  # the lines "Name: value" of run_summary.txt
    epochs: list[dict[str, Any]]  # see `training_rows`
    tests: list[dict[str, Any]]  # the rows of test_metrics.json, the latest last
    ensembles: list[dict[str, Any]]  # the rows of ensemble_metrics.json; checkpoint and epoch are lists
    damage: list[str]  # what could not be read: messages that name file and field

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch of best.pt, as training recorded it; None before the first."""
        return next((row for row in reversed(self.epochs) if row.get("is_best") is True), None)

    @property
    def last_epoch(self) -> int:
        return int(self.epochs[-1]["epoch"]) if self.epochs else 0

    @property
    def latest(self) -> dict[str, Any]:
        """The row of the latest test, empty before the first."""
        return self.tests[-1] if self.tests else {}

    def parameters(self) -> dict[str, Any]:
        """Return the flags that a score may depend on; those of a schedule only where there is one."""
        idle = () if self.flags.get("use_scheduler") else ("use_scheduler",)
        return {
            name: value
            for name, value in self.flags.items()
            if name not in NOT_CONFIGURABLE
            and (name not in FLAGS or (FLAGS[name].parameter and FLAGS[name].needs not in idle))
        }

    def scores(self) -> dict[str, float]:
        """Return the latest test's scores, and under `val_...` the best epoch's on the validation images."""
        test, best = self.latest, self.best or {}
        found = {key: test.get(key) for key in METRIC_NAMES} | {f"val_{key}": best.get(key) for key in METRIC_NAMES}
        found["val_loss"] = best.get("validation_loss")
        return {key: value for key, value in found.items() if is_number(value)}


def is_number(value: Any) -> TypeGuard[float]:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def is_plain_value(value: Any) -> bool:
    return value is None or type(value) in (str, bool, float) or is_number(value)


def is_epoch(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def read_run(directory: Path) -> StoredRun:
    """Read the files of a run; those that are not there yet count as empty.

    So does a file of another form than this program writes, and `StoredRun.damage` names it and the field.

    Raises:
        UserError: not a run directory.
    """
    if not (directory / "run_config.json").is_file():
        raise UserError(f"{directory} is not a run directory: it has no run_config.json. Give one, or a folder of runs")
    damage: list[str] = []

    def read(name: str, kind: type, problem: Callable[[Any], str]) -> Any:
        try:
            return read_checked(directory / name, kind, problem)
        except UserError as error:
            damage.append(str(error))
            return kind()

    ours = {theirs: name for name, theirs in CONFIG_NAMES.items()}
    flags = {ours.get(key, key): value for key, value in read("run_config.json", dict, wrong_flag).items()}
    flags.pop("explicit", None)  # which of the flags were set by hand
    curve = read("loss_curve.json", dict, wrong_list)
    history = read("metrics_history.json", list, lambda rows: wrong_row(rows, ("epoch",)))
    tests, ensembles = (read(f"{name}_metrics.json", list, wrong_row) for name in ("test", "ensemble"))
    facts = read_facts(directory / "run_summary.txt")
    return StoredRun(directory, flags, facts, training_rows(curve, history) if curve else [], tests, ensembles, damage)


def read_test_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `test_metrics.json`, none where it is absent.

    Raises:
        UserError: the file is damaged, or from an older commit.
    """
    rows: list[dict[str, Any]] = read_checked(path, list, wrong_row)
    return rows


def read_checked(path: Path, kind: type, problem: Callable[[Any], str]) -> Any:
    """Return the JSON in a file, an empty dict or list where there is none.

    Raises:
        UserError: it cannot be read, is of another kind, or `problem` says what is wrong in it.
    """
    content = read_json(path) if path.is_file() else kind()
    wrong = problem(content) if isinstance(content, kind) else f"expected {'an object' if kind is dict else 'a list'}"
    if wrong:
        raise UserError(f"{path}: {wrong}")
    return content


def wrong_flag(config: Mapping[str, Any]) -> str:
    """Return what is wrong with a `run_config.json`; empty where nothing is."""
    wrong = (
        key for key, value in config.items() if not all(map(is_plain_value, value if type(value) is list else [value]))
    )
    return next((f"{key} has a wrong value" for key in wrong), "")


def wrong_list(curve: Mapping[str, Any]) -> str:
    """Return what is wrong with a `loss_curve.json`; empty where nothing is."""
    for name in CURVE if curve else ():
        values = curve.get(name)
        if not isinstance(values, list) or not all(map(is_epoch if name == "epochs" else is_plain_value, values)):
            return f"{name} is not a list of numbers"
        if len(values) != len(curve["epochs"]):
            return f"{name} has {len(values)} entries, epochs has {len(curve['epochs'])}"
    return ""


def wrong_row(rows: Sequence[Any], required: Sequence[str] = TEST_KEYS) -> str:
    """Return what is wrong with a table of scores, every row of which has some fields; empty where nothing is."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            return f"entry {number} is not an object"
        if missing := [key for key in required if key not in row]:
            return f"entry {number} has no {missing[0]}. Move the file away, then test again"
        if wrong := [key for key, value in row.items() if not fits(key, value)]:
            return f"entry {number}: {wrong[0]} has a wrong value"
    return ""


def fits(key: str, value: Any) -> bool:
    """Whether a field of a table of scores has the form that this program writes."""
    if key.endswith("_interval"):
        return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
    values = value if key in ("checkpoint", "epoch") and isinstance(value, list) else [value]  # a list: of an ensemble
    return all(map(is_epoch if key == "epoch" else is_number if key in METRIC_NAMES else is_plain_value, values))


def read_facts(path: Path) -> dict[str, str]:
    """Return the lines "Name: value" of a `run_summary.txt`; what cannot be read is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return dict(re.findall(r"^ *([A-Z][A-Za-z ]{0,40}): (.+)$", text, re.MULTILINE))


def training_rows(curve: Mapping[str, Sequence[Any]], history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join an epoch's losses, learning rate and validation scores, for every epoch of `loss_curve.json`.

    Args:
        curve, history: the content of `loss_curve.json` and `metrics_history.json`.
    """
    about = ("epoch", "split", "beam_size", "images")  # of a score, not scores
    scores = {entry["epoch"]: {k: v for k, v in entry.items() if k not in about} for entry in history}
    columns = [[(name, value) for value in curve[key]] for key, name in CURVE.items()]
    rows = [dict(row) for row in zip(*columns, strict=True)]
    return [row | scores.get(row["epoch"], {}) for row in rows]


class ByImage(NamedTuple):
    """A test's scores by image."""

    names: list[str]
    scores: ImageScores  # `rouge` is NaN: it is not stored
    confidence: np.ndarray | None = None  # (n,) of each caption, where the model has a calibration
    supported: np.ndarray | None = None  # (n,) the share of its content words that a reference has


def read_scores(run: StoredRun, row: Mapping[str, Any]) -> ByImage:
    """Read the file of scores by image that belongs to a row of `test_metrics.json`.

    Raises:
        UserError: there is none, or it has another form.
    """
    path = run.directory / Path(str(row["scores_file"])).name  # the row of a stranger's run names no file elsewhere
    if not os.path.isfile(path):  # where Path raises over a name that no file can have
        raise UserError(f"{path} is not there: {command_to_test(run.directory)}")
    content = read_json(path)

    def column(place: Mapping[str, Any], name: str, *shape: int) -> np.ndarray:
        values = np.array(place[name], dtype=np.float64)
        if values.shape != (len(names), *shape) or not (np.abs(values) < 1e9).all():
            raise ValueError(f"{name} is not a number for each image")
        return values

    try:
        names = content["image_id"]
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError("image_id is not a list of different names")
        counts = {name: column(content["bleu"], name, 4) for name in ("guess", "correct")}
        counts |= {name: column(content["bleu"], name) for name in ("length", "reference_length")}
        means = {name: column(content, name) for name in BY_IMAGE}
        calibrated = {name: column(content, name) for name in ("confidence", "supported") if name in content}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a file of scores by image ({first_line(error)}): test again") from None
    return ByImage(names, ImageScores(**means, **counts, rouge=np.full(len(names), np.nan)), **calibrated)


def read_texts(run: StoredRun, name: Any) -> dict[str, list[str]]:
    """Read the captions in a file of a run, by image id: COCO's number or the file name; empty where it is absent.

    Raises:
        UserError: the file has another form than COCO's results or annotations.
    """
    path = run.directory / Path(str(name)).name
    if not os.path.isfile(path):
        return {}
    content = read_json(path)
    texts: dict[str, list[str]] = {}
    try:
        for entry in content["annotations"] if isinstance(content, dict) else content:
            texts.setdefault(str(entry["image_id"]), []).append(entry["caption"])
    except (KeyError, TypeError):
        texts = {}
    if not texts or not all(isinstance(text, str) for known in texts.values() for text in known):
        raise UserError(f"{path} is not a list of captions: test the run again")
    return texts


# --------------------------------------------------------------------------------------------------
# Finding runs and checkpoints


def run_start_key(directory: Path) -> tuple[str, int, str]:
    """Return the start of a run, to sort by: the second in its name, which copies keep, then its `run_config.json`."""
    config, second = directory / "run_config.json", re.search(r"\d{8}_\d{6}", directory.name)
    return second[0] if second else "", config.stat().st_mtime_ns if config.is_file() else 0, directory.name


def run_directories(folder: Path) -> list[Path]:
    """Return the folder itself or all run directories below it, oldest first, without dry runs.

    Raises:
        UserError: there is none.
    """
    found = []
    for place, folders, files in os.walk(folder):  # follows no links, so that there are no circles
        if "run_config.json" in files and (Path(place) == folder or not Path(place).name.startswith(DRY_RUN)):
            found.append(Path(place))
            folders.clear()
    if not found:
        raise UserError(f"no run directory at or below {folder}: give a folder with a run_config.json, or one of such")
    return sorted(found, key=run_start_key)


def find_run(path: Path) -> Path:
    """Return a run directory: the path itself, that of a checkpoint in it, or the newest one below a folder.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        path = path.parent
    found = run_directories(path)[-1]
    if found != path:
        log.info(printable(f"Using {found} (the newest run below {path})"))
    return found


def find_checkpoint(model_path: Path) -> Path:
    """Return the file that `--model_path` (or `--init_from`) names: a checkpoint, or that of a run directory or an exported folder.

    `hf-hub:OWNER/NAME` is an exported folder on the Hugging Face hub, see `captioning.runs.hub`. What is not there may be the
    name of a model that comes with the package. Else the newest run below the folder that has the named file is used, so
    that the paths of the original README work.

    Raises:
        UserError: nothing fits.
    """
    if (name := model_path.as_posix()).startswith("hf-hub:"):  # as_posix: Windows' Path has turned the slash round
        from captioning.runs.hub import fetch_model

        return fetch_model(name)
    # os.path rather than Path, which raises over a name that no file can have.
    if os.path.isfile(model_path):
        return model_path
    if not os.path.isdir(model_path) and (packaged := pretrained().get(str(model_path))):
        return packaged
    folder, name = (model_path, "best.pt") if os.path.isdir(model_path) else (model_path.parent, model_path.name)
    for file in (name, EXPORTED_WEIGHTS) if folder == model_path else (name,):
        if os.path.isfile(folder / file):
            return folder / file
    # A name without an ending is no checkpoint's. Names may contain what glob reads as a pattern.
    below = folder.rglob("*") if os.path.isdir(folder) and Path(name).suffix else ()
    runs = [p for p in below if p.name == name and p.is_file() and not p.parent.name.startswith(DRY_RUN)]
    if not runs:
        names = f"the name of a model that comes with the package ({', '.join(pretrained()) or 'there is none'})"
        tried = f", and no run below {folder} has a {name}" if Path(name).suffix else ""
        raise UserError(
            f"the model {model_path} is not there{tried}: "
            f"give a checkpoint (.pt), a run directory, a folder of runs, an exported folder, or {names}"
        )
    newest = max(runs, key=lambda path: run_start_key(path.parent))
    log.info(printable(f"Using {newest} (the newest run below {folder} that has {name})"))
    return newest


def pretrained() -> dict[str, Path]:
    """Return the weights of the models that come with the package, by name."""
    return {path.parent.name: path for path in sorted(PRETRAINED.glob(f"*/{EXPORTED_WEIGHTS}"))}


def given_model(model_path: list[Path] | None) -> Path:
    """Return the `--model_path`, or the model that comes with the package where none was given."""
    if model_path:
        return model_path[0]
    log.info(f"Using {PRETRAINED_MODEL}, which comes with the package; --model_path names another")
    return PRETRAINED / PRETRAINED_MODEL


def results_directory(checkpoint: Path) -> Path:
    """Return where the results of a test go: beside the checkpoint, but to `saved_models/` for one that was installed."""
    if checkpoint.parent.parent == PRETRAINED:
        return Path("saved_models", "pretrained", checkpoint.parent.name)
    *_, model, folder, commit, _ = ("", "", *checkpoint.absolute().parts)
    if folder == "snapshots" and model.startswith("models--"):  # into which nothing of ours is written
        return Path("saved_models", "hub", model.removeprefix("models--"), commit)
    return checkpoint.parent


def start_command(directory: Path) -> str:
    """Return the command that started a run, as its run_config.json keeps it."""
    return str(read_json(directory / "run_config.json").get("command", "its command"))


def lock_run_directory(directory: Path) -> BaseFileLock:
    """Keep other processes from training in this run directory for as long as the lock is referred to.

    Raises:
        UserError: it is not there, or another process trains in it.
    """
    if not directory.is_dir():
        raise UserError(f"--resume {directory} is not there: give the directory of the run that was interrupted")
    from filelock import FileLock, Timeout

    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training in {directory}: wait for it, or stop it first") from None
    remove_stale_files(directory)
    return lock


def newest_interrupted(folder: Path) -> Path | None:
    """Return the newest run below a folder that was not finished and can be resumed, or None."""
    found = [
        path.parent
        for path in folder.rglob("last.pt")
        if (path.parent / "run_config.json").is_file() and not (path.parent / "run_summary.txt").exists()
    ]
    return max(found, key=run_start_key, default=None)


# --------------------------------------------------------------------------------------------------
# Epoch files


def deletable_epochs(directory: Path) -> tuple[list[Path], int]:
    """Find `model_epoch_N.pt` of the run's own epochs, but what was trained after last.pt was written (a crash in between).

    Returns:
        the files, and the bytes that deleting them frees: a file that best.pt or last.pt is a hard link to frees none.

    Raises:
        UserError: best.pt or last.pt is missing or damaged, so that an epoch file may be all there is.
    """
    kept = [directory / "best.pt", directory / "last.pt"]
    for path in kept:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip() is not None  # compares the checksums, which PyTorch does not
        except (OSError, zipfile.BadZipFile):
            damaged = True
        if damaged:
            raise UserError(f"{path} is missing or damaged: the epoch files of this run stay")
    written = kept[1].stat().st_mtime_ns
    named = [directory / f"model_epoch_{row['epoch']}.pt" for row in read_run(directory).epochs]
    files = [path for path in named if path.is_file() and not path.is_symlink() and path.stat().st_mtime_ns <= written]
    freed = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
    return files, freed


# --------------------------------------------------------------------------------------------------
# How values are shown


def plain(value: Any) -> str:
    """Return a value as text for a terminal, with control characters as escapes."""
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return printable(f"{value:g}" if type(value) is float else str(value))


def score_text(key: str, value: float) -> str:
    """Return a score as papers write it, in hundredths; losses as they are."""
    return f"{value:.3f}" if key.endswith("loss") else f"{100 * value:.1f}"


def decoding(row: Mapping[str, Any]) -> str:
    """Return the way of decoding of a test: `greedy`, `beam 3`, `beam 20, consensus`."""
    if row["beam_size"] == 1:
        return "greedy"
    return f"beam {plain(row['beam_size'])}{', consensus' if row['consensus'] else ''}"
