"""Runs beside each other: a table of them, and two compared, as text and as CSV.

Imports pandas, so import it where a table is made.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from captioning.io import UserError, csv_cell
from captioning.runs.directories import (
    StoredRun,
    command_to_test,
    decoding,
    is_number,
    plain,
    read_scores,
    score_text,
)
from captioning.scoring.scores import METRIC_NAMES, Difference, paired_bootstrap

LOW_IS_GOOD = ("wer", "unsupported", "val_loss")
SHOWN_SCORES = ("cider", "sparcs", "bleu4", "rouge_l", "meteor", "wer", "unsupported", "val_cider", "val_loss")
Row = Mapping[str, Any]  # of test_metrics.json


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV under the union of their columns: numbers at full precision, missing cells empty."""
    safe = [{csv_cell(name): csv_cell(value) for name, value in row.items()} for row in rows]
    # Of objects, so that whole numbers stay whole beside missing ones.
    text: str = pd.DataFrame(safe, dtype=object).to_csv(index=False, lineterminator="\n")
    return text


# --------------------------------------------------------------------------------------------------
# Choosing and sorting runs


def select_runs(runs: Sequence[StoredRun], conditions: Iterable[str]) -> list[StoredRun]:
    """Return the runs whose parameters have these values (`decoder=attention`, `learning_rate=0.001`).

    Raises:
        UserError: not a condition, a parameter that no run has, or nothing is left.
    """
    left = list(runs)
    for condition in conditions:
        name, sign, value = condition.partition("=")
        known = sorted({key for run in runs for key in run.flags})
        if not sign or name not in known:
            close = ", ".join(difflib.get_close_matches(name, known, 3)) or ", ".join(known[:12]) + ", ..."
            raise UserError(f"--where {condition}: expected PARAMETER=VALUE with a parameter of the runs, e.g. {close}")
        left = [run for run in left if name in run.flags and has_value(run.flags[name], value)]
        if runs and not left:
            values = sorted({plain(run.flags.get(name)) for run in runs})
            raise UserError(f"--where {condition}: no run is left; {name} is {' or '.join(values[:8])} in these runs")
    return left


def has_value(value: Any, text: str) -> bool:
    if type(value) in (int, float):
        with contextlib.suppress(ValueError):
            return bool(float(text) == value)
    return text.lower() == str(value).lower()


def sort_runs(runs: Sequence[StoredRun], key: str | None) -> list[StoredRun]:
    """Sort by a score, the best first and those without it last; by age where none is given.

    Raises:
        UserError: no run has this score.
    """
    if key is None:
        return list(runs)
    scores = score_table(runs)
    if key not in scores:
        known = ", ".join(sorted(scores)) or "none yet"
        raise UserError(f"--sort {key}: no run has this score; there are {known}")
    order = scores.sort_values(key, ascending=key.endswith(LOW_IS_GOOD), kind="stable").index
    return [runs[number] for number in order]


