"""`report.html`: a run in one file without outside references, for a desk or a phone, light or dark.

What the report shows is gathered here; its form is in `templates/`.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from captioning.analysis import find_errors, nearest_texts, unsupported_words
from captioning.confidence import FEWEST, calibration_error, kept_means, reliability
from captioning.images import UnreadableImage, check_weights, entropy, open_image, upsample
from captioning.io import CONTROL_CHARACTERS, UserError, read_json, write_atomic
from captioning.layouts import default_folder
from captioning.plots import new_figure
from captioning.runs import (
    MEMBERS,
    Run,
    command_to_test,
    decoding,
    is_ensemble,
    is_number,
    read_run,
    read_scores,
    read_test_captions,
    read_test_references,
    score_text,
)
from captioning.scores import METRIC_NAMES, by_rank

if TYPE_CHECKING:
    from captioning.dataset import CaptionSet

MAX_PICTURES = 3_300_000  # bytes of pictures; as base64 they are a third more, and the file stays below 5 MB
GROUP = 4  # captions in each group of the gallery, and attention pictures
FREQUENT = 12  # words in each list of words
SHOWN_TESTS = 6
LARGEST = 1e100  # beyond it matplotlib's scales overflow
CHARTS = (
    ("Loss", {"training_loss": "training", "validation_loss": "validation"}, 1, False),
    ("Learning rate", {"learning_rate": "learning rate"}, 1, True),
    ("Validation CIDEr, in hundredths", {"cider": "CIDEr"}, 100, False),
    ("Validation ROUGE-L and BLEU-4, in hundredths", {"rouge_l": "ROUGE-L", "bleu4": "BLEU-4"}, 100, False),
)
# Colours that matplotlib draws with, and the page's colours that take their place: two schemes, one chart.
LINES = {"#010101": "var(--c1)", "#010102": "var(--c2)"}
TEXT, AXIS = "#020202", "#030303"
COLORS = {**LINES, TEXT: "var(--soft)", AXIS: "var(--line)"}


def shown(value: Any) -> Any:
    """Return a value as the text of a page; whoever wrote it, it has no control characters."""
    if isinstance(value, Markup):
        return value
    return CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", f"{value:g}" if type(value) is float else str(value))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, finalize=shown,
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


def load_data(run: Run, data_dir: Path | None) -> CaptionSet:
    """Read the images and captions of the data set that a run was trained on; the split does not matter here.

    Raises:
        UserError: it is not there.
    """
    from captioning.dataset import load_caption_set

    def place(name: str) -> Path | None:
        value = run.flags.get(name)
        return Path(value) if isinstance(value, str) and data_dir is None else None

    parts = place("image_dir"), place("captions_file")
    folder = default_folder(data_dir or place("data_dir"), *parts, str(run.flags.get("dataset_type")))
    cache = Path(str(run.flags.get("feature_cache")))
    return load_caption_set(folder, *parts, token_cache=cache if cache.is_dir() else None)


def page(run: Run, data: CaptionSet | None, problem: str) -> dict[str, Any]:
    """Return what the template shows."""
    pictures = Pictures()
    try:
        predictions = read_test_captions(run, run.latest)
    except UserError as error:
        predictions = {}
        run.damage.append(str(error))
    known = known_references(run, data)
    command = run.flags.get("command")
    hidden = {"command", "mode", "resume", "config"}
    return {
        "name": run.directory.resolve().name,
        "facts": facts(run),
        "headline": headline(run),
        "scores": score_table(run.tests[-SHOWN_TESTS:], run.best),
        "pointing_game": run.latest.get("pointing_game"),
        "test_command": "" if run.tests else command_to_test(run.directory),
        "ensembles": ensembles(run),
        "training": training(run),
        "gallery": gallery(run, predictions, data, problem, pictures),
        "errors": errors(run, predictions, known),
        "confidence": confidence(run),
        "attention": attention(run, data, pictures),
        "words": words(run, predictions, known),
        "parameters": [(k, v) for k, v in run.flags.items() if k not in hidden and v not in (None, "", [])],
        "command": command if isinstance(command, str) else "",
        "damage": run.damage,
    }


# --------------------------------------------------------------------------------------------------
# Scores


def facts(run: Run) -> list[tuple[str, str]]:
    """Return names and values of what there is to say about the run as a whole."""
    names = {"dataset_type": "Data set", "encoder": "Encoder", "decoder": "Decoder"}
    found = {name: str(run.flags[key]) for key, name in names.items() if run.flags.get(key)}
    if run.best:
        found["Best epoch"] = f"{run.best['epoch']} of {len(run.epochs)}"
    if minutes := re.match(r"(\d+(?:\.\d+)?)(.*)", run.facts.get("Minutes", "")):
        length = float(minutes[1])
        text = f"{60 * length:.0f} s" if length < 1 else f"{length // 60:.0f} h {length % 60:.0f} min"
        found["Training time"] = text.removeprefix("0 h ") + minutes[2]
    machine = (run.facts.get(name) for name in ("Device", "Machine"))
    found["Machine"] = ", ".join(filter(None, machine)) or "not recorded"
    return list(found.items())


def headline(run: Run) -> dict[str, Any]:
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
    lines = [decoding(row), f"{row.get('split')}, {row.get('images')} images"]
    if row.get("views", "whole") != "whole":
        lines.append(f"views {row['views']}")
    if row.get("checkpoint", "best.pt") != "best.pt" and not is_ensemble(row):
        lines.append(f"{row['checkpoint']}, epoch {row.get('epoch')}")
    if is_number(row.get("consensus_weight")):
        lines.append(f"weight {row['consensus_weight']:g}")
    if row.get("consensus") == "regression" and "val" in str(row.get("split")).split("+"):
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
    return {"heads": [lines for lines, _ in columns], "rows": rows}


def interval_text(key: str, row: Mapping[str, Any]) -> str:
    bounds = row.get(f"{key}_interval")
    return f"{score_text(key, bounds[0])} to {score_text(key, bounds[1])}" if bounds else ""


def ensembles(run: Run) -> list[dict[str, Any]]:
    """Return the members of each ensemble and the scores of its tests."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in run.ensembles:
        groups.setdefault(str(row.get("checkpoint")), []).append(row)
    return [{"members": name.split(MEMBERS), "scores": score_table(rows)} for name, rows in groups.items()]


