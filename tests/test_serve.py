"""The page of `--mode serve`: its answers, hostile requests, signals."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from page_server import ask, flags, page_of, serve, serving
from PIL import Image
from run_files import png_of

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.captioner import Captioner, Decoding
from captioning.io import UserError
from captioning.modes.caption import json_lines

FILES_WRITTEN: list[str] = []  # by threads of the server
PLACES_ASKED: list[str] = []  # hosts that any thread connected to or looked up


def watch(event: str, values: tuple) -> None:
    """An audit hook, which sees files without a name, too."""
    if event == "open" and threading.current_thread() is not threading.main_thread():
        if isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            FILES_WRITTEN.append(str(values[0]))
    elif event in ("socket.connect", "socket.getaddrinfo"):
        address = values[1] if event == "socket.connect" else values
        if isinstance(address, tuple):
            PLACES_ASKED.append(str(address[0]))


@pytest.fixture(scope="module")
def page(model, tiny_runs):
    """The page's address. No request may write a file, and none may leave this machine."""
    sys.addaudithook(watch)
    thread = threading.Thread(target=lambda: tempfile.TemporaryFile().close())
    thread.start()
    thread.join()
    assert FILES_WRITTEN  # the hook sees such a file
    for seen in (FILES_WRITTEN, PLACES_ASKED):  # an audit hook cannot be taken away: it sees other modules' tests
        seen.clear()
    with page_of(model, tiny_runs) as address:
        yield address
    assert not FILES_WRITTEN
    assert set(PLACES_ASKED) <= {"127.0.0.1", "localhost", "192.0.2.1"}  # the last one by `test_ports`, to listen there


def wait_for(happened) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


# --------------------------------------------------------------------------------------------------
# The answer


def test_the_answer_is_the_command_lines(page, model, photo):
    (line,) = json_lines([model(photo, beam_size=4, length_penalty=0.7, num_captions=3)], 3)
    expected = {key: value for key, value in json.loads(line).items() if key != "path"}
    query = "?beam_size=4&length_penalty=0.7&num_captions=3"
    assert ask(page, photo.read_bytes(), query).json() == expected
    with photo.open("rb") as file:
        assert ask(page, None, query, files={"image": ("../../p03.jpg", file)}).json() == expected
    answer = ask(page, photo.read_bytes(), f"{query}&maps=true").json()
    for part in (answer, *answer["alternatives"]):
        assert [word["word"] for word in part["words"]] == part["caption"].split()
        for word in part["words"]:
            assert decoded(word.pop("map")).size == (serve.MAP_SIZE, serve.MAP_SIZE)
    for other in answer["alternatives"]:
        del other["words"]
    assert decoded(answer.pop("photo")).size == (60, 40) and answer == expected


def decoded(address: str) -> Image.Image:
    assert address.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_an_lstm_has_a_caption_and_no_maps(tiny_runs, photo):
    answer = serve.caption_upload(Captioner.load(tiny_runs["lstm"]), photo.read_bytes(), True, {"num_captions": 2})
    assert {key for word in answer["alternatives"][0]["words"] for key in word} == {"word", "probability"}


def test_a_map_is_strongest_where_the_model_looked():
    weights = np.full(49, 0.01)
    weights[7 * 2 + 5] = 0.52  # third row, sixth column
    alpha = np.asarray(serve.map_of(weights))[..., 3]
    row, column = np.unravel_index(alpha.argmax(), alpha.shape)
    assert 2 <= row / serve.MAP_SIZE * 7 <= 3 and 5 <= column / serve.MAP_SIZE * 7 <= 6


