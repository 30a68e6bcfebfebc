"""A small captioned data set drawn with Pillow: coloured shapes in front of landscapes.

It needs no download and no licence, and a small decoder learns it in a minute or two: for first steps, for tests and
for pictures in the documentation. Its layout is Flickr8k's, with each shape's place beside it in `shapes.json`.
"""

from __future__ import annotations

import cmath
import csv
import io
import itertools
import json
import math
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.io import UserError, make_directory, read_json, require_free_space, temporary_name, write_json

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

DRAWING_VERSION = 2  # in the manifest; raise it when scenes of the same seed change. Older sets stay in use
SIZE = 256  # pixels a side
FINE = 2 * SIZE  # drawn at twice the size and shrunk, for smooth edges
BYTES_PER_SCENE = 40_000
IMAGE_NAME = "scene_{:04d}.jpg"
MANIFEST = "demo.json"
OWN_ENTRIES = {
    "Images", "captions.txt", "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt",
    "shapes.json", MANIFEST,
}  # fmt: skip

Color = tuple[int, ...]  # red, green, blue
WHITE = (255, 255, 255)
COLORS: dict[str, Color] = {
    "red": (222, 38, 44), "blue": (36, 92, 222), "green": (38, 158, 66), "yellow": (252, 214, 32),
    "purple": (142, 52, 182), "orange": (250, 136, 24), "white": (250, 250, 250), "black": (34, 34, 38),
}  # fmt: skip
CORNERS: dict[str, tuple[int, float, tuple[float, ...]]] = {  # of each shape: how many, angle of the first, distances
    "circle": (80, 0, (1,)), "square": (4, math.pi / 4, (1.2,)), "triangle": (3, 0, (1.12,)),
    "star": (10, 0, (1.1, 0.48)), "heart": (80, 0, ()),
}  # fmt: skip
SHAPES = tuple(CORNERS)
RADII = {"small": 0.105, "large": 0.215}  # fractions of the picture's side
PLACES = (  # of a single shape: direction across and down, phrase
    (-1, 0, "on the left"), (1, 0, "on the right"), (0, -1, "at the top"), (0, 1, "at the bottom"),
    (0, 0, "in the middle"),
)  # fmt: skip


@dataclass(frozen=True)
class Background:
    """A background: its phrase in captions, and how it is drawn."""

    phrase: str
    bands: tuple[tuple[float, Color, Color], ...]  # upper edge, colour there and at the next edge
    dots: tuple[Color, ...] = ()  # flowers, grains of sand, stars, snowflakes
    dots_above: bool = False  # in the sky instead of on the ground
    hills: Color | None = None  # in front of the sky
    light: Color | None = None  # the sun or the moon
    bricks: bool = False


BACKGROUNDS = {
    "meadow": Background(
        "in a sunny meadow", ((0, (86, 170, 240), (214, 238, 252)), (0.55, (122, 196, 84), (58, 138, 50))),
        dots=(WHITE, (255, 240, 150), (250, 180, 210), (150, 214, 104)), hills=(136, 196, 104), light=(255, 236, 130),
    ),
    "beach": Background(
        "at a sandy beach",
        ((0, (70, 162, 232), (206, 236, 250)), (0.36, (24, 108, 168), (92, 206, 212)), (0.6, WHITE, (206, 176, 122)),
         (0.62, (250, 226, 170), (226, 188, 122))),
        dots=((204, 164, 100), (255, 240, 200)),
    ),
    "night": Background(
        "under a night sky", ((0, (8, 12, 44), (58, 52, 116)), (0.92, (22, 22, 58), (16, 16, 44))),
        dots=(WHITE, (190, 190, 235)), dots_above=True, hills=(22, 22, 58), light=(250, 244, 214),
    ),
    "snow": Background(
        "in a snowy field", ((0, (150, 178, 208), (226, 234, 244)), (0.48, (250, 252, 255), (206, 218, 238))),
        dots=(WHITE,), dots_above=True, hills=(196, 210, 228),
    ),
    "wall": Background("in front of a grey wall", ((0, (136, 136, 138), (112, 112, 116)),), bricks=True),
}  # fmt: skip
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
    size: str  # of RADII
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """The content of one picture, and its captions."""

    background: str
    shapes: tuple[Shape, ...]
    captions: tuple[str, ...]


# --------------------------------------------------------------------------------------------------
# The set on disk


