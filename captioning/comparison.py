"""Runs beside each other: a table of them, and two compared, as text and as CSV.

Imports pandas, so import it where a table is made.
"""

from __future__ import annotations

import difflib
import itertools
import shutil
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from captioning.analysis import SHARES, word_shares
from captioning.io import UserError, csv_cell
from captioning.runs import (
    ByImage,
    Run,
    command_to_test,
    decoding,
    is_number,
    plain,
    read_run,
    read_scores,
    read_test_captions,
    read_test_references,
    run_directories,
    score_text,
)
from captioning.scores import (
    METRIC_NAMES,
    WITH_INTERVAL,
    Difference,
    paired_bootstrap,
    scores_of_sums,
    shares_of_sums,
)

LOW_IS_GOOD = ("wer", "unsupported", "val_loss")
SHOWN_SCORES = ("cider", "bleu4", "rouge_l", "meteor", "spice", "wer", "unsupported", "val_cider", "val_loss")
USUAL = {"views": "whole", "checkpoint": "best.pt"}  # of a test; what differs from it is named
UNLIMITED = 100_000  # columns, of an output that is not a terminal


# --------------------------------------------------------------------------------------------------
# Text and CSV


def table_text(table: pd.DataFrame, right: Sequence[str] = ()) -> list[str]:
    """Return the lines of a table of text, with the columns of `right` flush right."""
    rows = [list(table.columns), *table.to_numpy().tolist()]
    flush = [name in right for name in table.columns]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, flush, strict=True)
        ).rstrip()
        for row in rows
    ]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV under the union of their columns: numbers at full precision, missing cells empty."""
    safe = [{csv_cell(name): csv_cell(value) for name, value in row.items()} for row in rows]
    # Of objects, so that whole numbers stay whole beside missing ones.
    text: str = pd.DataFrame(safe, dtype=object).to_csv(index=False, lineterminator="\n")
    return text


# --------------------------------------------------------------------------------------------------
# Choosing and sorting runs


def read_runs(folder: Path) -> list[Run]:
    """Read all runs at or below a folder, oldest first.

    Raises:
        UserError: there is none.
    """
    return [read_run(directory) for directory in run_directories(folder)]


def select_runs(runs: Sequence[Run], conditions: Iterable[str]) -> list[Run]:
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
        try:
            return bool(float(text) == value)
        except ValueError:
            return False
    return text.lower() == str(value).lower() if value is None or type(value) is bool else text == str(value)


def sort_runs(runs: Sequence[Run], key: str | None) -> list[Run]:
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


def score_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row of scores for each run, NaN where it has none."""
    return pd.DataFrame([run.scores() for run in runs], index=range(len(runs)), dtype=np.float64)


# --------------------------------------------------------------------------------------------------
# A table of runs


def runs_table(runs: Sequence[Run], folder: Path) -> str:
    """Return a line per run: name, scores (the best of each starred), and the parameters that differ.

    Columns that do not fit into the terminal are left out, and a line below names them; a file has room for all.
    """
    width = shutil.get_terminal_size((UNLIMITED, 24)).columns
    scores = score_table(runs)
    scores = scores[[key for key in SHOWN_SCORES if key in scores]]
    signed = scores * [-1 if key in LOW_IS_GOOD else 1 for key in scores]
    best = signed.eq(signed.max()) & (scores.notna().sum() > 1)
    parameters = pd.DataFrame([{plain(k): plain(v) for k, v in run.parameters().items()} for run in runs])
    values = parameters.nunique()  # a parameter that an older run lacks does not differ
    differing = parameters[values.index[values > 1]].fillna("-")

    names = [str(run.directory if run.directory == folder else run.directory.relative_to(folder)) for run in runs]
    table = pd.DataFrame({"run": [plain(n) + " (damaged)" * bool(r.damage) for n, r in zip(names, runs, strict=True)]})
    for key in scores:
        cells = zip(scores[key], best[key], strict=True)
        table[key] = ["- " if np.isnan(score) else score_text(key, score) + " *"[star] for score, star in cells]
    table["tested on"] = [tested(run) for run in runs]
    table["best epoch"] = [f"{(run.best or {}).get('epoch', 0)} of {len(run.epochs)}" for run in runs]
    lines, left_out = fitted(table.join(differing), list(scores), width)

    same = parameters[values.index[values == 1]].bfill().iloc[0]
    shared = ", ".join(f"{name} {value}" for name, value in same.items() if value != "None")
    notes = [f"The same in all: {shared}", "*: the best of its column. val_...: the best epoch, greedy."]
    if left_out:
        notes.append(f"Too wide for this terminal: {', '.join(left_out)}. A wider one or --csv shows them.")
    if len({(row.get("split"), row.get("images")) for run in runs for row in run.tests[-1:]}) > 1:
        notes.append("Note: not all were tested on the same images, and CIDEr depends on them.")
    lines += ["", *itertools.chain.from_iterable(textwrap.wrap(note, width, break_on_hyphens=False) for note in notes)]
    if untested := [run for run in runs if not run.tests]:
        lines.append(f"{len(untested)} without a test: {plain(command_to_test(untested[0].directory))}")
    return "\n".join(lines)