# --------------------------------------------------------------------------------------------------
# Curves


def training(run: Run) -> dict[str, Any]:
    """Return the charts by epoch, and the same as a table."""
    best = run.best["epoch"] if run.best else None
    charts = []
    for title, names, scale, logarithmic in CHARTS:
        lines = {
            label: [scale * row[key] if is_number(row.get(key)) else math.nan for row in run.epochs]
            for key, label in names.items()
        }
        svg = chart(title, "epoch", [row["epoch"] for row in run.epochs], lines, best, logarithmic)
        charts += [(title, svg)] if svg else []
    columns = list(dict.fromkeys(name for row in run.epochs for name, value in row.items() if is_number(value)))
    rows = [[f"{row[name]:.4g}" if is_number(row.get(name)) else "" for name in columns] for row in run.epochs]
    return {"charts": charts, "columns": columns, "rows": rows, "best": best}


def chart(
    title: str, x_label: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], marked: float | None = None,
    logarithmic: bool = False,
) -> Markup:  # fmt: skip
    """Draw a line chart as an inline SVG in the page's colours and letters; empty where there is nothing to draw.

    Args:
        lines: label -> values, as many as `x`, up to two; NaN leaves a gap.
        marked: an x with a dashed line through it.
        logarithmic: where the values span more than a decade and are above zero.
    """
    values = np.array([list(line) for line in lines.values()], dtype=np.float64)
    values = np.where(np.abs(values) < LARGEST, values, np.nan)
    known = values[np.isfinite(values)]
    if not len(known):
        return Markup()
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6.1, 3.6, 72)  # a point is about a pixel of the page
    axes = figure.add_axes((0.14, 0.15, 0.84, 0.74))
    for (label, _), row, color in zip(lines.items(), values, LINES, strict=False):
        axes.plot(list(x), row, "-o", color=color, label=label, linewidth=2.2, markersize=6)
    if marked is not None and x[0] <= marked <= x[-1]:
        axes.axvline(marked, color=TEXT, linestyle=(0, (5, 4)), linewidth=1)
    if logarithmic and known.min() > 0 and known.max() > 10 * known.min():
        axes.set_yscale("log")
    elif known.min() >= 0:
        axes.set_ylim(0, 1.05 * known.max() or 1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter("{x:.6g}")
    axes.minorticks_off()
    axes.set_xlabel(x_label, color=TEXT, fontsize=14)
    axes.tick_params(color=AXIS, labelcolor=TEXT, labelsize=13)
    axes.grid(axis="y", color=AXIS)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, labelcolor="linecolor", fontsize=14)
    file = io.StringIO()
    undocumented = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # The hash names what the chart refers to, so that no two charts of a page share an id.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", transparent=True, metadata=undocumented)
    label = Markup.escape(f"{title} by {x_label}: " + ", ".join(lines))
    svg = file.getvalue()
    svg = re.sub(r"^.*?<svg [^>]*viewBox", f'<svg role="img" aria-label="{label}" viewBox', svg, flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>|(?<=<g) id="[^"]*"', "", svg, flags=re.DOTALL)
    for color, ours in COLORS.items():
        svg = svg.replace(color, ours)
    return Markup(re.sub(r' xmlns="[^"]*"| version="1.1"', "", svg))


