"""`report.html`: a run in one file without outside references, for a desk or a phone, light or dark.

What the report shows is gathered here; its form is in `templates/`.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from captioning.data.images import UnreadableImage, open_image
from captioning.data.layouts import default_folder
from captioning.decoding.confidence import FEWEST, calibration_error, reliability
from captioning.io import CONTROL_CHARACTERS, UserError, read_json, write_atomic
from captioning.runs.directories import (
    StoredRun,
    command_to_test,
    decoding,
    is_number,
    read_run,
    read_scores,
    read_texts,
    score_text,
)
from captioning.scoring.scores import METRIC_NAMES, by_rank
from captioning.scoring.words import find_errors, unsupported_words

if TYPE_CHECKING:
    from captioning.data.dataset import CaptionSet

GROUP = 4  # captions in each group of the gallery, and attention pictures
FREQUENT = 12  # words in each list of words
SHOWN_TESTS = 6
FACTS = ("Minutes", "Device", "Machine", "Images", "Vocabulary")  # of run_summary.txt
CURVES = ("training_losses.png", "learning_rate.png", "validation_scores.png")


def page_text(value: Any) -> Any:
    """Return a value as the text of a page; whoever wrote it, it has no control characters."""
    if isinstance(value, Markup):  # of a macro
        return value
    return CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", f"{value:g}" if type(value) is float else str(value))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, finalize=page_text,
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The file


def write_report(directory: Path, data: CaptionSet | None = None, data_dir: Path | None = None) -> Path:
    """Write `report.html` into a run directory from the files in it.

    Args:
        data: the run's data set; None reads it again from where the run says, or from `data_dir`. Without a data set
            the report has no photos and says so.

    Returns:
        the file's path.

    Raises:
        UserError: not a run directory, or the report cannot be written.
    """
    run = read_run(directory)
    problem = ""
    if data is None:
        try:
            data = load_data(run, data_dir)
        except (UserError, ValueError, OSError) as error:  # the last two: a path that no file can have
            problem = f"The data set is not available, so the report has no photos: {error}"
    text = TEMPLATES.get_template("report.html").render(page(run, data, problem))
    path = directory / "report.html"
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "replace")))
    return path


def load_data(run: StoredRun, data_dir: Path | None) -> CaptionSet:
    """Read the images and captions of the data set that a run was trained on; the split does not matter here.

    Raises:
        UserError: it is not there.
    """
    from captioning.data.dataset import load_caption_set

    def place(name: str) -> Path | None:
        value = run.flags.get(name)
        return Path(value) if isinstance(value, str) and data_dir is None else None

    parts = place("image_dir"), place("captions_file")
    folder = default_folder(data_dir or place("data_dir"), *parts, str(run.flags.get("dataset_type")))
    cache = Path(str(run.flags.get("feature_cache")))
    return load_caption_set(folder, *parts, token_cache=cache if cache.is_dir() else None)


def page(run: StoredRun, data: CaptionSet | None, problem: str) -> dict[str, Any]:
    """Return what the template shows."""
    predictions, references = test_texts(run)
    command = run.flags.get("command")
    hidden = {"command", "mode", "resume", "config"}
    return {
        "name": run.directory.resolve().name,
        "facts": facts(run),
        "headline": headline(run),
        "scores": score_table(run.tests[-SHOWN_TESTS:], run.best),
        "test_command": "" if run.tests else command_to_test(run.directory),
        "ensembles": [(row["checkpoint"], score_table([row])) for row in run.ensembles],
        "training": training(run),
        "gallery": gallery(run, predictions, data, problem),
        "errors": errors(run, predictions, references),
        "confidence": confidence(run),
        "attention": attention(run),
        "parameters": [(k, v) for k, v in run.flags.items() if k not in hidden and v not in (None, "", [])],
        "command": command if isinstance(command, str) else "",
        "damage": run.damage,
    }


def test_texts(run: StoredRun) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the captions of the latest test and the references of its images, by image id; empty where they are gone."""
    texts: list[dict[str, list[str]]] = [{}, {}]
    if run.tests:
        references = f"{str(run.latest['split']).replace('+', '_')}_references.json"
        for number, name in enumerate((run.latest["captions_file"], references)):
            try:
                texts[number] = read_texts(run, name)
            except UserError as error:
                run.damage.append(str(error))
    return {name: captions[0] for name, captions in texts[0].items()}, texts[1]


# --------------------------------------------------------------------------------------------------
# Scores


def facts(run: StoredRun) -> list[tuple[str, Any]]:
    """Return names and values of what there is to say about the run as a whole."""
    names = {"dataset_type": "Data set", "encoder": "Encoder", "decoder": "Decoder"}
    found = [(name, run.flags[key]) for key, name in names.items() if run.flags.get(key)]
    if run.best:
        found.append(("Best epoch", f"{run.best['epoch']} of {run.last_epoch}"))
    return found + [(name, run.facts[name]) for name in FACTS if name in run.facts]


