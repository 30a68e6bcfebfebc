"""`--mode test`: score captions, print the table, write the files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

import attention_visualization
from captioning import distributed, plots
from captioning.dataset import CaptionSet, captions_of, tokenize
from captioning.decoding import Hypothesis
from captioning.evaluation import Task, by_consensus, caption, search
from captioning.images import UnreadableImage, open_image
from captioning.io import UserError, log, read_json, write_json
from captioning.scores import METRIC_NAMES, ImageScores, bootstrap_intervals, by_rank
from experiment_utils import save_numbered
from metrics_utils import (
    has_java,
    meteor_score,
    person_scores,
    score_images,
    spice_score,
    summarize,
    variety,
)

INTERVALS = {"cider": "CIDEr", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "wer": "WER"}


def ways_to_decode(
    task: Task, images: np.ndarray, attention: bool
) -> Iterator[tuple[str, dict[str, Any], list[Hypothesis]]]:
    """Caption images greedily, with the beam, and by consensus of what the beam found, where that is asked for.

    Yields:
        a way's name, what a row of `test_metrics.json` says of it, and a caption per image.
    """
    beam, penalty = task.args.beam_size, task.args.length_penalty
    yield "greedy", {"beam_size": 1, "length_penalty": None, "consensus": None}, caption(task, images, 1, attention)
    if beam > 1:
        found = search(task, images, beam, attention, wanted=beam if task.consensus else 1)
        about = {"beam_size": beam, "length_penalty": penalty, "consensus": None}
        yield f"beam {beam}", about, [hypotheses[0] for hypotheses in found]
        if task.consensus is not None:
            best = by_consensus(task, task.consensus, images, found)
            yield "consensus", about | {"consensus": task.args.consensus}, best


def save_attention_pictures(task: Task, chosen: np.ndarray, directory: Path) -> None:
    """`attention_viz_sample_N` (and the advanced ones) of these images, N from 1, with their numbers as JSON."""
    args, data = task.args, task.data
    chosen = chosen[~np.isin(chosen, [image for _, features in task.members for image in features.unreadable])]
    hypotheses = caption(task, chosen, args.beam_size, attention=True)
    if task.consensus is not None:
        log.info("The attention pictures are of the beam's likeliest captions, not of those that consensus chose")
    if not distributed.is_first():
        return
    drawn = 0
    for n, (image, found) in enumerate(zip(chosen, hypotheses, strict=True), 1):
        words, name = task.vocabulary.decode(found.ids), data.names[image]
        if not words or found.attention is None:
            log.warning(f"No attention picture of {name}: the model said nothing")
            continue
        picture = open_image(data.image_dir / name, at_least=max(900, 900 * args.attention_viz_dpi // plots.DPI))
        attention_visualization.save_pictures(
            directory, n, picture, name, words, found.attention, args.advanced_attention_viz,
            args.attention_viz_format, args.attention_viz_dpi,
        )  # fmt: skip
        drawn += 1
    if drawn:
        log.info(f"Attention pictures of {drawn} images: {directory / 'attention_viz_sample_*'}")


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


def save_test(
    directory: Path, header: Mapping[str, Any], data: CaptionSet, images: np.ndarray, captions: Sequence[str],
    scores: Mapping[str, Any], each: ImageScores,
) -> str:  # fmt: skip
    """Write `test_captions[_N].json`, with the same number `test_scores[_N].json`, and a row of `test_metrics.json`.

    The row takes the place of an earlier one of the same test. Two tests of one run may end at once: one waits.

    Args:
        header: what test it is.

    Returns:
        the name of the file of captions.
    """
    names = [str(data.image_id(image)) for image in images]
    content = [
        {"image_id": data.image_id(image), "caption": caption} for image, caption in zip(images, captions, strict=True)
    ]
    by_image = {
        "image_id": names, "cider": each.cider.tolist(), "rouge_l": each.rouge_l.tolist(), "wer": each.wer.tolist(),
        "bleu": {"guess": each.guess.tolist(), "correct": each.correct.tolist(), "length": each.length.tolist(),
                 "reference_length": each.reference_length.tolist()},
    }  # fmt: skip
    rows_file = directory / "test_metrics.json"
    with FileLock(directory / ".test.lock"):
        file = save_numbered(directory, "test_captions", content)
        scores_file = file.replace("test_captions", "test_scores")
        write_json(directory / scores_file, by_image)
        rows = read_json(rows_file) if rows_file.is_file() else []
        others = [row for row in rows if {key: row.get(key) for key in header} != header]
        write_json(rows_file, [*others, {**header, "captions_file": file, "scores_file": scores_file, **scores}])
    return file


def save_references(directory: Path, data: CaptionSet, images: np.ndarray, split: str) -> Path:
    """The references as the COCO evaluation reads them, under the `image_id`s of `test_captions.json`."""
    content = {
        "info": {"description": f"{split} of {data.captions_file.name}"}, "type": "captions", "licenses": [],
        "images": [{"id": data.image_id(image)} for image in images],
        "annotations": [
            {"id": number, "image_id": name, "caption": caption}
            for number, (name, caption) in enumerate(
                (data.image_id(image), caption) for image in images for caption in data.references(image)
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
    samples, seen = [], set()
    for group, places in by_rank(cider, 4).items():
        for place in (place for place in places.tolist() if place not in seen):
            seen.add(place)
            name = data.names[images[place]]
            try:
                picture = open_image(data.image_dir / name, at_least=400)
            except UnreadableImage:
                continue
            references = data.references(int(images[place]))
            title = f"{group.lower()}: CIDEr {100 * cider[place]:.0f}, {name}"
            samples.append({"image": picture, "name": title, "caption": captions[place], "references": references})
    plots.plot_captions(samples, path)


def read_predictions(path: Path, data: CaptionSet, images: np.ndarray) -> list[str]:
    """Captions that another program made, tokenized as ours are.

    Args:
        path: COCO results (`[{"image_id": ..., "caption": ...}]`) or a CSV file with the header `image,caption`;
            an image by its file name, or by COCO's number.

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
    found: dict[str | int, str] = {}
    for number, row in enumerate(rows, 1):
        values = (row.get("image_id"), row.get("caption")) if isinstance(row, dict) else (None, None)
        name, caption = values
        if not isinstance(name, str | int) or not isinstance(caption, str):
            raise UserError(f"--predictions {path}: entry {number} has no image_id and caption: expected {form}")
        if name in found:
            raise UserError(f"--predictions {path}: {name} has two captions (entry {number} is the second)")
        found[name] = caption
    names: list[str | int] = []
    for image in images:
        ways = (
            data.image_id(image),
            str(data.image_id(image)),
            data.names[image],
            data.names[image].rpartition("/")[2],
        )
        names.append(next((way for way in ways if way in found), ways[0]))  # a CSV has COCO's numbers as text
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"--predictions {path} has no caption for {len(missing)} of the {len(images)} images, {missing[0]} for "
            "example: an image is known by its file name (COCO's by their number); --split chooses which are scored"
        )
    words, ids, offsets = tokenize(found[name] for name in names)
    return [" ".join(words[i] for i in ids[offsets[n] : offsets[n + 1]]) for n in range(len(images))]
