"""Measure how fast the project is on this machine; each figure stands beside a naive way and a physical limit.

    python benchmarks/bench.py --quick                          # some minutes, on generated data
    python benchmarks/bench.py --data_dir data/flickr8k         # everything, with real captions and JPEGs
    python benchmarks/bench.py --only decoding,startup --output FILE.json

The naive way is the original's: every image goes through the encoder again for every caption and epoch, captions are
padded, and one image is captioned at a time. All that one table compares is measured in the same call. The ways take
turns, so that a busy moment of the machine slows down all of them, and the median of the rounds counts, after a round
that warms up. Let nothing else run at the same time. A CUDA device is measured where PyTorch sees one.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning import Captioner
from captioning.config.settings import parse_flags
from captioning.data.dataset import load_caption_set
from captioning.decoding.consensus import NgramHead
from captioning.encoders.base import find_encoder
from captioning.runs.forms import read_exported
from captioning.training.building import build_data, build_features
from captioning.training.caption_set import caption

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "flickr_image_caption_with_pytorch_resnet_lstm.py"
VIEWS = 6  # of --views all
BATCH = 128  # captions of a training step
WORDS, CAPTIONS_EACH = 3500, 5  # about Flickr8k's, in generated data
PICTURES = 64  # distinct generated ones
COPIED = 2**27  # bytes: more than a processor caches
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Scale:
    """How much is measured. Figures are rates, so that the scales can be compared."""

    repeats: int  # rounds that count; 0: the first one counts
    encoded: dict[str, int]  # images of the encoding pass, by encoder
    naive: int  # images of the naive encoding
    trained: list[tuple[str, int, int]]  # decoder, hidden size, layers
    encoder: str  # whose features they are trained on
    images: int  # of the data set that they are trained on
    epochs: int  # trained before decoding: an untrained decoder never ends a caption
    decoded: int  # images captioned in a batch
    alone: int  # images captioned one at a time
    beams: tuple[int, ...]
    memory: tuple[int, ...]  # images of the data sets
    matmul: int  # rows and columns of the large matrix product


SMALL, DEFAULT = [(name, 512, 1) for name in ("lstm", "attention")], [(name, 1024, 3) for name in ("lstm", "attention")]
FULL = Scale(
    repeats=5, encoded={"efficientnet_lite0": 512, "resnet50": 64}, naive=16, trained=SMALL + DEFAULT,
    encoder="resnet50", images=420, epochs=20, decoded=1000, alone=40, beams=(1, 3, 5, 20), memory=(1_000, 8_000),
    matmul=4096,
)  # fmt: skip
QUICK = Scale(
    repeats=1, encoded={"efficientnet_lite0": 64, "resnet50": 16}, naive=4, trained=SMALL, encoder="resnet50",
    images=140, epochs=20, decoded=100, alone=8, beams=(1, 5), memory=(250, 2_000), matmul=4096,
)  # fmt: skip
TINY = Scale(
    repeats=0, encoded={"efficientnet_lite0": 3}, naive=1, trained=[("attention", 24, 1)],
    encoder="efficientnet_lite0", images=14, epochs=1, decoded=2, alone=1, beams=(2,), memory=(14,), matmul=512,
)  # fmt: skip


@dataclass
class Bench:
    """What is measured, and where generated data, caches and runs lie."""

    scale: Scale
    device: torch.device
    folder: Path
    data_dir: Path | None  # real captions and images, or None to generate some


@dataclass
class Figure:
    """A row of the table: a rate (its unit ends in /s), or a time or a size, of which less is better."""

    name: str
    value: float
    unit: str
    naive: float
    naive_way: str
    limit: float
    limited_by: str

    @property
    def times(self) -> float:
        """How many times better than the naive way."""
        return self.value / self.naive if self.unit.endswith("/s") else self.naive / self.value

    @property
    def share(self) -> float:
        """How much of what the limit allows is reached: physically, at most 1."""
        return self.value / self.limit if self.unit.endswith("/s") else self.limit / self.value

    def print(self) -> None:
        print(
            f"{self.name:<44}{f'{self.value:.4g} {self.unit}':>18}{self.naive:>10.4g}{self.times:>8.1f}"
            f"{self.limit:>10.4g}{self.share:>9.0%}  {self.naive_way}; {self.limited_by}",
            flush=True,
        )


# --------------------------------------------------------------------------------------------------
# Measuring


def interleaved(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each way. Every round runs each once; the first one is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for counted in [False, *[True] * repeats] if repeats else [True]:
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def matrix_product(bench: Bench, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], float]:
    """Return a large matrix product to be timed, and its floating-point operations."""
    size = bench.scale.matmul
    left, right = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
    return lambda: left @ right, 2.0 * size**3


def operations(call: Callable[[], object]) -> float:
    """Return the floating-point operations of the matrix products and convolutions of a call."""

    def in_place(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
        return 2 * left[0] * left[1] * right[1]

    mapping = {torch.ops.aten.addmm_: in_place}  # which PyTorch's counter does not know
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return float(counter.get_total_flops())


def run_program(*command: object, python: Path | str = sys.executable, folder: Path = ROOT) -> None:
    """Run Python in a process of its own."""
    subprocess.run([python, *map(str, command)], cwd=folder, stdout=subprocess.DEVNULL, check=True)


def peak_memory(*command: object) -> float:
    """Run Python in a process of its own; return its peak of anonymous memory, so without mapped files, in MB."""
    peak = 0
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(int(line.split()[1]) for line in lines)])
            time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return peak / 1024


# --------------------------------------------------------------------------------------------------
# Data


def data_set(bench: Bench, count: int) -> Path:
    """Return a data set of so many images, 6/7 of them for training as in Flickr8k: real ones, or generated."""
    folder = bench.folder / f"data{count}"
    if folder.is_dir():
        return folder
    if bench.data_dir:
        real = load_caption_set(bench.data_dir)
        count = min(count, len(real.names))
        pictures, captions = real.paths()[:count], [real.references(image) for image in range(count)]
    else:
        pictures, captions = draw_pictures(bench.folder / "pictures", min(count, PICTURES)), made_up_captions(count)
    (folder / "Images").mkdir(parents=True)
    names = [f"image{number:06d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        shutil.copyfile(pictures[number % len(pictures)], folder / "Images" / name)
    with open(folder / "captions.txt", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        rows.writerows((name, text) for name, each in zip(names, captions, strict=True) for text in each)
    held = max(1, count // 14)
    parts = {"train": names[: -2 * held], "val": names[-2 * held : -held], "test": names[-held:]}
    for split, part in parts.items():
        (folder / f"{split}.txt").write_text("\n".join(part) + "\n")
    return folder


def made_up_captions(images: int) -> list[list[str]]:
    """Return captions of 11 words on average, of which every one of WORDS comes once and the others by Zipf's law."""
    random, count = np.random.default_rng(0), images * CAPTIONS_EACH
    lengths = 4 + random.poisson(7, count)
    frequencies = 1 / (np.arange(WORDS) + 3.0)
    numbers = random.choice(WORDS, lengths.sum(), p=frequencies / frequencies.sum())
    numbers[:WORDS] = random.permutation(WORDS)[: len(numbers)]
    letters = "bdfgklmnprstvxz"
    words = ["z" + "".join(each) for each in itertools.product(letters, letters, letters, letters)]
    texts = [" ".join(words[n] for n in part) for part in np.split(numbers, np.cumsum(lengths)[:-1])]
    return [texts[first : first + CAPTIONS_EACH] for first in range(0, count, CAPTIONS_EACH)]