def headline(run: StoredRun) -> dict[str, Any]:
    """Return the latest test's main scores with their intervals and a person's; before a test, the best epoch's."""
    row = run.latest if run.tests else run.best or {}
    figures = [
        {"name": METRIC_NAMES[key], "score": score_text(key, row[key]), "interval": interval_text(key, row),
         "person": score_text(key, row[f"person_{key}"]) if is_number(row.get(f"person_{key}")) else ""}
        for key in ("cider", "bleu4", "rouge_l", "meteor") if is_number(row.get(key))
    ]  # fmt: skip
    return {"figures": figures, "of": describe(row) if run.tests else describe_epoch(row)}


def describe(row: Mapping[str, Any]) -> list[str]:
    """Return what a test was of, in lines: the way of decoding, the images, and what is not as usual."""
    lines = [decoding(row), f"{row['split']}, {row['images']} images"]
    if row["views"] != "whole":
        lines.append(f"views {row['views']}")
    if isinstance(row["checkpoint"], str) and row["checkpoint"] != "best.pt":
        lines.append(f"{row['checkpoint']}, epoch {row['epoch']}")
    if row["consensus"] and "val" in str(row["split"]).split("+"):
        lines.append("the weight was chosen on validation images")
    return lines


def describe_epoch(row: Mapping[str, Any]) -> list[str]:
    return ["greedy", f"validation, epoch {row.get('epoch')}"]


