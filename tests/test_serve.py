"""The page of `--mode serve`: what it answers, and the page itself in a real browser where there is one."""

import re
import shutil
import socket
import sys

import numpy as np
import pytest
import requests
from PIL import Image

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.captioner import Caption, Captioner
from captioning.io import UserError

serve = pytest.importorskip("captioning.modes.serve", reason="gradio is not installed", exc_type=UserError)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_CHATTER = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_runs) -> Captioner:
    return Captioner(tiny_runs["attention"])


@pytest.fixture(scope="module")
def page(model, tiny_runs, tmp_path_factory):
    """The page's address, served from here; leaving this machine fails the test that does it."""
    places = []
    connect = socket.socket.connect

    def watched(self, address):
        places.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        args, _ = trainer.parse_flags(["--mode", "serve", "--model_path", str(tiny_runs["attention"])])
        blocks = serve.build_page(model, serve.find_examples(model, args), 3, 0.7)
        yield serve.start_page(blocks, "127.0.0.1", None)
        assert all(place[0] in ("127.0.0.1", "localhost", "::1") for place in places if isinstance(place, tuple)), (
            places
        )
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser on this machine (looked for {', '.join(BROWSERS)})")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=program, args=list(NO_CHATTER))
        yield opened
        opened.close()


# --------------------------------------------------------------------------------------------------
# The answer


def test_wrong_files_get_a_message(model, tiny_runs, tmp_path, monkeypatch):
    whole = (tiny_runs["data"] / "Images" / "p01.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[:-100])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    Image.new("1", (9000, 9000)).save(tmp_path / "many.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    for name, expected in (
        ("half.jpg", "damaged"), ("text.jpg", "is no picture"), ("drawing.svg", "is no picture"),
        ("script.jpg", "is no picture"), ("many.png", "64 million pixels"), ("bomb.png", "64 million pixels"),
    ):  # fmt: skip
        said = serve.answer(model, str(tmp_path / name), 3, 0.7)
        assert expected in said and 'role="alert"' in said and str(tmp_path) not in said
    monkeypatch.setattr(serve, "MAX_BYTES", 100)
    assert "larger than 100 B" in serve.answer(model, str(tmp_path / "half.jpg"), 3, 0.7)


def test_a_photo_gets_the_caption_of_the_command_line(model, tiny_runs):
    path = tiny_runs["data"] / "Images" / "p03.jpg"
    said = serve.answer(model, str(path), 4, 0.7)
    (result,) = model.caption([path], 4, 0.7, 4)
    lines = re.findall(r'<p class="caption">(.*?)</p>|<li>(.*?)</li>', said)
    texts = [" ".join(re.sub("<span.*|<[^>]*>", " ", first or other).split()) for first, other in lines]
    assert texts == [caption.text for caption in result.captions if caption.words] and len(texts) > 1
    assert said.count('class="map"') == sum(len(caption.words) for caption in result.captions)


def test_an_lstm_has_a_caption_and_no_maps(tiny_runs):
    said = serve.answer(Captioner(tiny_runs["lstm"]), str(tiny_runs["data"] / "Images" / "p03.jpg"), 3, 0.7)
    assert 'class="caption"' in said and "no attention" in said and 'class="map"' not in said


def test_a_strangers_words_are_text():
    words = ["<script>alert(1)</script>", "${1+1}", "{{value}}", '"onload="x']
    attention = np.full((4, 49), 1 / 49)
    for looked in (attention, None):
        said = serve.show(Image.new("RGB", (30, 20)), [Caption(words, -1.0, looked)])
        assert "<script" not in said and "${" not in said and "{{" not in said and '"onload' not in said


def test_a_map_is_strongest_where_the_model_looked():
    weights = np.full(49, 0.01)
    weights[7 * 2 + 5] = 0.52  # third row, sixth column
    alpha = np.asarray(serve.map_of(weights))[..., 3]
    row, column = np.unravel_index(alpha.argmax(), alpha.shape)
    assert 2 <= row / serve.MAP_SIZE * 7 <= 3 and 5 <= column / serve.MAP_SIZE * 7 <= 6


# --------------------------------------------------------------------------------------------------
# The server


def test_the_page_is_this_machines_alone(page):
    assert page.startswith("http://127.0.0.1:")
    config = requests.get(f"{page}config", timeout=20).json()
    assert config["analytics_enabled"] is False and not config.get("footer_links")
    assert requests.get(f"{page}gradio_api/info", timeout=20).json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    other = "http://somewhere.example"
    answered = requests.get(f"{page}config", headers={"Origin": other}, timeout=20)
    assert answered.headers.get("Access-Control-Allow-Origin") not in ("*", other)


def test_uploads_are_bounded(page):
    upload = {"files": ("big.jpg", b"x" * (serve.MAX_BYTES + 1), "image/jpeg")}
    answered = requests.post(f"{page}gradio_api/upload", files=upload, timeout=60)
    assert answered.status_code == 413


@pytest.mark.parametrize("path", ("/etc/passwd", "https://somewhere.example/photo.jpg"))
def test_neither_files_nor_addresses_can_be_asked_for(page, path):
    config = requests.get(f"{page}config", timeout=20).json()
    (number,) = (each["id"] for each in config["dependencies"] if len(each["targets"]) == 3)
    photo = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answered = requests.post(
        f"{page}gradio_api/run/predict",
        json={"data": [photo, 3, 0.7], "fn_index": number, "session_hash": "x"},
        timeout=20,
    )
    assert answered.status_code == 500 and "caption" not in answered.text
    assert requests.get(f"{page}gradio_api/file={path}", timeout=20).status_code in (403, 404)


def test_a_taken_port_is_one_message(page, model):
    port = int(page.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"port {port}: another program"):
        serve.start_page(serve.build_page(model, [], 3, 0.7), "127.0.0.1", port)


def test_examples_are_test_images_or_none(model, tiny_runs, capsys, tmp_path):
    args, _ = trainer.parse_flags(["--mode", "serve", "--model_path", str(tiny_runs["attention"])])
    assert {path.name for path in serve.find_examples(model, args)} == set(model.split["test"])
    args.data_dir = tmp_path
    with pytest.raises(UserError, match="no captions file"):
        serve.find_examples(model, args)


def test_without_gradio_the_error_names_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "serve")
    assert trainer.main(["--mode", "serve", "--model_path", "x"]) == 2
    assert "pip install -r requirements-serve.txt" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# In a browser


