"""Images per second of the encoding pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from baselines import naive_pass
from generated import draw_pictures
from measure import Bench, Figure, compared, interleaved

from captioning.dataset import load_caption_set
from captioning.encoders import ENCODE_BATCH, Encoder, find_encoder
from captioning.feature_store import FeatureFile
from captioning.features import encode_images
from captioning.images import load_pixels

PART = "encoding"
# The bare forward against eager and contiguous: with a C++ compiler, and without one.
TARGETS = {"efficientnet_lite0": (2.5, 1.8), "resnet50": (1.7, 1.7)}
Form = Callable[[np.ndarray], torch.Tensor]


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
    count, batch = len(paths), min(ENCODE_BATCH, len(paths))
    spec = find_encoder(name)
    weights, _ = spec.find_weights("random" if name == "resnet50" else None)
    eager, fast = (spec.build(weights).to(device) for _ in range(2))
    pixels = np.stack([load_pixels(path, spec.image_size) for path in paths[:batch]])
    tensor = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).contiguous()
    forms = {"frozen graph" if device.type == "cpu" else "float16": fast.fast_form(device)}
    if scale.compiled and (compiled := compiled_form(spec.build(weights), device)):
        forms["compiled"] = compiled
    best, repeats = list(forms)[-1], max(1, count // batch)

    def many(run: Form) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(repeats):
                run(pixels).cpu()

        return repeat

    ways: dict[str, Callable[[], object]] = {
        "pass": lambda: encoding_pass(fast, forms[best], device, paths),
        "naive": lambda: naive_pass(eager, paths[: scale.naive], 1, device),
        "eager": torch.inference_mode()(lambda: eager(tensor).cpu()),
        **{form: many(run) for form, run in forms.items()},
    }
    seconds = interleaved(ways, scale.repeats, device)
    rate = {form: repeats * batch / seconds[form] for form in forms}
    whole, naive = count / seconds["pass"], min(scale.naive, count) / seconds["naive"]
    note = f"{count} images; {'compiled' if len(forms) > 1 else 'not compiled'}"
    figures = [
        compared(PART, f"{name}: encoding pass / bare forward", whole, "images/s", f"bare forward, {best}", rate[best], note).must(">=", 0.85),
        compared(PART, f"{name}: encoding pass / naive loop", whole, "images/s", "Pillow, DataLoader, eager, one by one", naive, f"naive: {scale.naive} images"),
    ]  # fmt: skip
    with_compiler, without = TARGETS[name]
    for form in forms:
        against, plain = f"eager, contiguous, batches of {batch}", batch / seconds["eager"]
        figure = compared(PART, f"{name}: bare forward, {form}", rate[form], "images/s", against, plain)
        figures.append(figure.must(">=", with_compiler if form == "compiled" else without))
    return figures


def compiled_form(encoder: Encoder, device: torch.device) -> Form | None:
    """The compiled encoder; None where nothing can be compiled and `fast_form` falls back to the other form."""
    results, compile_for = [], encoder.compile_for

    def watched(example: torch.Tensor) -> object:
        results.append(compile_for(example))
        return results[-1]

    encoder.compile_for = watched  # type: ignore[method-assign, assignment]
    form = encoder.fast_form(device, compiled=True)
    return form if results[-1] is not None else None


def encoding_pass(encoder: Encoder, form: Form, device: torch.device, paths: list[Path]) -> None:
    """The project's pass over these images, into a store that is thrown away.

    The encoder's fast form is made beforehand: tracing or compiling it comes once, whatever the number of images.
    """
    encoder.fast_form = lambda *_, **__: form  # type: ignore[method-assign]
    with TemporaryDirectory() as directory:
        file = FeatureFile(Path(directory), "grid", (encoder.spec.regions, encoder.spec.channels))
        encode_images(encoder, device, file, paths, list(range(len(paths))), os.cpu_count() or 1)
