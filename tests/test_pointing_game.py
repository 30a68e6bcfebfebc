"""The pointing game: a model that is trained on the drawn set attends to a shape when it says the shape's word."""

import json
from pathlib import Path

import numpy as np
from run_files import only_run, skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning import Captioner
from captioning.config.settings import parse_flags
from captioning.data.demo_set import draw_demo_dataset
from captioning.data.images import cell_middles, peak

NEAR = 0.5 / 7  # half a cell of the 7 x 7 grid


def near_box(points: np.ndarray, box: list[float]) -> np.ndarray:
    """Whether each point (x, y) is in a box or within half a cell of it; all are fractions of the picture's sides."""
    left, top, right, bottom = box
    x, y = points.T
    return (left - NEAR <= x) & (x <= right + NEAR) & (top - NEAR <= y) & (y <= bottom + NEAR)


def play(words: list[str], weights: np.ndarray, shapes: list[dict]) -> list[tuple[bool, float]]:
    """Return, for each word of a shape that is there, whether its peak is near that shape, and the chance of it.

    Args:
        weights: attention, (words, 49).
        shapes: an entry of the drawn set's `shapes.json`; a kind of shape is there once at most.
    """
    boxes = {shape["shape"]: shape["box"] for shape in shapes}
    known = [(row, boxes[word]) for word, row in zip(words, weights, strict=True) if word in boxes]
    return [(near_box(peak(row[None]), box).item(), near_box(cell_middles(49), box).mean()) for row, box in known]


def test_maps_on_the_shape_and_beside_it_hit_and_others_miss():
    star = [{"shape": "star", "box": [0.0, 0.0, 0.2, 0.2]}]  # holds the middle of cell 0 alone
    for cell, hit in ((0, True), (1, True), (8, True), (2, False), (14, False), (48, False)):
        assert play(["a", "star", "heart"], np.eye(49)[[5, cell, 0]], star) == [(hit, 4 / 49)]


def test_a_trained_model_attends_to_the_shapes_that_it_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    skip_pictures(monkeypatch)
    folder = Path("data/demo")
    draw_demo_dataset(folder, 40)
    small = "--dataset_type demo --encoder efficientnet_lite0 --decoder attention --epochs 8 --embed_size 64"
    small += " --hidden_size 64 --num_layers 1 --attention_dim 32 --freq_threshold 1 --batch_size 16"
    small += " --learning_rate 0.005 --attention_viz_dpi 50"
    names = ["--save_attention_viz", "--attention_viz_images", "scene_0002.jpg", "scene_0040.jpg"]
    assert trainer.main([*small.split(), *names]) == 0
    run = only_run()
    assert parse_flags(["--resume", str(run)]).attention_viz_images == names[2:]
    numbers = [json.loads((run / f"attention_viz_sample_{n}.json").read_text()) for n in (1, 2)]
    assert [each["image"] for each in numbers] == names[2:]

    shapes = json.loads((folder / "shapes.json").read_text())
    results = [each for each in Captioner.load(run)(folder / "Images", beam_size=1) if each.words]
    played = [play(each.text.split(), each.best.attention, shapes[each.path.name]) for each in results]
    hits, chance = np.array([word for words in played for word in words]).T
    assert len(hits) > 20 and hits.mean() > 2 * chance.mean()

    assert trainer.main(["--mode", "test", "--model_path", str(run), *names[:2], "scene_0500.jpg"]) == 2
    assert "no captioned image 'scene_0500.jpg'" in capsys.readouterr().err
