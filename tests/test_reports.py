"""report.html, on run directories that are written by hand."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_files import CAPTIONS, HUGE, REFERENCES, Page, command, write_data, write_run, write_runs

from captioning import comparison, reports
from captioning.runs import read_run
from experiment_utils import write_summary
from metrics_utils import score_images


@pytest.fixture
def runs(tmp_path) -> Path:
    return write_runs(tmp_path)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("reports"))


@pytest.fixture
def charts() -> None:
    """For tests of the charts, which take most of a report's time."""


@pytest.fixture(autouse=True)
def no_charts(request, monkeypatch) -> None:
    if "charts" not in request.fixturenames:
        monkeypatch.setattr(reports, "chart", lambda *_: "")


def page_of(run: Path, **options) -> Page:
    """The report of a run, written anew."""
    return Page(reports.write_report(run, **options).read_text())


def test_the_report_holds_everything_and_refers_to_nothing(runs, data_dir, charts, capsys):
    run = runs / "one"
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
    assert "Training time 1 h 30 min" in page.text and "abacus, " in page.text and "CPU cores" in page.text
    assert "a black horse jumps high" in page.text and "a cat runs" in page.text  # the worst, and what people said
    assert "(picture left out)" in page.text and "Random (--seed 0)" in page.text
    assert "Vocabulary: 12 words" in page.text
    assert [a["alt"] for tag, a in page.tags if tag == "img"][-1] == "attention_viz_sample_1.png"


def test_the_headline_is_the_latest_test_and_columns_name_their_tests(runs):
    path = runs / "one" / "test_metrics.json"
    (beam,) = json.loads(path.read_text())
    greedy = beam | {"beam_size": 1, "views": "mirror", "cider": 0.5, "epoch": 2, "checkpoint": "model_epoch_2.pt"}
    consensus = beam | {"consensus": "regression", "split": "val+test", "cider": 1.234, "person_cider": 2.345}
    consensus |= {"consensus_weight": 0.25}
    path.write_text(json.dumps([greedy, beam, consensus]))
    page = page_of(runs / "one")
    head = page.text.partition("beam 3, consensus, val+test, 6 images")[0]
    assert "CIDEr 123.4 95 %: 25.0 to 175.0 a person: 234.5" in head and "ROUGE-L" in head
    assert "greedy test, 6 images views mirror model_epoch_2.pt, epoch 2" in page.text
    assert "a person val+test, 6 images" in page.text and "greedy validation, epoch 2" in page.text
    assert "weight 0.25 the weight was chosen on validation images" in page.text
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert links == [f"#{name}" for name in sections] and {"scores", "training", "parameters"} <= set(sections)


def test_charts_follow_the_colour_scheme_and_share_no_id(runs, charts):
    reports.write_report(runs / "one")
    text = (runs / "one" / "report.html").read_text()
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and sum(tag == "svg" for tag, _ in page.tags) == 4  # three by epoch, and lengths
    charts = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert all("var(--c1)" in chart and "var(--soft)" in chart and "<text" in chart for chart in charts)
    assert not any(re.search(r"#[0-9a-f]{6}\b|<style", chart) for chart in charts)
    assert text.count("</style>") == 1 and "1.5" in page.text  # the figures are there as a table too


def test_attention_is_drawn_anew_for_any_screen(runs, data_dir):
    run, words = runs / "one", ["<b>", "dog"]
    Image.new("RGB", (1800, 900), "white").save(run / "attention_viz_sample_1.png")
    Image.new("RGB", (1800, 900), "white").save(run / "advanced_attention_viz_sample_1.png")
    maps = np.zeros((2, 7, 7))
    maps[:, 3, 3] = 1
    numbers = {"image": "p0.jpg", "words": words, "grid": 7, "maps": maps.tolist()}
    path = run / "attention_viz_sample_1.json"
    for changes, drawn in (({}, True), ({"image": "p4.jpg"}, False)):  # p4.jpg is broken
        path.write_text(json.dumps(numbers | changes))
        page = page_of(run, data_dir=data_dir)
        assert ("<b> 0.0 bits" in page.text) == drawn and ("dog 0.0 bits" in page.text) == drawn
        assert ("attention_viz_sample_1.png" in [a.get("alt") for _, a in page.tags]) == (not drawn)
    assert "Also in the run directory: advanced_attention_viz_sample_1.png" in page.text
    data = reports.load_data(read_run(run), data_dir)
    foreign = [{"image": "../one/x.jpg"}, {"image": []}, {"maps": [[[10**400]]] * 2}, {"words": [1, {}]}, {"maps": []}]
    for content in (*(numbers | changes for changes in foreign), [], {}):
        path.write_text(json.dumps(content))
        assert reports.word_maps(path, data, reports.Pictures()) is None


def test_the_glow_is_where_the_weight_is():
    weights = np.zeros(49)
    weights[8] = 1  # the second cell of the second row
    pixels = np.asarray(Image.open(io.BytesIO(reports.glow(weights))), dtype=int)
    assert pixels.shape == (28, 28, 4) and tuple(pixels[6, 6, :3]) > (200, 100, 0) and not pixels[20, 20, :3].any()


