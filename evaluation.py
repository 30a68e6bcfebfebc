"""Captions of many images, their scores as tables and files, and the search for the best way to decode."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import plots
from caption_data import CaptionSet, UnreadableImage, captions_of, open_image, tokenize
from caption_models import Hypothesis, LSTMDecoder, beam_search
from experiment_utils import save_numbered
from feature_cache import Features
from metrics_utils import (
    METRIC_NAMES,
    ImageScores,
    bootstrap_intervals,
    has_java,
    meteor_score,
    person_scores,
    score_images,
    spice_score,
    summarize,
    variety,
)
from safe_io import UserError, bars_off, read_json, write_json

INTERVALS = {"cider": "CIDEr", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "wer": "WER"}
BEAMS, LENGTH_PENALTIES = (1, 2, 3, 4, 5, 8), (0.0, 0.4, 0.7, 1.0, 1.3)  # what `--mode tune` tries


def generate(
    members: Sequence[tuple[LSTMDecoder, Features]], images: np.ndarray, device: torch.device, beam: int,
    max_length: int, length_penalty: float, attention: bool = False,
) -> list[Hypothesis]:  # fmt: skip
    """The best caption of each image, decoded freely, many images at a time.

    Args:
        members: one decoder with the features that it looks at, or an ensemble of decoders or views.
        images: positions (n,) in the caption set.
    """
    best: list[Hypothesis] = []
    chunk = max(1, 384 // (beam * len(members)))
    for start in tqdm(range(0, len(images), chunk), "Captioning", unit="batch", disable=bars_off(), leave=False):
        part = images[start : start + chunk]
        seen = [(decoder, features.gather(part).to(device)) for decoder, features in members]
        found = beam_search(seen, beam, max_length, length_penalty, attention)
        best += [hypotheses[0] for hypotheses in found]
    return best


def training_captions(data: CaptionSet) -> set[str]:
    """The training captions, tokenized and joined as hypotheses are."""
    words, ids, offsets = data.tokens
    captions = captions_of(data, data.splits["train"])
    return {" ".join(words[i] for i in ids[offsets[c] : offsets[c + 1]]) for c in captions}


def score_test(
    data: CaptionSet, images: np.ndarray, captions: Sequence[str], spice: bool = False
) -> tuple[dict[str, Any], ImageScores]:
    """Everything that is said of a set of captions: scores, intervals of 95 %, variety; and the scores by image."""
    references = [data.references(image) for image in images]
    each = score_images(captions, references)
    scores: dict[str, Any] = {**summarize(each), **variety(captions, training_captions(data))}
    if has_java():
        scores["meteor"] = meteor_score(captions, references)
    if spice:
        scores["spice"] = spice_score(captions, references)
    scores |= {f"{name}_interval": list(bounds) for name, bounds in bootstrap_intervals(each).items()}
    return scores, each


def save_test(directory: Path, names: Sequence[str], captions: Sequence[str], each: ImageScores) -> dict[str, str]:
    """Write `test_captions[_N].json` and, with the same number, `test_scores[_N].json`: the scores image by image.

    Returns:
        their names, for the row in `test_metrics.json`.
    """
    content = [{"image_id": name, "caption": caption} for name, caption in zip(names, captions, strict=True)]
    file = save_numbered(directory, "test_captions", content)
    scores = {
        "image_id": list(names), "cider": each.cider.tolist(), "rouge_l": each.rouge_l.tolist(), "wer": each.wer.tolist(),
        "bleu": {"guess": each.guess.tolist(), "correct": each.correct.tolist(), "length": each.length.tolist(),
                 "reference_length": each.reference_length.tolist()},
    }  # fmt: skip
    scores_file = file.replace("test_captions", "test_scores")
    write_json(directory / scores_file, scores)
    return {"captions_file": file, "scores_file": scores_file}


def save_references(directory: Path, data: CaptionSet, images: np.ndarray, split: str) -> Path:
    """The references as the COCO evaluation reads them, under the `image_id`s of `test_captions.json`."""
    content = {
        "info": {"description": f"{split} of {data.captions_file.name}"}, "type": "captions", "licenses": [],
        "images": [{"id": data.names[image]} for image in images],
        "annotations": [
            {"id": number, "image_id": name, "caption": caption}
            for number, (name, caption) in enumerate(
                (data.names[image], caption) for image in images for caption in data.references(image)
            )
        ],
    }  # fmt: skip
    path = directory / f"{split.replace('+', '_')}_references.json"
    write_json(path, content)
    return path


def print_scores(
    columns: Sequence[tuple[str, dict[str, Any]]], references: Sequence[Sequence[str]], split: str
) -> None:
    """A table with a column per way of decoding, and a person's own scores as the yardstick."""
    person = person_scores(references)
    shown = [*columns, *([("a person", person)] if person else [])]
    print(f"\nScores on {len(references)} {split} images (x100; lower case, no punctuation; CIDEr's word weights from")
    print("these images; a person: one caption against the image's others, which are one fewer):")
    print(" " * 28 + "".join(f"{name:>10}" for name, _ in shown))
    for key, name in METRIC_NAMES.items():
        if key in columns[0][1]:
            cells = (f"{100 * scores[key]:10.2f}" if key in scores else f"{'-':>10}" for _, scores in shown)
            print(f"  {name:<26}" + "".join(cells))
    if not has_java():
        print("  METEOR is left out: it needs Java")
    for key, name, scale in (
        ("distinct_words", "distinct words", 1), ("mean_length", "words a caption", 1), ("in_training", "% in training", 100),
    ):  # fmt: skip
        cells = (f"{scale * scores[key]:10.{0 if key == 'distinct_words' else 1}f}" for _, scores in columns)
        print(f"  {name:<26}" + "".join(cells))
    name, scores = columns[-1]
    bounds = (
        f"{label} {100 * scores[f'{key}_interval'][0]:.1f} to {100 * scores[f'{key}_interval'][1]:.1f}"
        for key, label in INTERVALS.items()
    )
    print(f"  95 % intervals over images, {name}: " + ", ".join(bounds))


