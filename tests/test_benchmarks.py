"""The benchmarks run, at their tiniest, and their baselines compute what the project computes; nothing is timed here."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from run_files import skip_pictures
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import adaptation
import baselines
import charts
import encoding
import generated
import measure
import memory
import run
import scale
import startup
import training

from captioning.dataset import load_caption_set
from captioning.encoders import find_encoder
from training_utils import Precision

LINUX = Path("/proc/self/status").is_file()
PARTS = ["encoding", "epoch", "decoding", "reward", "startup", *(["memory"] if LINUX else [])]


class Left(BaseException):
    """The process would have ended here."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> measure.Bench:
    """One generated data set and cache for all tests."""
    return measure.Bench(measure.TINY, torch.device("cpu"), tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.SIZES, "small", ["--embed_size", "32", "--hidden_size", "24", "--num_layers", "1"])


def start(bench: measure.Bench, decoder: str, *more: str) -> training.Trial:
    return training.Trial([*training.flags_for(bench, training.prepare_features(bench), decoder, "small"), *more])


def in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Have the benchmarks start no process, each of which would import PyTorch again."""

    def watch(command: list[str], environment: Any = None) -> dict[str, float]:
        memory.child(Path(command[2]), int(command[3]), *command[4:])
        return {**json.loads(capsys.readouterr().out.splitlines()[-1]), "peak": 1.0}

    def leave(code: int) -> NoReturn:
        raise Left(code)

    def run_command(command: list[str], **_: Any) -> SimpleNamespace:
        if command[1] == startup.__file__:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", command[1:])
                patch.setattr(Precision, "step", Precision.step)
                patch.setattr("os._exit", leave)
                with pytest.raises(Left, match="0"):
                    startup.stop_after_first_step()
        return SimpleNamespace(returncode=2 if "--decodr" in command else 0)

    skip_pictures(monkeypatch)
    monkeypatch.setattr(memory, "watch", watch)
    monkeypatch.setattr(startup, "subprocess", SimpleNamespace(run=run_command))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_gives_figures_and_charts(
    bench: measure.Bench, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_this_process(monkeypatch, capsys)
    monkeypatch.setattr(run, "TemporaryDirectory", lambda **_: contextlib.nullcontext(str(bench.directory)))
    for module in (encoding, training):
        monkeypatch.setattr(module, "large_product", lambda *_: lambda: 1e-9)  # seconds: no rate here is above it
        monkeypatch.setattr(module, "find_encoder", lambda name: replace(find_encoder(name), image_size=64, grid=2))
    output = run.main(["--only", part, "--output", str(tmp_path / "result.json")], measure.TINY)
    figures = json.loads(output.read_text())["figures"]
    assert figures and all(figure["part"] == part and figure["unit"] and figure["against"] for figure in figures)
    assert all(figure["value"] > 0 and figure["ratio"] > 0 for figure in figures)
    assert part == "memory" or any(figure["target"] for figure in figures)
    products = {figure["name"]: figure["limit"] for figure in figures if "arithmetic" in figure["name"]}
    assert all(limit == (1.0 if name.count("fp32") != 1 else None) for name, limit in products.items())
    assert bool(products) == (part == "epoch")
    drawn = charts.main([str(output), "--directory", str(tmp_path)])
    assert bool(drawn) == (part not in ("reward", "startup")) and all(
        0 < path.stat().st_size < 60_000 for path in drawn
    )


@pytest.mark.skipif(not LINUX, reason="/proc")
def test_a_watched_process_has_its_peak() -> None:
    program = "x = bytearray(b'1') * 100_000_000; import time; time.sleep(0.2); del x; print('{}')"
    assert 90 < memory.watch([sys.executable, "-c", program])["peak"] < 150


@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_the_original_way_has_the_same_loss(bench: measure.Bench, decoder: str) -> None:
    trial = start(bench, decoder)
    captions = np.arange(20)
    batch, model, features = trial.batches.make(captions), trial.decoder.eval(), trial.run.views[0]
    with torch.no_grad():
        loss = model.cross_entropy(model(features.gather(batch.images), batch).hidden_out, batch.targets)
        inputs, targets = baselines.padded(trial.batches, captions, 37)
        plain = baselines.padded_loss(model, features.gather(trial.batches.owner(captions)), inputs, targets)
    torch.testing.assert_close(plain, loss / len(batch.targets))


@pytest.mark.parametrize("asked, other", [("fp32", "bf16"), ("bf16", "fp32")])
def test_the_precision_that_is_asked_for_is_measured(bench: measure.Bench, asked: str, other: str) -> None:
    trial = start(bench, "attention", "--precision", asked)
    trial.shorten(1)
    training.check_precision(trial, Precision(asked, bench.device))
    with pytest.raises(AssertionError, match=f"--precision {other} has these operations"):
        training.check_precision(trial, Precision(other, bench.device))


def test_a_rate_above_the_matrix_products_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [measure.Figure("epoch", f"arithmetic {ratio}", 1.0, "GFLOP/s", ratio=ratio) for ratio in (0.7, 1.2)]
    monkeypatch.setitem(run.PARTS, "epoch", SimpleNamespace(measure=lambda _: figures))
    command = ["--only", "epoch", "--output", str(tmp_path / "result.json")]
    run.main(command, measure.TINY)
    for figure in figures:
        figure.limit = 1.0
    with pytest.raises(SystemExit, match=r"above the physical limit.*measured: arithmetic 1.2 is 1.20$"):
        run.main(command, measure.TINY)


def test_generated_captions_are_like_flickr8k() -> None:
    lengths = [len(caption.split()) for caption in generated.Grammar(0).captions(5000)]
    assert 10 < np.mean(lengths) < 12 and 30 < max(lengths) <= 40


def test_a_withheld_theme_is_nowhere_but_among_the_own_photos(tiny: Path, tmp_path: Path) -> None:
    data = load_caption_set(tiny)
    themed = {data.names[i] for i in adaptation.themed_images(data, "red")}
    assert themed == {f"p{number:02d}.jpg" for number in range(0, 20, 4)}
    others, own = adaptation.write_sets(tmp_path / "sets", data, "red", [2, 90])
    written = {size: load_caption_set(folder) for size, folder in {0: others, **own}.items()}
    assert set(written) == {0, 2, 4} and set(written[0].names) == set(data.names) - themed
    for size in (2, 4):
        names = {split: {written[size].names[i] for i in images} for split, images in written[size].splits.items()}
        assert len(names["train"] | names["val"]) == size and len(names["test"]) == 1
        assert len(set.union(*names.values())) == size + 1 and set.union(*names.values()) <= themed


def in_place_product(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("layers", [1, 3])
def test_the_arithmetic_is_what_pytorch_counts(bench: measure.Bench, layers: int) -> None:
    trial = start(bench, "lstm", "--num_layers", str(layers), "--precision", "fp32")
    trial.shorten(1)
    in_place = {torch.ops.aten.addmm_: in_place_product}  # which PyTorch's counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        trial.epoch()
    plan = trial.loader.plan(0)
    images = sum(len(trial.batches.make(captions).images) for captions in plan)
    # Left out on purpose: at the image's step the recurrent weights multiply zeros, forward and for their gradient.
    zeros = 2 * layers * images * 4 * 24 * 24
    assert counter.get_total_flops() == 2 * (training.multiply_adds(trial, plan) + zeros)


def test_the_plans_arithmetic_is_that_of_the_benchmark(bench: measure.Bench) -> None:
    trial = start(bench, "attention", "--embed_size", str(scale.EMBED), "--hidden_size", str(scale.HIDDEN))
    plan, images = trial.loader.plan(0), len(trial.loader.images)
    captions, tokens = sum(map(len, plan)), sum(len(trial.batches.make(part).targets) for part in plan)
    data = scale.DataSet("tiny", images, captions / images, tokens / captions, len(trial.context.vocabulary), 1.0)
    assert 2 * training.multiply_adds(trial, plan) == pytest.approx(scale.step_arithmetic(data, captions))
    ours = sum(weights.numel() for weights in trial.decoder.parameters())
    assert scale.parameters(data) == pytest.approx(ours, rel=0.02)


def test_more_workers_are_never_slower_and_the_plan_says_what_they_wait_for(capsys) -> None:
    for data in scale.DATA_SETS:
        plans = [scale.plan(data, scale.GPU, workers, 5120) for workers in (1, 8, 64)]
        assert [plan.encoding for plan in plans] == sorted((plan.encoding for plan in plans), reverse=True)
    crawling = scale.replace(scale.GPU, disk=1e6, memory=0.0)
    assert scale.plan(scale.DATA_SETS[0], crawling, 8, 640).limit == "reading features"
    scale.main(["--disk", "1e6"])
    assert "writing features" in capsys.readouterr().out
