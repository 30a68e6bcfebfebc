"""Images per second of beam search, in batches against one image at a time."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import numpy as np
import training
from measure import Bench, Figure, faster, interleaved

from captioning.evaluation import caption

PART = "decoding"
BEAMS = (1, 3, 5)


def measure(bench: Bench) -> list[Figure]:
    data_dir, _ = training.prepare_data(bench)
    if bench.model_path and bench.feature_cache:
        flags = ["--model_path", str(bench.model_path), "--data_dir", str(data_dir), "--epochs", "1",
                 "--feature_cache", str(bench.feature_cache), "--model_save_dir", str(bench.directory / "runs")]  # fmt: skip
        return measure_decoder(bench, training.start(bench, flags), 0)
    training.prepare_features(bench, data_dir)
    return [
        figure
        for decoder in bench.scale.sizes["small"]
        for figure in measure_decoder(
            bench, training.start(bench, training.flags_for(bench, data_dir, decoder, "small")), bench.scale.training
        )
    ]


def measure_decoder(bench: Bench, run: Any, steps: int) -> list[Figure]:
    """One decoder, after some steps of training, since an untrained one never ends a caption."""
    scale, device = bench.scale, bench.device
    every = np.concatenate(list(run.data.splits.values()))
    images = np.random.default_rng(0).choice(every, min(scale.decoded, len(every)), replace=False)
    alone = images[: scale.alone]
    if steps:
        training.restrict(run, steps)
        training.epoch(run)

    def one_by_one(beam: int) -> None:
        for image in alone:
            caption(run, np.array([image]), beam)

    ways = {("batch", beam): partial(caption, run, images, beam) for beam in BEAMS}
    singles = {("alone", beam): partial(one_by_one, beam) for beam in BEAMS}
    seconds = interleaved(
        {f"{how} {beam}": way for (how, beam), way in {**ways, **singles}.items()}, scale.repeats, device
    )
    name = run.args.decoder
    words = statistics.mean(len(found.ids) for found in caption(run, images, BEAMS[-1]))
    trained = f"trained for {steps} steps" if steps else "loaded"
    note = f"{len(images)} images against {len(alone)}; {trained}; captions of {words:.1f} words at beam {BEAMS[-1]}"
    figures = [
        faster(
            PART, f"{name}: beam {beam}", len(images) / seconds[f"batch {beam}"], "one image at a time",
            len(alone) / seconds[f"alone {beam}"], note=note,
        )
        for beam in BEAMS
    ]  # fmt: skip
    figures[-1].must(">=", 3)
    thousand = 1000 * seconds[f"batch {BEAMS[-1]}"] / len(images)
    whole = Figure(
        PART, f"{name}: 1,000 images, beam {BEAMS[-1]}", thousand, "s", "one image at a time",
        1000 * seconds[f"alone {BEAMS[-1]}"] / len(alone), figures[-1].ratio,
    )  # fmt: skip
    return [*figures, whole.must("<", 12, of_value=True)]
