"""What strangers' files are fuzzed with: for each reader a strategy of inputs, and what has to hold of each input.

`test_fuzz.py` tries some of them in each run of the tests, `benchmarks/stress.py` as many as one likes. A target
returns whether its input was accepted, raises AssertionError where something was let in that should not be,
and whatever else it raises is a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
import zipfile
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fuzz_inputs import ENCODINGS, ODD_CAPTIONS, Target, altered, mostly_sound, mutated, names, refuses, values
from hypothesis import strategies as st
from PIL import Image
from tiny_encoder import SPEC, in_place_of_resnet50

from captioning.config.flags import FLAGS
from captioning.config.settings import config_flags, get_parser, parse_flags
from captioning.data.dataset import Vocabulary
from captioning.data.images import UnreadableImage, open_image
from captioning.data.layouts import SPLITS, read_captions
from captioning.data.splits import find_splits, is_stored
from captioning.decoders.base import build_decoder
from captioning.encoders import base as encoders
from captioning.encoders.base import find_encoder
from captioning.io import CONTROL_CHARACTERS, EXPORTED_WEIGHTS, UserError
from captioning.models.exported import ExportedModel, open_graph
from captioning.models.graphs import check_graph, stored_tensors
from captioning.modes import export
from captioning.runs.checkpoints import (
    SCHEMA,
    load_checkpoint,
    load_decoder_weights,
    require_trainable,
    save_checkpoint,
)
from captioning.runs.directories import find_checkpoint
from captioning.runs.forms import GRAPHS, read_exported
from captioning.training.schedules import Schedule, ScheduleSettings

with contextlib.suppress(UserError):  # where FastAPI is not installed, the page's reader is not tried
    from captioning.modes import serve

    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # as the page does


# --------------------------------------------------------------------------------------------------
# Captions and splits


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
    saved: Any = None
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
            saved = stored_split(**lists)
    return files, saved


def stored_split(**lists: list[str]) -> dict[str, Any]:
    """The stored form of a split of images whose sizes are the lengths of their names."""
    return {
        split: {"names": part, "sizes": [len(name) for name in part], "hashes": [7] * len(part)}
        for split, part in {**lists, "inherited": ["old.jpg"]}.items()
    }


def splits(value: tuple[dict[str, bytes], Any], folder: Path) -> bool:
    files, saved = value
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sound = saved is None or is_stored(saved)  # which the reader of checkpoints has made sure of
    return sound and split_names([f"{i}.jpg" for i in range(6)], [folder], saved) is not None


def split_names(known: list[str], places: list[Path], saved: Any) -> dict[str, list[str]] | None:
    """Split these images, whose sizes are the lengths of their names; return the names, or None if that is refused."""
    notes: list[str] = []
    read = refuses(lambda: find_splits(places, known, [len(name) for name in known], 0, saved, notes))
    if read is None:
        return None
    positions = np.concatenate([read[0][split] for split in SPLITS])
    assert len(set(positions.tolist())) == len(positions) <= len(known) and all(
        len(read[0][split]) for split in ("train", "val")
    )
    assert not any(CONTROL_CHARACTERS.search(note) for note in notes)
    return {split: [known[i] for i in images] for split, images in read[0].items()}


# --------------------------------------------------------------------------------------------------
# Pictures


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
# Checkpoints, exported models, encoder weights


@cache
def sound_checkpoint(name: str = "attention") -> dict[str, Any]:
    """A small checkpoint as training writes it, after one step of AdamW."""
    torch.manual_seed(0)
    sizes = {"embed_size": 3, "hidden_size": 2, "num_layers": 1, "attention_dim": 2, "num_heads": 1, "epochs": 1}
    flags = parse_flags([]).with_values(decoder=name, precision="fp32", **sizes).stored()
    words = ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "a", "dog"]
    decoder = build_decoder(flags, len(words), find_encoder("resnet50"))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = Schedule(ScheduleSettings("cosine", 1e-3, 1e-7, 3, 0.5, 7, 0.1, 10, 0, 0, 1, 5))
    return {
        "schema": SCHEMA, "epoch": 1, "decoder": dict(decoder.state_dict()),
        "encoder": {"name": "resnet50", "weights_hash": "0676ba61", "transform": "squash224"},
        "optimizer": optimizer.state_dict(), "schedule": schedule.state(), "vocabulary": words,
        "flags": flags, "split": stored_split(train=["c.jpg"], val=["a.jpg"], test=["b.jpg"]), "scaler": {}, "decoding": None, "consensus": None,
        "confidence": {"beam": {"scores": [-2.0, -1.0], "shares": [0.25, 0.75], "images": 100}},
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
    optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if checkpoint["schedule"]:
        schedule = Schedule.from_state(checkpoint["schedule"])
        schedule.epoch_ended(1.0)
        assert schedule.rate(checkpoint["epoch"], 1) >= 0 and schedule.describe()
    split_names(["a.jpg", "b.jpg", "c.jpg"], [], checkpoint["split"])
    save_checkpoint(path, checkpoint)
    json.dumps([checkpoint["loss_curve"], checkpoint["metrics_history"], checkpoint["best"]])
    return True


@cache
def tensor_file(old_form: bool) -> bytes:
    """The weights of a small layer, in a file of either form."""
    buffer = io.BytesIO()
    torch.manual_seed(0)
    torch.save(torch.nn.Linear(2, 3).state_dict(), buffer, _use_new_zipfile_serialization=not old_form)
    return buffer.getvalue()


def encoder_weights(value: bytes, folder: Path) -> bool:
    """A file of weights, of which only this layer's are accepted."""
    (folder / "x.pth").write_bytes(value)
    layer = torch.nn.Linear(2, 3)
    return refuses(lambda: encoders.load_encoder_weights(layer, folder / "x.pth") or True) is not None