def save_gallery(data: CaptionSet, images: np.ndarray, captions: Sequence[str], cider: np.ndarray, path: Path) -> None:
    """Twelve captions by rank of their own CIDEr, none picked by hand: the best four, the median, the worst.

    Args:
        cider: (n,) of each image.
    """
    order = np.argsort(-cider, kind="stable")
    middle = max(0, len(order) // 2 - 2)
    chosen = dict.fromkeys([*order[:4].tolist(), *order[middle : middle + 4].tolist(), *order[-4:].tolist()])
    samples = []
    for place in chosen:
        name = data.names[images[place]]
        try:
            picture = open_image(data.image_dir / name, at_least=400)
        except UnreadableImage:
            continue
        references = data.references(int(images[place]))
        title = f"{name} (CIDEr {100 * cider[place]:.0f})"
        samples.append({"image": picture, "name": title, "caption": captions[place], "references": references})
    plots.plot_captions(samples, path)


def read_predictions(path: Path, data: CaptionSet, images: np.ndarray) -> list[str]:
    """Captions that another program made, tokenized as ours are.

    Args:
        path: COCO results (`[{"image_id": ..., "caption": ...}]`) or a CSV file with the header `image,caption`;
            an image by its file name.

    Raises:
        UserError: another form, an image twice, or one of the images without a caption.
    """
    if path.suffix == ".csv":
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows: Any = [
                    {"image_id": row.get("image"), "caption": row.get("caption")} for row in csv.DictReader(file)
                ]
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"cannot read --predictions {path}: {error}") from error
    else:
        rows = read_json(path)
    form = '[{"image_id": "a.jpg", "caption": "a dog"}, ...], or a .csv with the header image,caption'
    if not isinstance(rows, list):
        raise UserError(f"--predictions {path} is no list of captions: expected {form}")
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        values = (row.get("image_id"), row.get("caption")) if isinstance(row, dict) else (None, None)
        name, caption = values
        if not isinstance(name, str) or not isinstance(caption, str):
            raise UserError(f"--predictions {path}: entry {number} has no image_id and caption: expected {form}")
        if name in found:
            raise UserError(f"--predictions {path}: {name} has two captions (entry {number} is the second)")
        found[name] = caption
    missing = [data.names[image] for image in images if data.names[image] not in found]
    if missing:
        raise UserError(
            f"--predictions {path} has no caption for {len(missing)} of the {len(images)} images, {missing[0]} for "
            "example: an image is known by its file name; --split chooses which are scored"
        )
    words, ids, offsets = tokenize(found[data.names[image]] for image in images)
    return [" ".join(words[i] for i in ids[offsets[n] : offsets[n + 1]]) for n in range(len(images))]


def tune(
    members: Sequence[tuple[LSTMDecoder, Features]], data: CaptionSet, words: Any, device: torch.device, max_length: int
) -> dict[str, Any]:
    """Try beam sizes and length penalties on the validation images; returns what gave the best CIDEr."""
    images = data.splits["val"]
    references = [data.references(image) for image in images]
    found: list[tuple[float, int, float]] = []
    print(f"CIDEr on {len(images)} validation images, by beam size and length penalty:")
    print("      " + "".join(f"{penalty:>8}" for penalty in LENGTH_PENALTIES))
    for beam in BEAMS:
        line = f"{beam:>6}"
        for penalty in LENGTH_PENALTIES if beam > 1 else LENGTH_PENALTIES[:1]:  # greedy decoding compares no lengths
            captions = [" ".join(words(f.ids)) for f in generate(members, images, device, beam, max_length, penalty)]
            cider = float(score_images(captions, references).cider.mean())
            found.append((cider, beam, penalty))
            line += f"{100 * cider:8.2f}"
        print(line, flush=True)
    cider, beam, penalty = max(found, key=lambda entry: (entry[0], -entry[1]))
    return {"beam_size": beam, "length_penalty": penalty, "cider": cider, "images": len(images)}
