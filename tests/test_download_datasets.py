"""Downloading and unpacking against servers and archives that misbehave; nothing leaves this machine."""

import contextlib
import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from filelock import FileLock
from PIL import Image

import download_datasets
from captioning import fetch
from captioning.fetch import BadArchive, DownloadError, extract_archive
from captioning.io import UserError
from download_datasets import Mirror, Part, Source, download, main

BODY = bytes(range(256)) * 40


class Server:
    """A file server on 127.0.0.1; `routes[path]` is how a request is answered, `requests` what was asked for."""

    def __init__(self) -> None:
        self.routes: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.requests: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, self.headers.get("Range")))
                outer.routes.get(self.path, lambda handler: handler.send_error(404))(self)

            do_CONNECT = do_GET  # what an https request through a proxy begins with

            def log_message(self, format: str, *args: object) -> None:
                """Quiet: the requests are recorded above."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}{path}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def answer(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def serve(body: bytes, break_at: int | None = None, ranges: bool = True) -> Callable[[BaseHTTPRequestHandler], None]:
    """A sound server, or one whose first answers stop after `break_at` bytes."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        fits = handler.headers.get("If-Range", etag) == etag
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) if ranges and fits else None
        start = int(match[1]) if match else 0
        if match and start >= len(body):
            return answer(handler, b"", 416, Content_Range=f"bytes */{len(body)}")
        span = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if match else {}
        sent = body[start:] if break_at is None or match else body[:break_at]
        answer(handler, sent, 206 if match else 200, Content_Length=str(len(body) - start), ETag=etag, **span)

    return respond


def mirror(*urls: str, body: bytes | None = BODY, size: int = 20_000, file: str = "file.bin") -> Mirror:
    return Mirror(file, urls, size, None if body is None else f"sha256:{hashlib.sha256(body).hexdigest()}")


# --------------------------------------------------------------------------------------------------
# Transfers


