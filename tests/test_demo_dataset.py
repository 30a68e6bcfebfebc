"""The drawn data set: deterministic, true to its captions, readable by training, and other files are safe."""

import csv
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from captioning.data import demo_set as demo_dataset
from captioning.data.dataset import load_caption_set
from captioning.data.demo_set import COLORS, SHAPES, draw_demo_dataset
from captioning.io import UserError

SCENES = 30


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    draw_demo_dataset(directory, SCENES)
    return directory


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def captions_of(directory: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    with open(directory / "captions.txt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    return captions


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(demo, tmp_path):
    draw_demo_dataset(tmp_path / "again", SCENES)
    draw_demo_dataset(tmp_path / "other", 10, seed=1)
    draw_demo_dataset(tmp_path / "few", 10)
    assert digests(tmp_path / "again") == digests(demo)
    assert digests(tmp_path / "other")["Images/scene_0001.jpg"] != digests(demo)["Images/scene_0001.jpg"]
    assert digests(tmp_path / "few")["Images/scene_0007.jpg"] == digests(demo)["Images/scene_0007.jpg"]


def test_five_different_true_captions_each(demo):
    shapes = json.loads((demo / "shapes.json").read_text())
    captions = captions_of(demo)
    assert len(captions) == len(shapes) == SCENES
    for image, texts in captions.items():
        assert len(texts) == len(set(texts)) == 5
        shown = Counter(f"{shape['color']} {shape['shape']}" for shape in shapes[image])
        for text in texts:
            words = text.split()
            named = Counter(f"{a} {b}" for a, b in zip(words, words[1:], strict=False) if a in COLORS and b in SHAPES)
            assert named == shown, text
            if len(shapes[image]) == 1:
                assert ("small" in words) <= (shapes[image][0]["size"] == "small")
                assert ("large" in words or "big" in words) <= (shapes[image][0]["size"] == "large")


def test_places_in_captions_are_where_the_boxes_are():
    for number in range(200):
        rng = random.Random(number)
        scene = demo_dataset.invent_scene(rng)
        text = " ".join(scene.captions)
        if len(scene.shapes) == 2:
            first, second = scene.shapes
            if "to the left of" in text:
                assert first.x + first.radius < second.x - second.radius
            if "above" in text:
                assert first.y + first.radius < second.y - second.radius
            assert first.color != second.color and first.shape != second.shape
        else:
            (shape,) = scene.shapes
            for words, far in {
                "on the left": 0.5 - shape.x, "on the right": shape.x - 0.5,
                "at the top": 0.5 - shape.y, "at the bottom": shape.y - 0.5,
            }.items():  # fmt: skip
                assert (words in text) == (far > 0.1)
        assert all((scene.background, shape.color) not in demo_dataset.CAMOUFLAGE for shape in scene.shapes)


def test_boxes_lie_inside_the_picture_around_their_shape(demo):
    for image, shapes in json.loads((demo / "shapes.json").read_text()).items():
        with Image.open(demo / "Images" / image) as picture:
            assert picture.size == (256, 256) and picture.mode == "RGB"
            for shape in shapes:
                x0, y0, x1, y1 = shape["box"]
                assert 0 < x0 < x1 < 1 and 0 < y0 < y1 < 1
                assert (x1 - x0 > 0.3) == (shape["size"] == "large")
                seen = picture.getpixel((round((x0 + x1) * 128), round((y0 + y1) * 128 + 8)))
                distance = {name: sum(map(abs, map(int.__sub__, color, seen))) for name, color in COLORS.items()}
                assert min(distance, key=lambda name: distance[name]) == shape["color"], (image, seen)


def test_training_reads_it(demo):
    data = load_caption_set(demo)
    assert {split: len(images) for split, images in data.splits.items()} == {"train": 24, "val": 3, "test": 3}
    assert sorted(number for images in data.splits.values() for number in images) == list(range(SCENES))
    assert len(data.tokens.offsets) == 5 * SCENES + 1
    assert data.notes == []


def test_a_complete_set_is_reused_and_an_incomplete_one_drawn_again(tmp_path):
    directory = tmp_path / "demo"

    def is_drawn(scenes: int, **options: bool) -> bool:
        before = (directory / "captions.txt").stat().st_mtime_ns
        draw_demo_dataset(directory, scenes, **options)
        return (directory / "captions.txt").stat().st_mtime_ns != before

    draw_demo_dataset(directory, 10)
    before = digests(directory)
    assert not is_drawn(10)
    (directory / "Images" / "scene_0003.jpg").unlink()
    assert is_drawn(10) and digests(directory) == before
    assert is_drawn(10, redraw=True) and is_drawn(12)
    assert len(captions_of(directory)) == 12


@pytest.mark.parametrize("foreign, drawn", [("captions.txt", False), ("notes.txt", False), ("notes.txt", True)])
def test_foreign_files_are_never_touched(tmp_path, foreign, drawn):
    if drawn:
        draw_demo_dataset(tmp_path, 10)
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(UserError, match=foreign):
        draw_demo_dataset(tmp_path, 12)
    assert (tmp_path / foreign).read_text() == "mine"


def test_too_few_scenes(tmp_path):
    with pytest.raises(UserError, match="at least 10"):
        draw_demo_dataset(tmp_path / "demo", 9)
