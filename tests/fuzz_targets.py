"""What strangers' files are fuzzed with: for each reader a strategy of inputs, and what has to hold of each input.

`test_fuzz.py` tries some of them in each run of the tests, `benchmarks/fuzz.py` as many as one likes. A target
returns whether its input was accepted, raises AssertionError where something was let in that should not be,
and whatever else it raises is a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.checkpoints import SCHEMA, is_tensor, load_checkpoint, load_weights, require_trainable, save_checkpoint
from captioning.dataset import Tokens, Vocabulary, find_splits, pack_tokens, unpack_tokens
from captioning.decoders import build_decoder
from captioning.demo_set import read_boxes, score
from captioning.encoders import find_encoder
from captioning.features import FeatureFile, Version
from captioning.images import UnreadableImage, open_image
from captioning.io import CONTROL_CHARACTERS, UserError
from captioning.layouts import SPLITS, read_captions
from captioning.modes.export import model_card, write_model
from captioning.runs import find_checkpoint
from download_datasets import extract_archive
from experiment_utils import config_flags
from training_utils import Schedule, ScheduleSettings


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
    """`raw` after a few accidents: bytes changed, cut out, put in, said twice, and numbers that lie."""
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
    if is_tensor(value) and draw(st.booleans()):  # not one that has become odd already
        return draw(st.sampled_from([odd(value) for odd in ODD_TENSORS]))
    if isinstance(value, dict) and draw(st.booleans()):
        return value | {draw(names | numbers): draw(values)}
    return draw(values)


ODD_TENSORS: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t[:-1] if t.dim() else t.reshape(1),
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.long(),
    lambda t: t.flatten(),
    lambda t: t.unsqueeze(0),
    lambda t: torch.full_like(t, float("nan")),
    lambda t: torch.zeros(()).expand(t.shape),
    lambda t: torch.zeros(()).expand(10**6, 10**6),
    lambda t: torch.empty(10**6, 10**6, device="meta"),
    lambda t: torch.nn.Parameter(t),
    lambda t: t.to_sparse() if t.dim() else t,
    lambda t: t.tolist(),
    lambda t: t.to(torch.complex64),
]


# --------------------------------------------------------------------------------------------------
# Captions, splits, pictures


@st.composite
def caption_files(draw: st.DrawFn) -> tuple[str, bytes]:
    form = draw(st.sampled_from(["csv", "bars", "token", "karpathy"]))
    rows = draw(st.lists(st.tuples(mostly_sound, st.sampled_from(ODD_CAPTIONS) | st.text(max_size=20)), max_size=6))
    rows += [("a.jpg", "A dog ."), ("b.jpg", "Two dogs .")] if draw(st.booleans()) else []
    if form == "karpathy":
        images: list[Any] = [{"filename": n, "split": "train", "sentences": [{"raw": c}]} for n, c in rows]
        document = {"images": images} if draw(st.booleans()) else draw(altered({"images": images}))
        return "dataset.json", draw(mutated(json.dumps(document).encode(), 2))
    file, header, pattern = {
        "csv": ("captions.txt", draw(st.sampled_from(["image,caption", "caption,image", "image_name,n,comment", ""])), "{},{}"),
        "bars": ("results.csv", "image_name| comment_number| comment", "{}| 0| {}"),
        "token": ("Flickr8k.token.txt", "x.jpg#0\tA cat", "{}#0\t{}"),
    }[form]  # fmt: skip
    end = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
    text = end.join([header, *(pattern.format(*row) for row in rows)]) + draw(st.sampled_from([end, "", '"', "\x1a"]))
    return file, draw(mutated(text.encode(draw(st.sampled_from(ENCODINGS)), "replace"), 2))


def captions(value: tuple[str, bytes], folder: Path) -> bool:
    path = folder / value[0]
    path.write_bytes(value[1])
    read = refuses(lambda: read_captions(path))
    if read is None:
        return False
    found, notes = read
    for name, texts in found.groupby("image")["caption"]:
        parts = name.split("/")  # a file, or a file in one folder
        assert len(parts) <= 2 and all(os.path.basename(part) == part not in ("", ".", "..") for part in parts)
        assert not CONTROL_CHARACTERS.search(name)
        assert len(texts) and not any(CONTROL_CHARACTERS.search(text) or not text.strip() for text in texts)
        name.encode()
    assert not any(CONTROL_CHARACTERS.search(note) for note in notes)
    return True


@st.composite
def split_files(draw: st.DrawFn) -> tuple[dict[str, bytes], Any]:
    extra = st.sampled_from([[]] * 3) | st.lists(st.sampled_from([f"{i}.jpg" for i in range(6)]) | names, max_size=3)
    lists = {
        split: [*sound, *draw(extra)]
        for split, sound in zip(SPLITS, (["0.jpg", "1.jpg"], ["2.jpg"], ["3.jpg"]), strict=True)
    }
    saved = None
    files: dict[str, bytes] = {}
    match draw(st.sampled_from(["lists", "karpathy", "saved"])):
        case "lists":
            encoding = draw(st.sampled_from(ENCODINGS))
            for split in SPLITS:
                files[f"{split}.txt"] = draw(mutated("\r\n".join(lists[split]).encode(encoding, "replace"), 1))
        case "karpathy":
            images: list[Any] = [{"filename": name, "split": split} for split in SPLITS for name in lists[split]]
            document = {"images": images} if draw(st.booleans()) else draw(altered({"images": images}))
            files["dataset.json"] = draw(mutated(json.dumps(document).encode(), 1))
        case "saved":
            saved = {split: lists[split] for split in ("val", "test")}
    return files, saved


def splits(value: tuple[dict[str, bytes], Any], folder: Path) -> bool:
    files, saved = value
    for name, content in files.items():
        (folder / name).write_bytes(content)
    notes: list[str] = []
    known = [f"{i}.jpg" for i in range(6)]
    read = refuses(lambda: find_splits([folder], known, 0, saved, notes))
    if read is None:
        return False
    positions = np.concatenate([read[0][split] for split in SPLITS])
    assert len(set(positions.tolist())) == len(positions) <= 6 and all(len(read[0][split]) for split in SPLITS)
    return True


@cache
def pictures() -> list[bytes]:
    """A small picture in each form, one of them a progressive JPEG and one with a palette."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    forms: list[tuple[str, dict[str, Any], Image.Image]] = [
        ("JPEG", {}, noise), ("JPEG", {"progressive": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}, noise), ("PNG", {}, noise),
        ("PNG", {}, noise.quantize(16)), ("GIF", {}, noise), ("WEBP", {}, noise), ("BMP", {}, noise),
        ("TIFF", {"compression": "tiff_lzw"}, noise), ("TIFF", {}, noise.convert("L")),
    ]  # fmt: skip
    return [encoded(image, form, **options) for form, options, image in forms]


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(value: bytes, folder: Path) -> bool:
    (folder / "a.jpg").write_bytes(value)
    image = refuses(lambda: open_image(folder / "a.jpg", at_least=8), UnreadableImage)
    assert image is None or image.mode == "RGB"
    return image is not None


