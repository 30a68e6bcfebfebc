"""`--mode caption`: caption any images from a checkpoint alone."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import TextIO, cast

import numpy as np
from tqdm import tqdm

from attention_visualization import save_pictures
from captioning.captioner import Caption, Captioned, Captioner, Decoding, DecodingOptions, Word
from captioning.config.settings import Settings
from captioning.data.images import cell_middles, images_below
from captioning.decoding.confidence import FEWEST
from captioning.io import UserError, bars_off, csv_cell, log, make_directory, printable, write_atomic
from captioning.runs.directories import command_to_tune, given_model


def find_photos(entries: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Find the images of `--images`: files, folders (with all below them), patterns, `-` for a list on standard input.

    Returns:
        the images, each once, in the order of the entries, within a folder or pattern sorted; and what is wrong
        with lines of the list and folders that cannot be read.

    Raises:
        UserError: an entry on the command line names nothing.
    """
    images: dict[Path, None] = {}
    problems: list[str] = []

    def add(name: str) -> bool:
        if os.path.isfile(name):
            images[Path(name)] = None
        elif os.path.isdir(name):
            images.update(dict.fromkeys(images_below(name, problems)))
        else:
            return False
        return True

    for entry in entries:
        if entry == "-":
            lines = os.fsdecode(sys.stdin.buffer.read()).splitlines()
            problems += [f"{line}: no such file or folder" for line in lines if line and not add(line)]
        elif not add(entry) and not [name for name in sorted(glob.glob(entry, recursive=True)) if add(name)]:
            raise UserError(
                f"--images {entry} is not there: give image files, folders, patterns such as 'photos/*.jpg', "
                "or - for a list of them on standard input"
            )
    return list(images), problems


def caption_images(args: Settings) -> int:
    """Run `--mode caption`; return the exit code: 0, or 1 where some images could not be read.

    Only captions go to standard output, everything else goes to standard error.

    Raises:
        UserError: a mistake in the flags, or nothing to caption.
    """
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        return write_captions(args, out)


def write_captions(args: Settings, out: TextIO) -> int:
    """Caption as the flags say, into `--output` or else `out`; return as `caption_images` does."""
    if args.output is not None and args.output.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"--output {args.output} should end in .csv or .jsonl, which decides its form")
    if args.output is not None and os.path.lexists(args.output):
        raise UserError(f"--output {args.output} is there already: name another file, or move that one away")
    paths, problems = find_photos(args.images)
    for problem in problems:
        complain(problem)
    if not paths:
        raise UserError("--images names no image at all")
    workers = min(args.num_workers or 1, os.cpu_count() or 1)
    captioner = Captioner.load(
        given_model(args.model_path), device=args.device, resnet_weights=args.resnet_weights, workers=workers
    )
    log.info(f"Model: {captioner}. Device: {captioner.device}")
    if args.save_attention_viz and not captioner.model.has_attention:
        raise UserError(
            f"--save_attention_viz has no effect: the {captioner.flags['decoder']} decoder of {captioner.path} has no attention"
        )
    least = args.min_confidence or 0.0
    if args.min_confidence is not None and not captioner.calibration_of(captioner.decoding(**given_options(args))):
        raise UserError(
            f"--min_confidence: {captioner.path} knows no confidence: {command_to_tune(captioner.path)} adds it where there "
            f"are {FEWEST} validation images"
        )
    pictures = (Path() if args.output is None else args.output.parent) / "captions_viz"
    form = csv_lines if args.output is not None and args.output.suffix.lower() == ".csv" else json_lines
    if args.output is None and not args.json:
        form = tab_lines
    captioner.generator = np.random.default_rng(args.seed)  # of what --top_p draws
    failed = withheld = 0
    number = next_number(make_directory(pictures, "the attention pictures")) if args.save_attention_viz else 0

    def results() -> Iterator[Captioned]:
        nonlocal failed, withheld, number
        bar = tqdm(total=len(paths), desc="Captioning", unit="image", disable=bars_off(), file=sys.stderr)
        with closing(bar):
            for result in captioner.caption(paths, **given_options(args)):
                if result.problem is None:
                    withheld += is_withheld(result, least)
                    if args.save_attention_viz and not is_withheld(result, least):
                        name, words = printable(str(result.path)), [word.text for word in result.words]
                        drawn = save_pictures(pictures, number, result.source, name, words, result.best.attention, args)
                        number += drawn
                    yield result
                else:
                    failed += 1
                    complain(result.problem)
                bar.update()

    lines = form(results(), args.num_captions, least)
    if args.output is None:
        print_lines(lines, out)
    else:
        write_atomic(args.output, lambda file: file.writelines(f"{line}\n".encode() for line in lines))
        log.info(f"Captions of {len(paths) - failed} images: {args.output}")
    if args.save_attention_viz:
        log.info(f"Attention pictures: {pictures / 'attention_viz_sample_*'}")
    if withheld:
        print(
            f"Without a caption: {withheld} of {len(paths)} images, whose best one has less than --min_confidence {least:g}"
        )
    if failed:
        print(f"Not readable: {failed} of {len(paths)} images; they are named above")
    return 1 if failed or problems else 0