@cache
def exported_files(name: str = "attention") -> dict[str, bytes]:
    """A small exported model as `--mode export` writes it, most of whose weights lie in `model.safetensors`."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(export, "SMALL", 16):
        checkpoint, graphs = exported_parts(name)
        export.write_model(checkpoint, Path(folder), graphs)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@cache
def exported_checkpoint(name: str) -> dict[str, Any]:
    """A small checkpoint on the small encoder."""
    with in_place_of_resnet50():
        checkpoint: dict[str, Any] = sound_checkpoint.__wrapped__(name)
    checkpoint["encoder"]["transform"] = SPEC.transform
    return checkpoint


@cache
def exported_parts(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A small checkpoint on the small encoder, and its graphs."""
    with in_place_of_resnet50():
        return exported_checkpoint(name), export.make_graphs(exported_checkpoint(name), None, Path("best.pt"))


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
    facts = refuses(lambda: read_exported(path))
    if facts is not None:
        refuses(lambda: ExportedModel(facts, path))
    with in_place_of_resnet50():
        checkpoint = refuses(lambda: load_checkpoint(path))
        if checkpoint is None:
            return False
        assert facts is not None
        refuses(lambda: require_trainable(checkpoint, path))
        split_names(["a.jpg", "b.jpg", "c.jpg"], [], checkpoint["split"])
        if refuses(lambda: fill_decoder(checkpoint, path)) is None:
            return False
        (folder / "again").mkdir()
        export.write_model(checkpoint, folder / "again", exported_parts("attention")[1])
        assert export.model_card(checkpoint, [])
        assert load_checkpoint(folder / "again" / path.name)["flags"] == checkpoint["flags"]
    return True


