"""`report.html`: a run in one file without outside references, to read on a desk or a phone, by day or night."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from captioning.cider import cider_of_each
from captioning.io import CONTROL_CHARACTERS, UserError, read_json, write_atomic
from captioning.runs import Run, decoding, is_number, read_run, read_scores, reproducing_command, score_text
from captioning.scores import METRIC_NAMES, by_rank

if TYPE_CHECKING:
    from captioning.dataset import CaptionSet

MAX_PICTURES = 3_300_000  # bytes of JPEG; as base64 they are a third more, and the file stays below 5 MB
GROUP = 4  # captions in each group of the gallery

STYLE = """
:root { color-scheme: light dark; --ink: #1c1d1f; --soft: #5b5f66; --line: #d9dce1; --page: #fff; --card: #f5f6f8;
  --c1: #0072b2; --c2: #c2500a; --c3: #00795a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9eb; --soft: #a5abb5; --line: #3a3e45; --page: #16181b;
  --card: #202328; --c1: #5cb8f0; --c2: #f0914f; --c3: #3fcfa4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 1.2rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 75ch; }
.soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: .8rem; border-radius: 6px;
  font-size: .85rem; }
.grid { display: grid; gap: 1.1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 235px), 1fr)); }
.charts { display: grid; gap: 1.1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.card, figure { margin: 0; background: var(--card); border-radius: 8px; padding: .7rem; overflow-wrap: anywhere; }
.card img { width: 100%; height: 190px; object-fit: contain; border-radius: 4px; }
.card b { display: block; margin: .5rem 0 .3rem; line-height: 1.3; }
.card ul { margin: 0; padding-left: 1rem; color: var(--soft); font-size: .88rem; line-height: 1.35; }
figure img { display: block; min-width: min(660px, 200vw); width: 100%; border-radius: 4px; }
figure { margin-bottom: 1rem; }
.parameters { columns: 19rem; column-gap: 2.5rem; }
.parameters div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line);
  break-inside: avoid; font-size: .9rem; }
