"""A tiny data set, and a main program that runs in a directory of its own."""

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

torch.set_num_threads(1)  # everything is tiny here, and threads that wait for each other take longer

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}


def draw_tiny(folder: Path) -> Path:
    """Draw twenty pictures in the Flickr8k layout, without split lists. Returns the data directory, which is `folder`.

    The three last words are not equally frequent: a model that learned them has a likeliest one, whatever the rounding.
    """
    (folder / "Images").mkdir(parents=True)
    rows = ["image,caption"]
    for number in range(20):
        name, color = f"p{number:02d}.jpg", list(COLORS)[number % 4]
        noise = np.random.default_rng(number).integers(0, 20, (40, 60, 3))
        Image.fromarray((np.array(COLORS[color]) * 0.9 + noise).astype(np.uint8)).save(folder / "Images" / name)
        rows += [f"{name},A {color} picture number {word} ." for word in ("one", "two" if number % 8 < 4 else "three")]
    (folder / "captions.txt").write_text("\n".join(rows) + "\n")
    return folder


def round_to_float16(path: Path) -> None:
    """Round a checkpoint's weights as export does: the two then have the same weights, and choose the same captions."""
    from captioning.runs.checkpoints import load_checkpoint, save_checkpoint

    def rounded(values: dict) -> dict:
        kinds = (torch.float32, np.float32)  # decoders are tensors, what consensus needs are arrays
        floats = {name: each for name, each in values.items() if getattr(each, "dtype", None) in kinds}
        return values | {
            name: each.astype(np.float16).astype(np.float32) if isinstance(each, np.ndarray) else each.half().float()
            for name, each in floats.items()
        }

    checkpoint = load_checkpoint(path)
    head = checkpoint["consensus"]
    save_checkpoint(path, checkpoint | {"decoder": rounded(checkpoint["decoder"]), "consensus": head and rounded(head)})


@pytest.fixture(autouse=True)
def without_java(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes seconds of every test of a model: only tests/test_metrics.py runs it."""
    from metrics_utils import MetricFailed

    def absent() -> str:
        raise MetricFailed("it needs Java, and these tests do without its seconds")

    if request.module.__name__ != "test_metrics":
        monkeypatch.setattr("metrics_utils.find_java", absent)


@pytest.fixture(scope="session", autouse=True)
def compiled_once() -> Iterator[None]:
    """Encoders of the same weights are compiled once: OpenVINO takes a second of every test that trains."""
    from captioning.encoders import base as encoders

    compile_form, known = encoders.openvino_form, {}

    def openvino_form(encoder: encoders.Encoder, size: int, streams: int):
        weights = [(name, zlib.crc32(tensor.numpy().tobytes())) for name, tensor in encoder.state_dict().items()]
        key = f"{encoder.spec} {size} {streams} {torch.get_num_threads()} {weights}"
        if key not in known:
            known[key] = compile_form(encoder, size, streams)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "openvino_form", openvino_form)
        yield


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The data directory of `draw_tiny`."""
    return draw_tiny(tmp_path / "tiny")


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained run on the tiny set for each decoder, for tests that change nothing there; and the set as `data`."""
    from run_files import skip_pictures

    import flickr_image_caption_with_pytorch_resnet_lstm as trainer

    folder = tmp_path_factory.mktemp("runs")
    found = {"data": draw_tiny(folder / "tiny")}
    for decoder in ("attention", "lstm"):
        flags = (
            f"--dataset_type custom --encoder efficientnet_lite0 --decoder {decoder} --embed_size 16 --hidden_size 16"
        )
        flags += " --num_layers 1 --freq_threshold 1 --epochs 12 --batch_size 16 --learning_rate 0.02 --max_length 12 --best_metric val_loss"
        flags += " --views mirror" if decoder == "lstm" else ""
        places = {"data_dir": "tiny", "model_save_dir": decoder, "feature_cache": "cache"}
        typed = [word for name, place in places.items() for word in (f"--{name}", str(folder / place))]
        with pytest.MonkeyPatch.context() as patch:
            skip_pictures(patch)
            assert trainer.main([*flags.split(), *typed]) == 0
        (found[decoder],) = (path.parent for path in (folder / decoder).rglob("best.pt"))
        round_to_float16(found[decoder] / "best.pt")
    return found


@pytest.fixture(scope="session")
def model(tiny_runs: dict[str, Path]):
    """A captioner of the `attention` run; whoever changes it changes it back."""
    from captioning import Captioner

    return Captioner.load(str(tiny_runs["attention"]))


@pytest.fixture(scope="session")
def photo(tiny_runs: dict[str, Path]) -> Path:
    return tiny_runs["data"] / "Images" / "p03.jpg"


@pytest.fixture(scope="session", autouse=True)
def exported_once() -> Iterator[None]:
    """Networks of the same weights are exported to ONNX once: an export takes seconds."""
    from captioning.modes import export

    write_graph, known = export.to_onnx, {}

    def to_onnx(module: torch.nn.Module, example: dict, axes: list, outputs: list):
        tensors = [*module.state_dict().items(), *((name, torch.tensor(each.shape)) for name, each in example.items())]
        weights = [(name, zlib.crc32(tensor.contiguous().numpy().tobytes())) for name, tensor in tensors]
        key = f"{module} {weights} {axes} {outputs}"
        if key not in known:
            known[key] = write_graph(module, example, axes, outputs)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "to_onnx", to_onnx)
        yield


@pytest.fixture
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export without the seconds that writing graphs takes, for tests that read the folder with PyTorch."""
    import onnx

    from captioning.modes import export
    from captioning.runs.forms import GRAPHS

    empty = onnx.helper.make_model(onnx.helper.make_graph([], "graph", [], []))
    monkeypatch.setattr(export, "make_graphs", lambda *_: dict.fromkeys(GRAPHS, empty))
    monkeypatch.setattr(export, "require_agreement", lambda *_: None)