# --------------------------------------------------------------------------------------------------
# Captions and pictures


class Pictures:
    """Turns pictures into `data:` URIs as long as they have room in `MAX_PICTURES` bytes."""

    def __init__(self) -> None:
        self.left = MAX_PICTURES

    def uri(self, path: Path, longest: int) -> str | None:
        """Return a small JPEG of a picture, or an SVG as it is; None where it cannot be read or there is no room."""
        if path.suffix == ".svg":  # as an image a browser runs and loads nothing of it
            return self.fitted("image/svg+xml", path.read_bytes()) if path.stat().st_size <= self.left else None
        small = small_image(path, longest)
        return self.fitted("image/jpeg", encoded(small, "JPEG", quality=82, optimize=True)) if small else None

    def fitted(self, kind: str, content: bytes) -> str | None:
        if len(content) > self.left:
            return None
        self.left -= len(content)
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def small_image(path: Path, longest: int) -> Image.Image | None:
    """Return a picture with no side longer than `longest` pixels, None where it cannot be read."""
    try:
        picture = open_image(path, at_least=longest)
    except UnreadableImage:
        return None
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return picture


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def known_references(run: Run, data: CaptionSet | None) -> dict[str, list[str]]:
    """Return the references by image id, of the latest test or else of the data set; none without either."""
    try:
        found = read_test_references(run, run.latest)
    except UserError as error:
        found = {}
        run.damage.append(str(error))
    if not found and data is not None:
        found = {str(data.image_id(n)): data.references(n) for n in range(len(data.names))}
    return found


