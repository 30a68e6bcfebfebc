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
    Progress,
    SteadyStream,
    UserError,
    link_or_copy,
    open_standard_streams,
    remove_stale_files,
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


def test_a_file_system_that_became_read_only_is_one_message(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="cannot write .*Read-only"):
        write_atomic(tmp_path / "last.pt", lambda file: file.write(b"x"))


def test_only_a_full_disk_is_blamed_on_the_disk(tmp_path):
    """16.16: a CUDA error under --output read "Free some space"."""

    def fail(message):
        def write(_):
            raise RuntimeError(message)

        return write

    with pytest.raises(RuntimeError, match="CUDA"):
        write_atomic(tmp_path / "x", fail("CUDA error: an illegal memory access"))
    with pytest.raises(UserError, match="Free some space"):
        write_atomic(tmp_path / "x", fail("PytorchStreamWriter failed writing file data/0: file write failed"))
    assert not list(tmp_path.iterdir())


def test_two_processes_of_one_number_do_not_share_a_temporary_name(tmp_path, monkeypatch):
    """17.4: two containers with one process id; nothing is written through a stale link."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    names = {temporary_name(tmp_path / "best.pt") for _ in range(100)}
    assert len(names) == 100
    (tmp_path / "model_epoch_2.pt").write_bytes(b"weights")
    fixed = tmp_path / ".best.pt.0123456789abcdef.tmp"
    os.link(tmp_path / "model_epoch_2.pt", fixed)
    monkeypatch.setattr("captioning.io.temporary_name", lambda _: fixed)
    with pytest.raises(UserError):
        write_text(tmp_path / "best.pt", "other")
    assert (tmp_path / "model_epoch_2.pt").read_bytes() == b"weights"


def test_a_file_keeps_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    stale, fresh, own = (tmp_path / name for name in (f".a.{'0' * 16}.tmp", f".b.{'1' * 16}.tmp", ".mine.tmp"))
    for path in (stale, fresh, own):
        path.touch()
    for path in (stale, own):
        os.utime(path, (time.time() - 3600,) * 2)
    folder = temporary_name(tmp_path / "export")
    (folder / "below").mkdir(parents=True)
    os.utime(folder, (time.time() - 3600,) * 2)
    remove_stale_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([fresh.name, own.name])


def test_the_first_write_into_a_directory_removes_what_killed_processes_left(tmp_path):
    stale = tmp_path / f".scores.json.{'0' * 16}.tmp"
    stale.touch()
    os.utime(stale, (time.time() - 3600,) * 2)
    write_text(tmp_path / "a.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


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
    """17.6: `| head -1`, a closed terminal, a full log disk, a code page without the characters."""
    monkeypatch.setattr(sys, "stdout", Broken())
    with steady_streams():
        print("epoch 1", flush=True)
    latin = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    SteadyStream(latin).write("Ärger\n")
    assert latin.buffer.getvalue() == b"\\xc4rger\n"


def test_sigterm_ends_a_command_with_a_line(capsys):
    def command():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    assert run_command(command, "Stopped.") == 143
    assert capsys.readouterr().err.strip() == "Stopped." and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_redirected_output_has_a_line_every_tenth(capsys):
    """16.25: nohup and SLURM saw nothing while images were encoded."""
    progress = Progress(200, "Encoding images", "image")
    for _ in range(25):
        progress.update(8)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].startswith("Encoding images: 24 of 200, ") and "200 of 200" in lines[-1]


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes the streams")
def test_closed_standard_streams(tmp_path):
    """17.15: no file takes the number of a closed stream."""
    code = "from captioning.io import open_standard_streams as o; o(); print(open('kept', 'w').fileno(), file=open('n', 'w'))"
    root = str(Path(__file__).parent.parent)
    shell = f'exec "{sys.executable}" -c "{code}" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", shell], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, check=True)
    assert int((tmp_path / "n").read_text()) > 2


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


def test_a_closed_standard_stream_can_be_written_to(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    open_standard_streams()
    assert sys.stderr.write("x") == 1


@pytest.mark.parametrize(
    "own, kept",
    [
        ({}, (str(KERNELS), None)),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, ("7", None)),
        ({"DNNL_PRIMITIVE_CACHE_CAPACITY": "8"}, (None, "8")),
    ],
)
def test_kernels_are_limited_before_pytorch_is_imported_unless_the_user_says_how_many(own, kept, tmp_path):
    """18.6: oneDNN's cache grew to gigabytes."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")
    (tmp_path / "torch.py").write_text(
        f"import os\nprint([os.environ.get(name) for name in {names}])\nraise SystemExit"
    )
    script = Path(__file__).resolve().parent.parent / "flickr_image_caption_with_pytorch_resnet_lstm.py"
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(script.parent)])} | own
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.splitlines() == [str(list(kept))], run.stderr