def test_plain_download(server, tmp_path):
    server.routes["/a"] = serve(BODY)
    assert download(mirror(server.url("/a")), tmp_path).read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_a_file_placed_by_hand_is_used(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(BODY)
    download(mirror(server.url("/a")), tmp_path)
    assert server.requests == []


def test_broken_transfer_is_resumed_with_a_range(server, tmp_path):
    server.routes["/a"] = serve(BODY, break_at=4000)
    assert download(mirror(server.url("/a")), tmp_path).read_bytes() == BODY
    assert server.requests == [("/a", None), ("/a", "bytes=4000-")]


def test_a_later_run_resumes_what_an_earlier_one_left(server, tmp_path):
    (tmp_path / "file.bin.127.0.0.1.part").write_bytes(BODY[:5000])
    server.routes["/a"] = serve(BODY)
    assert download(mirror(server.url("/a")), tmp_path).read_bytes() == BODY
    assert server.requests == [("/a", "bytes=5000-")]


def test_everything_had_arrived_already(server, tmp_path):
    (tmp_path / "file.bin.127.0.0.1.part").write_bytes(BODY)
    server.routes["/a"] = serve(BODY)
    assert download(mirror(server.url("/a")), tmp_path).read_bytes() == BODY


def test_too_much_had_arrived_so_it_starts_anew(server, tmp_path):
    (tmp_path / "file.bin.127.0.0.1.part").write_bytes(BODY + b"rest of another file")
    server.routes["/a"] = serve(BODY)
    assert download(mirror(server.url("/a")), tmp_path).read_bytes() == BODY


def test_server_that_ignores_ranges_sends_all_again(server, tmp_path):
    (tmp_path / "file.bin.127.0.0.1.part").write_bytes(BODY[:5000])
    server.routes["/a"] = serve(BODY, ranges=False)
    assert download(mirror(server.url("/a")), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("polite", [True, False])
def test_a_file_that_changed_meanwhile_is_not_glued_together(server, tmp_path, polite):
    """A polite server heeds If-Range; the other one sends the rest of the new file, which its ETag gives away."""
    old, new = serve(bytes(len(BODY)), break_at=4000), serve(BODY)

    def respond(handler):
        if len(server.requests) == 1:
            return old(handler)
        if not polite:
            del handler.headers["If-Range"]
        return new(handler)

    server.routes["/a"] = respond
    assert download(mirror(server.url("/a"), body=None), tmp_path).read_bytes() == BODY
    assert server.requests[1] == ("/a", "bytes=4000-")
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_without_hash_and_version_nothing_is_glued_on(server, tmp_path):
    (tmp_path / "file.bin.127.0.0.1.part").write_bytes(bytes(5000))
    server.routes["/a"] = serve(BODY)
    assert download(mirror(server.url("/a"), body=None), tmp_path).read_bytes() == BODY
    assert server.requests == [("/a", None)]


def test_wrong_range_is_not_glued_on(server, tmp_path):
    (tmp_path / "file.bin.127.0.0.1.part").write_bytes(BODY[:5000])
    sound = serve(BODY)

    def respond(handler):
        if handler.headers.get("Range"):
            answer(handler, BODY[100:], 206, Content_Range=f"bytes 100-{len(BODY) - 1}/{len(BODY)}")
        else:
            sound(handler)

    server.routes["/a"] = respond
    assert download(mirror(server.url("/a")), tmp_path).read_bytes() == BODY
    assert server.requests == [("/a", "bytes=5000-"), ("/a", None)]


def test_content_length_too_large_is_given_up_after_some_attempts(server, tmp_path):
    server.routes["/a"] = lambda handler: answer(handler, BODY, Content_Length=str(len(BODY) + 9))
    with pytest.raises(DownloadError, match=f"after {fetch.ATTEMPTS} attempts"):
        download(mirror(server.url("/a")), tmp_path)
    assert len(server.requests) == fetch.ATTEMPTS
    assert not (tmp_path / "file.bin").exists()


def test_content_length_too_small_is_caught_by_the_hash(server, tmp_path):
    server.routes["/a"] = lambda handler: answer(handler, BODY, Content_Length="777")
    with pytest.raises(DownloadError, match="wrong bytes"):
        download(mirror(server.url("/a")), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("announced", [True, False])
def test_far_more_than_expected_does_not_fill_the_disk(server, tmp_path, announced):
    def respond(handler):
        if announced:
            return answer(handler, BODY)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(BODY)

    server.routes["/a"] = respond
    with pytest.raises(DownloadError, match="announces" if announced else "sends more"):
        download(mirror(server.url("/a"), size=2000), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wrong_bytes_are_deleted(server, tmp_path):
    server.routes["/a"] = serve(b"a page of a captive portal")
    with pytest.raises(DownloadError, match="wrong bytes.*deleted"):
        download(mirror(server.url("/a")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_server_is_given_up_and_what_it_sent_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "SPEED_WINDOW", 0.1)
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)

    def drip(handler):
        start = int(re.sub(r"\D", "", handler.headers.get("Range", "0")))
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(BODY) - start))
        handler.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        handler.end_headers()
        with contextlib.suppress(OSError):  # the client hangs up
            for number in range(start, start + 500):
                handler.wfile.write(BODY[number : number + 1])
                time.sleep(0.01)

    server.routes["/a"] = drip
    started = time.monotonic()
    with pytest.raises(
        DownloadError, match=r"only \d+ B arrived in 0 seconds; given up after 2 attempts; \d+ B are kept"
    ):
        download(mirror(server.url("/a")), tmp_path)
    assert time.monotonic() - started < 3
    kept = (tmp_path / "file.bin.127.0.0.1.part").read_bytes()
    assert 2 < len(kept) < 500 and BODY.startswith(kept)
    server.routes["/a"] = serve(BODY)
    assert download(mirror(server.url("/a")), tmp_path).read_bytes() == BODY
    assert server.requests[-1] == ("/a", f"bytes={len(kept)}-")


def test_a_compressed_transfer_is_never_expanded(server, tmp_path):
    bomb = gzip.compress(bytes(50_000_000))
    server.routes["/a"] = lambda handler: answer(handler, bomb, Content_Encoding="gzip")
    tracemalloc.start()
    with pytest.raises(DownloadError, match="wrong bytes .* sent as gzip"):
        download(mirror(server.url("/a"), size=100_000), tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    # Some servers name the compression of the file itself: then the bytes are the file's.
    assert download(mirror(server.url("/a"), size=100_000, body=bomb), tmp_path).read_bytes() == bomb


@pytest.mark.parametrize("place", ["http://[bad/", "http://127.0.0.1:99999999/", "http://127.0.0.1:port/", "/a"])
def test_a_bad_redirect_is_reported_as_such_and_not_as_wrong_bytes(server, tmp_path, place):
    server.routes["/a"] = lambda handler: answer(handler, b"", 302, Location=place)
    with pytest.raises(DownloadError, match="a bad redirect"):
        download(mirror(server.url("/a")), tmp_path)
    assert len({path for path, _ in server.requests}) == 1 and len(server.requests) <= 31, "it is not tried again"


def test_a_length_of_thousands_of_digits_is_ignored(server, tmp_path):
    server.routes["/a"] = lambda handler: answer(handler, BODY, Content_Length="9" * 5000)
    assert download(mirror(server.url("/a")), tmp_path).read_bytes() == BODY


def test_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    sound, count = serve(BODY), []

    def respond(handler):
        count.append(1)
        return handler.send_error(503) if len(count) < 3 else sound(handler)

    server.routes["/a"] = respond
    assert download(mirror(server.url("/a")), tmp_path).read_bytes() == BODY
    with pytest.raises(DownloadError, match="404"):
        download(mirror(server.url("/missing"), file="other"), tmp_path)
    assert server.requests.count(("/missing", None)) == 1


def test_parts_are_joined(server, tmp_path):
    server.routes["/p0"], server.routes["/p1"] = serve(BODY[:3000]), serve(BODY[3000:], break_at=100)
    whole = download(mirror(server.url("/p0"), server.url("/p1"), body=None), tmp_path)
    assert whole.read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_only_https_also_after_a_redirect(server, tmp_path):
    with pytest.raises(DownloadError, match="not https"):
        download(mirror("http://example.invalid/a"), tmp_path)
    server.routes["/a"] = lambda handler: answer(handler, b"", 302, Location="http://example.invalid/a")
    with pytest.raises(DownloadError, match=r"http://example\.invalid is not https"):
        download(mirror(server.url("/a")), tmp_path)


def test_https_does_not_become_http_of_this_machine(server):
    response = requests.Response()
    response.status_code, response.url = 302, "https://example.invalid/a"
    response.headers["location"] = server.url("/a")
    (hook,) = fetch.make_session().hooks["response"]
    with pytest.raises(DownloadError, match="from https to http"):
        hook(response)


def test_the_environments_proxy_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", server.url(""))
    with pytest.raises(DownloadError, match="given up"):
        download(mirror("https://example.invalid/a"), tmp_path)
    assert ("example.invalid:443", None) in server.requests


def test_the_table_has_only_https_and_plain_names():
    for source in download_datasets.SOURCES.values():
        for part in source.parts.values():
            for entry in part.mirrors:
                assert all(url.startswith("https://") for url in entry.urls)
                assert re.fullmatch(r"[\w.-]+", entry.file)


# --------------------------------------------------------------------------------------------------
# Archives


def make_zip(path: Path, files: dict[str, bytes], symlink: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if symlink:
            link = zipfile.ZipInfo(symlink)
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
    return path


def make_tar(path: Path, *entries: tarfile.TarInfo, content: bytes = b"content") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for entry in entries:
            entry.size = len(content) if entry.isfile() else 0
            archive.addfile(entry, io.BytesIO(content) if entry.isfile() else None)
    return path


def tar_entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry


def refused(archive: Path, message: str, max_bytes: int = 10_000) -> None:
    folder = archive.parent / "sub"
    folder.mkdir()
    with pytest.raises(BadArchive, match=message):
        extract_archive(archive, folder / "out", max_bytes)
    assert list(folder.iterdir()) == []
    assert {path.name for path in archive.parent.iterdir()} == {archive.name, "sub"}


@pytest.mark.parametrize("make", ["zip", "tar"])
def test_sound_archives_are_unpacked_without_macos_leftovers(tmp_path, make):
    names = ["set/a.jpg", "set/b.txt", "__MACOSX/set/._a.jpg", "set/._b.jpg"]
    if make == "zip":
        archive = make_zip(tmp_path / "x", {name: b"content" for name in names})
    else:
        archive = make_tar(tmp_path / "x", tar_entry("set", tarfile.DIRTYPE), *map(tar_entry, names))
    extract_archive(archive, tmp_path / "all", 14)
    extract_archive(archive, tmp_path / "some", 7, ["*.jpg"])
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert found == {"all/set/a.jpg", "all/set/b.txt", "some/set/a.jpg"}
    assert (tmp_path / "all/set/a.jpg").read_bytes() == b"content"


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "\\\\server\\evil", "..\\evil", "C:/evil"])
@pytest.mark.parametrize("make", ["zip", "tar"])
def test_paths_that_lead_outside(tmp_path, make, name):
    if make == "zip":
        archive = make_zip(tmp_path / "x", {"good": b"1", name: b"2"})
    else:
        archive = make_tar(tmp_path / "x", tar_entry("good"), tar_entry(name))
    refused(archive, "outside")


def test_links_and_devices(tmp_path):
    for number, (archive, message) in enumerate(
        [
            (lambda path: make_zip(path, {"good": b"1"}, symlink="link"), "a link"),
            (lambda path: make_tar(path, tar_entry("link", tarfile.SYMTYPE, "/etc/passwd")), "a link"),
            (lambda path: make_tar(path, tar_entry("good"), tar_entry("hard", tarfile.LNKTYPE, "good")), "a link"),
            (lambda path: make_tar(path, tar_entry("device", tarfile.CHRTYPE)), "a device"),
            (lambda path: make_tar(path, tar_entry("pipe", tarfile.FIFOTYPE)), "a device"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        refused(archive(folder / "x"), message)


def test_a_name_twice(tmp_path):
    refused(make_zip(tmp_path / "x", {"a.jpg": b"1", "A.jpg": b"2"}), "twice")


def test_bomb_is_stopped_by_what_is_written(tmp_path):
    refused(make_zip(tmp_path / "x", {"zeros": bytes(5_000_000)}), "more than it should")


def test_bomb_whose_header_lies(tmp_path):
    archive = make_zip(tmp_path / "x", {"zeros": bytes(5_000_000)})
    archive.write_bytes(archive.read_bytes().replace((5_000_000).to_bytes(4, "little"), (50).to_bytes(4, "little")))
    refused(archive, "damaged|more than")


def test_tar_bomb(tmp_path):
    refused(make_tar(tmp_path / "x", tar_entry("zeros"), content=bytes(5_000_000)), "more than it should")


def test_tar_bomb_among_members_that_are_not_extracted(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_SKIPPED", 1_000_000)
    archive = make_tar(tmp_path / "x", tar_entry("zeros"), content=bytes(5_000_000))
    with pytest.raises(BadArchive, match="more than it should"):
        extract_archive(archive, tmp_path / "out", 10_000, ["*.jpg"])


def test_a_tar_header_that_is_a_bomb_is_not_read(tmp_path):
    """A name may be as long as its header says: tarfile would read it whole."""
    name = make_tar(tmp_path / "x", tar_entry("n" * 20_000_000))
    refused(name, "holds a header that is too long")


@pytest.mark.parametrize("size, message", [(10_000, "a number of a hundred digits"), (80_000, "too long")])
def test_a_pax_header_of_digits_is_not_parsed(tmp_path, size, message):
    """tarfile searches for a number and a word from each of its digits on: 26 s for 80,000."""
    header = tar_entry("pax", tarfile.XHDTYPE)
    header.size = size
    raw = header.tobuf(tarfile.USTAR_FORMAT) + b"1" * size + bytes(-size % 512)
    (tmp_path / "x").write_bytes(gzip.compress(raw + tar_entry("a").tobuf(tarfile.USTAR_FORMAT) + bytes(1024)))
    refused(tmp_path / "x", message)


def test_headers_are_limited_in_all(tmp_path):
    """A large header is none too many, and large ones for each of many files are."""
    names = [f"{number}/" * 30 + "n" * 100 for number in range(50)]
    extract_archive(make_tar(tmp_path / "x", *map(tar_entry, names)), tmp_path / "out", 10_000)
    entries = [tar_entry(name) for name in names]
    for entry in entries:
        entry.pax_headers = {"comment": "c" * 10_000}
    with tarfile.open(tmp_path / "y", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            archive.addfile(entry)
    with pytest.raises(BadArchive, match="too long"):
        extract_archive(tmp_path / "y", tmp_path / "out2", 10_000)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_negative_size_does_not_go_round_in_circles(tmp_path, kind):
    """CVE-2025-8194: tarfile reads the same headers for ever."""
    header = tar_entry("a", kind).tobuf(tarfile.GNU_FORMAT)
    raw = header[:124] + tarfile.itn(-512, 12, tarfile.GNU_FORMAT) + header[136:148] + b" " * 8 + header[156:]
    raw = raw[:148] + b"%06o\0 " % tarfile.calc_chksums(raw)[0] + raw[156:]
    first = tar_entry("first", tarfile.DIRTYPE).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x").write_bytes(gzip.compress(first + raw + bytes(1024)))
    refused(tmp_path / "x", "negative size|header that is too long")


def test_a_zip_member_without_a_name(tmp_path):
    """Found by fuzzing."""
    archive = make_zip(tmp_path / "x", {"X": b"1"})
    archive.write_bytes(archive.read_bytes().replace(b"X", b"\0"))
    refused(archive, "damaged")


def test_a_name_with_a_line_break_stays_in_its_line(tmp_path):
    """Found by fuzzing."""
    refused(make_zip(tmp_path / "x", {"a\nb.jpg": bytes(50_000)}), r"stopped at 'a\\nb.jpg'")


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_MEMBERS", 5)
    refused(make_zip(tmp_path / "x", {str(number): b"" for number in range(6)}), "more than 5 files")


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("ü", "u\u0308"), ("n" * 300,), ("a/.",)])
@pytest.mark.parametrize("make", ["zip", "tar"])
def test_names_that_no_folder_can_hold(tmp_path, make, names):
    if make == "zip":
        archive = make_zip(tmp_path / "x", dict.fromkeys(names, b"1"))
    else:
        archive = make_tar(tmp_path / "x", *map(tar_entry, names))
    if names == ("a/.",):  # the same as a
        return extract_archive(archive, tmp_path / "out", 100)
    refused(archive, "damaged|twice")


def test_an_unusual_compression(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"1")
    refused(tmp_path / "x", "unusual compression")


@pytest.mark.parametrize("keep", [0, 1, 30, 0.5, 0.95])
@pytest.mark.parametrize("make", ["zip", "tar"])
def test_truncated_archives(tmp_path, make, keep):
    noise = hashlib.shake_128(b"noise").digest(5000)
    if make == "zip":
        archive = make_zip(tmp_path / "x", {"a": noise, "b": noise})
    else:
        archive = make_tar(tmp_path / "x", tar_entry("a"), tar_entry("b"), content=noise)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    refused(archive, "damaged|neither", max_bytes=100_000)


def test_flipped_bits_are_noticed(tmp_path):
    archive = make_zip(tmp_path / "x", {"a": hashlib.shake_128(b"noise").digest(5000)})
    raw = bytearray(archive.read_bytes())
    raw[2000] ^= 255
    archive.write_bytes(raw)
    refused(archive, "damaged")


def test_what_is_no_archive(tmp_path):
    (tmp_path / "x").write_bytes(b"<html>not found</html>")
    refused(tmp_path / "x", "neither a zip nor")


def test_gzip_that_holds_no_tar(tmp_path):
    (tmp_path / "x").write_bytes(gzip.compress(b"hello" * 1000))
    refused(tmp_path / "x", "damaged")


def test_existing_target_is_left_alone(tmp_path):
    archive = make_zip(tmp_path / "x", {"a": b"1"})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already"):
        extract_archive(archive, tmp_path / "out", 100)


# --------------------------------------------------------------------------------------------------
# The script, end to end, on a flickr8k of ten images

NAMES = [f"{number:03d}.jpg" for number in range(10)]


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bodies() -> dict[str, bytes]:
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(jpeg, "JPEG")
    captions = "".join(f"{name}#{i}\ta red picture .\n" for name in NAMES for i in range(5))
    text = {"Flickr8k.token.txt": captions, "CrowdFlowerAnnotations.txt": "not extracted"}
    for split, names in {"train": NAMES[:8], "dev": NAMES[8:9], "test": NAMES[9:]}.items():
        text[f"Flickr_8k.{split}Images.txt"] = "\n".join(names) + "\n"
    images = {f"Flicker8k_Dataset/{name}": jpeg.getvalue() for name in NAMES}
    return {
        "text": zipped({name: content.encode() for name, content in text.items()}),
        "images": zipped({**images, "__MACOSX/Flicker8k_Dataset/._000.jpg": b"x"}),
        "mirror": zipped({name.replace("Flicker8k_Dataset", "flickr8k/Images"): jpeg for name, jpeg in images.items()}),
        "nine": zipped(dict(list(images.items())[:9])),
    }


@pytest.fixture
def tiny(server: Server, bodies: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Server:
    """`SOURCES` with a flickr8k on the local server; the images' second mirror has no checksum."""

    def known(name: str) -> str:
        return f"sha256:{hashlib.sha256(bodies[name]).hexdigest()}"

    text = Mirror("text.zip", (server.url("/text"),), 9000, known("text"), ("*.token.txt", "Flickr_8k.*Images.txt"))
    images = (
        Mirror("images.zip", (server.url("/images"),), 20_000, known("images")),
        Mirror("mirror.zip", (server.url("/mirror"),), 20_000),
    )
    source = Source(10, "Flicker8k_Dataset", {"captions": Part((text,), 50_000), "images": Part(images, 50_000)})
    monkeypatch.setattr(download_datasets, "SOURCES", {"flickr8k": source})
    for name in ("text", "images", "mirror"):
        server.routes[f"/{name}"] = serve(bodies[name])
    return server


def call(data: Path, *flags: str) -> int:
    return main(["--dataset", "flickr8k", "--data_dir", str(data), *flags])


def files_in(data: Path) -> dict[str, bytes]:
    return {str(path.relative_to(data)): path.read_bytes() for path in sorted(data.rglob("*")) if path.is_file()}


def test_end_to_end(tiny, tmp_path, capsys):
    data = tmp_path / "data"
    assert call(data, "--verify-only") == 1
    assert call(data) == 0
    printed = capsys.readouterr().out
    assert printed.count("non-commercial") == 1
    assert "flickr8k: complete, 10 images" in printed
    assert "python flickr_image_caption_with_pytorch_resnet_lstm.py --dataset_type flickr8k" in printed
    assert sorted(path.name for path in data.iterdir()) == [".download.lock", "flickr8k"]
    assert {path.name for path in (data / "flickr8k").iterdir()} == {
        "Flicker8k_Dataset", "Flickr8k.token.txt",
        "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt",
    }  # fmt: skip
    assert call(data, "--verify-only") == 0
    asked = len(tiny.requests)
    assert call(data) == 0
    assert len(tiny.requests) == asked


@pytest.mark.parametrize("fault", ["missing", "wrong bytes", "incomplete"])
def test_next_mirror_is_used(tiny, tmp_path, capsys, bodies, fault):
    if fault == "missing":
        del tiny.routes["/images"]
    else:
        tiny.routes["/images"] = serve(bodies["nine"] if fault == "incomplete" else b"nonsense")
    assert call(tmp_path) == 0
    streams = capsys.readouterr()
    assert ("404" if fault == "missing" else "wrong bytes") in streams.err
    assert "no checksum is published for mirror.zip" in streams.out
    assert len(list((tmp_path / "flickr8k" / "Flicker8k_Dataset").iterdir())) == 10


def test_all_mirrors_failing_names_each(tiny, tmp_path, capsys, bodies):
    del tiny.routes["/images"]
    tiny.routes["/mirror"] = serve(bodies["nine"])
    assert call(tmp_path) == 2
    streams = capsys.readouterr()
    last = streams.err[streams.err.index("error:") :]
    assert f"{tiny.url('/images')}: the server answered 404" in last
    assert f"{tiny.url('/mirror')}: it holds 9 of 10 images" in last
    assert str(tmp_path / "downloads" / "images.zip") in last
    assert "complete, 10" not in streams.out
    assert not (tmp_path / "flickr8k").exists()
    assert not (tmp_path / "downloads" / "mirror.zip").exists()


def test_only_the_missing_part_is_fetched(tiny, tmp_path):
    assert call(tmp_path) == 0
    (tmp_path / "flickr8k" / "Flickr_8k.devImages.txt").unlink()
    tiny.requests.clear()
    assert call(tmp_path, "--verify-only") == 1
    assert call(tmp_path) == 0
    assert [path for path, _ in tiny.requests] == ["/text"]


def test_an_empty_image_counts_as_missing(tiny, tmp_path, capsys):
    assert call(tmp_path) == 0
    (tmp_path / "flickr8k" / "Flicker8k_Dataset" / "004.jpg").write_bytes(b"")
    assert call(tmp_path, "--verify-only") == 1
    assert "9 of 10 images" in capsys.readouterr().out


def test_force_keeps_the_old_data_on_failure_and_other_files_always(tiny, tmp_path):
    assert call(tmp_path) == 0
    (tmp_path / "flickr8k" / "notes.txt").write_text("mine")
    before = files_in(tmp_path / "flickr8k")
    tiny.routes["/images"] = tiny.routes["/mirror"] = serve(b"nonsense")
    assert call(tmp_path, "--force") == 2
    assert files_in(tmp_path / "flickr8k") == before
    assert call(tmp_path, "--verify-only") == 0


def test_force_replaces(tiny, tmp_path, bodies):
    assert call(tmp_path) == 0
    (tmp_path / "flickr8k" / "notes.txt").write_text("mine")
    before = files_in(tmp_path / "flickr8k")
    (tmp_path / "flickr8k" / "Flicker8k_Dataset" / "001.jpg").write_bytes(b"altered")
    assert call(tmp_path, "--force") == 0
    assert files_in(tmp_path / "flickr8k") == before


def test_old_data_comes_back_when_the_new_set_does_not_verify(tiny, tmp_path, capsys, monkeypatch):
    assert call(tmp_path) == 0
    before = files_in(tmp_path / "flickr8k")
    answers = iter([{}, {"images": "one is missing"}])
    monkeypatch.setattr(download_datasets, "find_problems", lambda *_: next(answers))
    assert call(tmp_path, "--force") == 2
    assert "one is missing" in capsys.readouterr().err
    assert files_in(tmp_path / "flickr8k") == before


def test_killed_while_replacing_heals_on_the_next_run(tiny, tmp_path):
    assert call(tmp_path) == 0
    before = files_in(tmp_path / "flickr8k")
    (tmp_path / ".flickr8k.old").mkdir()
    (tmp_path / "flickr8k" / "Flicker8k_Dataset").rename(tmp_path / ".flickr8k.old" / "Flicker8k_Dataset")
    tiny.requests.clear()
    assert call(tmp_path) == 0
    assert files_in(tmp_path / "flickr8k") == before and not tiny.requests


def test_another_image_folder_in_the_way_is_reported_before_downloading(tiny, tmp_path, capsys):
    (tmp_path / "flickr8k" / "Images").mkdir(parents=True)
    (tmp_path / "flickr8k" / "Images" / "000.jpg").write_bytes(b"mine")
    assert call(tmp_path) == 2
    assert "another layout" in capsys.readouterr().err
    assert tiny.requests == [] and (tmp_path / "flickr8k" / "Images" / "000.jpg").exists()


def test_two_downloads_at_once_take_turns(tiny, tmp_path, monkeypatch):
    codes: list[int] = []
    printed: list[str] = []  # rather than capsys, which loses what is printed while another thread reads it
    monkeypatch.setattr(download_datasets, "print", lambda text, **_: printed.append(text), raising=False)
    with FileLock(tmp_path / ".download.lock"):
        threads = [threading.Thread(target=lambda: codes.append(call(tmp_path))) for _ in range(2)]
        for started, thread in enumerate(threads, 1):
            thread.start()
            while sum("is under way; waiting" in text for text in printed) < started:
                assert thread.is_alive()
                time.sleep(0.01)
        assert tiny.requests == []
    for thread in threads:
        thread.join()
    assert codes == [0, 0] and sorted(path for path, _ in tiny.requests) == ["/images", "/text"]


def test_full_disk_is_reported_before_downloading(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5})())
    assert call(tmp_path) == 2
    assert "5 B free" in capsys.readouterr().err
    assert tiny.requests == []


def test_ctrl_c_keeps_what_has_arrived(tiny, tmp_path, capsys, bodies, monkeypatch):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    tiny.routes["/images"] = serve(bodies["images"], break_at=1000)
    with monkeypatch.context() as patch:
        patch.setattr(fetch.time, "sleep", interrupt)
        assert call(tmp_path) == 130
    assert "stopped" in capsys.readouterr().err
    assert (tmp_path / "downloads" / "images.zip.127.0.0.1.part").stat().st_size == 1000
    assert call(tmp_path) == 0
    assert ("/images", "bytes=1000-") in tiny.requests


def test_demo_and_its_verification(tmp_path, monkeypatch, capsys):
    from captioning import demo_set as demo_dataset

    flags = ["--dataset", "demo", "--data_dir", str(tmp_path)]
    assert main([*flags, "--verify-only"]) == 1
    original = demo_dataset.draw_demo_dataset
    monkeypatch.setattr(demo_dataset, "draw_demo_dataset", lambda directory, redraw: original(directory, 10, 0, redraw))
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "--dataset_type demo" in printed and "non-commercial" not in printed
    assert download_datasets.find_problems(tmp_path / "demo", 10) == {}


def test_help_needs_no_heavy_imports():
    script = Path(download_datasets.__file__)
    code = (
        "import sys, download_datasets\n"
        "try: download_datasets.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'requests', 'pooch', 'PIL', 'tqdm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=script.parent, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--verify-only" in result.stdout
