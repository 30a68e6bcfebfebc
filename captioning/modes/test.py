"""`--mode test`: caption images in every way of decoding, score the captions, and write what was found."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from attention_visualization import save_attention_pictures
from captioning import distributed
from captioning.config.settings import cache_folder
from captioning.data.dataset import CaptionSet, captions_of, tokenize, tokenize_cached
from captioning.data.images import UnreadableImage, open_image
from captioning.data.layouts import default_folder, find_captions_file, read_captions
from captioning.data.splits import LEAST_SHARE, SAME_SET
from captioning.decoding.beam_search import Hypothesis
from captioning.decoding.confidence import calibration_error, confidence_of, reliability, supported_shares, table_of
from captioning.io import UserError, make_directory, printable, read_json, write_json
from captioning.runs import plots
from captioning.runs.directories import read_test_rows, results_directory
from captioning.runs.report import write_report
from captioning.scoring.scores import BY_IMAGE, FEW_IMAGES, METRIC_NAMES, ImageScores, bootstrap_intervals, by_rank
from captioning.training.caption_set import DecodingContext, caption, images_to_draw, search
from experiment_utils import save_numbered
from metrics_utils import MetricFailed, meteor_scores, person_scores, score_images, summarize, variety

INTERVALS = {"cider": "CIDEr", "sparcs": "SPARCS", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "wer": "WER"}


@dataclasses.dataclass
class Result:
    """The captions of one way of decoding, with their scores."""

    name: str  # of the way, at the head of its column: `greedy`, `beam 3`, `consensus`
    header: dict[str, Any]  # what was tested and how; a new result replaces an earlier one with the same header
    captions: list[str]  # of each image
    scores: dict[str, Any]
    by_image: ImageScores
    confidence: np.ndarray | None = None  # (n,) of each caption, where the model has a calibration
    supported: np.ndarray | None = None  # (n,) the share of its content words that a reference has
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # where captions and scores by image are

    @property
    def row(self) -> dict[str, Any]:
        """The entry of `test_metrics.json`."""
        return {**self.header, **self.files, **self.scores}


def run(context: DecodingContext, images: np.ndarray, checkpoints: Mapping[Path, Mapping[str, Any]]) -> None:
    """Test checkpoints: caption and save in every way of decoding, draw, add METEOR, print and report.

    An ensemble has files of its own, `ensemble_*`: `test_metrics.json` is about the run's own checkpoints.

    Args:
        images: positions (n,) of the images to score.
        checkpoints: by path. Several are an ensemble; the files go where `results_directory` says of the first.

    Raises:
        UserError: the directory cannot be written, or its table of earlier tests is damaged.
    """
    args, data = context.settings, context.data
    path, *others = checkpoints
    ensemble = "ensemble_" if others else ""
    directory = make_directory(results_directory(path), "the results of a test")
    rows_file = directory / f"{ensemble or 'test_'}metrics.json"
    read_test_rows(rows_file)  # before anything is decoded
    epochs = [checkpoint["epoch"] for checkpoint in checkpoints.values()]
    header = {
        "checkpoint": [str(member) for member in checkpoints] if others else path.name,
        "epoch": epochs if others else epochs[0],
        "dataset": args.dataset_type, "split": args.split, "views": args.views, "images": len(images),
        "no_repeat_ngram": args.no_repeat_ngram or None,
        "images_hash": images_hash(data, images, context.members[0][1].versions),
    }  # fmt: skip
    training = training_captions(context, checkpoints[path]) if distributed.is_first() else None
    results = []
    for way in ways_to_decode(context, images):
        if distributed.is_first():
            result = score_way(context, images, way, header, training)
            save_result(rows_file, f"{ensemble}{args.split.replace('+', '_')}", data, images, result)
            results.append(result)
    if args.save_attention_viz:
        folder = make_directory(directory / "ensemble_attention", "attention pictures") if others else directory
        save_attention_pictures(context, images_to_draw(args, data, images), folder)
    if not distributed.is_first():
        return

    references = [data.references(image) for image in images]
    notes = add_meteor([(each.captions, each.scores) for each in results], references)
    person = person_scores(references)
    for result in results:  # for the report, which has no references to score
        result.scores |= {f"person_{key}": value for key, value in person.items()}
    notes += [*describe_confidence(results[-1], args.split), *reservations(args, len(images), training)]
    for result in results:
        save_row(rows_file, result)
    print_scores([(each.name, each.scores) for each in results], person, len(images), args.split, notes)
    save_references(directory, data, images, args.split)
    last = results[-1]
    save_gallery(data, images, last.captions, last.by_image.cider, directory / f"{ensemble}sample_captions.png")
    written = [rows_file.name, *(result.files["captions_file"] for result in results), f"{ensemble}sample_captions.png"]
    if not others and (directory / "run_config.json").is_file():  # a lone checkpoint has no run to report
        written.append(write_report(directory, data).name)
    print(f"Written to {directory}: {', '.join(written)}")


def score_predictions(data: CaptionSet, args: argparse.Namespace) -> None:
    """Score captions of this data set's images from any other program (`--predictions`)."""
    images = np.concatenate([data.splits[split] for split in args.split.split("+")])
    captions = read_predictions(args.predictions, data, images)
    train = data.splits.get("train")
    training = None if train is None else set(map(data.tokens.text, captions_of(data, train)))
    scores, _ = score_test(data, images, captions, training)
    references = [data.references(image) for image in images]
    notes = add_meteor([(captions, scores)], references) + reservations(args, len(images), training)
    columns = [(printable(args.predictions.stem), scores)]
    print_scores(columns, person_scores(references), len(images), args.split, notes)


