"""How a captioner adapts to photos of a kind that it has never seen: a theme is withheld from its training.

    python benchmarks/adaptation.py --data_dir data/flickr8k
    python benchmarks/adaptation.py --data_dir data/flickr8k --sizes 200 --flags --learning_rate 0.001

All photos with a caption that has the theme's word leave the data set, and a captioner is trained on the others. Some of
the theme's photos are never trained on. With some of the rest, as own photos, `--init_from` adapts the captioner, with and
without replay, and `configs/own_photos_from_nothing.yaml` trains a new one. CIDEr (beam 3, x100) of all on the theme's
held-out photos, and on the data set's other held-out photos, where what is lost was forgotten.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.data.dataset import CaptionSet, load_caption_set
from captioning.data.layouts import read_captions
from captioning.io import read_json
from captioning.runs.directories import read_run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SOURCE = ["--config", str(CONFIGS / "flickr8k_attention_cpu.yaml"), "--fine_tune", "0", "--best_metric", "cider"]
SOURCE += ["--views", "whole", "--dataset_type", "custom", "--epochs", "6"]
FROM_NOTHING = ["--config", str(CONFIGS / "own_photos_from_nothing.yaml"), "--views", "whole"]
TEST_SHARE, VALIDATION_SHARE = 0.28, 0.1  # of the theme's photos; of the own photos
SEED = 0  # of which photos are held out


def themed_images(data: CaptionSet, word: str) -> np.ndarray:
    """Return the positions of the images with a caption that has a word which begins like this."""
    begins = np.array([known.startswith(word) for known in data.tokens.words])
    has = np.logical_or.reduceat(begins[data.tokens.ids], data.tokens.offsets[:-1])  # no caption is empty
    return np.unique(np.searchsorted(data.first_caption, np.flatnonzero(has), side="right") - 1)


def write_set(folder: Path, data: CaptionSet, parts: Mapping[str, np.ndarray]) -> Path:
    """Write a data set of some of the images, with its lists; return its folder."""
    folder.mkdir(parents=True)
    (folder / "Images").symlink_to(data.image_dir.resolve())
    names = {split: [data.names[i] for i in images] for split, images in parts.items()}
    table, _ = read_captions(data.captions_file)
    table = table[table["image"].isin({name for part in names.values() for name in part})]
    table.to_csv(folder / "captions.txt", index=False, quoting=csv.QUOTE_MINIMAL)
    for split, part in names.items():
        (folder / f"{split}.txt").write_text("\n".join(part) + "\n")
    return folder


def write_sets(folder: Path, data: CaptionSet, word: str, sizes: Sequence[int]) -> tuple[Path, dict[int, Path]]:
    """Write the data set without the theme, and own photos of the theme in each size, with the same test images."""
    themed = themed_images(data, word)
    shuffled = np.random.default_rng(SEED).permutation(themed)
    test, rest = np.split(shuffled, [round(TEST_SHARE * len(themed))])
    own = {}
    for size in dict.fromkeys(min(size, len(rest)) for size in sizes):
        val, train = np.split(rest[:size], [max(1, round(VALIDATION_SHARE * size))])
        own[size] = write_set(folder / f"own_{size}", data, {"train": train, "val": val, "test": test})
    others = {split: np.setdiff1d(images, themed) for split, images in data.splits.items()}
    print(f"{len(themed)} images with {word}...: {len(test)} for testing, {len(rest)} to adapt on", flush=True)
    return write_set(folder / "others", data, others), own


def train(name: str, flags: Sequence[str], runs: Path, photos: Path, others: Path | None) -> Path:
    """Train, unless the run is there; score on the theme's held-out photos and on the others', and print a line."""
    place = runs / name.replace(" ", "_")
    if not (begun := list(place.rglob("last.pt"))):
        call(*flags, "--model_save_dir", str(place))
    elif not list(place.rglob("report.html")):  # the last file of a finished run
        call("--resume", str(begun[0].parent))
    (run,) = (path.parent for path in place.rglob("best.pt"))
    found = read_run(run)
    minutes, epoch = found.facts.get("Minutes", "-"), (found.best or {}).get("epoch", "-")
    scores = [cider(run, photos, "test"), *([cider(run, others, "val+test")] if others else [])]
    cells = [f"{score:.1f}" for score in scores] + ["-"] * (2 - len(scores))
    print(f"{name:<44}{cells[0]:>8}{cells[1]:>8}{minutes:>9}{epoch:>7}", flush=True)
    return run


def cider(run: Path, data_dir: Path, split: str) -> float:
    """Return the score of the beam's captions."""
    flags = ["--model_path", str(run), "--data_dir", str(data_dir), "--split", split]
    call("--mode", "test", "--beam_size", "3", "--consensus", "off", *flags)
    return 100 * float(read_json(run / "test_metrics.json")[-1]["cider"])


def call(*flags: str) -> None:
    if trainer.main([*flags, "--quiet"]) != 0:
        raise SystemExit("the program failed")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Flickr8k, or another set with split lists")
    runs = "keep everything here; what is there is used (default: %(default)s)"
    parser.add_argument("--runs", type=Path, default=Path("saved_models/adaptation"), help=runs)
    parser.add_argument("--theme", default="snow", help="how a word of the theme begins (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200, 800], help="numbers of own photos")
    shares = [0.2, 0.5, 0.8, 0.9]
    parser.add_argument("--replay", type=float, nargs="*", default=shares, help="shares of old captions to try")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of adaptation; come last")
    args = parser.parse_args(argv)
    with TemporaryDirectory(prefix="adaptation-") as folder:
        others, own = write_sets(Path(folder), load_caption_set(args.data_dir), args.theme, args.sizes)
        print(f"{'':<44}{'theme':>8}{'others':>8}{'minutes':>9}{'epoch':>7}", flush=True)
        first = [*SOURCE, "--data_dir", str(others)]
        source = train("not adapted", first, args.runs, next(iter(own.values())), others)
        for size, photos in own.items():
            start = ["--data_dir", str(photos), "--init_from", str(source), *args.flags]
            ways = {"adapted": start}
            for share in args.replay:
                ways[f"replay {share:g}"] = [*start, "--replay", str(share), "--replay_data_dir", str(others)]
            for seed in map(str, range(args.seeds)):
                for way, flags in ways.items():
                    name = f"{size} photos, {way}, seed {seed}"
                    train(name, [*flags, "--seed", seed], args.runs, photos, others)
                flags = [*FROM_NOTHING, "--data_dir", str(photos), "--seed", seed]
                train(f"{size} photos, from nothing, seed {seed}", flags, args.runs, photos, None)


if __name__ == "__main__":
    main()