def gallery(
    run: Run, predictions: Mapping[str, str], data: CaptionSet | None, problem: str, pictures: Pictures
) -> dict[str, Any]:
    """Return captions with their photos and references, chosen by rank of their CIDEr and at random, never by hand.

    Args:
        predictions: the captions of the latest test by image id; empty where there was none, or they are gone.
    """
    found: dict[str, Any] = {"notes": [], "groups": []}
    if not predictions:
        return found
    if data is None:
        return found | {"notes": [problem]}
    position = {str(data.image_id(number)): number for number in range(len(data.names))}
    names = [name for name in predictions if name in position]
    if not names:
        return found | {"notes": [f"None of the images that were captioned is in {data.image_dir}."]}
    size = max(1, min(GROUP, len(names) // 4))
    seed = run.flags.get("seed")
    drawn = np.random.default_rng(seed if type(seed) is int and seed >= 0 else 0).permutation(len(names))[:size]
    groups = {f"Random (--seed {seed})": drawn}
    found["notes"].append(f"The latest test: {', '.join(describe(run.latest))}. Bold: the model; below: people.")
    scores: dict[str, np.ndarray] = {}
    try:
        stored = read_scores(run, run.latest)
        place = {name: number for number, name in enumerate(stored.names)}
        order = [place[name] for name in names]
        scores = {"CIDEr": stored.scores.cider[order]}
        sentence_bleu = stored.scores.sentence_bleu4[order]  # NaN in older files
        scores |= {} if np.isnan(sentence_bleu).any() else {"sentence BLEU-4": sentence_bleu}
        groups = {**by_rank(scores["CIDEr"], size), **groups}
    except (UserError, KeyError) as error:
        reason = str(error) if isinstance(error, UserError) else f"no score of {error}"
        found["notes"].append(f"Not ranked, since the CIDEr of each image is missing: {reason}")
    texts = training_texts(run, data)
    if not len(texts):
        found["notes"].append("The closest training captions are not known: no image of the run's split.json is here.")
    for title, places in groups.items():
        captions = [predictions[names[number]] for number in places.tolist()]
        cards = []
        for number, caption, nearest in zip(
            places.tolist(), captions, nearest_training(data, texts, captions), strict=True
        ):
            image = position[names[number]]
            cards.append({
                "picture": pictures.uri(data.image_dir / data.names[image], 480), "name": names[number],
                "caption": caption, "people": data.references(image)[:5], "nearest": nearest,
                "unsupported": unsupported_words(caption, data.references(image)),
                "scores": [f"{label} {100 * each[number]:.0f}" for label, each in scores.items()],
            })  # fmt: skip
        found["groups"].append((title, cards))
    return found


def training_texts(run: Run, data: CaptionSet) -> np.ndarray:
    """Return the numbers of the run's training captions (T,); none where its `split.json` does not tell."""
    from captioning.dataset import captions_of

    try:
        names = {name for name in read_json(run.directory / "split.json")["train"] if isinstance(name, str)}
    except (UserError, KeyError, TypeError):
        names = set()
    return captions_of(data, np.array([n for n, name in enumerate(data.names) if name in names], np.int64))


def nearest_training(data: CaptionSet, texts: np.ndarray, captions: Sequence[str]) -> list[dict[str, Any] | None]:
    """Return for each caption the closest of some captions of the data set, its image and the similarity."""
    return [
        {"text": data.tokens.text(text), "similarity": similarity,
         "name": data.names[np.searchsorted(data.first_caption, text, "right") - 1]}
        for text, similarity in nearest_texts(captions, data.tokens, texts)
    ] if len(texts) else [None] * len(captions)  # fmt: skip


def errors(run: Run, predictions: Mapping[str, str], known: Mapping[str, list[str]]) -> dict[str, Any] | None:
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


def confidence(run: Run) -> dict[str, Any] | None:
    """Return how far the confidence of the latest test's captions can be believed, None before a test."""
    if not run.tests:
        return None
    try:
        stored = read_scores(run, run.latest)
    except UserError as error:
        return {"note": f"Not known: {error}"}
    sure, supported = stored.confidence, stored.supported
    if np.isnan(sure + supported).any():
        return {
            "note": f"The captions of the latest test have none. With {FEWEST} validation images --mode tune adds it; then test again."
        }
    bins, cider = reliability(sure, supported), stored.scores.cider
    kept = [5 * n for n in range(1, 21)]
    means = [100 * mean for mean in kept_means(sure, cider, [share / 100 for share in kept])]
    x = [100 * each.confidence for each in bins]
    measured = {"measured": [100 * each.supported for each in bins], "equal to the confidence": x}
    curves = (
        ("Supported content words, in %", "confidence, in %", x, measured),
        ("Mean CIDEr of the captions kept, in hundredths", "images whose caption is kept, in %", kept,
         {"the most confident": means, "all": [means[-1]] * len(kept)}),
    )  # fmt: skip
    rows = [(each, float((sure >= each.low).mean()), 100 * float(cider[sure >= each.low].mean())) for each in bins]
    return {
        "note": "", "images": len(sure), "error": 100 * calibration_error(bins), "rows": rows,
        "charts": [(title, chart(title, label, points, lines)) for title, label, points, lines in curves],
    }  # fmt: skip


def attention(run: Run, data: CaptionSet | None, pictures: Pictures) -> dict[str, Any]:
    """Return the run's attention pictures, drawn anew from their numbers so that they suit any screen.

    Without the photo or the numbers the picture itself is shown, of the rest the names.
    """
    samples: list[dict[str, Any]] = []
    shown_files: list[tuple[str, str]] = []
    named: list[str] = []
    paths = [path for path in run.directory.glob("*attention_viz_sample_*") if path.suffix in (".png", ".svg", ".pdf")]
    for path in sorted(paths, key=lambda path: (path.name.startswith("advanced"), len(path.name), path.name)):
        advanced = path.name.startswith("advanced")
        if not advanced and len(samples) + len(shown_files) < GROUP:
            if data is not None and (sample := word_maps(path.with_suffix(".json"), data, pictures)):
                samples.append(sample)
            elif path.suffix != ".pdf" and (uri := pictures.uri(path, 1500)):
                shown_files.append((path.name, uri))
                continue
        named.append(path.name)
    return {"samples": samples, "pictures": shown_files, "named": named}


def word_maps(path: Path, data: CaptionSet, pictures: Pictures) -> dict[str, Any] | None:
    """Read an `attention_viz_sample_N.json`: the photo, and each word's map to lay over it; None where it fails."""
    try:
        content = read_json(path)
        name, words, maps = content["image"], content["words"], np.array(content["maps"], dtype=np.float64)
        weights = check_weights(maps.reshape(len(maps), -1), len(words))
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return None
    photo = small_image(data.image_dir / name, 400) if name in data.names else None
    if photo is None or not all(isinstance(word, str) for word in words):
        return None
    uri = pictures.fitted("image/jpeg", encoded(photo, "JPEG", quality=82))
    glows = [pictures.fitted("image/png", glow(row)) for row in weights]
    if uri is None or None in glows:
        return None
    return {
        "name": name, "photo": uri, "width": photo.width, "height": photo.height, "caption": " ".join(words),
        "maps": list(zip(words, glows, entropy(weights).tolist(), strict=True)), "most_bits": math.log2(weights.shape[1]),
    }  # fmt: skip


def glow(weights: np.ndarray) -> bytes:
    """Return a PNG to lay over a photo: orange where the decoder looked, dark where it did not.

    Dark and bright photos both show it.

    Args:
        weights: (cells,) of a square grid.
    """
    smooth = (upsample(weights, 28, 28) / weights.max())[..., None]
    rgba = smooth * (255, 150, 0, 95) + (1 - smooth) * (0, 0, 0, 165)
    return encoded(Image.fromarray(rgba.astype(np.uint8), "RGBA"), "PNG", optimize=True)


def words(run: Run, predictions: Mapping[str, str], known: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return how the model's words and lengths differ from people's on the same images."""
    found: dict[str, Any] = {"facts": [(k, run.facts[k]) for k in ("Vocabulary", "Images") if k in run.facts]}
    if not predictions:
        return found | {"rows": []}
    people = [text.split() for name in predictions for text in known.get(name, ())]
    model = [caption.split() for caption in predictions.values()]
    both = [model, people] if people else [model]
    counts = [Counter(word for caption in captions for word in caption) for captions in both]
    in_training = run.latest.get("in_training")
    found["rows"] = [
        ("captions", *map(len, both)),
        ("words in a caption, mean", *(f"{sum(map(len, each)) / max(1, len(each)):.1f}" for each in both)),
        ("different words", *map(len, counts)),
        ("different captions", *(len(set(map(tuple, each))) for each in both)),
        *([("captions that are in the training set", f"{100 * in_training:.0f} %")] if is_number(in_training) else []),
    ]
    lengths = [Counter(map(len, captions)) for captions in both]
    longest = min(40, max(length for each in lengths for length in each))
    x = list(range(min(longest, *(min(each) for each in lengths)), longest + 1))
    names = ("model", "people, same images")
    shares = {
        name: [100 * each[n] / max(1, each.total()) for n in x] for name, each in zip(names, lengths, strict=False)
    }
    title = "Captions of each length, in %"
    found["people"] = bool(people)
    found["chart"] = (title, chart(title, "words", x, shares))
    found["frequent"] = counts[0].most_common(20)
    return found
