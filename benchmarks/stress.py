"""Disturb the program in the ways that the docs promise to survive, and count what was lost.

    python benchmarks/stress.py        # 200 kills, each fault once, 2,000 odd files for each reader, 100 sequences
    python benchmarks/stress.py --only kills --minutes 60
    python benchmarks/stress.py --only faults --match user  # the faults with this text in their name
    python benchmarks/stress.py --only fuzz --count 20000 --seed 7
    python benchmarks/stress.py --only sequences --count 500

kills: SIGKILL at a random moment of a command on a small demo set. The same command (or --resume) then runs to its end.
Weights, histories, scores and files must be those of an undisturbed run, bit for bit; nothing that existed before may
be lost, and no half-written file may stay.
faults: full disks, missing permissions, signals, broken streams, two processes at once. A command must end like an
undisturbed one, or with exit code 2 and one line that says what is wrong.
fuzz: the odd files of tests/fuzz_targets.py, more of them than the tests try.
sequences: the sequences of commands of tests/test_sequences.py, more and longer ones than the tests try.

The exit code is 1 if anything was lost or crashed. Linux; some faults need root and are skipped otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioning.data.demo_set import draw_demo_dataset

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "flickr_image_caption_with_pytorch_resnet_lstm.py"
OFTEN = ["--checkpoint_minutes", "0.001"]
FLAGS = [
    "--dataset_type", "demo", "--encoder", "efficientnet_lite0", "--decoder", "attention", "--epochs", "2",
    "--batch_size", "40", "--learning_rate", "0.002", "--embed_size", "64", "--hidden_size", "64", "--num_layers", "1",
    "--freq_threshold", "1", "--label_smoothing", "0.1", "--use_scheduler", "--scheduler_type", "one_cycle",
    "--warmup_epochs", "1", *OFTEN,
]  # fmt: skip
SELF_CRITICAL = ["--epochs", "0", "--scst_epochs", "2", *OFTEN]
TRAINING = ("train", "encode", "self-critical")
MODES = (*TRAINING, "test", "tune", "export")  # killed in turn
KINDS = ("kills", "faults", "fuzz", "sequences")
ROUND = 100  # odd files for a reader before the next one has its turn
LIMIT = 300  # seconds; what takes longer hangs
NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
# How a shell breaks the streams of a command, which is "$@".
STREAMS = {
    "standard output: | head -1": '"$@" | head -1',
    "both outputs on /dev/full": '"$@" >/dev/full 2>&1',
    "all three closed": '"$@" <&- >&- 2>&-',
}


class Forbidden(NamedTuple):
    """What a user may not do, and the command that meets it; its message has to name the path."""

    path: str  # below the folder of data, run, runs and cache
    mode: int
    command: str
    copies_data: bool = False  # so that the cache lacks its features
    refused: bool = True


USER = {
    "unreadable image": Forbidden("data/Images/scene_0001.jpg", 0, "train", copies_data=True),
    "unreadable data folder": Forbidden("data", 0, "train", copies_data=True),
    "read-only run directory, --resume": Forbidden("run", 0o555, "resume"),
    "read-only run directory, --mode test": Forbidden("run", 0o555, "test"),
    "read-only complete cache": Forbidden("cache", 0o555, "train", refused=False),
    "read-only incomplete cache": Forbidden("cache", 0o555, "train", copies_data=True),
    "unreadable cache": Forbidden("cache", 0, "train"),
    "read-only --model_save_dir": Forbidden("runs", 0o555, "train"),
    "unreadable checkpoint, --resume": Forbidden("run/last.pt", 0, "resume"),
    "--output in a read-only folder, --mode export": Forbidden("runs", 0o555, "export"),
}


class Skipped(Exception):
    """A fault that cannot be made here."""


# --------------------------------------------------------------------------------------------------
# Processes


class Process:
    """A command in a process of its own."""

    def __init__(self, argv: Sequence[object], place: Path, prefix: Sequence[object] = ()):
        """Start it. Args: prefix: the command that starts Python."""
        handle, name = tempfile.mkstemp(suffix=".log", dir=place)
        self.output, self.started = Path(name), time.monotonic()
        command = [*prefix, sys.executable, "-u", PROGRAM, *argv]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(place / "matplotlib")}
        if not prefix:
            environment["PATH"] = "/nowhere"  # METEOR's Java takes seconds of every test
        with open(handle, "ab") as file:
            self.popen = subprocess.Popen(list(map(str, command)), cwd=place, stdout=file, stderr=file, env=environment)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str) -> float:
        """Wait until a line begins with `text`, or the process has ended; return the seconds since its start."""
        while self.popen.poll() is None and not re.search(f"^{text}.", self.text(), re.MULTILINE):
            time.sleep(0.005)
        return time.monotonic() - self.started

    def end(self, code: int, *texts: str) -> None:
        """Wait for the end; exit code and output have to be these, without a traceback."""
        try:
            found = self.popen.wait(LIMIT)
        finally:
            self.popen.kill()  # where it hangs
        output = self.text()
        as_promised = found == code and all(text in output for text in texts) and "Traceback" not in output
        assert as_promised, f"exit code {found} where {code} and {texts} were due:\n{output[-2500:]}"

    def refuse(self, *texts: str) -> None:
        """Wait for the process, which has to end with code 2 and one line that says what is wrong."""
        self.end(2, "error: ", *texts)
        last = [line for line in self.text().splitlines() if line.strip()][-1]
        assert last.startswith("error: "), f"its last line is {last!r}"

    def kill(self) -> bool:
        """Kill it; return whether it had not ended by itself."""
        self.popen.kill()
        return self.popen.wait() == -signal.SIGKILL


# --------------------------------------------------------------------------------------------------
# Results


def tree(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_half_written(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith((".tmp", ".new", ".old"))


def trained(run: Path) -> dict[str, Any]:
    """The weights of a run's checkpoints and its histories."""
    found: dict[str, Any] = {"files": {path.name for path in run.iterdir() if not is_half_written(path)}}
    for path in sorted(run.glob("*.pt")):
        checkpoint = torch.load(path, weights_only=True)
        weights = {name: tensor.numpy().tobytes() for name, tensor in checkpoint["decoder"].items()}
        found[path.name] = (weights, *(checkpoint[name] for name in ("epoch", "loss_curve", "decoding")))
    return found | {name: (run / name).read_bytes() for name in ("loss_curve.json", "metrics_history.json")}


