"""A small captioned data set drawn with Pillow: coloured shapes in front of simple landscapes.

It needs no download and no licence, and a small decoder learns it in a minute or two, which makes it good for
first steps, for tests and for pictures in the documentation. Written in the layout of Flickr8k.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.io import UserError, make_directory, read_json, require_free_space, write_atomic, write_json

if TYPE_CHECKING:
    from PIL import Image, ImageDraw
from collections.abc import Mapping, Sequence

import numpy as np

from captioning.images import cell_middles, peak

DRAWING_VERSION = 1  # raise it when a scene of the same seed looks or reads otherwise: old sets are then drawn anew
SIZE = 256  # pixels a side
FINE = 2 * SIZE  # drawn at twice the size and shrunk, for smooth edges
BYTES_PER_SCENE = 40_000
MANIFEST = "demo.json"
OWN_ENTRIES = {
    "Images", "captions.txt", "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt",
    "shapes.json", MANIFEST,
}  # fmt: skip

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (222, 38, 44),
    "blue": (36, 92, 222),
    "green": (38, 158, 66),
    "yellow": (252, 214, 32),
    "purple": (142, 52, 182),
    "orange": (250, 136, 24),
    "white": (250, 250, 250),
    "black": (34, 34, 38),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")
RADII = {"small": 0.105, "large": 0.215}  # of the picture's side
PLACES = {
    "left": (-1, 0, "on the left"),
    "right": (1, 0, "on the right"),
    "top": (0, -1, "at the top"),
    "bottom": (0, 1, "at the bottom"),
    "middle": (0, 0, "in the middle"),
}
BACKGROUNDS = {
    "meadow": "in a sunny meadow",
    "beach": "at a sandy beach",
    "night": "under a night sky",
    "snow": "in a snowy field",
    "wall": "in front of a grey wall",
}
CAMOUFLAGE = {("meadow", "green"), ("beach", "yellow"), ("night", "black"), ("snow", "white")}  # never drawn

ONE_SHAPE = (
    "a {size} {thing} {place} {scene}",
    "there is a {size} {thing} {place} {scene}",
    "a {big} {thing} is {place} {scene}",
    "a picture of a {size} {thing} {scene}",
    "{place} there is a {big} {thing} {scene}",
    "{scene} there is a {size} {thing} {place}",
    "a {thing} {scene}",
)
TWO_SHAPES = (
    "a {first} {relation} a {second} {scene}",
    "there is a {first} {relation} a {second} {scene}",
    "a {first} is {relation} a {second} {scene}",
    "{scene} there is a {first} {relation} a {second}",
    "a picture of a {first} {relation} a {second}",
    "a {first} and a {second} {scene}",
    "a {size_1} {first} {relation} a {size_2} {second}",
)


@dataclass(frozen=True)
class Shape:
    """One shape of a scene; centre and radius are fractions of the picture's side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What one picture shows and what is said about it."""

    background: str
    shapes: tuple[Shape, ...]
    captions: tuple[str, ...]


def draw_demo_dataset(directory: Path, scenes: int = 800, seed: int = 0, redraw: bool = False) -> None:
    """Draw `scenes` pictures with five captions each into `directory`, in the layout of Flickr8k.

    The same seed gives the same files bit for bit (with the same Pillow). A set that is complete already is
    left as it is; the set appears in `directory` whole or not at all.

    Args:
        scenes: number of pictures, at least 10: 80 % are for training, 10 % each for validation and testing.
        redraw: draw again even if the set is complete.

    Raises:
        UserError: `directory` holds something else than a demo set, or cannot be written.
    """
    directory = Path(directory)
    if scenes < 10:
        raise UserError(f"a demo set needs at least 10 scenes for its three splits, not {scenes}")
    require_own(directory)
    if not redraw and is_complete(directory, scenes, seed):
        return
    make_directory(directory.parent, "the demo set")
    require_free_space(directory.parent, scenes * BYTES_PER_SCENE, f"drawing {scenes} scenes")
    # Drawn beside the target and renamed at the end, so that an interrupted drawing never looks like a set.
    # absolute() gives "." a name to put the temporary folders beside.
    directory = directory.absolute()
    fresh = directory.with_name(f".{directory.name}.{os.getpid()}.new")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    try:
        write_scenes(fresh, scenes, seed)
        if directory.exists():
            os.replace(directory, old)
        os.replace(fresh, directory)
    except OSError as error:
        if old.exists() and not directory.exists():
            os.replace(old, directory)
        raise UserError(f"cannot write the demo set to {directory}: {error}. Choose another --data_dir") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)