def draw_demo_dataset(directory: Path, scenes: int = 800, seed: int = 0, redraw: bool = False) -> None:
    """Draw `scenes` pictures with five captions each into `directory`, in the layout of Flickr8k.

    The same seed gives the same files bit for bit (with the same Pillow). A complete set, also one that an older
    version drew, is left unchanged. The set appears in `directory` whole or not at all.

    Args:
        scenes: number of pictures, at least 10: 80 % are for training, 10 % each for validation and testing.
        redraw: draw again even if the set is complete.

    Raises:
        UserError: `directory` holds other files than a demo set, or cannot be written.
    """
    if scenes < 10:
        raise UserError(f"a demo set needs at least 10 scenes for its three splits, not {scenes}")
    require_own(directory)
    if not redraw and is_complete(directory, scenes, seed):
        return
    make_directory(directory.parent, "the demo set")
    require_free_space(directory.parent, scenes * BYTES_PER_SCENE, f"drawing {scenes} scenes")
    # Drawn beside the target and renamed at the end, so that an interrupted drawing leaves no partial set.
    directory = directory.absolute()  # gives "." a name to put the temporary folders beside
    fresh = temporary_name(directory)
    try:
        write_scenes(fresh, scenes, seed)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(fresh, directory)
    except OSError as error:
        raise UserError(f"cannot write the demo set to {directory}: {error}. Choose another --data_dir") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def is_complete(directory: Path, scenes: int, seed: int) -> bool:
    """Whether `directory` holds exactly the demo set of these arguments, with all its pictures, of any version."""
    if any(not (directory / name).exists() for name in OWN_ENTRIES):
        return False
    if not read_json(directory / MANIFEST).items() >= {"scenes": scenes, "seed": seed}.items():
        return False
    return all((directory / "Images" / IMAGE_NAME.format(number)).is_file() for number in range(1, scenes + 1))


def require_own(directory: Path) -> None:
    """Raise UserError if replacing `directory` would delete a file of the user's."""
    found = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    if found and (MANIFEST not in found or found - OWN_ENTRIES):
        foreign = ", ".join((sorted(found - OWN_ENTRIES) or sorted(found))[:3])
        raise UserError(
            f"{directory} holds files that are not a demo set ({foreign}): move them away, or choose another --data_dir"
        )


def write_scenes(directory: Path, scenes: int, seed: int) -> None:
    """Write a whole set into the new folder `directory`, the manifest last."""
    (directory / "Images").mkdir(parents=True)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["image", "caption"])
    shapes: dict[str, list[dict[str, Any]]] = {}
    names = [IMAGE_NAME.format(number) for number in range(1, scenes + 1)]
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
    splits = {"train": names[: -2 * held_out], "dev": names[-2 * held_out : -held_out], "test": names[-held_out:]}
    texts = {f"Flickr_8k.{split}Images.txt": "\n".join(members) + "\n" for split, members in splits.items()}
    texts |= {"captions.txt": table.getvalue(), "shapes.json": json.dumps(shapes) + "\n"}
    for file_name, text in texts.items():
        (directory / file_name).write_bytes(text.encode())  # bytes: the same line ends on every system
    write_json(directory / MANIFEST, {"drawing_version": DRAWING_VERSION, "scenes": scenes, "seed": seed})


# --------------------------------------------------------------------------------------------------
# The content of a scene


def invent_scene(rng: random.Random) -> Scene:
    """Choose a scene's background and shapes at random, and word its five captions."""
    background = rng.choice(tuple(BACKGROUNDS))
    colors = [color for color in COLORS if (background, color) not in CAMOUFLAGE]
    words = {"scene": BACKGROUNDS[background].phrase}
    if rng.random() < 0.6:
        across, down, words["place"] = rng.choice(PLACES)
        size = rng.choice(tuple(RADII))
        shift = 0.5 - RADII[size] - 0.05
        shape = make_shape(rng, rng.choice(SHAPES), rng.choice(colors), size, 0.5 + across * shift, 0.5 + down * shift)
        words |= {"size": size, "big": "big" if size == "large" else size, "thing": f"{shape.color} {shape.shape}"}
        return Scene(background, (shape,), word_captions(rng, ONE_SHAPE, words))
    beside = rng.random() < 0.5
    # Two shapes differ in form and in colour, so that a word means one of them only.
    kinds, hues = rng.sample(SHAPES, 2), rng.sample(colors, 2)
    pair = []
    for kind, hue, along in zip(kinds, hues, (0.26, 0.74), strict=True):
        x, y = (along, 0.5) if beside else (0.5, along)
        pair.append(make_shape(rng, kind, hue, rng.choice(tuple(RADII)), x, y))
    words["relation"] = "to the left of" if beside else "above"
    words |= {"first": f"{hues[0]} {kinds[0]}", "second": f"{hues[1]} {kinds[1]}"}
    words |= {"size_1": pair[0].size, "size_2": pair[1].size}
    return Scene(background, tuple(pair), word_captions(rng, TWO_SHAPES, words))


def make_shape(rng: random.Random, shape: str, color: str, size: str, x: float, y: float) -> Shape:
    x, y = x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)
    return Shape(shape, color, size, x, y, RADII[size] * rng.uniform(0.94, 1.0))


