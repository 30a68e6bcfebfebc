"""Transfers and archives against servers and archives that misbehave; nothing leaves this machine."""

import contextlib
import gzip
import hashlib
import re
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from local_server import Server, answer, known_hash, packed, running_server, serve, tar_entry, tarred, zipped

from captioning import fetch
from captioning.fetch import BadArchive, DownloadError, download_file, extract_archive
from captioning.io import UserError

BODY = bytes(range(256)) * 40
PART = "file.bin.127.0.0.1.part"  # what has arrived


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running_server(monkeypatch) as server:
        yield server


def fetched(url: str, folder: Path, body: bytes | None = BODY, limit: int = 40_000) -> bytes:
    """Download a file whose hash is that of `body` (None: nobody knows it); return its bytes."""
    download_file(url, folder / "file.bin", None if body is None else known_hash(body), limit)
    return (folder / "file.bin").read_bytes()


# --------------------------------------------------------------------------------------------------
# Transfers


def test_plain_download(server, tmp_path):
    server.routes["/a"] = serve(BODY)
    assert fetched(server.url("/a"), tmp_path) == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_a_file_placed_by_hand_is_used(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(BODY)
    fetched(server.url("/a"), tmp_path)
    assert server.requests == []


def test_broken_transfer_is_resumed_with_a_range(server, tmp_path):
    server.routes["/a"] = serve(BODY, break_at=4000)
    assert fetched(server.url("/a"), tmp_path) == BODY
    assert server.requests == [("/a", None), ("/a", "bytes=4000-")]


REST, ALL = f"bytes={len(BODY[:5000])}-", None


@pytest.mark.parametrize(
    "part, body, ranges, asked",
    [
        pytest.param(BODY[:5000], BODY, True, [REST], id="resumed"),
        pytest.param(BODY, BODY, True, [f"bytes={len(BODY)}-"], id="everything had arrived"),
        pytest.param(BODY + b"rest", BODY, True, [f"bytes={len(BODY) + 4}-", ALL], id="too much had arrived"),
        pytest.param(BODY[:5000], BODY, False, [REST], id="the server ignores ranges"),
        pytest.param(bytes(5000), None, True, [ALL], id="no hash and no version: nothing is resumed"),
    ],
)
def test_what_an_earlier_run_left(server, tmp_path, part, body, ranges, asked):
    (tmp_path / PART).write_bytes(part)
    server.routes["/a"] = serve(BODY, ranges=ranges)
    assert fetched(server.url("/a"), tmp_path, body) == BODY
    assert server.requests == [("/a", span) for span in asked]


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
    assert fetched(server.url("/a"), tmp_path, None) == BODY
    assert server.requests[1] == ("/a", "bytes=4000-")
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_wrong_range_is_not_glued_on(server, tmp_path):
    (tmp_path / PART).write_bytes(BODY[:5000])
    sound = serve(BODY)

    def respond(handler):
        if handler.headers.get("Range"):
            answer(handler, BODY[100:], 206, Content_Range=f"bytes 100-{len(BODY) - 1}/{len(BODY)}")
        else:
            sound(handler)

    server.routes["/a"] = respond
    assert fetched(server.url("/a"), tmp_path) == BODY
    assert server.requests == [("/a", "bytes=5000-"), ("/a", None)]


def test_content_length_too_large_is_given_up_after_some_attempts(server, tmp_path):
    server.routes["/a"] = lambda handler: answer(handler, BODY, Content_Length=str(len(BODY) + 9))
    with pytest.raises(DownloadError, match=f"after {fetch.ATTEMPTS} attempts"):
        fetched(server.url("/a"), tmp_path)
    assert len(server.requests) == fetch.ATTEMPTS
    assert not (tmp_path / "file.bin").exists()


@pytest.mark.parametrize(
    "body, length, limit, message",
    [
        pytest.param(BODY, "777", 40_000, "wrong bytes", id="a length that is too small"),
        pytest.param(BODY, str(len(BODY)), 4000, "announces", id="far more than expected, announced"),
        pytest.param(BODY, None, 4000, "sends more", id="far more than expected"),
        pytest.param(b"a captive portal", "16", 40_000, "wrong bytes.*deleted", id="wrong bytes"),
    ],
)
def test_what_is_wrong_is_deleted(server, tmp_path, body, length, limit, message):
    def respond(handler):
        handler.send_response(200)
        if length:
            handler.send_header("Content-Length", length)
        handler.end_headers()
        handler.wfile.write(body)

    server.routes["/a"] = respond
    with pytest.raises(DownloadError, match=message):
        fetched(server.url("/a"), tmp_path, limit=limit)
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
    message = r"only \d+ B arrived in 0 seconds; given up after 2 attempts; \d+ B are kept"
    with pytest.raises(DownloadError, match=message):
        fetched(server.url("/a"), tmp_path)
    assert time.monotonic() - started < 3
    kept = (tmp_path / PART).read_bytes()
    assert 2 < len(kept) < 500 and BODY.startswith(kept)
    server.routes["/a"] = serve(BODY)
    assert fetched(server.url("/a"), tmp_path) == BODY
    assert server.requests[-1] == ("/a", f"bytes={len(kept)}-")


def test_a_compressed_transfer_is_never_expanded(server, tmp_path):
    bomb = gzip.compress(bytes(50_000_000))
    server.routes["/a"] = lambda handler: answer(handler, bomb, Content_Encoding="gzip")
    tracemalloc.start()
    with pytest.raises(DownloadError, match="wrong bytes .* sent as gzip"):
        fetched(server.url("/a"), tmp_path, limit=200_000)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    # Some servers name the compression of the file itself: then the bytes are the file's.
    assert fetched(server.url("/a"), tmp_path, bomb, 200_000) == bomb


@pytest.mark.parametrize("place", ["http://[bad/", "http://127.0.0.1:99999999/", "http://127.0.0.1:port/", "/a"])
def test_a_bad_redirect_is_reported_as_such_and_not_as_wrong_bytes(server, tmp_path, place):
    server.routes["/a"] = lambda handler: answer(handler, b"", 302, Location=place)
    with pytest.raises(DownloadError, match="a bad redirect"):
        fetched(server.url("/a"), tmp_path)
    assert len({path for path, _ in server.requests}) == 1 and len(server.requests) <= 31, "it is not tried again"


def test_a_length_of_thousands_of_digits_is_ignored(server, tmp_path):
    server.routes["/a"] = lambda handler: answer(handler, BODY, Content_Length="9" * 5000)
    assert fetched(server.url("/a"), tmp_path) == BODY


def test_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    sound = serve(BODY)
    server.routes["/a"] = lambda handler: handler.send_error(503) if len(server.requests) < 3 else sound(handler)
    assert fetched(server.url("/a"), tmp_path) == BODY
    (tmp_path / "file.bin").unlink()
    with pytest.raises(DownloadError, match="404"):
        fetched(server.url("/missing"), tmp_path)
    assert server.requests.count(("/missing", None)) == 1


def test_only_https_also_after_a_redirect(server, tmp_path):
    with pytest.raises(DownloadError, match="not https"):
        fetched("http://example.invalid/a", tmp_path)
    server.routes["/a"] = lambda handler: answer(handler, b"", 302, Location="http://example.invalid/a")
    with pytest.raises(DownloadError, match=r"http://example\.invalid is not https"):
        fetched(server.url("/a"), tmp_path)


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
        fetched("https://example.invalid/a", tmp_path)
    assert ("example.invalid:443", None) in server.requests


# --------------------------------------------------------------------------------------------------
# Archives

NOISE = hashlib.shake_128(b"noise").digest(5000)
ZEROS = bytes(5_000_000)
LIAR = packed("zip", "zeros", content=ZEROS).replace(len(ZEROS).to_bytes(4, "little"), (50).to_bytes(4, "little"))


def refused(content: bytes, folder: Path, message: str, max_bytes: int = 10_000, members: list[str] | None = None):
    """Unpacking is refused with this message, and leaves nothing behind."""
    (folder / "x").write_bytes(content)
    (folder / "sub").mkdir()
    with pytest.raises(BadArchive, match=message):
        extract_archive(folder / "x", folder / "sub" / "out", max_bytes, members)
    assert list((folder / "sub").iterdir()) == []
    assert {path.name for path in folder.iterdir()} == {"x", "sub"}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_sound_archives_are_unpacked_without_macos_leftovers(tmp_path, kind):
    names = ["set/a.jpg", "set/b.txt", "__MACOSX/set/._a.jpg", "set/._b.jpg"]
    folder = [tar_entry("set", tarfile.DIRTYPE)]
    content = packed("zip", *names) if kind == "zip" else tarred(*folder, *map(tar_entry, names))
    (tmp_path / "x").write_bytes(content)
    extract_archive(tmp_path / "x", tmp_path / "all", 14)
    extract_archive(tmp_path / "x", tmp_path / "some", 7, ["*.jpg"])
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert found == {"all/set/a.jpg", "all/set/b.txt", "some/set/a.jpg"}
    assert (tmp_path / "all/set/a.jpg").read_bytes() == b"content"


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "\\\\server\\evil", "..\\evil", "C:/evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_that_lead_outside(tmp_path, kind, name):
    refused(packed(kind, "good", name), tmp_path, "outside")


# Some of them found by fuzzing.
@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(zipped({"good": b"1"}, symlink="link"), "a link", id="a link in a zip"),
        pytest.param(tarred(tar_entry("link", tarfile.SYMTYPE, "/etc/passwd")), "a link", id="a link in a tar"),
        pytest.param(tarred(tar_entry("good"), tar_entry("hard", tarfile.LNKTYPE, "good")), "a link", id="a hard link"),
        pytest.param(tarred(tar_entry("device", tarfile.CHRTYPE)), "a device", id="a device"),
        pytest.param(tarred(tar_entry("pipe", tarfile.FIFOTYPE)), "a device", id="a pipe"),
        pytest.param(packed("zip", "a.jpg", "A.JPG"), "twice", id="a name twice"),
        pytest.param(packed("zip", "zeros", content=ZEROS), "more than it should", id="a bomb in a zip"),
        pytest.param(packed("tar", "zeros", content=ZEROS), "more than it should", id="a bomb in a tar"),
        pytest.param(LIAR, "damaged|more than", id="a bomb whose header lies"),
        # A name may be as long as its header says: tarfile would read it whole.
        pytest.param(packed("tar", "n" * 20_000_000), "holds a header that is too long", id="a bomb as a header"),
        pytest.param(packed("zip", "X").replace(b"X", b"\0"), "damaged", id="a member without a name"),
        pytest.param(
            packed("zip", "a\nb.jpg", content=ZEROS), r"stopped at 'a\\nb.jpg'", id="a line break stays in its line"
        ),
        pytest.param(zipped({"a": b"1"}, compression=zipfile.ZIP_LZMA), "unusual compression", id="compression"),
        pytest.param(b"<html>not found</html>", "neither a zip nor", id="a page"),
        pytest.param(gzip.compress(b"hello" * 1000), "damaged", id="gzip without a tar"),
    ],
)
def test_refused(tmp_path, content, message):
    refused(content, tmp_path, message)


