"""Transfers that break off and archives that are damaged or hostile; nothing leaves this machine."""

import contextlib
import gzip
import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_server import Server, answer, known_hash, packed, running_server, serve, tar_entry, tarred, zipped

from captioning.data import fetch
from captioning.data.fetch import BadArchive, DownloadError, download_file, extract_archive
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


def test_a_file_placed_by_hand_is_used(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(BODY)
    fetched(server.url("/a"), tmp_path)
    assert server.requests == []


def test_broken_transfer_is_resumed_with_a_range(server, tmp_path):
    server.routes["/a"] = serve(BODY, break_at=4000)
    assert fetched(server.url("/a"), tmp_path) == BODY
    assert server.requests == [("/a", None), ("/a", "bytes=4000-")]


REST = "bytes=5000-"


@pytest.mark.parametrize(
    "part, body, ranges, asked",
    [
        pytest.param(BODY[:5000], BODY, True, [REST], id="resumed"),
        pytest.param(BODY, BODY, True, [f"bytes={len(BODY)}-"], id="everything had arrived"),
        pytest.param(BODY[:5000], BODY, False, [REST], id="the server ignores ranges"),
        pytest.param(BODY[:5000], None, True, [REST], id="no hash is known"),
    ],
)
def test_what_an_earlier_run_left(server, tmp_path, part, body, ranges, asked):
    (tmp_path / PART).write_bytes(part)
    server.routes["/a"] = serve(BODY, ranges=ranges)
    assert fetched(server.url("/a"), tmp_path, body) == BODY
    assert server.requests == [("/a", span) for span in asked]


def test_content_length_too_large_is_given_up_after_some_attempts(server, tmp_path):
    server.routes["/a"] = lambda handler: answer(handler, BODY, Content_Length=str(len(BODY) + 9))
    with pytest.raises(DownloadError, match=f"broke off .* {fetch.ATTEMPTS} times; what has arrived is kept"):
        fetched(server.url("/a"), tmp_path)
    assert len(server.requests) == fetch.ATTEMPTS
    assert not (tmp_path / "file.bin").exists()


@pytest.mark.parametrize(
    "body, length, limit, message",
    [
        pytest.param(BODY, "777", 40_000, "wrong bytes", id="a length that is too small"),
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


def test_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    sound = serve(BODY)
    server.routes["/a"] = lambda handler: handler.send_error(503) if len(server.requests) < 3 else sound(handler)
    assert fetched(server.url("/a"), tmp_path) == BODY
    (tmp_path / "file.bin").unlink()
    with pytest.raises(DownloadError, match="404"):
        fetched(server.url("/missing"), tmp_path)
    assert server.requests.count(("/missing", None)) == 1


def test_a_redirect_to_another_scheme_or_to_no_address_ends_with_a_line(server, tmp_path):
    port = server.url("").rpartition(":")[2]
    server.routes["/b"] = serve(BODY)
    for place, message in ((f"http://localhost:{port}/b", "localhost is not https"), ("http://[bad/", "failed")):
        server.routes["/a"] = lambda handler, place=place: answer(handler, b"", 302, Location=place)
        with pytest.raises(DownloadError, match=message):
            fetched(server.url("/a"), tmp_path)
        assert list(tmp_path.iterdir()) == []


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
def test_nothing_is_written_outside(tmp_path, kind, name):
    """zipfile and tarfile decide whether to refuse the archive or to make the name harmless."""
    (tmp_path / "x").write_bytes(packed(kind, "good", name))
    (tmp_path / "sub").mkdir()
    with contextlib.suppress(BadArchive):
        extract_archive(tmp_path / "x", tmp_path / "sub" / "out", 10_000)
    assert {path.name for path in tmp_path.iterdir()} == {"x", "sub"}
    assert {path.name for path in (tmp_path / "sub").iterdir()} <= {"out"}
    assert not Path("/evil").exists()


@pytest.mark.parametrize(
    "content",
    [
        zipped({"good": b"content"}, symlink="link"),
        tarred(tar_entry("good"), tar_entry("link", tarfile.SYMTYPE, "/etc/passwd")),
        tarred(tar_entry("good"), tar_entry("hard", tarfile.LNKTYPE, "good")),
        tarred(tar_entry("good"), tar_entry("device", tarfile.CHRTYPE), tar_entry("pipe", tarfile.FIFOTYPE)),
    ],
)
def test_links_and_devices_are_not_made(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    extract_archive(tmp_path / "x", tmp_path / "out", 10_000)
    assert (tmp_path / "out" / "good").read_bytes() == b"content"
    assert not any(path.is_symlink() or not path.is_file() for path in (tmp_path / "out").iterdir())
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(packed("zip", "zeros", content=ZEROS), "more than it should", id="a bomb in a zip"),
        pytest.param(packed("tar", "zeros", content=ZEROS), "more than it should", id="a bomb in a tar"),
        pytest.param(LIAR, "damaged|more than", id="a bomb whose header lies"),
        pytest.param(
            packed("zip", "a\nb.jpg", content=ZEROS), r"stopped at 'a\\nb.jpg'", id="a line break stays in its line"
        ),
        pytest.param(packed("zip", "a/b", "a"), "damaged", id="a name that is a file and a folder"),
        pytest.param(packed("tar", "n" * 300), "damaged", id="a name that no folder can hold"),
        pytest.param(b"<html>not found</html>", "neither a zip nor", id="a page"),
        pytest.param(gzip.compress(b"hello" * 1000), "damaged", id="gzip without a tar"),
    ],
)
def test_refused(tmp_path, content, message):
    refused(content, tmp_path, message)


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_MEMBERS", 5)
    refused(packed("zip", *map(str, range(6)), content=b""), tmp_path, "more than 5 files")


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