def tested(run: Path) -> list[Any]:
    """The rows of a test's scores, with the contents of the files that they name."""
    rows: list[Any] = json.loads((run / "test_metrics.json").read_text())
    for row in rows:
        for key in ("captions_file", "scores_file"):
            row[key] = json.loads((run / row[key]).read_text())
    return rows


def resumable(folder: Path) -> list[Path]:
    """The run directories below a folder from which training can go on."""
    return sorted(path.parent for path in (folder / "runs").glob("*/*/*/last.pt"))


def leftovers(folder: Path) -> list[Path]:
    """Half-written files and folders, but those of run directories in which nothing can be resumed."""
    abandoned = {path for path in (folder / "runs").glob("*/*/*") if not (path / "last.pt").exists()}
    return [path for path in folder.rglob(".*") if is_half_written(path) and not abandoned & set(path.parents)]


class Undisturbed(NamedTuple):
    """A mode that ran without a fault."""

    result: Any
    silent: float  # seconds until it printed something: its imports
    seconds: float
    changed: set[str]  # files of before that it writes anew


# --------------------------------------------------------------------------------------------------
# Kills


class Bench:
    """A directory with a data set, an undisturbed run of each mode, and ways to disturb another."""

    def __init__(self, place: Path):
        self.place, self.data = place, place / "data"
        draw_demo_dataset(self.data, 30)
        self.measured: dict[str, Undisturbed] = {}
        self.measuring = threading.Lock()
        self.run = self.reference = self.folder("reference", cached=False)
        self.measured["encode"] = self.measure("encode", self.reference)
        (self.run,) = resumable(self.reference)
        self.before = tree(self.reference)

    def folder(self, name: str, cached: bool = True) -> Path:
        """A directory for one fault, with a copy of the filled feature cache."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.place))
        if cached:
            shutil.copytree(self.reference / "cache", folder / "cache")
        return folder

    def prepare(self, mode: str) -> Path:
        """A directory with all that a mode starts from."""
        folder = self.folder(mode, cached=mode != "encode")
        if mode not in TRAINING:
            shutil.copytree(self.run, folder / "run")
        return folder

    def places(self, folder: Path) -> list[object]:
        return ["--data_dir", self.data, "--model_save_dir", folder / "runs", "--feature_cache", folder / "cache"]

    def start(self, mode: str, folder: Path) -> Process:
        """Start a mode, or what a person does after a crash: resume the run, if it can be."""
        if mode in TRAINING and resumable(folder):
            return Process(self.resume(folder), self.place)
        model = ["--model_path", folder / "run", "--feature_cache", folder / "cache"]
        argv: list[object] = {
            "self-critical": [*SELF_CRITICAL, "--model_path", self.run, *self.places(folder)],
            "test": ["--mode", "test", *model],
            "tune": ["--mode", "tune", *model],
            "export": ["--mode", "export", *model[:2], "--output", folder / "exported"],
        }.get(mode, [*FLAGS, *self.places(folder)])
        return Process(argv, self.place)

    def resume(self, folder: Path) -> list[object]:
        return ["--resume", resumable(folder)[0], "--feature_cache", folder / "cache"]

    def result(self, mode: str, folder: Path) -> Any:
        """What an undisturbed run and a killed one must have in common."""
        if mode in TRAINING:
            (run,) = resumable(folder)
            return trained(run)
        if mode == "test":
            return tested(folder / "run")
        if mode == "tune":
            return trained(folder / "run")
        return tree(folder / "exported")

    def undisturbed(self, mode: str) -> Undisturbed:
        """Return what the mode does when nothing disturbs it; it runs once."""
        with self.measuring:
            if mode not in self.measured:
                self.measured[mode] = self.measure(mode, self.prepare(mode))
            return self.measured[mode]

    def measure(self, mode: str, folder: Path) -> Undisturbed:
        before, process = tree(folder), self.start(mode, folder)
        silent = process.wait_for("")
        process.end(0)
        seconds, after = time.monotonic() - process.started, tree(folder)
        changed = {name for name, hashed in before.items() if after.get(name) != hashed}
        return Undisturbed(self.result(mode, folder), silent, seconds, changed)

    def kill(self, mode: str, rng: random.Random) -> None:
        """SIGKILL at a random moment of a mode, a fifth of the time twice; then the same command to its end."""
        reference, folder = self.undisturbed(mode), self.prepare(mode)
        before, wanted = tree(folder), reference.result
        for _ in range(1 + (rng.random() < 0.2)):
            self.kill_once(mode, folder, rng.uniform(0.9 * reference.silent, 0.95 * reference.seconds))
            for path in leftovers(folder):
                os.utime(path, (0, 0))  # as if it had been there for long
        self.start(mode, folder).end(0)
        result = self.result(mode, folder)
        keys = sorted({*wanted, *result}) if isinstance(wanted, dict) else []
        different = [key for key in keys if result.get(key) != wanted.get(key)]
        assert result == wanted, f"the result differs from that of the undisturbed run: {different}"
        after = tree(folder)
        damaged = [name for name, hashed in before.items() if after.get(name) != hashed]
        assert set(damaged) <= reference.changed, f"lost or changed: {damaged}"
        assert not leftovers(folder), f"half-written, and still there: {leftovers(folder)}"
        shutil.rmtree(folder)

    def kill_once(self, mode: str, folder: Path, moment: float) -> None:
        for _ in range(5):  # a process that is done before its kill does not count
            process = self.start(mode, folder)
            time.sleep(moment)
            if process.kill() and not (folder / "exported").exists():
                return
            moment *= 0.7
            shutil.rmtree(folder)
            shutil.copytree(self.prepare(mode), folder)
        raise Skipped("it was always done before the kill")

    # ----------------------------------------------------------------------------------------------
    # Faults

    def train(self, folder: Path, prefix: Sequence[object] = ()) -> Process:
        return Process([*FLAGS, *self.places(folder)], self.place, prefix=prefix)

    def finish(self, folder: Path, *trainings: Process) -> None:
        """Let trainings (unless given, the resumed one) end, and compare their files with the undisturbed run's."""
        for process in trainings or [Process(self.resume(folder), self.place)]:
            process.end(0)
        for run in resumable(folder):
            assert trained(run) == self.undisturbed("encode").result, "weights, histories or files differ"
            assert not leftovers(run), f"half-written files: {leftovers(run)}"

    def stop_politely(self, number: signal.Signals) -> None:
        """SIGTERM or SIGINT in mid-training: it saves, prints how to resume, and ends with the same result."""
        folder = self.folder(number.name)
        process = self.train(folder)
        process.wait_for("Epoch 1 completed")
        process.popen.send_signal(number)
        process.end(128 + number, "--resume")
        self.finish(folder)

    def full_disk(self) -> None:
        """A small file system fills up in mid-training: a message, a checkpoint that loads, the same result later."""
        folder = self.folder("full")
        disk = folder / "runs"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            raise Skipped("needs the right to mount")
        try:
            process = self.train(folder)
            process.wait_for("Epoch 1 completed")
            with contextlib.suppress(OSError), open(disk / "junk", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            process.refuse("cannot write")
            torch.load(resumable(folder)[0] / "last.pt", weights_only=True)
            (disk / "junk").unlink()
            self.finish(folder)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)

    def two_at_once(self) -> None:
        """Two trainings share an empty cache and a save directory."""
        folder = self.folder("two", cached=False)
        self.finish(folder, *[self.train(folder) for _ in range(2)])
        assert len(resumable(folder)) == 2, f"{len(resumable(folder))} run directories"

    def user(self, what: str) -> None:
        """Something is not permitted: one line and code 2, or, where nothing has to be written, the result."""
        folder, case = self.folder("user"), USER[what]
        run, runs, data = folder / "run", folder / "runs", folder / "data" if case.copies_data else self.data
        shutil.copytree(self.run, run)
        runs.mkdir()
        if case.copies_data:
            shutil.copytree(self.data, data)
        prefix: tuple[str, ...] = ()
        if not os.geteuid():
            command = [*AS_NOBODY, sys.executable, PROGRAM, "--help"]
            if shutil.which("setpriv") is None or subprocess.run(command, capture_output=True, check=False).returncode:
                raise Skipped("needs setpriv, and a Python and a program that nobody may read")
            prefix = AS_NOBODY
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        places = ["--data_dir", data, "--feature_cache", folder / "cache"]
        argv = {
            "train": [*FLAGS, *places, "--model_save_dir", runs],
            "resume": ["--resume", run, *places],
            "test": ["--mode", "test", "--model_path", run, *places],
            "export": ["--mode", "export", "--model_path", run, "--output", runs / "new"],
        }[case.command]
        path = folder / case.path
        named = str(path) if path.is_dir() else path.name
        for each in (path, *path.rglob("*")):
            each.chmod(case.mode & ~0o111 if each.is_file() else case.mode)
        process = Process(argv, self.place, prefix=prefix)
        if case.refused:
            process.refuse(named)
        else:
            self.finish(folder, process)
        for each in (folder, *folder.rglob("*")):  # as a user without root's rights removes them
            if each.is_dir():
                each.chmod(0o755)
        assert not leftovers(folder), f"half-written files: {leftovers(folder)}"

    def stream(self, shell: str) -> None:
        """A training whose messages go nowhere trains to its end."""
        folder = self.folder("stream")
        self.finish(folder, self.train(folder, ("bash", "-o", "pipefail", "-c", shell, "bash")))

    def nohup(self) -> None:
        """The terminal closes: SIGHUP is ignored under nohup."""
        folder = self.folder("nohup")
        process = self.train(folder, ("nohup",))
        for text in ("Vocabulary", "Epoch 1 completed"):
            process.wait_for(text)
            process.popen.send_signal(signal.SIGHUP)
        self.finish(folder, process)

    def faults(self) -> dict[str, Callable[[], None]]:
        return {
            "signals: SIGTERM": partial(self.stop_politely, signal.SIGTERM),
            "signals: SIGINT": partial(self.stop_politely, signal.SIGINT),
            "disk: full in mid-training": self.full_disk,
            "two trainings at once": self.two_at_once,
            **{f"user: {what}": partial(self.user, what) for what in USER},
            **{f"streams: {what}": partial(self.stream, shell) for what, shell in STREAMS.items()},
            "streams: nohup and SIGHUP": self.nohup,
        }