def draw_pictures(folder: Path, count: int) -> list[Path]:
    """Draw JPEGs of 500x375 that are as detailed as photographs: noise of several sizes, some 60 kB each."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"picture{number:02d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        random, picture = np.random.default_rng(number), np.full((375, 500, 3), 128, np.float32)
        for cells, strength in ((4, 90), (16, 40), (64, 25), (500, 8)):
            noise = (random.normal(128, strength, (cells, cells, 3))).clip(0, 255).astype(np.uint8)
            picture += np.asarray(Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC), np.float32) - 128
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def flags_for(bench: Bench, images: int, encoder: str, trained: tuple[str, int, int] = SMALL[1]) -> list[str]:
    """Return the flags of a training of one epoch. Args: trained: decoder, hidden size and layers."""
    decoder, hidden, layers = trained
    return list(map(str, [
        "--dataset_type", "custom", "--data_dir", data_set(bench, images), "--encoder", encoder, "--decoder", decoder,
        "--embed_size", min(512, hidden), "--hidden_size", hidden, "--num_layers", layers, "--batch_size", BATCH,
        "--epochs", 1, "--freq_threshold", 1, "--learning_rate", 0.001, "--device", bench.device.type,
        "--feature_cache", bench.folder / "cache", "--model_save_dir", bench.folder / "runs",
        *(["--resnet_weights", "random"] if encoder.startswith("resnet") else []),
    ]))  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Encoding


def open_picture(path: Path, size: int) -> Image.Image:
    """Decode an image, at the smallest of the JPEG decoder's scales that gives a square of this size."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))
        return image.convert("RGB")