# --------------------------------------------------------------------------------------------------
# Archives


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    kinds = [tarfile.REGTYPE] * 6 + [
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
    ]
    contents = st.sampled_from([b"", b"content", bytes(30_000)])
    entries = draw(st.lists(st.tuples(names, st.sampled_from(kinds), contents), max_size=5))
    entries += [("good.jpg", tarfile.REGTYPE, b"good")]
    buffer = io.BytesIO()
    if draw(st.booleans()):
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, kind, content in entries:
                info = zipfile.ZipInfo(clean(name) or "empty")
                info.compress_type = draw(
                    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
                )
                mode = {tarfile.SYMTYPE: 0o120777, tarfile.CHRTYPE: 0o020666, tarfile.FIFOTYPE: 0o010666}.get(
                    kind, 0o100644
                )
                info.external_attr = mode << 16
                archive.writestr(info, content)
        return draw(mutated(buffer.getvalue()))
    form = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, kind, content in entries:
            entry = tarfile.TarInfo(clean(name))
            entry.type, entry.linkname = kind, draw(st.sampled_from(["/etc/passwd", "../evil", "good.jpg"]))
            entry.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(content))
    # Inside of the compression: a changed byte outside would only be a wrong checksum.
    raw = buffer.getvalue()
    raw = draw(mutated(raw)) if draw(st.booleans()) else repaired(draw(mutated(raw, 3)))
    packed = zlib.compressobj(wbits=31)
    whole = packed.compress(raw) + packed.flush()
    return whole if draw(st.integers(0, 3)) else draw(mutated(whole, 2))


def clean(name: str) -> str:
    return name.encode("utf-8", "replace").decode("utf-8")


