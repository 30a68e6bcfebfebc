"""`--mode serve`: a page in the browser that captions a photo and shows where the model looked.

The page needs no network and sends nothing anywhere: Gradio's telemetry, sharing, run history and API pages are off,
and uploads are kept in a folder that goes when the server ends. What the result panel shows is one piece of HTML with
the photo and the maps inside of it; which map lies over the photo is decided by its style sheet, without a script.
"""

from __future__ import annotations

import base64
import html
import io
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attention_visualization import colours, upsample
from captioning.captioner import Caption, Captioner
from captioning.dataset import load_caption_set
from captioning.images import IMAGE_FORMATS, UnreadableImage, open_image
from captioning.io import UserError, format_bytes, log
from captioning.modes.caption import peak_of
from captioning.plots import shrunk
from captioning.settings import Settings

os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    # Gradio asks its own server whether it runs, which is no proxy's business.
    "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "localhost,127.0.0.1,::1"))),
}
try:
    import gradio as gr
except ModuleNotFoundError as problem:
    raise UserError(
        f"--mode serve needs a package that is not installed ({problem.name}): "
        "python -m pip install -r requirements-serve.txt"
    ) from problem

MAX_BYTES = 32_000_000  # of an upload; a phone's largest JPEG has some 20 MB
MAX_PIXELS = 64_000_000  # a picture that is no JPEG takes four to eight bytes for each while it is decoded
WIDEST_BEAM = 10
ALTERNATIVES = 4  # shown below the best caption
EXAMPLES = 8
MAP_SIZE = 7 * 8  # pixels along a side of a map, which the browser stretches over the photo

STYLE = """
.looked { position: relative; }
.looked img { display: block; margin: 0 auto; width: min(100%, calc(50vh * var(--aspect))); aspect-ratio: var(--aspect); border-radius: 8px; }
.looked .map { position: absolute; inset: 0 0 auto; opacity: 0; pointer-events: none; transition: opacity 0.15s; }
.looked .photo { transition: filter 0.15s; }
.looked:has(.word:hover, .word :checked, .word :focus-visible) .photo { filter: saturate(0.25) brightness(0.65); }
.looked .word:hover .map, .looked:not(:has(.word:hover)) .word:has(:checked) .map { opacity: 1; }
.looked .caption { font-size: 1.35rem; line-height: 2; font-weight: 600; margin: 0.8rem 0 0.2rem; }
.looked ol { list-style: none; padding: 0; margin: 0.3rem 0 0; }
.looked li { line-height: 2; margin: 0.2rem 0; border-top: 1px solid var(--border-color-primary); }
.looked .word { cursor: pointer; border-radius: 6px; padding: 0.15em 0.2em; margin: 0 -0.1em; display: inline-block; line-height: 1.3; }
.looked .word input { position: absolute; opacity: 0; width: 1px; height: 1px; margin: 0; pointer-events: none; }
.looked .word:hover, .looked .word:has(:checked) { background: var(--body-text-color); color: var(--body-background-fill); }
.looked .word:has(:focus-visible) { outline: 2px solid; outline-offset: 2px; }
.looked .note, .welcome { opacity: 0.75; font-size: 0.9rem; margin: 0.2rem 0; }
.looked .score { opacity: 0.75; font-size: 0.8rem; white-space: nowrap; margin-left: 0.6em; font-weight: 400; }
.problem { border: 2px solid #d55e00; border-radius: 8px; padding: 0.8rem 1rem; margin: 0; }
"""


# --------------------------------------------------------------------------------------------------
# What the page shows


