"""Images per second of the encoding pass, and of the encoder alone in all the forms that it could run in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from baselines import Form, compiled, frozen_graph, naive_pass, onnx_runtime, view_by_view
from generated import draw_pictures
from measure import Bench, Figure, compared, interleaved, large_product
from torch.utils.flop_counter import FlopCounterMode

from captioning.dataset import load_caption_set
from captioning.encoders import ENCODE_BATCH, Encoder, find_encoder
from captioning.feature_store import FeatureFile
from captioning.features import MOST_STREAMS, FeatureRequest, encode_images
from captioning.images import VIEW_SETS, load_views

PART = "encoding"
VIEWS = VIEW_SETS["all"]
TARGETS = {"efficientnet_lite0": 3.0, "resnet50": 1.35}  # six views: times the rate of the pass before


def measure(bench: Bench) -> list[Figure]:
    most = max(bench.scale.encoded.values())
    if bench.data_dir:
        paths = load_caption_set(bench.data_dir).paths()[:most]
    else:
        paths = draw_pictures(bench.directory / "encoding", most)
    return [figure for name in bench.scale.encoded for figure in measure_encoder(bench, name, paths)]


def measure_encoder(bench: Bench, name: str, paths: list[Path]) -> list[Figure]:
    scale, device = bench.scale, bench.device
    paths = paths[: scale.encoded[name]]
    spec = find_encoder(name)
    weights, _ = spec.find_weights("random" if name == "resnet50" else None)
    build = partial(spec.build, weights)
    eager, fast = build().to(device), build()
    streams = min(torch.get_num_threads(), MOST_STREAMS) if device.type == "cpu" else 1
    few = paths[: max(1, ENCODE_BATCH // len(VIEWS))]
    pixels = np.concatenate([load_views(path, spec.image_size, VIEWS) for path in few])  # (B, size, size, 3)
    best = fast.fast_form(device, streams=streams)
    before = frozen_graph(build()) if device.type == "cpu" else best
    forms: dict[str, Form | None] = {"frozen graph": before}
    if scale.compiled and device.type == "cpu":
        forms |= {"compiled": compiled(build(), pixels), "ONNX Runtime": onnx_runtime(build(), bench.directory)}
    rounds = max(1, min(480, len(paths) * len(VIEWS)) // len(pixels) // streams)

    def many(run: Form, threads: int = 1) -> Callable[[], None]:
        def repeat() -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda _: run(pixels).cpu(), range(rounds * threads)))

        return repeat

    plain = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).contiguous()
    ways: dict[str, Callable[[], object]] = {
        "pass": lambda: encoding_pass(bench, fast, best, paths),
        "before": lambda: pass_before(before, fast, paths),
        "naive": lambda: naive_pass(eager, paths[: scale.naive], 1, device),
        "eager": torch.inference_mode()(lambda: eager(plain).cpu()),
        "bare": many(best, streams),
        **{form: many(run) for form, run in forms.items() if run},
    }
    seconds = interleaved(ways, scale.repeats, device)
    squares = len(paths) * len(VIEWS)
    whole, bare = squares / seconds["pass"], rounds * streams * len(pixels) / seconds["bare"]
    note = f"{name}: {len(paths)} images in {len(VIEWS)} views"
    against = "a pass for each view, frozen graph"
    figures = [
        compared(PART, f"{name}: six views / the pass before", whole, "views/s", against, squares / seconds["before"], note).must(">=", TARGETS[name]),
        compared(PART, f"{name}: six views / bare forward", whole, "views/s", "bare forward", bare).must(">=", 0.8),
        compared(PART, f"{name}: six views / naive loop", whole, "views/s", "Pillow, DataLoader, eager, one by one", min(scale.naive, len(paths)) / seconds["naive"]),
        compared(PART, f"{name}: bare forward", bare, "views/s", "eager, contiguous", len(pixels) / seconds["eager"]),
    ]  # fmt: skip
    for form in (form for form, run in forms.items() if run):
        rate = rounds * len(pixels) / seconds[form]
        figures.append(compared(PART, f"{name}: bare forward, {form}", rate, "views/s", "eager, contiguous", len(pixels) / seconds["eager"]))  # fmt: skip
    if device.type == "cpu":
        limit = product_rate(scale.matmul, device) / operations(eager, plain)
        figures.append(compared(PART, f"{name}: bare forward / float32 product", bare, "views/s", "the product's rate by the encoder's operations", limit))  # fmt: skip
        figures[-1].limit = 1.0
    return figures


def operations(encoder: Encoder, pixels: torch.Tensor) -> float:
    """Floating-point operations of an image."""
    with FlopCounterMode(display=False) as counter:
        encoder(pixels[:1])
    return float(counter.get_total_flops())


def product_rate(size: int, device: torch.device) -> float:
    """Operations a second of a large product in float32."""
    product = large_product(size, torch.float32, device)
    return 2 * size**3 / interleaved({"product": product}, 3, device)["product"]


@contextmanager
def stores(encoder: Encoder) -> Iterator[list[FeatureFile]]:
    """A file of features for each view, which are thrown away."""
    shape = (encoder.spec.regions, encoder.spec.channels)
    with TemporaryDirectory() as directory:
        for view in VIEWS:
            Path(directory, view).mkdir()
        yield [FeatureFile(Path(directory, view), "grid", shape) for view in VIEWS]


def encoding_pass(bench: Bench, encoder: Encoder, form: Form, paths: list[Path]) -> None:
    """The project's pass over these images.

    The encoder's fast form is made beforehand: compiling comes once, whatever the number of images.
    """
    encoder.fast_form = lambda *_, **__: form  # type: ignore[method-assign]
    request = FeatureRequest(
        [], encoder.spec, "", lambda: encoder, paths, paths[0].parent, np.arange(len(paths)), bench.device, False,
        os.cpu_count() or 1, VIEWS,
    )  # fmt: skip
    with stores(encoder) as files:
        encode_images(request, encoder, files, {image: [*range(len(VIEWS))] for image in range(len(paths))})


def pass_before(form: Form, encoder: Encoder, paths: list[Path]) -> None:
    with stores(encoder) as files:
        view_by_view(form, paths, encoder.spec.image_size, VIEWS, files)
