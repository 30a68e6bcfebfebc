"""What is chosen after training: beam and length penalty, several checkpoints, anybody's captions."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_tiny
from PIL import Image
from run_files import skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.data.dataset import load_caption_set
from captioning.data.images import VIEWS, load_views
from captioning.modes.test import Result, save_result, training_captions
from captioning.runs.checkpoints import load_checkpoint, save_checkpoint
from captioning.runs.directories import TEST_KEYS, read_run, read_scores
from captioning.scoring.scores import ImageScores


@pytest.fixture(scope="module")
def trained(tiny_runs, tmp_path_factory):
    """Copies of a run of each decoder on the same twenty pictures, the `lstm` one with two views of them."""
    here = tmp_path_factory.mktemp("choices")
    copies = [shutil.copytree(tiny_runs[decoder], here / decoder / "run") for decoder in ("lstm", "attention")]
    return here, tiny_runs["data"], *copies


@pytest.fixture(autouse=True)
def in_its_directory(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    skip_pictures(monkeypatch)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.json")}


def rows(directory: Path) -> list[dict]:
    return json.loads((directory / "test_metrics.json").read_text())


def score(*flags: str, model: list) -> int:
    return trainer.main(["--mode", "test", "--model_path", *map(str, model), *flags])


def test_what_tune_finds_is_kept_and_used(trained, capsys):
    _, _, _, attention = trained
    before = load_checkpoint(attention / "best.pt")
    assert trainer.main(["--mode", "tune", "--model_path", str(attention)]) == 0
    found = load_checkpoint(attention / "best.pt")["decoding"]
    assert f"--beam_size {found['beam_size']}" in capsys.readouterr().out and found["images"] == 2
    after = load_checkpoint(attention / "best.pt")
    assert all((before["decoder"][name] == after["decoder"][name]).all() for name in before["decoder"])
    assert torch.load(attention / "last.pt", weights_only=True)["decoding"] is None  # best.pt alone was written
    assert score(model=[attention]) == 0
    assert rows(attention)[-1]["beam_size"] == found["beam_size"]
    assert trainer.main(["--resume", str(attention)]) == 0
    assert load_checkpoint(attention / "best.pt")["decoding"] == found, "a finished run that is resumed keeps it"


def test_scores_by_image_are_in_files_that_say_what_they_are(trained):
    """The official scorer of COCO reads them."""
    from pycocotools.coco import COCO

    _, _, lstm, _ = trained
    for split, prefix in (("test", "test"), ("val+test", "val_test")):
        assert score("--split", split, "--beam_size", "2", model=[lstm]) == 0
        for row, way in zip(rows(lstm)[-2:], ("greedy", "beam2"), strict=True):
            assert row["captions_file"] == f"{prefix}_captions_{way}.json"
            assert row["scores_file"] == f"{prefix}_scores_{way}.json"
            scores = json.loads((lstm / row["scores_file"]).read_text())
            captions = json.loads((lstm / row["captions_file"]).read_text())
            assert [entry["image_id"] for entry in captions] == scores["image_id"]
            assert np.mean(scores["cider"]) == pytest.approx(row["cider"])
            assert 0 <= row["unsupported"] <= 1 and 0 <= row["person_unsupported"] <= 1
            assert len(scores["sentence_bleu4"]) == row["images"] and 0 < max(scores["sentence_bleu4"]) <= 1
            low, high = row["cider_interval"]
            assert low <= row["cider"] <= high
    known = COCO(str(lstm / "val_test_references.json"))
    found = known.loadRes(str(lstm / row["captions_file"]))
    assert found.getImgIds() == known.getImgIds() and len(known.anns) == 8
    assert read_scores(read_run(lstm), row).scores.cider.tolist() == scores["cider"]


def test_another_test_of_the_same_name_overwrites_nothing(trained):
    _, _, lstm, _ = trained
    assert score("--beam_size", "8", "--length_penalty", "0", model=[lstm]) == 0
    (lstm / "test_captions_beam8_2.json").write_text("{")  # damaged
    before = files(lstm)
    assert score("--beam_size", "8", "--length_penalty", "5", model=[lstm]) == 0
    after, (*_, short, _, long) = files(lstm), rows(lstm)
    assert short["captions_file"] == "test_captions_beam8.json"
    assert long["captions_file"] == "test_captions_beam8_3.json" and long["scores_file"] == "test_scores_beam8_2.json"
    assert [row["length_penalty"] for row in (short, long)] == [0, 5]
    ours = [name for name in before if "_captions_" in name or "_scores_" in name]
    assert ours and all(after[name] == before[name] for name in ours)


def test_an_ensemble_has_files_and_names_of_its_own(trained, capsys):
    _, _, lstm, attention = trained
    assert score(model=[lstm]) == 0
    before = files(lstm)
    pictures = (lstm / "sample_captions.png").stat().st_mtime_ns
    assert score(model=[lstm, attention]) == 0
    assert "ensemble_metrics.json, " in capsys.readouterr().out
    after = files(lstm)
    assert {name for name in after if after[name] != before.get(name)} == {
        "ensemble_metrics.json", "ensemble_test_captions_greedy.json", "ensemble_test_scores_greedy.json",
        "ensemble_test_captions_beam3.json", "ensemble_test_scores_beam3.json",
    }  # fmt: skip
    assert (lstm / "sample_captions.png").stat().st_mtime_ns == pictures
    row = json.loads(after["ensemble_metrics.json"])[-1]
    assert row["checkpoint"] == [str(lstm / "best.pt"), str(attention / "best.pt")] and row["views"] == "mirror"
    assert len(row["epoch"]) == 2 and row["captions_file"] == "ensemble_test_captions_beam3.json"
    flags = ["--save_attention_viz", "--attention_viz_samples", "1", "--attention_viz_dpi", "50"]
    assert score(*flags, model=[attention, lstm]) == 0  # whose other member has no use for them
    assert score(*flags, model=[lstm, shutil.copytree(lstm, "lstm2")]) == 2
    assert "--save_attention_viz has no effect with these models, whose decoder is lstm" in capsys.readouterr().err
    another = shutil.copytree(attention, "another")
    assert score(*flags, model=[attention, another]) == 0
    assert (attention / "ensemble_attention" / "attention_viz_sample_1.png").is_file()
    assert not list(attention.glob("attention_viz_sample_*"))


def test_a_test_saves_its_scores_before_java_runs(trained, monkeypatch):
    _, _, lstm, _ = trained

    def interrupted(systems, references):
        raise KeyboardInterrupt

    monkeypatch.setattr("captioning.modes.test.meteor_scores", interrupted)
    assert score("--beam_size", "4", model=[lstm]) == 130
    row = rows(lstm)[-1]
    assert row["beam_size"] == 4 and row["cider"] >= 0 and (lstm / row["captions_file"]).is_file()
    monkeypatch.setattr(
        "captioning.modes.test.meteor_scores", lambda systems, _: [0.125 + n for n, _ in enumerate(systems)]
    )
    assert score("--beam_size", "4", model=[lstm]) == 0
    completed = {key: value for key, value in rows(lstm)[-1].items() if not key.startswith("person_")}
    assert completed == row | {"meteor": 1.125}  # the same row


def test_a_metric_that_fails_is_a_note(trained, capsys):
    _, _, lstm, _ = trained
    assert score("--beam_size", "1", model=[lstm]) == 0
    out = capsys.readouterr().out
    assert "METEOR is left out: it needs Java" in out
    assert "CIDEr" in out and "meteor" not in rows(lstm)[-1]


@pytest.mark.parametrize("content", ["{}", "[3]", "{"])
def test_a_damaged_table_of_tests_is_named_before_anything_is_decoded(
    tiny_runs, tmp_path, capsys, monkeypatch, content
):
    monkeypatch.setattr("captioning.modes.test.ways_to_decode", None)
    shutil.copy(tiny_runs["lstm"] / "best.pt", tmp_path)
    (tmp_path / "test_metrics.json").write_text(content)
    assert score(model=[tmp_path / "best.pt"]) == 2
    assert "test_metrics.json" in capsys.readouterr().err


def test_tests_that_end_at_once_keep_each_others_rows(tmp_path):
    data = SimpleNamespace(image_id=int)
    scores = ImageScores(*[np.zeros((2, 4))] * len(ImageScores._fields))

    def save(number: int) -> str:
        captions = [f"caption {number}", "another"]
        header = dict.fromkeys(TEST_KEYS[:-2]) | {"epoch": 1, "beam_size": number}  # the others are the files
        result = Result("beam 3", header, captions, {"cider": number}, scores)
        save_result(tmp_path / "test_metrics.json", "test", data, np.arange(2), result)
        return result.files["captions_file"]

    with ThreadPoolExecutor(6) as pool:
        files = list(pool.map(save, range(6)))
    assert len(set(files)) == 6 and sorted(row["beam_size"] for row in rows(tmp_path)) == list(range(6))


def test_members_of_other_data_are_refused(trained, capsys):
    _, _, lstm, attention = trained
    other = torch.load(lstm / "best.pt", weights_only=True)
    other["vocabulary"][-1] = "unheard"
    torch.save(other, "other.pt")
    assert score(model=[attention, "other.pt"]) == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_anybodys_captions_get_the_scores_that_ours_get(trained, capsys):
    _, tiny, lstm, _ = trained
    assert score("--beam_size", "1", model=[lstm]) == 0
    capsys.readouterr()
    where = ["--mode", "test", "--dataset_type", "custom", "--data_dir", str(tiny), "--predictions"]
    row = rows(lstm)[-1]
    assert trainer.main([*where, str(lstm / row["captions_file"])]) == 0
    assert f"{100 * row['rouge_l']:.2f}" in capsys.readouterr().out
    entries = json.loads((lstm / row["captions_file"]).read_text())
    Path("captions_of_another_program.csv").write_text(
        "image,caption\n" + "".join(f"{e['image_id']},A Red Picture.\n" for e in entries)
    )
    assert trainer.main([*where, "captions_of_another_program.csv"]) == 0
    printed = capsys.readouterr().out.splitlines()
    (head,) = (line for line in printed if line.endswith("  captions_of_another_program  a person"))
    (words,) = (line for line in printed if "distinct words" in line)
    assert len(words) == head.index("captions_of_another_program") + len("captions_of_another_program")
    for content, message in (
        ("{}", "not a list of captions"),
        ('[{"image_id": null, "caption": "a"}]', "entry 1"),
        (json.dumps(entries[:1]), "has no caption for 1 of the 2 images"),
        (json.dumps(entries + entries[:1]), "has two captions"),
    ):
        Path("wrong.json").write_text(content)
        assert trainer.main([*where, "wrong.json"]) == 2
        assert message in capsys.readouterr().err


def test_views_show_the_parts_that_their_names_say(tmp_path):
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:50, :100, 0] = 255  # red in the top left quarter alone
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    whole = load_views(tmp_path / "corner.png", 64)[0]
    assert (load_views(tmp_path / "corner.png", 64, ["mirror"])[0] == whole[:, ::-1]).all()
    squares = zip(VIEWS, load_views(tmp_path / "corner.png", 64, list(VIEWS)), strict=True)
    red = {name: (square[..., 0] > 127).mean() for name, square in squares}
    part = 0.5 / 0.85  # of a side that red takes in the crops that keep its corner
    assert red["whole"] == red["mirror"] == pytest.approx(1 / 4, abs=0.01)
    assert red["top_left_mirror"] == pytest.approx(part**2, abs=0.03)
    assert red["bottom_right"] == pytest.approx((0.35 / 0.85) ** 2, abs=0.03)
    assert red["top_right"] == red["bottom_left_mirror"] == pytest.approx(part * 0.35 / 0.85, abs=0.03)
    mirrored = load_views(tmp_path / "corner.png", 64, ["top_left_mirror"])[0, ..., 0]
    assert mirrored[5, 60] > 200 and mirrored[5, 5] < 50


@pytest.fixture(scope="module")
def others(trained) -> Path:
    """Other pictures, whose captions the model was not trained on: a folder without lists."""
    folder = draw_tiny(trained[0] / "others")
    for path in sorted((folder / "Images").iterdir()):
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path.with_name("new_" + path.name))
        path.unlink()
    captions = (folder / "captions.txt").read_text()
    (folder / "captions.txt").write_text(captions.replace("\np", "\nnew_p").replace("picture", "painting"))
    return folder


def test_captions_are_looked_for_among_those_that_the_model_was_trained_on(trained, others, capsys):
    """Tested on other data, the share of training captions was that of the other data's."""
    _, tiny, lstm, _ = trained
    checkpoint, settings = load_checkpoint(lstm / "best.pt"), SimpleNamespace(feature_cache="off")
    own, other = (SimpleNamespace(data=load_caption_set(place), settings=settings) for place in (tiny, others))
    train = [own.data.names.index(name) for name in checkpoint["split"]["train"]["names"]]
    expected = {text for image in train for text in own.data.references(image)}
    assert training_captions(own, checkpoint) == expected == training_captions(other, checkpoint)
    assert all("painting" in text for text in other.data.references(0)), "which are other captions"
    save_checkpoint(Path("moved.pt"), checkpoint | {"flags": checkpoint["flags"] | {"data_dir": "gone"}})
    assert score("--data_dir", str(others), "--beam_size", "1", model=["moved.pt"]) == 0
    assert "% in training is left out" in capsys.readouterr().out
    assert "in_training" not in rows(Path())[-1]