def is_complete(directory: Path, scenes: int, seed: int) -> bool:
    """Whether `directory` holds exactly the demo set of these arguments, with all its pictures."""
    if not (directory / MANIFEST).is_file() or any(not (directory / name).exists() for name in OWN_ENTRIES):
        return False
    if read_json(directory / MANIFEST) != manifest(scenes, seed):
        return False
    return {path.name for path in (directory / "Images").iterdir()} == {
        image_name(number) for number in range(1, scenes + 1)
    }


def require_own(directory: Path) -> None:
    """Make sure that replacing `directory` takes nothing of the user's away."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory} is a file, not a directory for the demo set: choose another --data_dir")
    found = {entry.name for entry in directory.iterdir()}
    if found and (MANIFEST not in found or found - OWN_ENTRIES):
        foreign = sorted(found - OWN_ENTRIES) or sorted(found)
        raise UserError(
            f"{directory} holds files that are no demo set ({', '.join(foreign[:3])}): move them away, or choose "
            "another place, e.g. `python download_datasets.py --dataset demo --data_dir other_data`"
        )


def manifest(scenes: int, seed: int) -> dict[str, Any]:
    return {"drawing_version": DRAWING_VERSION, "scenes": scenes, "seed": seed}


def image_name(number: int) -> str:
    return f"scene_{number:04d}.jpg"


def write_scenes(directory: Path, scenes: int, seed: int) -> None:
    """Write a whole set into `directory`, which is new; the manifest comes last."""
    (directory / "Images").mkdir(parents=True)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["image", "caption"])
    shapes: dict[str, list[dict[str, Any]]] = {}
    names = [image_name(number) for number in range(1, scenes + 1)]
    for number, name in enumerate(names, start=1):
        rng = random.Random(f"{seed}/{number}")  # per scene: scene 7 is the same in a set of 10 and of 800
        scene = invent_scene(rng)
        image, boxes = draw_scene(scene, rng)
        image.save(directory / "Images" / name, quality=90, subsampling=0)
        rows.writerows([name, caption] for caption in scene.captions)
        shapes[name] = [
            {"shape": shape.shape, "color": shape.color, "size": shape.size, "box": box}
            for shape, box in zip(scene.shapes, boxes, strict=True)
        ]
    held_out = scenes // 10
    splits = {
        "train": names[: -2 * held_out],
        "dev": names[-2 * held_out : -held_out],
        "test": names[-held_out:],
    }
    texts = {f"Flickr_8k.{split}Images.txt": "\n".join(members) + "\n" for split, members in splits.items()}
    texts["captions.txt"] = table.getvalue()
    texts["shapes.json"] = json.dumps(shapes) + "\n"
    for file_name, text in texts.items():
        write_text(directory / file_name, text)
    write_json(directory / MANIFEST, manifest(scenes, seed))


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))  # bytes: the same line ends on every system


# --------------------------------------------------------------------------------------------------
# What a scene shows


def invent_scene(rng: random.Random) -> Scene:
    """Draw lots for a scene and word its five captions."""
    background = rng.choice(tuple(BACKGROUNDS))
    colors = [color for color in COLORS if (background, color) not in CAMOUFLAGE]
    scene = BACKGROUNDS[background]
    if rng.random() < 0.6:
        place = rng.choice(tuple(PLACES))
        across, down, where = PLACES[place]
        size = rng.choice(tuple(RADII))
        shift = 0.5 - RADII[size] - 0.05
        shape = make_shape(rng, rng.choice(SHAPES), rng.choice(colors), size, 0.5 + across * shift, 0.5 + down * shift)
        words = {
            "size": size,
            "big": {"large": "big"}.get(size, size),
            "thing": f"{shape.color} {shape.shape}",
            "place": where,
            "scene": scene,
        }
        return Scene(background, (shape,), word_captions(rng, ONE_SHAPE, words))
    beside = rng.random() < 0.5
    # Of two shapes neither form nor colour is shared: each can only be meant by its own words.
    kinds, hues = rng.sample(SHAPES, 2), rng.sample(colors, 2)
    pair = []
    for kind, hue, along in zip(kinds, hues, (0.26, 0.74), strict=True):
        x, y = (along, 0.5) if beside else (0.5, along)
        pair.append(make_shape(rng, kind, hue, rng.choice(tuple(RADII)), x, y))
    words = {
        "first": f"{hues[0]} {kinds[0]}",
        "second": f"{hues[1]} {kinds[1]}",
        "size_1": pair[0].size,
        "size_2": pair[1].size,
        "relation": "to the left of" if beside else "above",
        "scene": scene,
    }
    return Scene(background, tuple(pair), word_captions(rng, TWO_SHAPES, words))


def make_shape(rng: random.Random, shape: str, color: str, size: str, x: float, y: float) -> Shape:
    jitter = 0.02
    return Shape(
        shape, color, size, x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter),
        RADII[size] * rng.uniform(0.94, 1.0),
    )  # fmt: skip


def word_captions(rng: random.Random, templates: tuple[str, ...], words: dict[str, str]) -> tuple[str, ...]:
    captions = (f"{template.format(**words)} ." for template in rng.sample(templates, 5))
    return tuple(caption.replace("a orange", "an orange") for caption in captions)


# --------------------------------------------------------------------------------------------------
# How it is drawn


def draw_scene(scene: Scene, rng: random.Random) -> tuple[Image.Image, list[list[float]]]:
    """The picture, SIZE x SIZE, and each shape's box [x0, y0, x1, y1] as fractions of its sides."""
    from PIL import Image

    image = DRAW_BACKGROUND[scene.background](rng)
    boxes = [draw_shape(image, shape, rng) for shape in scene.shapes]
    return image.resize((SIZE, SIZE), Image.Resampling.BOX), boxes