def answer(captioner: Captioner, upload: str | None, beam_size: float, length_penalty: float) -> str:
    """The result panel for an uploaded file, as HTML; a file that cannot be used gets a message."""
    if upload is None:
        return '<p class="welcome">The caption comes here.</p>'
    path, beam = Path(upload), int(beam_size)
    try:
        check_upload(path)
        photo = open_image(path, at_least=900)
    except UnreadableImage as error:
        return message(str(error) if str(error).startswith("This") else "This picture is damaged and cannot be opened.")
    try:
        result = next(captioner.caption([path], beam, length_penalty, min(beam, 1 + ALTERNATIVES), attention=True))
    except UserError as error:
        return message(f"This did not work: {error}")
    return show(photo, result.captions)


def check_upload(path: Path) -> None:
    """Look at a file's size and header, before memory is taken for its pixels.

    Raises:
        UnreadableImage: with a sentence for the page.
    """
    if path.stat().st_size > MAX_BYTES:
        raise UnreadableImage(f"This file is larger than {format_bytes(MAX_BYTES)}, the most that this page takes.")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except Exception as error:  # Pillow's parsers raise whatever they meet
        kinds = ", ".join(IMAGE_FORMATS[:-1])
        raise UnreadableImage(f"This file is no picture: {kinds} and {IMAGE_FORMATS[-1]} can be read.") from error
    if pixels > MAX_PIXELS:
        raise UnreadableImage(f"This picture has more than {MAX_PIXELS // 10**6} million pixels: make it smaller.")


def message(text: str) -> str:
    return f'<p class="problem" role="alert">{escape(text)}</p>'


def escape(text: str) -> str:
    """Text for HTML; also without the braces and dollars that Gradio's templates might read."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;")


def show(photo: Image.Image, captions: Sequence[Caption]) -> str:
    """The photo, the best caption, each word with its map, and the other captions."""
    photo = shrunk(photo)
    best, others = captions[0], [caption for caption in captions[1:] if caption.words]
    note = (
        "The model has nothing to say about this picture."
        if not best.words
        else "This model has no attention: it cannot show where it looked."
        if best.attention is None
        else "Point at a word, or tap it, to see where the model looked when it said it."
    )
    lines = "".join(f"<li>{words_with_maps(caption)}{score(caption)}</li>" for caption in others)
    return (
        f'<div class="looked" style="--aspect: {photo.width / photo.height:.4f}">'
        f'<img class="photo" alt="The photo" src="{data_url(photo, "JPEG")}">'
        f'<p class="caption">{words_with_maps(best)}</p><p class="note">{note}{score(best)}</p>'
        + (f'<p class="note">It might also have said:</p><ol>{lines}</ol>' if lines else "")
        + "</div>"
    )


def score(caption: Caption) -> str:
    return f'<span class="score">log-probability {caption.log_probability:.2f}</span>'


def words_with_maps(caption: Caption) -> str:
    """The words in a row; with attention each is a button that shows its map."""
    if caption.attention is None:
        return escape(caption.text)
    parts = []
    for word, row in zip(caption.words, caption.attention, strict=True):
        peak = peak_of(row)
        where = f"{peak['weight']:.0%} of the attention {peak['x']:.0%} from the left, {peak['y']:.0%} from the top"
        parts.append(
            f'<label class="word" title="{where}"><input type="radio" name="word" aria-description="{where}">'
            f'{escape(word)}<img class="map" alt="" src="{data_url(map_of(row), "PNG")}"></label>'
        )
    return " ".join(parts)


def map_of(weights: np.ndarray) -> Image.Image:
    """One word's attention as a small transparent picture, in the colours of `attention_visualization`."""
    shares = upsample(weights, MAP_SIZE, MAP_SIZE) / weights.max()
    return Image.fromarray(colours()(shares, bytes=True))


def data_url(picture: Image.Image, form: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=88)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --------------------------------------------------------------------------------------------------
# The page and its server