# --------------------------------------------------------------------------------------------------
# The program


class Counts:
    """What became of everything that was tried, by its name."""

    def __init__(self, minutes: float):
        self.until = time.monotonic() + 60 * minutes
        self.rows: dict[str, Counter[str]] = defaultdict(Counter)

    def over(self) -> bool:
        return time.monotonic() > self.until

    def attempt(self, name: str, act: Callable[[], object]) -> None:
        """Try something, unless the time is over."""
        if self.over():
            return
        try:
            self.rows[name]["accepted"] += act() is True
            self.rows[name]["survived"] += 1
        except Skipped as reason:
            self.rows[name]["skipped"] += 1
            print(f"skipped: {name}: {reason}", flush=True)
        except Exception:  # whatever it is, it counts as lost, and the others go on
            self.rows[name]["lost"] += 1
            if self.rows[name]["lost"] <= 3:
                print(f"LOST: {name}: {traceback.format_exc()[-4000:]}", flush=True)

    def print(self) -> int:
        """Print all counts; return the exit code."""
        columns = ("survived", "accepted", "lost", "skipped")  # accepted: odd files that were read
        print(f"\n{'':<58}{'tried':>9}" + "".join(f"{name:>10}" for name in columns))
        together = sum(self.rows.values(), Counter[str]())
        for name, row in [*self.rows.items(), ("together", together)]:
            numbers = "".join(f"{row[column]:>10}" for column in columns)
            print(f"{name:<58}{row['survived'] + row['lost']:>9}{numbers}")
        return int(together["lost"] > 0)


