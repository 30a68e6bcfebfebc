"""Several processes under torchrun train as one does, report what they disagree on, and go on after one is lost."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from conftest import draw_tiny
from run_files import only_run, skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
import training_utils
from captioning import distributed
from captioning.encoders.feature_store import RECORD
from training_utils import StopRequest

SCRIPT = Path(trainer.__file__)
WHAT = "--dataset_type custom --data_dir tiny --encoder efficientnet_lite0 --embed_size 16 --hidden_size 16"
HOW = "--num_layers 1 --freq_threshold 1 --batch_size 16 --learning_rate 0.01 --max_length 12 --precision fp32"
TRAIN = [*WHAT.split(), *HOW.split()]
START = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
START.set_forkserver_preload(["torch._dynamo", "spacy", __name__])


# What Python imports by itself: processes that torchrun starts draw nothing, either, and load no matplotlib.
NO_PICTURES = """
import sys
from unittest.mock import MagicMock
sys.modules["captioning.runs.plots"] = sys.modules["captioning.runs.report"] = MagicMock()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny set, whose features all tests here share."""
    folder = tmp_path_factory.mktemp("distributed")
    draw_tiny(folder / "tiny")
    return folder


def torchrun(place: Path, *flags: str) -> subprocess.Popen[str]:
    """Two processes, which are started again once."""
    (place / "sitecustomize.py").write_text(NO_PICTURES)
    launcher = f"-m torch.distributed.run --nproc_per_node 2 --max_restarts 1 --master_port {free_port()}".split()
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *flags], cwd=place, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(place)},
    )  # fmt: skip


def free_port() -> str:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


def work(environment: dict[str, str], place: Path, flags: list[str], outputs: list[Path]) -> NoReturn:
    """Run the program as a process of its own would, in a directory, with what it says written to two files."""
    multiprocessing.set_start_method(None, force=True)  # a forked process has its parent's
    os.environ.update(environment)
    os.chdir(place)
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    skip_pictures(pytest.MonkeyPatch())
    distributed.end(trainer.main(flags))


def by_hand(places: list[Path], *commands: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Processes as a cluster would start them, each in a directory and with flags of its own.

    They are forked from a process that has PyTorch loaded, which saves each the seconds of importing it.
    """
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": str(len(commands)),
        "LOCAL_RANK": "0",
    }
    group["PATH"] = ""  # no Java: METEOR takes seconds
    outputs = [[place / f"{name}{rank}.txt" for name in ("stdout", "stderr")] for rank, place in enumerate(places)]
    started = [
        START.Process(target=work, args=(group | {"RANK": str(rank)}, place, flags, outputs[rank]))
        for rank, (place, flags) in enumerate(zip(places, commands, strict=True))
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
        process.kill()  # where it hangs
        process.join()
    return [
        subprocess.CompletedProcess([], process.exitcode or 0, *(path.read_text() for path in files))
        for process, files in zip(started, outputs, strict=True)
    ]


def alone(place: Path, monkeypatch, *flags: str) -> None:
    monkeypatch.chdir(place)
    skip_pictures(monkeypatch)
    assert trainer.main(list(flags)) == 0


def check_same_training(first: Path, second: Path, file: str = "last.pt") -> None:
    """The same but for the order in which floats were added."""
    a, b = (torch.load(run / file, weights_only=True) for run in (first, second))
    for name, weights in a["decoder"].items():
        torch.testing.assert_close(weights, b["decoder"][name], atol=1e-3, rtol=0)
    for name in ("training_losses", "validation_losses"):
        assert a["loss_curve"][name] == pytest.approx(b["loss_curve"][name], abs=1e-5)
    assert a["epoch"] == b["epoch"] and a["progress"]["tokens"] == b["progress"]["tokens"]


def test_two_processes_encode_a_part_each_and_train_and_test_as_one(place, monkeypatch):
    flags = [*TRAIN, "--decoder", "attention", "--fine_tune", "1", "--views", "mirror", "--attention_reg", "0.1"]
    flags += ["--epochs", "2", "--drop_prob", "0", "--batch_size", "10"]  # the last batch leaves one without
    alone(place, monkeypatch, *flags, "--model_save_dir", "one")
    command = [*flags, "--feature_cache", "shared", "--scst_epochs", "1", "--model_save_dir", "two"]
    first, second = by_hand([place, place], command, command)
    output = first.stdout + second.stdout
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    run = only_run(place / "two")
    check_same_training(only_run(place / "one"), run, "model_epoch_2.pt")  # sampled captions depend on the processes
    assert output.count("Epoch 3 completed") == output.count("Run directory") == 1
    assert 0 <= json.loads((run / "metrics_history.json").read_text())[-1]["reward"] < 10, "a mean CIDEr-D"
    assert "2 processes" in output and "Processes: 2" in (run / "run_summary.txt").read_text()
    indexes = sorted((place / "shared").rglob("*.index"))
    assert [index.name.partition("-")[0] for index in indexes] == ["mirror", "whole"]
    for index in indexes:
        names = np.fromfile(index, RECORD)["name"].tolist()
        assert len(names) == len({*names} - {0}) == 20
    testing = ["--mode", "test", "--split", "val+test", "--model_path", str(run)]
    first, second = by_hand([place, place], testing, testing)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (first.stdout + second.stdout).count("Written to ") == 1
    together = json.loads((run / "test_metrics.json").read_text())
    (run / "test_metrics.json").unlink()
    alone(place, monkeypatch, *testing)
    assert json.loads((run / "test_metrics.json").read_text()) == together


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("it did not come to pass within a minute")


def saved_epochs(folder: Path) -> int:
    """How many epochs of the only run are saved so far."""
    return len(list(folder.glob("custom/*/*/model_epoch_*.pt")))


def workers(launcher: int) -> list[int]:
    """Process numbers of the processes that a torchrun started, by rank."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, check=True)
    return sorted(map(int, children.stdout.split()))


@pytest.mark.skipif(sys.platform != "linux", reason="asks ps for a process's children as Linux has it")
def test_killed_then_stopped_together_and_resumed_alone(place, monkeypatch):
    """Processes that torchrun restarts end; the run is then resumed by two processes, stopped, and resumed by one."""
    flags = [*TRAIN, "--epochs", "300", "--drop_prob", "0", "--keep_checkpoints", "400"]
    process = torchrun(place, *flags, "--model_save_dir", "parts")
    wait_for(lambda: saved_epochs(place / "parts") >= 2, process)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    run = only_run(place / "parts")
    assert process.returncode != 0 and output.count("error: torchrun lost a process") == 1 and "--resume RUN" in output
    enough = saved_epochs(place / "parts") + 1
    process = torchrun(place, "--resume", str(run))
    wait_for(lambda: saved_epochs(place / "parts") >= enough, process)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "Resuming" in output
    assert process.returncode != 0 and output.count("Stopped. Continue where it stands") == 1
    config = json.loads((run / "run_config.json").read_text())
    done = torch.load(run / "last.pt", weights_only=True)["epoch"]
    assert enough <= done < 300
    last = done + 2
    config["epochs"] = last
    (run / "run_config.json").write_text(json.dumps(config))
    alone(place, monkeypatch, "--resume", str(run))
    curve = json.loads((run / "loss_curve.json").read_text())
    assert curve["epochs"] == list(range(1, last + 1)) and saved_epochs(place / "parts") == last
    alone(place, monkeypatch, *flags, "--epochs", str(last), "--model_save_dir", "undisturbed")
    check_same_training(run, only_run(place / "undisturbed"))


def test_processes_with_other_flags_are_refused(place):
    flags = [*TRAIN, "--model_save_dir", "otherwise"]
    first, second = by_hand([place, place], [*flags, "--drop_prob", "0.2"], [*flags, "--drop_prob", "0.4"])
    assert (first.returncode, second.returncode) == (2, 2) and "Traceback" not in first.stderr + second.stderr
    assert first.stderr.count("error: ") == 1 >= second.stderr.count("error: ")  # if the first was gone already
    assert "error: the processes disagree on --drop_prob: '0.2' in rank 0, '0.4' in rank 1" in first.stderr
    assert not (place / "otherwise").exists()


def test_machines_without_a_shared_cache_are_refused(place):
    """The working directory of the second process differs, so its relative --feature_cache is another folder."""
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    places = {"data_dir": place / "tiny", "model_save_dir": place / "apart", "feature_cache": "own"}
    flags = [*TRAIN, *(word for name, folder in places.items() for word in (f"--{name}", str(folder)))]
    _, second = by_hand([place, elsewhere], flags, flags)
    assert second.returncode == 2 and "rank 1 does not see own" in second.stderr and "that they share" in second.stderr


def test_machines_with_another_data_set_are_refused(place):
    """The working directory of the second process differs, and its relative --data_dir has other captions."""
    other = place / "other"
    other.mkdir()
    captions = draw_tiny(other / "tiny") / "captions.txt"
    captions.write_text(captions.read_text().replace("p07.jpg,A", "p07.jpg,The"))
    flags = [*TRAIN, "--model_save_dir", str(place / "data"), "--feature_cache", str(place / "feature_cache")]
    flags += ["--image_dir", str(place / "tiny" / "Images")]
    first, _ = by_hand([place, other], flags, flags)
    assert first.returncode == 2 and "disagree on the hash of the captions and the split" in first.stderr
    assert not (place / "data").exists()


def test_captioning_takes_no_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        trainer.main(["--mode", "caption", "--images", "a.jpg", "--model_path", "x"])
    assert "--mode caption runs in one process" in capsys.readouterr().err


def test_parts_have_about_the_same_weight():
    weights = np.random.default_rng(0).integers(20, 90, 64)
    owner = distributed.balance_by_weight(weights, 4)
    loads = np.bincount(owner, weights, minlength=4)
    assert loads.sum() == weights.sum() and loads.max() - loads.min() < 20
    assert set(distributed.balance_by_weight(np.array([5, 5]), 4)) == {0, 1}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_signal_that_torchrun_passes_on_is_no_second_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        monkeypatch.setattr(training_utils, "SAME_SIGNAL", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