def test_vector_pictures_are_shown_or_named(runs):
    (runs / "three" / "attention_viz_sample_1.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (runs / "three" / "attention_viz_sample_2.pdf").write_bytes(b"%PDF")
    (runs / "three" / "attention_viz_sample_1.json").write_text("{}")
    page = page_of(runs / "three")
    (picture,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert picture["src"].startswith("data:image/svg+xml;base64,") and picture["alt"] == "attention_viz_sample_1.svg"
    assert "Also in the run directory: attention_viz_sample_2.pdf" in page.text


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
    assert "41.7 % of the captions' content words are unsupported" in text
    assert "colours 50.0 of 4 a person: 0.0 40.0 of 5 a person: 0.0" in text
    assert "actions 100.0 of 2" in text and "sit 100.0 of 1 50.0 of 2" in text  # "sat" for "sits"
    assert "Said where no reference has it dog 2 of 4 , red 2 of 3 Not said" in text
    assert "Not said where half of the references have it cat 2 of 2 ," in text
    assert "Never said, though in the references of so many images cat 2 ," in text
    assert "The captions said most often a red dog 3 of 6" in text
    assert "No reference has: red, dog Closest training caption, ROUGE-L 57: a red cat sits (p3.jpg)" in page.text


def test_of_a_run_without_references_the_data_set_has_them_or_it_says_what_is_missing(runs, data_dir):
    path = runs / "one" / "test_references.json"
    path.unlink()
    text = page_of(runs / "one", data_dir=data_dir).text
    assert "content words are unsupported" in text and "Damaged" not in text
    assert "The closest training captions are not known" in text and "Closest training caption," not in text
    text = page_of(runs / "one", data_dir=data_dir / "gone").text
    assert "The captions of people for these images are not known, which a test stores: python" in text
    assert "Every caption is said of one image only" in text
    for content in ("{", "[]", '{"annotations": [{"image_id": [], "caption": "a"}]}'):
        path.write_text(content)
        run = read_run(runs / "one")
        assert reports.known_references(run, None) == {} and "test_references.json" in run.damage[0]
    (runs / "one" / "test_captions.json").unlink()
    text = page_of(runs / "one", data_dir=data_dir).text
    assert "The captions of the latest test are not known, which a test stores: python" in text
    assert "said of one image" not in text and "Damaged: " in text


def test_how_sure_the_captions_are_is_drawn_or_it_says_what_is_missing(runs, charts):
    run, file = runs / "one", runs / "one" / "test_scores.json"
    assert (
        "have none. With 100 validation images --mode tune adds it; then test again." in page_of(run).text
    )  # of an earlier version
    scores = json.loads(file.read_text())
    sure, supported = [0.25, 0.35, 0.35, 0.85, 0.85, 0.95], [0.25, 0.25, 0.75, 0.75, 1.0, 1.0]
    file.write_text(json.dumps(scores | {"confidence": sure, "supported": supported}))
    page = page_of(run)
    assert "expected calibration error is 6.7 points" in page.text  # 0, 0.15 twice, 0.025 twice, 0.05
    labels = [a["aria-label"] or "" for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert any(label.startswith("Supported content words, in % by confidence") for label in labels)
    assert any(label.startswith("Mean CIDEr of the captions kept") for label in labels)
    kept = f"{100 * np.mean(scores['cider'][3:]):.1f}"
    assert f"from 0.8 2 85.0 % 87.5 % 50.0 % {kept}" in page.text
    file.write_text(json.dumps(scores | {"confidence": [2.0] * 6, "supported": supported}))
    assert "Not known: " in page_of(run).text and "confidence: expected numbers from 0 to 1" in page_of(run).text


def test_a_report_without_the_data_set_says_so(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = page_of(runs / "one")
    assert "The data set is not available" in page.text and not any(tag == "img" for tag, _ in page.tags)
    assert "different captions" in page.text and "content words are unsupported" in page.text


def test_without_scores_by_image_captions_are_not_ranked(runs, data_dir):
    (runs / "one" / "test_scores.json").unlink()
    page = page_of(runs / "one", data_dir=data_dir)
    assert "Not ranked, since the CIDEr of each image is missing: " in page.text and "test_scores.json" in page.text
    assert "Random (--seed 0)" in page.text and "Median" not in page.text


def test_an_untested_run_has_a_report_that_says_how_to_test(runs):
    page = page_of(runs / "three")
    assert "--mode test --model_path" in page.text


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
    assert re.search(rf"No intervals of the scores' differences: [^\n]*{re.escape(str(runs / 'one'))}", compared), (
        compared
    )


def test_pictures_are_left_out_before_the_file_grows_too_large(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(reports, "MAX_PICTURES", 150_000)
    pictures = reports.Pictures()
    found = [pictures.uri(tmp_path / "a.png", 300) for _ in range(5)]
    assert found[0] is not None and found[-1] is None and sum(len(uri) for uri in found if uri) < 150_000 * 1.4


@pytest.mark.parametrize("values", ([1.0], [0.0, 0.0], [1e-9, 1e9], [float("nan"), 2.0], [-5.0, 1e308]))
@pytest.mark.parametrize("logarithmic", (False, True))
def test_charts_take_any_numbers(charts, values, logarithmic):
    drawn = reports.chart("t", "epoch", list(range(len(values))), {"a": values}, 0, logarithmic)
    assert "<path" in drawn and not re.search("nan|inf", re.sub(r"<text.*?</text>", "", drawn))


@pytest.mark.parametrize("content", ("{", "[]", "{}", "[[]]", '[{"image_id": "p0.jpg", "caption": 1}]', "3"))
def test_captions_of_another_form_are_named(runs, data_dir, content):
    (runs / "one" / "test_captions.json").write_text(content)
    page = page_of(runs / "one", data_dir=data_dir)
    assert re.search(r"Damaged: .*test_captions\.json", page.text)


def test_the_report_of_a_damaged_run_names_what_is_missing(runs, data_dir):
    for name in ("run_config", "loss_curve", "metrics_history", "test_metrics", "ensemble_metrics"):
        (runs / "one" / f"{name}.json").write_text(json.dumps([{"epoch": HUGE, "cider": []}]))
    text = page_of(runs / "one", data_dir=data_dir).text
    assert text.count("Damaged: ") == 2 + 3 * 2 and "Not tested yet" not in text