def test_tar_bomb_among_members_that_are_not_extracted(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_SKIPPED", 1_000_000)
    refused(packed("tar", "zeros", content=ZEROS), tmp_path, "more than it should", members=["*.jpg"])


@pytest.mark.parametrize("size, message", [(10_000, "a number of a hundred digits"), (80_000, "too long")])
def test_a_pax_header_of_digits_is_not_parsed(tmp_path, size, message):
    """tarfile searches for a number and a word from each of its digits on: 26 s for 80,000."""
    header = tar_entry("pax", tarfile.XHDTYPE)
    header.size = size
    raw = header.tobuf(tarfile.USTAR_FORMAT) + b"1" * size + bytes(-size % 512)
    refused(gzip.compress(raw + tar_entry("a").tobuf(tarfile.USTAR_FORMAT) + bytes(1024)), tmp_path, message)


def test_headers_are_limited_in_all(tmp_path):
    """One large header is not too many, and large ones for each of many files are."""
    entries = [tar_entry(f"{number}/" * 30 + "n" * 100) for number in range(50)]
    (tmp_path / "y").write_bytes(tarred(*entries))
    extract_archive(tmp_path / "y", tmp_path / "out", 10_000)
    assert len(list((tmp_path / "out").rglob("n*"))) == 50
    for entry in entries:
        entry.pax_headers = {"comment": "c" * 10_000}
    (tmp_path / "own").mkdir()
    refused(tarred(*entries), tmp_path / "own", "too long")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_negative_size_does_not_go_round_in_circles(tmp_path, kind):
    """CVE-2025-8194: tarfile reads the same headers for ever."""
    header = tar_entry("a", kind).tobuf(tarfile.GNU_FORMAT)
    raw = header[:124] + tarfile.itn(-512, 12, tarfile.GNU_FORMAT) + header[136:148] + b" " * 8 + header[156:]
    raw = raw[:148] + b"%06o\0 " % tarfile.calc_chksums(raw)[0] + raw[156:]
    first = tar_entry("first", tarfile.DIRTYPE).tobuf(tarfile.GNU_FORMAT)
    refused(gzip.compress(first + raw + bytes(1024)), tmp_path, "negative size|header that is too long")


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_MEMBERS", 5)
    refused(packed("zip", *map(str, range(6)), content=b""), tmp_path, "more than 5 files")


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("ü", "u\u0308"), ("n" * 300,)])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_no_folder_can_hold(tmp_path, kind, names):
    refused(packed(kind, *names), tmp_path, "damaged|twice")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_ends_in_a_dot_is_the_same_as_without(tmp_path, kind):
    (tmp_path / "x").write_bytes(packed(kind, "a/."))
    extract_archive(tmp_path / "x", tmp_path / "out", 100)
    assert (tmp_path / "out" / "a").read_bytes() == b"content"


@pytest.mark.parametrize("keep", [0, 1, 30, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_truncated_archives(tmp_path, kind, keep):
    whole = packed(kind, "a", "b", content=NOISE)
    kept = whole[: keep if isinstance(keep, int) else int(len(whole) * keep)]
    refused(kept, tmp_path, "damaged|neither", max_bytes=100_000)


def test_flipped_bits_are_noticed(tmp_path):
    raw = bytearray(packed("zip", "a", content=NOISE))
    raw[2000] ^= 255
    refused(bytes(raw), tmp_path, "damaged")


def test_existing_target_is_left_alone(tmp_path):
    (tmp_path / "x").write_bytes(packed("zip", "a"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already"):
        extract_archive(tmp_path / "x", tmp_path / "out", 100)
