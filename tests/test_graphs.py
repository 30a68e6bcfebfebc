"""Graphs of exported folders: a stranger's is refused in one line, before ONNX Runtime sees it."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from fuzz_targets import exported_files
from onnx import TensorProto, helper
from PIL import Image

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.io import UserError
from captioning.models import graphs
from captioning.models.exported import ExportedModel
from captioning.models.graphs import check_graph, stored_tensors
from captioning.runs.forms import GRAPHS, LARGEST_GRAPH, read_exported


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    for name, content in exported_files().items():
        (folder / name).write_bytes(content)
    return folder


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(each for each in model.graph.initializer if each.external_data)


def place(key: str, value: str | Callable[[str], str]) -> Callable[[onnx.ModelProto], None]:
    """Return what gives a weight another place."""

    def change(model: onnx.ModelProto) -> None:
        (entry,) = (each for each in external(model).external_data if each.key == key)
        entry.value = value if isinstance(value, str) else value(entry.value)

    return change


def add_node(kind: str, **more: object) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.node.append(helper.make_node(kind, [], ["x"], **more))


def subgraph() -> onnx.GraphProto:
    return helper.make_graph([], "then", [], [])


CHANGES: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "Loop": (add_node("Loop", body=subgraph()), "the operator 'Loop'"),
    "If": (add_node("If", then_branch=subgraph(), else_branch=subgraph()), "the operator 'If'"),
    "custom operator": (add_node("Relu", domain="com.stranger"), "the operator 'Relu'"),
    "subgraph": (add_node("Relu", body=subgraph()), "a field that is not expected"),
    "strings": (add_node("Relu", texts=["a"]), "a field that is not expected"),
    "domain": (lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)), "another domain or version"),
    "version": (lambda m: setattr(m.opset_import[0], "version", 9), "another domain or version"),
    "function": (
        lambda m: m.functions.append(helper.make_function("", "F", [], ["x"], [], m.opset_import)),
        "a field that is not expected",
    ),
    "metadata": (lambda m: m.metadata_props.add(key="a", value="b"), "a field that is not expected"),
    "sparse weights": (lambda m: m.graph.sparse_initializer.add(), "a field that is not expected"),
    "text": (lambda m: m.graph.initializer.append(TensorProto(name="x", data_type=8)), "not a number's"),
    "float_data": (
        lambda m: m.graph.initializer.append(TensorProto(name="x", data_type=1, dims=[1], float_data=[1.0])),
        "a field that is not expected",
    ),
    "too few bytes": (
        lambda m: m.graph.initializer.append(TensorProto(name="x", data_type=1, dims=[2**40, 2**40], raw_data=b"1234")),
        "of another size",
    ),
    "negative size": (
        lambda m: m.graph.initializer.append(TensorProto(name="x", data_type=1, dims=[-1, -1], raw_data=b"1234")),
        "",
    ),
    "another file": (place("location", "../../etc/passwd"), "weights in another file"),
    "absolute": (place("location", "/etc/passwd"), "weights in another file"),
    "offset": (place("offset", lambda value: str(int(value) + 2)), "none of model.safetensors's"),
    "length": (place("length", lambda value: str(int(value) + 2)), "none of model.safetensors's"),
    "no number": (place("offset", "-1"), "weights in another file"),
    "very large": (place("length", "9" * 30), "weights in another file"),
    "shape": (lambda m: external(m).dims.append(1), "none of model.safetensors's"),
    "type": (lambda m: setattr(external(m), "data_type", TensorProto.INT64), "none of model.safetensors's"),
    "place twice": (lambda m: external(m).external_data.add(key="offset", value="0"), "place is not named"),
    "checksum": (lambda m: external(m).external_data.add(key="checksum", value="0"), "place is not named"),
}


def refused(content: bytes, sound: Path, message: str) -> None:
    with pytest.raises(UserError, match="step.onnx is no graph that --mode export writes") as error:
        check_graph(content, sound / "step.onnx", stored_tensors(sound / "model.safetensors"))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", CHANGES)
def test_what_export_does_not_write_is_refused(sound, name):
    change, message = CHANGES[name]
    model = onnx.load_from_string((sound / "step.onnx").read_bytes())
    change(model)
    refused(model.SerializeToString(), sound, message)


def field(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def test_damaged_protocol_buffers_are_refused(sound, monkeypatch):
    content = (sound / "step.onnx").read_bytes()
    for damaged, message in (
        (content[:-1], ""), (content[: len(content) // 2], "ends too early"), (b"", "KeyError"),
        (content + content, "twice"), (content + b"\x08\x0a", "ir_version twice"), (content + field(7, b""), "graph twice"),
        (content + b"\x08" + b"\xff" * 11, "a number that is too long"), (content + b"\x0b", "damaged"),
        (content + field(15, b"x"), "not expected (15)"), (b"\x08\x0a\x38\x07", "its field graph is of another type"),
        (content + b"\x41" + bytes(8), "damaged"),  # eight bytes, which no field here has
    ):  # fmt: skip
        refused(damaged, sound, message)
    refused(bytes(LARGEST_GRAPH + 1), sound, "larger than")
    monkeypatch.setattr(graphs, "MOST_NODES", 3)
    refused(content, sound, "more than 3 operators")
    monkeypatch.undo()
    monkeypatch.setattr(graphs, "MOST_INLINE", 3)
    refused(content, sound, "more than 3 bytes")


def test_weights_of_another_header_are_refused(tmp_path):
    for number, header in enumerate(
        (b"[]", b'{"a": 3}', b'{"a": {"dtype": "F32", "data_offsets": 3, "shape": []}}', b"{")
    ):
        path = tmp_path / str(number)
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            stored_tensors(path)
    (tmp_path / "long").write_bytes(struct.pack("<Q", 2**62))
    with pytest.raises(UserError, match="its header is too long"):
        stored_tensors(tmp_path / "long")


def swap(folder: Path, other: Path, name: str, where: str = "") -> None:
    """Put the graph of another export in, with its checksum."""
    shutil.copy(other / (where or name), folder / name)
    config = json.loads((folder / "config.json").read_text())
    config["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_two_exports_do_not_mix(sound, tmp_path, capsys, name):
    other, folder = tmp_path / "other", Path(shutil.copytree(sound, tmp_path / "folder"))
    other.mkdir()
    for file, content in exported_files("lstm").items():
        (other / file).write_bytes(content)
    swap(folder, other, name)
    if name != "encoder.onnx":  # whose weights may lie at the same place
        with pytest.raises(UserError, match="no graph that --mode export writes|do not belong together"):
            ExportedModel(read_exported(folder / "model.safetensors"), folder / "model.safetensors")
    Image.new("RGB", (60, 60)).save(tmp_path / "photo.png")
    swap(folder, sound, name, "begin.onnx" if name == "step.onnx" else "step.onnx")
    assert (
        trainer.main(["--mode", "caption", "--model_path", str(folder), "--images", str(tmp_path / "photo.png")]) == 2
    )
    error = capsys.readouterr().err
    assert "do not belong together" in error and "Traceback" not in error


def test_a_vocabulary_of_another_export_is_refused(sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "folder"))
    words = json.loads((sound / "vocabulary.json").read_text())
    for changed in (words[:-1], [*words, "cat"]):
        (tmp_path / "vocabulary.json").write_text(json.dumps(changed))
        swap(folder, tmp_path, "vocabulary.json")
        with pytest.raises(UserError, match="do not belong together"):
            ExportedModel(read_exported(folder / "model.safetensors"), folder / "model.safetensors")
