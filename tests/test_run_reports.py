"""Tables of runs, comparison, pruning and the report, on run directories that are written by hand."""

import csv
import html.parser
import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import experiment_utils
from captioning import reports as html_report
from captioning import runs as run_reports
from captioning.io import UserError
from captioning.runs import lock_run_directory
from metrics_utils import score_images, summarize

CAPTIONS = [
    "a red dog runs",
    "a green cat sits on a mat",
    "a blue bird",
    "a red dog sits",
    "a cat runs",
    "one bird flies",
]
REFERENCES = [
    ["a red dog runs fast", "the dog runs"], ["a green cat sits on a mat", "a cat on a mat"], ["a blue bird sings"],
    ["a red cat sits", "a dog sits down"], ["a black horse jumps high"], ["one bird flies away", "a bird flies"],
]  # fmt: skip
NAMES = [f"p{n}.jpg" for n in range(6)]


def write_run(directory: Path, captions: list[str] | None = CAPTIONS, order=range(6), **flags) -> Path:
    """A run directory as training and testing leave it, without a network."""
    directory.mkdir(parents=True)
    config = {
        "dataset_type": "custom", "decoder_type": "lstm", "encoder": "efficientnet_lite0", "learning_rate": 0.001,
        "use_scheduler": False, "scheduler_type": "cosine", "seed": 0, "freq_threshold": 1, "best_metric": "cider",
        "num_workers": 16, "command": "python train.py --dataset_type custom",
    }  # fmt: skip
    (directory / "run_config.json").write_text(json.dumps(config | flags))
    curve = {"epochs": [1, 2, 3], "training_losses": [3.0, 2.0, 1.5], "validation_losses": [3.1, 2.2, 2.3]}
    (directory / "loss_curve.json").write_text(json.dumps(curve | {"learning_rates": [0.001] * 3}))
    history = [
        {"epoch": n, "split": "val", "beam_size": 1, "images": 2, "cider": c} for n, c in ((1, 0.1), (2, 0.5), (3, 0.4))
    ]
    (directory / "metrics_history.json").write_text(json.dumps(history))
    if captions is not None:
        each = score_images(captions, REFERENCES)
        rows = {field: values[list(order)].tolist() for field, values in each._asdict().items()}
        names = [NAMES[n] for n in order]
        bleu = {key: rows[key] for key in ("guess", "correct", "length", "reference_length")}
        scores = {"image_id": names, **{key: rows[key] for key in ("cider", "rouge_l", "wer")}, "bleu": bleu}
        (directory / "test_scores.json").write_text(json.dumps(scores))
        said = [{"image_id": name, "caption": captions[n]} for name, n in zip(names, order, strict=True)]
        (directory / "test_captions.json").write_text(json.dumps(said))
        row = {
            "split": "test", "images": 6, "beam_size": 3, "length_penalty": 0.7, "captions_file": "test_captions.json",
            "scores_file": "test_scores.json", **summarize(each), "cider_interval": [0.25, 1.75],
        }  # fmt: skip
        (directory / "test_metrics.json").write_text(json.dumps([row]))
    return directory


def write_checkpoint(path: Path, size: int = 1000) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("data", b"x" * size)
    return path


@pytest.fixture
def runs(tmp_path) -> Path:
    write_run(tmp_path / "runs" / "one")
    write_run(tmp_path / "runs" / "two", ["a dog"] * 6, decoder_type="attention", learning_rate=0.01, num_workers=2)
    write_run(tmp_path / "runs" / "three", None, decoder_type="attention")
    write_run(tmp_path / "runs" / "dry_run_four")
    for age, name in enumerate(("three", "two", "one", "dry_run_four")):
        os.utime(tmp_path / "runs" / name / "run_config.json", (1e9 - age, 1e9 - age))
    return tmp_path / "runs"


def command(*words: object) -> int:
    return experiment_utils.main([str(word) for word in words])


# --------------------------------------------------------------------------------------------------
# list


def test_the_table_shows_scores_and_only_the_parameters_that_differ(runs, capsys):
    assert command("list", runs) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == [
        *("cider", "bleu4", "rouge_l", "wer", "val_cider", "val_loss", "tested", "on", "best", "epoch"),
        *("decoder", "learning_rate", "run"),
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines[:3]] == ["one", "two", "three"] and lines[3] == ""
    assert lines[0].split()[0].endswith("*") and not lines[1].split()[0].endswith("*")
    assert "2 of 3" in lines[2] and "attention" in lines[2]  # the epoch of the best CIDEr, not of the best loss
    assert "The same in all: dataset_type custom" in lines[4] and "scheduler_type" not in lines[4]
    assert "1 without a test: python" in lines[-1]


