"""From Python: what a `Captioner` takes, what it says of an image, and the examples of docs/python.md."""

import doctest
import io
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning import Captioned, Captioner, UnreadableImage, UserError
from captioning.data.images import open_image
from captioning.runs import directories as runs
from captioning.runs.directories import find_checkpoint

PAGE = Path(trainer.__file__).parent / "docs" / "python.md"


@pytest.fixture
def photos(tiny_runs, tmp_path, monkeypatch) -> Path:
    """A folder that one is in, with `photos/p01.jpg`, `photos/p02.jpg` and `dog.jpg`."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name, target in (("p01.jpg", "photos"), ("p02.jpg", "photos"), ("p03.jpg", "dog.jpg")):
        shutil.copy(tiny_runs["data"] / "Images" / name, target)
    return tmp_path


def said(result: Captioned) -> tuple:
    return result.text, result.log_probability, [caption.text for caption in result.alternatives]


def test_the_examples_of_the_documentation(tiny_runs, photos):
    """The model that they name is a folder here, which comes before the included model of that name."""
    shutil.copytree(tiny_runs["attention"], "flickr8k_attention")
    Path("notes.txt").write_text("no picture")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    examples = doctest.DocTestParser().get_doctest(PAGE.read_text("utf-8"), {}, PAGE.name, str(PAGE), 0)
    lines: list[str] = []
    result = runner.run(examples, out=lines.append)
    assert result.attempted > 10 and not result.failed, "".join(lines)


def test_every_kind_of_source_is_the_same_image(model, photos):
    expected = said(model("dog.jpg"))
    photo = Image.open("dog.jpg")
    with open("dog.jpg", "rb") as file:
        sources = [Path("dog.jpg"), photo, np.asarray(photo), file, io.BytesIO(Path("dog.jpg").read_bytes())]
        results = model(sources)
        assert [said(model(source)) for source in sources] == [expected] * len(sources)
    assert [result.path for result in results] == [Path("dog.jpg"), *[None] * 4]
    assert [result.text for result in results] == [expected[0]] * len(sources)


def test_pixels_are_taken_as_files_are(model, photos):
    grey = np.asarray(Image.open("dog.jpg").convert("L"))
    clear = np.dstack(
        [np.asarray(Image.open("dog.jpg")), np.where(np.arange(60) < 30, 255, 0)[None].repeat(40, 0)]
    ).astype(np.uint8)
    for pixels in (grey, clear):
        Image.fromarray(pixels).save("same.png")
        assert said(model(pixels)) == said(model("same.png"))
    assert said(model(grey[..., None])) == said(model(grey))
    assert said(model(clear)) != said(model(clear[..., :3]))


def test_lists_and_folders_give_lists(model, photos):
    assert [result.path for result in model("photos")] == [Path("photos/p01.jpg"), Path("photos/p02.jpg")]
    several = model(["dog.jpg", photos / "photos", Image.open("dog.jpg")])
    assert [result.path for result in several] == [
        Path("dog.jpg"),
        *photos.glob("photos/*1.jpg"),
        *photos.glob("photos/*2.jpg"),
        None,
    ]
    assert model([]) == [] and len(model(path for path in ("dog.jpg", "dog.jpg"))) == 2
    assert len(model(["dog.jpg"])) == 1


def test_a_bad_image_raises_alone_and_is_a_problem_among_others(model, photos):
    Path("half.jpg").write_bytes(Path("dog.jpg").read_bytes()[:-200])
    Path("empty").mkdir()
    bad = [
        ("half.jpg", "half.jpg: .*truncated"), ("absent.jpg", "absent.jpg: No such file"), (io.BytesIO(b"text"), "cannot identify"),
        (np.zeros((4, 4, 3)), "an array .4, 4, 3. of float64: expected .* uint8"), (np.zeros((2, 4, 4, 3), np.uint8), "expected"),
        (np.zeros((0, 4, 3), np.uint8), "expected"), (Image.open("half.jpg"), "truncated"),
    ]  # fmt: skip
    for source, message in bad:
        with pytest.raises(UnreadableImage, match=message):
            model(source)
    good, *others = model(["dog.jpg", *(source for source, _ in bad[:-1]), "empty"])
    assert good.problem is None and good.text and all(result.problem and not result.captions for result in others)
    assert others[-1].path == Path("empty") and "no images in this folder" in others[-1].problem
    for attribute in ("text", "words", "log_probability"):
        with pytest.raises(UnreadableImage, match="half.jpg"):
            getattr(others[0], attribute)
    with pytest.raises(UnreadableImage, match="half.jpg"):
        others[0].plot()
    assert repr(others[1]) == "Captioned(problem='absent.jpg: No such file or directory')"
    for wrong in (3, None, b"bytes", ["dog.jpg", 3]):
        with pytest.raises(TypeError, match="is not an image: give a path, a PIL image"):
            model(wrong)


def test_options_are_those_of_the_flags(model, photos):
    greedy, wide = model("dog.jpg", beam_size=1), model("dog.jpg", beam_size=6, num_captions=4, length_penalty=0)
    assert not greedy.alternatives and len(wide.alternatives) == 3
    assert wide.log_probability == max(caption.log_probability for caption in wide.captions)
    drawn = model("dog.jpg", top_p=0.9, num_captions=3)
    assert drawn.words and all(word.attention is None for word in drawn.words)
    for options, message in (
        ({"beam_size": 0}, "beam_size: 0 is out of range"), ({"beam_size": 2.5}, "beam_size: '2.5' is not a whole number"),
        ({"length_penalty": math.nan}, "length_penalty"), ({"top_p": 2}, "top_p: 2 is out of range"),
        ({"top_p": 0.5, "beam_size": 3}, "beam_size has no effect with top_p"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            model("dog.jpg", **options)
    with pytest.raises(TypeError, match="unknown option beam: captions are found by beam_size, "):
        model("dog.jpg", beam=3)


@pytest.mark.parametrize("decoder", ("attention", "lstm"))  # the latter with two views
@pytest.mark.parametrize("top_p", (None, 0.99))
def test_probabilities_multiply_to_the_captions(tiny_runs, photos, decoder, top_p):
    model = Captioner.load(tiny_runs[decoder])
    for longest in (12, 2):  # captions that end, and captions that are cut
        model.flags = model.flags | {"max_length": longest}
        for result in model(["dog.jpg", "photos"], num_captions=3, top_p=top_p):
            for caption in result.captions:
                product = math.prod(word.probability for word in caption.words) * caption.end_probability
                assert product == pytest.approx(math.exp(caption.log_probability), rel=1e-5) and 0 < product < 1
                assert all(0 < word.probability <= 1 for word in caption.words)
                assert (caption.end_probability == 1) == (len(caption.words) == longest == 2)
                assert (caption.attention is None) == (decoder == "lstm" or top_p is not None)
                assert all(word.attention is None or word.attention.shape == (7, 7) for word in caption.words)


@pytest.mark.parametrize("decoder", ("attention", "lstm"))
def test_a_plot_shows_the_photo_and_the_caption(tiny_runs, photos, decoder):
    figure = Captioner.load(tiny_runs[decoder])("dog.jpg").plot()
    labels = [axes.get_label() for axes in figure.axes]
    assert set(labels) == ({"photo", "word", "scale"} if decoder == "attention" else {"sample"})
    texts = [text.get_text() for text in figure.texts]
    assert "dog.jpg" in texts and any("picture" in text for text in texts)


def test_threads_share_a_captioner(tiny_runs):
    paths = sorted((tiny_runs["data"] / "Images").iterdir())[:4]
    captioner, start = Captioner.load(tiny_runs["attention"]), threading.Barrier(4)

    def work(number: int) -> list[tuple]:
        start.wait()
        return [said(captioner(path)) for path in paths if number or captioner(path, top_p=0.9)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    assert results == [[said(captioner(path)) for path in paths]] * 4
    assert (
        not captioner.model.decoder.training
    )  # nor was it while one of them drew: `sample` leaves the mode that it found


def test_several_threads_may_read_one_open_image():
    pixels = np.random.default_rng(0).integers(0, 255, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    with Image.open(file) as photo, ThreadPoolExecutor(8) as pool:  # whose pixels are not read yet
        assert all((np.asarray(read) == pixels).all() for read in pool.map(open_image, [photo] * 8))


def test_models_of_the_package_have_names(tiny_runs, photos, monkeypatch, capsys):
    shutil.copytree(runs.PRETRAINED / "flickr8k_attention", photos / "pretrained" / "tiny_attention")
    monkeypatch.setattr(runs, "PRETRAINED", photos / "pretrained")
    assert find_checkpoint(Path("tiny_attention")) == photos / "pretrained" / "tiny_attention" / "model.safetensors"
    assert trainer.main(["--mode", "caption", "--model_path", "tiny_attention", "--images", "dog.jpg"]) == 0
    for unknown in ("tiny_atention", "absent/tiny_attention", "../tiny_attention"):
        with pytest.raises(UserError, match=rf"the model {unknown} is not there: .* package \(tiny_attention\)"):
            find_checkpoint(Path(unknown))
    Path("tiny_attention").mkdir()  # a path that is there wins, even where there is no model in it
    with pytest.raises(UserError, match="no run below tiny_attention has a best.pt"):
        find_checkpoint(Path("tiny_attention"))
    shutil.copy(tiny_runs["lstm"] / "best.pt", "tiny_attention")
    assert find_checkpoint(Path("tiny_attention")) == Path("tiny_attention/best.pt")


def test_the_captioner_of_the_package_captions_photos_unless_another_is_named(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo = str(photos / "dog.jpg")
    drawn = ["--save_attention_viz", "--attention_viz_dpi", "50"]
    assert trainer.main(["--mode", "caption", "--images", photo, *drawn]) == 0
    out, err = capsys.readouterr()
    result = Captioner.load()(photo)
    assert out == f"{photo}\t{result.text}\t{result.confidence:.2f}\n" and err.count("Using flickr8k_attention") == 1
    assert list(Path("captions_viz").glob("attention_viz_sample_1.png"))
    folder = runs.PRETRAINED / runs.PRETRAINED_MODEL
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert files.keys() >= {"LICENSE", "README.md"} and sum(files.values()) < 32_000_000
