"""A file server on 127.0.0.1 for tests of downloads, which can misbehave; and small archives for it to serve."""

import contextlib
import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from captioning.data import fetch


class Server:
    """`routes[path]` is how a request is answered, `requests` what was asked for: path and Range header."""

    def __init__(self) -> None:
        self.routes: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.requests: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, self.headers.get("Range")))
                outer.routes.get(self.path, lambda handler: handler.send_error(404))(self)

            do_HEAD = do_GET
            do_CONNECT = do_GET  # what an https request through a proxy begins with

            def log_message(self, format: str, *args: object) -> None:
                """Quiet: the requests are recorded above."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}{path}"


@contextlib.contextmanager
def running_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, and a client that waits a millisecond between two attempts."""
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
    if handler.command != "HEAD":
        handler.wfile.write(body)


def serve(body: bytes, break_at: int | None = None, ranges: bool = True) -> Callable[[BaseHTTPRequestHandler], None]:
    """A sound server, or one whose first answers stop after `break_at` bytes."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) if ranges else None
        start = int(match[1]) if match else 0
        if match and start >= len(body):
            return answer(handler, b"", 416, Content_Range=f"bytes */{len(body)}")
        span = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if match else {}
        sent = body[start:] if break_at is None or match else body[:break_at]
        answer(handler, sent, 206 if match else 200, Content_Length=str(len(body) - start), **span)

    return respond


def known_hash(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


# --------------------------------------------------------------------------------------------------
# Archives


def tar_entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry


def tarred(*entries: tarfile.TarInfo, content: bytes = b"content") -> bytes:
    """A tar.gz of these entries, of which each file has the same content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for entry in entries:
            entry.size = len(content) if entry.isfile() else 0
            archive.addfile(entry, io.BytesIO(content) if entry.isfile() else None)
    return buffer.getvalue()


def zipped(files: dict[str, bytes], symlink: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if symlink:
            link = zipfile.ZipInfo(symlink)
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
    return buffer.getvalue()


def packed(kind: str, *names: str, content: bytes = b"content") -> bytes:
    """A zip or a tar of files of these names."""
    return zipped(dict.fromkeys(names, content)) if kind == "zip" else tarred(*map(tar_entry, names), content=content)
