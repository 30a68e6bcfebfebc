"""Attention pictures are tested by what their axes hold and by where the numbers lie, not by pixels."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import attention_visualization as attention
from captioning.io import UserError
from captioning.training.caption_set import find_images

SIZES = {"landscape": (500, 375), "portrait": (333, 500), "panorama": (900, 90), "tower": (40, 600)}


def photo(shape: str = "landscape") -> Image.Image:
    return Image.new("RGB", SIZES[shape], "teal")


def viz(form: str = "png", dpi: int = 120, advanced: bool = False) -> SimpleNamespace:
    """The flags of attention pictures."""
    return SimpleNamespace(attention_viz_format=form, attention_viz_dpi=dpi, advanced_attention_viz=advanced)


def maps(words: int) -> np.ndarray:
    """A different distribution for each word."""
    weights = np.random.default_rng(words).random((words, 49)) ** 4
    return weights / weights.sum(1, keepdims=True)


def caption(words: int) -> list[str]:
    return [f"word{number}" for number in range(words)]


def one_hot(*cells: int) -> np.ndarray:
    return np.eye(49)[list(cells)]


BOTH = pytest.mark.parametrize("build", [attention.attention_figure, attention.advanced_attention_figure])


def labels(figure) -> Counter:
    return Counter(axes.get_label() for axes in figure.axes)


def headings(figure, label: str) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_label() == label]


# Numbers


def test_upsampled_map_has_each_cells_weight_in_the_cells_middle():
    weights = maps(1)[0]
    smooth = attention.upsample(weights.reshape(7, 7), 7 * 31, 7 * 31)  # odd cells have a pixel in their middle
    np.testing.assert_allclose(smooth[15::31, 15::31], weights.reshape(7, 7), atol=1e-6)
    assert smooth.min() >= 0 and smooth.max() <= weights.max() + 1e-6
    assert np.abs(np.diff(smooth, axis=1)).max() < 0.1 * weights.max(), "steps instead of a smooth map"


@pytest.mark.parametrize("side", [1, 4, 14])
def test_the_grid_is_as_large_as_the_weights_say(side):
    weights = np.full((2, side * side), 0.5 / (side * side))
    weights[:, -1] += 0.5
    np.testing.assert_allclose(attention.peak(weights), 1 - 0.5 / side)
    assert attention.upsample(weights[0], 20, 30).shape == (20, 30)
    for build in (attention.attention_figure, attention.advanced_attention_figure):
        texts = " ".join(text.get_text() for text in build(photo(), caption(2), weights).texts)
        assert f"of {side * side} cells" in texts.replace("\n", " ")
    assert attention.attention_numbers("a.jpg", caption(2), weights)["grid"] == side


def test_entropy_of_known_distributions():
    pair = np.zeros(49)
    pair[[3, 30]] = 0.5
    bits = attention.entropy(np.stack([np.full(49, 1 / 49), one_hot(5)[0], pair]))
    np.testing.assert_allclose(bits, [math.log2(49), 0, 1], atol=1e-12)
    assert not np.signbit(bits).any(), "a one-hot row must not print as -0.0"


def test_peak_is_the_middle_of_the_strongest_cell_as_x_and_y():
    points = attention.peak(one_hot(0, 6, 24, 42))
    np.testing.assert_allclose(points * 14, [[1, 1], [13, 1], [7, 7], [1, 13]])


@BOTH
@pytest.mark.parametrize(
    ("words", "weights"), [(4, maps(3)), (2, np.full((2, 48), 1 / 48)), (2, np.full((2, 49), 1.002 / 49))]
)
def test_weights_that_are_no_distribution_for_each_word_raise(build, words, weights):
    with pytest.raises(ValueError):
        build(photo(), caption(words), weights)


# Pictures


@pytest.mark.parametrize(("words", "shape"), [(1, "landscape"), (20, "portrait")])
def test_basic_picture_has_the_photo_and_every_word(words, shape):
    figure = attention.attention_figure(photo(shape), caption(words), maps(words))
    assert labels(figure) == {"photo": 1, "word": words, "scale": 1}
    assert headings(figure, "word") == [f"{number + 1} word{number}" for number in range(words)]
    assert any("own scale" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize(("words", "shape"), [(1, "landscape"), (20, "portrait")])
def test_advanced_picture_has_every_view(words, shape):
    figure = attention.advanced_attention_figure(photo(shape), caption(words), maps(words))
    crops = len(attention.strongest_regions(maps(words)))
    assert 1 <= crops <= min(words, 4)
    assert labels(figure) == {"path": 1, "mean": 1, "entropy": 1, "crop": crops, "scale": 1}, "no map of one word"
    (bars,) = [axes for axes in figure.axes if axes.get_label() == "entropy"]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], attention.entropy(maps(words)))
    assert [line.get_xdata()[0] for line in bars.lines] == [math.log2(49)]


@BOTH
@pytest.mark.parametrize(("words", "shape"), [(1, "tower"), (8, "portrait"), (12, "panorama"), (30, "landscape")])
def test_panels_neither_overlap_nor_leave_the_page(build, words, shape):
    boxes = [axes.get_position() for axes in build(photo(shape), caption(words), maps(words)).axes]
    corners = np.array([(box.x0, box.y0, box.x1, box.y1) for box in boxes])
    assert corners.min() >= 0 and corners.max() <= 1
    left, bottom, right, top = corners.T
    crossing = (left[:, None] < right) & (left < right[:, None])
    crossing &= (bottom[:, None] < top) & (bottom < top[:, None])
    assert crossing.sum() == len(boxes), "a panel crosses another than itself"


def test_a_map_is_drawn_over_the_whole_photo_and_scaled_to_its_peak():
    weights = maps(2)
    figure = attention.attention_figure(photo(), caption(2), weights)
    panels = [axes for axes in figure.axes if axes.get_label() == "word"]
    for axes, row in zip(panels, weights, strict=True):
        below, above = axes.images
        assert list(below.get_extent()) == list(above.get_extent()) == [0, 500, 375, 0]
        assert above.get_clim() == (0, row.max())


def test_path_gathers_words_of_one_cell_and_draws_a_move_only_between_cells():
    from matplotlib.patches import FancyArrowPatch

    figure = attention.advanced_attention_figure(photo(), caption(6), one_hot(0, 0, 0, 24, 0, 48))
    (axes,) = [axes for axes in figure.axes if axes.get_label() == "path"]
    places = {text.get_text().replace("\n", " "): text.get_position() for text in axes.texts}
    assert places["1, 2, 3, 5"] == pytest.approx((500 / 14, 375 / 14))
    assert places["4"] == pytest.approx((250, 187.5))
    assert places["6"] == pytest.approx((500 * 13 / 14, 375 * 13 / 14))
    assert sum(isinstance(patch, FancyArrowPatch) for patch in axes.patches) == 3


def test_strongest_regions_are_apart_strong_and_of_different_words():
    weights = np.full((4, 49), 0.2 / 48)
    for word, cell, neighbour in ((0, 0, 8), (1, 24, 25), (2, 8, 9)):  # cell 8 touches cell 0
        weights[word, [cell, neighbour]] = 0.8 - 0.1 * word, 0.2
        weights[word] /= weights[word].sum()
    weights[3] = 1 / 49  # attends to nothing in particular
    assert attention.strongest_regions(weights) == [(0, 0), (1, 24), (2, 9)]
    assert len(attention.strongest_regions(maps(30), 3)) == 3


@pytest.mark.parametrize(("cells", "times", "strong"), [(49, 3.9, 0), (64, 4.1, 1), (1, 1, 0)])
def test_a_region_is_strong_from_four_times_an_even_share_on(cells, times, strong):
    weights = np.full((1, cells), (1 - times / cells) / max(1, cells - 1))
    weights[0, 0] = times / cells
    assert len(attention.strongest_regions(weights)) == strong
    figure = attention.advanced_attention_figure(photo(), caption(1), weights)
    assert labels(figure)["crop"] == strong
    notes = [text.get_text() for text in figure.texts if "4 times the even share" in text.get_text()]
    assert len(notes) == 1 and notes[0].startswith("Strongest regions" if strong else "No strong region")


@pytest.mark.parametrize("level", ["night", "day", "snow"])
def test_dark_and_light_photos_are_dimmed_to_the_same_middle_tones(level):
    low, high = {"night": (0, 25), "day": (40, 220), "snow": (215, 255)}[level]
    scene = np.linspace(low, high, 60 * 80).reshape(60, 80)
    grey = np.asarray(attention.dim(Image.fromarray(scene.astype(np.uint8)).convert("RGB")))[..., 0]
    assert 70 < np.median(grey) < 130 and grey.max() < 180, "visible, and darker than the colours of a map"
    assert np.ptp(grey.astype(int)) > 30, "the scene stays recognisable"


@pytest.mark.parametrize(("shape", "cell"), [("landscape", 24), ("portrait", 0), ("panorama", 48), ("tower", 48)])
def test_a_crop_is_square_and_shows_the_cell_that_it_frames(shape, cell):
    image = photo(shape)
    row, column = divmod(cell, 7)
    width, height = image.width / 7, image.height / 7
    middle = (int((column + 0.5) * width), int((row + 0.5) * height))
    image.putpixel(middle, (255, 0, 0))
    figure = attention.advanced_attention_figure(image, caption(1), one_hot(cell))
    (axes,) = [axes for axes in figure.axes if axes.get_label() == "crop"]
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    assert (left, top) == (0, 0) and right == bottom <= min(image.size)
    frame = axes.patches[0]
    assert frame.get_width() == pytest.approx(width) and frame.get_height() == pytest.approx(height)
    shown = axes.images[0].get_array()
    y, x = np.argwhere(shown[..., 0] > shown[..., 1])[0] * bottom / len(shown)
    assert frame.get_x() - 1 <= x <= frame.get_x() + width + 1 and frame.get_y() - 1 <= y <= frame.get_y() + height + 1


def test_title_caption_and_odd_words_are_written_as_they_are(tmp_path):
    words = ["$5$", "<UNK>", "\\alpha", "incomprehensibilities" * 3]
    figure = attention.attention_figure(photo(), words, maps(4), title="dog.jpg")
    written = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert "$5$ <UNK> \\alpha incompre" in written and "dog.jpg" in written
    attention.save_pictures(tmp_path, 1, photo(), "$ _ ^ {", words, maps(4), viz(advanced=True))
    assert (tmp_path / "advanced_attention_viz_sample_1.png").exists()


def test_files_are_whole_pngs_of_bounded_size_with_their_numbers(tmp_path):
    words, weights = 60, maps(60)
    attention.save_pictures(tmp_path, 3, photo("tower"), "dog.jpg", caption(60), weights, viz(dpi=60, advanced=True))
    names = ["advanced_attention_viz_sample_3.png", "attention_viz_sample_3.json", "attention_viz_sample_3.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in (names[0], names[2]):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and max(picture.size) <= 60 * 20
            picture.load()
    numbers = json.loads((tmp_path / names[1]).read_text())
    assert numbers["image"] == "dog.jpg" and numbers["words"] == caption(words) and numbers["grid"] == 7
    np.testing.assert_allclose(np.reshape(numbers["maps"], (words, 49)), weights, atol=1e-6)
    np.testing.assert_allclose(numbers["peaks"], attention.peak(weights), atol=1e-4)
    np.testing.assert_allclose(numbers["entropies"], attention.entropy(weights), atol=1e-4)


@pytest.mark.parametrize(("form", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_every_format_is_written_alike_each_time(tmp_path, form, start):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        attention.save_pictures(tmp_path / folder, 1, photo(), "dog.jpg", caption(1), maps(1), viz(form))
    first, second = ((tmp_path / folder / f"attention_viz_sample_1.{form}").read_bytes() for folder in ("one", "two"))
    assert first.startswith(start) and first == second


def test_images_are_found_by_name_and_a_wrong_name_gets_a_near_one():
    names = ["a dog.jpg", "b.jpg", "c.jpg"]
    assert find_images(["c.jpg", "a dog.jpg", "c.jpg"], names).tolist() == [2, 0]
    with pytest.raises(UserError, match="no captioned image 'dog.jpg'; it has a dog.jpg"):
        find_images(["dog.jpg"], names)


def test_a_photo_that_is_gone_or_a_caption_without_words_costs_its_own_picture_only(tmp_path, caplog):
    """Features may be in the cache, so that training and testing went on without the photo."""
    for source, words, message in (
        (tmp_path / "gone.jpg", caption(1), "gone.jpg: No such file or directory"),
        (photo(), [], "empty.jpg: its caption is empty"),
    ):
        assert not attention.save_pictures(
            tmp_path, 1, source, "empty.jpg", words, maps(len(words)) if words else None, viz()
        )
        assert message in caplog.text and not list(tmp_path.iterdir())
