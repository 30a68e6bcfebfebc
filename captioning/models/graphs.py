"""The graphs of an exported folder, checked before they are loaded: a graph is a program, and folders come from strangers.

A strict reader of ONNX's protocol buffers: what `modes/export.py` writes passes, any other field, operator or file does
not. A graph has no control flow, no functions and no strings; its weights lie in `model.safetensors` or are small.
What is not bounded is how large a forged graph makes its intermediate results.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from captioning.io import EXPORTED_WEIGHTS, UserError
from captioning.runs.forms import LARGEST_GRAPH

MOST_NODES, MOST_INLINE = 20_000, 4_000_000  # operators of a graph; bytes of the weights inside of it
LARGEST_HEADER = 16_000_000  # bytes of the header of `model.safetensors`
OPSETS = range(17, 27)
OPERATORS = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "ArgMax",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "Cos",
        "CumSum",
        "Div",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "GlobalAveragePool",
        "Greater",
        "GreaterOrEqual",
        "GroupNormalization",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "InstanceNormalization",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "MatMul",
        "Max",
        "MaxPool",
        "Mean",
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "PRelu",
        "Pad",
        "Pow",
        "RMSNormalization",
        "Range",
        "Reciprocal",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Relu",
        "Reshape",
        "Resize",
        "Round",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "Shape",
        "Sigmoid",
        "Sign",
        "Sin",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Swish",
        "Tanh",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)
FLOAT, FLOAT16 = 1, 10  # of ONNX's types
ITEM_SIZES = {FLOAT: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, FLOAT16: 2, 11: 8}  # bytes, of these and the integers
STORED_TYPES = {"F32": FLOAT, "F16": FLOAT16}  # of safetensors

# The fields that each message may have, by number: those of one value, and those that may be repeated.
Fields = Mapping[int, str]
MODEL: Fields = {1: "ir_version", 7: "graph", 8: "*opset_import"}
OPSET: Fields = {1: "domain", 2: "version"}
GRAPH: Fields = {1: "*node", 2: "name", 5: "*initializer", 11: "*input", 12: "*output"}
NODE: Fields = {1: "*input", 2: "*output", 3: "name", 4: "op_type", 5: "*attribute", 7: "domain"}
ATTRIBUTE: Fields = {1: "name", 2: "f", 3: "i", 4: "s", 5: "t", 7: "*floats", 8: "*ints", 20: "type"}
TENSOR: Fields = {
    1: "*dims", 2: "data_type", 8: "name", 9: "raw_data", 13: "*external_data", 14: "data_location",
}  # fmt: skip
ENTRY: Fields = {1: "key", 2: "value"}
# Those that are whole numbers; all others are bytes.
NUMBERS = {"ir_version", "version", "*dims", "data_type", "data_location", "i", "*ints", "type"}


class Stored(NamedTuple):
    """A tensor of `model.safetensors`."""

    name: str
    kind: int  # ONNX's type
    shape: tuple[int, ...]


class Malformed(Exception):
    """A graph that this program did not write; says why."""


def check_graph(content: bytes, path: Path, tensors: Mapping[tuple[int, int], Stored]) -> dict[str, str]:
    """Check a graph. Nothing of it is executed.

    Args:
        content: of the file `path`.
        tensors: what `stored_tensors` returned.

    Returns:
        the names of its weights that lie in `model.safetensors`, each with its name there.

    Raises:
        UserError: it has something that `--mode export` does not write.
    """
    try:
        if len(content) > LARGEST_GRAPH:
            raise Malformed(f"it is larger than {LARGEST_GRAPH} bytes")
        model = read(content, MODEL)
        for opset in model["opset_import"]:
            operators = read(opset, OPSET)
            if operators.get("domain", b"") or operators.get("version") not in OPSETS:
                raise Malformed("its operators are of another domain or version")
        graph = read(model["graph"], GRAPH)
        if len(graph["node"]) > MOST_NODES:
            raise Malformed(f"it has more than {MOST_NODES} operators")
        inline, outside = 0, {}
        for tensor in (read(each, TENSOR) for each in graph["initializer"]):
            found = check_tensor(tensor, tensors)
            if isinstance(found, Stored):
                outside[bytes(tensor["name"]).decode()] = found.name
            else:
                inline += found
        for each in graph["node"]:
            node = read(each, NODE)
            kind = bytes(node["op_type"]).decode()
            if kind not in OPERATORS or node.get("domain", b""):
                raise Malformed(f"it has the operator {kind[:40]!r}")
            for attribute in node["attribute"]:
                value = read(attribute, ATTRIBUTE)
                inline += check_tensor(read(value["t"], TENSOR), {}) if "t" in value else 0  # type: ignore[operator]
        if inline > MOST_INLINE:
            raise Malformed(f"the weights inside of it have more than {MOST_INLINE} bytes")
        return outside
    except (Malformed, KeyError, UnicodeDecodeError) as error:
        problem = error if isinstance(error, Malformed) else f"it is damaged ({type(error).__name__})"
        raise UserError(f"{path} is no graph that --mode export writes: {problem}. Export it again") from error


def check_tensor(tensor: Mapping[str, Any], tensors: Mapping[tuple[int, int], Stored]) -> int | Stored:
    """Check a constant; return how many bytes of it lie in the graph, or where else it lies."""
    kind, shape = tensor["data_type"], tuple(tensor["dims"])
    if kind not in ITEM_SIZES:
        raise Malformed("it has a constant of a type that is not a number's")
    if not tensor.get("data_location", 0):
        if len(tensor.get("raw_data", b"")) != math.prod(shape) * ITEM_SIZES[kind] or tensor["external_data"]:
            raise Malformed("it has a constant of another size than it says")
        return len(tensor.get("raw_data", b""))
    entries = {
        bytes(found["key"]): bytes(found["value"]) for found in (read(e, ENTRY) for e in tensor["external_data"])
    }
    place = tuple(entries.get(key, b"") for key in (b"offset", b"length"))
    if set(entries) != {b"location", b"offset", b"length"} or len(tensor["external_data"]) != 3:
        raise Malformed("it has weights whose place is not named by location, offset and length")
    if entries[b"location"] != EXPORTED_WEIGHTS.encode() or not all(
        each.isdigit() and len(each) < 16 for each in place
    ):
        raise Malformed("it has weights in another file")
    stored = tensors.get((int(place[0]), int(place[1])))
    if stored is None or (stored.kind, stored.shape) != (kind, shape):
        raise Malformed(f"it has weights that are none of {EXPORTED_WEIGHTS}'s")
    return stored


def stored_tensors(path: Path) -> dict[tuple[int, int], Stored]:
    """Return the floats of a file of safetensors: by their offset and length in bytes.

    Raises:
        UserError: the file's header is damaged.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LARGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in STORED_TYPES:
                first, end = entry["data_offsets"]
                found[8 + length + first, end - first] = Stored(
                    name, STORED_TYPES[entry["dtype"]], tuple(entry["shape"])
                )
        return found
    except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}. Export it again") from error


