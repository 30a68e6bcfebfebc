"""Read files of PyTorch that come from anybody: checkpoints and encoder weights.

`torch.load(weights_only=True)` executes nothing, but it builds whatever a file describes: two gigabytes for thirty
bytes of pickle (`bytearray(2 * 10**9)`), or a key whose hash takes hours (a tuple that holds itself twice, forty
times over). So the pickle is read through first: which types it names, that its containers form a tree, how
deep they go, and that every tensor fits the bytes that the file has for it. Nothing is built on the way.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from captioning.io import check_tensor_zip

LARGEST_PICKLE = 64_000_000  # bytes beside the tensors; the names of all images of COCO have 5 million
MOST_OPCODES = 5_000_000  # which take some seconds to read through
MOST_LEVELS = 16  # of containers in each other; a checkpoint has four

ITEM_SIZES = {
    "torch FloatStorage": 4, "torch DoubleStorage": 8, "torch HalfStorage": 2, "torch BFloat16Storage": 2,
    "torch LongStorage": 8, "torch IntStorage": 4, "torch ShortStorage": 2, "torch CharStorage": 1,
    "torch ByteStorage": 1, "torch BoolStorage": 1,
}  # fmt: skip
ORDERED_DICT, PARAMETER = "collections OrderedDict", "torch._utils _rebuild_parameter"
TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
GLOBALS = {*ITEM_SIZES, *TENSORS, ORDERED_DICT, PARAMETER}


class Refused(Exception):
    """The file holds what no checkpoint or file of weights has."""


class Global(NamedTuple):
    name: str


class Storage(NamedTuple):
    """The numbers of a tensor, which lie elsewhere in the file."""

    key: str
    items: int
    item_size: int


class Tensor(NamedTuple):
    """A tensor whose numbers were found to lie in their storage; nothing more of it is needed."""


class Box:
    """A list, tuple or dictionary of the pickle; `items` are a dictionary's values."""

    def __init__(self, kind: type, items: Iterable[Any] = ()):
        self.kind, self.depth = kind, 1
        self.keys: list[Any] = []
        self.items: list[Any] = []
        self.add(items)

    def add(self, items: Iterable[Any]) -> None:
        for item in items:
            self.items.append(item)
            if isinstance(item, Box):
                self.depth = max(self.depth, item.depth + 1)
        if self.depth > MOST_LEVELS:
            raise Refused(f"containers lie in each other more than {MOST_LEVELS} deep")

    def set_items(self, pairs: list[Any]) -> None:
        if self.kind is not dict or len(pairs) % 2:
            raise Refused("it fills something that is not a dictionary")
        if any(type(key) not in (str, int, float, bool, type(None)) for key in pairs[::2]):
            raise Refused("a dictionary has a key that is neither text nor a number")
        self.keys += pairs[::2]
        self.add(pairs[1::2])


def read_tensors(path: Path, old_form: bool = True) -> Any:
    """Read what `torch.save` wrote onto the CPU.

    Args:
        old_form: accept the form of before PyTorch 1.6 too, which is not a zip file and has no checksums.

    Raises:
        Exception: of many kinds, all of which mean that the file is damaged, forged or not PyTorch's.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"  # as `torch.load` tells the two forms apart
        file.seek(0)
        if zipped:
            check_zip(path, file)
        elif old_form:
            check_old_form(file)
        else:
            raise zipfile.BadZipFile("File is not a zip file")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def check_zip(path: Path, file: IO[bytes]) -> None:
    check_tensor_zip(path)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if min(record.header_offset for record in records) != 0:  # Python and PyTorch would read different records
            raise zipfile.BadZipFile("something lies before its first record")
        folder = records[0].filename.partition("/")[0] + "/"  # which PyTorch takes from the first record too
        sizes = {r.filename.removeprefix(folder): r.file_size for r in records if r.filename.startswith(folder)}
    if sizes.get("data.pkl", 0) > LARGEST_PICKLE:
        raise Refused(f"its pickle is larger than {LARGEST_PICKLE} bytes")
    file.seek(0)
    content = torch._C.PyTorchFileReader(file).get_record("data.pkl")  # the very bytes that `torch.load` will read
    for storage in check_pickle(io.BytesIO(content)):
        if storage.items * storage.item_size > sizes.get(f"data/{storage.key}", 0):
            raise Refused(f"the tensor data/{storage.key} is larger than its record")


def check_old_form(file: IO[bytes]) -> None:
    """Check the five pickles at the start: a magic number, a version, the machine, the content, and the storages' keys."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = [storage for _ in range(5) for storage in check_pickle(content)]
        largest: dict[str, int] = {}
        for storage in found:
            largest[storage.key] = max(largest.get(storage.key, 0), storage.items * storage.item_size)
        if sum(largest.values()) > len(content):
            raise Refused("its tensors are larger than the file")


