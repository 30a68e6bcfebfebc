"""Runs beside each other: a table of them, two compared, and the room that their epoch files take.

`python experiment_utils.py` is the command line. Nothing here needs PyTorch, so that a table comes at once.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from captioning.io import (
    UserError,
    check_tensor_zip,
    first_line,
    format_bytes,
    log,
    printable,
    read_json,
)
from captioning.scores import METRIC_NAMES, Difference, ImageScores, paired_bootstrap

if TYPE_CHECKING:
    from filelock import BaseFileLock
from captioning.scores import paired_bleu4

LOW_IS_GOOD = ("wer", "val_loss")
SHOWN_SCORES = ("cider", "bleu4", "rouge_l", "meteor", "spice", "wer", "val_cider", "val_loss")
COMPARED = {"cider": "CIDEr", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "wer": "WER"}
# Where and how a run ran, what was drawn and said: no reason for another score.
NO_PARAMETERS = {
    "mode", "resume", "config", "command", "timestamp", "model_save_dir", "num_workers", "checkpoint_minutes",
    "keep_checkpoints", "device", "compile", "features_on_device", "feature_cache", "quiet", "verbose", "tensorboard",
    "save_attention_viz", "attention_viz_samples", "attention_viz_images", "attention_viz_format", "attention_viz_dpi",
    "advanced_attention_viz", "dry_run", "spice", "predictions", "split",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Reading runs


@dataclass
class Run:
    """What a run directory tells of itself, whoever wrote it."""

    directory: Path
    flags: dict[str, Any]  # of run_config.json, under our names; plain values
    epochs: list[dict[str, Any]]  # `experiment_utils.training_rows`
    tests: list[dict[str, Any]]  # the rows of test_metrics.json, the latest last

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch that `--best_metric` picks, None before the first."""
        metric = str(self.flags.get("best_metric", "cider"))
        key, sign = ("validation_loss", -1) if metric == "val_loss" else (metric, 1)
        known = [row for row in self.epochs if is_number(row.get(key))]
        return max(known, key=lambda row: sign * row[key]) if known else None

    def parameters(self) -> dict[str, Any]:
        """The flags that a score may depend on; those of a schedule only where there is one."""
        schedule = self.flags.get("use_scheduler")
        return {
            name: value
            for name, value in self.flags.items()
            if name not in NO_PARAMETERS
            and (schedule or not (name.startswith("scheduler_") or name in ("min_lr", "warmup_epochs")))
        }

    def scores(self) -> dict[str, float]:
        """The latest test's scores, and under `val_...` the best epoch's on the validation images."""
        found = {key: value for key, value in (self.tests[-1] if self.tests else {}).items() if key in METRIC_NAMES}
        best = {"loss" if key == "validation_loss" else key: value for key, value in (self.best or {}).items()}
        found |= {f"val_{key}": value for key, value in best.items() if key in METRIC_NAMES or key == "loss"}
        return {key: value for key, value in found.items() if is_number(value)}


def is_number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def is_plain(value: Any) -> bool:
    return value is None or type(value) in (str, bool, float) or is_number(value)


def read_run(directory: Path) -> Run:
    """Read a run's own JSON files; those that are not there yet count as empty.

    Raises:
        UserError: no run directory, or a file of another form.
    """

    def read(name: str, empty: Any, fits: Callable[[Any], bool]) -> Any:
        path = directory / name
        if not path.is_file():
            return empty
        value = read_json(path)
        if not fits(value):
            raise UserError(f"{path} has another form than this program writes: leave the run out, or mend the file")
        return value

    def is_table(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(row, dict) and all(is_plain(cell) or key.endswith("_interval") for key, cell in row.items())
            for row in value
        )

    def is_curve(value: Any) -> bool:
        names = ("epochs", "training_losses", "validation_losses", "learning_rates")
        columns: list[Any] = [value.get(name) for name in names] if isinstance(value, dict) else [None]
        return (
            all(isinstance(column, list) for column in columns)
            and len({len(column) for column in columns}) == 1
            and all(type(epoch) is int and 0 <= epoch < 2**31 for epoch in columns[0])
        )

    if not (directory / "run_config.json").is_file():
        raise UserError(f"{directory} is no run directory: it has no run_config.json. Give one, or a folder of runs")
    ours = {theirs: name for name, theirs in CONFIG_NAMES.items()}
    flags = read("run_config.json", {}, lambda value: isinstance(value, dict))
    flags = {ours.get(key, key): value for key, value in flags.items() if is_plain(value) or isinstance(value, list)}
    columns = dict.fromkeys(("epochs", "training_losses", "validation_losses", "learning_rates"), ())
    history = read("metrics_history.json", [], lambda value: is_table(value) and all("epoch" in row for row in value))
    epochs = training_rows(read("loss_curve.json", columns, is_curve), history)
    return Run(directory, flags, epochs, read("test_metrics.json", [], is_table))


