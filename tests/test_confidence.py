"""How sure a caption is: calibration, and one figure in test, caption, export and Python."""

import csv
import io
import json
import shutil
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
from run_files import skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.captioner import Captioner
from captioning.decoding import confidence
from captioning.decoding.confidence import (
    calibrate,
    calibration_error,
    confidence_of,
    confidence_text,
    is_calibration,
    reliability,
    score_of,
    supported_shares,
    table_of,
)
from captioning.runs.checkpoints import load_checkpoint, save_checkpoint
from captioning.training import calibrate as validation

SOUND = {"scores": [-2.0, -1.0], "shares": [0.25, 0.75], "images": 100}


def test_the_share_that_is_supported():
    captions = ["a dog runs", "a dog sits on grass", "it is", ""]
    references = [["the dog runs", "it runs"], ["a cat sits"], ["it is"], ["a dog"]]
    assert supported_shares(captions, references).tolist() == [1.0, 1 / 3, 0.0, 0.0]  # two say nothing


def test_adjacent_violators_are_pooled(monkeypatch):
    monkeypatch.setattr(confidence, "GROUP", 1)
    scores = np.array([-1.0, -6.0, -3.0, -4.0, -5.0, -2.0])
    shares = np.array([0.75, 0.0, 0.25, 0.25, 0.5, 0.875])  # by score: 0, 0.5, 0.25, 0.25, 0.875, 0.75
    found = calibrate(scores, shares)
    assert found == {"scores": [-6.0, -4.0, -1.5], "shares": [0.0, 0.333333, 0.8125], "images": 6}
    assert is_calibration({"beam": found}) and is_calibration(json.loads(json.dumps({"consensus": found})))
    assert not is_calibration({}) and not is_calibration({"beam": found, "greedy": found})
    assert (
        table_of({"beam": found}, False) is found and table_of({"beam": found}, True) is table_of(None, False) is None
    )
    monkeypatch.setattr(confidence, "LENGTH_EXPONENT", 1.0)  # the score is the mean log-probability
    expected = {-9.0: 0.0, -6.0: 0.0, -5.0: 0.333333 / 2, -4.0: 0.333333, -1.5: 0.8125, 0.0: 0.8125}
    for score, share in expected.items():
        assert confidence_of(found, [score - 1, score + 1]) == pytest.approx(share)
    assert confidence_of(None, [-1.0]) is None


def test_the_lowest_pool_has_captions_of_which_nothing_is_right():
    found = calibrate(np.linspace(-3, -1, 40), np.linspace(0.3, 0.8, 40))
    assert found["scores"][0] == pytest.approx(-3 - np.linspace(-3, -1, 40).std(), abs=1e-6) and found["shares"][0] == 0
    assert is_calibration({"beam": found}) and found["shares"][1] > 0.3
    assert confidence_text(None, None) == "" and confidence_text(0.62, None) == "0.62"
    assert [confidence_text(sure, SOUND) for sure in (0.25, 0.251, 0.7)] == ["under 0.3", "0.25", "0.70"]
    assert confidence_text(0.0, found) == "0.00"


def test_longer_captions_may_be_less_probable():
    assert score_of([-1.0] * 4) == pytest.approx(-(4**0.3))


def test_what_is_learned_comes_true_on_other_images():
    rng = np.random.default_rng(0)
    scores = rng.normal(-2, 0.5, 2000)
    supported = rng.binomial(5, 1 / (1 + np.exp(-3 * (scores + 2)))) / 5
    found = calibrate(scores[:1000], supported[:1000])
    sure = np.interp(scores[1000:], found["scores"], found["shares"])
    bins = reliability(sure, supported[1000:])
    assert len(bins) == 10 and sum(each.captions for each in bins) == 1000
    assert calibration_error(bins) < 0.03 < calibration_error(reliability(sure**2, supported[1000:]))


def test_bins_and_their_error():
    sure, right = np.array([0.05, 0.95, 1.0, 0.9]), np.array([0.25, 1.0, 0.5, 0.75])
    low, high = reliability(sure, right)
    assert low == (0.0, 1, 0.05, 0.25) and high == pytest.approx((0.9, 3, 0.95, 0.75))
    assert calibration_error([low, high]) == pytest.approx(0.2)


def test_a_damaged_calibration_is_none():
    assert is_calibration({"beam": SOUND, "consensus": SOUND})
    for damage in (
        {"scores": [-1.0, -2.0]}, {"shares": [0.75, 0.25]}, {"shares": [0.25, 1.5]}, {"shares": [float("nan"), 0.5]},
        {"scores": [-2.0]}, {"scores": [], "shares": []}, {"scores": ["-2", "-1"]}, {"images": 0}, {"images": 1},
        {"images": None}, {"scores": [-float("inf"), 0.0]}, {"scores": (-2.0, -1.0)},
    ):  # fmt: skip
        assert not is_calibration({"beam": SOUND | damage}), damage


