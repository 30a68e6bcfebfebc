"""What every other module shares: atomic writes, messages, and a user's mistakes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy
    from tqdm import tqdm

# Not allowed in a name or a caption: each breaks a message's line, a terminal or a UTF-8 file.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")  # names of half-written files
KERNELS = 128  # that oneDNN keeps, one for each shape of a product in bf16; a few MB each (docs/lab/log.md)
EXPORTED_WEIGHTS = "model.safetensors"  # what `--mode export` writes, beside config.json and vocabulary.json
STALE_SECONDS = 600  # no file takes longer to write; what a killed process left is older


def printable(text: str) -> str:
    """Return the text with its control characters as escapes, so that it cannot break a line or command a terminal."""
    return CONTROL_CHARACTERS.sub(lambda found: ascii(found[0])[1:-1], text)


def csv_cell(value: Any) -> Any:
    """Return a value as a spreadsheet may show it: a text is never a formula, nor a command to a terminal."""
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return printable(f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text)


# --------------------------------------------------------------------------------------------------
# Commands, as messages print them

SCRIPT, DATA_SCRIPT = "flickr_image_caption_with_pytorch_resnet_lstm.py", "download_datasets.py"
# How each is started: where it lies, as a module, and by the command that pip installs.
STARTS = {
    SCRIPT: (f"python {SCRIPT}", "python -m captioning", "flickr-caption"),
    DATA_SCRIPT: (f"python {DATA_SCRIPT}", "python -m download_datasets", "flickr-caption-data"),
}


def program(script: str = SCRIPT) -> str:
    """Return how a script is started, in the way in which this process was; by default as it can be from here."""
    started = Path(sys.argv[0]).name.removesuffix(".exe") if sys.argv else ""
    ways = [way for names in STARTS.values() for way, name in enumerate(names) if name == started]
    return STARTS[script][ways[0] if ways else 0 if in_checkout() else 2]


def install_command(extra: str = "train") -> str:
    """Return the command that installs an extra of pyproject.toml: in a checkout, its requirements file."""
    if in_checkout():
        return f"python -m pip install -r requirements{'' if extra == 'train' else f'-{extra}'}.txt"
    return f'python -m pip install "flickr-caption[{extra}]"'


def in_checkout() -> bool:
    """Return whether this is the repository, which has scripts and requirements files, or a package that pip installed."""
    return Path(__file__).parent.with_name("requirements.txt").is_file()


# --------------------------------------------------------------------------------------------------
# Messages


class PrintHandler(logging.Handler):
    """Prints messages on standard output as it is at that moment, without a prefix."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


# Progress messages. What a command was asked for (scores, tables) is printed, so that --quiet keeps it.
log = logging.getLogger("image_captioning")
log.addHandler(PrintHandler())
log.setLevel(logging.INFO)
log.propagate = False  # a library that sets up logging for itself does not print them again


def bars_off() -> bool | None:
    """Return tqdm's `disable`: no progress bars with --quiet, else bars on a terminal."""
    return None if log.isEnabledFor(logging.INFO) else True


class SteadyStream:
    """A text stream that drops what a closed terminal, `| head -1` or a full disk cannot take."""

    def __init__(self, stream: Any):
        self.stream = stream  # None where the shell closed it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Let hours of work go on where their messages cannot be printed."""
    out: Any = SteadyStream(sys.stdout)
    err: Any = SteadyStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class LineStream(SteadyStream):
    """A stream that is no terminal: each state of a progress bar is a line of its own."""

    def write(self, text: str) -> int:
        return super().write(f"{text.strip()}\n" if text.strip() else "")


def duration(seconds: float) -> str:
    """Return 8.2 -> '8 s', 150 -> '2.5 min', 9000 -> '2.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def progress_bar(total: int, what: str, unit: str) -> tqdm[NoReturn]:
    """Return a progress bar; redirected output, e.g. a job's log file, has it once a minute."""
    from tqdm import tqdm

    terminal = getattr(sys.stderr, "isatty", bool)()  # a closed stream has no isatty
    seconds = 0.1 if terminal else 60.0
    return tqdm(
        total=total, desc=what, unit=unit, disable=bool(bars_off()), mininterval=seconds, maxinterval=60, delay=seconds,
        file=sys.stderr if terminal else LineStream(sys.stderr),
    )  # fmt: skip