def fitted(table: pd.DataFrame, right: Sequence[str], width: int) -> tuple[list[str], list[str]]:
    """Return a table's lines, no longer than `width` but for the first column, and the columns that have no room.

    A first column of more than half of the width gets lines of its own.
    """
    widths = {name: max(map(len, [name, *table[name]])) for name in table}
    first, *others = table.columns
    apart = widths[first] > width // 2 and sum(widths.values()) + 2 * len(others) > width
    room, shown, left_out = width - (2 if apart else widths[first]), [], []
    for name in others:
        if widths[name] + 2 <= room:
            room -= widths[name] + 2
            shown.append(name)
        else:
            left_out.append(name)
    if not apart:
        return table_text(table[[first, *shown]], right), left_out
    below = [f"    {line}" for line in table_text(table[shown], right)]
    names = [first, *table[first]]
    return [line for pair in zip(names, below, strict=True) for line in pair], left_out


def tested(run: Run) -> str:
    """Return what the test scores are of, e.g. `test 1000, beam 3`."""
    if not run.tests:
        return "-"
    row = run.tests[-1]
    return f"{plain(row.get('split'))} {plain(row.get('images'))}, {decoding(row)}"


def runs_csv(runs: Sequence[Run]) -> str:
    """Return every run with every score at full precision and every parameter."""
    about = ("split", "images", "views", "beam_size", "length_penalty", "consensus")
    return csv_text(
        [
            {"run": run.directory, "epochs": len(run.epochs), "best_epoch": (run.best or {}).get("epoch")}
            | {key: row.get(key) for row in run.tests[-1:] for key in about}
            | run.scores()
            | {f"flag_{name}": value for name, value in run.flags.items() if name != "command"}
            | {"damage": "; ".join(run.damage) or None}
            for run in runs
        ]
    )


# --------------------------------------------------------------------------------------------------
# Two runs, or several against several


class Test(NamedTuple):
    """A test of a run."""

    run: Run
    row: Mapping[str, Any]  # of test_metrics.json


def compare(first: Sequence[Run], second: Sequence[Run]) -> str:
    """Compare two runs, or the means of two sets of runs: parameters, validation scores, and each kind of test.

    Of one run twice, its own tests of the same images are compared, each with the next.
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
    lines += ["", "Parameters that differ", *(indented(flags) if len(flags) else ["  none"])]
    keys = ["val_loss", *(f"val_{name}" for name in METRIC_NAMES)]
    scores = scores_side_by_side([run.scores() for run in first], [run.scores() for run in second], keys)
    if len(scores):
        epochs = " and ".join(", ".join(str((run.best or {}).get("epoch")) for run in side) for side in (first, second))
        lines += ["", f"Validation images, greedy captions, best epoch ({epochs})", *indented(scores)]
    tests = [tests_by_kind(run) for run in runs]
    common = [kind for kind in tests[0] if all(kind in each for each in tests)]
    for kind in common:
        # Like with like; without any, the latest of each, since every run may have a best beam of its own.
        ways = [way for way in tests[0][kind] if all(way in each[kind] for each in tests)]
        found = [[each[kind][way] for each in tests] for way in ways]
        for rows in found or [[list(each[kind].values())[-1] for each in tests]]:
            lines += ["", *compare_tests(rows[: len(first)], rows[len(first) :])]
    if not common:
        untested = next((run for run in runs if not run.tests), second[0])
        whose = "The two" if len(runs) == 2 else "They"
        lines += ["", f"{whose} have no test on the same split: {plain(command_to_test(untested.directory))}"]
    return "\n".join(lines)


def tests_by_kind(run: Run) -> dict[Any, dict[Any, Test]]:
    """Return a run's tests by split and kind of decoding, and by beam, penalty and views: the latest of each, in order."""
    found: dict[Any, dict[Any, Test]] = {}
    for row in run.tests:
        beam, views = row.get("beam_size"), row.get("views", USUAL["views"])
        kind = found.setdefault((plain(row.get("split")), beam == 1, plain(row.get("consensus"))), {})
        way = (plain(beam), plain(row.get("length_penalty")), plain(views))
        kind.pop(way, None)
        kind[way] = Test(run, row)
    return found