def score_table(tests: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a column for each test, one for a person where a test stored that, and one for the best epoch."""
    columns = [(describe(row), row) for row in tests]
    person = next((row for row in reversed(tests) if any(key.startswith("person_") for key in row)), None)
    if person:
        scores = {key: person.get(f"person_{key}") for key in METRIC_NAMES}
        columns.append((["a person", *describe(person)[1:2], "against the others' captions"], scores))
    if best:
        columns.append((describe_epoch(best), best))
    rows = [
        (name, [(score_text(key, row[key]), interval_text(key, row)) if is_number(row.get(key)) else ("-", "")
                for _, row in columns])
        for key, name in METRIC_NAMES.items() if any(is_number(row.get(key)) for _, row in columns)
    ]  # fmt: skip
    for key, name, scale in (("distinct_words", "distinct words", 1), ("mean_length", "words a caption", 1),
                             ("in_training", "% of captions in training", 100)):  # fmt: skip
        if any(is_number(row.get(key)) for row in tests):
            values = (row.get(key) for _, row in columns)
            rows.append((name, [(f"{scale * value:.4g}" if is_number(value) else "-", "") for value in values]))
    return {"heads": [lines for lines, _ in columns], "rows": rows}


def interval_text(key: str, row: Mapping[str, Any]) -> str:
    bounds = row.get(f"{key}_interval")
    return f"{score_text(key, bounds[0])} to {score_text(key, bounds[1])}" if bounds else ""


# --------------------------------------------------------------------------------------------------
# Curves


def training(run: StoredRun) -> dict[str, Any]:
    """Return the pictures of the curves as training drew them, and the figures by epoch as a table."""
    curves = [(name, data_uri(run.directory / name)) for name in CURVES if (run.directory / name).is_file()]
    names = dict.fromkeys(name for row in run.epochs for name in row)
    columns = [name for name in names if any(is_number(row.get(name)) for row in run.epochs)]
    rows = [[f"{row[name]:.4g}" if is_number(row.get(name)) else "" for name in columns] for row in run.epochs]
    return {"curves": curves, "columns": columns, "rows": rows}


# --------------------------------------------------------------------------------------------------
# Captions and pictures


def data_uri(path: Path, longest: int | None = None) -> str | None:
    """Return a picture as it is, or a JPEG no side of which is longer; None where it cannot be read."""
    kind = {".png": "image/png", ".svg": "image/svg+xml"}.get(path.suffix, "")
    try:
        if longest is None:  # in an image a browser runs and loads nothing of an SVG
            content = path.read_bytes()
        else:
            picture, file = open_image(path, at_least=longest), io.BytesIO()
            picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
            picture.save(file, "JPEG", quality=82, optimize=True)
            kind, content = "image/jpeg", file.getvalue()
    except (OSError, UnreadableImage):
        return None
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def gallery(run: StoredRun, predictions: Mapping[str, str], data: CaptionSet | None, problem: str) -> dict[str, Any]:
    """Return captions with their photos and references, chosen by rank of their CIDEr and at random, never by hand.

    Args:
        predictions: the captions of the latest test by image id; empty where there was none, or they are gone.
    """
    if not predictions or data is None:
        return {"notes": [problem] if predictions else [], "groups": []}
    try:
        stored = read_scores(run, run.latest)
    except UserError as error:
        return {"notes": [f"Not ranked: {error}"], "groups": []}
    position = {str(data.image_id(number)): number for number in range(len(data.names))}
    places = [place for place, name in enumerate(stored.names) if name in predictions and name in position]
    if not places:
        return {"notes": [f"None of the images that were captioned is in {data.image_dir}."], "groups": []}
    size = max(1, min(GROUP, len(places) // 4))
    seed = run.flags.get("seed")
    drawn = np.random.default_rng(seed if type(seed) is int and seed >= 0 else 0).permutation(len(places))[:size]
    ranked = by_rank(stored.scores.cider[places], size) | {f"Random (--seed {seed})": drawn}
    groups = {title: [places[n] for n in chosen] for title, chosen in ranked.items()}
    captions = {place: predictions[stored.names[place]] for chosen in groups.values() for place in chosen}
    nearest = nearest_training(run, data, list(captions.values()))

    def card(place: int) -> dict[str, Any]:
        name, caption = stored.names[place], captions[place]
        image, cider, bleu = position[name], stored.scores.cider[place], stored.scores.sentence_bleu4[place]
        return {
            "picture": data_uri(data.image_dir / data.names[image], 480), "name": name,
            "caption": caption, "people": data.references(image)[:5], "nearest": nearest.get(caption, ""),
            "unsupported": unsupported_words(caption, data.references(image)),
            "scores": [f"CIDEr {100 * cider:.0f}", f"sentence BLEU-4 {100 * bleu:.0f}"],
        }  # fmt: skip

    note = f"The latest test: {', '.join(describe(run.latest))}. Bold: the model; below: people."
    return {"notes": [note], "groups": [(title, list(map(card, chosen))) for title, chosen in groups.items()]}


def nearest_training(run: StoredRun, data: CaptionSet, captions: Sequence[str]) -> dict[str, str]:
    """Return by caption the closest of the run's training captions, with its similarity and image; none without a split.

    The similarity is ROUGE-L (Lin, 2004) with equal weights: 2 x the longest common subsequence of words, over the words
    of both.
    """
    from rapidfuzz import process
    from rapidfuzz.distance import Indel

    try:
        training = set(read_json(run.directory / "split.json")["train"])
    except (UserError, KeyError, TypeError):
        return {}
    known = [(text, name) for n, name in enumerate(data.names) if name in training for text in data.references(n)]
    choices = [text.split() for text, _ in known]
    found = {}
    for caption in captions if known else ():
        _, similarity, number = process.extractOne(caption.split(), choices, scorer=Indel.normalized_similarity)
        found[caption] = f"ROUGE-L {100 * similarity:.0f}: {known[number][0]} ({known[number][1]})"
    return found


def errors(run: StoredRun, predictions: Mapping[str, str], known: Mapping[str, list[str]]) -> dict[str, Any] | None:
    """Return what the captions of the latest test get wrong, None before a test.

    Args:
        predictions: as in `gallery`.
        known: the references by image id.
    """
    if not run.tests:
        return None
    scored = [name for name in predictions if known.get(name)]
    captions, references = [predictions[name] for name in scored], [known[name] for name in scored]
    what = "captions of people for these images" if predictions else "captions of the latest test"
    often = Counter(predictions.values()).most_common(2 * GROUP)
    return {
        "found": find_errors(captions, references, FREQUENT) if scored else None,
        "note": f"The {what} are not known, which a test stores: {command_to_test(run.directory)}",
        "scored": len(scored), "images": len(predictions), "repeated": [(text, times) for text, times in often if times > 1],
    }  # fmt: skip


def confidence(run: StoredRun) -> dict[str, Any] | None:
    """Return how far the confidence of the latest test's captions can be believed, None before a test."""
    if not run.tests:
        return None
    try:
        stored = read_scores(run, run.latest)
    except UserError as error:
        return {"note": f"Not known: {error}"}
    sure, supported, cider = stored.confidence, stored.supported, stored.scores.cider
    if sure is None or supported is None:
        return {"note": f"The captions of the latest test have none. With {FEWEST} validation images --mode tune adds it; "
                "then test again."}  # fmt: skip
    bins = reliability(sure, supported)
    rows = [(each, float((sure >= each.low).mean()), 100 * float(cider[sure >= each.low].mean())) for each in bins]
    return {"note": "", "images": len(sure), "error": 100 * calibration_error(bins), "rows": rows}


def attention(run: StoredRun) -> dict[str, Any]:
    """Return the run's first attention pictures, and the names of the others."""
    names = sorted((path.name for path in run.directory.glob("*attention_viz_sample_*.*")), key=lambda n: (len(n), n))
    names = [name for name in names if not name.endswith(".json")]
    first = [name for name in names if name.startswith("attention") and not name.endswith(".pdf")][:GROUP]
    found = [(name, data_uri(run.directory / name, None if name.endswith(".svg") else 1500)) for name in first]
    return {"pictures": found, "named": [name for name in names if name not in first]}