def run_directories(folder: Path) -> list[Path]:
    """The folder itself or all run directories below it, oldest first; dry runs are no results.

    Raises:
        UserError: there is none.
    """
    found = []
    for place, folders, files in os.walk(folder):  # follows no links: no circles
        if "run_config.json" in files and (Path(place) == folder or not Path(place).name.startswith(DRY_RUN)):
            found.append(Path(place))
            folders.clear()
    if not found:
        raise UserError(f"no run directory at or below {folder} (a folder with a run_config.json): give one of both")
    return sorted(found, key=begun)


def find_run(path: Path) -> Path:
    """One run: its directory, a checkpoint in it, or the newest run below a folder."""
    if path.is_file():
        path = path.parent
    found = run_directories(path)[-1]
    if found != path:
        print(f"Using {found} (the newest run below {path})")
    return found


def plain(value: Any) -> str:
    """A value as a cell of a table; what could command the terminal is shown as an escape."""
    text = f"{value:g}" if type(value) is float else str(value)
    return printable(text)


def score_text(key: str, value: float | None) -> str:
    """A score as papers write it, in hundredths; losses as they are."""
    return "-" if value is None else f"{value:.3f}" if key.endswith("loss") else f"{100 * value:.1f}"


# --------------------------------------------------------------------------------------------------
# A table of runs


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """All runs that can be read, and a line for each that cannot.

    Raises:
        UserError: there is none at all.
    """
    runs, notes = [], []
    for directory in run_directories(folder):
        try:
            runs.append(read_run(directory))
        except UserError as error:
            notes.append(f"Left out: {error}")
    if not runs:
        raise UserError(notes[0])
    return runs, notes


def select(runs: Sequence[Run], conditions: Iterable[str]) -> list[Run]:
    """The runs whose parameters have these values (`decoder=attention`, `learning_rate=0.001`).

    Raises:
        UserError: no condition, a parameter that no run has, or nothing is left.
    """
    left = list(runs)
    for condition in conditions:
        name, sign, wanted = condition.partition("=")
        known = sorted({key for run in runs for key in run.flags})
        if not sign or name not in known:
            close = ", ".join(difflib.get_close_matches(name, known, 3)) or ", ".join(known[:12]) + ", ..."
            raise UserError(f"--where {condition}: expected PARAMETER=VALUE with a parameter of the runs, e.g. {close}")
        left = [run for run in left if name in run.flags and is_value(run.flags[name], wanted)]
        if runs and not left:
            values = sorted({plain(run.flags.get(name)) for run in runs})
            raise UserError(f"--where {condition}: no run is left; {name} is {' or '.join(values[:8])} in these runs")
    return left


def is_value(value: Any, text: str) -> bool:
    if type(value) in (int, float):
        try:
            return bool(float(text) == value)
        except ValueError:
            return False
    return text.lower() == str(value).lower() if value is None or type(value) is bool else text == str(value)


def differing(runs: Sequence[Run]) -> list[str]:
    """The parameters that have two values or more among these runs; one that an older run lacks does not differ."""
    names = dict.fromkeys(name for run in runs for name in run.parameters())
    return [name for name in names if len({str(p[name]) for p in map(Run.parameters, runs) if name in p}) > 1]


def sort_runs(runs: Sequence[Run], key: str | None) -> list[Run]:
    """By a score, the best first and those without it last; by age where none is given.

    Raises:
        UserError: no run has this score.
    """
    if key is None:
        return list(runs)
    known = sorted({name for run in runs for name in run.scores()})
    if key not in known:
        raise UserError(f"--sort {key}: no run has this score; there are {', '.join(known) or 'none yet'}")
    sign = 1 if key.endswith(LOW_IS_GOOD) else -1
    return sorted(runs, key=lambda run: sign * run.scores().get(key, sign * math.inf))


