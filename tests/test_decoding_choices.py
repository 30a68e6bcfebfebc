"""What is chosen after training: beam and length penalty, several checkpoints, anybody's captions."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_main import newest, run

import experiment_utils
import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.checkpoints import load_checkpoint
from captioning.images import VIEWS, load_pixels
from captioning.io import UserError
from captioning.modes.test import save_test
from captioning.scores import ImageScores


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of each decoder on the same twenty pictures, attention with two views of them."""
    from conftest import draw_tiny

    here = tmp_path_factory.mktemp("choices")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        tiny = draw_tiny(here / "tiny")
        assert run(tiny, "--decoder", "lstm") == 0
        lstm = newest().resolve()
        assert run(tiny, "--decoder", "attention", "--views", "mirror") == 0
        yield here, tiny, lstm, newest().resolve()


@pytest.fixture(autouse=True)
def in_its_directory(trained, monkeypatch):
    monkeypatch.chdir(trained[0])


def rows(directory: Path) -> list[dict]:
    return json.loads((directory / "test_metrics.json").read_text())


def test_what_tune_finds_is_kept_and_used(trained, capsys):
    _, _, _, attention = trained
    before = load_checkpoint(attention / "best.pt")
    assert trainer.main(["--mode", "tune", "--model_path", str(attention)]) == 0
    found = load_checkpoint(attention / "best.pt")["decoding"]
    assert f"--beam_size {found['beam_size']}" in capsys.readouterr().out and found["images"] == 2
    after = load_checkpoint(attention / "best.pt")
    assert all((before["decoder"][name] == after["decoder"][name]).all() for name in before["decoder"])
    assert load_checkpoint(attention / "last.pt")["decoding"] is None  # best.pt alone was written
    assert trainer.main(["--mode", "test", "--model_path", str(attention)]) == 0
    assert rows(attention)[-1]["beam_size"] == found["beam_size"]
    assert trainer.main(["--mode", "test", "--model_path", str(attention), "--beam_size", "4"]) == 0
    assert rows(attention)[-1]["beam_size"] == 4


def test_an_ensemble_of_both_decoders_is_scored_in_the_first_ones_directory(trained, capsys):
    _, _, lstm, attention = trained
    assert trainer.main(["--mode", "test", "--model_path", str(attention), str(lstm)]) == 0
    row = rows(attention)[-1]
    assert row["checkpoint"].startswith("best.pt + ") and row["views"] == "mirror"
    scores = json.loads((attention / row["scores_file"]).read_text())
    captions = json.loads((attention / row["captions_file"]).read_text())
    assert [entry["image_id"] for entry in captions] == scores["image_id"]
    assert np.mean(scores["cider"]) == pytest.approx(row["cider"])
    low, high = row["cider_interval"]
    assert low <= row["cider"] <= high


@pytest.mark.parametrize("evidence", ["beam", "regression"])
def test_consensus_is_a_third_way_beside_greedy_and_beam(trained, capsys, monkeypatch, evidence):
    _, _, lstm, attention = trained
    monkeypatch.setattr("captioning.evaluation.has_java", lambda: False)  # METEOR's seconds are spent elsewhere
    for run_directory in (lstm, attention):
        flags = ["--mode", "test", "--model_path", str(run_directory), "--consensus", evidence]
        assert trainer.main(flags) == 0
        printed = capsys.readouterr().out
        greedy, beam, chosen = rows(run_directory)[-3:]
        assert [row["beam_size"] for row in (greedy, beam, chosen)] == [1, 20, 20]
        assert [row["consensus"] for row in (greedy, beam, chosen)] == [None, None, evidence]
        assert ("by CIDEr on 2 validation images" in printed) == (evidence == "regression")
        assert "consensus" in printed and f"{100 * chosen['cider']:.2f}" in printed
        assert trainer.main(flags) == 0  # the same again: nothing is drawn at random, and no row is added
        assert rows(run_directory)[-1] == chosen and rows(run_directory).count(chosen) == 1
    capsys.readouterr()
    assert experiment_utils.main(["diff", str(lstm), str(lstm)]) == 0
    printed = capsys.readouterr().out
    assert "B beam 20, consensus" in printed and "B - A" in printed and "A beam 20, length penalty" in printed


def test_tests_that_end_at_once_keep_each_others_rows(tmp_path, monkeypatch):
    data = SimpleNamespace(image_id=int)
    scores = ImageScores(*[np.zeros((2, 4))] * len(ImageScores._fields))

    def slow(path: Path) -> list[dict]:
        found = json.loads(path.read_text())
        time.sleep(0.05)  # long enough for another to have read the same
        return found

    def save(number: int) -> str:
        header, captions = {"beam_size": number}, [f"caption {number}", "another"]
        return save_test(tmp_path, header, data, np.arange(2), captions, {"cider": number}, scores)

    monkeypatch.setattr("captioning.evaluation.read_json", slow)
    with ThreadPoolExecutor(6) as pool:
        files = list(pool.map(save, range(6)))
    assert sorted(row["beam_size"] for row in rows(tmp_path)) == list(range(6))
    for row in rows(tmp_path):
        assert row["captions_file"] == files[row["beam_size"]]
        captions = json.loads((tmp_path / row["captions_file"]).read_text())
        assert captions[0] == {"image_id": 0, "caption": f"caption {row['beam_size']}"}