def repaired(raw: bytes) -> bytes:
    """A tar whose headers have right checksums again, so that what else was changed in them is read."""
    data = bytearray(raw)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[at : at + 512]))[0]
    return bytes(data)


def archive(value: bytes, folder: Path) -> bool:
    (folder / "x").write_bytes(value)
    (folder / "sub").mkdir()
    out = folder / "sub" / "out"
    refuses(lambda: extract_archive(folder / "x", out, 20_000))
    written = [path for path in folder.rglob("*") if path not in (folder / "x", folder / "sub", out)]
    assert all(path.is_relative_to(out) and not path.is_symlink() for path in written)
    assert sum(path.stat().st_size for path in written if path.is_file()) <= 20_000
    assert not os.path.lexists("/evil") and not os.path.lexists(folder.parent / "evil")
    return out.exists()


# --------------------------------------------------------------------------------------------------
# Checkpoints and caches


@cache
def sound_checkpoint(name: str = "attention") -> dict[str, Any]:
    """A small checkpoint as training writes it, after one step of AdamW."""
    torch.manual_seed(0)
    flags = usual_flags() | {
        "decoder": name, "embed_size": 3, "hidden_size": 2, "num_layers": 1, "attention_dim": 2, "epochs": 1,
        "precision": "fp32",
    }  # fmt: skip
    words = ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "a", "dog"]
    decoder = build_decoder(flags, len(words), find_encoder("resnet50"))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = Schedule(ScheduleSettings("cosine", 1e-3, 1e-7, 3, 0.5, 7, 0.1, 10, 0, 0, 1, 5))
    return {
        "schema": SCHEMA, "epoch": 1, "decoder_type": name, "decoder": dict(decoder.state_dict()),
        "encoder": {"name": "resnet50", "weights_hash": "0676ba61", "transform": "squash224"},
        "optimizer": optimizer.state_dict(), "schedule": schedule.state(), "vocabulary": words,
        "flags": {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()},
        "split": {"val": ["a.jpg"], "test": ["b.jpg"]}, "scaler": {}, "decoding": None,
        "progress": {"first_epoch": 0, "step": 0, "loss_sum": 0.0, "reward_sum": 0.0, "tokens": 0},
        "loss_curve": {
            "epochs": [1], "training_losses": [2.0], "validation_losses": [2.0], "learning_rates": [1e-3],
        },
        "metrics_history": [{"epoch": 1, "split": "val", "cider": 0.5}],
        "best": {"score": 0.5, "epoch": 1, "metric": "cider"},
    }  # fmt: skip


@cache
def checkpoint_records() -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save(sound_checkpoint(), buffer)
    with zipfile.ZipFile(buffer) as records:
        return {name: records.read(name) for name in records.namelist()}


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as out:
        for name, content in records.items():
            out.writestr(name, content)
    return buffer.getvalue()


@st.composite
def checkpoint_files(draw: st.DrawFn) -> bytes:
    """Bytes changed in the file, or in one record of it with all checksums made right again."""
    records = checkpoint_records()
    if draw(st.integers(0, 3)) == 0:
        return draw(mutated(zipped(records)))
    pickled = next(name for name in records if name.endswith("data.pkl"))
    name = draw(st.just(pickled) | st.sampled_from(sorted(records)))
    return zipped(records | {name: draw(mutated(records[name], 3))})


def checkpoint_bytes(value: bytes, folder: Path) -> bool:
    (folder / "best.pt").write_bytes(value)
    return usable(folder / "best.pt")


def checkpoint_fields(value: Any, folder: Path) -> bool:
    torch.save(value, folder / "best.pt")
    return usable(folder / "best.pt")


def usable(path: Path) -> bool:
    """Whether a checkpoint is read; one that is has to serve for all that the program does with it."""
    checkpoint = refuses(lambda: load_checkpoint(path))
    if checkpoint is None:
        return False
    decoder = refuses(lambda: fill_decoder(checkpoint, path))
    if decoder is None:
        return False
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)
    optimizer.load_state_dict(checkpoint["optimizer"])
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if checkpoint["schedule"]:
        schedule = Schedule.from_state(checkpoint["schedule"])
        schedule.epoch_ended(1.0)
        assert schedule.rate(checkpoint["epoch"], 1) >= 0 and schedule.describe()
    if checkpoint["split"]:
        refuses(lambda: find_splits([], ["a.jpg", "b.jpg", "c.jpg"], 0, checkpoint["split"], []))
    save_checkpoint(path, checkpoint)
    json.dumps([checkpoint["loss_curve"], checkpoint["metrics_history"], checkpoint["best"]])
    return True