.parameters span:last-child { text-align: right; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; } svg text { font: 14px system-ui, sans-serif; fill: var(--soft); }
svg .axis { stroke: var(--line); } svg polyline { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.s1 { stroke: var(--c1); fill: var(--c1); color: var(--c1); } .s2 { stroke: var(--c2); fill: var(--c2); color: var(--c2); }
.s3 { stroke: var(--c3); fill: var(--c3); color: var(--c3); }
svg .best { stroke: var(--soft); stroke-dasharray: 5 4; }
.legend span { margin-right: 1rem; white-space: nowrap; font-weight: 600; font-size: .9rem; }
"""


# --------------------------------------------------------------------------------------------------
# The file


def write_report(directory: Path, data: CaptionSet | None = None, data_dir: Path | None = None) -> Path:
    """Write `report.html` into a run directory from what lies there.

    Args:
        data: the run's data set; where it is not given it is read again from where the run says, or from
            `data_dir`, and where it is not there the report has no gallery and says so.

    Returns:
        the file's path.

    Raises:
        UserError: no run directory, a damaged file in it, or the report cannot be written.
    """
    run = read_run(directory)
    problem = ""
    if data is None:
        try:
            data = load_data(run, data_dir)
        except (UserError, ValueError, OSError) as error:  # the last two: a path that no file can have
            problem = f"The data set is not at hand, so that there are neither pictures nor references here: {error}"
    text = page(run, data, problem).encode("utf-8", "replace")
    path = directory / "report.html"
    write_atomic(path, lambda file: file.write(text))
    return path


def load_data(run: Run, data_dir: Path | None) -> CaptionSet:
    """The data set that a run was trained on, with its split.

    Raises:
        UserError: it is not there.
    """
    from captioning.dataset import load_caption_set

    def place(name: str) -> Path | None:
        value = run.flags.get(name)
        return Path(value) if isinstance(value, str) and data_dir is None else None

    folder = data_dir or place("data_dir")
    if folder is None and not (place("image_dir") and place("captions_file")):
        folder = Path("data") / str(run.flags.get("dataset_type"))
    cache = Path(str(run.flags.get("feature_cache")))
    split = run.directory / "split.json"
    saved = read_json(split) if split.is_file() else None
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), list) for name in ("val", "test")):
        saved = None
    seed = run.flags.get("seed")
    return load_caption_set(
        folder, place("image_dir"), place("captions_file"), seed if type(seed) is int and seed >= 0 else 0,
        saved, cache if cache.is_dir() else None,
    )  # fmt: skip


def page(run: Run, data: CaptionSet | None, problem: str) -> str:
    """The whole document."""
    pictures = Pictures()
    said = test_captions(run)
    about = [f"{name} {run.flags[name]}" for name in ("dataset_type", "decoder", "encoder") if run.flags.get(name)]
    best = run.best
    if best:
        about.append(f"epoch {best['epoch']} is the best of {len(run.epochs)}")
    sections = [
        ("Scores", scores_section(run)),
        ("Training", curves_section(run)),
        ("Captions", gallery_section(run, said, data, problem, pictures)),
        ("Where it looked", attention_section(run, pictures)),
        ("Words and lengths", words_section(run, said, data)),
        ("Parameters", parameters_section(run)),
        ("Again", command_section(run)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever a caption or a name may hold, the page loads nothing and runs nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{text_of(run.directory.resolve().name)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{text_of(run.directory.resolve().name)}</h1><p class="soft">{text_of(", ".join(about))}</p>{body}</body></html>\n'
    )


def text_of(value: Any) -> str:
    """Anything as text that HTML cannot take for markup."""
    text = f"{value:g}" if type(value) is float else str(value)
    return html.escape(CONTROL_CHARACTERS.sub("�", text))


# --------------------------------------------------------------------------------------------------
# Scores, curves, parameters


def scores_section(run: Run) -> str:
    """A column for each test, with its interval of 95 %, and one for the best epoch's validation scores."""
    columns: list[tuple[str, Mapping[str, Any]]] = [
        (
            f"{text_of(row.get('split'))}, {text_of(row.get('images'))} images<br>{text_of(decoding(row)).replace(', ', '<br>')}",
            row,
        )
        for row in run.tests[-6:]
    ]
    if run.best:
        columns.append((f"validation, epoch {text_of(run.best['epoch'])}<br>greedy", run.best))
    lines = []
    for key, name in METRIC_NAMES.items():
        cells = [score_cell(key, row) for _, row in columns]
        if any(cells):
            lines.append(
                f"<tr><th>{name}</th>" + "".join(f'<td class="n">{cell or "-"}</td>' for cell in cells) + "</tr>"
            )
    head = "".join(f'<th class="n">{title}</th>' for title, _ in columns)
    table = f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>' if lines else ""
    intervals = any(key.endswith("_interval") for _, row in columns for key in row)
    note = f"In hundredths{'; smaller: 95 % intervals over the choice of images' if intervals else ''}. WER: lower is better."
    game: Any = (run.tests[-1] if run.tests else {}).get("pointing_game")
    if is_number(game):
        note += f" Pointing game: {100 * game:.0f} % of the shape words have their attention peak on their shape."
    if not run.tests:
        command = reproducing_command(["--mode", "test", "--model_path", str(run.directory)])
        note += f"</p><p>Not tested yet: <code>{text_of(command)}</code>"
    return f'{table}<p class="soft">{note}</p>'


def score_cell(key: str, row: Mapping[str, Any]) -> str:
    if not is_number(row.get(key)):
        return ""
    bounds: Any = row.get(f"{key}_interval")
    known = isinstance(bounds, list) and len(bounds) == 2 and all(map(is_number, bounds))
    interval = (
        f'<br><span class="soft">{score_text(key, bounds[0])} to {score_text(key, bounds[1])}</span>' if known else ""
    )
    return score_text(key, row[key]) + interval


def curves_section(run: Run) -> str:
    """Losses, learning rate and validation scores by epoch."""
    if not run.epochs:
        return "<p>No epoch is finished yet.</p>"
    best = run.best["epoch"] if run.best else None
    wanted = [
        ("Loss", {"training_loss": "training", "validation_loss": "validation"}, 1, False),
        ("Learning rate", {"learning_rate": "learning rate"}, 1, True),
        ("Validation scores, in hundredths", {"cider": "CIDEr", "rouge_l": "ROUGE-L", "bleu4": "BLEU-4"}, 100, False),
    ]
    charts = []
    for title, names, scale, logarithmic in wanted:
        lines = {
            label: [scale * row[key] if is_number(row.get(key)) else math.nan for row in run.epochs]
            for key, label in names.items()
        }
        charts.append(chart(title, "epoch", [row["epoch"] for row in run.epochs], lines, best, logarithmic))
    note = f'<p class="soft">Dashed: epoch {best}, whose weights are best.pt.</p>' if best else ""
    return f'<div class="charts">{"".join(charts)}</div>{note}'


def parameters_section(run: Run) -> str:
    hidden = {"command", "mode", "resume", "config"}
    rows = "".join(
        f"<div><span>{text_of(name)}</span><span>{text_of(value)}</span></div>"
        for name, value in run.flags.items()
        if name not in hidden and value not in (None, "", [])
    )
    return f'<div class="parameters">{rows}</div>'


def command_section(run: Run) -> str:
    command = run.flags.get("command")
    if not isinstance(command, str):
        return ""
    return f"<p>This command trains the run again:</p><pre>{text_of(command)}</pre>"


def chart(
    title: str, x_label: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], marked: float | None = None,
    logarithmic: bool = False,
) -> str:  # fmt: skip
    """An inline SVG line chart that takes the page's colours.

    Args:
        lines: label -> values, as many as `x`, up to three; NaN leaves a gap.
        marked: an x with a dashed line through it.
        logarithmic: where the values span more than a decade and are above zero.
    """
    values = np.array([list(line) for line in lines.values()], dtype=np.float64)
    known = values[np.isfinite(values)]
    if not len(known):
        return ""
    logarithmic = logarithmic and known.min() > 0 and known.max() > 10 * known.min()
    low, high = (
        (math.log10(known.min()), math.log10(known.max())) if logarithmic else (min(0.0, known.min()), known.max())
    )
    if high - low < 1e-300:
        high = low + 1
    ticks = [*range(math.floor(low), math.ceil(high) + 1)] if logarithmic else nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    left, right, top, bottom, width, height = 62, 10, 10, 46, 440, 270

    def place(a: float, b: float) -> tuple[float, float]:
        across = 0.5 if x[-1] == x[0] else (a - x[0]) / (x[-1] - x[0])
        up = ((math.log10(b) if logarithmic else b) - low) / (high - low)
        return left + (width - left - right) * across, height - bottom - (height - top - bottom) * up

    parts = []
    for tick in ticks:
        value = 10.0**tick if logarithmic else tick
        _, y = place(x[0], value)
        parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 5:.1f}" text-anchor="end">{value:.6g}</text>')
    step = max(1, -(-len(x) // 8))
    for a in x[::step]:
        parts.append(
            f'<text x="{place(a, known[0])[0]:.1f}" y="{height - bottom + 20}" text-anchor="middle">{a:g}</text>'
        )
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 5}" text-anchor="middle">{x_label}</text>')
    if marked is not None and x[0] <= marked <= x[-1]:
        across = place(marked, known[0])[0]
        parts.append(f'<line class="best" x1="{across:.1f}" x2="{across:.1f}" y1="{top}" y2="{height - bottom}"/>')
    for number, (label, line) in enumerate(lines.items(), 1):
        run: list[str] = []
        for a, b in zip(x, line, strict=True):
            if math.isfinite(b):
                across, up = place(a, b)
                run.append(f"{across:.1f},{up:.1f}")
                note = f"<title>{x_label} {a:g}: {label} {b:.5g}</title>"
                parts.append(f'<circle class="s{number}" cx="{across:.1f}" cy="{up:.1f}" r="3.5">{note}</circle>')
            if run and (not math.isfinite(b) or a == x[-1]):
                parts.append(f'<polyline class="s{number}" style="fill:none" points="{" ".join(run)}"/>')
                run = []
    legend = "".join(f'<span class="s{n}">● {label}</span>' for n, label in enumerate(lines, 1))
    label = f"{title} by {x_label}: " + ", ".join(lines)
    return (
        f'<div><h3>{title}</h3><div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg></div>'
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers that enclose [low, high]."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [step * n for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


# --------------------------------------------------------------------------------------------------
# Captions and pictures


class Pictures:
    """Turns pictures into `data:` URIs as long as they have room in `MAX_PICTURES` bytes."""

    def __init__(self) -> None:
        self.left = MAX_PICTURES

    def uri(self, path: Path, longest: int) -> str | None:
        """A small JPEG of the picture, or the SVG as it is; None where it cannot be read or there is no room left."""
        from captioning.images import UnreadableImage, open_image

        if path.suffix == ".svg":  # as an image a browser runs and loads nothing of it
            return self.fitted("image/svg+xml", path.read_bytes()) if path.stat().st_size <= self.left else None
        try:
            picture = open_image(path, at_least=longest)
        except UnreadableImage:
            return None
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=82, optimize=True)
        return self.fitted("image/jpeg", file.getvalue())

    def fitted(self, kind: str, content: bytes) -> str | None:
        if len(content) > self.left:
            return None
        self.left -= len(content)
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class Said(NamedTuple):
    """The captions of the latest test."""

    row: Mapping[str, Any]  # of test_metrics.json
    captions: dict[str, str]  # by image id: COCO's number, else the file name


def test_captions(run: Run) -> Said | None:
    """None where the run was not tested, or its captions are gone.

    Raises:
        UserError: the captions file has another form.
    """
    row = run.tests[-1] if run.tests else {}
    name = row.get("captions_file")
    path = run.directory / Path(name).name if isinstance(name, str) and Path(name).name else None
    if path is None or not os.path.isfile(path):  # where Path raises over a name that no file can have
        return None
    content = read_json(path)
    if (
        not isinstance(content, list)
        or not content
        or not all(
            isinstance(entry, dict)
            and type(entry.get("image_id")) in (str, int)
            and isinstance(entry.get("caption"), str)
            for entry in content
        )
    ):
        raise UserError(f'{path} is no list of {{"image_id": ..., "caption": ...}}: test the run again')
    return Said(row, {str(entry["image_id"]): entry["caption"] for entry in content})


def cider_by_image(run: Run, said: Said, names: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Of each image (n,): as the test wrote it, else computed anew."""
    try:
        kept = read_scores(run, said.row)
        place = {name: number for number, name in enumerate(kept.names)}
        return kept.scores.cider[[place[name] for name in names]]
    except (UserError, KeyError):  # a test of before scores were kept
        return cider_of_each([said.captions[name] for name in names], references)


def gallery_section(run: Run, said: Said | None, data: CaptionSet | None, problem: str, pictures: Pictures) -> str:
    """Captions with their pictures and references, chosen by rank of their CIDEr and by chance, never by hand."""
    if said is None:
        return ""
    if data is None:
        return f"<p>{text_of(problem)}</p>"
    position = {str(data.image_id(number)): number for number in range(len(data.names))}
    names = [name for name in said.captions if name in position]
    if not names:
        return f"<p>None of the images that were captioned is in {text_of(data.image_dir)}: no pictures here.</p>"
    references = [data.references(position[name]) for name in names]
    cider = cider_by_image(run, said, names, references)
    size = max(1, min(GROUP, len(names) // 4))
    seed = run.flags.get("seed")
    drawn = np.random.default_rng(seed if type(seed) is int and seed >= 0 else 0).permutation(len(names))[:size]
    groups = {**by_rank(cider, size), f"Random (--seed {text_of(seed)})": drawn}
    parts = [
        f'<p class="soft">The latest test ({text_of(said.row.get("split"))}, {text_of(decoding(said.row))}), '
        f"ranked by the CIDEr of each of the {len(names)} images. Bold: the model; below: people.</p>"
    ]
    for title, chosen in groups.items():
        cards = []
        for number in chosen:
            uri = pictures.uri(data.image_dir / data.names[position[names[number]]], 480)
            image = f'<img src="{uri}" alt="{text_of(names[number])}">' if uri else "<p>(picture left out)</p>"
            people = "".join(f"<li>{text_of(reference)}</li>" for reference in references[number][:5])
            cards.append(
                f'<div class="card">{image}<b>{text_of(said.captions[names[number]] or "(no words)")}</b><ul>{people}</ul>'
                f'<p class="soft">{text_of(names[number])}, CIDEr {100 * cider[number]:.0f}</p></div>'
            )
        parts.append(f'<h3>{title}</h3><div class="grid">{"".join(cards)}</div>')
    return "".join(parts)


def attention_section(run: Run, pictures: Pictures) -> str:
    """The attention pictures that the run saved: the first few of each kind, the others by name."""
    shown, named = [], []
    for kind in ("attention_viz_sample_*", "advanced_attention_viz_sample_*"):
        files = (path for path in run.directory.glob(kind) if path.suffix in (".png", ".svg", ".pdf"))
        for number, path in enumerate(sorted(files, key=lambda path: (len(path.name), path.name))):
            uri = pictures.uri(path, 1500) if number < GROUP and path.suffix != ".pdf" else None
            name = text_of(path.name)
            if uri:
                image = f'<div class="wide"><img src="{uri}" alt="{name}"></div>'
                shown.append(f'<figure>{image}<figcaption class="soft">{name}</figcaption></figure>')
            else:
                named.append(name)
    more = f'<p class="soft">Also in the run directory: {", ".join(named)}</p>' if named else ""
    return "".join(shown) + more


def words_section(run: Run, said: Said | None, data: CaptionSet | None) -> str:
    """The vocabulary, and how the model's words and lengths differ from people's on the same images."""
    parts = []
    if data is not None:
        from captioning.dataset import build_vocabulary

        threshold = run.flags.get("freq_threshold")
        try:
            size = len(build_vocabulary(data, threshold if type(threshold) is int else 1))
            sets = ", ".join(f"{split} {len(images)}" for split, images in data.splits.items())
            parts.append(
                f"<p>Vocabulary: {size - 4} words (seen {text_of(threshold)} times or more in training captions) and 4 signs of its own, of "
                f"{len(data.tokens.words)} in all captions. Images: {sets}.</p>"
            )
        except UserError as error:
            parts.append(f"<p>{text_of(error)}</p>")
    if said is None:
        return "".join(parts)
    known = {str(data.image_id(number)): number for number in range(len(data.names))} if data is not None else {}
    people = [text.split() for name in said.captions if name in known for text in data.references(known[name])]  # type: ignore[union-attr]
    model = [caption.split() for caption in said.captions.values()]
    spoken, heard = Counter(w for words in model for w in words), Counter(w for words in people for w in words)
    lengths = {"model": Counter(map(len, model)), **({"people": Counter(map(len, people))} if people else {})}
    rows = [
        ("captions", len(model), len(people)),
        ("words in a caption, mean", f"{mean_length(model):.1f}", f"{mean_length(people):.1f}"),
        ("different words", len(spoken), len(heard)),
        ("different captions", len(set(map(tuple, model))), len(set(map(tuple, people)))),
    ]
    if is_number(said.row.get("in_training")):
        rows.append(("of them in the training captions", f"{100 * said.row['in_training']:.0f} %", ""))
    cells = "".join(
        f'<tr><th>{name}</th><td class="n">{a}</td>' + (f'<td class="n">{b}</td>' if people else "") + "</tr>"
        for name, a, b in rows
    )
    head = '<th></th><th class="n">model</th>' + ('<th class="n">people, same images</th>' if people else "")
    parts.append(f'<div class="wide"><table><tr>{head}</tr>{cells}</table></div>')
    longest = min(40, max(length for counts in lengths.values() for length in counts))
    x = list(range(min(longest, *(min(counts) for counts in lengths.values())), longest + 1))
    shares = {name: [100 * counts[n] / max(1, counts.total()) for n in x] for name, counts in lengths.items()}
    parts.append(f'<div class="charts">{chart("Captions of each length, in %", "words", x, shares)}<div>')
    parts.append(word_list("The model's most frequent words", spoken.most_common(20)))
    if people:
        missing = [(word, count) for word, count in heard.most_common() if word not in spoken][:20]
        parts.append(word_list("Frequent with people, never said by the model", missing))
    return "".join(parts) + "</div></div>"


def mean_length(captions: Sequence[Sequence[str]]) -> float:
    return sum(map(len, captions)) / max(1, len(captions))


def word_list(title: str, counts: Sequence[tuple[str, int]]) -> str:
    words = ", ".join(f'{text_of(word)} <span class="soft">{count}</span>' for word, count in counts)
    return f"<h3>{title}</h3><p>{words or 'none'}</p>"
