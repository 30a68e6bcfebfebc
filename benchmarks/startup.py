"""Seconds until the program answers, and until it has trained its first step on cached features."""

from __future__ import annotations

import os
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import Bench, Figure

PART = "startup"
PROGRAM = Path(__file__).resolve().parent.parent / "flickr_image_caption_with_pytorch_resnet_lstm.py"


def measure(bench: Bench) -> list[Figure]:
    import training

    data_dir = training.prepare_features(bench)
    commands = {
        "python alone": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "--help": [str(PROGRAM), "--help"],
        "a mistyped flag": [str(PROGRAM), "--decodr", "lstm"],
    }
    for decoder in bench.scale.sizes["small"]:
        commands[f"first step, {decoder}"] = [__file__, *training.flags_for(bench, data_dir, decoder, "small")]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for counted in [False] * (bench.scale.starts > 1) + [True] * bench.scale.starts:  # the first fills the token cache
        for name, command in commands.items():
            started = time.perf_counter()
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
            if done.returncode != (2 if "mistyped" in name else 0):
                raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-500:]}")
            if counted:
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(each) for name, each in seconds.items()}
    note = f"ratio: times the baseline's; median of {bench.scale.starts}"
    figures = []
    for name in list(commands)[2:]:
        against, bound = ("import torch", 5) if name.startswith("first step") else ("python alone", 0.5)
        ratio = median[name] / median[against]
        figure = Figure(PART, name, median[name], "s", against, median[against], ratio, note=note)
        figures.append(figure.must("<", bound, of_value=True))
    return figures


def stop_after_first_step() -> None:
    """Run the main program with this script's flags and leave at the end of its first optimizer step."""
    sys.path.insert(0, str(PROGRAM.parent))
    from training_utils import Precision

    step = Precision.step

    def last_step(*arguments: object) -> None:
        float(step(*arguments))  # type: ignore[arg-type]  # waits for the device
        os._exit(0)

    Precision.step = last_step  # type: ignore[method-assign, assignment]
    sys.argv[0] = str(PROGRAM)
    runpy.run_path(str(PROGRAM), run_name="__main__")


if __name__ == "__main__":
    stop_after_first_step()