def opened(browser, page, **options):
    """The page in a new window, and what it asked for that is not on this machine."""
    window = browser.new_page(**options)
    elsewhere: list[str] = []
    window.on(
        "request",
        lambda request: elsewhere.append(request.url) if not request.url.startswith((page, "data:", "blob:")) else None,
    )
    window.goto(page)
    window.wait_for_selector("#photo input[type=file]", state="attached")
    return window, elsewhere


@pytest.mark.parametrize("width, scheme", ((1280, "light"), (390, "dark")))
def test_upload_a_photo_and_look_at_its_words(browser, page, model, tiny_runs, width, scheme):
    path = tiny_runs["data"] / "Images" / "p03.jpg"
    window, elsewhere = opened(
        browser, page, viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=width < 500
    )
    window.set_input_files("#photo input[type=file]", path)
    window.wait_for_selector("#result .caption", timeout=30_000)
    (result,) = model.caption([path], 3, 0.7)
    assert window.locator("#result .caption").inner_text().split() == result.captions[0].words
    photo, words = window.locator("#result .photo"), window.locator("#result .caption .word")
    assert photo.evaluate("image => image.naturalWidth / image.naturalHeight") == pytest.approx(60 / 40)
    maps = window.locator("#result .caption .map")
    assert maps.count() == len(result.captions[0].words)

    def shown() -> list[int]:
        window.wait_for_timeout(400)  # they fade in
        return [n for n in range(maps.count()) if maps.nth(n).evaluate("map => getComputedStyle(map).opacity") == "1"]

    assert shown() == []
    words.nth(1).tap() if width < 500 else words.nth(1).hover()
    assert shown() == [1]
    assert maps.nth(1).bounding_box() == photo.bounding_box()
    words.nth(0).click()
    assert shown() == [0]
    window.mouse.move(0, 0)
    assert shown() == [0]  # a clicked word stays
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    dark = window.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", dark)[:3])) < 60) == (scheme == "dark")
    assert elsewhere == []
    window.close()


def test_wrong_files_examples_and_sliders_in_the_browser(browser, page, tmp_path):
    window, elsewhere = opened(browser, page, viewport={"width": 1280, "height": 900})
    (tmp_path / "text.jpg").write_text("hello")
    window.set_input_files("#photo input[type=file]", tmp_path / "text.jpg")
    assert "is no picture" in window.locator("#result .problem").inner_text(timeout=30_000)
    window.locator(".gallery-item, .gallery button, table tr button").first.click()
    window.wait_for_selector("#result .caption", timeout=30_000)
    assert window.locator("#result li").count() == 2  # a beam of three
    slider = window.locator("#beam input[type=range]")
    slider.focus()
    slider.fill("1")
    slider.dispatch_event("pointerup")
    window.locator("#result li").first.wait_for(state="detached", timeout=30_000)
    assert window.locator("#result .caption").count() == 1 and elsewhere == []
    window.close()