def check_pickle(content: Any) -> list[Storage]:
    """Read one pickle through, from where `content` stands to its end, and return the storages that it names.

    Args:
        content: a file of bytes that ends where the data ends.

    Raises:
        Refused: an opcode, a type or a shape that PyTorch never writes for plain tensors, or more than the limits.
        ValueError, IndexError, KeyError: not a pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: list[Storage] = []

    def pop_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    opcodes: Iterable[tuple[Any, Any, Any]] = pickletools.genops(content)
    for number, (opcode, argument, _) in enumerate(opcodes):
        name = opcode.name
        if number > MOST_OPCODES:
            raise Refused(f"it has more than {MOST_OPCODES} opcodes")
        if name in LEAVES:
            stack.append(LEAVES[name](argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if isinstance(memo[argument], Box):  # else a few bytes could describe more than any memory holds
                raise Refused("a container lies in two places")
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in TUPLES:
            count = TUPLES[name]
            items = pop_mark() if count is None else stack[len(stack) - count :]
            if count:
                del stack[-count:]
            stack.append(Box(tuple, items))
        elif name in ("APPEND", "APPENDS"):
            items = pop_mark() if name == "APPENDS" else [stack.pop()]
            box_on(stack, list).add(items)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = pop_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            box_on(stack, dict).set_items(pairs)
        elif name == "BINPERSID":
            storages.append(storage_of(stack.pop()))
            stack.append(storages[-1])
        elif name == "REDUCE":
            arguments = box_on(stack, tuple).items
            stack.pop()
            stack[-1] = result_of(stack[-1], arguments)
        elif name == "BUILD":  # attributes of an OrderedDict
            state = box_on(stack, dict)
            stack.pop()
            if state.keys != ["_metadata"]:  # the versions of a network's layers
                raise Refused("it sets attributes that no file of weights has")
            box_on(stack, dict).add([state])
        elif name == "STOP":
            return storages
        elif name != "PROTO":
            raise Refused(f"its pickle has the opcode {name}, which PyTorch does not write for tensors")
    raise Refused("its pickle has no end")


def global_of(name: str) -> Global:
    if name not in GLOBALS:
        raise Refused(f"it names {name.replace(' ', '.')}, which no checkpoint or file of weights needs")
    return Global(name)


LEAVES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), lambda value: value
    ),
    "NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: Box(list), "EMPTY_DICT": lambda _: Box(dict), "EMPTY_TUPLE": lambda _: Box(tuple),
    "GLOBAL": global_of,
}  # fmt: skip
TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def box_on(stack: list[Any], kind: type) -> Box:
    """Return the container of this kind on top of the stack."""
    if not isinstance(stack[-1], Box) or stack[-1].kind is not kind:
        raise Refused(f"its pickle has something else where a {kind.__name__} belongs")
    box: Box = stack[-1]
    return box


def storage_of(value: Any) -> Storage:
    """Read a persistent id: ('storage', type, key, device, items), and a None at the end in the old form."""
    items = value.items if isinstance(value, Box) and value.kind is tuple else []
    if (
        [type(item) for item in items[:5]] != [str, Global, str, str, int]
        or items[0] != "storage"
        or items[1].name not in ITEM_SIZES
        or items[4] < 0
        or items[5:] not in ([], [None])
    ):
        raise Refused("a tensor's numbers are described in an unknown form")
    return Storage(items[2], items[4], ITEM_SIZES[items[1].name])


def result_of(called: Any, arguments: list[Any]) -> Any:
    """Say what a call of the pickle gives, without calling anything."""
    if called == Global(ORDERED_DICT):
        made = Box(dict)
        for pair in pairs_of(arguments):
            made.set_items(pair)
        return made
    if called == Global(PARAMETER) and arguments and isinstance(arguments[0], Tensor) and no_hooks(arguments[1:]):
        return Tensor()
    if called not in map(Global, TENSORS) or not fits_storage(*arguments[:4]) or not no_hooks(arguments[4:]):
        raise Refused("it calls something else than PyTorch does, or a tensor is larger than its storage")
    return Tensor()


def pairs_of(arguments: list[Any]) -> list[list[Any]]:
    """Return the pairs of an OrderedDict that Python 2 wrote: OrderedDict([[key, value], ...]); none for OrderedDict()."""
    if not arguments:
        return []
    (pairs,) = arguments
    return [pair.items for pair in pairs.items]


def no_hooks(arguments: list[Any]) -> bool:
    """Whether what follows a tensor's numbers is `requires_grad` and empty tables: hooks would fail when it is saved."""
    return all(
        value is None or type(value) is bool or (isinstance(value, Box) and value.kind is dict and not value.items)
        for value in arguments
    )


def fits_storage(storage: Any, offset: Any, size: Any, stride: Any) -> bool:
    """Whether a tensor's elements all lie in its storage, each in a place of its own (an expanded tensor's do not)."""
    if not isinstance(storage, Storage) or not isinstance(size, Box) or not isinstance(stride, Box):
        return False
    numbers = [offset, *size.items, *stride.items]
    if len(size.items) != len(stride.items) or not all(type(number) is int and number >= 0 for number in numbers):
        return False
    if math.prod(size.items) == 0:
        return True
    last = offset + sum((count - 1) * step for count, step in zip(size.items, stride.items, strict=True))
    return math.prod(size.items) <= storage.items and last < storage.items