# --------------------------------------------------------------------------------------------------
# Captions


class Way(NamedTuple):
    """One way of decoding, and what it gave."""

    name: str
    settings: dict[str, Any]  # fields of the row that tell this way from others
    found: list[Hypothesis]  # a caption of each image
    more: dict[str, Any]  # fields of the row that are results


def ways_to_decode(context: DecodingContext, images: np.ndarray) -> Iterator[Way]:
    """Caption images greedily, with the beam, and by consensus of the beam's captions, where the flags ask for it."""
    beam, penalty = context.settings.beam_size, context.settings.length_penalty
    settings: dict[str, Any] = {"beam_size": 1, "length_penalty": None, "consensus": None}
    yield Way("greedy", settings, caption(context, images, 1), {})
    if beam > 1:
        found = search(context, images, beam, consensus=bool(context.heads))
        settings = {"beam_size": beam, "length_penalty": penalty, "consensus": None}
        yield Way(f"beam {beam}", settings, [max(each, key=lambda h: h.score) for each in found], {})
        if context.heads:
            weights = [head.weight for head in context.heads]
            settings = settings | {"consensus": "regression"}
            more = {"consensus_weight": sum(weights) / len(weights)}
            yield Way("consensus", settings, [hypotheses[0] for hypotheses in found], more)


# --------------------------------------------------------------------------------------------------
# Scores


def training_captions(context: DecodingContext, checkpoint: Mapping[str, Any]) -> set[str] | None:
    """Return the captions of the images that a model was trained on, None if they are not found.

    They are in the data set that is tested, if that is the model's own, or where the model was trained.
    """
    data, flags, trained = context.data, checkpoint["flags"], set(checkpoint["split"]["train"]["names"])
    here = np.flatnonzero([name in trained for name in data.names])
    if len(here) >= max(SAME_SET * len(trained), LEAST_SHARE * len(data.names)):
        return set(map(data.tokens.text, captions_of(data, here)))
    data_dir, image_dir, captions_file = (
        Path(flags[name]) if flags[name] else None for name in ("data_dir", "image_dir", "captions_file")
    )
    try:
        folder = default_folder(data_dir, image_dir, captions_file, flags["dataset_type"])
        table, _ = read_captions(captions_file or find_captions_file(folder), flags["generated_captions"])
    except (UserError, OSError):
        return None
    table = table[table["image"].isin(trained)]
    if table["image"].nunique() < SAME_SET * len(trained):
        return None
    tokens = tokenize_cached(table["caption"].tolist(), cache_folder(context.settings.feature_cache))
    return set(map(tokens.text, range(len(table))))


def score_way(
    context: DecodingContext, images: np.ndarray, way: Way, header: Mapping[str, Any], training: set[str] | None
) -> Result:
    """Return the scores of one way of decoding that need no Java."""
    captions = [context.text(hypothesis) for hypothesis in way.found]
    scores, by_image = score_test(context.data, images, captions, training)
    full = {**header, **way.settings, "tokenizer": "spacy.blank('en'), lower case, without punctuation"}
    result = Result(way.name, full, captions, way.more | scores, by_image)
    if table := table_of(context.calibration, way.settings["consensus"] is not None):
        result.confidence = np.array([confidence_of(table, each.log_probabilities) for each in way.found])
        result.supported = supported_shares(captions, list(map(context.data.references, images)))
        result.scores["calibration_error"] = calibration_error(reliability(result.confidence, result.supported))
    return result