def tested(run: Run) -> str:
    """What the test scores are of, e.g. `test 1000, beam 3`."""
    if not run.tests:
        return "-"
    row = run.tests[-1]
    return f"{plain(row.get('split'))} {plain(row.get('images'))}, {decoding(row)}"


def decoding(row: Mapping[str, Any]) -> str:
    beam, consensus = row.get("beam_size"), row.get("consensus")
    if beam == 1:
        return "greedy"
    chosen = "" if consensus is None else ", consensus" + (f" with {plain(consensus)}" if consensus != "beam" else "")
    return f"beam {plain(beam)}{chosen}"


def runs_table(runs: Sequence[Run], folder: Path) -> str:
    """A line per run: scores (the best of each starred), the parameters that differ, and what all share below."""
    names = differing(runs)
    scores = [run.scores() for run in runs]
    columns = [key for key in SHOWN_SCORES if any(key in row for row in scores)]
    best = {
        key: (min if key in LOW_IS_GOOD else max)(row[key] for row in scores if key in row)
        for key in columns
        if sum(key in row for row in scores) > 1
    }
    table = [[*columns, "tested on", "best epoch", *names, "run"]]
    for run, row in zip(runs, scores, strict=True):
        marks = [score_text(k, row.get(k)) + ("*" if best.get(k) == row.get(k, math.nan) else " ") for k in columns]
        trained = f"{(run.best or {}).get('epoch', 0)} of {len(run.epochs)}"
        values = [plain(run.parameters().get(name, "-")) for name in names]
        where = run.directory.relative_to(folder) if run.directory != folder else run.directory
        table.append([*marks, tested(run), trained, *values, plain(where)])
    lines = align(table, right=len(columns))
    shared = {name: value for name, value in runs[0].parameters().items() if name not in names and value is not None}
    lines += ["", "The same in all: " + ", ".join(f"{name} {plain(value)}" for name, value in shared.items())]
    lines += ["*: the best of its column. val_...: the best epoch, greedy."]
    if len({(row.get("split"), row.get("images")) for run in runs for row in run.tests[-1:]}) > 1:
        lines.append("Note: not all were tested on the same images, and CIDEr depends on them.")
    if untested := [run for run in runs if not run.tests]:
        command = reproducing_command(["--mode", "test", "--model_path", str(untested[0].directory)])
        lines.append(f"{len(untested)} without a test: {command}")
    return "\n".join(lines)


