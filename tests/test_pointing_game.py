"""The pointing game on attention maps made to hit or to miss, and on a model trained on a small demo set."""

import json

import numpy as np
import pytest
from run_files import only_run, skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning import demo_set as pointing_game
from captioning.demo_set import draw_demo_dataset
from captioning.io import UserError
from captioning.settings import parse_flags

LEFT = {"star": (0.0, 0.0, 0.2, 0.2)}  # holds the middle of cell 0 alone
RIGHT = {"heart": (0.8, 0.8, 1.0, 1.0)}  # of cell 48 alone


def attention(*cells: int) -> np.ndarray:
    """A word's whole attention in one of the 49 cells, for each given cell."""
    return np.eye(49)[list(cells)]


def test_right_maps_hit_and_those_of_the_other_picture_miss():
    words = [["a", "star"], ["a", "heart"]]
    result = pointing_game.score(words, [attention(5, 0), attention(5, 48)], [LEFT, RIGHT])
    assert result["pointing_game"] == result["pointing_game_near"] == 1 and result["pointing_game_words"] == 2
    assert result["pointing_game_shuffled"] == result["pointing_game_near_shuffled"] == 0
    assert result["pointing_game_uniform"] == pytest.approx(1 / 49)
    assert result["pointing_game_near_uniform"] == pytest.approx(4 / 49), "boxes of 0.2 touch two cells a side"
    swapped = pointing_game.score(words, [attention(5, 48), attention(5, 0)], [LEFT, RIGHT])
    assert swapped["pointing_game"] == 0 and swapped["pointing_game_shuffled"] == 1


def test_a_cell_beside_the_box_is_near_and_one_further_off_is_not():
    for cell, near in ((1, 1), (8, 1), (2, 0), (14, 0)):
        result = pointing_game.score([["star"]], [attention(cell)], [LEFT])
        assert (result["pointing_game"], result["pointing_game_near"]) == (0, near)
        assert "pointing_game_shuffled" not in result


def test_words_of_absent_shapes_and_empty_captions_do_not_count():
    result = pointing_game.score(
        [["star", "heart"], [], ["heart"]], [attention(0, 3), None, attention(4)], [LEFT, LEFT, {}]
    )
    assert result["pointing_game_words"] == 1 and result["pointing_game"] == 1
    assert pointing_game.score([["a", "dog"]], [attention(1, 2)], [LEFT]) == {}


def test_the_printed_line_has_chance_beside_the_shares():
    line = pointing_game.describe(
        pointing_game.score([["star"], ["heart"]], [attention(0), attention(3)], [LEFT, RIGHT])
    )
    assert "of 2 shape words, 50.0% have" in line and "any cell alike 2.0%, other pictures' maps 0.0%" in line


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"a": 3}', '{"a": [3]}', '{"a": [{"shape": "star", "box": [0, 0, 1]}]}',
             '{"a": [{"shape": ["star"], "box": [0, 0, 1, 1]}]}', '{"a": [{"shape": "star", "box": [0, 0, 1, NaN]}]}',
             "[" * 100_000],
)  # fmt: skip
def test_tables_of_another_form_are_refused(tmp_path, text):
    (tmp_path / "shapes.json").write_text(text)
    with pytest.raises(UserError, match="shapes.json"):
        pointing_game.read_boxes(tmp_path / "shapes.json")


def test_testing_the_demo_set_reports_it_and_draws_the_images_that_were_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    skip_pictures(monkeypatch)
    draw_demo_dataset(tmp_path / "data" / "demo", 40)
    small = "--dataset_type demo --encoder efficientnet_lite0 --decoder attention --epochs 8 --embed_size 64"
    small += " --hidden_size 64 --num_layers 1 --attention_dim 32 --freq_threshold 1 --batch_size 16"
    small += " --learning_rate 0.005 --attention_viz_dpi 50"
    names = ["--save_attention_viz", "--attention_viz_images", "scene_0002.jpg", "scene_0040.jpg"]
    assert trainer.main([*small.split(), *names]) == 0
    run = only_run()
    assert parse_flags(["--resume", str(run)]).attention_viz_images == names[2:]
    numbers = [json.loads((run / f"attention_viz_sample_{n}.json").read_text()) for n in (1, 2)]
    assert [each["image"] for each in numbers] == ["scene_0002.jpg", "scene_0040.jpg"]
    out = capsys.readouterr().out
    assert "train 32, val 4, test 4" in out and "Epoch 1 completed (1/8):" in out and "CIDEr" in out
    assert trainer.main(["--mode", "test", "--model_path", str(run), *names[:2], "scene_0005.jpg"]) == 0
    assert json.loads((run / "attention_viz_sample_1.json").read_text())["image"] == "scene_0005.jpg"
    entries = json.loads((run / "test_metrics.json").read_text())
    assert all(0 <= entry["pointing_game"] <= entry["pointing_game_near"] <= 1 for entry in entries)
    assert capsys.readouterr().out.count("Pointing game: of") == 1
    testing = ["--mode", "test", "--model_path", "saved_models/demo/efficientnet_lite0_attention"]
    assert trainer.main([*testing, *names[:2], "scene_0500.jpg"]) == 2
    assert "no captioned image 'scene_0500.jpg'" in capsys.readouterr().err
