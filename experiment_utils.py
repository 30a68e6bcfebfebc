"""Run directories and what is written into them; and a command line that compares runs and tidies up.

python experiment_utils.py list saved_models --sort cider --where decoder=attention
python experiment_utils.py diff RUN_A RUN_B
python experiment_utils.py diff RUN_A0 RUN_A1 RUN_A2 --against RUN_B0 RUN_B1 RUN_B2
python experiment_utils.py report RUN
python experiment_utils.py prune saved_models
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.config.flags import CONFIG_NAMES
from captioning.io import (
    UserError,
    format_bytes,
    log,
    make_directory,
    printable,
    read_json,
    require_free_space,
    run_command,
    write_atomic,
    write_json,
    write_text,
)
from captioning.runs.directories import (
    DRY_RUN,
    deletable_epochs,
    find_run,
    lock_run_directory,
    read_run,
    run_directories,
    training_rows,
)

if TYPE_CHECKING:
    from captioning.data.dataset import CaptionSet
    from captioning.runs.directories import StoredRun
    from captioning.training.caption_set import DecodingContext
    from training_utils import TrainState

PICTURES, ATTENTION_PICTURES = 400_000, 2_000_000  # bytes: of curves, lists and report; of an image's attention


def rate_text(rate: float) -> str:
    """Return a rate with the fewest digits that give the same number again: '5e-04', '1.5e-04'."""
    return next(text for digits in range(18) if float(text := f"{rate:.{digits}e}") == rate)


def run_name(flags: dict[str, Any], timestamp: str) -> str:
    """Return `{dataset}_{decoder}_ep{E}_bs{B}_lr{lr}[_{scheduler_type}][_att][_ft{N}][_scst{N}]_{timestamp}`."""
    parts = [
        flags["dataset_type"], flags["decoder"], f"ep{flags['epochs']}", f"bs{flags['batch_size']}",
        f"lr{rate_text(flags['learning_rate'])}",
    ]  # fmt: skip
    if flags["use_scheduler"]:
        parts.append(flags["scheduler_type"])
    if flags["save_attention_viz"]:
        parts.append("att")
    if flags.get("fine_tune"):
        parts.append(f"ft{flags['fine_tune']}")
    if flags.get("scst_epochs"):
        parts.append(f"scst{flags['scst_epochs']}")
    prefix = DRY_RUN if flags.get("dry_run") else ""
    return prefix + "_".join([*parts, timestamp])


def create_run_directory(base: Path, flags: dict[str, Any], encoder_family: str, now: datetime | None = None) -> Path:
    """Create the run's own directory under `base/<dataset>/<encoder family>_<decoder>/`; never one that exists.

    Raises:
        UserError: it cannot be created.
    """
    timestamp = (now or datetime.now()).strftime("%Y%m%d_%H%M%S")
    parent = base / flags["dataset_type"] / f"{encoder_family}_{flags['decoder']}"
    make_directory(parent, "--model_save_dir")
    name, number = run_name(flags, timestamp), 1
    while True:
        directory = parent / (name if number == 1 else f"{name}_{number}")
        try:
            directory.mkdir()
            return directory
        except FileExistsError:  # another run of the same second
            number += 1
        except OSError as error:
            raise UserError(f"cannot create the run directory {directory}: {error.strerror}") from error


def write_run_files(
    directory: Path, flags: dict[str, Any], explicit: Iterable[str], command: str, data: CaptionSet
) -> None:
    """Write what a run starts with: `run_config.json` and `split.json`."""
    write_run_config(directory, flags, explicit, command)
    write_text(directory / "split.json", data.dump_split())


def write_run_config(directory: Path, flags: dict[str, Any], explicit: Iterable[str], command: str) -> None:
    """Write `run_config.json`: every flag under the original's names; `--config` and `--resume` read it back."""
    config = {CONFIG_NAMES.get(name, name): value for name, value in flags.items()}
    facts = {"explicit": sorted(explicit), "timestamp": datetime.now().strftime("%Y%m%d_%H%M%S"), "command": command}
    write_json(directory / "run_config.json", config | facts)