def draw_shape(image: Image.Image, shape: Shape, rng: random.Random) -> list[float]:
    """Draw a shape with its shadow, rim and sheen onto `image`; returns its box."""
    from PIL import Image, ImageChops, ImageFilter

    radius = round(shape.radius * FINE)
    margin = 24
    side = 2 * (radius + margin)
    left, top = round(shape.x * FINE) - side // 2, round(shape.y * FINE) - side // 2
    mask = shape_mask(shape.shape, radius, side, rng)

    shadow = ImageChops.offset(mask, 7, 9).filter(ImageFilter.GaussianBlur(7)).point(lambda value: value * 0.5)
    image.paste((10, 14, 30), (left, top), shadow)

    color = COLORS[shape.color]
    body = gradient(side, side, blend(color, (255, 255, 255), 0.24), blend(color, (0, 0, 0), 0.12))
    # A pale rim lifts dark shapes off dark ground, a grey one white shapes off light ground.
    rim = (112, 118, 130) if shape.color == "white" else blend(color, (255, 255, 255), 0.82)
    image.paste(rim, (left, top), mask)
    inner = mask.filter(ImageFilter.MinFilter(7 if shape.size == "small" else 9))
    image.paste(body, (left, top), inner)

    sheen = Image.new("L", (side, side))
    pen(sheen).ellipse(relative(side, 0.16, 0.10, 0.66, 0.48), fill=72)
    sheen = ImageChops.multiply(sheen.filter(ImageFilter.GaussianBlur(radius * 0.12)), inner)
    image.paste((255, 255, 255), (left, top), sheen)

    x0, y0, x1, y1 = mask.getbbox() or (0, 0, side, side)
    edges = (left + x0, top + y0, left + x1, top + y1)
    return [round(min(max(edge / FINE, 0.0), 1.0), 4) for edge in edges]


