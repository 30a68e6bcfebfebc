"""Do attention maps mean something? Train on the demo set, where each shape's place is known, and play the pointing game.

    python benchmarks/pointing.py                               # trains for 8 epochs: some minutes
    python benchmarks/pointing.py --quick                       # few pictures: a minute
    python benchmarks/pointing.py --model_path RUN              # of a demo run that is there
    python benchmarks/pointing.py --flags --attention_reg 1     # what else to give to training

Prints how many shape words have their attention peak on the shape, beside what a peak in any cell and the peaks of
other pictures' shape words get, for large and small shapes too. Exit code 1 where the maps are not better than that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning import demo_set
from captioning.demo_set import Boxes, draw_demo_dataset

TIMES_SHUFFLED = 2.0  # so many times the share of other pictures' maps is asked of the maps, hit and near alike
LARGE = 0.3  # of the picture's side: a box that is wider is a large shape's
SIZES = {"all": (0.0, 1.0), "large": (LARGE, 1.0), "small": (0.0, LARGE)}
SCORES = ("pointing_game", "pointing_game_near")
TRAINING = [
    "--decoder", "attention", "--encoder", "efficientnet_lite0", "--batch_size", "64", "--learning_rate", "0.002",
    "--embed_size", "256", "--hidden_size", "256", "--num_layers", "1", "--attention_dim", "256",
    "--freq_threshold", "1", "--use_scheduler", "--scheduler_type", "one_cycle", "--warmup_epochs", "2",
]  # fmt: skip
QUICK = ["--batch_size", "16", "--learning_rate", "0.005"]  # of few pictures


def train(scenes: int, epochs: int, more: Sequence[str], folder: Path) -> Path:
    """Train on a demo set in `folder`; return the run directory."""
    draw_demo_dataset(folder / "demo", scenes)
    places = ["--data_dir", str(folder / "demo"), "--feature_cache", str(folder / "cache")]
    places += ["--model_save_dir", str(folder / "runs"), "--epochs", str(epochs)]
    if trainer.main(["--dataset_type", "demo", *TRAINING, *places, *more]) != 0:
        raise SystemExit("training failed")
    (run,) = (folder / "runs").glob("demo/*/*")
    return run


def captions_and_maps(
    run: Path, flags: Sequence[str] = ()
) -> tuple[list[list[str]], list[np.ndarray | None], list[Boxes]]:
    """Words, attention and shapes of the validation and test images, as `--mode test` gives them to the game."""
    played: list[tuple[Any, ...]] = []
    original = demo_set.play

    def recorded(*arguments: Any) -> dict[str, float]:
        played.append(arguments)
        return original(*arguments)

    demo_set.play = recorded
    try:
        if trainer.main(["--mode", "test", "--split", "val+test", "--model_path", str(run), *flags]) != 0:
            raise SystemExit("testing failed")
    finally:
        demo_set.play = original
    if not played:
        raise SystemExit(f"{run} is not an attention decoder trained on the demo set")
    captions_file, names, words, maps = played[-1]
    boxes = demo_set.read_boxes(captions_file.with_name("shapes.json"))
    return words, maps, [boxes[name] for name in names]


def table(words: list[list[str]], maps: list[np.ndarray | None], boxes: list[Boxes]) -> dict[str, dict[str, float]]:
    """Scores for all shapes, the large and the small ones."""

    def of_size(scene: Boxes, low: float, high: float) -> Boxes:
        return {word: box for word, box in scene.items() if low < box[2] - box[0] <= high}

    return {
        kind: demo_set.score(words, maps, [of_size(scene, *bounds) for scene in boxes])
        for kind, bounds in SIZES.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model_path", type=Path, help="a demo run that is there (default: train one)")
    parser.add_argument("--quick", action="store_true", help="80 pictures, which are too few for good maps")
    parser.add_argument("--scenes", type=int, help="pictures of the demo set (default: 800)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs to train (default: 8)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of training; come last")
    args = parser.parse_args(argv)
    scenes, flags = args.scenes or (80 if args.quick else 800), [*(QUICK if args.quick else []), *args.flags]
    with TemporaryDirectory() as folder:
        results = table(*captions_and_maps(args.model_path or train(scenes, args.epochs, flags, Path(folder))))
    if not results["all"]:
        raise SystemExit("the model says no word for a shape that is there: train longer")
    print(f"\n{'shapes':<8}{'words':>7}{'':>4}{'peak on the shape':<34}{'on it or within half a cell':<34}")
    heads = "".join(f"{name:>10}" for name in ("maps", "any cell", "shuffled")) + "    "
    print(f"{'':<19}{heads}{heads}")
    for kind, result in results.items():
        if result:
            cells = [
                "".join(f"{100 * result.get(name + end, np.nan):9.1f}%" for end in ("", "_uniform", "_shuffled"))
                for name in SCORES
            ]
            print(f"{kind:<8}{result['pointing_game_words']:>7}{'':>4}{'    '.join(cells)}")
    scores = results["all"]
    short = [name for name in SCORES if not scores[name] >= TIMES_SHUFFLED * scores.get(f"{name}_shuffled", 0.0)]
    for name in short:
        print(f"{name} is less than {TIMES_SHUFFLED:g} times what the maps of other pictures get")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