@cache
def exported_files() -> dict[str, bytes]:
    """A small exported model as `--mode export` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(sound_checkpoint(), Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@st.composite
def exported_models(draw: st.DrawFn) -> dict[str, bytes]:
    """One of its files with bytes or fields changed, most often with checksums that were made right again."""
    files = dict(exported_files())
    name = draw(st.sampled_from(sorted(files)))
    if name.endswith(".json") and draw(st.integers(0, 3)):
        files[name] = json.dumps(draw(altered(json.loads(files[name])))).encode("utf-8", "surrogatepass")
    else:
        files[name] = draw(mutated(files[name], 3))
    if name != "config.json" and draw(st.integers(0, 3)):
        config = json.loads(files["config.json"])
        config["sha256"][name] = hashlib.sha256(files[name]).hexdigest()
        files["config.json"] = json.dumps(config).encode()
    return files


def exported_model(value: dict[str, bytes], folder: Path) -> bool:
    for name, content in value.items():
        (folder / name).write_bytes(content)
    with contextlib.redirect_stdout(io.StringIO()):
        path = find_checkpoint(folder)
    checkpoint = refuses(lambda: load_checkpoint(path))
    if checkpoint is None:
        return False
    refuses(lambda: require_trainable(checkpoint, path))
    if checkpoint["split"]:
        refuses(lambda: find_splits([], ["a.jpg", "b.jpg", "c.jpg"], 0, checkpoint["split"], []))
    if refuses(lambda: fill_decoder(checkpoint, path)) is None:
        return False
    (folder / "again").mkdir()
    write_model(checkpoint, folder / "again")
    assert (
        model_card(checkpoint, [], []) and load_checkpoint(folder / "again" / path.name)["flags"] == checkpoint["flags"]
    )
    return True


def fill_decoder(checkpoint: dict[str, Any], path: Path) -> torch.nn.Module:
    flags = checkpoint["flags"]
    decoder = build_decoder(flags, len(Vocabulary(checkpoint["vocabulary"])), find_encoder(flags["encoder"]))
    load_weights(decoder, checkpoint["decoder"], path)
    return decoder


@st.composite
def shape_tables(draw: st.DrawFn) -> bytes:
    sound = {"a.jpg": [{"shape": "star", "color": "red", "size": "small", "box": [0.1, 0.1, 0.3, 0.3]}], "b.jpg": []}
    return draw(mutated(json.dumps(draw(altered(sound))).encode("utf-8", "surrogatepass"), 1))


def shape_table(value: bytes, folder: Path) -> bool:
    (folder / "shapes.json").write_bytes(value)
    boxes = refuses(lambda: read_boxes(folder / "shapes.json"))
    if boxes is None:
        return False
    for scene in boxes.values():
        score([["a", "star"]], [np.full((2, 49), 1 / 49)], [scene])
    return True


@st.composite
def cache_indices(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    sound = [[f"{i}.jpg", i, 100, 10**18, 5, 7] for i in range(draw(st.integers(0, 4)))]
    lines = [draw(altered(line)) if draw(st.integers(0, 2)) == 0 else line for line in sound]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    text += draw(
        st.sampled_from(
            [b"", b"[" * 3000 + b"\n", b'["a", Infinity, 1, 1, 1, 1]\n', b'["a", NaN, 1, 1, 1, 1]\n', b"null\n"]
        )
    )
    return draw(mutated(text, 2)), draw(st.lists(st.integers(0, 60), max_size=3))


def cache_index(value: tuple[bytes, list[int]], folder: Path) -> bool:
    index, sizes = value
    (folder / "grid.jsonl").write_bytes(index)
    for number, size in enumerate(sizes):
        (folder / f"grid.{number:03d}.f16").write_bytes(bytes(size))
    store = FeatureFile(folder, "grid", (2, 3))
    known = dict(store.entries)
    for entry in known.values():
        assert store.maps()[0][entry.row].shape == (2, 3) and np.array(entry.checksum, dtype=np.int64) >= 0
    store.append(["new.jpg"], [Version(1, 2, 3)], np.ones((1, 2, 3), dtype=np.float16))
    again = FeatureFile(folder, "grid", (2, 3))
    assert again.entries == store.entries and (again.maps()[0][again.entries["new.jpg"].row] == 1).all()
    return bool(known)


SOUND_TOKENS = pack_tokens(
    Tokens(["a", "dog", "runs", "cat"], np.array([0, 1, 2, 0, 3], np.int32), np.array([0, 3, 3, 5], np.int64))
)


@st.composite
def token_files(draw: st.DrawFn) -> bytes:
    """A cache with accidents, most of them with a checksum that was made right again."""
    raw = draw(mutated(SOUND_TOKENS, 3))
    if len(raw) >= 28 and draw(st.integers(0, 3)):
        raw = raw[:24] + struct.pack("<I", zlib.crc32(raw[28:])) + raw[28:]
    return raw


def token_cache(value: bytes, folder: Path) -> bool:
    tokens = unpack_tokens(value, 3)
    if tokens is None:
        return False
    for start, end in zip(tokens.offsets, tokens.offsets[1:], strict=False):
        assert all(tokens.words[i] is not None for i in tokens.ids[start:end])
    return True


# --------------------------------------------------------------------------------------------------
# Run directories and --config


@st.composite
def run_trees(draw: st.DrawFn) -> tuple[list[list[str]], list[str]]:
    part = st.sampled_from(["best.pt", "model_epoch_1.pt", "flickr8k", "run_20241201_143022", "dry_run_x"]) | names
    paths = st.lists(part, min_size=1, max_size=3)
    return draw(st.lists(paths, max_size=4)), draw(paths)


def run_directory(value: tuple[list[list[str]], list[str]], folder: Path) -> bool:
    tree, wanted = value
    base = folder / "saved_models"
    base.mkdir()
    for parts in tree:
        with contextlib.suppress(OSError, ValueError):  # names that no file can have
            path = base.joinpath(*(part.replace("/", "_").replace("..", "_") for part in parts))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        found = refuses(lambda: find_checkpoint(base.joinpath(*(part.lstrip("/") for part in wanted))), lines=2)
    assert found is None or found.is_file()
    return found is not None


@cache
def usual_flags() -> dict[str, Any]:
    return vars(trainer.get_parser().parse_args([]))


@st.composite
def config_files(draw: st.DrawFn) -> tuple[str, bytes]:
    usual = usual_flags()
    known = st.sampled_from([*usual, "decoder_type", "timestamp", "help"])
    flags = draw(st.dictionaries(known if draw(st.integers(0, 3)) else names, values, max_size=2))
    flags |= {name: usual[name] for name in draw(st.lists(st.sampled_from(list(usual)), max_size=5))}
    text = json.dumps(flags, default=str).encode()
    odd = [
        b"",
        b"[" * 5000,
        b"a: &a [*a]\n",
        b"epochs: !!bool x\n",
        b"seed: 0x" + b"f" * 6000,
        b"a: !!timestamp x\n",
        b"&a *a",
    ]
    raw = draw(st.sampled_from([text, text, draw(mutated(text, 2)), draw(st.sampled_from(odd))]))
    return draw(st.sampled_from(["c.json", "c.yaml"])), raw


def config(value: tuple[str, bytes], folder: Path) -> bool:
    path = folder / value[0]
    path.write_bytes(value[1])
    parser = trainer.get_parser()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            flags = refuses(lambda: config_flags(parser, path))
    except SystemExit as stopped:
        assert stopped.code == 2 and said.getvalue().count("\n") == 2, said.getvalue()  # usage, and one line
        return False
    if flags is None:
        return False
    for name, flag in flags.items():
        action = next(action for action in parser._actions if action.dest == name)
        assert isinstance(flag, bool) == isinstance(action, argparse._StoreTrueAction)
        assert isinstance(flag, bool | int | float | str | Path) or (action.nargs == "+" and isinstance(flag, list))
    return True


TARGETS = {
    "captions file": Target(caption_files(), captions),
    "split lists": Target(split_files(), splits),
    "picture": Target(st.sampled_from(range(9)).flatmap(lambda i: mutated(pictures()[i])), picture),
    "archive": Target(archives(), archive),
    "checkpoint bytes": Target(checkpoint_files(), checkpoint_bytes),
    "checkpoint fields": Target(st.builds(sound_checkpoint).flatmap(altered), checkpoint_fields),
    "exported model": Target(exported_models(), exported_model),
    "shapes of the demo set": Target(shape_tables(), shape_table),
    "cache index": Target(cache_indices(), cache_index),
    "token cache": Target(token_files(), token_cache),
    "run directory": Target(run_trees(), run_directory),
    "--config": Target(config_files(), config),
}