def test_files_that_cannot_be_captioned_get_a_sentence(page, photo):
    for body, expected in (
        (photo.read_bytes()[:-100], "damaged"), (b"", "not an image"), (b"hello", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"), (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image"),
        (png_of(8000, 8001), "64 million pixels"), (png_of(60000, 60000), "64 million pixels"), (png_of(8000, 8000), "damaged"),
    ):  # fmt: skip
        answer = ask(page, body)
        assert answer.status_code == 415 and expected in answer.json()["detail"]
    for query in ("?beam_size=0", "?beam_size=11", "?length_penalty=nan", "?num_captions=1000000"):
        assert ask(page, photo.read_bytes(), query).status_code == 422


# --------------------------------------------------------------------------------------------------
# Routes


def test_all_routes(page, model):
    text = requests.get(page, timeout=20).text
    app = serve.build_app(model, text, "127.0.0.1", model.decoding())
    routes = {(route.path, *sorted(route.methods)) for route in app.routes}
    assert routes == {("/", "GET"), ("/health", "GET"), ("/caption", "POST"), ("/openapi.json", "GET", "HEAD")}
    assert requests.get(f"{page}health", timeout=20).json()["status"] == "ok"
    assert set(requests.get(f"{page}openapi.json", timeout=20).json()["paths"]) == {"/health", "/caption"}
    for path in ("docs", "redoc", "config", "caption/", "favicon.ico", "static/index.html"):
        assert requests.get(f"{page}{path}", timeout=20).status_code == 404
    assert requests.get(f"{page}caption", timeout=20).status_code == 405
    assert not re.search(r"https?:|//\w+\.", text.partition("<script>")[0])  # the page names no other server
    for reply in (requests.get(page, timeout=20), requests.get(f"{page}nothing", timeout=20)):
        policy = reply.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ") and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "*" not in policy
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Referrer-Policy"] == "no-referrer" and "server" not in reply.headers
    assert not any(app._telemetry[kind] for kind in ("tracing", "metrics", "logs", "auto_configure"))


def test_no_request_reaches_a_file_of_this_machine(page, photo, tmp_path):
    shutil.copy(photo, tmp_path / "private.jpg")
    for path in (str(tmp_path / "private.jpg"), os.path.relpath(tmp_path / "private.jpg"), "/etc/passwd"):
        assert requests.get(f"{page}file={path}", timeout=20).status_code == 404
        assert ask(page, json.dumps({"data": [{"path": path}]})).status_code == 415
        assert ask(page, None, files={"image": (path, b"")}).status_code == 415
        assert ask(page, {"image": path}).status_code == 415
        assert ask(page, None, f"?image={path}&path={path}").status_code == 415
    for target in ("/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/..%2f..%2fserve.py"):
        connection = http.client.HTTPConnection(page[7:-1], timeout=20)
        connection.request("GET", target)
        reply = connection.getresponse()
        assert reply.status == 404 and reply.read() == b'{"detail":"Not Found"}'
        connection.close()


