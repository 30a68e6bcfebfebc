"""`--mode caption`: anybody's images, from a checkpoint alone, in any form, whatever lies among them."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from run_files import png_of

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.captioner import Captioner
from captioning.data import images
from captioning.data.images import UnreadableImage, images_below, load_views
from captioning.decoders.ensemble import Ensemble
from captioning.decoding.beam_search import beam_search
from captioning.encoders import base as encoders
from captioning.io import UserError
from captioning.modes.caption import Table, find_photos, given_options


@pytest.fixture
def photos(tiny_runs, tmp_path, monkeypatch) -> Path:
    """Three photos in an empty folder, which is where the program runs: no data set, no cache."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for name, place in (("p01.jpg", "photos"), ("p02.jpg", "photos"), ("p03.jpg", "photos/below")):
        shutil.copy(tiny_runs["data"] / "Images" / name, tmp_path / place / name)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


@pytest.fixture
def twos(monkeypatch):
    """Batches of two images."""
    for module in ("captioner", "modes.caption"):
        monkeypatch.setattr(f"captioning.{module}.IMAGES_TOGETHER", 2)


def caption(run: Path, *flags: str) -> int:
    return trainer.main(["--mode", "caption", "--model_path", str(run), *flags])


@pytest.mark.parametrize("decoder", ("attention", "lstm"))
def test_captions_are_those_of_test_mode(tiny_runs, tmp_path, monkeypatch, capsys, decoder):
    shutil.copy(tiny_runs[decoder] / "best.pt", tmp_path / "model.pt")
    model, images = tmp_path / "model.pt", tiny_runs["data"] / "Images"
    monkeypatch.chdir(tmp_path)
    assert trainer.main(["--mode", "test", "--model_path", str(model), "--beam_size", "3"]) == 0
    (entry,) = (entry for entry in json.loads(Path("test_metrics.json").read_text()) if entry["beam_size"] == 3)
    expected = {entry["image_id"]: entry["caption"] for entry in json.loads(Path(entry["captions_file"]).read_text())}
    capsys.readouterr()
    assert expected and caption(model, "--images", *(str(images / name) for name in expected)) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"{images / name}\t{text}\t" for name, text in expected.items()]
    assert "Model: " in captured.err and "Model: " not in captured.out


def test_json_lines_say_where_each_word_looked(tiny_runs, photos, capsys):
    assert caption(tiny_runs["attention"], "--images", "photos", "--json", "--num_captions", "4") == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["path"] for entry in entries] == ["photos/p01.jpg", "photos/p02.jpg", "photos/below/p03.jpg"]
    results = Captioner.load(tiny_runs["attention"])("photos", num_captions=4)
    for entry, result in zip(entries, results, strict=True):
        assert entry["caption"] == result.text
        for word, known in zip(entry["words"], result.words, strict=True):
            peak, weights = word["peak"], known.attention
            assert (word["word"], word["probability"]) == (known.text, pytest.approx(known.probability, abs=1e-4))
            assert weights[peak["row"], peak["column"]] == weights.max()
            assert peak["x"] == pytest.approx((peak["column"] + 0.5) / 7, abs=1e-4)
            assert peak["weight"] == pytest.approx(weights.max(), abs=1e-4)
        several = [entry["caption"], *(other["caption"] for other in entry["alternatives"])]
        assert len(several) == 4 == len(set(several))
        assert all(other["log_probability"] < 0 for other in entry["alternatives"])


def test_an_lstm_looks_nowhere(tiny_runs, photos, capsys):
    assert caption(tiny_runs["lstm"], "--images", "photos/p01.jpg", "--json") == 0
    assert {key for word in json.loads(capsys.readouterr().out)["words"] for key in word} == {"word", "probability"}
    assert caption(tiny_runs["lstm"], "--images", "photos/p01.jpg", "--save_attention_viz") == 2
    assert "the lstm decoder of" in capsys.readouterr().err


