"""`--mode serve`: a page in the browser, and an HTTP interface, that caption a photo and show where the model looked.

Three routes: `GET /` (the page, `captioning/page/index.html`), `POST /caption`, `GET /health`; `/openapi.json` describes
them. Uploads stay in memory. Nothing is fetched from elsewhere: neither by the server nor by the page, whose
Content-Security-Policy allows its own style and script alone.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attention_visualization import colours
from captioning import __version__
from captioning.captioner import Captioner, Decoding, DecodingOptions
from captioning.config.settings import Settings
from captioning.data.dataset import load_caption_set
from captioning.data.images import IMAGE_FORMATS, UnreadableImage, missing_reader, open_image, upsample
from captioning.data.layouts import default_folder
from captioning.io import UserError, format_bytes, install_command, log
from captioning.modes.caption import given_options, json_lines, word_dict
from captioning.runs.directories import given_model
from captioning.runs.plots import shrunk

try:
    import python_multipart  # noqa: F401  (Starlette's form parser needs it, and would miss it only at a request)
    import uvicorn
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.responses import HTMLResponse
    from fastapi.telemetry import TelemetryConfig
    from jinja2 import StrictUndefined, Template
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as problem:
    raise UserError(
        f"--mode serve needs a package that is not installed ({problem.name}): {install_command('serve')}"
    ) from problem

PAGE = Path(__file__).parent / "page" / "index.html"
FIRST_PORT, LAST_PORT = 7860, 7959
MAX_BYTES = 32_000_000  # of a request's body; a phone's largest JPEG has some 20 MB
MAX_PIXELS = 64_000_000  # a picture that is not a JPEG takes four to sixteen bytes for each while it is decoded
BODY_SECONDS = 60  # in which a body must have arrived
WAITING = 8  # requests that wait for the one that is captioned; further ones are refused
CONNECTIONS = 64
END_SECONDS = 5  # that requests under way have when the server ends
# FastAPI would report to whatever OpenTelemetry collector the environment names.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
WIDEST_BEAM, MOST_CAPTIONS, LARGEST_PENALTY = 10, 10, 2.0
EXAMPLES, EXAMPLE_SIZE = 8, 640  # pixels along the longer side
MAP_SIZE = 7 * 8  # pixels along a side of a map, which the browser stretches over the photo


# --------------------------------------------------------------------------------------------------
# The answer


def caption_upload(captioner: Captioner, upload: bytes, maps: bool, options: DecodingOptions) -> dict[str, Any]:
    """Caption an uploaded image: the object that `--mode caption --json` prints, without `path`.

    Args:
        maps: with the photo and each word's attention map as data URLs.

    Raises:
        UnreadableImage: with a sentence for the page.
        UserError: the device's memory is too small.
    """
    file = io.BytesIO(upload)
    check_upload(file)
    try:
        photo = open_image(file, at_least=900) if maps else None
        result = captioner(file, **options)
    except UnreadableImage as error:
        raise UnreadableImage("This image is damaged and cannot be opened.") from error
    answer = json.loads(next(json_lines([result], options.get("num_captions") or 1)))
    del answer["path"]
    if photo is not None:
        answer["photo"] = data_url(shrunk(photo), "JPEG")
        for part, caption in zip([answer, *answer.get("alternatives", [])], result.captions, strict=True):
            part["words"] = [word_dict(word) | map_dict(word.attention) for word in caption.words]
    return answer


def map_dict(weights: np.ndarray | None) -> dict[str, str]:
    return {} if weights is None else {"map": data_url(map_of(weights), "PNG")}


def check_upload(file: io.BytesIO) -> None:
    """Check an image's header before memory is taken for its pixels.

    Raises:
        UnreadableImage: with a sentence for the page.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except Exception as error:  # Pillow's parsers raise whatever they meet
        kinds = f"This file is not an image: {', '.join(IMAGE_FORMATS[:-1])} and {IMAGE_FORMATS[-1]} can be read."
        raise UnreadableImage(missing_reader(file) or kinds) from error
    if pixels > MAX_PIXELS:
        raise UnreadableImage(f"This image has more than {MAX_PIXELS // 10**6} million pixels: make it smaller.")


def map_of(weights: np.ndarray) -> Image.Image:
    """One word's attention (7, 7) as a small transparent picture, in the colours of `attention_visualization`."""
    shares = upsample(weights, MAP_SIZE, MAP_SIZE) / weights.max()
    table = (255 * colours()).round().astype(np.uint8)
    return Image.fromarray(table[(255 * shares).round().astype(int)])


def data_url(picture: Image.Image, form: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=88)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --------------------------------------------------------------------------------------------------
# The page


