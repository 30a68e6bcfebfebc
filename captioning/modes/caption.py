"""`--mode caption`: caption any images from a checkpoint alone."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from tqdm import tqdm

from attention_visualization import save_pictures
from captioning import __version__
from captioning.captioner import IMAGES_TOGETHER, MANY, Caption, Captioned, Captioner, Decoding, DecodingOptions, Word
from captioning.config.settings import Settings
from captioning.data.images import cell_middles, images_below
from captioning.data.sidecars import SidecarWriter
from captioning.decoding.confidence import FEWEST, confidence_text
from captioning.io import UserError, csv_cell, log, make_directory, printable, progress_bar, write_atomic, write_text
from captioning.runs.directories import command_to_tune, given_model

CSV_HEADER = ("path", "rank", "caption", "log_probability", "confidence")


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
    if args.output is not None and os.path.lexists(args.output) and not progress_file(args.output).is_file():
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
    how = captioner.decoding(**given_options(args))
    calibration = captioner.calibration_of(how)
    if args.min_confidence is not None and not calibration:
        raise UserError(
            f"--min_confidence: {captioner.path} knows no confidence: {command_to_tune(captioner.path)} adds it where there "
            f"are {FEWEST} validation images"
        )
    pictures = (Path() if args.output is None else args.output.parent) / "captions_viz"
    as_csv = args.output is not None and args.output.suffix.lower() == ".csv"
    form = csv_lines if as_csv else json_lines
    if args.output is None and not args.json:
        form = partial(tab_lines, calibration)
    captioner.generator = np.random.default_rng(args.seed)  # of what --top_p draws
    table = None
    if args.output is not None:
        made_with = {
            "version": __version__, "model": captioner.fingerprint(), **how._asdict(), "min_confidence": least,
            "seed": args.seed if how.top_p is not None else None, "sidecar": args.sidecar, "prefix": args.prefix,
        }  # fmt: skip
        table = Table(args.output, csv_row(*CSV_HEADER) if as_csv else "", made_with, captioner.generator)
        if len(paths) >= MANY:
            captioner.model.expect_many()  # also where few are left: the last digits depend on it
        paths = table.remaining(paths)
    sidecars = None
    if args.sidecar is not None:
        model = f"{captioner.path.parent.name} {captioner.fingerprint()}, flickr-caption {__version__}"
        sidecars = SidecarWriter(args.sidecar, args.prefix, model)
    failed = withheld = 0
    number = next_number(make_directory(pictures, "the attention pictures")) if args.save_attention_viz else 0

    def lines() -> Iterator[str]:
        nonlocal failed, withheld, number
        with closing(progress_bar(len(paths), "Captioning", "image")) as bar:
            for result in captioner.caption(paths, **given_options(args)):
                rows = None
                if result.problem is None:
                    withheld += is_withheld(result, least)
                    if args.save_attention_viz and not is_withheld(result, least):
                        name, words = printable(str(result.path)), [word.text for word in result.words]
                        drawn = save_pictures(pictures, number, result.source, name, words, result.best.attention, args)
                        number += drawn
                    if sidecars is not None and not is_withheld(result, least):
                        why_not = sidecars.write(cast(Path, result.path), result.text, result.confidence)
                        if why_not is not None:
                            tqdm.write(f"Not written: {printable(why_not)}", file=sys.stderr)
                    rows = list(form([result], args.num_captions, least))
                    yield from rows
                else:
                    failed += 1
                    complain(result.problem)
                if table is not None:
                    table.add(str(result.path), rows)
                bar.update()

    if table is None:
        print_lines(lines(), out)
    else:
        deque(lines(), maxlen=0)  # runs to the end; the table has the rows
        log.info(f"Captions of {table.finish()} images: {args.output}")
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


def tab_lines(
    calibration: Mapping[str, Any] | None, results: Iterable[Captioned], count: int, least: float
) -> Iterator[str]:
    """Yield `path<TAB>caption<TAB>confidence`, up to `count` lines per image; control characters of a path are escapes.

    An image whose captions are withheld has one line, without a caption.
    """
    for result in results:
        withheld = is_withheld(result, least)
        for caption in result.captions[: 1 if withheld else count]:
            sure = confidence_text(caption.confidence, calibration)
            yield f"{printable(str(result.path))}\t{'' if withheld else caption.text}\t{sure}"


def csv_lines(results: Iterable[Captioned], count: int, least: float) -> Iterator[str]:
    """Yield up to `count` rows per image, best first; one, without a caption, where they are withheld."""
    for result in results:
        withheld = is_withheld(result, least)
        for rank, caption in enumerate(result.captions[: 1 if withheld else count], 1):
            yield csv_row(str(result.path), rank, *(as_dict(caption) | ({"caption": ""} if withheld else {})).values())


def csv_row(*values: object) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(map(csv_cell, values))
    return text.getvalue()


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


# --------------------------------------------------------------------------------------------------
# --output


def progress_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.progress")


class Table:
    """The file of `--output` while its rows are found. Whatever ends the program, the same command goes on.

    The file beside it, FILE.progress, has a line of JSON with what decides the rows, then a line for each batch: its photos
    as [path, size, time, rows], rows being null where one cannot be read, and the state of the random numbers. It is
    written and synced first, and the table is always made from it: so a write that was cut off anywhere is repaired.
    """

    def __init__(self, path: Path, header: str, made_with: Mapping[str, Any], generator: np.random.Generator):
        """Open a table, which may be begun already.

        Args:
            header: its first line, "" for none.
            generator: of random numbers, which go on where they stopped.

        Raises:
            UserError: begun with something else, in use, or not writable.
        """
        from filelock import FileLock, Timeout

        self.path, self.progress, self.generator = path, progress_file(path), generator
        self.header = [f"{header}\n"] if header else []
        self.batch: list[list[Any]] = []
        self.captioned = 0  # photos that have rows
        self.lock = FileLock(path.with_name(f".{path.name}.lock"))
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: {path.parent} is not there")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process is writing {path}: wait for it, or name another --output") from None
        if not self.progress.is_file():
            write_text(self.progress, json.dumps(made_with) + "\n")
        self.check(made_with)

    def check(self, made_with: Mapping[str, Any]) -> None:
        """Raise UserError unless the first line of the file beside the table says that it is made with the same."""
        away = f"move {self.path} and {self.progress} away to begin anew"
        try:
            with open(self.progress, "rb") as file:
                before = json.loads(file.readline())
            changed = [f"{name} {before[name]}, now {now}" for name, now in made_with.items() if before[name] != now]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{self.progress} was not written by this version of the program: {away}") from None
        if changed:
            raise UserError(f"{self.path} was begun with {'; '.join(changed)}. Go on with the same flags, or {away}")

    def remaining(self, paths: Sequence[Path]) -> list[Path]:
        """Bring the table up to date; return the photos that are still to be captioned, those that were unreadable last.

        Raises:
            UserError: the table has a line of somebody else's, or cannot be written.
        """
        first, *batches = self.progress.read_bytes().split(b"\n")
        whole = len(first) + 1  # bytes that were written whole
        known = {*self.header}  # all lines that the table ever had
        done: dict[str, list[Any]] = {}  # photos by path
        for line in batches[:-1]:
            try:
                photos, self.generator.bit_generator.state = json.loads(line)
            except (ValueError, TypeError, KeyError):
                break
            whole += len(line) + 1
            for photo in photos:
                done.pop(photo[0], None)
                done[photo[0]] = photo
                known.update(photo[3] or ())
        os.truncate(self.progress, whole)
        self.stamps = {str(path): stamp(path) for path in paths}
        changed = [name for name, now in self.stamps.items() if name in done and done[name][1:3] != now]
        for name in changed:
            del done[name]
        there = self.path.read_bytes() if self.path.is_file() else None
        text = "".join(self.header + [row for photo in done.values() for row in photo[3] or ()]).encode()
        if there != text:
            *lines, _ = (there or b"").decode(errors="replace").split("\n")
            if others := [line for line in lines if f"{line}\n" not in known]:
                raise UserError(
                    f"{self.path} was changed while it was not finished ({others[0][:60]!r}): move it away, and the same "
                    f"command writes it again and goes on; to begin anew, move {self.progress} away too"
                )
            write_atomic(self.path, lambda file: file.write(text))
        failed = {name for name, photo in done.items() if photo[3] is None}
        left = sorted(
            (path for path in paths if str(path) in failed or str(path) not in done),
            key=lambda path: str(path) in failed,
        )
        self.captioned = len(done) - len(failed)
        if len(batches) > 1:
            log.info(f"{self.path}: {len(paths) - len(left)} of {len(paths)} images are done already")
        if changed:
            log.info(f"Changed since, and captioned again: {len(changed)} images")
        return left

    def add(self, path: str, rows: list[str] | None) -> None:
        """Take the rows of the next photo, None where it cannot be read; write them with the others of its batch."""
        self.batch.append([path, *self.stamps[path], rows and [f"{row}\n" for row in rows]])
        if len(self.batch) == IMAGES_TOGETHER:
            self.write()

    def write(self) -> None:
        lines = [json.dumps([self.batch, self.generator.bit_generator.state]) + "\n"]
        rows = [row for photo in self.batch for row in photo[3] or ()]
        try:
            for path, texts in ((self.progress, lines), (self.path, rows)):
                with open(path, "ab") as file:
                    file.writelines(text.encode() for text in texts)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}. Free some space; the same command goes on"
            ) from error
        self.captioned += sum(photo[3] is not None for photo in self.batch)
        self.batch = []

    def finish(self) -> int:
        """Write the last rows and remove what was beside the table; return the number of photos with captions."""
        self.write()
        self.progress.unlink()
        self.lock.release()
        Path(self.lock.lock_file).unlink(missing_ok=True)
        return self.captioned


def stamp(path: Path) -> list[int]:
    """Return size and time of a photo, by which it is known; zeros where it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return [0, 0]
    return [found.st_size, found.st_mtime_ns]