def test_files_are_written_once_and_whole(tiny_runs, photos, capsys):
    flags = ("--images", "photos", "--num_captions", "2", "--output")
    assert caption(tiny_runs["attention"], *flags, "out.csv") == 0
    assert capsys.readouterr().out == ""
    text = Path("out.csv").read_bytes()
    rows = list(csv.DictReader(io.StringIO(text.decode())))
    assert [row["rank"] for row in rows] == ["1", "2"] * 3
    assert list(rows[0]) == ["path", "rank", "caption", "log_probability", "confidence"]
    assert caption(tiny_runs["attention"], *flags, "out.jsonl") == 0
    entries = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [entry["caption"] for entry in entries] == [row["caption"] for row in rows if row["rank"] == "1"]
    assert caption(tiny_runs["attention"], *flags, "out.csv") == 2
    assert "is there already" in capsys.readouterr().err and Path("out.csv").read_bytes() == text
    assert sorted(path.name for path in Path().iterdir()) == ["out.csv", "out.jsonl", "photos"]


@pytest.mark.parametrize("ending, flags", [("csv", ["--num_captions", "2"]), ("jsonl", ["--top_p", "0.9"])])
def test_a_table_goes_on_where_it_stopped(tiny_runs, photos, twos, monkeypatch, capsys, ending, flags):
    shutil.copytree(tiny_runs["data"] / "Images", "photos", dirs_exist_ok=True)
    (photos / "p02.jpg").write_text("no picture")
    flags = ["--images", "photos", *flags, "--output"]
    assert caption(tiny_runs["attention"], *flags, f"whole.{ending}") == 1
    table, write = Path(f"out.{ending}"), Table.write
    beside = Path(f"out.{ending}.progress")

    def dying(half: Path, after: int):
        """`Table.write` that ends as kill -9 does, within the write to one of its two files."""
        left = [after]

        def dies(self) -> None:
            before = {path: path.stat().st_size for path in (beside, table)}
            write(self)
            left[0] -= 1
            if left[0] < 0:
                if half == beside:
                    os.truncate(table, before[table])
                os.truncate(half, (before[half] + half.stat().st_size) // 2)
                raise SystemExit(9)

        return dies

    for half, after in ((beside, 0), (table, 1), (beside, 2), (table, 0), (table, 2)):
        monkeypatch.setattr(Table, "write", dying(half, after))
        with pytest.raises(SystemExit):
            caption(tiny_runs["attention"], *flags, table.name)
    assert len(table.read_bytes()) < len(Path(f"whole.{ending}").read_bytes())
    monkeypatch.setattr(Table, "write", write)
    capsys.readouterr()
    assert caption(tiny_runs["attention"], *flags, table.name) == 1
    assert f"{table}: 15 of 21 images are done already" in capsys.readouterr().err
    assert table.read_bytes() == Path(f"whole.{ending}").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == [table.name, "photos", f"whole.{ending}"]


def test_a_table_goes_on_as_it_was_begun_only(tiny_runs, photos, twos, monkeypatch, capsys):
    flags = ["--images", "photos", "--output", "out.csv"]
    write = Table.write
    monkeypatch.setattr(Table, "write", lambda self: (write(self), exec("raise SystemExit(9)")))
    with pytest.raises(SystemExit):
        caption(tiny_runs["attention"], *flags)
    monkeypatch.undo()
    monkeypatch.chdir(photos.parent)
    begun = Path("out.csv").read_text()
    assert len(begun.splitlines()) == 3  # the first two photos
    for model, others, message in (
        ("attention", ["--beam_size", "2"], "begun with beam_size 3, now 2"),
        ("lstm", [], "begun with model "),
    ):
        assert caption(tiny_runs[model], *flags, *others) == 2
        assert message in (error := capsys.readouterr().err) and "move out.csv and out.csv.progress away" in error
    with FileLock(".out.csv.lock"):
        assert caption(tiny_runs["attention"], *flags) == 2
    assert "another process is writing out.csv" in capsys.readouterr().err
    Path("out.csv").write_text(begun + "photos/p09.jpg,1,mine,0,\n")
    assert caption(tiny_runs["attention"], *flags) == 2
    assert "was changed while it was not finished" in capsys.readouterr().err
    Path("out.csv").unlink()
    shutil.copy(photos / "below" / "p03.jpg", photos / "p01.jpg")  # it has changed since
    assert caption(tiny_runs["attention"], *flags) == 0
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    assert [row["path"] for row in rows] == ["photos/p02.jpg", "photos/p01.jpg", "photos/below/p03.jpg"]
    assert rows[1]["caption"] == rows[2]["caption"]


def test_attention_pictures_overwrite_nothing(tiny_runs, photos):
    shutil.copy("photos/p02.jpg", "photos/below/p01.jpg")  # the same name twice
    small = ("--save_attention_viz", "--attention_viz_dpi", "50")
    assert caption(tiny_runs["attention"], "--images", "photos/p01.jpg", "photos/below/p01.jpg", *small) == 0
    first = {path.name: path.read_bytes() for path in Path("captions_viz").iterdir()}
    assert set(first) == {f"attention_viz_sample_{n}.{ending}" for n in (1, 2) for ending in ("png", "json")}
    assert json.loads(first["attention_viz_sample_2.json"])["image"] == "photos/below/p01.jpg"
    assert caption(tiny_runs["attention"], "--images", "photos/p01.jpg", *small) == 0
    now = {path.name: path.read_bytes() for path in Path("captions_viz").iterdir()}
    assert set(now) - set(first) == {"attention_viz_sample_3.png", "attention_viz_sample_3.json"}
    assert first.items() <= now.items()
    Path("results").mkdir()
    more = ("--output", "results/out.csv", "--advanced_attention_viz", "--attention_viz_format", "svg")
    assert caption(tiny_runs["attention"], "--images", "photos/p01.jpg", *small, *more) == 0
    assert len(list(Path("results/captions_viz").glob("*.svg"))) == 2


def test_one_bad_image_never_stops_the_rest(tiny_runs, photos, capsys):
    whole = (photos / "p01.jpg").read_bytes()
    (photos / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.png").touch()
    (photos / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    (photos / "bomb.png").write_bytes(png_of(60_000, 60_000))
    (photos / "tab\tand\x1b[31m.jpg").write_bytes(b"no picture")
    (photos / "p02.jpg").rename(photos / "tab\tline\n.jpg")
    assert caption(tiny_runs["attention"], "--images", "photos") == 1
    captured = capsys.readouterr()
    assert [line.split("\t")[0] for line in captured.out.splitlines()] == [
        "photos/p01.jpg", "photos/tab\\tline\\n.jpg", "photos/below/p03.jpg",
    ]  # fmt: skip
    for name in ("half.jpg", "empty.png", "script.jpg", "bomb.png", "tab\\tand\\x1b[31m.jpg"):
        assert f"Cannot read photos/{name}" in captured.err
    assert "Not readable: 5 of 8 images" in captured.err and "\x1b[31m" not in captured.err


# What a phone, a scanner or a drawing program writes; each holds the same picture: red left, blue right, green below.
def picture() -> Image.Image:
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:, :60], pixels[:, 60:], pixels[60:] = (220, 30, 30), (30, 30, 220), (30, 200, 30)
    return Image.fromarray(pixels)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lay on its side: to be turned a quarter clockwise
    picture().transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=exif)


def transparent(path: Path, mode: str) -> None:
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(120) < 60, 255, 0).astype(np.uint8)[None].repeat(80, 0)))
    image.convert(mode).save(path)