def build_page(captioner: Captioner, examples: Sequence[Path], beam_size: int, length_penalty: float) -> gr.Blocks:
    """The page, not yet served."""
    flags = captioner.flags
    model = (
        f"{flags['decoder']} decoder on {flags['encoder']}, trained on {flags['dataset_type']}, epoch {captioner.epoch}"
    )
    with gr.Blocks(title="Image captioner", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# Image captioner\nDrop a photo or take one. It stays on this computer.  \n{model}.")
        with gr.Row():
            with gr.Column():
                photo: Any = gr.Image(type="filepath", label="Photo", height=420, buttons=[], elem_id="photo")
                # The uploaded file as it is, to be opened by our rules rather than Gradio's.
                photo.preprocess = lambda payload: None if payload is None else payload.path
                photo.async_move_resource_to_block_cache = refuse_addresses(photo.async_move_resource_to_block_cache)
            with gr.Column():
                result = gr.HTML(answer(captioner, None, 1, 0), elem_id="result")
        with gr.Row():
            beam = gr.Slider(
                1, max(WIDEST_BEAM, beam_size), beam_size, step=1, label="Beam size",
                info="Captions that are followed at once; more find likelier ones", elem_id="beam",
            )  # fmt: skip
            penalty = gr.Slider(
                0, max(2.0, length_penalty), length_penalty, step=0.1, label="Length penalty",
                info="More makes captions longer", elem_id="penalty",
            )  # fmt: skip
        if examples:
            gr.Examples(
                [[str(path)] for path in examples], photo, label="Photos of the data set that it was not trained on",
                cache_examples=False, api_visibility="private", example_labels=None,
            )  # fmt: skip
        gr.on(
            [photo.change, beam.release, penalty.release], lambda *values: answer(captioner, *values),
            [photo, beam, penalty], result, api_visibility="private", trigger_mode="always_last", show_progress="minimal",
        )  # fmt: skip
    return page.queue(max_size=32, default_concurrency_limit=1)


def refuse_addresses(take: Callable[[str], Awaitable[str]]) -> Callable[[str], Awaitable[str]]:
    """Gradio would fetch a photo whose path in a request is an address of the web; this page fetches nothing."""

    async def take_file(path: str) -> str:
        if "://" in str(path):
            raise gr.Error("This page fetches nothing: upload the photo itself.")
        return await take(path)

    return take_file


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
    if data_dir is None and not (image_dir and captions_file):
        data_dir = Path("data") / flags["dataset_type"]
    try:
        data = load_caption_set(data_dir, image_dir, captions_file, flags["seed"], captioner.split)
    except UserError:
        if args.data_dir or args.image_dir or args.captions_file:
            raise
        log.info("No example photos: the data set of this model is not here (--data_dir names it)")
        return []
    chosen = np.random.default_rng(0).permutation(data.splits["test"])[:EXAMPLES]
    return [data.image_dir / data.names[image] for image in chosen]


def start_page(page: gr.Blocks, host: str, port: int | None) -> str:
    """Serve the page from threads of this process; returns its address.

    Raises:
        UserError: the address is taken, or none of this machine's.
    """
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
            max_file_size=MAX_BYTES, max_threads=4, css=STYLE, footer_links=[], run_history=False, ssr_mode=False, pwa=False,
            mcp_server=False, enable_monitoring=False, strict_cors=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot serve the page on {host}{f', port {port}' if port else ''}: another program listens there, or "
            "the address is none of this machine's. Choose another --port or --host"
        ) from error
    return url


def serve_page(args: Settings) -> int:
    """`--mode serve`: serve until Ctrl-C or SIGTERM; returns the exit code.

    Raises:
        UserError: no usable checkpoint, or the page cannot be served.
    """
    with tempfile.TemporaryDirectory(prefix="captioner-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        captioner = Captioner(args.model_path[0], args.device, args.resnet_weights)
        log.info(f"Model: {captioner}. Device: {captioner.device}")
        page = build_page(captioner, find_examples(captioner, args), *captioner.decoding(args))
        url = start_page(page, args.host, args.port)
        print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"Note: --host {args.host} lets others on the network use it, too", file=sys.stderr)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            log.info("\nThe page is closed.")
        finally:
            page.close(verbose=False)
    return 0