def score_test(
    data: CaptionSet, images: np.ndarray, captions: Sequence[str], training: set[str] | None
) -> tuple[dict[str, Any], ImageScores]:
    """Return scores, intervals of 95 % and variety of a set of captions; and the scores by image."""
    references = [data.references(image) for image in images]
    by_image = score_images(captions, references)
    scores: dict[str, Any] = {**summarize(by_image)}
    scores |= variety(captions, training)
    scores |= {f"{name}_interval": list(bounds) for name, bounds in bootstrap_intervals(by_image).items()}
    return scores, by_image


def add_meteor(
    systems: Sequence[tuple[Sequence[str], dict[str, Any]]], references: Sequence[Sequence[str]]
) -> list[str]:
    """Add METEOR to the scores of each system's captions; return a note where it failed."""
    try:
        values = meteor_scores([captions for captions, _ in systems], references)
    except MetricFailed as problem:
        return [f"METEOR is left out: {problem}"]
    for (_, scores), value in zip(systems, values, strict=True):
        scores["meteor"] = value
    return []


def reservations(args: argparse.Namespace, images: int, training: set[str] | None) -> list[str]:
    """Return lines that say what is not in the table, and where scores say little."""
    lines = [] if training is not None else ["% in training is left out: the training captions are not found"]
    if args.dry_run:
        lines.append("A dry run: these scores mean nothing")
    elif images < FEW_IMAGES:
        lines.append(f"Only {images} images: scores of fewer than {FEW_IMAGES} depend much on which images they are")
    return lines


def describe_confidence(result: Result, split: str) -> list[str]:
    """Return a line that says how far the confidence of a way's captions can be believed; none without it."""
    if result.confidence is None or result.supported is None:
        return []
    means = f"{100 * result.confidence.mean():.1f}, {100 * result.supported.mean():.1f} of the content words supported"
    own = "; val calibrated it" if "val" in split.split("+") else ""
    error = f"{100 * result.scores['calibration_error']:.1f}"
    return [f"Confidence, {result.name}: mean {means}, expected calibration error {error}{own}"]


# --------------------------------------------------------------------------------------------------
# Files


def save_result(rows_file: Path, prefix: str, data: CaptionSet, images: np.ndarray, result: Result) -> None:
    """Write `{prefix}_captions_{way}.json`, `{prefix}_scores_{way}.json` and the row of `rows_file`.

    A file of another test is never overwritten: a number is added to the name.

    Args:
        prefix: the split, after `ensemble_` for an ensemble.
        result: whose `files` are set.
    """
    names, each = [data.image_id(image) for image in images], result.by_image
    lists: dict[str, Any] = {name: values.tolist() for name, values in each._asdict().items()}
    contents: dict[str, Any] = {
        "captions": [{"image_id": name, "caption": text} for name, text in zip(names, result.captions, strict=True)],
        "scores": {
            "image_id": list(map(str, names)),
            **{name: lists[name] for name in BY_IMAGE},
            "bleu": {name: lists[name] for name in ("guess", "correct", "length", "reference_length")},
        },
    }
    if result.confidence is not None and result.supported is not None:
        contents["scores"] |= {"confidence": result.confidence.tolist(), "supported": result.supported.tolist()}
    way = result.name.replace(" ", "")
    with rows_lock(rows_file):
        result.files = {
            f"{kind}_file": save_numbered(rows_file.parent, f"{prefix}_{kind}_{way}", content)
            for kind, content in contents.items()
        }
    save_row(rows_file, result)


def save_row(rows_file: Path, result: Result) -> None:
    """Write the row of a result in place of an earlier row with the same header."""
    with rows_lock(rows_file):
        others = [row for row in read_test_rows(rows_file) if not result.header.items() <= row.items()]
        write_json(rows_file, [*others, result.row])


def images_hash(data: CaptionSet, images: np.ndarray, versions: np.ndarray) -> str:
    """Return what tells these images from others: a CRC-32 of their names, sizes and contents."""
    text = "\n".join(data.names[image] for image in images)
    return f"{zlib.crc32(versions[images].tobytes(), zlib.crc32(text.encode('utf-8', 'surrogatepass'))):08x}"


def rows_lock(rows_file: Path) -> FileLock:
    """Let one of several tests that end at once write at a time."""
    return FileLock(rows_file.with_name(".test.lock"))