def align(table: Sequence[Sequence[str]], right: int = 0) -> list[str]:
    """Lines of cells under each other, the first `right` columns flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if n < right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def runs_csv(runs: Sequence[Run]) -> str:
    """Every run with every score at full precision and every parameter."""
    rows = [
        {
            "run": run.directory, "epochs": len(run.epochs), "best_epoch": (run.best or {}).get("epoch"),
            **{key: run.tests[-1].get(key) for key in ("split", "images", "views", "beam_size", "length_penalty", "consensus") if run.tests},
            **run.scores(), **{f"flag_{name}": value for name, value in run.flags.items() if name not in ("command",)},
        }
        for run in runs
    ]  # fmt: skip
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


# --------------------------------------------------------------------------------------------------
# Two runs


def compare(first: Run, second: Run) -> str:
    """The parameters that differ, validation scores, and each kind of test that both had, with paired bootstraps.

    Of one run twice, its own tests of the same images, each against the next.
    """
    if first.directory.resolve() == second.directory.resolve():
        return compare_ways(first)
    lines = [f"A  {plain(first.directory)}", f"B  {plain(second.directory)}", "", "Parameters that differ"]
    flags = first.parameters(), second.parameters()
    names = [name for name in dict.fromkeys([*flags[0], *flags[1]]) if flags[0].get(name) != flags[1].get(name)]
    pairs = [[f"  {name}", plain(flags[0].get(name, "-")), plain(flags[1].get(name, "-"))] for name in names]
    lines += align([["", "A", "B"], *pairs]) if pairs else ["  none"]
    scores = first.scores(), second.scores()
    keys = [
        key for key in ("val_loss", *(f"val_{name}" for name in METRIC_NAMES)) if key in scores[0] and key in scores[1]
    ]
    if keys:
        a, b = ((run.best or {}).get("epoch") for run in (first, second))
        lines += ["", f"Validation images, greedy captions, best epoch ({a} and {b})"]
        cells = [[f"  {name_of(key)}", *(score_text(key, each[key]) for each in scores)] for key in keys]
        lines += align([["", "A", "B"], *cells])
    latest = [
        {(plain(row.get("split")), row.get("beam_size") == 1, plain(row.get("consensus"))): row for row in run.tests}
        for run in (first, second)
    ]
    common = [kind for kind in latest[0] if kind in latest[1]]
    for kind in common:
        lines += ["", *compare_tests(first, latest[0][kind], second, latest[1][kind])]
    if not common:
        missing = first if not first.tests else second
        command = reproducing_command(["--mode", "test", "--model_path", str(missing.directory)])
        lines += ["", f"The two have no test on the same split: {command}"]
    return "\n".join(lines)


def compare_ways(run: Run) -> str:
    """The tests of one run that differ in one thing: the way of decoding, the views of the images, or the checkpoint."""
    latest: dict[Any, dict[str, Any]] = {}
    for row in run.tests:
        things = (("split", "images"), ("length_penalty",), ("views",), ("checkpoint", "epoch"))
        images, penalty, views, checkpoint = (tuple(plain(row.get(key)) for key in keys) for keys in things)
        latest[images, (decoding(row), *penalty), views, checkpoint] = row
    lines = [f"A and B  {plain(run.directory)}"]
    for thing in (1, 2, 3):
        alike: dict[Any, list[dict[str, Any]]] = {}
        for key, row in latest.items():
            alike.setdefault((*key[:thing], *key[thing + 1 :]), []).append(row)
        for rows in alike.values():
            for a, b in itertools.pairwise(rows):
                lines += ["", *compare_tests(run, a, run, b)]
    if len(lines) == 1:
        command = reproducing_command(["--mode", "test", "--model_path", str(run.directory)])
        lines += ["", f"The run has no two tests of the same images that differ in one thing alone: {command}"]
    return "\n".join(lines)


def name_of(key: str) -> str:
    key = key.removeprefix("val_")
    return "loss" if key == "loss" else METRIC_NAMES.get(key, key)


def compare_tests(first: Run, a: Mapping[str, Any], second: Run, b: Mapping[str, Any]) -> list[str]:
    """Two rows of test_metrics.json side by side, with the paired bootstrap where both have scores by image."""
    ways = []
    for row in (a, b):
        penalty = row.get("length_penalty")
        parts = [decoding(row), "" if penalty is None else f"length penalty {plain(penalty)}"]
        for key, usual in (("views", "whole"), ("checkpoint", "best.pt")):
            if not a.get(key, usual) == b.get(key, usual) == usual:
                parts.append(f"views {plain(row.get(key, usual))}" if key == "views" else plain(row.get(key, usual)))
        if first is second and a.get("epoch") != b.get("epoch"):
            parts.append(f"epoch {plain(row.get('epoch'))}")
        ways.append(", ".join(filter(None, parts)))
    way = ways[0] if ways[0] == ways[1] else f"A {ways[0]}; B {ways[1]}"
    lines = [f"Test on {plain(a.get('images'))} {plain(a.get('split'))} images, {way}"]
    differences: dict[str, Difference] = {}
    try:
        differences = bootstrap(read_scores(first, a), read_scores(second, b))
        note = "B - A: mean and 95 % interval over the choice of images (paired bootstrap); seeds of training are not covered."
    except UserError as error:
        note = f"No intervals of the difference: {error}"
    table = [["", "A", "B", "B - A" if differences else "", ""]]
    for key in (key for key in METRIC_NAMES if is_number(a.get(key)) and is_number(b.get(key))):
        cells = [f"  {METRIC_NAMES[key]}", score_text(key, a[key]), score_text(key, b[key]), "", ""]
        if key in differences:
            mean, low, high = (100 * value for value in differences[key])
            better = "" if low <= 0 <= high else "B is better" if (low > 0) != (key in LOW_IS_GOOD) else "A is better"
            cells[3:] = [f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", better]
        table.append(cells)
    return [*lines, *align(table), f"  {note}"]


class ByImage(NamedTuple):
    """A test's scores image by image."""

    names: list[str]
    scores: ImageScores