def compare_tests_of(run: Run) -> str:
    """Compare a run's tests that differ in one thing: the way of decoding, the images' views, or the checkpoint."""
    latest: dict[Any, dict[str, Any]] = {}
    for row in (*run.tests, *run.ensembles):
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
                lines += ["", *compare_tests([Test(run, a)], [Test(run, b)])]
    if len(lines) == 1:
        command = plain(command_to_test(run.directory))
        lines += ["", f"The run has no two tests of the same images that differ in one thing alone: {command}"]
    return "\n".join(lines)


def compare_tests(first: Sequence[Test], second: Sequence[Test]) -> list[str]:
    """Compare two tests, or the means of two sets of tests, with the paired bootstrap where all have scores by image."""
    tests = [*first, *second]
    shown = [key for key, usual in USUAL.items() if any(test.row.get(key, usual) != usual for test in tests)]
    if all(test.run is tests[0].run for test in tests) and len({test.row.get("epoch") for test in tests}) > 1:
        shown.append("epoch")
    ways = [" and ".join(dict.fromkeys(way_of(test.row, shown) for test in side)) for side in (first, second)]
    way = ways[0] if ways[0] == ways[1] else f"A {ways[0]}; B {ways[1]}"
    table = scores_side_by_side([test.row for test in first], [test.row for test in second], list(METRIC_NAMES))
    differences: dict[str, Difference | None] = {}
    notes = []
    try:
        scored = [read_scores(*test) for test in tests]
        require_same_images(tests, [each.names for each in scored])
        differences |= bootstrap(scored[: len(first)], scored[len(first) :])
    except UserError as error:
        notes.append(f"No intervals of the scores' differences: {plain(error)}")
    words = table[:0]
    try:
        words, by_group = compare_words(first, second)
        differences |= by_group
    except UserError as error:
        notes.append(f"No precision and recall by groups of words: {plain(error)}")
    if differences:
        notes.insert(
            0, "B - A: mean and 95 % interval over the choice of images (paired bootstrap), not over training seeds."
        )
        table, words = (with_differences(each, differences) for each in (table, words))
        if len(words):
            notes.insert(1, f"Of these {len(words)} intervals by group one in twenty excludes 0 by chance alone.")
    if len(tests) > 2:
        notes.insert(0, "Of several runs the mean is compared, with each run in brackets.")
    row = tests[0].row
    lines = [f"Test on {plain(row.get('images'))} {plain(row.get('split'))} images, {way}", *indented(table)]
    if len(words):
        lines += ["", "  Words, by group", *indented(words)]
    return [*lines, *(f"  {note}" for note in notes)]


def way_of(row: Mapping[str, Any], shown: Sequence[str]) -> str:
    """Return how a test captioned, with these of its views, checkpoint and epoch."""
    parts = [decoding(row)]
    if (penalty := row.get("length_penalty")) is not None:
        parts.append(f"length penalty {plain(penalty)}")
    for key in shown:
        value = plain(row.get(key, USUAL.get(key)))
        parts.append(value if key == "checkpoint" else f"{key} {value}")
    return ", ".join(parts)