def word_captions(rng: random.Random, templates: tuple[str, ...], words: dict[str, str]) -> tuple[str, ...]:
    captions = (f"{template.format(**words)} ." for template in rng.sample(templates, 5))
    return tuple(caption.replace("a orange", "an orange") for caption in captions)


# --------------------------------------------------------------------------------------------------
# Drawing


def draw_scene(scene: Scene, rng: random.Random) -> tuple[Image.Image, list[list[float]]]:
    """Return the picture, SIZE x SIZE, and each shape's box [x0, y0, x1, y1] as fractions of its sides."""
    from PIL import Image

    image = draw_background(BACKGROUNDS[scene.background], rng)
    boxes = [draw_shape(image, shape, rng) for shape in scene.shapes]
    return image.resize((SIZE, SIZE), Image.Resampling.BOX), boxes


def draw_background(background: Background, rng: random.Random) -> Image.Image:
    """Return the background, FINE x FINE."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (FINE, FINE))
    pen = ImageDraw.Draw(image)
    lift = rng.uniform(-0.03, 0.03)  # of the horizon
    edges = [max(0.0, top and top + lift) for top, *_ in background.bands]
    for (_, upper, lower), start, end in zip(background.bands, edges, [*edges[1:], 1.0], strict=True):
        image.paste(gradient(FINE, round((end - start) * FINE) + 1, upper, lower), (0, round(start * FINE)))
        if start == 0 and background.light:
            disc(pen, rng.choice((0.08, 0.92)), 0.08, 0.05, background.light)
        if start == 0 and background.hills:
            for number in range(4):
                disc(pen, number / 3 + rng.uniform(-0.1, 0.1), end + 0.1, rng.uniform(0.14, 0.2), background.hills)
    for _ in range(120 if background.dots else 0):
        height = rng.uniform(0, edges[-1]) if background.dots_above else rng.uniform(edges[-1] + 0.02, 1)
        disc(pen, rng.random(), height, rng.uniform(0.002, 0.006), rng.choice(background.dots))
    wide, tall, shift = FINE // 6, FINE // 12, rng.random()
    for row, column in itertools.product(range(13), range(-1, 8)) if background.bricks else ():
        x, y, grey = round((column + row % 2 / 2 - shift) * wide), row * tall, rng.randint(160, 190) - 3 * row
        pen.rectangle((x + 4, y + 4, x + wide, y + tall), fill=(grey, grey, grey + 3))
    return image


def draw_shape(image: Image.Image, shape: Shape, rng: random.Random) -> list[float]:
    """Draw a shape with its shadow and rim onto `image`; return its box."""
    from PIL import Image, ImageChops, ImageDraw, ImageFilter

    centre, turn = complex(shape.x, shape.y), cmath.rect(shape.radius, rng.uniform(-0.12, 0.12))
    corners = [FINE * (centre + turn * corner) for corner in outline(shape.shape)]
    points = [(corner.real, corner.imag) for corner in corners]
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    shadow = ImageChops.offset(mask, 7, 9).filter(ImageFilter.GaussianBlur(7)).point(lambda value: value * 0.5)
    image.paste((10, 14, 30), (0, 0), shadow)

    color = COLORS[shape.color]
    box = mask.getbbox() or (0, 0, FINE, FINE)
    light, dark = tuple(192 * c // 255 + 63 for c in color), tuple(c * 7 // 8 for c in color)
    image.paste(gradient(box[2] - box[0], box[3] - box[1], light, dark), box, mask.crop(box))
    # A pale rim separates dark shapes from dark ground, a grey one white shapes from light ground.
    rim = (112, 118, 130) if shape.color == "white" else (236, 240, 246)
    ImageDraw.Draw(image).line([*points, *points[:2]], fill=rim, width=6, joint="curve")
    return [round(edge / FINE, 4) for edge in box]


def outline(shape: str) -> list[complex]:
    """Return the corners of a shape of radius 1 around 0; real parts point right, imaginary ones down."""
    count, start, distances = CORNERS[shape]
    angles = [start + 2 * math.pi * corner / count for corner in range(count)]
    if shape == "heart":
        across = [16 * math.sin(t) ** 3 for t in angles]
        up = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5 for t in angles]
        return [complex(x, -y) / 16 for x, y in zip(across, up, strict=True)]
    return [cmath.rect(distances[i % len(distances)], angle - math.pi / 2) for i, angle in enumerate(angles)]


def gradient(width: int, height: int, top: Color, bottom: Color) -> Image.Image:
    """Return an image of that many pixels, from `top` down to `bottom`."""
    from PIL import Image, ImageOps

    return ImageOps.colorize(Image.linear_gradient("L").resize((width, height)), top, bottom)


def disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: Color) -> None:
    pen.ellipse([FINE * edge for edge in (x - radius, y - radius, x + radius, y + radius)], fill=color)
