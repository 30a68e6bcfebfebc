"""Images per second of beam search, in batches against one image at a time."""

from __future__ import annotations

import io
import statistics
from contextlib import redirect_stdout
from functools import partial

import numpy as np
from measure import Bench, Figure, compared, interleaved
from training import Trial, flags_for, prepare_features

from captioning.building import load_context
from captioning.evaluation import EvalContext, caption
from captioning.settings import parse_flags

PART = "decoding"
BEAMS = (1, 3, 5)
WIDE = 20  # the beam of consensus


def measure(bench: Bench) -> list[Figure]:
    if bench.model_path:
        flags = ["--mode", "test", "--model_path", str(bench.model_path), "--data_dir", str(bench.data_dir)]
        with redirect_stdout(io.StringIO()):
            context, *_ = load_context(
                parse_flags([*flags, "--feature_cache", str(bench.feature_cache)]), ["val", "test"]
            )
        return measure_decoder(bench, context, np.concatenate([context.data.splits[s] for s in ("val", "test")]), 0)
    data_dir, figures = prepare_features(bench), []
    for decoder in bench.scale.sizes["small"]:
        trial = Trial(flags_for(bench, data_dir, decoder, "small"))
        trial.shorten(bench.scale.training)
        trial.epoch()  # an untrained decoder never ends a caption
        every = np.concatenate(list(trial.context.data.splits.values()))
        figures += measure_decoder(bench, trial.context, every, bench.scale.training)
    return figures


def measure_decoder(bench: Bench, context: EvalContext, every: np.ndarray, steps: int) -> list[Figure]:
    """One decoder on some of these images. Args: steps: that it was trained for, 0 for a loaded one."""
    scale = bench.scale
    images = np.random.default_rng(0).choice(every, min(scale.decoded, len(every)), replace=False)
    alone = images[: scale.alone]

    def one_by_one(beam: int) -> None:
        for image in alone:
            caption(context, np.array([image]), beam)

    ways = {f"batch {beam}": partial(caption, context, images, beam) for beam in (*BEAMS, WIDE)}
    singles = {f"alone {beam}": partial(one_by_one, beam) for beam in BEAMS}
    seconds = interleaved(ways | singles, scale.repeats, bench.device)
    name, widest = context.settings.decoder, BEAMS[-1]
    words = statistics.mean(len(found.ids) for found in caption(context, images, widest))
    trained = f"trained for {steps} steps" if steps else "loaded"
    note = f"{len(images)} images against {len(alone)}; {trained}; captions of {words:.1f} words at beam {widest}"
    figures = [
        compared(
            PART, f"{name}: beam {beam}", len(images) / seconds[f"batch {beam}"], "images/s", "one image at a time",
            len(alone) / seconds[f"alone {beam}"], note,
        )
        for beam in BEAMS
    ]  # fmt: skip
    figures[-1].must(">=", 3)
    thousand, singly = 1000 * seconds[f"batch {widest}"] / len(images), 1000 * seconds[f"alone {widest}"] / len(alone)
    whole = compared(PART, f"{name}: 1,000 images, beam {widest}", thousand, "s", "one image at a time", singly)
    wide, usual = (1000 * seconds[f"batch {beam}"] / len(images) for beam in (WIDE, widest))
    times = Figure(PART, f"{name}: beam {WIDE}", wide, "ms/image", f"beam {widest}", usual, wide / usual).must("<", 2.5)
    return [*figures, whole.must("<", 12, of_value=True), times]
