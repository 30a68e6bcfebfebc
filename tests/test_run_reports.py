"""The tables of runs, comparison and pruning, on run directories that are written by hand."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import CAPTIONS, HUGE, add_ensemble, command, write_checkpoint, write_run, write_runs

from captioning.io import format_bytes
from captioning.runs import table as comparison
from captioning.runs.directories import TEST_KEYS, deletable_epochs, lock_run_directory, read_run
from captioning.scoring.scores import WITH_INTERVAL


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COLUMNS", "1000")  # whatever terminal the tests run in
    return write_runs(tmp_path)


# --------------------------------------------------------------------------------------------------
# list


def listed(capsys) -> list[str]:
    """The names of a printed table's runs; an empty line ends the table."""
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    return [line.split()[1] for line in lines[1:]]


def test_the_table_shows_scores_and_only_the_parameters_that_differ(runs, capsys):
    assert command("list", runs) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    columns = (
        "run cider sparcs bleu4 rouge_l wer unsupported val_cider val_loss tested on best epoch decoder learning_rate"
    )
    assert head.split() == columns.split()
    assert [line.split()[:2] for line in lines[:3]] == [["1", "one"], ["2", "two"], ["3", "three"]] and lines[3] == ""
    assert lines[0].split()[2].endswith("*") and not lines[1].split()[2].endswith("*")
    assert "2 of 3" in lines[2] and "attention" in lines[2]  # the epoch of the best CIDEr, not of the best loss
    assert "The same in all: dataset_type custom" in lines[4] and "scheduler_type" not in lines[4]
    assert "1 without a test: python" in lines[-1]


@pytest.mark.parametrize("width", (80, 120))
def test_columns_without_room_in_the_terminal_are_in_a_block_below(runs, capsys, monkeypatch, width):
    long = write_run(runs / "demo_attention_ep2_bs64_lr2e-03_one_cycle_20261125_155350", encoder="e" * 30)
    monkeypatch.setenv("COLUMNS", str(width))
    assert command("list", runs) == 0
    out = capsys.readouterr().out
    assert long.name in out and all(len(line) <= width for line in out.splitlines() if "without a test" not in line)
    for column in ("run", "cider", "wer", "val_loss", "tested on", "best epoch", "decoder", "learning_rate", "encoder"):
        assert re.search(rf"\b{column}\b", out.split("\n\nThe same")[0])