@pytest.mark.parametrize(
    "host", ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "[::1", "2130706433", "")
)
def test_foreign_hosts_are_refused(page, host):
    """DNS rebinding: a site lets its own name point to 127.0.0.1."""
    assert requests.get(page, headers={"Host": host}, timeout=20).status_code == 400
    assert ask(page, b"x", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 400


def test_foreign_origins_are_refused(page, photo):
    own = page[:-1]
    for origin in ("http://evil.example", "null", "", "http://127.0.0.1:1", f"{own}.evil.example", "file://", own[:-1]):
        with photo.open("rb") as file:
            assert ask(page, None, files={"image": file}, headers={"Origin": origin}).status_code == 403
    assert ask(page, photo.read_bytes(), headers={"Origin": own}).status_code == 200
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = requests.options(f"{page}caption", headers=preflight, timeout=20)
    assert answer.status_code == 405 and "Access-Control-Allow-Origin" not in answer.headers


def test_which_names_are_this_machines():
    def allowed(host: str, name: str) -> bool:
        app = serve.TrustedHostMiddleware(None, serve.trusted_hosts(host))
        return name in app.allowed_hosts or any(name.endswith(each[1:]) for each in app.allowed_hosts if each[0] == "*")

    assert all(allowed("127.0.0.1", name) for name in ("localhost", "127.0.0.1", "[::1]"))
    assert not any(allowed("127.0.0.1", name) for name in ("192.168.1.7", "evil.example", "0.0.0.0"))
    assert allowed("box.local", "box.local") and allowed("::1", "[::1]") and allowed("192.168.1.7", "192.168.1.7")
    assert allowed("0.0.0.0", "192.168.1.7") and allowed("0.0.0.0", socket.gethostname().lower())
    assert not any(allowed("0.0.0.0", name) for name in ("evil.example", "evil.0x7f", "1.2.3.4.evil.example"))


# --------------------------------------------------------------------------------------------------
# Bounds


def raw(page: str) -> socket.socket:
    host, _, port = page[7:-1].partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_bodies_are_bounded(page, monkeypatch):
    head = b"POST /caption HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    with raw(page) as connection:  # refused by what it announces
        connection.sendall(head + b"Content-Length: 1000000000000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    monkeypatch.setattr(serve, "MAX_BYTES", 300_000)
    pieces = [b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n', *[bytes(60_000)] * 6]
    for kind in (b"image/jpeg", b"multipart/form-data; boundary=b"):  # without an end
        with raw(page) as connection:
            connection.sendall(head + b"Content-Type: " + kind + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
            for piece in pieces:
                connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.1)
    for start in (b"", b"x" * 10):  # sent slowly
        with raw(page) as connection:
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n" + start)
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert requests.get(f"{page}health", timeout=20).status_code == 200


def test_large_forms_stay_in_memory(page, photo):
    """Starlette's own parser writes a file above 1 MB to the disk: `page` counts the files that are opened."""
    large = photo.read_bytes() + bytes(3_000_000)  # what follows a JPEG is ignored
    assert ask(page, None, files={"image": large}).status_code == 200
    assert FILES_WRITTEN == []


def test_damaged_forms(page, photo):
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x.jpg"\r\n\r\n'
    for body in (b"", b"--b", part, b"--b\r\n\r\n\r\n--b--", part + b"\r\n" + part + b"\r\n--b--", b"x" * 1000):
        assert ask(page, body, headers=kind).status_code == 400
    assert ask(page, b"x", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    assert ask(page, None, files=[(f"name{number}", b"x") for number in range(99)]).status_code == 400


@pytest.fixture
def held(monkeypatch):
    """An event that captioning waits for, and the requests that have got so far."""
    release, started, caption = threading.Event(), [], serve.caption_upload

    def wait_and_caption(*values):
        started.append(values)
        assert release.wait(20)
        return caption(*values)

    monkeypatch.setattr(serve, "caption_upload", wait_and_caption)
    return release, started


def test_fifty_at_once(page, photo, held):
    """One is captioned, eight wait, the others are told to come again; the page answers meanwhile."""
    (release, started), refused = held, 50 - 1 - serve.WAITING
    with ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(ask, page, photo.read_bytes()) for _ in range(50)]
        wait_for(lambda: sum(each.done() for each in asked) == refused)
        assert requests.get(f"{page}health", timeout=5).status_code == 200 and len(started) == 1
        release.set()
        answers = [each.result() for each in asked]
    assert sorted(answer.status_code for answer in answers) == [200] * (1 + serve.WAITING) + [503] * refused
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in answers if answer.status_code == 503)


# --------------------------------------------------------------------------------------------------
# Start and end


def test_ports(monkeypatch):
    with serve.open_socket("127.0.0.1", None) as first:
        port = first.getsockname()[1]
        assert port >= serve.FIRST_PORT
        with serve.open_socket("127.0.0.1", None) as second:
            assert second.getsockname()[1] > port
        with pytest.raises(UserError, match=f"port {port}: another program"):
            serve.open_socket("127.0.0.1", port)
    with pytest.raises(UserError, match="not one of this machine's"):
        serve.open_socket("192.0.2.1", None)


def test_examples_are_test_images_or_none(model, tiny_runs, tmp_path):
    examples = serve.find_examples(model, flags(tiny_runs))
    assert {path.name for path in examples} == set(model.split["test"]["names"])
    (tmp_path / "damaged.jpg").write_bytes(b"x")
    text = serve.build_page(model, [tmp_path / "damaged.jpg", *examples], model.decoding())
    assert text.count('alt="Example ') == len(examples)
    with pytest.raises(UserError, match="no captions file"):
        serve.find_examples(model, flags(tiny_runs, "--data_dir", str(tmp_path)))


def test_names_from_a_checkpoint_are_text():
    flags = {"decoder": "lstm", "encoder": "<script>alert(1)</script>{{examples}}", "dataset_type": '"onload="x'}
    text = serve.build_page(SimpleNamespace(flags=flags, epoch=1), [], Decoding(3, 0.7, 1, 0, None, "on"))
    assert text.count("<script") == 1 and '"onload' not in text


def test_without_fastapi_the_error_names_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "captioning.modes.serve")
    monkeypatch.delattr("captioning.modes.serve")
    assert trainer.main(["--mode", "serve", "--model_path", "x"]) == 2
    assert "pip install -r requirements-serve.txt" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no signals that a process sends to itself")
@pytest.mark.parametrize(
    "name, moment", (("SIGINT", "idle"), ("SIGTERM", "nohup"), ("SIGHUP", "captioning"), ("SIGHUP", "receiving"))
)
def test_signals_end_the_page_at_any_time(tiny_runs, model, photo, caplog, capsys, monkeypatch, name, moment):
    def end() -> None:
        os.kill(os.getpid(), getattr(signal, name))

    def caption_and_end(*values):
        if moment == "captioning" and values[-1]:  # a request: the warm-up has no options here
            end()
            time.sleep(0.2)
        return caption(*values)

    def answers() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{address}health", timeout=20).ok
        return False

    def visit() -> None:
        wait_for(answers)
        if moment == "captioning":
            assert ask(address, photo.read_bytes()).status_code == 200
            return
        if moment == "nohup":
            os.kill(os.getpid(), signal.SIGHUP)
        assert answers()
        with raw(address) as connection:
            if moment == "receiving":
                connection.sendall(b"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
                time.sleep(0.1)
            end()
            with contextlib.suppress(ConnectionError):
                connection.recv(1)

    caption = serve.caption_upload
    with serve.open_socket("127.0.0.1", None) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    monkeypatch.setattr(serve, "Captioner", SimpleNamespace(load=lambda *_, **__: model))
    monkeypatch.setattr(serve, "caption_upload", caption_and_end)
    if moment == "receiving":
        monkeypatch.setattr(serve, "END_SECONDS", 0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if moment == "nohup" else signal.SIG_DFL)
    with ThreadPoolExecutor(1) as pool:
        visited = pool.submit(visit)
        assert trainer.main(["--mode", "serve", "--model_path", str(tiny_runs["attention"]), "--port", str(port)]) == 0
        visited.result()
    signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().out.endswith("\nThe page is closed.\n")
    assert not [record for record in caplog.records if record.exc_info]


def test_captions_are_found_as_the_command_line_says(model, monkeypatch, photo):
    given = {"beam_size": 4, "length_penalty": 0.5, "no_repeat_ngram": 2, "consensus": "off"}
    how, asked, caption = model.decoding(**given), [], serve.caption_upload
    monkeypatch.setattr(serve, "caption_upload", lambda *words: asked.append(words[-1]) or caption(*words))
    text = serve.build_page(model, [], how)
    with serving(serve.build_app(model, text, "127.0.0.1", how), text) as address:
        assert ask(address, photo.read_bytes()).ok
    assert asked == [given | {"num_captions": 1}]