def read_scores(run: Run, row: Mapping[str, Any]) -> ByImage:
    """The `test_scores[_N].json` that belongs to a row of test_metrics.json.

    Raises:
        UserError: there is none, or it has another form.
    """
    name = row.get("scores_file")
    if not isinstance(name, str):
        command = reproducing_command(["--mode", "test", "--model_path", str(run.directory)])
        raise UserError(f"{run.directory} was tested before scores were kept image by image: {command}")
    path = run.directory / Path(name).name  # a stranger's row names no file elsewhere
    content = read_json(path)
    try:
        names, bleu = content["image_id"], content["bleu"]
        lists = [content[key] for key in ("cider", "rouge_l", "wer")]
        counts = [bleu[key] for key in ("guess", "correct", "length", "reference_length")]
        lists.append(content.get("sentence_bleu4", [math.nan] * len(names)))  # absent from older files
        cider, rouge_l, wer, sentence_bleu4 = (np.array(values, dtype=np.float64) for values in lists)
        guess, correct, length, reference_length = (np.array(values, dtype=np.int64) for values in counts)
        shapes = [values.shape for values in (cider, rouge_l, wer, length, reference_length, sentence_bleu4)]
        if (
            not names
            or not all(isinstance(name, str) for name in names)
            or len(set(names)) < len(names)
            or any(shape != (len(names),) for shape in shapes)
            or not guess.shape == correct.shape == (len(names), 4)
            or not all((np.abs(values) < 1e9).all() for values in (cider, rouge_l, wer))
        ):
            raise ValueError("lists of different lengths, or no numbers")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is no list of scores by image: {first_line(error)}. Test the run again") from None
    scores = ImageScores(
        cider, rouge_l, np.zeros(len(names)), wer, guess, correct, length, reference_length, sentence_bleu4
    )
    return ByImage(list(names), scores)


def bootstrap(first: ByImage, second: ByImage) -> dict[str, Difference]:
    """How much better the second is, with intervals over the images, for each score of `COMPARED`.

    Raises:
        UserError: they are scores of different images.
    """
    if set(first.names) != set(second.names):
        both = len(set(first.names) & set(second.names))
        raise UserError(f"A scored {len(first.names)} images, B {len(second.names)}, and {both} are the same")
    place = {name: number for number, name in enumerate(second.names)}
    order = np.array([place[name] for name in first.names])
    other = ImageScores(*(values[order] for values in second.scores))
    found = {k: paired_bootstrap(getattr(first.scores, k), getattr(other, k)) for k in ("cider", "rouge_l", "wer")}
    return {**found, "bleu4": paired_bleu4(first.scores, other)}


# --------------------------------------------------------------------------------------------------
# Room on the disk


class Epochs(NamedTuple):
    """The epoch files of a run that best.pt and last.pt make superfluous."""

    files: list[Path]
    freed: int  # bytes: a file that best.pt or last.pt is a hard link to frees nothing


def superfluous(directory: Path) -> Epochs:
    """The run's `model_epoch_N.pt`, but for what was trained after last.pt was written (a crash in between).

    Raises:
        UserError: best.pt or last.pt is missing or damaged, so that an epoch file may be all there is.
    """
    kept = [directory / "best.pt", directory / "last.pt"]
    for path in kept:
        try:
            check_tensor_zip(path)
        except Exception as error:  # whatever is wrong with it
            problem = "is not there" if not path.exists() else f"cannot be read ({first_line(error)})"
            raise UserError(f"{path} {problem}: the epoch files of this run stay") from None
    written = kept[1].stat().st_mtime_ns
    files = [path for path in directory.glob("model_epoch_*.pt") if path.is_file() and not path.is_symlink()]
    files = sorted(
        (path for path in files if path.stat().st_mtime_ns <= written), key=lambda path: (len(path.name), path)
    )
    freed = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
    return Epochs(files, freed)