def test_an_output_that_is_a_file_has_all_columns_and_needs_no_pytorch(runs, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    write_run(runs / ("long" * 30), encoder="e" * 300)
    code = "import sys; from experiment_utils import main; main(['list', sys.argv[1]]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(runs)], capture_output=True, text=True, check=True)
    assert "e" * 300 in done.stdout.splitlines()[4] and "torch" not in done.stdout.split()


def test_sorting_puts_the_best_first_and_those_without_the_score_last(runs, capsys):
    for score in ("cider", "wer"):
        assert command("list", runs, "--sort", score) == 0
        assert listed(capsys) == ["one", "two", "three"]
    assert command("list", runs, "--sort", "val_loss") == 0  # all alike: by age
    assert listed(capsys) == ["one", "two", "three"]


@pytest.mark.parametrize(
    "flags, left", [(["decoder=attention"], ["two", "three"]), (["decoder=attention", "learning_rate=1e-2"], ["two"])]
)
def test_filters(runs, capsys, flags, left):
    assert command("list", runs, "--where", *flags) == 0
    assert listed(capsys) == left


def test_csv_has_every_parameter_and_score(runs, capsys):
    assert command("list", runs, "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [Path(row["run"]).name for row in rows] == ["one", "two", "three"]
    assert float(rows[0]["cider"]) == json.loads((runs / "one" / "test_metrics.json").read_text())[0]["cider"]
    assert rows[1]["flag_num_workers"] == "2" and rows[2]["cider"] == ""
    assert rows[0]["images"] == "6" and rows[2]["images"] == ""  # whole numbers stay whole


def test_no_cell_is_a_formula_or_a_command_to_the_terminal(tmp_path):
    bad = ("=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "a\x1b[2Jb")
    write_run(tmp_path / "run", data_dir=bad[0], seed=-5, **{f"f{n}": text for n, text in enumerate(bad)})
    text = comparison.runs_csv([read_run(tmp_path / "run")])
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["flag_data_dir"] == "'=1+1" and row["flag_seed"] == "-5"  # a number stays one
    cells = [row[f"flag_f{n}"] for n in range(len(bad))]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)


def test_what_a_file_contains_cannot_command_the_terminal(runs, capsys):
    write_run(runs / "five", split="\x1b[2J", encoder="\x1b]0;x\x07", **{"k\x1b": "v"})
    row = json.loads((runs / "five" / "test_metrics.json").read_text())[0]
    rows = [row | {"split": "\x1b[2J\nx"} | bad for bad in ({"views": "\x9b"}, {"scores_file": "\x1b[2J"})]
    (runs / "five" / "test_metrics.json").write_text(json.dumps(rows))
    (runs / "six\x1b[2J").mkdir()
    (runs / "six\x1b[2J" / "run_config.json").write_text('{"\x1b": {}}')
    for words in (["list"], ["list", "--csv"], ["diff", runs / "one"], ["diff", runs / "five"]):
        assert command(words[0], *words[1:], runs / "five" if words[0] == "diff" else runs) == 0
    assert command("report", runs / "six\x1b[2J") == 0
    printed = "".join(capsys.readouterr())
    assert "\\x1b[2J" in printed and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", printed)


@pytest.mark.parametrize(
    "words, message",
    [
        (["list", "RUNS", "--sort", "beauty"], "no run has this score; there are bleu"),
        (["list", "RUNS", "--where", "decodr=lstm"], "e.g. decoder"),
        (["list", "RUNS", "--where", "decoder=gru"], "decoder is attention or lstm"),
        (["list", "RUNS/nowhere"], "no run directory at or below"),
        (["diff", "RUNS/one", "RUNS/nowhere"], "no run directory at or below"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, words, message):
    assert command(*(word.replace("RUNS", str(runs)) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


TEST = dict.fromkeys(TEST_KEYS, "x") | {"epoch": 1}
DAMAGE = [
    ("run_config.json", "{", "cannot read"),
    ("run_config.json", {"epochs": HUGE}, "run_config.json: epochs has"),
    ("loss_curve.json", {"epochs": [1], "training_losses": []}, "training_losses has 0 entries, epochs has 1"),
    ("loss_curve.json", {"epochs": [HUGE], "training_losses": [1]}, "epochs is not a list of numbers"),
    ("metrics_history.json", [{"cider": 0.5}], "entry 1 has no epoch"),
    ("metrics_history.json", {}, "expected a list"),
    ("test_metrics.json", [[]], "entry 1 is not an object"),
    ("test_metrics.json", [{"split": "test"}], "entry 1 has no checkpoint. Move the file away, then test again"),
    ("test_metrics.json", [TEST, TEST | {"cider": HUGE}], "entry 2: cider has"),
    ("test_metrics.json", [TEST | {"cider_interval": [0]}], "entry 1: cider_interval has"),
    ("ensemble_metrics.json", [TEST | {"epoch": [HUGE]}], "entry 1: epoch has"),
]


@pytest.mark.parametrize("name, content, message", DAMAGE)
def test_a_damaged_run_stays_listed_and_file_and_field_are_named(runs, capsys, name, content, message):
    (runs / "one" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert command("list", runs) == 0
    captured = capsys.readouterr()
    assert re.search(r"^\d  one \(damaged\) ", captured.out, re.MULTILINE) and "two (damaged)" not in captured.out
    assert message in captured.err and name in captured.err
    assert captured.err.count("\n") == captured.err.count("Damaged:") == 1
    assert command("list", runs, "--csv") == 0
    assert all(command("diff", runs / "one", runs / other) == 0 for other in ("two", "one"))


def test_an_ensemble_is_not_the_runs_own_score_but_is_compared_with_it(runs, capsys):
    own = read_run(runs / "one").scores()
    add_ensemble(runs / "one", 0.99)
    assert not read_run(runs / "one").damage and read_run(runs / "one").scores() == own
    assert command("diff", runs / "one", runs / "one") == 0
    assert re.search(r"B beam 3, .*best.pt, models/.*epoch 3, 2\n", capsys.readouterr().out)


# --------------------------------------------------------------------------------------------------
# diff


def test_diff_shows_what_differs_and_whether_the_scores_do(runs, capsys):
    assert command("diff", runs / "two", runs / "one") == 0
    out = capsys.readouterr().out
    assert re.search(r"decoder +attention +lstm", out) and "num_workers" not in out
    assert re.search(r"\nloss +2\.200 +2\.200\n", out)
    assert re.search(r"CIDEr .*B is better", out) and re.search(r"WER .* -\d.*B is better", out)
    assert "Test on 6 test images, beam 3, length penalty 0.7" in out
    assert re.search(r"unsupported words +66\.7 +12\.5 +-54\.2 \[.*B is better", out)
    assert command("diff", runs / "one", runs / "three") == 0
    assert "no test on the same split: python" in capsys.readouterr().out


def test_tests_of_the_same_way_are_compared_or_else_the_latest(runs, capsys):
    def headings(*beams: list[int]) -> list[str]:
        for name, each in zip(("one", "two"), beams, strict=True):
            path = runs / name / "test_metrics.json"
            row = json.loads(path.read_text())[0]
            path.write_text(json.dumps([row | {"beam_size": beam} for beam in each]))
        assert command("diff", runs / "one", runs / "two") == 0
        return [line.partition("images, ")[2] for line in capsys.readouterr().out.splitlines() if "Test on" in line]

    penalty = ", length penalty 0.7"
    assert headings([3, 5, 20], [20, 3]) == [f"beam 3{penalty}", f"beam 20{penalty}"]
    assert headings([3, 5], [8, 2]) == [f"A beam 5{penalty}; B beam 2{penalty}"]


def test_means_of_several_runs_are_compared(runs, tmp_path, capsys):
    seeds = [write_run(tmp_path / name, captions, seed=seed) for name, captions, seed in (
        ("s0", CAPTIONS, 0), ("s1", [*CAPTIONS[:5], "a dog"], 1), ("s2", CAPTIONS, 2))]  # fmt: skip
    assert command("diff", *seeds, "--against", runs / "two") == 0
    out = capsys.readouterr().out
    assert f"A  {seeds[0]}\n   {seeds[1]}\n   {seeds[2]}\nB  {runs / 'two'}\n" in out
    assert re.search(r"decoder +lstm +attention", out) and re.search(r"seed +0, 1, 2 +0\n", out)
    each = [100 * read_run(seed).scores()["cider"] for seed in seeds]
    other = 100 * read_run(runs / "two").scores()["cider"]
    text, mean = ", ".join(f"{score:.1f}" for score in each), sum(each) / 3
    assert re.search(rf"CIDEr +{mean:.1f} \({text}\) +{other:.1f} +{other - mean:.1f} \[.* A is better", out)
    assert "Of several runs the mean is compared" in out
    assert command("diff", *seeds[:2], "--against", *seeds[1:]) == 2
    assert "s1 is given more than once" in capsys.readouterr().err
    for number in (1, 3):
        assert command("diff", *seeds[:number]) == 2
        assert f"diff compares two runs, not {number}; several with several: diff RUN" in capsys.readouterr().err
    assert command("diff", *seeds[:2], "--against", runs / "three") == 0
    assert "They have no test on the same split: python" in capsys.readouterr().out


def test_parameters_that_differ_within_a_side_are_shown_but_for_the_seed(tmp_path, capsys):
    sides = [[write_run(tmp_path / f"{side}{seed}", seed=seed, learning_rate=rate) for seed, rate in enumerate(rates)]
             for side, rates in (("a", (0.1, 0.2)), ("b", (0.2, 0.1)))]  # fmt: skip
    assert command("diff", *sides[0], "--against", *sides[1]) == 0
    out = capsys.readouterr().out
    assert re.search(r"differ\n +A +B\nlearning_rate +0\.1, 0\.2 +0\.2, 0\.1\n\n", out)


def test_a_runs_own_tests_are_compared_where_one_thing_differs(runs, capsys):
    path = runs / "one" / "test_metrics.json"
    assert command("diff", runs / "one", runs / "one") == 0
    assert "no two tests of the same images that differ in one thing alone: python" in capsys.readouterr().out
    (beam,) = json.loads(path.read_text())
    changes = [{"consensus": "regression"}, {"views": "all"}, {"checkpoint": "model_epoch_1.pt", "epoch": 1}]
    changes.append({"images": 5})
    path.write_text(json.dumps([beam, *(beam | change for change in changes)]))
    assert command("diff", runs / "one", runs / "one") == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Test on")]
    plain, by_consensus = "beam 3, length penalty 0.7", "beam 3, consensus, length penalty 0.7"
    assert headings == [
        f"Test on 6 test images, A {plain}; B {by_consensus}",
        f"Test on 6 test images, A {plain}, views whole; B {plain}, views all",
        f"Test on 6 test images, A {plain}, best.pt, epoch 2; B {plain}, model_epoch_1.pt, epoch 1",
    ]


def test_images_are_paired_by_name_whatever_their_order(tmp_path):
    runs = [read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", order=(3, 5, 0, 1, 4, 2)))]
    same = comparison.bootstrap(runs, [run.latest for run in runs], 1)
    assert set(same) == set(WITH_INTERVAL) and all(each == (0, 0, 0) for each in same.values())


@pytest.mark.parametrize(
    "change, message",
    [
        (None, "one.test_scores.json is not there: python .* --mode test"),
        ({"image_id": [f"q{n}.jpg" for n in range(6)]}, "one was tested on 6 images, .*two on 6, and 0 are the same"),
        *(({field: value}, "one.test_scores.json is not a file of scores by image") for field, value in (
            ("cider", [1.0]), ("bleu", []), ("image_id", [[]] * 6), ("wer", [1e999] * 6), ("rouge_l", [10**400] * 6))),
    ],
)  # fmt: skip
def test_without_scores_of_the_same_images_there_are_no_intervals(runs, capsys, change, message):
    path = runs / "one" / "test_scores.json"
    path.unlink() if change is None else path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert command("diff", runs / "one", runs / "two") == 0
    out = capsys.readouterr().out
    assert re.search(f"No intervals of the scores' differences: .*{message}", out) and "CIDEr" in out


# --------------------------------------------------------------------------------------------------
# prune


@pytest.fixture
def trained(tmp_path) -> Path:
    """Three epochs, of which the second is best.pt and the third last.pt."""
    directory = write_run(tmp_path / "run", None)
    for epoch in (1, 2, 3):
        write_checkpoint(directory / f"model_epoch_{epoch}.pt")
    os.link(directory / "model_epoch_2.pt", directory / "best.pt")
    os.link(directory / "model_epoch_3.pt", directory / "last.pt")
    return directory


def checkpoints(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*.pt")}


def test_pruning_counts_hard_links_and_keeps_best_and_last(trained, capsys):
    size, best = (trained / "model_epoch_1.pt").stat().st_size, (trained / "best.pt").read_bytes()
    found, freed = deletable_epochs(trained)
    assert [path.name for path in found] == [f"model_epoch_{n}.pt" for n in (1, 2, 3)] and freed == size
    assert command("prune", trained, "--yes") == 0
    assert checkpoints(trained) == {"best.pt", "last.pt"} and (trained / "best.pt").read_bytes() == best
    assert f"Deleted 3 epoch files; {format_bytes(size)} are free again" in capsys.readouterr().out
    assert command("prune", trained, "--yes") == 0 and "Nothing to delete" in capsys.readouterr().out


def test_pruning_asks(trained, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert command("prune", trained.parent) == 0 and "Nothing was deleted" in capsys.readouterr().out

    def nobody(question):
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    assert command("prune", trained.parent) == 2 and "--yes" in capsys.readouterr().err
    assert len(checkpoints(trained)) == 5
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert command("prune", trained.parent) == 0 and len(checkpoints(trained)) == 2


def test_a_run_that_is_trained_in_is_passed_over(trained, capsys):
    lock = lock_run_directory(trained)
    assert command("prune", trained, "--yes") == 0
    assert "another process is training" in capsys.readouterr().out and len(checkpoints(trained)) == 5
    lock.release()


@pytest.mark.parametrize("name", ("best.pt", "last.pt"))
def test_without_a_whole_best_and_last_the_epoch_files_stay(trained, capsys, name):
    content = (trained / name).read_bytes()
    (trained / name).unlink()
    for damaged in (None, b"half a fi", content.replace(bytes(1000), b"x" * 1000)):
        if damaged is not None:
            (trained / name).write_bytes(damaged)
        assert command("prune", trained, "--yes") == 0
        assert f"{name} is missing or damaged: the epoch files" in capsys.readouterr().out
    assert (trained / "model_epoch_1.pt").is_file()


def test_an_epoch_that_a_crash_left_newer_than_last_stays(trained):
    newest = write_checkpoint(trained / "model_epoch_4.pt")
    later = (trained / "last.pt").stat().st_mtime + 60
    os.utime(newest, (later, later))
    assert command("prune", trained, "--yes") == 0
    assert checkpoints(trained) == {"best.pt", "last.pt", "model_epoch_4.pt"}


def test_only_files_that_a_run_wrote_are_deleted(trained, capsys):
    foreign = {f"model_epoch_{name}.pt" for name in ("mine_1", "good", "01", 7)}  # an epoch that was not trained here
    for name in foreign:
        write_checkpoint(trained / name, 1)
    (trained / "model_epoch_11.pt").symlink_to(trained / "model_epoch_1.pt")
    for path in trained.glob("model_epoch_*.pt"):
        if not path.is_symlink():
            os.utime(path, ns=(1, 1))
    assert command("prune", trained, "--yes") == 0
    assert checkpoints(trained) == foreign | {"best.pt", "last.pt", "model_epoch_11.pt"}
    assert "Deleted 3 epoch files" in capsys.readouterr().out
