"""A page of `--mode serve` on this machine, for its tests."""

import contextlib
import threading

import pytest
import requests

from captioning.config.settings import parse_flags
from captioning.io import UserError

serve = pytest.importorskip("captioning.modes.serve", reason="fastapi is not installed", exc_type=UserError)


def flags(tiny_runs, *more: str):
    return parse_flags(["--mode", "serve", "--model_path", str(tiny_runs["attention"]), *more])


@contextlib.contextmanager
def serving(app, text: str):
    """Serve a page; the address."""
    server = serve.build_server(app, serve.security_headers(text))
    listener = serve.open_socket("127.0.0.1", None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@contextlib.contextmanager
def page_of(model, tiny_runs):
    """Serve the page of a run of `tiny_runs`, with its examples; the address."""
    text = serve.build_page(model, serve.find_examples(model, flags(tiny_runs)), model.decoding())
    with serving(serve.build_app(model, text, "127.0.0.1", model.decoding()), text) as address:
        yield address


def ask(page: str, body, query: str = "", **options) -> requests.Response:
    return requests.post(f"{page}caption{query}", body, timeout=30, **options)