@pytest.fixture(scope="module")
def run(tiny_runs, tmp_path_factory) -> Path:
    """A run of an earlier version, to which `--mode tune` has added a calibration, on far too few images."""
    folder = shutil.copytree(tiny_runs["lstm"], tmp_path_factory.mktemp("confidence") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        patch.setattr("captioning.modes.tune.BEAMS", (1,))
        assert load_checkpoint(folder / "best.pt")["confidence"] is None  # two validation images were too few
        patch.setattr(validation, "FEWEST", 2)
        assert trainer.main(["--mode", "tune", "--model_path", str(folder)]) == 0
    assert load_checkpoint(folder / "best.pt")["confidence"]["beam"]["images"] == 2
    checkpoint = load_checkpoint(folder / "best.pt")  # one that tells captions from others
    save_checkpoint(folder / "best.pt", checkpoint | {"confidence": {"beam": SOUND | {"scores": [-9.0, 0.0]}}})
    return folder


def test_test_caption_export_and_python_say_the_same(run, tiny_runs, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    skip_pictures(monkeypatch)
    assert trainer.main(["--mode", "test", "--model_path", str(run), "--beam_size", "3"]) == 0
    assert "Confidence, beam 3: mean " in capsys.readouterr().out
    row = json.loads((run / "test_metrics.json").read_text())[-1]
    scores = json.loads((run / row["scores_file"]).read_text())
    known = dict(zip(scores["image_id"], scores["confidence"], strict=True))
    assert len(set(known.values())) > 1 and len(scores["supported"]) == len(known)
    bins = reliability(np.array(scores["confidence"]), np.array(scores["supported"]))
    assert row["calibration_error"] == pytest.approx(calibration_error(bins))
    assert trainer.main(["--mode", "export", "--model_path", str(run), "--output", "shared"]) == 0
    images = [str(tiny_runs["data"] / "Images" / name) for name in known]
    for model in (run, Path("shared")):
        capsys.readouterr()
        flags = ["--mode", "caption", "--model_path", str(model), "--beam_size", "3", "--images", *images]
        assert trainer.main([*flags, "--json"]) == 0
        printed = [json.loads(line)["confidence"] for line in capsys.readouterr().out.splitlines()]
        assert printed == pytest.approx(list(known.values()), abs=2e-3 if model != run else 1e-4)  # weights of 16 bits
    captioner = Captioner.load(run)
    results = captioner(images, beam_size=3, num_captions=2)
    assert [each.confidence for each in results] == pytest.approx(list(known.values()), abs=1e-4)
    assert all(0.25 < each.alternatives[0].confidence < 0.75 for each in results)
    assert captioner(images[0], top_p=0.9).confidence is None


def test_captions_that_are_not_sure_enough_are_left_out(run, tiny_runs, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    images = [str(tiny_runs["data"] / "Images" / f"p0{n}.jpg") for n in range(2)]
    results = Captioner.load(run)(images)
    least = float(np.median([each.confidence for each in results])) + 1e-9
    sure = {str(each.path): each.text for each in results if each.confidence >= least}
    assert 0 < len(sure) < len(results)
    flags = ["--mode", "caption", "--model_path", str(run), "--images", *images]
    flags += ["--min_confidence", str(least), "--num_captions", "2"]
    count = f"Without a caption: {len(results) - len(sure)} of {len(results)} images"

    assert trainer.main(flags) == 0
    captured = capsys.readouterr()
    lines = [line.split("\t") for line in captured.out.splitlines()]
    assert count in captured.err and len(lines) == len(results) + len(sure)
    first = dict(map(itemgetter(0, 2), reversed(lines)))
    assert first == {str(each.path): f"{each.confidence:.2f}" for each in results}
    assert {path for path, text, _ in lines if not text} == {str(each.path) for each in results} - sure.keys()

    assert trainer.main([*flags, "--json"]) == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {entry["path"]: entry["caption"] for entry in entries if entry["caption"] is not None} == sure
    withheld = [entry for entry in entries if entry["caption"] is None]
    assert all(entry.keys() == {"path", "caption", "log_probability", "confidence"} for entry in withheld)
    assert all(entry["confidence"] < least for entry in withheld)

    assert trainer.main([*flags, "--output", "out.csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    assert [(row["caption"] != "", row["rank"]) for row in rows] == [
        pair for each in results for pair in ([(True, "1"), (True, "2")] if str(each.path) in sure else [(False, "1")])
    ]
    assert all(0.25 <= float(row["confidence"]) <= 0.75 for row in rows)


def test_a_model_without_calibration(run, tiny_runs, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    image = str(tiny_runs["data"] / "Images" / "p01.jpg")
    flags = ["--mode", "caption", "--model_path", str(tiny_runs["lstm"]), "--images", image]
    assert trainer.main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confidence"] is None
    assert trainer.main([*flags, "--min_confidence", "0.5"]) == 2
    error = capsys.readouterr().err
    assert f"--mode tune --model_path {tiny_runs['lstm']}" in error and len(error.splitlines()) <= 2