def test_a_test_that_could_not_write_says_so_before_it_decodes(trained, capsys, monkeypatch):
    def refused(path: Path, purpose: str) -> Path:
        raise UserError(f"cannot write into {path} ({purpose})")

    monkeypatch.setattr(trainer, "make_directory", refused)
    monkeypatch.setattr(trainer, "ways_to_decode", None)
    assert trainer.main(["--mode", "test", "--model_path", str(trained[2])]) == 2
    assert "cannot write into" in capsys.readouterr().err


def test_weights_are_refused_where_the_checkpoints_encoder_brings_its_own(trained, capsys):
    _, _, lstm, _ = trained
    assert trainer.main(["--mode", "test", "--model_path", str(lstm), "--resnet_weights", "x.pth"]) == 2
    assert "whose encoder is efficientnet_lite0" in capsys.readouterr().err


def test_members_of_other_data_are_refused(trained, capsys):
    _, tiny, _, attention = trained
    assert run(tiny, "--decoder", "lstm", "--freq_threshold", "9", "--model_save_dir", "others") == 0
    (other,) = Path("others").rglob("best.pt")
    assert trainer.main(["--mode", "test", "--model_path", str(attention), str(other)]) == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_anybodys_captions_get_the_scores_that_ours_get(trained, capsys):
    _, tiny, lstm, _ = trained
    assert trainer.main(["--mode", "test", "--model_path", str(lstm), "--beam_size", "1"]) == 0
    capsys.readouterr()
    where = ["--mode", "test", "--dataset_type", "custom", "--data_dir", str(tiny), "--predictions"]
    row = rows(lstm)[-1]
    assert trainer.main([*where, str(lstm / row["captions_file"])]) == 0
    assert f"{100 * row['rouge_l']:.2f}" in capsys.readouterr().out
    entries = json.loads((lstm / row["captions_file"]).read_text())
    Path("theirs.csv").write_text("image,caption\n" + "".join(f"{e['image_id']},A Red Picture.\n" for e in entries))
    assert trainer.main([*where, "theirs.csv"]) == 0
    assert "distinct words" in capsys.readouterr().out
    for content, message in (
        ("{}", "no list of captions"),
        ('[{"image_id": null, "caption": "a"}]', "entry 1"),
        (json.dumps(entries[:1]), "has no caption for 1 of the 2 images"),
        (json.dumps(entries + entries[:1]), "has two captions"),
    ):
        Path("wrong.json").write_text(content)
        assert trainer.main([*where, "wrong.json"]) == 2
        assert message in capsys.readouterr().err


def test_the_official_coco_scorer_reads_what_a_test_writes(trained):
    from pycocotools.coco import COCO

    _, _, lstm, _ = trained
    assert trainer.main(["--mode", "test", "--model_path", str(lstm)]) == 0
    known = COCO(str(lstm / "test_references.json"))
    found = known.loadRes(str(lstm / rows(lstm)[-1]["captions_file"]))
    assert found.getImgIds() == known.getImgIds() and len(known.anns) == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--epochs", "0"], "leaves nothing to do"),
        (["--scst_samples", "3"], "no effect without --scst_epochs"),
        (["--scst_epochs", "1", "--early_stopping", "2"], "no effect with --scst_epochs"),
        (["--predictions", "x.json"], "no effect with --mode train, only with test"),
        (["--mode", "tune"], "needs --model_path"),
        (["--consensus", "beam"], "no effect with --mode train, only with test"),
        (["--mode", "test", "--model_path", "a.pt", "--consensus", "beam", "--beam_size", "1"], "above 1"),
        (["--mode", "test", "--predictions", "a.csv", "--consensus", "beam"], "captions already"),
        (["--model_path", "a.pt", "b.pt"], "takes one --model_path"),
    ],
)
def test_flags_without_effect_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        trainer.main(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_views_show_the_parts_that_their_names_say(tmp_path):
    from PIL import Image

    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:50, :100, 0] = 255  # red in the top left quarter alone
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    whole = load_pixels(tmp_path / "corner.png", 64)
    assert (load_pixels(tmp_path / "corner.png", 64, "mirror") == whole[:, ::-1]).all()
    red = {name: (load_pixels(tmp_path / "corner.png", 64, name)[..., 0] > 127).mean() for name in VIEWS}
    part = 0.5 / 0.85  # of a side that red takes in the crops that keep its corner
    assert red["whole"] == red["mirror"] == pytest.approx(1 / 4, abs=0.01)
    assert red["top_left_mirror"] == pytest.approx(part**2, abs=0.03)
    assert red["bottom_right"] == pytest.approx((0.35 / 0.85) ** 2, abs=0.03)
    assert red["top_right"] == red["bottom_left_mirror"] == pytest.approx(part * 0.35 / 0.85, abs=0.03)
    mirrored = load_pixels(tmp_path / "corner.png", 64, "top_left_mirror")[..., 0]
    assert mirrored[5, 60] > 200 and mirrored[5, 5] < 50