def sixteen_bit(path: Path) -> None:
    grey = np.asarray(picture().convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(path)


def floats(path: Path, largest: float) -> None:
    Image.fromarray(np.asarray(picture().convert("L")).astype(np.float32) * (largest / 255)).save(path)


COLOUR = [(220, 30, 30), (30, 30, 220)]
GREY = [(87, 87, 87), (52, 52, 52)]
KINDS = {
    "turned.jpg": (turned, COLOUR),
    "cmyk.jpg": (lambda path: picture().convert("CMYK").save(path, quality=95), COLOUR),
    "grey.jpg": (lambda path: picture().convert("L").save(path, quality=95), GREY),
    "alpha.png": (lambda path: transparent(path, "RGBA"), [COLOUR[0], (255, 255, 255)]),
    "grey_alpha.png": (lambda path: transparent(path, "LA"), [GREY[0], (255, 255, 255)]),
    "palette.png": (lambda path: picture().quantize(8).save(path), COLOUR),
    "sixteen.png": (sixteen_bit, GREY),
    "sixteen.tiff": (sixteen_bit, GREY),
    "floats_to_1.tiff": (lambda path: floats(path, 1), GREY),
    "floats_to_255.tiff": (lambda path: floats(path, 255), GREY),
    "one_bit.png": (lambda path: picture().convert("L").point(lambda v: 255 * (v > 70)).convert("1").save(path),
                    [(255, 255, 255), (0, 0, 0)]),
    "animated.gif": (lambda path: picture().save(path, save_all=True, append_images=[Image.new("RGB", (120, 80))]), COLOUR),
    "animated.webp": (lambda path: picture().save(path, save_all=True, append_images=[Image.new("RGB", (120, 80))], quality=95), COLOUR),
    "still.avif": (lambda path: picture().save(path, quality=95), COLOUR),
    "plain.bmp": (lambda path: picture().save(path), COLOUR),
    "cmyk.tiff": (lambda path: picture().convert("CMYK").save(path), COLOUR),
    "jpeg_called.png": (lambda path: picture().save(path, "JPEG", quality=95), COLOUR),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image(tmp_path, name):
    make, (left, right) = KINDS[name]
    make(tmp_path / name)
    pixels = load_views(tmp_path / name, 224)[0].astype(int)
    assert pixels.shape == (224, 224, 3)
    assert np.abs(pixels[60, 50] - left).max() <= 12 and np.abs(pixels[60, 170] - right).max() <= 12


def test_a_photo_of_an_iphone(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="requirements-heic.txt is not installed")
    heif.from_pillow(picture()).save(tmp_path / "beach.heic", quality=95)
    (pixels,) = load_views(tmp_path / "beach.heic", 224).astype(int)
    assert np.abs(pixels[60, 50] - COLOUR[0]).max() <= 12 and np.abs(pixels[60, 170] - COLOUR[1]).max() <= 12


def test_what_a_photo_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "IMAGE_FORMATS", ("JPEG", "PNG"))
    for name, advice in (("beach.heic", "requirements-heic.txt"), ("beach.avif", "newer Pillow")):
        path = tmp_path / name
        path.write_bytes(b"\0\0\0\x18ftyp" + path.suffix[1:].encode() + bytes(12))
        for source in (path, io.BytesIO(path.read_bytes())):
            with pytest.raises(UnreadableImage, match=f"{path.suffix[1:].upper()} needs a.*{advice}"):
                load_views(source, 224)
    assert [path.name for path in images_below(tmp_path, [])] == ["beach.avif", "beach.heic"]
    (tmp_path / "text.heic").write_text("no picture at all")
    with pytest.raises(UnreadableImage, match="cannot identify"):
        load_views(tmp_path / "text.heic", 224)


def test_what_images_means(photos, monkeypatch):
    def names(*entries: str) -> list[str]:
        return [path.as_posix() for path in find_photos(entries)[0]]

    assert names("photos") == ["photos/p01.jpg", "photos/p02.jpg", "photos/below/p03.jpg"]
    assert names("photos/p0[12].jpg") == ["photos/p01.jpg", "photos/p02.jpg"]
    assert names("**/*.jpg") == ["photos/below/p03.jpg", "photos/p01.jpg", "photos/p02.jpg"]
    assert names("photos/p02.jpg", "photos") == ["photos/p02.jpg", "photos/p01.jpg", "photos/below/p03.jpg"]
    (photos / "[1].jpg").write_bytes(b"")  # a name that reads as a pattern is a name first
    assert names("photos/[1].jpg") == ["photos/[1].jpg"]
    listed = "photos/p02.jpg\nabsent.jpg\n\nphotos/below\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
    found, problems = find_photos(["-"])
    assert [path.name for path in found] == ["p02.jpg", "p03.jpg"]
    assert problems == ["absent.jpg: no such file or folder"]
    with pytest.raises(UserError, match="absent.jpg is not there"):
        find_photos(["absent.jpg"])
    with pytest.raises(UserError, match="no/such"):
        find_photos(["no/such/*.jpg"])


def test_a_folder_that_leads_back_to_itself_ends(photos):
    (photos / "below" / "round").symlink_to(photos)
    assert len(list(images_below("photos", []))) == 3


def test_images_are_read_a_batch_ahead_and_no_more(tiny_runs, monkeypatch):
    read = []
    monkeypatch.setattr("captioning.captioner.IMAGES_TOGETHER", 4)
    monkeypatch.setattr(encoders, "load_views", lambda path, *how: read.append(path) or load_views(path, *how))
    results = Captioner.load(tiny_runs["attention"]).caption(list(images_below(tiny_runs["data"], [])), beam_size=1)
    next(results)
    assert len(set(read)) <= 8
    assert sum(1 for _ in results) == 19 and len(set(read)) == 20


def test_a_tuned_checkpoint_is_decoded_as_it_was_tuned(tiny_runs):
    model = Captioner.load(tiny_runs["lstm"])

    def decoding(*flags: str) -> tuple:
        typed = trainer.parse_flags(["--mode", "caption", "--model_path", "x", "--images", "y", *flags])
        return model.decoding(**given_options(typed))

    assert decoding() == (3, 0.7, 1, 3, None, "on") == decoding("--beam_size", "3")
    assert decoding("--num_captions", "4", "--no_repeat_ngram", "2") == (4, 0.7, 4, 2, None, "on")
    model.tuned = {"beam_size": 5, "length_penalty": 1.1, "cider": 0.5, "images": 3}
    assert decoding()[:2] == (5, 1.1) and decoding("--beam_size", "2")[:2] == (2, 1.1)


def test_asking_for_more_captions_changes_nothing_about_the_best(tiny_runs):
    model = Captioner.load(tiny_runs["attention"])
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 49, 1280)).astype(np.float32))
    one = beam_search(Ensemble([(model.model.decoder, features)]), 5, 12)
    five = beam_search(Ensemble([(model.model.decoder, features)]), 5, 12, num_hypotheses=5)
    for few, many in zip(one, five, strict=True):
        assert few[0].ids == many[0].ids and len(many) > 1
        assert [h.score for h in many] == sorted((h.score for h in many), reverse=True)