def build_page(captioner: Captioner, examples: Sequence[Path], how: Decoding) -> str:
    """The page's HTML, with the model's description, the examples and the settings' first values."""
    pictures: list[str] = []
    for path in examples:
        with contextlib.suppress(UnreadableImage):
            pictures.append(data_url(shrunk(open_image(path, at_least=EXAMPLE_SIZE), EXAMPLE_SIZE), "JPEG"))
    return Template(PAGE.read_text(encoding="utf-8"), autoescape=True, undefined=StrictUndefined).render(
        model=description(captioner),
        examples=pictures,
        max_bytes=MAX_BYTES,
        beam_size=how.beam_size,
        beam_max=max(WIDEST_BEAM, how.beam_size),
        length_penalty=how.length_penalty,
        penalty_max=max(LARGEST_PENALTY, how.length_penalty),
    )


def description(captioner: Captioner) -> str:
    flags = captioner.flags
    return (
        f"{flags['decoder']} decoder on {flags['encoder']}, trained on {flags['dataset_type']}, epoch {captioner.epoch}"
    )


def security_headers(page: str) -> list[tuple[str, str]]:
    """Headers of every response; the page may use nothing but its own style, script, pictures and server."""
    allowed = {
        tag: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL)
    }
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cache-Control", "no-store"),
    ]


def find_examples(captioner: Captioner, args: Settings) -> list[Path]:
    """A few test images of the checkpoint's data set, or of the one named by the flags; none where it is not there.

    Raises:
        UserError: a data set that was named is not there.
    """
    flags = captioner.flags
    named = [args.data_dir, args.image_dir, args.captions_file]
    if not any(named):
        named = [Path(flags[name]) if flags[name] else None for name in ("data_dir", "image_dir", "captions_file")]
    data_dir, image_dir, captions_file = named
    folder = default_folder(data_dir, image_dir, captions_file, flags["dataset_type"])
    try:
        data = load_caption_set(folder, image_dir, captions_file, flags["seed"], captioner.split)
    except (UserError, OSError):
        if args.data_dir or args.image_dir or args.captions_file:
            raise
        log.info("No example photos: the data set of this model is not here (--data_dir names it)")
        return []
    chosen = np.random.default_rng(0).permutation(data.splits["test"])[:EXAMPLES]
    return [data.image_dir / data.names[image] for image in chosen]


# --------------------------------------------------------------------------------------------------
# Requests


class InMemoryParser(MultiPartParser):
    """A parser of forms that keeps files in memory, where Starlette's writes those above 1 MB to the disk."""

    spool_max_size = MAX_BYTES  # of a whole body


async def body_of(request: Request) -> AsyncGenerator[bytes, None]:
    """A request's body, piece by piece, which ends in an HTTP error where it is too large or too slow."""
    too_large = HTTPException(413, f"This file is larger than {format_bytes(MAX_BYTES)}.")
    if int(request.headers.get("content-length", 0)) > MAX_BYTES:
        raise too_large
    stream, size, end = request.stream(), 0, time.monotonic() + BODY_SECONDS
    try:
        while piece := await asyncio.wait_for(anext(stream), end - time.monotonic()):
            size += len(piece)
            if size > MAX_BYTES:
                raise too_large
            yield piece
    except TimeoutError:
        raise HTTPException(408, "The image took too long to arrive.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The client closed the connection.") from None


async def read_image(request: Request) -> bytes:
    """The image in a request: its body as it is, or the one file of a form (multipart/form-data)."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        image = bytearray()
        async for piece in body_of(request):
            image += piece
        return bytes(image)
    try:
        form = await InMemoryParser(request.headers, body_of(request), max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"This form cannot be read: {error.message}") from error
    for value in form.values():
        if isinstance(value, UploadFile):
            return await value.read()
    raise HTTPException(400, "This form has no file.")


def check_origin(request: Request) -> None:
    """Refuse what a page of another site sends; browsers name a POST's origin, other programs need not."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers["host"]:
        raise HTTPException(403, "This page takes no requests of other sites.")


def trusted_hosts(host: str) -> list[str]:
    """Names in a request's Host header under which the page may be reached, which DNS rebinding cannot forge."""
    hosts = ["127.0.0.1", "localhost", "[::1]", f"[{host}]" if ":" in host else host]
    if host in ("0.0.0.0", "::"):  # reached by this machine's name or any of its addresses: the last part is a number
        hosts += [socket.gethostname(), f"{socket.gethostname()}.local", *(f"*.{number}" for number in range(256))]
    return hosts