def read(content: bytes | memoryview, fields: Fields) -> dict[str, Any]:
    """Read a message of protocol buffers that has none but these fields.

    Returns:
        values by name: whole numbers, or pieces of `content`. A repeated one is a list, numbers in packed form too.
    """
    found: dict[str, Any] = {name[1:]: [] for name in fields.values() if name[0] == "*"}
    for number, value in pieces(memoryview(content)):
        name = fields.get(number)
        if name is None:
            raise Malformed(f"it has a field that is not expected ({number})")
        if name == "*dims" and not isinstance(value, int):
            found["dims"] += packed(value)
        elif isinstance(value, int) != (name in NUMBERS):
            raise Malformed(f"its field {name.lstrip('*')} is of another type")
        elif name[0] == "*":
            found[name[1:]].append(value)
        elif name in found:
            raise Malformed(f"it has the field {name} twice")
        else:
            found[name] = value
    return found


def pieces(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the fields of a message, each with its number."""
    place = 0
    while place < len(content):
        key, place = varint(content, place)
        if key & 7 == 0:
            value, place = varint(content, place)
            yield key >> 3, value
            continue
        if key & 7 not in (2, 5):
            raise Malformed("it is damaged")
        size, place = varint(content, place) if key & 7 == 2 else (4, place)
        if size > len(content) - place:
            raise Malformed("it ends too early")
        yield key >> 3, content[place : place + size]
        place += size


def packed(content: memoryview) -> Iterator[int]:
    place = 0
    while place < len(content):
        value, place = varint(content, place)
        yield value


def varint(content: memoryview, place: int) -> tuple[int, int]:
    """Read a whole number; return it and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            raise Malformed("it ends too early")
        byte = content[place]
        value, place = value | (byte & 127) << shift, place + 1
        if byte < 128:
            return value, place
    raise Malformed("it has a number that is too long")