def test_mistakes_are_one_line(tiny_runs, photos, capsys):
    run = tiny_runs["attention"]
    (photos / "empty").mkdir()
    for model, flags, message in (
        (run, ["--images", "absent.jpg"], "absent.jpg is not there"),
        (run, ["--images", "photos/empty"], "names no image at all"),
        (run, ["--images", "photos", "--output", "captions.txt"], ".csv or .jsonl"),
        (run, ["--images", "photos", "--output", "absent/captions.csv"], "cannot write"),
        (Path("absent.pt"), ["--images", "photos"], "is not there"),
        (photos / "notes.txt", ["--images", "photos"], "cannot be read as a checkpoint"),
    ):
        assert caption(model, *flags) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


def test_drawn_captions_are_varied_and_the_same_for_a_seed(tiny_runs, photos, capsys):
    run, flags = tiny_runs["attention"], ["--num_captions", "8", "--top_p", "0.99"]
    lines = []
    for seed in ("1", "1", "2"):
        assert caption(run, "--images", "photos/p01.jpg", *flags, "--seed", seed) == 0
        lines.append(capsys.readouterr().out.splitlines())
    assert lines[0] == lines[1] != lines[2]
    assert 1 < len(lines[0]) <= 8 and len(set(lines[0])) == len(lines[0])
    assert caption(run, "--images", "photos/p01.jpg", "--top_p", "0.0001") == 0
    drawn = capsys.readouterr().out  # one word is the nucleus: the greedy caption
    assert caption(run, "--images", "photos/p01.jpg", "--beam_size", "1") == 0
    assert capsys.readouterr().out == drawn