def prune(folder: Path, ask: Callable[[str], bool]) -> str:
    """Delete the epoch files of a run, or of all runs below a folder, after asking; best.pt and last.pt stay.

    Args:
        ask: is given what would be deleted, and says whether to do it.

    Returns:
        what was done, in a line. Runs that are trained in, or that lack a whole best.pt or last.pt, are passed
        over with a printed line.
    """
    found: list[tuple[Any, Epochs]] = []  # a lock keeps its run from being resumed meanwhile
    for directory in run_directories(folder):
        try:
            lock = lock_run_directory(directory)
            epochs = superfluous(directory)
        except (UserError, OSError) as error:
            print(f"Passed over: {error}")
            continue
        if epochs.files:
            found.append((lock, epochs))
            print(f"{plain(directory)}: {len(epochs.files)} epoch files, {format_bytes(epochs.freed)}")
    count, freed = sum(len(epochs.files) for _, epochs in found), sum(epochs.freed for _, epochs in found)
    if not count:
        return "Nothing to delete"
    if not ask(
        f"Delete {count} epoch files of {len(found)} run(s), which frees {format_bytes(freed)}? best.pt and last.pt stay"
    ):
        return "Nothing was deleted"
    for _, epochs in found:
        for path in epochs.files:
            try:
                path.unlink()
            except OSError as error:
                raise UserError(f"cannot delete {path}: {error.strerror}. Others of the list may be gone") from error
    return f"Deleted {count} epoch files; {format_bytes(freed)} are free again"


SCRIPT = "flickr_image_caption_with_pytorch_resnet_lstm.py"
DRY_RUN = "dry_run_"  # begins the names of runs that are no results
EXPORTED_WEIGHTS = "model.safetensors"  # what `--mode export` writes, beside config.json and vocabulary.json
CONFIG_NAMES = {"decoder": "decoder_type"}  # our flags under the names that the original's run_config.json has


def reproducing_command(typed: list[str]) -> str:
    """The command line again, quoted for a shell."""
    return shlex.join(["python", SCRIPT, *typed])


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
    return lock


def training_rows(curve: Mapping[str, Sequence[Any]], history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An epoch's losses, learning rate and validation scores together, for every epoch of `loss_curve.json`.

    Args:
        curve, history: the content of `loss_curve.json` and `metrics_history.json`.
    """
    about = ("epoch", "split", "beam_size", "images")  # of a score, not scores
    scores = {entry["epoch"]: {k: v for k, v in entry.items() if k not in about} for entry in history}
    names = {"epochs": "epoch", "training_losses": "training_loss", "validation_losses": "validation_loss"}
    names["learning_rates"] = "learning_rate"
    columns = [[(name, value) for value in curve[key]] for key, name in names.items()]
    rows = [dict(row) for row in zip(*columns, strict=True)]
    return [row | scores.get(row["epoch"], {}) for row in rows]


def begun(directory: Path) -> tuple[str, int, str]:
    """When a run began, to sort by: the second in its name, which copies keep, then its `run_config.json`."""
    config, second = directory / "run_config.json", re.search(r"\d{8}_\d{6}", directory.name)
    return second[0] if second else "", config.stat().st_mtime_ns if config.is_file() else 0, directory.name


def find_checkpoint(model_path: Path) -> Path:
    """What `--model_path` means: a checkpoint, a run directory, an exported folder, or what the original README writes.

    Where the named file is not there itself, the newest run below its folder that has it is used.

    Raises:
        UserError: nothing fits.
    """
    # os.path rather than Path: it says no to names that no file can have, where Path raises.
    if os.path.isfile(model_path):
        return model_path
    folder, name = (model_path, "best.pt") if os.path.isdir(model_path) else (model_path.parent, model_path.name)
    for file in (name, EXPORTED_WEIGHTS) if folder == model_path else (name,):
        if os.path.isfile(folder / file):
            return folder / file
    below = folder.rglob("*") if os.path.isdir(folder) else ()  # names may hold what glob reads as a pattern
    runs = [p for p in below if p.name == name and p.is_file() and not p.parent.name.startswith(DRY_RUN)]
    if not runs:
        raise UserError(
            f"--model_path {model_path} is not there, and no run below {folder} has a {name}: "
            "give a checkpoint (.pt), a run directory, a folder of runs, or an exported folder"
        )
    newest = max(runs, key=lambda path: begun(path.parent))
    log.info(f"Using {newest} (the newest run below {folder} that has {name})")
    return newest
