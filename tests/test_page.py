"""The page of `--mode serve` in a browser, where there is one."""

import base64
import re
import shutil

import pytest
from page_server import ask, page_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_CHATTER = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"


@pytest.fixture(scope="module")
def page(model, tiny_runs):
    with page_of(model, tiny_runs) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser on this machine (looked for {', '.join(BROWSERS)})")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=program, args=NO_CHATTER.split())
        yield opened
        opened.close()


@pytest.fixture
def window(browser, page):
    """Opens the page; what it asked for elsewhere, and what its console complains about, fails the test."""
    complaints: list[str] = []
    windows = []

    def open_page(**options):
        opened = browser.new_page(**options)
        opened.on("request", lambda asked: complaints.append(asked.url))
        opened.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.set_default_timeout(10_000)
        opened.goto(page)
        windows.append(opened)
        return opened

    yield open_page
    for opened in windows:
        opened.close()
    # A refused photo is a failed request, of which Chromium itself writes a line.
    assert [line for line in complaints if not line.startswith((page, "data:", "blob:")) and "of 415" not in line] == []


def shown_map(opened) -> str | None:
    """The address of the map over the photo, if there is one."""
    return opened.evaluate("view.classList.contains('mapped') ? document.querySelector('#map').src : null")


@pytest.mark.parametrize("width, scheme", ((1280, "light"), (390, "dark")))
def test_upload_a_photo_and_look_at_its_words(window, page, model, photo, width, scheme):
    phone = width < 500
    opened = window(viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=phone, is_mobile=phone)
    opened.set_input_files("#file", photo)
    opened.wait_for_selector("#caption .word")
    result = model(photo, num_captions=3)
    assert opened.inner_text("#caption").split() == result.text.split()
    assert opened.locator("#others li").count() == len([each for each in result.alternatives if each.words])
    answer = ask(page, photo.read_bytes(), "?beam_size=3&num_captions=3&maps=true").json()
    maps, words = [word["map"] for word in answer["words"]], opened.locator("#caption .word")
    assert words.count() == len(maps) and shown_map(opened) is None
    words.nth(1).tap() if phone else words.nth(1).hover()
    assert shown_map(opened) == maps[1]
    words.nth(0).click()
    assert shown_map(opened) == maps[0]
    opened.mouse.move(0, 0)
    assert shown_map(opened) == maps[0]  # a clicked word stays
    assert opened.locator("#map").bounding_box() == opened.locator("#photo").bounding_box()
    words.nth(0).click()
    opened.mouse.move(0, 0)
    opened.evaluate("document.activeElement.blur()")
    opened.wait_for_function("!view.classList.contains('mapped')")

    assert opened.locator("img:visible:not(#map):not(#pictures img)").count() == 1  # one photo
    assert "probability" not in opened.inner_text("body") and not re.search(r"-\d", opened.inner_text("#result"))
    places = [opened.locator(name).bounding_box() for name in ("#photo", "#caption", "#examples", "#settings")]
    assert [place["y"] for place in places[1:]] == sorted(place["y"] for place in places[1:])
    assert places[1]["y"] + places[1]["height"] < 844  # the caption is seen without scrolling
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    color = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", color)[:3])) < 60) == (scheme == "dark")


def test_files_examples_and_settings_by_the_keyboard(window, tmp_path):
    opened = window(viewport={"width": 1280, "height": 900})
    (tmp_path / "text.jpg").write_text("hello")
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "file"
    opened.set_input_files("#file", tmp_path / "text.jpg")
    opened.wait_for_selector("#problem:visible")
    assert "not an image" in opened.inner_text("[role=alert]") and not opened.is_visible("#photo")
    opened.locator("#pictures button").first.focus()
    opened.keyboard.press("Enter")
    opened.wait_for_selector("#caption .word")
    assert not opened.is_visible("#problem") and opened.is_visible("#photo")
    assert opened.inner_text("[role=status]").startswith(f"Caption: {' '.join(opened.inner_text('#caption').split())}")
    assert opened.locator("#others li").count() == 2  # a beam of three
    words = opened.locator("#caption .word")
    opened.locator("#file").focus()
    opened.keyboard.press("Tab")
    assert words.first.evaluate("word => word === document.activeElement")
    first = shown_map(opened)
    opened.keyboard.press("Tab")
    assert None not in (first, shown_map(opened)) and first != shown_map(opened)
    opened.keyboard.press("Enter")
    assert words.nth(1).get_attribute("aria-pressed") == "true"
    opened.keyboard.press("Escape")
    assert words.nth(1).get_attribute("aria-pressed") == "false"
    opened.locator("#beam").focus()
    opened.keyboard.press("Home")  # one
    opened.locator("#others").wait_for(state="hidden")
    assert opened.locator("#settings output").all_inner_texts() == ["1", "0.7"]
    assert opened.get_by_label("Length penalty").get_attribute("type") == "range"


def test_drop_and_paste(window, photo):
    opened = window()
    encoded = base64.b64encode(photo.read_bytes()).decode()
    for event, kind, field in (("drop", "DragEvent", "dataTransfer"), ("paste", "ClipboardEvent", "clipboardData")):
        opened.reload()
        opened.evaluate(
            """([encoded, event, kind, field]) => {
                const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
                const moved = new DataTransfer();
                moved.items.add(new File([bytes], "photo.jpg", { type: "image/jpeg" }));
                document.body.dispatchEvent(new window[kind](event, { [field]: moved, bubbles: true, cancelable: true }));
            }""",
            [encoded, event, kind, field],
        )
        opened.wait_for_selector("#caption .word")


def test_words_of_a_stranger_are_text(window, photo):
    opened = window()
    evil = "<img src=x onerror=alert(1)>"
    peak = {"row": 0, "column": 0, "x": 0.1, "y": 0.1, "weight": 0.5}
    address = f"data:image/jpeg;base64,{base64.b64encode(photo.read_bytes()).decode()}"
    answer = {
        "caption": evil, "words": [{"word": evil, "probability": 0.5, "peak": peak, "map": address}], "photo": address,
        "alternatives": [{"caption": evil}],
    }  # fmt: skip
    opened.route("**/caption?*", lambda route: route.fulfill(json=answer))
    opened.set_input_files("#file", photo)
    opened.wait_for_selector("#caption .word")
    assert opened.inner_text("#caption .word") == opened.inner_text("#others li") == evil
    assert opened.locator("#result img").count() == 0