def test_a_folder_of_nothing_but_test_images_is_scored_whole(trained, others, capsys):
    """Its lists put nothing into training, and a split that is drawn needs three images."""
    _, tiny, lstm, _ = trained
    folder = shutil.copytree(others, Path("whole"))
    (folder / "test.txt").write_text("\n".join(path.name for path in (folder / "Images").iterdir()))
    assert score("--data_dir", str(folder), "--split", "all", "--beam_size", "1", model=[lstm]) == 0
    row, out = rows(lstm)[-1], capsys.readouterr().out
    assert (row["split"], row["images"], row["captions_file"]) == ("all", 20, "all_captions_greedy.json")
    assert "Scores on 20 images (" in out and "Only 20 images: scores of fewer than 50" in out
    where = ["--mode", "test", "--dataset_type", "custom", "--data_dir", str(folder), "--split", "all"]
    assert trainer.main([*where, "--predictions", str(lstm / row["captions_file"])]) == 0
    assert f"{100 * row['rouge_l']:.2f}" in capsys.readouterr().out
    larger = shutil.copytree(
        tiny, Path("larger")
    )  # the model's own images in another size, then one of them among others
    for path in (larger / "Images").iterdir():
        Image.open(path).resize((90, 90)).save(path)
    name = load_checkpoint(lstm / "best.pt")["split"]["train"]["names"][0]
    shutil.copy(tiny / "Images" / name, folder / "Images" / "new_p00.jpg")
    for place in (tiny, larger, folder):
        assert score("--data_dir", str(place), "--split", "all", model=[lstm]) == 2
        assert "was trained on" in capsys.readouterr().err
