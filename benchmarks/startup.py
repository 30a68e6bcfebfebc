"""Seconds until the program answers, has trained its first step on cached features, or has captioned a photo."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import Bench, Figure, compared, interleaved

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
    model, photo = photo_model(bench)
    commands["caption of a photo"] = [str(PROGRAM), "--mode", "caption", "--model_path", str(model), "--beam_size", "5", "--images", str(photo)]  # fmt: skip
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
        if name == "caption of a photo":
            against, bound = "import torch", 1.5
        ratio = median[name] / median[against]
        figure = Figure(PART, name, median[name], "s", against, median[against], ratio, note=note)
        figures.append(figure.must("<", bound, of_value=True))
    return [*figures, page_answer(model, photo, bench)]


def photo_model(bench: Bench) -> tuple[Path, Path]:
    """Return a run with six views of an attention decoder of the recipes' size, and a photo."""
    from generated import draw_pictures, write_data_set

    import flickr_image_caption_with_pytorch_resnet_lstm as trainer

    folder = bench.directory / "photos"
    pictures = draw_pictures(bench.directory / "photo", 4)
    write_data_set(folder, min(bench.scale.images, 200), pictures)
    flags = "--dataset_type custom --encoder efficientnet_lite0 --views all --decoder attention --embed_size 300"
    flags += " --hidden_size 512 --num_layers 1 --epochs 1 --freq_threshold 1 --learning_rate 0.002 --quiet"
    places = ["--data_dir", folder, "--feature_cache", folder / "cache", "--model_save_dir", folder / "runs"]
    with contextlib.redirect_stdout(io.StringIO()):
        if trainer.main([*flags.split(), *map(str, places)]):
            raise RuntimeError("the model for the photo was not trained")
    (best,) = (folder / "runs").rglob("best.pt")
    return best, pictures[0]


def page_answer(model: Path, photo: Path, bench: Bench) -> Figure:
    """The page's answer to a photo, attention maps included, against that with an encoder in PyTorch."""
    from captioning.captioner import Captioner
    from captioning.modes.serve import caption_upload

    captioners = {"compiled": Captioner.load(model), "plain": Captioner.load(model)}
    captioners["compiled"].expect_many()
    data = photo.read_bytes()
    ways = {
        name: functools.partial(caption_upload, captioner, data, True, {"beam_size": 5, "length_penalty": 0.7})
        for name, captioner in captioners.items()
    }
    seconds = interleaved(ways, 4 * bench.scale.repeats, bench.device)
    note = "a trained decoder ends its captions sooner"
    figure = compared(PART, "the page's answer, beam 5", seconds["compiled"], "s", "encoder in PyTorch", seconds["plain"], note)  # fmt: skip
    return figure.must("<", 0.3, of_value=True)


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