def shape_mask(shape: str, radius: int, side: int, rng: random.Random) -> Image.Image:
    """Where the shape is (mode L), centred in a square of `side` pixels, with slightly rounded corners."""
    from PIL import Image, ImageFilter

    mask = Image.new("L", (side, side))
    middle = side / 2
    turn = rng.uniform(-0.12, 0.12)  # a little life; not enough to make a square a diamond

    def at(angle: float, distance: float) -> tuple[float, float]:
        return (
            middle + distance * radius * math.sin(angle + turn),
            middle - distance * radius * math.cos(angle + turn),
        )

    full = 2 * math.pi
    if shape == "circle":
        pen(mask).ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=255)
        return mask
    if shape == "square":
        points = [at(full * (corner + 0.5) / 4, 1.2) for corner in range(4)]
    elif shape == "triangle":
        points = [at(full * corner / 3, 1.12) for corner in range(3)]
    elif shape == "star":
        points = [at(full * corner / 10, (1.1, 0.48)[corner % 2]) for corner in range(10)]
    else:
        points = [heart_point(full * step / 80, at) for step in range(80)]
    pen(mask).polygon(points, fill=255)
    blurred = mask.filter(ImageFilter.GaussianBlur(5))  # blurring and sharpening again rounds the corners
    return blurred.point(lambda value: max(0, min(255, (value - 112) * 8)))


def heart_point(angle: float, at: Callable[[float, float], tuple[float, float]]) -> tuple[float, float]:
    x = 16 * math.sin(angle) ** 3
    y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle) + 2.5
    return at(math.atan2(x, y), math.hypot(x, y) / 16)


def draw_meadow(rng: random.Random) -> Image.Image:
    image = gradient(FINE, FINE, (86, 170, 240), (214, 238, 252))
    sun_x, sun_y = rng.choice((0.02, 0.98)), 0.03
    glow(image, sun_x, sun_y, 0.30, (255, 244, 190))
    glow(image, sun_x, sun_y, 0.13, (255, 236, 130))
    for _ in range(3):
        cloud(image, rng.random(), rng.uniform(0.06, 0.3), rng.uniform(0.5, 0.9), rng)
    draw = pen(image)
    horizon = rng.uniform(0.52, 0.58)
    hills(draw, horizon, rng, (136, 196, 104))
    ground(image, horizon, (122, 196, 84), (58, 138, 50))
    for _ in range(220):
        depth = rng.random() ** 0.7
        x, y, tall = rng.random() * FINE, (horizon + 0.02 + depth * (1 - horizon)) * FINE, 3 + 9 * depth
        draw.line((x, y, x + rng.uniform(-3, 3), y - tall), fill=rng.choice(((70, 150, 56), (150, 214, 104))), width=2)
    for _ in range(26):
        depth = rng.random()
        dot(draw, rng.random(), horizon + 0.04 + depth * (1 - horizon), 1.5 + 3 * depth, rng.choice(
            ((255, 255, 255), (255, 240, 150), (250, 180, 210))
        ))  # fmt: skip
    return image


def draw_beach(rng: random.Random) -> Image.Image:
    image = gradient(FINE, FINE, (70, 162, 232), (206, 236, 250))
    for _ in range(3):
        cloud(image, rng.random(), rng.uniform(0.05, 0.2), rng.uniform(0.4, 0.7), rng)
    horizon, shore = rng.uniform(0.33, 0.38), rng.uniform(0.58, 0.64)
    ground(image, horizon, (24, 108, 168), (92, 206, 212), bottom=shore + 0.05)
    draw = pen(image)
    for _ in range(40):
        depth = rng.random()
        x, y = rng.random() * FINE, (horizon + 0.015 + depth * (shore - horizon - 0.03)) * FINE
        draw.line((x, y, x + 8 + 34 * depth, y), fill=(150, 214, 226), width=2)
    slope = rng.uniform(-0.03, 0.03)
    wave = [
        (float(x), FINE * (shore + slope * (x / FINE - 0.5) + 0.008 * math.sin(x / 40 + 9 * slope)))
        for x in range(0, FINE + 17, 16)
    ]
    foam = [(x, y - 7) for x, y in wave]
    wet = [(x, y + 14) for x, y in wave]
    corners: list[tuple[float, float]] = [(FINE + 16, FINE), (0, FINE)]
    draw.polygon(foam + corners, fill=(244, 250, 250))
    draw.polygon(wave + corners, fill=(206, 176, 122))
    mask_paste(image, wet + corners, gradient(FINE, FINE, (250, 226, 170), (226, 188, 122)))
    for _ in range(260):
        y = rng.uniform(shore + 0.05, 1)
        dot(draw, rng.random(), y, rng.uniform(0.8, 1.8), rng.choice(((204, 164, 100), (255, 240, 200))))
    return image