def naive_encoding(encoder: Any, paths: Sequence[Path], batch: int, device: torch.device) -> None:
    """Open, resize and encode images in batches, in eager PyTorch; nothing is read ahead."""
    size = encoder.spec.image_size

    def read(path: Path) -> torch.Tensor:
        pixels = np.array(open_picture(path, size).resize((size, size), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float()

    with ThreadPoolExecutor(CORES) as pool, torch.inference_mode():
        for start in range(0, len(paths), batch):
            encoder(torch.stack(list(pool.map(read, paths[start : start + batch]))).to(device)).cpu()


def decode_jpegs(paths: Sequence[Path], size: int) -> None:
    """Decode images on all cores."""
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(partial(open_picture, size=size), paths))


def build_encoder(name: str, device: torch.device) -> Any:
    """Return an encoder's network (ResNet50's with random weights)."""
    spec = find_encoder(name)
    weights, _ = spec.find_weights("random" if name.startswith("resnet") else None)
    return spec.build(weights).to(device).eval()


def measure_encoding(bench: Bench) -> Iterator[Figure]:
    """Measure the pass over JPEGs in six views into an empty feature cache, compiling the encoder included."""
    for name, count in bench.scale.encoded.items():
        network = build_encoder(name, bench.device)
        flags = [*flags_for(bench, count, name), "--views", "all"]
        data = build_data(parse_flags(flags), None)
        paths, size = data.paths(), network.spec.image_size
        on_gpu = bench.device.type == "cuda"
        product, done = matrix_product(bench, torch.float16 if on_gpu else torch.float32)
        ways = {
            "encode": partial(encode_anew, bench, flags, data),
            "naive": partial(naive_encoding, network, paths[: bench.scale.naive], 1, bench.device),
            "jpegs": partial(decode_jpegs, paths, size),
            "product": product,
        }
        seconds = interleaved(ways, bench.scale.repeats)
        work = operations(partial(network, torch.zeros(1, 3, size, size, device=bench.device)))
        jpeg, arithmetic = seconds["jpegs"] / len(paths), VIEWS * work / done * seconds["product"]  # of an image
        fastest = max(jpeg, arithmetic) if on_gpu else jpeg + arithmetic  # a CPU's cores do both
        yield Figure(
            f"{name}, {VIEWS} views of {len(paths)} images", VIEWS * len(paths) / seconds["encode"], "views/s",
            bench.scale.naive / seconds["naive"], "eager PyTorch, one by one",
            VIEWS / fastest, "JPEG decoding, matrix product",
        )  # fmt: skip


def encode_anew(bench: Bench, flags: list[str], data: Any) -> None:
    with TemporaryDirectory(dir=bench.folder) as cache:
        build_features(parse_flags([*flags, "--feature_cache", cache]), data, np.arange(len(data.names)))


# --------------------------------------------------------------------------------------------------
# Training


def train_epoch(run: Any, state: Any) -> None:
    """Train an epoch as the main program does."""
    state.step = 0
    trainer.train_one_epoch(state, run)


def padded_step(
    decoder: Any, optimizer: torch.optim.Optimizer, features: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor
) -> None:
    """Train a step the original's way: features (R, C) or (R, cells, C) and words (R, T), one row per caption.

    What belongs to an image (its projection, its keys) is computed for every caption, all captions are as long as the
    longest one, and the projection to the vocabulary is within the loop over time steps.
    """
    optimizer.zero_grad()
    state, logits = decoder.train().begin(features), []
    for words in inputs.unbind(1):
        state, output = decoder.step(state, words)
        logits.append(decoder.logits(output.hidden_out))
    torch.nn.functional.cross_entropy(torch.stack(logits, 1).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()


def measure_training(bench: Bench) -> Iterator[Figure]:
    """Measure epochs on cached features in each precision that the device is made for, and reading the features."""
    for trained in bench.scale.trained:
        yield from training_figures(bench, trained)


def training_figures(bench: Bench, trained: tuple[str, int, int]) -> Iterator[Figure]:
    scale, device, (decoder, hidden, layers) = bench.scale, bench.device, trained
    flags = flags_for(bench, scale.images, scale.encoder, trained)
    plain, auto = (trainer.build_run(parse_flags([*flags, "--precision", name]), []) for name in ("fp32", "auto"))
    (run, _), (auto_run, auto_state) = plain, auto
    encoder = build_encoder(scale.encoder, device)
    images = np.resize(run.sampler.images, BATCH)
    paths = [run.context.data.paths()[image] for image in images[: scale.naive]]
    longest, words = int(run.sampler.collator.lengths.max()) + 1, len(run.context.vocabulary)
    inputs, targets = torch.randint(words, (2, BATCH, longest), device=device)  # any words take the same time
    adam = torch.optim.Adam(auto_state.decoder.parameters(), lr=0.001)
    gather = partial(run.views[0].gather, images, device)
    ways: dict[str, Callable[[], object]] = {
        "encode": partial(naive_encoding, encoder, paths, len(paths), device),
        "padded": lambda: padded_step(auto_state.decoder, adam, gather(), inputs, targets),
        "gather": gather,
        "copy": partial(torch.Tensor.copy_, *torch.ones(2, COPIED, dtype=torch.uint8, device=device)),
    }
    trainings, products = {"fp32": plain, auto_run.settings.precision: auto}, {}
    for name, training in trainings.items():
        product, products[name] = matrix_product(bench, torch.bfloat16 if name == "bf16" else torch.float32)
        ways |= {name: partial(train_epoch, *training), f"product {name}": product}
    seconds = interleaved(ways, scale.repeats)
    work = operations(partial(train_epoch, *plain))  # without the rows that are added in bf16
    captions, encoding = sum(map(len, run.sampler.plan(0))), seconds["encode"] * BATCH / len(paths)
    for name in trainings:
        about, rate = f"{decoder}, {hidden} x {layers}, {name}", captions / seconds[name]
        limit = captions / (work / products[name] * seconds[f"product {name}"]), f"matrix product in {name}"
        naive, cached = BATCH / (encoding + seconds["padded"]), BATCH / seconds["padded"]
        yield Figure(about, rate, "captions/s", naive, "padded, encodes each caption's image", *limit)
        yield Figure(about, rate, "captions/s", cached, "padded, cached features", *limit)
    features = gather()
    if features.dim() == 2:  # means, which a processor caches
        return
    limit = 2 * COPIED / seconds["copy"] / (features.numel() * features.element_size() / BATCH), "memory bandwidth"
    naive = len(paths) / seconds["encode"]
    yield Figure(f"features of {decoder}", BATCH / seconds["gather"], "images/s", naive, "encodes them again", *limit)


# --------------------------------------------------------------------------------------------------
# Decoding


def measure_decoding(bench: Bench) -> Iterator[Figure]:
    """Measure beam search over many images, against one image per call."""
    scale = bench.scale
    for trained in scale.trained:
        run, state = trainer.build_run(parse_flags(flags_for(bench, scale.images, scale.encoder, trained)), [])
        for _ in range(scale.epochs):
            train_epoch(run, state)
        decoder, hidden, layers = trained
        images = np.resize(np.concatenate(list(run.context.data.splits.values())), scale.decoded)
        product, done = matrix_product(bench, torch.float32)
        ways: dict[str, Callable[[], object]] = {"product": product}
        for beam in scale.beams:
            ways[f"batch {beam}"] = partial(caption, run.context, images, beam)
            ways[f"alone {beam}"] = partial(caption_alone, run.context, images[: scale.alone], beam)
        seconds = interleaved(ways, scale.repeats)
        for beam in scale.beams:
            work = operations(ways[f"batch {beam}"])
            yield Figure(
                f"{decoder}, {hidden} x {layers}, beam {beam}", scale.decoded / seconds[f"batch {beam}"], "images/s",
                scale.alone / seconds[f"alone {beam}"], "one image at a time",
                scale.decoded / (work / done * seconds["product"]), "matrix product in fp32",
            )  # fmt: skip


def caption_alone(context: Any, images: np.ndarray, beam: int) -> None:
    for number in range(len(images)):
        caption(context, images[number : number + 1], beam)


# --------------------------------------------------------------------------------------------------
# Cold start and memory

ORIGINAL_IMPORTS = "import torch, torchvision, pandas, matplotlib.pyplot, nltk, spacy, PIL.Image"
FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measure_startup(bench: Bench) -> Iterator[Figure]:
    """Measure new processes until they answer, have trained a first step on cached features, or captioned a photo."""
    scale = bench.scale
    flags = flags_for(bench, scale.images, scale.encoder, scale.trained[0])
    photo = next((data_set(bench, scale.images) / "Images").iterdir())
    least = {"Python alone": ["-c", "pass"], "import torch": ["-c", "import torch"]}
    commands = {
        "--help": ("Python alone", [PROGRAM, "--help"]),
        "first training step": ("import torch", ["-c", FIRST_STEP, PROGRAM, *flags]),
        "caption of a photo": ("import torch", [PROGRAM, "--mode", "caption", "--quiet", "--images", photo]),
    }
    every = {"imports": ["-c", ORIGINAL_IMPORTS]} | least | {name: argv for name, (_, argv) in commands.items()}
    ways = {name: partial(run_program, *argv) for name, argv in every.items()}
    seconds = interleaved(ways, scale.repeats)
    for name, (limit, _) in commands.items():
        yield Figure(name, seconds[name], "s", seconds["imports"], "the original's imports", seconds[limit], limit)


def measure_light(bench: Bench) -> Iterator[Figure]:
    """Measure captions without PyTorch, in a fresh environment of the light installation."""
    light = bench.folder / "light"
    run_program("-m", "venv", light)
    fresh = partial(run_program, python=light / ("Scripts" if os.name == "nt" else "bin") / "python", folder=light)
    fresh("-m", "pip", "install", "--quiet", ROOT)
    size, full = (sum(path.lstat().st_size for path in folder.rglob("*")) / 1e6 for folder in (light, Path(sys.prefix)))
    yield Figure("environment", size, "MB", full, "this one, with PyTorch", size, "itself")

    photos = sorted((data_set(bench, bench.scale.images) / "Images").iterdir())[: 4 * PICTURES]
    seconds = interleaved({
        "light": partial(fresh, "-m", "captioning", photos[0]), "imports": partial(fresh, "-c", "import numpy, onnxruntime, PIL"),
        "full": partial(run_program, "-m", "captioning", photos[0]), "torch": partial(run_program, "-c", "import torch"),
    }, bench.scale.repeats)  # fmt: skip
    for name in ("light", "full"):
        yield Figure(
            f"a caption, {name}",
            seconds[name],
            "s",
            seconds["torch"],
            "import torch",
            seconds["imports"],
            "its imports",
        )

    captioner = Captioner.load()
    stored = read_exported(captioner.path)
    prepared = interleaved(
        {"consensus": partial(NgramHead, len(captioner.vocabulary), stored["consensus"])}, bench.scale.repeats
    )
    yield Figure("consensus prepared", prepared["consensus"], "s", 0.2, "at most", prepared["consensus"], "itself")
    pixels = np.stack([captioner.model.load_views(photo) for photo in photos[:8]])
    rates = interleaved({
        "many": partial(captioner, photos), "one": lambda: [captioner(photo) for photo in photos[:8]],
        "views": partial(captioner.model.read, pixels),
    }, bench.scale.repeats)  # fmt: skip
    yield Figure(
        "photos, all together",
        len(photos) / rates["many"],
        "images/s",
        8 / rates["one"],
        "one at a time",
        8 / rates["views"],
        "encoding alone",
    )


def measure_memory(bench: Bench) -> Iterator[Figure]:
    """Measure the peak memory of whole trainings of one epoch: the first encodes, the later one reads the cache."""
    if not Path("/proc/self/status").is_file():
        print("memory is left out: /proc is Linux's")
        return
    spec = find_encoder("efficientnet_lite0")
    least = peak_memory("-c", "import torch, time; time.sleep(0.1)")
    for count in bench.scale.memory:
        holds = f"import torch, time; features = torch.ones({count}, {spec.regions}, {spec.channels}); time.sleep(0.1)"
        naive = peak_memory("-c", holds)
        for when in ("first", "later"):
            peak = peak_memory(PROGRAM, *flags_for(bench, count, spec.name), "--quiet")
            name = f"{count:,} images, {when} run"
            yield Figure(name, peak, "MB", naive, "all features in memory", least, "import torch")


# --------------------------------------------------------------------------------------------------
# The program

PARTS = {
    "encoding": measure_encoding, "training": measure_training, "decoding": measure_decoding,
    "startup": measure_startup, "light": measure_light, "memory": measure_memory,
}  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to compare figures; nothing that identifies the machine."""
    return {
        "cpu": platform.processor() or platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": CORES, "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None, scale: Scale | None = None) -> list[Figure]:
    """Measure and print; return the figures. Args: scale: instead of what `--quick` chooses.

    Raises:
        SystemExit: a figure is above its physical limit.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images, sizes and rounds")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas (default: %(default)s)")
    parser.add_argument("--data_dir", type=Path, help="a real data set, for its captions and JPEGs")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file, too")
    args = parser.parse_args(argv)
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {unknown.pop()}: the parts are {', '.join(PARTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(", ".join(f"{key}: {value}" for key, value in machine(device).items() if value), flush=True)
    figures: list[tuple[str, Figure]] = []
    with TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(scale or (QUICK if args.quick else FULL), device, Path(folder), args.data_dir)
        for part in parts:
            print(f"\n{part:<44}{'measured':>18}{'naive':>10}{'times':>8}{'limit':>10}{'reached':>9}  naive way; limit")
            for figure in PARTS[part](bench):
                figure.print()
                figures.append((part, figure))
    if args.output:
        rows = [{"part": part, **asdict(row), "times": row.times, "share": row.share} for part, row in figures]
        content = {"machine": machine(device), "scale": asdict(bench.scale), "figures": rows}
        args.output.write_text(json.dumps(content, indent=1) + "\n")
    if wrong := [f"{row.name}: {row.share:.0%}" for _, row in figures if row.share > 1]:
        raise SystemExit(f"error: above the physical limit, so that something else was measured: {'; '.join(wrong)}")
    return [row for _, row in figures]


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # what the main program prints
    main()