@st.composite
def graphs(draw: st.DrawFn) -> bytes:
    """Any bytes, or a graph with bytes changed, or with another number, size or name in one of its messages."""
    content = exported_files()[draw(st.sampled_from(GRAPHS))]
    match draw(st.sampled_from(["bytes", "mutated", "mutated", "swapped"])):
        case "bytes":
            return draw(st.binary(max_size=40))
        case "swapped":  # two names of the same length, so that all sizes stay right
            names = [
                each for each in (b"Mul", b"Add", b"Sub", b"Div", b"Exp", b"Pow", b"Max", b"Log") if each in content
            ]
            parts = content.split(old := draw(st.sampled_from(names or [b"e"])))
            at = draw(st.integers(1, max(1, len(parts) - 1)))
            new = draw(st.sampled_from([b"Mod", b"Not", b"Cos", b"Sum", b"Nop"]) if names else st.just(b"e"))
            return old.join(parts[:at]) + new + old.join(parts[at:])
    return draw(mutated(content, 2))


def graph(value: bytes, folder: Path) -> bool:
    """Whether a graph is let pass; ONNX Runtime loads one that is, or we say that it cannot."""
    (folder / "step.onnx").write_bytes(value)
    (folder / EXPORTED_WEIGHTS).write_bytes(exported_files()[EXPORTED_WEIGHTS])
    tensors = stored_tensors(folder / EXPORTED_WEIGHTS)
    passes = refuses(lambda: check_graph(value, folder / "step.onnx", tensors) or True) is not None
    loaded = refuses(lambda: open_graph(folder / "step.onnx", tensors))
    assert passes or loaded is None
    return passes


def fill_decoder(checkpoint: dict[str, Any], path: Path) -> torch.nn.Module:
    flags = checkpoint["flags"]
    decoder = build_decoder(flags, len(Vocabulary(checkpoint["vocabulary"])), find_encoder(flags["encoder"]))
    load_decoder_weights(decoder, checkpoint["decoder"], path)
    return decoder


# --------------------------------------------------------------------------------------------------
# --config and run_config.json


@st.composite
def config_files(draw: st.DrawFn) -> tuple[str, bytes]:
    known = st.sampled_from([*FLAGS, "decoder_type", "timestamp", "help"])
    defaults = {name: False if flag.switch else flag.default for name, flag in FLAGS.items()}
    flags = draw(st.dictionaries(known if draw(st.integers(0, 3)) else names, values, max_size=2))
    flags |= {name: defaults[name] for name in draw(st.lists(st.sampled_from(list(FLAGS)), max_size=5))}
    if draw(st.booleans()):  # as this program writes it, most often with a list of the explicit flags
        flags |= {"command": "python x.py", "timestamp": "20241201_143022"}
        explicit = st.lists(st.sampled_from(list(FLAGS)) | values, max_size=4)
        flags |= {"explicit": draw(explicit | values)} if draw(st.integers(0, 3)) else {}
    text = json.dumps(flags, default=str).encode("utf-8", "surrogatepass")
    odd = [
        b"", b"[" * 5000, b"a: &a [*a]\n", b"epochs: !!bool x\n", b"seed: 0x" + b"f" * 6000, b"a: !!timestamp x\n", b"&a *a",
        b"? [a]\n: 1\n", b"? {a: b}\n: 1\n", b"explicit: [[seed]]\nseed: 1\n", b"explicit: [{}]\nseed: 1\n",
    ]  # fmt: skip
    raw = draw(st.sampled_from([text, text, draw(mutated(text, 2)), draw(st.sampled_from(odd))]))
    return draw(st.sampled_from(["run_config.json", "c.yaml"])), raw


def config(value: tuple[str, bytes], folder: Path) -> bool:
    """A file of flags, read by itself, as `--config`, and as the flags of an interrupted run."""
    path = folder / value[0]
    path.write_bytes(value[1])
    read = exits_or_refuses(lambda: config_flags(get_parser(), path))
    for argv in (["--config", str(path)], ["--resume", str(folder)]):
        settings = exits_or_refuses(partial(parse_flags, argv))
        assert settings is None or settings.explicit <= FLAGS.keys()
    if read is None:
        return False
    flags, explicit = read
    assert explicit <= flags.keys()
    for name, flag in flags.items():
        assert isinstance(flag, bool) == FLAGS[name].switch
        assert isinstance(flag, bool | int | float | str | Path) or (FLAGS[name].many and isinstance(flag, list))
    return True


