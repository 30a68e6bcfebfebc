"""Break real trainings in every way that docs/reliability.md promises to survive, and count what was lost.

    python benchmarks/faults.py            # 100 kills and the other faults, under half an hour on two cores
    python benchmarks/faults.py --quick    # 8 kills, a few minutes

Trainings are processes of the main program on a small demo set. Each is killed with SIGKILL at a random moment of a
phase, resumed (or started again, where nothing was saved yet), sometimes killed once more, and must end with the
weights, histories and scores of a training that nothing happened to, bit for bit. Exit code 1 if anything was lost.
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
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioning.demo_set import draw_demo_dataset

ROOT = Path(__file__).resolve().parent.parent
TRAINER = str(ROOT / "flickr_image_caption_with_pytorch_resnet_lstm.py")
SCENES, EPOCHS = 100, 4
FLAGS = [
    "--dataset_type", "demo", "--encoder", "efficientnet_lite0", "--decoder", "attention", "--epochs", str(EPOCHS),
    "--batch_size", "40", "--learning_rate", "0.002", "--embed_size", "64", "--hidden_size", "64", "--num_layers", "1",
    "--freq_threshold", "1", "--label_smoothing", "0.1", "--use_scheduler", "--scheduler_type", "one_cycle",
    "--warmup_epochs", "1", "--checkpoint_minutes", "0.001", "--save_attention_viz", "--attention_viz_samples", "1",
]  # fmt: skip
# The line of output with which a phase begins.
PHASES = {"encoding": "Split by image", "training": "Vocabulary:", "testing": "Model:", "drawing": None}


@dataclass
class Process:
    """A running command, its output as it comes, and when a line of it was seen."""

    popen: subprocess.Popen[str]
    lines: list[str]
    thread: threading.Thread

    def wait_for(self, text: str | None) -> bool:
        """Wait until a line begins with `text`; False if the process ended without."""
        while text is not None and not any(line.startswith(text) for line in list(self.lines)):
            if self.popen.poll() is not None:
                self.thread.join()
                return any(line.startswith(text) for line in self.lines)
            time.sleep(0.005)
        return True

    def finish(self) -> int:
        code = self.popen.wait()
        self.thread.join()
        return code

    def output(self) -> str:
        return "".join(self.lines)


class Bench:
    """One place on disk with a data set, an undisturbed run to compare with, and the ways to break another."""

    def __init__(self, place: Path):
        self.place = place
        self.data = place / "data"
        draw_demo_dataset(self.data, SCENES)
        self.reference = place / "reference"
        self.phase_seconds = {}
        started = time.monotonic()
        process = self.train(self.reference)
        for phase in ("encoding", "training"):
            process.wait_for(PHASES[phase])
            self.phase_seconds[phase] = time.monotonic()
        require(process.finish() == 0, f"the undisturbed training failed:\n{process.output()}")
        end = time.monotonic()
        self.phase_seconds = {
            "encoding": self.phase_seconds["training"] - self.phase_seconds["encoding"],
            "training": end - self.phase_seconds["training"],
            "drawing": 4.0,
        }
        process = self.start(
            ["--mode", "test", "--model_path", str(self.run_of(self.reference)), *self.cache(self.reference)]
        )
        process.wait_for(PHASES["testing"])
        testing = time.monotonic()
        require(process.finish() == 0, f"the undisturbed test failed:\n{process.output()}")
        self.phase_seconds["testing"] = time.monotonic() - testing
        print(f"An undisturbed training takes {end - started:.1f} s; phases: {self.phase_seconds}", flush=True)

    def start(self, argv: list[str], script: str = TRAINER) -> Process:
        popen = subprocess.Popen(
            [sys.executable, "-u", script, *argv], cwd=self.place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": "/nowhere", "MPLCONFIGDIR": str(self.place / "matplotlib")},
        )  # fmt: skip
        lines: list[str] = []
        assert popen.stdout is not None
        thread = threading.Thread(target=lines.extend, args=(popen.stdout,))
        thread.start()
        return Process(popen, lines, thread)

    def cache(self, folder: Path) -> list[str]:
        return ["--feature_cache", str(folder / "cache")]

    def train(self, folder: Path, *more: str) -> Process:
        where = ["--data_dir", str(self.data), "--model_save_dir", str(folder / "runs"), *self.cache(folder)]
        return self.start([*FLAGS, *where, *more])

    def run_of(self, folder: Path) -> Path:
        """The one run directory below a folder from which training can go on."""
        (run,) = self.runs(folder)
        return run

    def runs(self, folder: Path) -> list[Path]:
        return [path.parent for path in (folder / "runs").glob("*/*/*/last.pt")]

    def recover(self, folder: Path) -> Process:
        """What a person does after a crash: resume the run, or start it again where nothing was saved."""
        runs = self.runs(folder)
        return self.start(["--resume", str(runs[0]), *self.cache(folder)]) if runs else self.train(folder)

    def folder(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.place))

    def copy_cache(self, folder: Path) -> None:
        shutil.copytree(self.reference / "cache", folder / "cache")

    def compare(self, folder: Path) -> None:
        """Raise `Lost` where a run's files are not those of the undisturbed one."""
        run, reference = self.run_of(folder), self.run_of(self.reference)
        for file in (f"model_epoch_{EPOCHS}.pt", "last.pt", "best.pt"):
            a, b = (torch.load(path / file, weights_only=True) for path in (run, reference))
            same = all(torch.equal(a["decoder"][name], b["decoder"][name]) for name in b["decoder"])
            require(same and a["loss_curve"] == b["loss_curve"], f"{file} differs from that of the undisturbed run")
        for file in ("loss_curve.json", "metrics_history.json"):
            require((run / file).read_bytes() == (reference / file).read_bytes(), f"{file} differs")
        expected = {path.name for path in reference.iterdir() if not path.name.startswith("test_")} - {
            "sample_captions.png"
        }
        present = {path.name for path in run.iterdir()}
        require(expected <= present, f"missing: {expected - present}")

    # ----------------------------------------------------------------------------------------------
    # Faults

    def kill(self, phase: str, rng: random.Random) -> None:
        """SIGKILL at a random moment of a phase, once or twice."""
        folder = self.folder(phase)
        if phase == "drawing":
            return self.kill_drawing(folder, rng)
        if phase == "testing":
            return self.kill_testing(folder, rng)
        if phase != "encoding":
            self.copy_cache(folder)
        process = self.train(folder)
        for again in range(rng.choice((1, 1, 2))):
            if again:
                process = self.recover(folder)
            process.wait_for(PHASES[phase])
            time.sleep(rng.uniform(0, self.phase_seconds[phase]))
            process.popen.send_signal(signal.SIGKILL)
            process.finish()
        process = self.recover(folder)
        require(process.finish() == 0, f"could not go on:\n{process.output()}")
        self.compare(folder)

    def kill_testing(self, folder: Path, rng: random.Random) -> None:
        self.copy_cache(folder)
        reference = self.run_of(self.reference)
        run = folder / "runs" / reference.name
        shutil.copytree(reference, run, ignore=shutil.ignore_patterns("test_*", "sample_captions.png"))
        argv = ["--mode", "test", "--model_path", str(run), *self.cache(folder)]
        process = self.start(argv)
        process.wait_for(PHASES["testing"])
        time.sleep(rng.uniform(0, self.phase_seconds["testing"]))
        process.popen.send_signal(signal.SIGKILL)
        process.finish()
        process = self.start(argv)
        require(process.finish() == 0, f"could not test again:\n{process.output()}")
        for file in ("test_metrics.json", "test_captions.json"):
            ours, theirs = (json.loads((path / file).read_text()) for path in (run, reference))
            for entry in (*ours, *theirs):
                entry.pop("captions_file", None)
            require(ours == theirs, f"{file} differs from that of the undisturbed test")

    def kill_drawing(self, folder: Path, rng: random.Random) -> None:
        argv = ["--dataset", "demo", "--data_dir", str(folder)]
        script = str(ROOT / "download_datasets.py")
        process = self.start(argv, script)
        time.sleep(rng.uniform(0, self.phase_seconds["drawing"]))
        process.popen.send_signal(signal.SIGKILL)
        process.finish()
        process = self.start(argv, script)
        require(process.finish() == 0, f"could not draw again:\n{process.output()}")
        process = self.start([*argv, "--verify-only"], script)
        require(process.finish() == 0, f"the set is not whole:\n{process.output()}")

    def stop_politely(self, number: signal.Signals) -> None:
        """SIGTERM or SIGINT in mid-training: it saves, prints how to resume, and ends the same."""
        folder = self.folder(number.name)
        self.copy_cache(folder)
        process = self.train(folder)
        require(process.wait_for("Run directory"), "no training")
        process.wait_for("Epoch 1 completed")
        process.popen.send_signal(number)
        code = process.finish()
        require(code == 128 + number and "--resume" in process.output(), f"code {code}:\n{process.output()}")
        process = self.recover(folder)
        require(process.finish() == 0, process.output())
        self.compare(folder)

    def full_disk(self) -> None:
        """A small file system fills up in mid-training: a message, a checkpoint that loads, and the same result later."""
        folder = self.folder("full")
        with small_disk(folder / "disk") as disk:
            self.copy_cache(folder)
            where = ["--data_dir", str(self.data), "--model_save_dir", str(disk / "runs"), *self.cache(folder)]
            process = self.start([*FLAGS, *where])
            require(process.wait_for("Epoch 1 completed"), process.output())
            junk = disk / "junk"
            with contextlib.suppress(OSError), open(junk, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            code = process.finish()
            require(code == 2 and "error: cannot write" in process.output(), f"code {code}:\n{process.output()}")
            require("Traceback" not in process.output(), process.output())
            (run,) = (path.parent for path in (disk / "runs").glob("*/*/*/last.pt"))
            torch.load(run / "last.pt", weights_only=True)
            junk.unlink()
            process = self.start(["--resume", str(run), *self.cache(folder)])
            require(process.finish() == 0, process.output())
            shutil.copytree(disk / "runs", folder / "runs")
        self.compare(folder)

    def no_space_to_begin_with(self) -> None:
        """The free space is compared with what the run will write before anything is trained."""
        folder = self.folder("small")
        with small_disk(folder / "disk", 20) as disk:
            self.copy_cache(folder)
            where = ["--data_dir", str(self.data), "--model_save_dir", str(disk / "runs"), *self.cache(folder)]
            process = self.start([*FLAGS, *where])
            code = process.finish()
        require(code == 2 and "free" in process.output() and "Epoch 1" not in process.output(), process.output())

    def vanished_directory(self) -> None:
        """The run directory is moved away in mid-training and brought back."""
        folder = self.folder("vanished")
        self.copy_cache(folder)
        process = self.train(folder)
        require(process.wait_for("Epoch 1 completed"), process.output())
        run = self.run_of(folder)
        run.rename(folder / "away")
        code = process.finish()
        require(code == 2 and "error: cannot write" in process.output(), f"code {code}:\n{process.output()}")
        (folder / "away").rename(run)
        process = self.recover(folder)
        require(process.finish() == 0, process.output())
        self.compare(folder)

    def no_permission(self) -> None:
        """The right to write is taken away in mid-training and given back."""
        folder = self.folder("permission")
        self.copy_cache(folder)
        process = self.train(folder)
        require(process.wait_for("Epoch 1 completed"), process.output())
        run = self.run_of(folder)
        with read_only(run):
            code = process.finish()
        require(code == 2 and "error: cannot write" in process.output(), f"code {code}:\n{process.output()}")
        process = self.recover(folder)
        require(process.finish() == 0, process.output())
        self.compare(folder)

    def damaged_cache(self, rng: random.Random) -> None:
        """One bit of the feature cache flips: refused, and repaired by the same command."""
        folder = self.folder("damaged")
        self.copy_cache(folder)
        (data,) = (folder / "cache").rglob("grid.000.f16")
        raw = bytearray(data.read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        data.write_bytes(raw)
        process = self.train(folder)
        code = process.finish()
        require(code == 2 and "damaged" in process.output(), f"code {code}:\n{process.output()}")
        process = self.recover(folder)
        require(process.finish() == 0, process.output())
        self.compare(folder)

    def two_at_once(self) -> None:
        """Two trainings share an empty cache and a save directory; a run that trains is not resumed by another."""
        folder = self.folder("two")
        processes = [self.train(folder) for _ in range(2)]
        codes = [process.finish() for process in processes]
        require(codes == [0, 0], processes[0].output() + processes[1].output())
        runs = self.runs(folder)
        require(len(runs) == 2, f"{len(runs)} run directories")
        (index,) = (folder / "cache").rglob("grid.jsonl")
        require(len(index.read_text().splitlines()) == SCENES, "some images were encoded twice")
        for run in runs:
            alone = self.folder("one")
            shutil.copytree(run, alone / "runs" / "a" / "b" / run.name)
            self.compare(alone)

    def two_resumes(self) -> None:
        """The second process that resumes the same run is refused."""
        folder = self.folder("resumes")
        self.copy_cache(folder)
        process = self.train(folder)
        require(process.wait_for("Epoch 1 completed"), process.output())
        second = self.recover(folder)
        code = second.finish()
        require(code == 2 and "another process is training" in second.output(), f"code {code}:\n{second.output()}")
        require(process.finish() == 0, process.output())
        self.compare(folder)


class Lost(Exception):
    """A promise that was not kept."""


class Skipped(Exception):
    """A fault that cannot be made here."""


def require(kept: bool, problem: str) -> None:
    if not kept:
        raise Lost(problem)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written into a folder: by its permissions, or for root, whom they do not stop, by a mount over it."""
    if os.geteuid():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    for command in (["mount", "--bind", str(folder), str(folder)], ["mount", "-o", "remount,bind,ro", str(folder)]):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise Skipped("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 60) -> Iterator[Path]:
    """A file system of its own.

    Raises:
        Skipped: this user may not mount one.
    """
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        raise Skipped("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 kills")
    parser.add_argument("--kills", type=int, help="how often to kill (default: 100, or 8 with --quick)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="faults tried at the same time")
    args = parser.parse_args()
    kills = args.kills if args.kills is not None else 8 if args.quick else 100
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder))
        tries: list[tuple[str, Callable[[], None]]] = []
        for number in range(kills):
            phase = ("training", "encoding", "training", "testing", "training", "drawing", "training", "encoding")[
                number % 8
            ]
            rng = random.Random(f"{args.seed} {number}")
            tries.append((f"killed while {phase}", lambda phase=phase, rng=rng: bench.kill(phase, rng)))
        tries += [
            ("SIGTERM", lambda: bench.stop_politely(signal.SIGTERM)),
            ("SIGINT", lambda: bench.stop_politely(signal.SIGINT)),
            ("disk full in mid-training", bench.full_disk),
            ("disk too small to begin with", bench.no_space_to_begin_with),
            ("run directory vanished", bench.vanished_directory),
            ("write permission taken away", bench.no_permission),
            ("a bit of the cache flipped", lambda: bench.damaged_cache(random.Random(args.seed))),
            ("two trainings at once", bench.two_at_once),
            ("two resumes at once", bench.two_resumes),
        ]
        counts: dict[str, list[int]] = {}

        def attempt(name: str, act: Callable[[], None]) -> None:
            row = counts.setdefault(name, [0, 0, 0])
            try:
                act()
            except Skipped as reason:
                print(f"skipped: {name}: {reason}", flush=True)
                return
            except Exception as problem:  # whatever it is, it counts as lost, and the others go on
                row[2] += 1
                print(f"LOST: {name}: {problem!r}"[:3000], flush=True)
            else:
                row[1] += 1
            row[0] += 1

        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda pair: attempt(*pair), tries))
    print(f"\n{'fault':<32}{'tried':>7}{'survived':>10}{'lost':>6}")
    for name, row in [*counts.items(), ("together", [sum(column) for column in zip(*counts.values(), strict=True)])]:
        print(f"{name:<32}{row[0]:>7}{row[1]:>10}{row[2]:>6}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes, seed {args.seed}, {args.workers} at a time")
    return int(any(row[2] for row in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
