"""How a captioner adapts to photos of a kind that it has never seen: a theme is withheld from its training.

    python benchmarks/adaptation.py --data_dir data/flickr8k
    python benchmarks/adaptation.py --data_dir data/flickr8k --runs adaptation --sizes 200 --flags --learning_rate 0.001

All photos with a caption that has the theme's word leave the data set, and a captioner is trained on the others. Some of
the theme's photos are never trained on. With some of the rest, as own photos, `--init_from` adapts the captioner, with and
without replay, and `configs/own_photos_from_nothing.yaml` trains a new one. CIDEr (beam 3, x100) of all on the theme's
held-out photos, and on the data set's other held-out photos, where what is lost was forgotten.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.dataset import CaptionSet, load_caption_set
from captioning.io import read_json
from captioning.layouts import read_captions

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SOURCE = [
    "--config",
    str(CONFIGS / "flickr8k_attention_cpu.yaml"),
    "--encoder",
    "efficientnet_lite0",
    "--views",
    "whole",
]
SOURCE += ["--scst_epochs", "0", "--dataset_type", "custom"]
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


def train(flags: Sequence[str], data_dir: Path, place: Path, cache: str) -> tuple[Path, float, int]:
    """Train, unless it is there; return the run directory, minutes and the best epoch."""
    start = time.perf_counter()
    if not place.exists():
        where = ["--data_dir", str(data_dir), "--model_save_dir", str(place), "--feature_cache", cache, "--quiet"]
        if trainer.main([*flags, *where]) != 0:
            raise SystemExit("training failed")
    (run,) = (path.parent for path in place.rglob("best.pt"))
    history = read_json(run / "metrics_history.json")
    best = max(history, key=lambda row: row["cider"])
    return run, (time.perf_counter() - start) / 60, best["epoch"]


def cider(run: Path, data_dir: Path, split: str, cache: str) -> float:
    """Return the score of the beam's captions."""
    flags = ["--mode", "test", "--model_path", str(run), "--data_dir", str(data_dir), "--split", split, "--quiet"]
    if trainer.main([*flags, "--feature_cache", cache]) != 0:
        raise SystemExit("testing failed")
    return 100 * float(read_json(run / "test_metrics.json")[-1]["cider"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Flickr8k, or another set with split lists")
    parser.add_argument("--feature_cache", default="feature_cache", help="as in training (default: %(default)s)")
    parser.add_argument("--runs", type=Path, help="keep everything here, and use what is there (default: keep nothing)")
    parser.add_argument("--theme", default="snow", help="how a word of the theme begins (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200, 800], help="numbers of own photos")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="of the first training (default: %(default)s)")
    parser.add_argument("--replay", type=float, default=0.2, help="share of old captions (default: %(default)s)")
    parser.add_argument("--only_adapt", action="store_true", help="train none from nothing")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of adaptation; come last")
    args = parser.parse_args(argv)
    rows: list[tuple[str, float, float | None, float | None, int | None]] = []

    def row(
        name: str, own: float, others: float | None, minutes: float | None = None, epoch: int | None = None
    ) -> None:
        rows.append((name, own, others, minutes, epoch))
        print(
            "  ".join(
                "-" if cell is None else f"{cell:.1f}" if type(cell) is float else str(cell) for cell in rows[-1]
            ),
            flush=True,
        )

    with nullcontext(args.runs) if args.runs else TemporaryDirectory(prefix="adaptation-") as place:
        folder, cache = Path(place), args.feature_cache
        with TemporaryDirectory(prefix="adaptation-sets-") as sets:
            others, own = write_sets(Path(sets), load_caption_set(args.data_dir), args.theme, args.sizes)
            source, minutes, epoch = train([*SOURCE, "--epochs", str(args.epochs)], others, folder / "source", cache)
            before = cider(source, next(iter(own.values())), "test", cache), cider(source, others, "val+test", cache)
            row("not adapted", *before, minutes, epoch)
            for size, photos in own.items():
                ways = {
                    f"{size} photos, adapted": ["--init_from", str(source), *args.flags],
                    f"{size} photos, adapted, replay": [
                        "--init_from", str(source), "--replay", str(args.replay), "--replay_data_dir", str(others), *args.flags,
                    ],
                    f"{size} photos, from nothing": FROM_NOTHING,
                }  # fmt: skip
                for seed in range(args.seeds):
                    for name, flags in ways.items():
                        if args.only_adapt and flags is FROM_NOTHING:
                            continue
                        title = f"{name}, seed {seed}"
                        run, minutes, epoch = train(
                            [*flags, "--seed", str(seed)], photos, folder / title.replace(" ", "_"), cache
                        )
                        after = None if flags is FROM_NOTHING else cider(run, others, "val+test", cache)
                        row(title, cider(run, photos, "test", cache), after, minutes, epoch)
    print(f"\n{'':<44}{'theme':>8}{'others':>8}{'minutes':>9}{'epoch':>7}")
    for name, *cells in rows:
        texts = ["-" if cell is None else f"{cell:.1f}" if type(cell) is float else str(cell) for cell in cells]
        print(f"{name:<44}{texts[0]:>8}{texts[1]:>8}{texts[2]:>9}{texts[3]:>7}")


if __name__ == "__main__":
    main()