def score_table(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """Return a row of scores for each run, NaN where it has none."""
    return pd.DataFrame([run.scores() for run in runs], index=range(len(runs)), dtype=np.float64)


# --------------------------------------------------------------------------------------------------
# A table of runs


def runs_table(runs: Sequence[StoredRun], folder: Path) -> str:
    """Return a line per run: name, scores (the best of each starred), and the parameters that differ.

    Columns that have no room in the terminal are in a block below, where the runs have the same numbers.
    """
    width = shutil.get_terminal_size((100_000, 24)).columns  # an output that is no terminal has room for all
    scores = score_table(runs)
    scores = scores[[key for key in SHOWN_SCORES if key in scores]]
    signed = scores * [-1 if key in LOW_IS_GOOD else 1 for key in scores]
    best = signed.eq(signed.max()) & (scores.notna().sum() > 1)
    parameters = pd.DataFrame([{plain(k): plain(v) for k, v in run.parameters().items()} for run in runs])
    values = parameters.nunique()  # a parameter that a run lacks does not differ

    names = [run.directory if run.directory == folder else run.directory.relative_to(folder) for run in runs]
    column = ["run", *(plain(name) + " (damaged)" * bool(r.damage) for name, r in zip(names, runs, strict=True))]
    head, *labels = (label.ljust(max(map(len, column))) for label in column)  # pandas puts text at the right
    table = pd.DataFrame({head: labels})
    for key in scores:
        cells = zip(scores[key], best[key], strict=True)
        table[key] = ["- " if np.isnan(score) else score_text(key, score) + " *"[star] for score, star in cells]
    rows = [run.latest for run in runs]
    table["tested on"] = [f"{plain(r['split'])} {plain(r['images'])}, {decoding(r)}" if r else "-" for r in rows]
    table["best epoch"] = [f"{(run.best or {}).get('epoch', 0)} of {run.last_epoch}" for run in runs]
    table = table.join(parameters[values.index[values > 1]].fillna("-"))
    table.index += 1

    same = parameters[values.index[values == 1]].bfill().iloc[0]
    shared = ", ".join(f"{name} {value}" for name, value in same.items() if value != "None")
    notes = [f"The same in all: {shared}", "*: the best of its column. val_...: the best epoch, greedy."]
    if len({(row["split"], row["images"]) for row in rows if row}) > 1:
        notes.append("Note: not all were tested on the same images, and CIDEr depends on them.")
    lines = [table.to_string(line_width=width), "", *(textwrap.fill(n, width, break_on_hyphens=False) for n in notes)]
    if untested := [run for run in runs if not run.tests]:
        lines.append(f"{len(untested)} without a test: {plain(command_to_test(untested[0].directory))}")
    return "\n".join(lines)


def runs_csv(runs: Sequence[StoredRun]) -> str:
    """Return every run with every score at full precision and every parameter."""
    about = ("split", "images", "views", "beam_size", "length_penalty", "consensus")
    return csv_text(
        [
            {"run": run.directory, "epochs": run.last_epoch, "best_epoch": (run.best or {}).get("epoch")}
            | {key: row.get(key) for row in run.tests[-1:] for key in about}
            | run.scores()
            | {f"flag_{name}": value for name, value in run.flags.items() if name != "command"}
            | {"damage": "; ".join(run.damage) or None}
            for run in runs
        ]
    )


# --------------------------------------------------------------------------------------------------
# Two runs, or several against several


def compare(first: Sequence[StoredRun], second: Sequence[StoredRun]) -> str:
    """Compare two runs, or the means of two sets of runs: parameters, validation scores, and each kind of test.

    Of one run twice, its own tests of the same images are compared that differ in one thing.
    """
    runs = [*first, *second]
    if len(runs) == 2 and first[0].directory.resolve() == second[0].directory.resolve():
        return compare_tests_of(first[0])
    lines = [
        f"{name if number == 0 else ' '}  {plain(run.directory)}"
        for name, side in (("A", first), ("B", second))
        for number, run in enumerate(side)
    ]
    flags = differing_parameters(first, second)
    lines += ["", "Parameters that differ", flags.to_string() if len(flags) else "  none"]
    keys = ["val_loss", *(f"val_{name}" for name in METRIC_NAMES)]
    scores = scores_side_by_side([run.scores() for run in first], [run.scores() for run in second], keys)
    if len(scores):
        epochs = " and ".join(", ".join(str((run.best or {}).get("epoch")) for run in side) for side in (first, second))
        lines += ["", f"Validation images, greedy captions, best epoch ({epochs})", scores.to_string()]
    tests = [tests_by_kind(run) for run in runs]
    common = [kind for kind in tests[0] if all(kind in each for each in tests)]
    for kind in common:
        # Like with like; without any, the latest of each, since every run may have a best beam of its own.
        ways = [way for way in tests[0][kind] if all(way in each[kind] for each in tests)]
        found = [[each[kind][way] for each in tests] for way in ways]
        for rows in found or [[list(each[kind].values())[-1] for each in tests]]:
            lines += ["", compare_tests(first, second, rows)]
    if not common:
        untested = next((run for run in runs if not run.tests), second[0])
        lines += ["", f"They have no test on the same split: {plain(command_to_test(untested.directory))}"]
    return "\n".join(lines)


def tests_by_kind(run: StoredRun) -> dict[Any, dict[Any, Row]]:
    """Return a run's tests by split and kind of decoding, and by beam, penalty and views: the latest of each, in order."""
    found: dict[Any, dict[Any, Row]] = {}
    for row in run.tests:
        kind = found.setdefault((row["split"], row["beam_size"] == 1, row["consensus"]), {})
        way = (row["beam_size"], row["length_penalty"], row["views"])
        kind.pop(way, None)
        kind[way] = row
    return found


def compare_tests_of(run: StoredRun) -> str:
    """Compare a run's tests that differ in one thing: the way of decoding, the images' views, or the checkpoint."""

    def things(row: Row) -> list[Any]:
        return [way_of(row), row["views"], (row["checkpoint"], row["epoch"])]

    lines = [f"A and B  {plain(run.directory)}"]
    for a, b in itertools.combinations([*run.tests, *run.ensembles], 2):
        same_images = a["split"] == b["split"] and a["images"] == b["images"]
        if same_images and sum(x != y for x, y in zip(things(a), things(b), strict=True)) == 1:
            lines += ["", compare_tests([run], [run], [a, b])]
    if len(lines) == 1:
        command = plain(command_to_test(run.directory))
        lines += ["", f"The run has no two tests of the same images that differ in one thing alone: {command}"]
    return "\n".join(lines)


def compare_tests(first: Sequence[StoredRun], second: Sequence[StoredRun], rows: Sequence[Row]) -> str:
    """Compare two tests, or the means of two sets of tests, with the paired bootstrap where all have scores by image.

    Args:
        rows: the test of each run, those of the first before those of the second.
    """
    number = len(first)
    sides = rows[:number], rows[number:]
    views = any(row["views"] != "whole" for row in rows)
    epochs_differ = first[0] is second[0] and rows[0]["epoch"] != rows[1]["epoch"]
    checkpoint = epochs_differ or any(row["checkpoint"] != "best.pt" for row in rows)
    ways = [" and ".join(dict.fromkeys(way_of(row, views, checkpoint) for row in side)) for side in sides]
    way = ways[0] if ways[0] == ways[1] else f"A {ways[0]}; B {ways[1]}"
    table = scores_side_by_side(*sides, list(METRIC_NAMES))
    notes = ["Of several runs the mean is compared, with each run in brackets."] if len(rows) > 2 else []
    try:
        differences = bootstrap([*first, *second], rows, number)
    except UserError as error:
        notes.append(f"No intervals of the scores' differences: {plain(error)}")
    else:
        cells = {METRIC_NAMES[key]: judged(key, difference) for key, difference in differences.items()}
        for place, column in enumerate(("B - A", "")):
            table[column] = [cells[name][place] if name in cells else "" for name in table.index]
        notes.append("B - A: mean and 95 % interval over images (paired bootstrap), not over training seeds.")
    heading = f"Test on {plain(rows[0]['images'])} {plain(rows[0]['split'])} images, {way}"
    return "\n".join([heading, table.to_string(), *notes])


def way_of(row: Row, views: bool = False, checkpoint: bool = False) -> str:
    """Return how a test captioned, with its views or checkpoint where asked for."""
    parts = [decoding(row)]
    if row["length_penalty"] is not None:
        parts.append(f"length penalty {plain(row['length_penalty'])}")
    if views:
        parts.append(f"views {plain(row['views'])}")
    if checkpoint:
        parts.append(f"{plain(row['checkpoint'])}, epoch {plain(row['epoch'])}")
    return ", ".join(parts)


def bootstrap(runs: Sequence[StoredRun], rows: Sequence[Row], number: int) -> dict[str, Difference]:
    """Return how much more the others have on average than the first `number`, with intervals over the images.

    The images are paired by name, whatever their order.

    Raises:
        UserError: scores by image are not stored or damaged, or the tests are not of the same images.
    """
    each = [read_scores(run, row) for run, row in zip(runs, rows, strict=True)]
    names = each[0].names
    for run, own in zip(runs, each, strict=True):
        if set(own.names) != set(names):
            raise UserError(
                f"{runs[0].directory} was tested on {len(names)} images, {run.directory} on {len(own.names)}, and "
                f"{len(set(own.names) & set(names))} are the same"
            )
    tables = [own.scores.summands()[pd.Index(own.names).get_indexer(names)] for own in each]
    return paired_bootstrap(tables[:number], tables[number:])


def judged(key: str, difference: Difference) -> tuple[str, str]:
    """Return a difference with its interval as text, and which of the two it shows to be better."""
    mean, low, high = (100 * value for value in difference)
    better = "" if low <= 0 <= high else "B is better" if (low > 0) != (key in LOW_IS_GOOD) else "A is better"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", better


def differing_parameters(first: Sequence[StoredRun], second: Sequence[StoredRun]) -> pd.DataFrame:
    """Return columns A and B of text: the parameters that differ between the sides or, but for the seed, within one."""
    sides = [[run.parameters() for run in side] for side in (first, second)]
    rows = {}
    for name in dict.fromkeys(itertools.chain(*sides[0], *sides[1])):
        a, b = (dict.fromkeys("-" if run.get(name) is None else plain(run[name]) for run in side) for side in sides)
        if set(a) != set(b) or (len(a) > 1 and name != "seed"):
            rows[plain(name)] = (", ".join(a), ", ".join(b))
    return pd.DataFrame.from_dict(rows, "index", columns=["A", "B"])


def scores_side_by_side(first: Sequence[Row], second: Sequence[Row], keys: Sequence[str]) -> pd.DataFrame:
    """Return columns A and B of text, with a row for each of these scores that all have."""
    shared = [key for key in keys if all(is_number(row.get(key)) for row in (*first, *second))]
    names = [METRIC_NAMES.get(key.removeprefix("val_"), key.removeprefix("val_")) for key in shared]
    sides = (("A", first), ("B", second))
    return pd.DataFrame(
        {name: [mean_text(key, [r[key] for r in side]) for key in shared] for name, side in sides}, names
    )


def mean_text(key: str, scores: Sequence[float]) -> str:
    """Return the mean of a score over runs, with each in brackets where there are several."""
    each = f" ({', '.join(score_text(key, score) for score in scores)})" if len(scores) > 1 else ""
    return score_text(key, sum(scores) / len(scores)) + each