def build_app(captioner: Captioner, page: str, host: str, how: Decoding) -> FastAPI:
    """The application: its routes, and what each request may cost.

    Args:
        page: the HTML of `GET /`.
        host: the address that is listened on.
        how: what a request does not name.
    """
    app = FastAPI(
        version=__version__,
        title="Image captioner",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=NO_TELEMETRY,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=trusted_hosts(host), www_redirect=False)
    worker, pending = asyncio.Lock(), 0

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> str:
        return page

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The server is up; `model` says what it captions with."""
        return {"status": "ok", "model": description(captioner)}

    beams = Query(how.beam_size, ge=1, le=max(WIDEST_BEAM, how.beam_size), description="captions followed at once")
    longest = max(LARGEST_PENALTY, how.length_penalty)
    penalties = Query(how.length_penalty, ge=0, le=longest, description="more: longer ones")
    counts = Query(1, ge=1, le=MOST_CAPTIONS, description="captions, best first; the beam is at least as wide")
    with_maps = Query(False, description="add the photo, and each word's attention map, as data URLs")
    image = {"schema": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "properties": {"image": image["schema"]}, "required": ["image"]}}
    body = {"required": True, "content": {"application/octet-stream": image, "multipart/form-data": form}}
    refusals = {
        400: "the form cannot be read", 403: "from another site", 408: "too slow", 413: "too large",
        415: "not an image that can be read", 503: "too many are waiting; Retry-After says when to come again",
    }  # fmt: skip

    @app.post(
        "/caption", openapi_extra={"requestBody": body}, response_description="what `--mode caption --json` prints",
        responses={code: {"description": text} for code, text in refusals.items()},
    )  # fmt: skip
    async def caption(
        request: Request, beam_size: int = beams, length_penalty: float = penalties, num_captions: int = counts,
        maps: bool = with_maps,
    ) -> dict[str, Any]:  # fmt: skip
        """Caption an image: the body is the image file itself, or a form with one file."""
        nonlocal pending
        check_origin(request)
        admitted = pending <= WAITING
        pending += admitted
        try:
            if not admitted:
                async for _ in body_of(request):  # a client that is cut off while it sends would not read the answer
                    pass
                raise HTTPException(503, "Too many photos are waiting. Try again soon.", {"Retry-After": "2"})
            upload = await read_image(request)
            async with worker:
                if await request.is_disconnected():
                    raise HTTPException(400, "The client closed the connection.")
                options: DecodingOptions = {
                    "beam_size": beam_size, "length_penalty": length_penalty, "num_captions": num_captions,
                    "no_repeat_ngram": how.no_repeat_ngram, "consensus": how.consensus,
                }  # fmt: skip
                return await asyncio.to_thread(caption_upload, captioner, upload, maps, options)
        except UnreadableImage as error:
            raise HTTPException(415, str(error)) from error
        except UserError as error:
            raise HTTPException(503, f"This did not work: {error}") from error
        except asyncio.CancelledError:
            raise HTTPException(503, "The page is being closed.") from None
        finally:
            pending -= admitted

    return app


# --------------------------------------------------------------------------------------------------
# The server


def open_socket(host: str, port: int | None) -> socket.socket:
    """Listen on a port, or on the first free one from `FIRST_PORT` on.

    Raises:
        UserError: the port is taken, or the address is not one of this machine's.
    """
    ports = [port] if port else range(FIRST_PORT, LAST_PORT + 1)
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        for number in ports[:-1]:
            with contextlib.suppress(OSError):
                return socket.create_server((host, number), family=family)
        return socket.create_server((host, ports[-1]), family=family)
    except OSError as error:
        raise UserError(
            f"cannot serve the page on {host}{f', port {port}' if port else ''}: another program listens there, or "
            f"the address is not one of this machine's ({error}). Choose another --port or --host"
        ) from error


def build_server(app: FastAPI, headers: list[tuple[str, str]]) -> uvicorn.Server:
    """uvicorn with limits; it logs its own failures, and no requests."""
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each damaged form
    config = uvicorn.Config(
        app, headers=headers, server_header=False, proxy_headers=False, access_log=False, log_config=None,
        log_level="error", lifespan="off", ws="none", http="h11", loop="asyncio", limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5, timeout_graceful_shutdown=END_SECONDS,
    )  # fmt: skip
    return uvicorn.Server(config)


def serve_page(args: Settings) -> int:
    """`--mode serve`: serve until Ctrl-C, SIGTERM or SIGHUP; returns the exit code.

    Raises:
        UserError: no usable checkpoint, or the page cannot be served.
    """
    try:
        with contextlib.closing(open_socket(args.host, args.port)) as listener:
            captioner = Captioner.load(
                given_model(args.model_path), device=args.device, resnet_weights=args.resnet_weights
            )
            captioner.model.expect_many()
            log.info(f"Model: {captioner}. Device: {captioner.device}")
            how = captioner.decoding(**given_options(args))
            page = build_page(captioner, find_examples(captioner, args), how)
            app = build_app(captioner, page, args.host, how)
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"The page is at http://{host}:{listener.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
            if args.host not in ("127.0.0.1", "localhost", "::1"):
                print(f"Note: --host {args.host} lets others on the network use it, too", file=sys.stderr)
            server = build_server(app, security_headers(page))
            # uvicorn takes SIGINT and SIGTERM only; nohup ignores SIGHUP, and stays in force.
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                signal.signal(signal.SIGHUP, server.handle_exit)
            server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    log.info("\nThe page is closed.")
    return 0