def exits_or_refuses(call: Any) -> Any:
    """The result of `call`, or None where it refuses or the parser exits, with a line for the usage and one more."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return refuses(call)
    except SystemExit as stopped:
        lines = [line for line in output.getvalue().splitlines() if not line.startswith("Note: ")]
        assert stopped.code == 2 and len(lines) == 2, output.getvalue()
        return None


# --------------------------------------------------------------------------------------------------
# The page


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """A content type and the pieces of a body: an image, or a form of some parts."""
    image = draw(mutated(draw(st.sampled_from(pictures())), 3))
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(["", "image/jpeg", "multipart", "application/x-www-form-urlencoded"])), [image]
    dispositions = ['form-data; name="image"; filename="a.jpg"', 'form-data; name="x"', 'form-data; filename="a"',
                    "form-data", "", 'form-data; name="\xff"; filename*=UTF-8\'\'%ff', "x" * 5000]  # fmt: skip
    parts = draw(st.lists(st.tuples(st.sampled_from(dispositions), st.sampled_from([image, b"", b"3"])), max_size=3))
    body = b"".join(
        b"--b\r\nContent-Disposition: " + head.encode() + b"\r\n\r\n" + content + b"\r\n"
        for head, content in [(dispositions[0], image), *parts]
    )
    body = draw(mutated(body + b"--b--\r\n", 3))
    cut = draw(st.integers(0, len(body)))
    kinds = ["multipart/form-data; boundary=b"] * 6 + [
        "multipart/form-data", "multipart/form-data; boundary=", "Multipart/Form-Data; boundary=\xff",
        'multipart/form-data; charset=x; boundary="b"', "multipart/form-data; boundary=b; charset=utf-7",
    ]  # fmt: skip
    return draw(st.sampled_from(kinds)), [body[:cut], body[cut:]]


def upload(value: tuple[str, list[bytes]], folder: Path) -> bool:
    """The body of `POST /caption`: an HTTP error in one line, or bytes whose header is that of an image or refused."""
    kind, pieces = value
    messages = iter([{"type": "http.request", "body": piece, "more_body": True} for piece in pieces])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.request", "body": b"", "more_body": False})

    headers = [(b"content-type", kind.encode("latin-1"))]
    request = serve.Request({"type": "http", "method": "POST", "path": "/caption", "headers": headers}, receive)
    try:
        content = asyncio.run(serve.read_image(request))
    except serve.HTTPException as error:
        assert 400 <= error.status_code < 500 and not CONTROL_CHARACTERS.search(error.detail)
        return False
    assert isinstance(content, bytes) and len(content) <= sum(map(len, pieces))
    return refuses(lambda: serve.check_upload(io.BytesIO(content)) or True, UnreadableImage) is not None


TARGETS = {
    "captions file": Target(caption_files(), captions),
    "split lists": Target(split_files(), splits),
    "picture": Target(st.sampled_from(range(9)).flatmap(lambda i: mutated(pictures()[i])), picture),
    "checkpoint bytes": Target(checkpoint_files(), checkpoint_bytes),
    "checkpoint fields": Target(st.builds(sound_checkpoint).flatmap(altered), checkpoint_fields),
    "encoder weights": Target(st.booleans().flatmap(lambda old: mutated(tensor_file(old), 3)), encoder_weights),
    "exported model": Target(exported_models(), exported_model),
    "graph": Target(graphs(), graph),
    "file of flags": Target(config_files(), config),
}
if "serve" in globals():
    TARGETS["upload to the page"] = Target(requests(), upload)
