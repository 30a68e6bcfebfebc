"""Generic parts of the fuzz targets: odd names, numbers and texts, and strategies that damage bytes and structures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from captioning.io import CONTROL_CHARACTERS, UserError


class Target(NamedTuple):
    """A reader under test."""

    inputs: st.SearchStrategy[Any]
    accepts: Callable[[Any, Path], bool]  # takes an input and an empty directory of its own


def tried(target: Target, value: Any) -> bool:
    """Run a target on one input in a directory that vanishes again."""
    with tempfile.TemporaryDirectory() as folder:
        return target.accepts(value, Path(folder))


def refuses(call: Callable[[], Any], refusal: type[Exception] = UserError, lines: int = 1) -> Any:
    """The result of `call`, or None where it refuses, which it has to do in a line that can be printed."""
    try:
        return call()
    except refusal as error:
        text = str(error)
        assert text and not CONTROL_CHARACTERS.search(text.replace("\n", "") if lines > 1 else text), f"{text!r}"
        return None


# --------------------------------------------------------------------------------------------------
# Strategies

ODD_NUMBERS = [0, 1, 2, -1, -512, 127, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64, 10**40]
ODD_NAMES = [
    "a.jpg", "b.jpg", "A.JPG", "a b.jpg", "a'b.jpg", 'a"b.jpg', "a,b.jpg", "a|b.jpg", "a#1.jpg", "a\nb.jpg", "a\tb.jpg",
    "ü.jpg", "u\u0308.jpg", "\U0001f415.jpg", "\u202egpj.a", "a\u2028b", "..", ".", "", " ", "../evil", "a/../../evil",
    "/evil", "a/b.jpg", "a\\b.jpg", "..\\evil", "C:/evil", "C:evil", "\\\\server\\evil", "n" * 300, "a\0b", "a.jpg/.",
    "~", "-rf", "*", "[a", "**", "a**", "NUL", "a.jpg ", "\x1b[2J", "\x7f", "\x85",
]  # fmt: skip
ODD_CAPTIONS = [
    "a dog", "dog", "", " ", "...", '"a ""big"" dog"', '"a dog', 'a "big" dog', "'a dog'", '"a\ndog"', "a, b, c", "a|b",
    "None", "a\tdog", "a\x07dog", "a\x1b[31mdog", "\ufeffa dog", "日本語", "a\u0301", "\U0001f415", "a\0b", "word " * 10_000,
    "\u2028", "x" * 140_000, "=1+1",
]  # fmt: skip
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"]
names = st.sampled_from(ODD_NAMES) | st.text(max_size=8)
mostly_sound = st.sampled_from(["a.jpg", "b.jpg", "c d.jpg", "e,f.jpg", "ü.jpg"] * 4) | names
numbers = st.sampled_from(ODD_NUMBERS) | st.integers(-5, 5)
scalars = (
    st.none()
    | st.booleans()
    | numbers
    | st.floats()
    | names
    | st.sampled_from(["lstm", "cosine", "1e-3", "nan", "[", "{}"])
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=5
)


@st.composite
def mutated(draw: st.DrawFn, raw: bytes, most: int = 5) -> bytes:
    """`raw` after a few accidents: bytes changed, cut out, put in, repeated, and false numbers."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "number", "cut", "insert", "repeat", "end"])):
            case "flip":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "number":
                order, size = draw(st.sampled_from(["<", ">"])), draw(st.sampled_from([1, 2, 4, 8]))
                number = draw(numbers) % (1 << 8 * size)
                data[at : at + size] = number.to_bytes(size, "little" if order == "<" else "big")
            case "cut":
                del data[at : at + draw(st.integers(1, 40))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=12))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 200))]
            case "end":
                del data[at:]
    return bytes(data)


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A copy of nested dicts and lists in which one or two things are gone, others, or too many."""
    for _ in range(draw(st.integers(1, 2))):
        value = alter_once(draw, value)
    return value


def alter_once(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, dict | list) and value and draw(st.integers(0, 6)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        changed = dict(value) if isinstance(value, dict) else list(value)
        if draw(st.integers(0, 7)) == 0:
            del changed[key]
        else:
            changed[key] = alter_once(draw, value[key])
        return changed
    if is_sound(value) and draw(st.booleans()):
        return draw(st.sampled_from([odd(value) for odd in ODD_TENSORS]))
    if isinstance(value, dict) and draw(st.booleans()):
        return value | {draw(names | numbers): draw(values)}
    return draw(values)


def is_sound(value: Any) -> bool:
    """Return whether this is a small tensor as we save them, not one that has become odd already."""
    if type(value) is not torch.Tensor or value.dtype != torch.float32:
        return False
    return value.is_cpu and value.layout == torch.strided and value.numel() < 10**4


ODD_TENSORS: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t[:-1] if t.dim() else t.reshape(1),
    lambda t: t.double(),
    lambda t: t.flatten(),
    lambda t: torch.full_like(t, float("nan")),
    lambda t: torch.zeros(()).expand(t.shape),
    lambda t: torch.zeros(()).expand(10**6, 10**6),
    lambda t: torch.empty(10**6, 10**6, device="meta"),
    lambda t: torch.nn.Parameter(t),
    lambda t: t.to_sparse() if t.dim() else t,
    lambda t: t.tolist(),
    lambda t: t.to(torch.complex64),
]
