"""report.html, on run directories that are written by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_files import CAPTIONS, HUGE, REFERENCES, Page, add_ensemble, command, write_data, write_run, write_runs

from captioning.runs import plots
from captioning.runs import report as reports
from captioning.runs import table as comparison
from captioning.runs.directories import read_run
from experiment_utils import write_summary
from metrics_utils import score_images


@pytest.fixture
def runs(tmp_path) -> Path:
    return write_runs(tmp_path)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("reports"))


def page_of(run: Path, **options) -> Page:
    """The report of a run, written anew."""
    return Page(reports.write_report(run, **options).read_text())


def test_the_report_holds_everything_and_refers_to_nothing(runs, data_dir, capsys):
    run = runs / "one"
    curve, history = (json.loads((run / f"{name}.json").read_text()) for name in ("loss_curve", "metrics_history"))
    plots.draw_curves(run, curve, history, 2)
    (run / "attention_viz_sample_2.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (run / "attention_viz_sample_3.pdf").write_bytes(b"%PDF")
    (run / "advanced_attention_viz_sample_1.png").write_bytes(b"")
    Image.new("RGB", (1800, 900), "teal").save(run / "attention_viz_sample_1.png")
    flags = json.loads((run / "run_config.json").read_text())
    sizes = ("epochs", "batch_size", "embed_size", "hidden_size", "num_layers", "attention_dim", "drop_prob")
    flags |= {"decoder": "lstm", "save_attention_viz": False} | dict.fromkeys(sizes, 1)
    write_summary(run, flags, "python x", {"Minutes": "90.4", "Device": "abacus", "Vocabulary": 12})
    assert command("report", run, "--data_dir", data_dir) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    text = (run / "report.html").read_text()
    page = Page(text)
    assert len(text) < 5_000_000
    pairs = [pair for _, attributes in page.tags for pair in attributes.items()]
    sources = [value for key, value in pairs if key.endswith(("src", "href", "data"))]
    targets = {value for key, value in pairs if key == "id"}
    assert all(source.startswith("data:image/") or source[1:] in targets for source in sources)
    assert any(source.startswith("data:image/jpeg") for source in sources)
    assert not re.search(r"https?://|@import|url\((?!#)|<script", text)
    assert "25.0 to 175.0" in page.text and "python train.py --dataset_type custom" in page.text
    assert "Minutes 90.4 Device abacus" in page.text and "CPU cores" in page.text
    assert "a black horse jumps high" in page.text and "a cat runs" in page.text  # the worst, and what people said
    assert "(picture left out)" in page.text and "Random (--seed 0)" in page.text
    assert "Vocabulary 12" in page.text and "learning_rate cider 1 3 3.1 0.001 0.1" in page.text
    pictures = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert pictures[:3] == ["training_losses.png", "learning_rate.png", "validation_scores.png"]
    assert pictures[-2:] == ["attention_viz_sample_1.png", "attention_viz_sample_2.svg"]
    assert "attention_viz_sample_3.pdf, advanced_attention_viz_sample_1.png" in page.text  # are named


def test_the_headline_is_the_latest_test_and_columns_name_their_tests(runs):
    path = runs / "one" / "test_metrics.json"
    (beam,) = json.loads(path.read_text())
    greedy = beam | {"beam_size": 1, "views": "mirror", "cider": 0.5, "epoch": 2, "checkpoint": "model_epoch_2.pt"}
    consensus = beam | {"consensus": "regression", "split": "val+test", "cider": 1.234, "person_cider": 2.345}
    consensus |= {"in_training": 0.125}
    path.write_text(json.dumps([greedy, beam, consensus]))
    page = page_of(runs / "one")
    head = page.text.partition("beam 3, consensus, val+test, 6 images")[0]
    assert "CIDEr 123.4 95 %: 25.0 to 175.0 a person: 234.5" in head and "ROUGE-L" in head
    assert "greedy test, 6 images views mirror model_epoch_2.pt, epoch 2" in page.text
    assert "a person val+test, 6 images" in page.text and "greedy validation, epoch 2" in page.text
    assert "consensus val+test, 6 images the weight was chosen on validation images" in page.text
    assert "% of captions in training - - 12.5 - -" in page.text
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert links == [f"#{name}" for name in sections] and {"scores", "training", "parameters"} <= set(sections)


def test_an_ensembles_scores_are_apart(runs):
    add_ensemble(runs / "one", 99.0)
    text = page_of(runs / "one").text
    section = text.partition("These scores are of several models together")[2]
    assert "2 models best.pt models/<b>two</b>/best.pt" in section and "9900.0" in section
    assert "9900.0" not in text.partition("Ensembles")[0]


def test_the_gallery_ranks_by_cider(runs, data_dir):
    page = page_of(runs / "one", data_dir=data_dir)
    shown = [int(n) for n in re.findall(r"p\d\.jpg, CIDEr (\d+)", page.text)]
    cider = sorted(100 * score_images(CAPTIONS, REFERENCES).cider)
    assert shown[0] == round(cider[-1]) and shown[2] == round(cider[0]) and len(shown) == 4


def test_what_goes_wrong_is_shown_with_its_words_and_a_persons(runs, data_dir):
    run = write_run(
        runs / "wrong", ["a red dog", "a red dog", "a blue bird", "a dog sat", "a red dog", "one bird flies"]
    )
    (run / "split.json").write_text(json.dumps({"train": ["p3.jpg", "p5.jpg", "gone.jpg", 7]}))
    page = page_of(run, data_dir=data_dir)
    text = page.text.rpartition("What it gets wrong")[2]
    assert (
        "41.7 % of the captions' content words are unsupported" in text and "Of a person's words it is 31.2 %" in text
    )
    assert "Said where no reference has it dog 2 of 4 , red 2 of 3 , sat 1 of 1 Not said" in text
    assert "Not said where half of the references have it cat 2 of 2 ," in text
    assert "The captions said most often a red dog 3 of 6" in text
    assert "No reference has: red, dog Closest training caption, ROUGE-L 57: a red cat sits (p3.jpg)" in page.text
    (run / "split.json").unlink()
    assert "Closest training caption" not in page_of(run, data_dir=data_dir).text


def test_captions_and_references_that_are_missing_or_damaged_are_named(runs, data_dir):
    run = runs / "one"
    (run / "test_references.json").unlink()
    text = page_of(run, data_dir=data_dir).text
    assert "The captions of people for these images are not known, which a test stores: python" in text
    assert "Every caption is said of one image only" in text and "Damaged" not in text
    for name in ("test_references.json", "test_captions.json"):
        for content in ("{", "[]", "{}", "[[]]", '{"annotations": [{"image_id": 1, "caption": 1}]}', "3"):
            (run / name).write_text(content)
            assert re.search(rf"Damaged: [^ ]*{name}|Damaged: cannot read [^ ]*{name}", page_of(run).text), content
    (run / "test_captions.json").unlink()
    text = page_of(run, data_dir=data_dir).text
    assert "The captions of the latest test are not known, which a test stores: python" in text
    assert "said of one image" not in text


def test_how_sure_the_captions_are_is_shown_or_it_says_what_is_missing(runs):
    run, file = runs / "one", runs / "one" / "test_scores.json"
    assert "have none. With 100 validation images --mode tune adds it; then test again." in page_of(run).text
    scores = json.loads(file.read_text())
    sure, supported = [0.25, 0.35, 0.35, 0.85, 0.85, 0.95], [0.25, 0.25, 0.75, 0.75, 1.0, 1.0]
    file.write_text(json.dumps(scores | {"confidence": sure, "supported": supported}))
    text = page_of(run).text
    assert "expected calibration error is 6.7 points" in text  # 0, 0.15 twice, 0.025 twice, 0.05
    assert f"from 0.8 2 85.0 % 87.5 % 50.0 % {100 * np.mean(scores['cider'][3:]):.1f}" in text
    file.write_text(json.dumps(scores | {"confidence": ["x"] * 6}))
    assert "Not known: " in page_of(run).text


def test_a_report_without_the_data_set_says_so(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = page_of(runs / "one")
    assert "The data set is not available" in page.text and not any(tag == "img" for tag, _ in page.tags)
    assert "content words are unsupported" in page.text


def test_without_scores_by_image_captions_are_not_ranked(runs, data_dir):
    (runs / "one" / "test_scores.json").unlink()
    text = page_of(runs / "one", data_dir=data_dir).text
    assert re.search(r"Not ranked: \S+test_scores\.json is not there: python", text) and "Median" not in text


def test_nothing_of_a_users_is_taken_for_markup(tmp_path, data_dir):
    bad = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    flags = {"encoder": bad, "command": bad, "decoder_type": "\ud800\x1b[0m"}
    directory = write_run(tmp_path / "<b>run", [bad, *CAPTIONS[1:]], **flags)
    row = json.loads((directory / "test_metrics.json").read_text())[0]
    (directory / "test_metrics.json").write_text(json.dumps([row | {"split": bad, "beam_size": bad, "images": bad}]))
    reports.write_report(directory, data_dir=data_dir)
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
    reports.write_report(runs / "one")
    compared = comparison.compare([read_run(runs / "one")], [read_run(runs / "two")])
    assert f"No intervals of the scores' differences: {runs / 'one'}" in compared


def test_the_report_of_a_damaged_run_names_what_is_missing(runs, data_dir):
    for name in ("run_config", "loss_curve", "metrics_history", "test_metrics", "ensemble_metrics"):
        (runs / "one" / f"{name}.json").write_text(json.dumps([{"epoch": HUGE, "cider": []}]))
    text = page_of(runs / "one", data_dir=data_dir).text
    assert text.count("Damaged: ") == 5 and "Not tested yet: python" in text