def compare_words(first: Sequence[Test], second: Sequence[Test]) -> tuple[pd.DataFrame, dict[str, Difference | None]]:
    """Compare precision and recall by groups of words, and the share of unsupported words.

    Returns:
        precision and recall of each group as text, and the differences, under `unsupported` the share's.

    Raises:
        UserError: captions or references are not stored, damaged, or of different images.
    """
    tests = [*first, *second]
    captions = [read_test_captions(*test) for test in tests]
    for test, own in zip(tests, captions, strict=True):
        if not own:
            raise UserError(f"{test.run.directory} does not have its captions: {command_to_test(test.run.directory)}")
    require_same_images(tests, captions)
    names = list(captions[0])
    known = next(filter(None, (read_test_references(*test) for test in tests)), {})
    if unknown := [name for name in names if name not in known]:
        command = command_to_test(tests[0].run.directory)
        raise UserError(f"the references of {len(unknown)} images are not stored, which a test does: {command}")
    references = [known[name] for name in names]
    counts = [word_shares([own[name] for name in names], references).reshape(len(names), -1) for own in captions]
    shares = [dict(zip(SHARES, shares_of_sums(table.sum(0)).tolist(), strict=True)) for table in counts]
    number = len(first)
    table = scores_side_by_side(shares[:number], shares[number:], SHARES[1:])
    found = paired_bootstrap(counts[:number], counts[number:], shares_of_sums)
    return table, dict(zip(SHARES, found, strict=True))


def require_same_images(tests: Sequence[Test], names: Sequence[Collection[str]]) -> None:
    """Raises: UserError: a test is of other images than the first."""
    for test, own in zip(tests, names, strict=True):
        if set(own) != set(names[0]):
            both = len(set(own) & set(names[0]))
            raise UserError(
                f"{tests[0].run.directory} was tested on {len(names[0])} images, {test.run.directory} on {len(own)}, "
                f"and {both} are the same"
            )


def with_differences(table: pd.DataFrame, differences: Mapping[str, Difference | None]) -> pd.DataFrame:
    """Return the table with a column of the differences of its rows, and one of which test they show to be better."""
    cells = [judged(key, differences.get(key)) for key in table.index]
    return table.assign(**{"B - A": [text for text, _ in cells], "": [better for _, better in cells]})


def judged(key: str, difference: Difference | None) -> tuple[str, str]:
    """Return a difference with its interval as text, and which of the two it shows to be better."""
    if difference is None:
        return "", ""
    mean, low, high = (100 * value for value in difference)
    better = "" if low <= 0 <= high else "B is better" if (low > 0) != (key in LOW_IS_GOOD) else "A is better"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", better


def differing_parameters(first: Sequence[Run], second: Sequence[Run]) -> pd.DataFrame:
    """Return columns A and B of text: the parameters that differ between the sides or, but for the seed, within one."""
    sides = [[run.parameters() for run in side] for side in (first, second)]
    rows = {}
    for name in dict.fromkeys(itertools.chain(*sides[0], *sides[1])):
        a, b = (dict.fromkeys("-" if run.get(name) is None else plain(run[name]) for run in side) for side in sides)
        if set(a) != set(b) or (len(a) > 1 and name != "seed"):
            rows[name] = (", ".join(a), ", ".join(b))
    return pd.DataFrame.from_dict(rows, "index", columns=["A", "B"])


def scores_side_by_side(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> pd.DataFrame:
    """Return columns A and B of text, with a row for each of these scores that all have."""
    shared = [key for key in keys if all(is_number(row.get(key)) for row in (*first, *second))]
    return pd.DataFrame(
        {
            name: [mean_text(key, [row[key] for row in side]) for key in shared]
            for name, side in (("A", first), ("B", second))
        },
        shared,
    )


def mean_text(key: str, scores: Sequence[float]) -> str:
    """Return the mean of a score over runs, with each in brackets where there are several."""
    each = f" ({', '.join(score_text(key, score) for score in scores)})" if len(scores) > 1 else ""
    return score_text(key, sum(scores) / len(scores)) + each


def indented(table: pd.DataFrame) -> list[str]:
    """Return the lines of a table, each row with the name of its key before it."""
    names = [key.removeprefix("val_") for key in table.index]
    table = table.copy()
    table.insert(0, "", [plain(METRIC_NAMES.get(name, name)) for name in names], allow_duplicates=True)
    return [f"  {line}" for line in table_text(table)]


def bootstrap(first: Sequence[ByImage], second: Sequence[ByImage]) -> dict[str, Difference | None]:
    """Return how much more the second have on average, with intervals over the images: the scores of `WITH_INTERVAL`.

    The images are paired by name, whatever their order.
    """
    names = first[0].names
    tables = [each.scores.summands()[pd.Index(each.names).get_indexer(names)] for each in (*first, *second)]
    found = paired_bootstrap(tables[: len(first)], tables[len(first) :], scores_of_sums)
    return dict(zip(WITH_INTERVAL, found, strict=True))