def given_options(args: Settings) -> DecodingOptions:
    """Return what the command line, or its `--config`, says of how captions are found."""
    return cast(DecodingOptions, {name: getattr(args, name) for name in Decoding._fields if name in args.explicit})


def complain(problem: str) -> None:
    tqdm.write(f"Cannot read {printable(problem)}", file=sys.stderr)


def print_lines(lines: Iterable[str], out: TextIO) -> None:
    """Print each line as soon as it is there.

    Raises:
        UserError: the stream cannot be written.
        SystemExit: its reader has closed it, as `head` does.
    """
    try:
        for line in lines:
            tqdm.write(line, file=out)
            out.flush()
    except OSError as error:
        # Else the interpreter fails once more, at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + 13) from None
        raise UserError(f"cannot write to standard output: {error.strerror}") from error


def is_withheld(result: Captioned, least: float) -> bool:
    """Whether the captions of an image are left out, since the best is not sure enough."""
    return result.confidence is not None and result.confidence < least


def tab_lines(results: Iterable[Captioned], count: int, least: float) -> Iterator[str]:
    """Yield `path<TAB>caption`, up to `count` lines per image; control characters of a path are written as escapes.

    An image whose captions are withheld has one line, without a caption.
    """
    for result in results:
        captions = [""] if is_withheld(result, least) else [caption.text for caption in result.captions[:count]]
        yield from (f"{printable(str(result.path))}\t{text}" for text in captions)


def csv_lines(results: Iterable[Captioned], count: int, least: float) -> Iterator[str]:
    """Yield a header, then up to `count` rows per image, best first; one, without a caption, where they are withheld."""

    def row(*values: object) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(map(csv_cell, values))
        return text.getvalue()

    yield row("path", "rank", "caption", "log_probability", "confidence")
    for result in results:
        withheld = is_withheld(result, least)
        for rank, caption in enumerate(result.captions[: 1 if withheld else count], 1):
            yield row(str(result.path), rank, *(as_dict(caption) | ({"caption": ""} if withheld else {})).values())


def json_lines(results: Iterable[Captioned], count: int, least: float = 0.0) -> Iterator[str]:
    """Yield an object per image: path, caption, log_probability, confidence and `words`, each with its probability.

    With attention a word has a peak, the strongest cell of the grid: its row and column from 0, its middle as fractions
    of the image's width and height, and its weight. With `count` above 1 the other captions are `alternatives`. Where
    captions are withheld, `caption` is null, and words and alternatives are absent.
    """
    for result in results:
        entry: dict[str, object] = {"path": str(result.path)} | as_dict(result.best)
        if is_withheld(result, least):
            yield json.dumps(entry | {"caption": None})
            continue
        entry["words"] = [word_dict(word) for word in result.words]
        if count > 1:
            entry["alternatives"] = [as_dict(other) for other in result.alternatives]
        yield json.dumps(entry)


def as_dict(caption: Caption) -> dict[str, object]:
    sure = caption.confidence
    values = {"caption": caption.text, "log_probability": round(caption.log_probability, 4)}
    return values | {"confidence": None if sure is None else round(sure, 4)}


def word_dict(word: Word) -> dict[str, object]:
    seen = {} if word.attention is None else {"peak": peak_of(word.attention)}
    return {"word": word.text, "probability": round(word.probability, 4)} | seen


def peak_of(weights: np.ndarray) -> dict[str, float]:
    """Return the strongest cell of one word. Args: weights: (7, 7)."""
    place = int(weights.argmax())
    row, column = divmod(place, len(weights))
    x, y = cell_middles(weights.size)[place].round(4).tolist()
    return {"row": row, "column": column, "x": x, "y": y, "weight": round(float(weights.max()), 4)}


def next_number(folder: Path) -> int:
    """Return the first number after those of the attention pictures in a folder."""
    found = (re.match(r"(?:advanced_)?attention_viz_sample_(\d+)\.", name) for name in os.listdir(folder))
    return 1 + max((int(match[1]) for match in found if match), default=0)
