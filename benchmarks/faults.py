"""Break real trainings in every way that docs/reliability.md promises to survive, and count what was lost.

    python benchmarks/faults.py            # 100 kills and the other faults, under half an hour on two cores
    python benchmarks/faults.py --quick    # 8 kills, a few minutes

Trainings are processes of the main program on a small demo set. Each is killed with SIGKILL at a random moment of a
phase, resumed (or started again, where nothing was saved yet), sometimes killed once more, and must end with the
weights, histories and scores of an undisturbed training, bit for bit. Exit code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioning.demo_set import draw_demo_dataset

ROOT = Path(__file__).resolve().parent.parent
TRAINER, DRAWER = ROOT / "flickr_image_caption_with_pytorch_resnet_lstm.py", ROOT / "download_datasets.py"
SCENES, EPOCHS = 100, 4
FLAGS = [
    "--dataset_type", "demo", "--encoder", "efficientnet_lite0", "--decoder", "attention", "--epochs", str(EPOCHS),
    "--batch_size", "40", "--learning_rate", "0.002", "--embed_size", "64", "--hidden_size", "64", "--num_layers", "1",
    "--freq_threshold", "1", "--label_smoothing", "0.1", "--use_scheduler", "--scheduler_type", "one_cycle",
    "--warmup_epochs", "1", "--checkpoint_minutes", "0.001", "--save_attention_viz", "--attention_viz_samples", "1",
]  # fmt: skip
# The line of output with which a phase begins; "" for the start of the process.
BEGINNINGS = {"encoding": "Split by image", "training": "Vocabulary:", "testing": "Model:", "drawing": ""}
KILLED_WHILE = ("training", "encoding", "training", "testing", "training", "drawing", "training", "encoding")  # in turn


class Lost(Exception):
    """The result differs from that of the undisturbed run."""


class Skipped(Exception):
    """A fault that cannot be made here."""


def require(kept: bool, problem: str) -> None:
    if not kept:
        raise Lost(problem)


class Process:
    """A running command, and its output as it comes."""

    def __init__(self, script: Path, argv: list[str], place: Path):
        self.popen = subprocess.Popen(
            [sys.executable, "-u", str(script), *argv], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": "/nowhere", "MPLCONFIGDIR": str(place / "matplotlib")},
        )  # fmt: skip
        self.lines: list[str] = []
        assert self.popen.stdout is not None
        self.thread = threading.Thread(target=self.lines.extend, args=(self.popen.stdout,))
        self.thread.start()

    def wait_for(self, text: str) -> None:
        """Wait until a line begins with `text`, or the process has ended."""
        while text and self.popen.poll() is None and not any(line.startswith(text) for line in list(self.lines)):
            time.sleep(0.005)

    def end(self, code: int, *texts: str) -> None:
        """Wait for the process; its exit code and its output have to be these."""
        found = self.popen.wait()
        self.thread.join()
        output = "".join(self.lines)
        as_promised = found == code and all(text in output for text in texts) and "Traceback" not in output
        require(as_promised, f"exit code {found} where {code} and {texts} were due:\n{output}")

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()
        self.thread.join()


class Bench:
    """A directory with a data set, an undisturbed run to compare with, and the ways to break another."""

    def __init__(self, place: Path):
        self.place, self.data, self.reference = place, place / "data", place / "reference"
        draw_demo_dataset(self.data, SCENES)
        self.seconds = {"drawing": 4.0}  # that each phase takes
        process, times = self.train(self.reference), []
        for phase in ("encoding", "training"):
            process.wait_for(BEGINNINGS[phase])
            times.append(time.monotonic())
        process.end(0)
        self.seconds |= {"encoding": times[1] - times[0], "training": time.monotonic() - times[1]}
        (self.run,) = self.runs(self.reference)
        self.files = {path.name for path in self.run.iterdir()}
        process = self.test(self.run, self.reference)
        process.wait_for(BEGINNINGS["testing"])
        start = time.monotonic()
        process.end(0)
        self.seconds["testing"] = time.monotonic() - start
        print(f"Seconds of an undisturbed run: {self.seconds}", flush=True)

    def start(self, *argv: object, script: Path = TRAINER) -> Process:
        return Process(script, [str(word) for word in argv], self.place)

    def train(self, folder: Path, *more: object) -> Process:
        where = ["--data_dir", self.data, "--model_save_dir", folder / "runs", "--feature_cache", folder / "cache"]
        return self.start(*FLAGS, *where, *more)

    def test(self, run: Path, folder: Path) -> Process:
        return self.start("--mode", "test", "--model_path", run, "--feature_cache", folder / "cache")

    def runs(self, folder: Path) -> list[Path]:
        """The run directories below a folder from which training can go on."""
        return [path.parent for path in (folder / "runs").glob("*/*/*/last.pt")]

    def recover(self, folder: Path) -> Process:
        """What a person does after a crash: resume the run, or start it again where nothing was saved."""
        runs = self.runs(folder)
        return self.start("--resume", runs[0], "--feature_cache", folder / "cache") if runs else self.train(folder)

    def folder(self, name: str, cached: bool = True) -> Path:
        """A directory for one fault, with a copy of the filled feature cache."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.place))
        if cached:
            shutil.copytree(self.reference / "cache", folder / "cache")
        return folder

    def in_mid_training(self, name: str) -> tuple[Path, Process]:
        folder = self.folder(name)
        process = self.train(folder)
        process.wait_for("Epoch 1 completed")
        return folder, process

    def finish(self, folder: Path, process: Process | None = None) -> None:
        """Let a training (unless given, the recovered one) end, and compare its files with the undisturbed run's."""
        (process or self.recover(folder)).end(0)
        (run,) = self.runs(folder)
        self.compare(run)

    def compare(self, run: Path) -> None:
        for file in (f"model_epoch_{EPOCHS}.pt", "last.pt", "best.pt"):
            a, b = (torch.load(path / file, weights_only=True) for path in (run, self.run))
            same = all(torch.equal(a["decoder"][name], b["decoder"][name]) for name in b["decoder"])
            require(same and a["loss_curve"] == b["loss_curve"], f"{file} differs from that of the undisturbed run")
        for file in ("loss_curve.json", "metrics_history.json"):
            require((run / file).read_bytes() == (self.run / file).read_bytes(), f"{file} differs")
        require(self.files <= {path.name for path in run.iterdir()}, f"files are missing in {run}")

    # ----------------------------------------------------------------------------------------------
    # Faults

    def kill(self, phase: str, rng: random.Random) -> None:
        """SIGKILL at a random moment of a phase, once or twice in training."""
        folder = self.folder(phase, cached=phase != "encoding")

        def killed(process: Process) -> None:
            process.wait_for(BEGINNINGS[phase])
            time.sleep(rng.uniform(0, self.seconds[phase]))
            process.kill()

        if phase == "drawing":
            draw = partial(self.start, "--dataset", "demo", "--data_dir", folder, script=DRAWER)
            killed(draw())
            draw().end(0)
            draw("--verify-only").end(0)
        elif phase == "testing":
            run = folder / "runs" / self.run.name
            run.mkdir(parents=True)
            for file in self.files:
                shutil.copy(self.run / file, run / file)
            killed(self.test(run, folder))
            self.test(run, folder).end(0)
            require(tested(run) == tested(self.run), "scores or captions differ from those of the undisturbed test")
        else:
            killed(self.train(folder))
            if rng.random() < 1 / 3:
                killed(self.recover(folder))
            self.finish(folder)

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
            torch.load(self.runs(folder)[0] / "last.pt", weights_only=True)
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
        (run,) = self.runs(folder)
        run.rename(folder / "away")
        process.end(2, "error: cannot write")
        (folder / "away").rename(run)
        self.finish(folder)

    def no_permission(self) -> None:
        """The right to write is taken away in mid-training and given back."""
        folder, process = self.in_mid_training("permission")
        with read_only(self.runs(folder)[0]):
            process.end(2, "error: cannot write")
        self.finish(folder)

    def damaged_cache(self, rng: random.Random) -> None:
        """One bit of the feature cache flips: refused, and repaired by the same command."""
        folder = self.folder("damaged")
        (data,) = (folder / "cache").rglob("grid.000.f16")
        raw = bytearray(data.read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        data.write_bytes(raw)
        self.train(folder).end(2, "damaged")
        self.finish(folder)

    def two_at_once(self) -> None:
        """Two trainings share an empty cache and a save directory."""
        folder = self.folder("two", cached=False)
        for process in [self.train(folder) for _ in range(2)]:
            process.end(0)
        runs = self.runs(folder)
        require(len(runs) == 2, f"{len(runs)} run directories")
        (index,) = (folder / "cache").rglob("grid.jsonl")
        require(len(index.read_text().splitlines()) == SCENES, "some images were encoded twice")
        for run in runs:
            self.compare(run)

    def two_resumes(self) -> None:
        """The second process that resumes the same run is refused."""
        folder, process = self.in_mid_training("resumes")
        self.recover(folder).end(2, "another process is training")
        self.finish(folder, process)


def tested(run: Path) -> list[Any]:
    """The rows of a test's scores with the captions that they are of, in place of the files' names."""
    rows = json.loads((run / "test_metrics.json").read_text())
    for row in rows:
        del row["scores_file"]
        row["captions_file"] = json.loads((run / row["captions_file"]).read_text())
    return list(rows)


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
    parser.add_argument("--quick", action="store_true", help="8 kills")
    parser.add_argument("--kills", type=int, help="how often to kill (default: 100, or 8 with --quick)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="faults tried at the same time")
    args = parser.parse_args()
    started = time.monotonic()
    counts: dict[str, list[int]] = {}  # tried, survived, lost

    def attempt(name: str, act: Callable[[], None]) -> None:
        row = counts.setdefault(name, [0, 0, 0])
        try:
            act()
            row[1] += 1
        except Skipped as reason:
            print(f"skipped: {name}: {reason}", flush=True)
            return
        except Exception as problem:  # whatever it is, it counts as lost, and the others go on
            row[2] += 1
            print(f"LOST: {name}: {problem!r}"[:3000], flush=True)
        row[0] += 1

    with tempfile.TemporaryDirectory(prefix="faults-") as folder, ThreadPoolExecutor(args.workers) as pool:
        bench = Bench(Path(folder))
        for number in range(args.kills if args.kills is not None else 8 if args.quick else 100):
            phase, rng = KILLED_WHILE[number % len(KILLED_WHILE)], random.Random(f"{args.seed} {number}")
            pool.submit(attempt, f"killed while {phase}", partial(bench.kill, phase, rng))
        for name, fault in {
            "SIGTERM": partial(bench.stop_politely, signal.SIGTERM),
            "SIGINT": partial(bench.stop_politely, signal.SIGINT),
            "disk full in mid-training": bench.full_disk,
            "disk too small from the start": bench.too_small_disk,
            "run directory vanished": bench.vanished_directory,
            "write permission taken away": bench.no_permission,
            "a bit of the cache flipped": partial(bench.damaged_cache, random.Random(args.seed)),
            "two trainings at once": bench.two_at_once,
            "two resumes at once": bench.two_resumes,
        }.items():
            pool.submit(attempt, name, fault)
        pool.shutdown()
    print(f"\n{'fault':<32}{'tried':>7}{'survived':>10}{'lost':>6}")
    for name, row in [*counts.items(), ("together", [sum(column) for column in zip(*counts.values(), strict=True)])]:
        print(f"{name:<32}{row[0]:>7}{row[1]:>10}{row[2]:>6}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes, seed {args.seed}, {args.workers} at a time")
    return int(any(row[2] for row in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
