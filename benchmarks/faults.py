"""Break real processes in every way that docs/reliability.md promises to survive, and count what was lost.

    python benchmarks/faults.py              # 200 kills and the other faults
    python benchmarks/faults.py --quick      # 10 kills
    python benchmarks/faults.py --only user  # the faults with this word in their name

Commands of the main program on a small demo set are killed (`kills.py`), starved of disk space, run in two containers
at once, by a user without permissions, and with broken streams. Each must end with the weights, scores and files of an
undisturbed run, bit for bit, or with one line that says what is wrong. Exit code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from kills import (
    FLAGS,
    KILLED,
    LIMIT,
    ROOT,
    SCENES,
    TRAINER,
    Bench,
    Skipped,
    leftovers,
    require,
    resumable,
    tested,
    trained,
)

SCRIPT = ROOT / f"{TRAINER}.py"
NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
# With process ids of its own, from 1 on; and without Java, whose METEOR takes long.
IN_A_CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "env", "PATH=/nowhere")
# How a shell breaks the streams of a command, which is "$@".
STREAMS = {
    "standard output: | head -1": '"$@" | head -1',
    "standard output: >/dev/full": '"$@" >/dev/full',
    "both outputs on /dev/full": '"$@" >/dev/full 2>&1',
    "standard output closed": '"$@" >&-',
    "standard error closed": '"$@" 2>&-',
    "standard input closed": '"$@" <&-',
    "all three closed": '"$@" <&- >&- 2>&-',
}


PHOTO = "Images/scene_0001.jpg"


class Forbidden(NamedTuple):
    """What a user may not do, and the command that meets it; its message has to name the path."""

    path: str  # below the folder of data, run, runs and cache
    mode: int
    command: str
    cache: Literal["as it is", "empty", "full"] = "as it is"  # before
    refused: bool = True


USER = {
    "unreadable image": Forbidden(f"data/{PHOTO}", 0, "train", "empty"),
    "unreadable captions file": Forbidden("data/captions.txt", 0, "train"),
    "unreadable data folder": Forbidden("data", 0, "train"),
    "read-only run directory, --resume": Forbidden("run", 0o555, "resume"),
    "read-only run directory, --mode test": Forbidden("run", 0o555, "test"),
    "read-only run directory, --mode tune": Forbidden("run", 0o555, "tune"),
    "read-only complete cache": Forbidden("cache", 0o555, "train", "full", refused=False),
    "read-only incomplete cache": Forbidden("cache", 0o555, "train"),
    "unreadable cache": Forbidden("cache", 0, "train", "full"),
    "read-only --model_save_dir": Forbidden("runs", 0o555, "train"),
    "unreadable checkpoint, --mode test": Forbidden("run/best.pt", 0, "test"),
    "unreadable checkpoint, --resume": Forbidden("run/last.pt", 0, "resume"),
    "unreadable run_config.json, --resume": Forbidden("run/run_config.json", 0, "resume"),
    "unreadable run directory, --mode test": Forbidden("run", 0, "test"),
    "--output in a read-only folder, --mode export": Forbidden("runs", 0o555, "export"),
    "--output in a read-only folder, --mode caption": Forbidden("runs", 0o555, "caption"),
}


class Process:
    """A running command, and its output as it comes."""

    def __init__(self, argv: list[str], place: Path):
        self.popen = subprocess.Popen(argv, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        assert self.popen.stdout is not None
        self.thread = threading.Thread(target=self.lines.extend, args=(self.popen.stdout,))
        self.thread.start()

    def wait_for(self, text: str) -> None:
        """Wait until a line begins with `text`, or the process has ended."""
        while self.popen.poll() is None and not any(line.startswith(text) for line in list(self.lines)):
            time.sleep(0.005)

    def end(self, code: int, *texts: str) -> None:
        """Wait for the process; its exit code and its output have to be these."""
        try:
            found = self.popen.wait(LIMIT)
        finally:
            self.popen.kill()
            self.thread.join()
        output = "".join(self.lines)
        as_promised = found == code and all(text in output for text in texts) and "Traceback" not in output
        require(as_promised, f"exit code {found} where {code} and {texts} were due:\n{output[-2500:]}")

    def refuse(self, *texts: str) -> None:
        """Wait for the process, which has to end with code 2 and one line that says what is wrong."""
        self.end(2, "error: ", *texts)
        last = [line for line in self.lines if line.strip()][-1]
        require(last.startswith("error: "), f"its last line is {last!r}")


class Faults(Bench):
    """Ways to break a command, other than to kill it."""

    def run_command(self, *argv: object, prefix: tuple[str, ...] = ()) -> Process:
        return Process([*prefix, sys.executable, "-u", str(SCRIPT), *map(str, argv)], self.place)

    def train(self, folder: Path, prefix: tuple[str, ...] = (), *more: object) -> Process:
        return self.run_command(*FLAGS, *self.places(folder), *more, prefix=prefix)

    def recover(self, folder: Path) -> Process:
        """What a person does after a crash: resume the run."""
        return self.run_command("--resume", resumable(folder)[0], "--feature_cache", folder / "cache")

    def in_mid_training(self, name: str) -> tuple[Path, Process]:
        folder = self.folder(name)
        process = self.train(folder)
        process.wait_for("Epoch 1 completed")
        return folder, process

    def finish(self, folder: Path, process: Process | None = None) -> None:
        """Let a training (unless given, the recovered one) end, and compare its files with the undisturbed run's."""
        (process or self.recover(folder)).end(0)
        (run,) = resumable(folder)
        self.compare(run)

    def compare(self, run: Path) -> None:
        require(trained(run) == self.undisturbed("encode").result, "weights, histories or files differ")
        require(not leftovers(run), f"half-written files: {leftovers(run)}")

    # ----------------------------------------------------------------------------------------------
    # Signals, disks, and two at once

    def stop_politely(self, number: signal.Signals) -> None:
        """SIGTERM or SIGINT in mid-training: it saves, prints how to resume, and ends with the same result."""
        folder, process = self.in_mid_training(number.name)
        process.popen.send_signal(number)
        process.end(128 + number, "--resume")
        self.finish(folder)

    def full_disk(self) -> None:
        """A small file system fills up in mid-training: a message, a checkpoint that loads, the same result later."""
        folder = self.folder("full")
        with small_disk(folder / "runs", 60) as disk:
            process = self.train(folder)
            process.wait_for("Epoch 1 completed")
            with contextlib.suppress(OSError), open(disk / "junk", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            process.end(2, "error: cannot write")
            torch.load(resumable(folder)[0] / "last.pt", weights_only=True)
            (disk / "junk").unlink()
            self.finish(folder)

    def too_small_disk(self) -> None:
        """The free space is compared with what the run will write before anything is trained."""
        folder = self.folder("small")
        with small_disk(folder / "runs", 20):
            process = self.train(folder)
            process.end(2, "free")
        require(not any("Epoch 1" in line for line in process.lines), "it trained")

    def vanished_directory(self) -> None:
        """The run directory is moved away in mid-training and brought back."""
        folder, process = self.in_mid_training("vanished")
        (run,) = resumable(folder)
        run.rename(folder / "away")
        process.end(2, "error: cannot write")
        (folder / "away").rename(run)
        self.finish(folder)

    def no_permission(self) -> None:
        """The right to write is taken away in mid-training and given back."""
        folder, process = self.in_mid_training("permission")
        with read_only(resumable(folder)[0]):
            process.end(2, "error: cannot write")
        self.finish(folder)

    def damaged_cache(self, rng: random.Random) -> None:
        """One bit of the feature cache flips, in a row of a training image: refused, and repaired by the same command."""
        folder = self.folder("damaged")
        (data,) = (folder / "cache").rglob("grid.000.f16")
        raw = bytearray(data.read_bytes())
        raw[rng.randrange(len(raw) // 2)] ^= 1 << rng.randrange(8)
        data.write_bytes(raw)
        self.train(folder).end(2, "damaged")
        self.finish(folder)

    def two_at_once(self, prefix: tuple[str, ...] = ()) -> None:
        """Two trainings share an empty cache and a save directory."""
        folder = self.folder("two", cached=False)
        for process in [self.train(folder, prefix) for _ in range(2)]:
            process.end(0)
        runs = resumable(folder)
        require(len(runs) == 2, f"{len(runs)} run directories")
        (index,) = (folder / "cache").rglob("grid.jsonl")
        require(len(index.read_text().splitlines()) == SCENES, "some images were encoded twice")
        for run in runs:
            self.compare(run)

    def two_resumes(self) -> None:
        """The second process that resumes the same run is refused."""
        folder, process = self.in_mid_training("resumes")
        process.popen.send_signal(signal.SIGSTOP)  # or it might end first
        self.recover(folder).refuse("another process is training")
        process.popen.send_signal(signal.SIGCONT)
        self.finish(folder, process)

    # ----------------------------------------------------------------------------------------------
    # Two containers with one process id

    def containers(self, what: str) -> None:
        """Two processes with the id 1 train, test or export at once, on the same cache and directories."""
        if subprocess.run([*IN_A_CONTAINER, "/bin/true"], capture_output=True, check=False).returncode:
            raise Skipped("needs the right to make PID namespaces")
        if what == "train":
            self.two_at_once(IN_A_CONTAINER)
            return
        folder = self.prepare(what)
        (_, argv) = self.command(what, folder)
        processes = [self.run_command(*argv, prefix=IN_A_CONTAINER) for _ in range(2)]
        if what == "test":
            for process in processes:
                process.end(0)
            require(tested(folder / "run") == self.undisturbed("test").result, "scores or captions differ")
        else:  # one of the two wins, the other finds the folder there
            codes = sorted(process.popen.wait(LIMIT) for process in processes)
            for process, code in zip(processes, [process.popen.returncode for process in processes], strict=True):
                process.end(code, *["error: "] * (code == 2))
            require(codes in ([0, 0], [0, 2]), f"exit codes {codes}")
            require(self.result("export", folder) == self.undisturbed("export").result, "the exported files differ")
        require(not leftovers(folder), f"half-written files: {leftovers(folder)}")

    # ----------------------------------------------------------------------------------------------
    # An ordinary user

    def user(self, what: str) -> None:
        """Something is not permitted: one line and code 2, or, where nothing has to be written, the result."""
        folder = self.folder("user", cached=False)
        run, cache, data, runs = (folder / name for name in ("run", "cache", "data", "runs"))
        for source, copy in ((self.run, run), (self.reference / "cache", cache), (self.data, data)):
            shutil.copytree(source, copy)
        runs.mkdir()
        prefix: tuple[str, ...] = ()
        if not os.geteuid():
            if subprocess.run([*AS_NOBODY, "test", "-r", SCRIPT], capture_output=True, check=False).returncode:
                raise Skipped("needs setpriv, and a program that nobody may read")
            prefix = AS_NOBODY
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        model, places = ["--model_path", run], ["--data_dir", data, "--feature_cache", cache]
        start = partial(self.run_command, prefix=prefix)
        commands = {
            "train": partial(start, *FLAGS, *places, "--model_save_dir", runs),
            "resume": partial(start, "--resume", run, *places),
            "test": partial(start, "--mode", "test", *model, *places),
            "tune": partial(start, "--mode", "tune", *model, *places),
            "export": partial(start, "--mode", "export", *model, "--output", runs / "new"),
            "caption": partial(
                start, "--mode", "caption", *model, "--images", data / PHOTO, "--output", runs / "new.csv"
            ),
        }
        case = USER[what]
        path, command = folder / case.path, commands[case.command]
        named = str(path) if path.is_dir() else path.name
        if case.cache == "empty":
            shutil.rmtree(cache)
        elif case.cache == "full":  # in which this copy of the data set has a place of its own
            command().end(0)
            for each in runs.iterdir():
                shutil.rmtree(each)
        for each in (path, *path.rglob("*")):
            each.chmod(case.mode & ~0o111 if each.is_file() else case.mode)
        if case.refused:
            command().refuse(named)
        else:
            command().end(0)
            self.compare(resumable(folder)[0])
        for path in (folder, *folder.rglob("*")):  # as a user without root's rights removes them
            if path.is_dir():
                path.chmod(0o755)
        require(not leftovers(folder), f"half-written files: {leftovers(folder)}")

    # ----------------------------------------------------------------------------------------------
    # Streams

    def stream(self, shell: str) -> None:
        """A training whose messages go nowhere trains to its end."""
        folder = self.folder("stream")
        process = self.train(folder, ("bash", "-o", "pipefail", "-c", shell, "bash"))
        self.finish(folder, process)

    def nohup(self) -> None:
        """The terminal closes: SIGHUP is ignored under nohup."""
        folder = self.folder("nohup")
        process = self.train(folder, ("nohup",))
        for text in ("Vocabulary", "Epoch 1 completed"):
            process.wait_for(text)
            process.popen.send_signal(signal.SIGHUP)
        self.finish(folder, process)


@contextlib.contextmanager
def mounted(folder: Path, *commands: list[str]) -> Iterator[Path]:
    """Mount over a folder. Raises Skipped if this user may not."""
    for command in commands:
        if subprocess.run(["mount", *command, str(folder)], capture_output=True, check=False).returncode:
            raise Skipped("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def small_disk(folder: Path, megabytes: int) -> contextlib.AbstractContextManager[Path]:
    """A file system of its own."""
    folder.mkdir()
    return mounted(folder, ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs"])


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written into a folder: by its permissions, or for root, whom they do not stop, by a mount."""
    if os.geteuid():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
    else:
        with mounted(folder, ["--bind", str(folder)], ["-o", "remount,bind,ro"]):
            yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=200, help="how often to kill, over all modes in turn (default: 200)"
    )
    parser.add_argument("--quick", action="store_const", dest="kills", const=10, help="10 kills")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="faults whose name contains one of these"
    )
    parser.add_argument("--seed", type=int, default=0, help="other moments (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="faults tried at the same time (default: 2)")
    args = parser.parse_args()
    started = time.monotonic()
    counts: dict[str, list[int]] = {}  # tried, survived, lost, skipped

    def attempt(name: str, act: Callable[[], None]) -> None:
        row = counts.setdefault(name, [0, 0, 0, 0])
        try:
            act()
            row[1] += 1
        except Skipped as reason:
            print(f"skipped: {name}: {reason}", flush=True)
            row[3] += 1
            return
        except Exception as problem:  # whatever it is, it counts as lost, and the others go on
            row[2] += 1
            print(f"LOST: {name}: {problem}"[:4000], flush=True)
        row[0] += 1

    with tempfile.TemporaryDirectory(prefix="faults-") as folder, ThreadPoolExecutor(args.workers) as pool:
        Path(folder).chmod(0o755)  # nobody reads it, too
        bench = Faults(Path(folder))
        faults: list[tuple[str, Callable[[], None]]] = [
            (f"killed: {mode}", partial(bench.kill, mode, random.Random(f"{args.seed} {number}")))
            for number in range(args.kills)
            for mode in [KILLED[number % len(KILLED)]]
        ]
        faults += [
            ("signals: SIGTERM", partial(bench.stop_politely, signal.SIGTERM)),
            ("signals: SIGINT", partial(bench.stop_politely, signal.SIGINT)),
            ("disk: full in mid-training", bench.full_disk),
            ("disk: too small from the start", bench.too_small_disk),
            ("disk: run directory moved away", bench.vanished_directory),
            ("disk: write permission taken away", bench.no_permission),
            ("disk: a bit of the cache flipped", partial(bench.damaged_cache, random.Random(args.seed))),
            ("two at once: trainings", bench.two_at_once),
            ("two at once: resumes of one run", bench.two_resumes),
            *((f"two containers: {what}", partial(bench.containers, what)) for what in ("train", "test", "export")),
            *((f"user: {what}", partial(bench.user, what)) for what in USER),
            *((f"streams: {what}", partial(bench.stream, shell)) for what, shell in STREAMS.items()),
            ("streams: nohup and SIGHUP", bench.nohup),
        ]
        for name, fault in faults:
            if any(text in name for text in args.only):
                pool.submit(attempt, name, fault)
        try:
            pool.shutdown()
        except KeyboardInterrupt:
            print("Stopped: the faults that are being tried come to their end", flush=True)
            pool.shutdown(cancel_futures=True)
        counts.setdefault("the undisturbed runs, afterwards", [1, *([1, 0] if bench.intact() else [0, 1]), 0])
    print(f"\n{'fault':<58}{'tried':>7}{'survived':>10}{'lost':>6}{'skipped':>9}")
    for name, row in [*counts.items(), ("together", [sum(column) for column in zip(*counts.values(), strict=True)])]:
        print(f"{name:<58}{row[0]:>7}{row[1]:>10}{row[2]:>6}{row[3]:>9}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes, seed {args.seed}, {args.workers} at a time")
    return int(any(row[2] for row in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