def disturb(args: argparse.Namespace, counts: Counts) -> None:
    """Try kills and faults, some at the same time."""
    with tempfile.TemporaryDirectory(prefix="stress-") as folder, ThreadPoolExecutor(2) as pool:
        Path(folder).chmod(0o755)  # nobody reads it, too
        bench = Bench(Path(folder))
        tries = list(bench.faults().items()) if "faults" in args.only else []
        if "kills" in args.only:
            modes = [mode for mode in MODES if args.match in f"killed: {mode}"]
            for number, mode in zip(range(args.count or 200), itertools.cycle(modes), strict=False):
                tries.append((f"killed: {mode}", partial(bench.kill, mode, random.Random(f"{args.seed} {number}"))))
        for name, act in tries:
            if args.match in name:
                pool.submit(counts.attempt, name, act)
        pool.shutdown()
        kept = tree(bench.reference) == bench.before
        counts.rows["the undisturbed run, afterwards"]["survived" if kept else "lost"] += 1


def fuzz(args: argparse.Namespace, counts: Counts) -> None:
    """Feed odd files to every reader: each is accepted, or refused in one line."""
    sys.path.append(str(ROOT / "tests"))
    from fuzz_inputs import tried
    from fuzz_targets import TARGETS
    from hypothesis import HealthCheck, Phase, given, seed, settings

    def feed(name: str, examples: int, first: str) -> None:
        @seed(first)
        @settings(
            max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(TARGETS[name].inputs)
        def one(value: Any) -> None:
            counts.attempt(f"fuzz: {name}", lambda: tried(TARGETS[name], value))

        one()

    warnings.simplefilter("ignore")  # Pillow and PyTorch warn of files that are odd, which these are
    inputs = args.count or 2000
    for first in range(0, inputs, ROUND):
        for name in TARGETS:
            if args.match in f"fuzz: {name}" and not counts.over():
                feed(name, min(ROUND, inputs - first), f"{args.seed} {first}")


def sequences(args: argparse.Namespace, counts: Counts) -> None:
    """Draw sequences of training, interruption, resuming, adaptation and tests: what runs is what was asked."""
    sys.path.append(str(ROOT / "tests"))
    from test_sequences import draw_sets, try_sequences

    def attempt(first: str) -> None:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            try_sequences(Path(folder), 1, 25, first)

    logging.disable()
    with tempfile.TemporaryDirectory(prefix="stress-") as folder, open(os.devnull, "w", encoding="utf-8") as nowhere:
        draw_sets(Path(folder))
        for number in range(args.count or 100):
            counts.attempt("sequences", partial(attempt, f"{args.seed} {number}"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, with commas (default: %(default)s)")
    parser.add_argument("--match", default="", metavar="TEXT", help="what has this text in its name")
    parser.add_argument(
        "--count", type=int, help="of kills (default: 200), odd files for each reader (2000), sequences (100)"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing new after these")
    parser.add_argument("--seed", type=int, default=0, help="other moments and files (default: 0)")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(KINDS):
        parser.error(f"--only {unknown.pop()}: the kinds are {', '.join(KINDS)}")
    if math.isfinite(args.minutes) and args.count is None:
        args.count = 100_000
    counts, started = Counts(args.minutes), time.monotonic()
    if {"kills", "faults"} & set(args.only):
        disturb(args, counts)
    if "fuzz" in args.only:
        fuzz(args, counts)
    if "sequences" in args.only:
        sequences(args, counts)
    code = counts.print()
    print(f"{(time.monotonic() - started) / 60:.1f} minutes, seed {args.seed}")
    return code


if __name__ == "__main__":
    sys.exit(main())