def print_scores(
    columns: Sequence[tuple[str, dict[str, Any]]],
    person: dict[str, float],
    images: int,
    split: str,
    notes: Sequence[str] = (),
) -> None:
    """Print a table with a column for each way of decoding, and a person's own scores as the yardstick."""
    shown = [*columns, *([("a person", person)] if person else [])]
    widths = [max(10, len(name) + 2) for name, _ in shown]

    def line(name: str, cells: Sequence[str]) -> str:
        return f"  {name:<26}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))

    print(
        f"\nScores on {images} {'' if split == 'all' else f'{split} '}images (x100; lower case, no punctuation; CIDEr's word weights from"
    )
    print("these images; a person: one caption against the image's others, which are one fewer; unsupported")
    print("words: the share of content words that no reference of the image has):")
    print(line("", [name for name, _ in shown]))
    for key, name in METRIC_NAMES.items():
        if key in columns[0][1]:
            print(line(name, [f"{100 * scores[key]:.2f}" if key in scores else "-" for _, scores in shown]))
    for key, name, scale, digits in (
        ("distinct_words", "distinct words", 1, 0),
        ("mean_length", "words a caption", 1, 1),
        ("in_training", "% in training", 100, 1),
    ):
        if key in columns[0][1]:
            print(line(name, [f"{scale * scores[key]:.{digits}f}" for _, scores in columns]))
    name, scores = columns[-1]
    bounds = (
        f"{label} {100 * scores[f'{key}_interval'][0]:.1f} to {100 * scores[f'{key}_interval'][1]:.1f}"
        for key, label in INTERVALS.items()
    )
    print(f"  95 % intervals over images, {name}: " + ", ".join(bounds))
    if "val" in split.split("+") and scores.get("consensus_weight") is not None:
        print(f"  {name}: the regression's weight, {scores['consensus_weight']:g}, was chosen by the CIDEr of the")
        print("  validation images, which are among these: its scores are slightly too high")
    for note in notes:
        print(f"  {note}")


def save_references(directory: Path, data: CaptionSet, images: np.ndarray, split: str) -> None:
    """Write the references as the COCO evaluation reads them, under the `image_id`s of the captions."""
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
    write_json(directory / f"{split.replace('+', '_')}_references.json", content)


def save_gallery(data: CaptionSet, images: np.ndarray, captions: Sequence[str], cider: np.ndarray, path: Path) -> None:
    """Draw twelve captions by rank of their CIDEr, none picked by hand: the best four, the median and the worst.

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
            title = f"CIDEr {100 * cider[place]:.0f}, {name}"
            samples.append(
                {"image": picture, "group": group, "name": title, "caption": captions[place], "references": references}
            )
    plots.save_figure(plots.captions_figure(samples), path)


# --------------------------------------------------------------------------------------------------
# Captions of another program


def read_predictions(path: Path, data: CaptionSet, images: np.ndarray) -> list[str]:
    """Return captions that another program made, tokenized as ours are.

    Args:
        path: COCO results (`[{"image_id": ..., "caption": ...}]`) or a CSV file with the header `image,caption`;
            an image by its file name, or by COCO's number.

    Raises:
        UserError: another form, an image twice, or one of the images without a caption.
    """
    if path.suffix == ".csv":
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows: Any = [row | {"image_id": row.get("image")} for row in csv.DictReader(file)]
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"cannot read --predictions {path}: {error}") from error
    else:
        rows = read_json(path)
    form = '[{"image_id": "a.jpg", "caption": "a dog"}, ...], or a .csv with the header image,caption'
    if not isinstance(rows, list):
        raise UserError(f"--predictions {path} is not a list of captions: expected {form}")
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        name, caption = (row.get("image_id"), row.get("caption")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str | int) or not isinstance(caption, str):
            raise UserError(f"--predictions {path}: entry {number} has no image_id and caption: expected {form}")
        if str(name) in found:
            raise UserError(f"--predictions {path}: {name} has two captions (entry {number} is the second)")
        found[str(name)] = caption

    def name_of(image: int) -> str:
        name = data.names[image]
        ways = (str(data.image_id(image)), name, name.rpartition("/")[2])
        return next((way for way in ways if way in found), ways[0])

    names = [name_of(image) for image in images]
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"--predictions {path} has no caption for {len(missing)} of the {len(images)} images, {missing[0]} for "
            "example: an image is known by its file name (COCO's by their number); --split chooses which are scored"
        )
    tokens = tokenize(found[name] for name in names)
    return [tokens.text(number) for number in range(len(names))]