def prepare_process() -> None:
    """Prepare a script before it imports PyTorch, which takes seconds: Ctrl-C ends them with a line.

    Text that a stream's encoding lacks is written as escapes (Windows). oneDNN reads how many kernels it keeps when it
    is imported: fewer than its 1,024, unless the user says how many.
    """

    def stop(*_: object) -> None:
        print("\nStopped.", file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


# --------------------------------------------------------------------------------------------------
# A user's mistakes


class UserError(Exception):
    """A mistake that the user can fix. The main scripts print it as one line and exit with code 2."""

    def __str__(self) -> str:
        """Return the message; names in it that came from a file cannot command the terminal."""
        return "\n".join(map(printable, super().__str__().split("\n")))


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: what is in hand is put away, then the program ends."""

    def __init__(self, number: int, advice: str = ""):
        """Args: advice: what to print instead of the command's own last line."""
        super().__init__(number)
        self.number, self.advice = number, advice


def terminate(number: int, _: object) -> NoReturn:
    raise Terminated(number)


def run_command(command: Callable[[], int], stopped: str) -> int:
    """Run a command; return its exit code, 2 after a user's mistake, or 128 + the signal that ended it.

    Args:
        stopped: what to print after Ctrl-C, SIGTERM or SIGHUP.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # nohup ignores SIGHUP, and stays in force
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in numbers:
            signal.signal(number, terminate)
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # reading may fail anywhere; writing has messages of its own
        if error.filename is None:
            raise
        print(f"error: {unreadable(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {not_installed(error.name)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as ended:
        advice, number = (ended.advice, ended.number) if isinstance(ended, Terminated) else ("", signal.SIGINT)
        print(f"\n{advice or stopped}", file=sys.stderr)
        return 128 + number
    finally:
        with contextlib.suppress(ValueError):
            for number in numbers:
                signal.signal(number, signal.SIG_DFL)


def not_installed(package: str | None) -> UserError:
    """Return the complaint over a package of requirements.txt, or of the extra `train`, that this Python has not."""
    advice = f"Training and testing need the extra `train`: {install_command()}"
    if in_checkout():
        advice = (
            f"Install what is needed ({install_command()}; ./setup.sh puts it into .venv), or run the Python that has "
            "it (.venv/bin/python)"
        )
    return UserError(f"{sys.executable} has no package {package}. {advice}")


# --------------------------------------------------------------------------------------------------
# Files


def unreadable(error: OSError) -> str:
    """Say of an error that names a file or folder what to do: no permission, a name that is too long, a disk's fault."""
    name = printable(str(error.filename))
    if isinstance(error, PermissionError):
        return f"no permission for {name}. Make it readable and rerun"
    return f"cannot use {name}: {error.strerror}"


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that no other process has, on whatever machine or in whatever container.

    The first one that a process asks for in a directory removes what killed processes left there.
    """
    with contextlib.suppress(OSError):
        remove_stale_files_once(path.parent)
    name = path.name.encode(errors="surrogateescape")[:200].decode(errors="ignore")  # a name has 255 bytes at most
    return path.with_name(f".{name}.{secrets.token_hex(8)}.tmp")


def remove_stale_files(directory: Path) -> None:
    """Remove the half-written files and folders that killed processes left in a directory."""
    for path in directory.iterdir():
        with contextlib.suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


remove_stale_files_once = functools.cache(remove_stale_files)


def write_atomic(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that appears under `path` whole or not at all.

    The bytes go to a temporary file beside `path`, are flushed to the disk and renamed over it, so that a crash, a full
    disk or a second reader never meets half a file.

    Raises:
        UserError: the file cannot be written; what stood at `path` before is untouched.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:  # x: nothing is written through a link
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError; others, such as CUDA's, are no matter of the disk.
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container", str(error)):
            raise
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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message, shortened."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, by a hard link where the file system has them.

    Checkpoints are only ever replaced whole, never written in place, so a link is as safe as a copy and takes no room.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = temporary_name(target)
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
        probe = temporary_name(path / "write_test")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {path} ({purpose}): {error.strerror}. Choose another directory") from error
    return path


def wait_for_lock(path: Path, message: str) -> AcquireReturnProxy:
    """Lock a file; log the message and wait if another process holds the lock."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0.1)
    except Timeout:
        log.info(message)
        return lock.acquire()


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
