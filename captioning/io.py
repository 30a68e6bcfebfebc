"""What every other module shares: how a file is written, and how a user is told what happens and what is wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

# What has no place in a name or a caption: it would break a message's line, a terminal or a UTF-8 file.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with its control characters as escapes, so that it cannot break a line or command a terminal."""
    return CONTROL_CHARACTERS.sub(lambda found: ascii(found[0])[1:-1], text)


class PrintHandler(logging.Handler):
    """Messages as `print` writes them: on standard output as it is at that moment, without a prefix."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


# What happens along the way. What a command was asked for (scores, tables) is printed, so that --quiet keeps it.
log = logging.getLogger("image_captioning")
log.addHandler(PrintHandler())
log.setLevel(logging.INFO)
log.propagate = False  # a library that sets up logging for itself does not print them again


def bars_off() -> bool | None:
    """tqdm's `disable`: with --quiet there are no progress bars, else there are on a terminal."""
    return None if log.isEnabledFor(logging.INFO) else True


def run_command(command: Callable[[], int], stopped: str) -> int:
    """The exit code of a command: its own, 2 after a user's mistake, which is said in one line, or 130 after Ctrl-C.

    Args:
        stopped: what to say after Ctrl-C.
    """
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error.name)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130


class UserError(Exception):
    """Something the user can mend. The main scripts print it as one line and exit with code 2."""

    def __str__(self) -> str:
        """The message; names in it that came from a stranger's file cannot command the terminal."""
        return "\n".join(map(printable, super().__str__().split("\n")))


def not_installed(package: str | None) -> UserError:
    """The complaint over a package that requirements.txt names and this Python has not."""
    return UserError(
        f"{sys.executable} has no package {package}. Install what is needed (python -m pip install -r requirements.txt, "
        "or ./setup.sh, which puts it into .venv), or run the Python that has it (.venv/bin/python)"
    )


def write_atomic(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that appears under `path` whole or not at all.

    The bytes go to a temporary file beside `path`, are flushed to the disk and renamed over it, so
    that a crash, a full disk or a second reader never meets half a file.

    Raises:
        UserError: the file cannot be written; what stood at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(
            f"cannot write {path}: {error}. Free some space or choose a writable place, then run again; "
            "what was there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # a file system that became read-only lets nothing be removed either
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text, atomically."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from error


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for one line of ours."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def check_tensor_zip(path: Path) -> None:
    """Compare what a file of PyTorch says of itself with what it is, before memory is taken for its tensors.

    PyTorch stores its records uncompressed, so that records cannot be larger than the file they are in, and
    with checksums, which it does not compare itself.

    Raises:
        zipfile.BadZipFile: compressed, larger inside than outside, a record twice, or damaged.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise zipfile.BadZipFile("its records are compressed, which PyTorch's never are")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise zipfile.BadZipFile("its records claim to be larger than the file")
        if len({record.filename for record in records}) < len(records):
            raise zipfile.BadZipFile("it has a record twice")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"its record {damaged} is damaged (checksum differs)")


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` without writing its bytes again where links are possible.

    Checkpoints are only ever replaced whole (never written in place), so that a hard link is as safe
    as a copy and a run keeps `best.pt` and `last.pt` for nothing.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_directory(path: Path, purpose: str) -> Path:
    """Create a directory (and its parents) and make sure that files can be written into it.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write_test.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {path} ({purpose}): {error.strerror}. Choose another directory") from error
    return path


def require_free_space(directory: Path, needed: int, purpose: str) -> int:
    """Return the free bytes of the disk that holds `directory`, which must exist.

    Raises:
        UserError: fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{purpose} needs {format_bytes(needed)}, but {directory} has {format_bytes(free)} free. "
            "Free some space or choose another disk"
        )
    return free


def format_bytes(count: float) -> str:
    """3_600_000 -> '3.6 MB' (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