def draw_night(rng: random.Random) -> Image.Image:
    image = gradient(FINE, FINE, (8, 12, 44), (58, 52, 116))
    draw = pen(image)
    for _ in range(130):
        bright = rng.randint(150, 255)
        dot(draw, rng.random(), rng.random() * 0.9, rng.choice((1.0, 1.0, 1.5, 2.2)), (bright, bright, 235))
    moon_x, moon_y = rng.choice((0.07, 0.93)), 0.08
    glow(image, moon_x, moon_y, 0.12, (190, 196, 240))
    crescent(image, moon_x, moon_y, 0.045)
    draw = pen(image)
    horizon = rng.uniform(0.9, 0.93)
    hills(draw, horizon, rng, (22, 22, 58))
    draw.rectangle((0, horizon * FINE, FINE, FINE), fill=(22, 22, 58))
    return image


def draw_snow(rng: random.Random) -> Image.Image:
    image = gradient(FINE, FINE, (150, 178, 208), (226, 234, 244))
    draw = pen(image)
    horizon = rng.uniform(0.46, 0.52)
    hills(draw, horizon, rng, (206, 218, 234))
    for _ in range(11):
        fir(draw, rng.random(), horizon + rng.uniform(0.0, 0.03), rng.uniform(0.07, 0.14))
    ground(image, horizon, (250, 252, 255), (212, 224, 242))
    for _ in range(4):  # drifts
        x, y, wide = rng.random(), rng.uniform(horizon + 0.1, 0.98), rng.uniform(0.15, 0.3)
        draw.arc(scaled(x - wide, y, x + wide, y + 0.08), 190, 350, fill=(190, 206, 230), width=3)
    for _ in range(90):
        dot(draw, rng.random(), rng.random(), rng.uniform(1.5, 3.5), (255, 255, 255))
    return image


def draw_wall(rng: random.Random) -> Image.Image:
    from PIL import Image

    image = Image.new("RGB", (FINE, FINE), (126, 126, 128))
    draw = pen(image)
    tall, wide, joint = FINE // 12, FINE // 6, 4
    start = rng.randint(0, wide)
    for row in range(13):
        y = row * tall
        for column in range(-1, 8):
            x = column * wide + (wide // 2 if row % 2 else 0) - start
            grey = rng.randint(150, 182)
            brick = (x + joint, y + joint, x + wide, y + tall)
            draw.rectangle(brick, fill=(grey, grey, grey + 3))
            draw.line((x + joint, y + joint, x + wide, y + joint), fill=(grey + 20, grey + 20, grey + 22), width=2)
    shade = gradient(FINE, FINE, (255, 255, 255), (150, 152, 160))
    return Image.blend(image, shade, 0.28)


DRAW_BACKGROUND: dict[str, Callable[[random.Random], Image.Image]] = {
    "meadow": draw_meadow,
    "beach": draw_beach,
    "night": draw_night,
    "snow": draw_snow,
    "wall": draw_wall,
}


# --------------------------------------------------------------------------------------------------
# Brushes; lengths are fractions of the picture's side unless they say pixels


def pen(image: Image.Image) -> ImageDraw.ImageDraw:
    from PIL import ImageDraw

    return ImageDraw.Draw(image)


def blend(color: Color, other: Color, share: float) -> Color:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(color, other, strict=True))
    return red, green, blue


