"""Files are written whole or not at all; messages that cannot be printed end nothing."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captioning.io import (
    KERNELS,
    UserError,
    link_or_copy,
    progress_bar,
    remove_stale_files_once,
    run_command,
    steady_streams,
    temporary_name,
    write_atomic,
    write_text,
)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "best.pt"
    target.write_bytes(b"good")

    def full_disk(file):
        file.write(b"ba")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_atomic(target, full_disk)
    assert target.read_bytes() == b"good" and [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_only_a_full_disk_is_blamed_on_the_disk(tmp_path):
    def fail(message):
        def write(_):
            raise RuntimeError(message)

        return write

    with pytest.raises(RuntimeError, match="CUDA"):
        write_atomic(tmp_path / "x", fail("CUDA error: an illegal memory access"))
    with pytest.raises(UserError, match="Free some space"):
        write_atomic(tmp_path / "x", fail("PytorchStreamWriter failed writing file data/0: file write failed"))
    assert not list(tmp_path.iterdir())


def test_a_file_keeps_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_write_removes_what_killed_processes_left_and_nothing_else(tmp_path):
    stale, fresh, own = (tmp_path / name for name in (f".a.{'0' * 16}.tmp", f".b.{'1' * 16}.tmp", ".mine.tmp"))
    folder = temporary_name(tmp_path / "export")
    remove_stale_files_once.cache_clear()
    (folder / "below").mkdir(parents=True)
    for path in (stale, fresh, own):
        path.touch()
    for path in (stale, own, folder):
        os.utime(path, (time.time() - 3600,) * 2)
    write_text(tmp_path / "a.json", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([fresh.name, own.name, "a.json"])


def test_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"x" and len(list(tmp_path.iterdir())) == 2


class Broken(io.StringIO):
    def write(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = write


def test_messages_that_cannot_be_printed_end_nothing(monkeypatch):
    """`| head -1`, a closed terminal, a full log disk: hours of training go on."""
    monkeypatch.setattr(sys, "stdout", Broken())
    with steady_streams():
        print("epoch 1", flush=True)
    with pytest.raises(OSError):
        print("caption")


def test_sigterm_ends_a_command_with_a_line(capsys):
    def command():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    assert run_command(command, "Stopped.") == 143
    assert capsys.readouterr().err.strip() == "Stopped." and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_redirected_output_has_a_progress_bar_after_a_minute_only(capsys):
    with progress_bar(2, "Encoding images", "image") as bar:
        bar.update(2)
        assert bar.mininterval == bar.delay == 60
    assert not capsys.readouterr().err


def test_where_there_is_no_terminal_progress_is_lines(capsys, monkeypatch):
    with progress_bar(2, "Captioning", "image") as bar:
        bar.delay = bar.mininterval = 0
        bar.update(1)
        bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line[:16] for line in lines] == ["Captioning:  50%", "Captioning: 100%", "Captioning: 100%"]


@pytest.mark.parametrize(
    "number, message",
    [
        (errno.EACCES, "error: no permission for cache/tokens.bin. Make it readable and rerun"),
        (errno.ENAMETOOLONG, f"error: cannot use cache/tokens.bin: {os.strerror(errno.ENAMETOOLONG)}"),
        (errno.EIO, f"error: cannot use cache/tokens.bin: {os.strerror(errno.EIO)}"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_line(capsys, number, message):
    def command() -> int:
        raise OSError(number, os.strerror(number), "cache/tokens.bin")

    assert run_command(command, "Stopped.") == 2
    assert capsys.readouterr().err == message + "\n"


def test_a_name_of_many_bytes_can_be_written(tmp_path):
    path = tmp_path / ("写" * 83 + ".csv")  # 253 bytes
    write_text(path, "image,caption\n")
    assert path.read_text() == "image,caption\n" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("own, kept", [(None, str(KERNELS)), ("7", "7")])
def test_kernels_are_limited_before_pytorch_is_imported_unless_the_user_says_how_many(own, kept, tmp_path):
    """Without a limit oneDNN's cache grows to gigabytes."""
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    (tmp_path / "torch.py").write_text(f"import os\nprint(os.environ.get({name!r}))\nraise SystemExit")
    script = Path(__file__).resolve().parent.parent / "flickr_image_caption_with_pytorch_resnet_lstm.py"
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: own} if own else {})
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(script.parent)])
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == kept, run.stderr