def test_sorting_puts_the_best_first_and_those_without_the_score_last(runs, capsys):
    for score, first in (("cider", "one"), ("wer", "one")):
        assert command("list", runs, "--sort", score) == 0
        out = capsys.readouterr().out.splitlines()
        assert [line.split()[-1] for line in out[1:4]] == [first, "two", "three"]


@pytest.mark.parametrize(
    "flags, left", [(["decoder=attention"], ["two", "three"]), (["decoder=attention", "learning_rate=1e-2"], ["two"])]
)
def test_filters(runs, capsys, flags, left):
    assert command("list", runs, "--where", *flags) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in out[1 : 1 + len(left)]] == left and out[1 + len(left)] == ""


def test_csv_has_every_parameter_and_score(runs, capsys):
    assert command("list", runs, "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [Path(row["run"]).name for row in rows] == ["one", "two", "three"]
    assert float(rows[0]["cider"]) == json.loads((runs / "one" / "test_metrics.json").read_text())[0]["cider"]
    assert rows[1]["flag_num_workers"] == "2" and rows[2]["cider"] == ""


@pytest.mark.parametrize(
    "words, message",
    [
        (["list", "RUNS", "--sort", "beauty"], "no run has this score; there are bleu"),
        (["list", "RUNS", "--where", "decodr=lstm"], "e.g. decoder"),
        (["list", "RUNS", "--where", "decoder=gru"], "decoder is attention or lstm"),
        (["list", "RUNS/nowhere"], "no run directory at or below"),
        (["diff", "RUNS/one", "RUNS/nowhere"], "no run directory at or below"),
        (["report", "RUNS/nowhere"], "no run directory at or below"),
        (["prune", "RUNS/nowhere"], "no run directory at or below"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, words, message):
    assert command(*(word.replace("RUNS", str(runs)) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_a_damaged_run_is_named_and_left_out(runs, capsys):
    (runs / "two" / "loss_curve.json").write_text('{"epochs": [1], "training_losses": []}')
    assert command("list", runs) == 0
    captured = capsys.readouterr()
    assert "Left out: " in captured.err and "loss_curve.json" in captured.err and " two\n" not in captured.out


# --------------------------------------------------------------------------------------------------
# diff


def test_diff_shows_what_differs_and_whether_the_scores_do(runs, capsys):
    assert command("diff", runs / "two", runs / "one") == 0
    out = capsys.readouterr().out
    assert re.search(r"decoder +attention +lstm", out) and "num_workers" not in out
    assert re.search(r"CIDEr .*B is better", out) and re.search(r"WER .* -\d.*B is better", out)
    assert "Test on 6 test images, beam 3, length penalty 0.7" in out
    assert command("diff", runs / "one", runs / "three") == 0
    assert "no test on the same split: python" in capsys.readouterr().out


def test_a_runs_own_tests_are_compared_where_one_thing_differs(runs, capsys):
    path = runs / "one" / "test_metrics.json"
    assert command("diff", runs / "one", runs / "one") == 0
    assert "no two tests of the same images that differ in one thing alone: python" in capsys.readouterr().out
    (beam,) = json.loads(path.read_text())
    ways = [
        beam | {"checkpoint": checkpoint, "epoch": epoch, "views": views, "consensus": consensus}
        for checkpoint, epoch in (("best.pt", 3), ("model_epoch_1.pt", 1))
        for views, consensus in (("whole", None), ("whole", "regression"), ("all", None))
    ]
    path.write_text(json.dumps(ways))
    assert command("diff", runs / "one", runs / "one") == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Test on")]
    plain, other = "beam 3, length penalty 0.7", "model_epoch_1.pt"
    by_consensus = "beam 3, consensus with regression, length penalty 0.7"
    assert headings == [
        f"Test on 6 test images, A {way}"
        for way in (
            f"{plain}; B {by_consensus}",
            f"{plain}, {other}; B {by_consensus}, {other}",
            f"{plain}, views whole; B {plain}, views all",
            f"{plain}, views whole, {other}; B {plain}, views all, {other}",
            f"{plain}, best.pt, epoch 3; B {plain}, {other}, epoch 1",
            f"{by_consensus}, best.pt, epoch 3; B {by_consensus}, {other}, epoch 1",
            f"{plain}, views all, best.pt, epoch 3; B {plain}, views all, {other}, epoch 1",
        )
    ]


def test_images_are_paired_by_name_whatever_their_order(tmp_path):
    first = run_reports.read_run(write_run(tmp_path / "a"))
    second = run_reports.read_run(write_run(tmp_path / "b", order=(3, 5, 0, 1, 4, 2)))
    same = run_reports.bootstrap(*(run_reports.read_scores(run, run.tests[0]) for run in (first, second)))
    assert set(same) == {"cider", "rouge_l", "wer", "bleu4"} and all(each == (0, 0, 0) for each in same.values())


def test_the_difference_of_bleu_is_that_of_the_corpora():
    better, worse = score_images(CAPTIONS, REFERENCES), score_images([*CAPTIONS[:5], "x"], REFERENCES)
    found = run_reports.paired_bleu4(worse, better, samples=500)
    assert found.mean == pytest.approx(summarize(better)["bleu4"] - summarize(worse)["bleu4"])
    assert found.low <= found.mean <= found.high and found == run_reports.paired_bleu4(worse, better, samples=500)


def test_without_scores_by_image_it_says_what_to_do(runs, capsys):
    path = runs / "one" / "test_metrics.json"
    (row,) = json.loads(path.read_text())
    path.write_text(json.dumps([{key: value for key, value in row.items() if key != "scores_file"}]))
    assert command("diff", runs / "one", runs / "two") == 0
    assert "--mode test --model_path" in capsys.readouterr().out


def test_other_images_are_not_compared(runs, capsys):
    path = runs / "one" / "test_scores.json"
    path.write_text(path.read_text().replace("p3.jpg", "q.jpg"))
    assert command("diff", runs / "one", runs / "two") == 0
    assert "A scored 6 images, B 6, and 5 are the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    "field, value", [("cider", [1.0]), ("cider", "x"), ("image_id", [[]] * 6), ("bleu", None), ("wer", [1e999] * 6)]
)
def test_a_scores_file_of_another_form_is_refused(runs, field, value):
    path = runs / "one" / "test_scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    run = run_reports.read_run(runs / "one")
    with pytest.raises(UserError, match=r"test_scores\.json is no list of scores"):
        run_reports.read_scores(run, run.tests[0])


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
    found = run_reports.superfluous(trained)
    assert [path.name for path in found.files] == [f"model_epoch_{n}.pt" for n in (1, 2, 3)] and found.freed == size
    assert command("prune", trained, "--yes") == 0
    assert checkpoints(trained) == {"best.pt", "last.pt"} and (trained / "best.pt").read_bytes() == best
    assert "Deleted 3 epoch files; 1.1 kB are free again" in capsys.readouterr().out
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
    (trained / name).unlink()
    assert command("prune", trained, "--yes") == 0 and f"{name} is not there" in capsys.readouterr().out
    (trained / name).write_bytes(b"half a fi")
    assert command("prune", trained, "--yes") == 0 and "cannot be read" in capsys.readouterr().out
    assert (trained / "model_epoch_1.pt").is_file()


def test_an_epoch_that_a_crash_left_newer_than_last_stays(trained):
    newest = write_checkpoint(trained / "model_epoch_4.pt")
    later = (trained / "last.pt").stat().st_mtime + 60
    os.utime(newest, (later, later))
    assert command("prune", trained, "--yes") == 0
    assert checkpoints(trained) == {"best.pt", "last.pt", "model_epoch_4.pt"}


# --------------------------------------------------------------------------------------------------
# report


class Page(html.parser.HTMLParser):
    """The tags, their attributes, and the text that a reader sees."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if not self.tags or self.tags[-1][0] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """The pictures and references of the runs above; p4's picture is broken."""
    folder = tmp_path / "data"
    (folder / "Images").mkdir(parents=True)
    rows = ["image,caption"]
    for number, (name, captions) in enumerate(zip(NAMES, REFERENCES, strict=True)):
        noise = np.random.default_rng(number).integers(0, 255, (600, 900, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "Images" / name)
        rows += [f"{name},{caption}" for caption in captions]
    (folder / "Images" / "p4.jpg").write_bytes(b"no picture")
    (folder / "captions.txt").write_text("\n".join(rows) + "\n")
    return folder


def test_the_report_holds_everything_and_refers_to_nothing(runs, data_dir, capsys):
    run = runs / "one"
    Image.new("RGB", (1800, 900), "teal").save(run / "attention_viz_sample_1.png")
    assert command("report", run, "--data_dir", data_dir) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    text = (run / "report.html").read_text()
    page = Page(text)
    assert len(text) < 5_000_000
    sources = [
        value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href", "data")
    ]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "25.0 to 175.0" in page.text and "python train.py --dataset_type custom" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 4 and "epoch 2: validation 2.2" in page.text
    assert "a black horse jumps high" in page.text and "a cat runs" in page.text  # the worst, and what people said
    assert "(picture left out)" in page.text and "Random (--seed 0)" in page.text
    assert "Vocabulary: " in page.text and "horse 1" in page.text
    assert [a["alt"] for tag, a in page.tags if tag == "img"][-1] == "attention_viz_sample_1.png"


def test_vector_pictures_are_shown_or_named(runs):
    (runs / "three" / "attention_viz_sample_1.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (runs / "three" / "attention_viz_sample_2.pdf").write_bytes(b"%PDF")
    (runs / "three" / "attention_viz_sample_1.json").write_text("{}")
    html_report.write_report(runs / "three")
    page = Page((runs / "three" / "report.html").read_text())
    (picture,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert picture["src"].startswith("data:image/svg+xml;base64,") and picture["alt"] == "attention_viz_sample_1.svg"
    assert "Also in the run directory: attention_viz_sample_2.pdf" in page.text


def test_the_gallery_ranks_by_cider(runs, data_dir):
    html_report.write_report(runs / "one", data_dir=data_dir)
    page = Page((runs / "one" / "report.html").read_text())
    shown = [int(n) for n in re.findall(r"p\d\.jpg, CIDEr (\d+)", page.text)]
    cider = sorted(100 * score_images(CAPTIONS, REFERENCES).cider)
    assert shown[0] == round(cider[-1]) and shown[2] == round(cider[0]) and len(shown) == 4


def test_a_report_without_the_data_set_says_so(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    html_report.write_report(runs / "one")
    page = Page((runs / "one" / "report.html").read_text())
    assert "The data set is not at hand" in page.text and not any(tag == "img" for tag, _ in page.tags)
    assert "different captions" in page.text


def test_an_untested_run_has_a_report_that_says_how_to_test(runs):
    html_report.write_report(runs / "three")
    assert "--mode test --model_path" in Page((runs / "three" / "report.html").read_text()).text


def test_nothing_of_a_users_is_taken_for_markup(tmp_path, data_dir):
    bad = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    directory = write_run(
        tmp_path / "<b>run", [bad, *CAPTIONS[1:]], encoder=bad, command=bad, decoder_type="\ud800\x1b[0m"
    )
    row = json.loads((directory / "test_metrics.json").read_text())[0]
    (directory / "test_metrics.json").write_text(json.dumps([row | {"split": bad, "beam_size": bad, "images": bad}]))
    html_report.write_report(directory, data_dir=data_dir)
    text = (directory / "report.html").read_text()
    page = Page(text)
    assert "<script" not in text and "onerror=" not in "".join(str(a) for _, a in page.tags) and bad in page.text
    assert "<b>run" in page.text


@pytest.mark.parametrize("name", ("x" * 300, "a\0b", "../two/test_captions.json", ""))
def test_names_that_no_file_can_have_or_that_lead_elsewhere(runs, name):
    row = json.loads((runs / "one" / "test_metrics.json").read_text())[0] | {"captions_file": name, "scores_file": name}
    (runs / "one" / "test_metrics.json").write_text(json.dumps([row]))
    config = json.loads((runs / "one" / "run_config.json").read_text()) | {"data_dir": name, "feature_cache": name}
    (runs / "one" / "run_config.json").write_text(json.dumps(config))
    html_report.write_report(runs / "one")
    run = run_reports.read_run(runs / "one")
    other = run_reports.read_run(runs / "two")
    assert "No intervals" in run_reports.compare(run, other) or name.startswith("..")


def test_pictures_are_left_out_before_the_file_grows_too_large(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(html_report, "MAX_PICTURES", 150_000)
    pictures = html_report.Pictures()
    found = [pictures.uri(tmp_path / "a.png", 300) for _ in range(5)]
    assert found[0] is not None and found[-1] is None and sum(len(uri) for uri in found if uri) < 150_000 * 1.4


@pytest.mark.parametrize("values", ([1.0], [0.0, 0.0], [1e-9, 1e9], [float("nan"), 2.0], [-5.0, 1e308]))
@pytest.mark.parametrize("logarithmic", (False, True))
def test_charts_take_any_numbers(values, logarithmic):
    drawn = html_report.chart("t", "epoch", list(range(len(values))), {"a": values}, 0, logarithmic)
    assert "<circle" in drawn and "nan" not in drawn and "inf" not in drawn


@pytest.mark.parametrize("name", ("run_config", "loss_curve", "metrics_history", "test_metrics", "test_captions"))
@pytest.mark.parametrize(
    "content", ("{", "[]", "{}", "[[]]", '[{"epoch": [], "split": {}}]', '{"epochs": [1e999]}', "3")
)
def test_files_of_another_form_are_refused_or_read(runs, data_dir, name, content):
    (runs / "one" / f"{name}.json").write_text(content)
    try:
        html_report.write_report(runs / "one", data_dir=data_dir)
        run = run_reports.read_run(runs / "one")
        run_reports.runs_table([run], runs)
        run_reports.compare(run, run)
    except UserError as error:
        assert str(error).count("\n") == 0