def relative(side: int, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
    return x0 * side, y0 * side, x1 * side, y1 * side


def scaled(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
    return relative(FINE, x0, y0, x1, y1)


def gradient(width: int, height: int, top: Color, bottom: Color) -> Image.Image:
    """From `top` down to `bottom`; width and height in pixels."""
    from PIL import Image

    column = Image.new("RGB", (1, height))
    for y in range(height):
        column.putpixel((0, y), blend(top, bottom, y / max(1, height - 1)))
    return column.resize((width, height), Image.Resampling.NEAREST)


def ground(image: Image.Image, horizon: float, far: Color, near: Color, bottom: float = 1.0) -> None:
    top, end = round(horizon * FINE), round(bottom * FINE)
    image.paste(gradient(FINE, end - top, far, near), (0, top))


def glow(image: Image.Image, x: float, y: float, radius: float, color: Color) -> None:
    from PIL import Image, ImageChops

    side = round(2 * radius * FINE)
    halo = ImageChops.invert(Image.radial_gradient("L").resize((side, side)))
    halo = halo.point(lambda value: max(0, min(255, (value - 75) * 1.6)))  # radial_gradient reaches 180 at the edges
    image.paste(color, (round(x * FINE) - side // 2, round(y * FINE) - side // 2), halo)


def cloud(image: Image.Image, x: float, y: float, size: float, rng: random.Random) -> None:
    from PIL import Image, ImageFilter

    wide, tall = round(150 * size), round(70 * size)
    puffs = Image.new("L", (wide + 40, tall + 40))
    draw = pen(puffs)
    for _ in range(7):
        radius = tall * rng.uniform(0.18, 0.32)
        along = rng.uniform(radius, wide - radius) + 20
        middle = tall * 0.6 + 20 - radius * 0.5
        draw.ellipse((along - radius * 1.4, middle - radius, along + radius * 1.4, middle + radius), fill=240)
    puffs = puffs.filter(ImageFilter.GaussianBlur(5))
    image.paste((255, 255, 255), (round(x * FINE) - wide // 2, round(y * FINE) - tall // 2), puffs)


def hills(draw: ImageDraw.ImageDraw, horizon: float, rng: random.Random, color: Color) -> None:
    for number in range(4):
        x, wide, tall = number / 3 + rng.uniform(-0.1, 0.1), rng.uniform(0.22, 0.36), rng.uniform(0.05, 0.1)
        shade = blend(color, (255, 255, 255) if sum(color) > 300 else (60, 60, 110), 0.1 * (number % 2))
        draw.ellipse(scaled(x - wide, horizon - tall, x + wide, horizon + tall), fill=shade)


def fir(draw: ImageDraw.ImageDraw, x: float, foot: float, tall: float) -> None:
    for number in range(3):
        top, wide = foot - tall * (1 - 0.22 * number), tall * (0.16 + 0.08 * number)
        points = [(x, top), (x - wide, top + tall * 0.42), (x + wide, top + tall * 0.42)]
        draw.polygon([(a * FINE, b * FINE) for a, b in points], fill=(72 + 6 * number, 108, 104))


def crescent(image: Image.Image, x: float, y: float, radius: float) -> None:
    from PIL import Image

    side = round(2 * radius * FINE)
    mask = Image.new("L", (side, side))
    pen(mask).ellipse((0, 0, side - 1, side - 1), fill=255)
    pen(mask).ellipse((side * 0.32, -side * 0.12, side * 1.2, side * 0.8), fill=0)
    image.paste((250, 244, 214), (round(x * FINE) - side // 2, round(y * FINE) - side // 2), mask)


def dot(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: Color) -> None:
    """A dot whose radius is in pixels of the fine picture."""
    draw.ellipse((x * FINE - radius, y * FINE - radius, x * FINE + radius, y * FINE + radius), fill=color)


def mask_paste(image: Image.Image, outline: list[tuple[float, float]], filling: Image.Image) -> None:
    from PIL import Image

    mask = Image.new("L", image.size)
    pen(mask).polygon(outline, fill=255)
    image.paste(filling, (0, 0), mask)


Boxes = dict[str, tuple[float, float, float, float]]  # shape word -> x0, y0, x1, y1 as fractions of the picture


def read_boxes(path: Path) -> dict[str, Boxes]:
    """The `shapes.json` of a demo set: for each image's name the box of each shape on it.

    Raises:
        UserError: unreadable, or another form.
    """
    scenes = read_json(path)
    if not isinstance(scenes, dict) or not all(isinstance(s, list) and all(map(is_shape, s)) for s in scenes.values()):
        raise UserError(
            f"{path} is no table of drawn shapes: draw the set again with download_datasets.py --dataset demo --force"
        )
    return {name: {shape["shape"]: tuple(shape["box"]) for shape in scene} for name, scene in scenes.items()}


def is_shape(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("shape") not in SHAPES or not isinstance(value.get("box"), list):
        return False
    box = value["box"]
    return len(box) == 4 and all(type(edge) in (int, float) and 0 <= edge <= 1 for edge in box)


def play(
    captions_file: Path, names: Sequence[str], words: Sequence[Sequence[str]], weights: Sequence[np.ndarray | None]
) -> dict[str, float]:
    """Play the game with captions of a demo set; returns what `score` does.

    Args:
        captions_file: the set's, beside which its `shapes.json` lies.
        names, words, weights: of each image, see `score`.

    Raises:
        UserError: `shapes.json` cannot be used.
    """
    boxes = read_boxes(captions_file.with_name("shapes.json"))
    return score(words, weights, [boxes.get(name, {}) for name in names])


def score(
    words: Sequence[Sequence[str]], weights: Sequence[np.ndarray | None], boxes: Sequence[Boxes]
) -> dict[str, float]:
    """Score the captions of a set of images.

    Args:
        words: each image's caption.
        weights: its attention, (words, cells); None for an empty caption.
        boxes: where its shapes are. Each kind of shape is there once at most; a word for one that is not there
            is a wrong word, of whose map nothing can be asked, and does not count.

    Returns:
        `pointing_game_words`, how many shape words there are, and as shares of them `pointing_game` (hit) and
        `pointing_game_near`, both also with `_uniform` and `_shuffled`; nothing without a shape word, and
        `_shuffled` is left out where all are in one image.
    """
    owners: list[int] = []
    peaks: list[np.ndarray] = []
    edges: list[tuple[float, float, float, float]] = []
    for number, (caption, rows, known) in enumerate(zip(words, weights, boxes, strict=True)):
        for word, row in zip(caption, () if rows is None else rows, strict=True):
            if word in known:
                owners.append(number)
                peaks.append(peak(row[None])[0])
                edges.append(known[word])
                middles = cell_middles(len(row))
    if not owners:
        return {}
    left, top, right, bottom = np.array(edges).T[:, :, None]  # (N, 1) each
    half = 0.5 / np.sqrt(len(middles))

    def inside(points: np.ndarray, margin: float) -> np.ndarray:
        """(N, P): whether each word's box, that much larger on all sides, holds each of the points (P, 2)."""
        x, y = points.T
        across = (left - margin <= x) & (x <= right + margin)
        return across & (top - margin <= y) & (y <= bottom + margin)

    others = np.array(owners)[:, None] != np.array(owners)
    result: dict[str, float] = {"pointing_game_words": len(owners)}
    for name, margin in (("pointing_game", 0.0), ("pointing_game_near", half)):
        hits = inside(np.array(peaks), margin)  # each word's box against each word's peak
        result[name] = float(hits.diagonal().mean())
        result[f"{name}_uniform"] = float(inside(middles, margin).mean())
        if others.any():
            result[f"{name}_shuffled"] = float(hits[others].mean())
    return result


def describe(result: Mapping[str, float]) -> str:
    """The outcome as a line for people."""

    def chance(name: str) -> str:
        shuffled = result.get(f"{name}_shuffled")
        text = f"any cell alike {result[f'{name}_uniform']:.1%}"
        return text + (f", other pictures' maps {shuffled:.1%}" if shuffled is not None else "")

    return (
        f"Pointing game: of {result['pointing_game_words']} shape words, {result['pointing_game']:.1%} have their "
        f"attention peak on the shape they name ({chance('pointing_game')}), {result['pointing_game_near']:.1%} on it "
        f"or within half a cell ({chance('pointing_game_near')})"
    )