def require_room(directory: Path, state: TrainState, context: DecodingContext, epochs: int) -> None:
    """Print where the run is and what it takes of the disk, by the size of the `last.pt` that it begins with.

    Args:
        epochs: still to be trained.

    Raises:
        UserError: the disk has not enough room.
    """
    from captioning.decoding.consensus import FEWEST_VALIDATION_IMAGES

    settings, learns = context.settings, len(context.data.splits["val"]) >= FEWEST_VALIDATION_IMAGES
    moments = 2 * 4 * sum(parameter.numel() for parameter in state.decoder.parameters())  # of AdamW
    weights = (directory / "last.pt").stat().st_size - (moments if state.optimizer.state else 0)
    files = min(epochs, settings.keep_checkpoints or epochs)
    # last.pt is one of them, and best.pt too, unless it is older or gets consensus in the end.
    files += learns or epochs > files
    space = files * (weights + moments) + (weights if settings.init_from else 0) + PICTURES
    if settings.save_attention_viz:
        space += ATTENTION_PICTURES * settings.attention_viz_samples
    free = require_free_space(directory, space + weights + moments, "this run")  # the oldest goes after the newest came
    log.info(f"Run directory: {directory} (will take up to {format_bytes(space)}; {format_bytes(free)} are free)")


def write_epoch_files(
    directory: Path, curve: dict[str, list[Any]], history: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Write `loss_curve.json`, `metrics_history.json` and `training_log.csv`; return the rows of the last."""
    from captioning.runs.table import csv_text  # imports pandas, which `--help` does without

    write_json(directory / "loss_curve.json", curve)
    write_json(directory / "metrics_history.json", history)
    rows = training_rows(curve, history)
    write_text(directory / "training_log.csv", csv_text(rows))  # all of it anew, so that resuming doubles nothing
    return rows


def write_summary(directory: Path, flags: dict[str, Any], command: str, facts: dict[str, Any]) -> None:
    """Write `run_summary.txt`: parameters and results for people, with the command that reproduces the run.

    Args:
        facts: further lines, name -> value; the report shows `Minutes`, `Device`, `Images` and `Vocabulary`.
    """
    facts = facts | {"Machine": f"{platform.system()} on {platform.machine()}, {os.cpu_count()} CPU cores"}
    labels = {
        "Dataset": "dataset_type", "Decoder": "decoder", "Encoder": "encoder", "Epochs": "epochs",
        "Batch Size": "batch_size", "Learning Rate": "learning_rate", "Embed Size": "embed_size",
        "Hidden Size": "hidden_size", "Num Layers": "num_layers", "Attention Dim": "attention_dim",
        "Dropout": "drop_prob", "Num Workers": "num_workers", "Seed": "seed",
    }  # fmt: skip
    lines = ["Training Run Summary", "===================", "", f"Run Directory: {directory.name}"]
    lines += [f"Timestamp: {datetime.now().strftime('%Y%m%d_%H%M%S')}", ""]
    lines += [f"{label}: {flags[key]}" for label, key in labels.items()]
    if flags["use_scheduler"]:
        lines += ["", f"Learning Rate Scheduler: {flags['scheduler_type']}"]
        used = {
            "reduce_lr_on_plateau": {"Patience": "scheduler_patience", "Factor": "scheduler_factor"},
            "step": {"Step size": "scheduler_step_size", "Gamma": "scheduler_gamma"},
            "cosine": {"T_max": "scheduler_t_max"},
            "exponential": {"Gamma": "scheduler_gamma"},
            "one_cycle": {"Warmup epochs": "warmup_epochs"},
        }[flags["scheduler_type"]]
        lines += [f"  {label}: {flags[key]}" for label, key in (used | {"Min LR": "min_lr"}).items()]
    if flags["save_attention_viz"]:
        lines += ["", "Attention Visualization: Enabled", f"  Samples: {flags['attention_viz_samples']}"]
        lines += [f"  Advanced: {flags['advanced_attention_viz']}"]
    lines += ["", *[f"{name}: {value}" for name, value in facts.items()]]
    lines += ["", "Reproduce with:", f"  {command}", "", "Full configuration saved to: run_config.json"]
    write_atomic(directory / "run_summary.txt", lambda file: file.write(("\n".join(lines) + "\n").encode()))


def save_numbered(directory: Path, name: str, content: Sequence[Mapping[str, Any]]) -> str:
    """Write JSON under the first free `name[_N].json` and return that name; an equal file there serves again."""
    path, number = directory / f"{name}.json", 1
    while path.exists():
        with contextlib.suppress(UserError):  # a damaged file is another
            if read_json(path) == content:
                return path.name
        number += 1
        path = directory / f"{name}_{number}.json"
    write_json(path, content)
    return path.name


def prune(folder: Path, yes: bool) -> str:
    """Delete the epoch files of a run, or of all runs below a folder, after asking; best.pt and last.pt stay.

    Runs that are trained in, or that lack a whole best.pt or last.pt, are skipped with a printed line.

    Args:
        yes: do not ask.

    Returns:
        what was done, in a line.

    Raises:
        UserError: there is nobody to answer.
    """
    found: list[tuple[Any, list[Path]]] = []  # a lock keeps its run from being resumed meanwhile
    freed = 0
    for directory in run_directories(folder):
        try:
            lock = lock_run_directory(directory)
            paths, size = deletable_epochs(directory)
        except (UserError, OSError) as error:
            print(printable(f"Skipped: {error}"))
            continue
        if paths:
            found.append((lock, paths))
            freed += size
            print(printable(f"{directory}: {len(paths)} epoch files, {format_bytes(size)}"))
    files = [path for _, paths in found for path in paths]
    if not files:
        return "Nothing to delete"
    what = f"{len(files)} epoch files of {len(found)} run(s), which frees {format_bytes(freed)}"
    try:
        delete = yes or input(f"Delete {what}? best.pt and last.pt stay [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        raise UserError("nobody answered, so nothing was deleted: add --yes") from None
    if not delete:
        return "Nothing was deleted"
    for path in files:
        path.unlink()
    return f"Deleted {len(files)} epoch files; {format_bytes(freed)} are free again"


# --------------------------------------------------------------------------------------------------
# Command line


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="List, compare, report on and tidy up the runs of the trainer.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("list", help="a table of runs: their scores and the parameters that differ").add_argument
    add("folder", type=Path, nargs="?", default=Path("saved_models"), help="a folder of runs (default: saved_models)")
    add("--sort", metavar="SCORE", help="the best first: cider, bleu4, wer, val_cider, val_loss, ...; else by age")
    add("--where", nargs="+", action="extend", default=[], metavar="PARAMETER=VALUE", help="only the runs that have it")
    add("--csv", action="store_true", help="print CSV with every parameter and score")
    add = commands.add_parser("diff", help="what differs between two runs, or between a run's own tests").add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="two runs, each its directory or a folder of runs (its newest);"
        " one twice: compares its tests with each other")  # fmt: skip
    add("--against", type=Path, nargs="+", metavar="RUN", help="compare the mean of these with that of the first, e.g. of"
        " three seeds each")  # fmt: skip
    add = commands.add_parser("report", help="write the run's report.html anew").add_argument
    add("run", type=Path, metavar="RUN", help="a run directory, or a folder of runs: its newest")
    add("--data_dir", type=Path, help="the data set, where it has moved")
    add = commands.add_parser("prune", help="delete epoch files; best.pt and last.pt stay").add_argument
    add("folder", type=Path, metavar="RUN_OR_FOLDER", help="a run directory, or a folder of runs")
    add("--yes", action="store_true", help="do not ask")
    return parser


def sides_to_compare(paths: Sequence[Path], against: Sequence[Path] | None) -> tuple[list[StoredRun], list[StoredRun]]:
    """Read the runs of `diff`.

    Raises:
        UserError: not two runs, or a run is more than once among several.
    """
    if against is None and len(paths) != 2:
        raise UserError(
            f"diff compares two runs, not {len(paths)}; several with several: diff RUN RUN --against RUN RUN"
        )
    first, second = (list(map(find_run, side)) for side in ((paths, against) if against else (paths[:1], paths[1:])))
    places = [directory.resolve() for directory in (*first, *second)]
    if against and (twice := next((place for place in places if places.count(place) > 1), None)):
        raise UserError(f"{twice} is given more than once: each run counts once in a mean")
    return [read_run(directory) for directory in first], [read_run(directory) for directory in second]


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code (2 for a user's mistake)."""
    args = get_parser().parse_args(argv)
    try:
        return run_command(lambda: run(args), "Stopped; nothing more was changed.")
    except BrokenPipeError:  # `... list | head`
        sys.stderr.close()
        return 0


def run(args: argparse.Namespace) -> int:
    if args.command == "prune":
        print(prune(args.folder, args.yes))
        return 0
    if args.command == "report":
        from captioning.runs.report import write_report

        print(printable(f"Report: {write_report(find_run(args.run), data_dir=args.data_dir)}"))
        return 0
    from captioning.runs import table

    if args.command == "list":
        runs = [read_run(directory) for directory in run_directories(args.folder)]
        runs = table.sort_runs(table.select_runs(runs, args.where), args.sort)
        print(table.runs_csv(runs) if args.csv else table.runs_table(runs, args.folder))
    else:
        first, second = sides_to_compare(args.runs, args.against)
        runs = [*first, *second]
        print(table.compare(first, second))
    for problem in dict.fromkeys(problem for each in runs for problem in each.damage):
        print(printable(f"Damaged: {problem}"), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
