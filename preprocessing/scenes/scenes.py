"""What a synthetic scene is, and its picture: 1-3 coloured shapes on a plain ground. Pure: no files.

The surprising decision: objects stand far enough apart, and sizes and hues are far enough apart, that every word a
caption may use (left, large, orange) is plainly true or plainly false of the picture; so captions can be checked.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIZE = 224
"""Side of the square in which scenes are laid out, in pixels; all coordinates below are in these units."""
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
HUES = {"red": 0, "orange": 27, "yellow": 54, "green": 120, "cyan": 182, "blue": 222, "purple": 272, "pink": 322}
"""Object colours, by their hue in degrees."""
COLOURS = tuple(HUES)
RADII = {"small": (20.0, 23.0), "large": (33.0, 36.0)}
"""Half the width of an object: range per size word, in pixels."""
SIZES = tuple(RADII)
BACKGROUNDS = {"black": (28, 28, 30), "gray": (128, 128, 132), "white": (238, 238, 236), "brown": (98, 66, 40)}
"""Colour of the ground per name, RGB."""
SUPERSAMPLING = 3
"""Objects are drawn this many times larger, then averaged down."""


@dataclass(frozen=True)
class SceneObject:
    """One shape: the words for it, and where and how it is drawn (pixels; radians)."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]

    def moved(self, x: float, y: float) -> "SceneObject":
        """The same object centred at (x, y)."""
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Scene:
    """Objects in reading order along `layout`: `single`, `row` (left to right) or `column` (top to bottom)."""

    objects: tuple[SceneObject, ...]
    background: str
    layout: str
    tint: tuple[int, int, int]
    noise_seed: int


def sample_object(rng: Random, x: float, y: float, colours: Sequence[str] = COLOURS) -> SceneObject:
    """A random object centred at (x, y) in one of `colours`."""
    size = rng.choice(SIZES)
    colour = rng.choice(colours)
    hue = (HUES[colour] + rng.uniform(-6, 6)) / 360 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, rng.uniform(0.8, 0.95), rng.uniform(0.85, 1.0))
    return SceneObject(
        shape=rng.choice(SHAPES),
        colour=colour,
        size=size,
        x=x,
        y=y,
        radius=rng.uniform(*RADII[size]),
        angle=rng.uniform(-0.2, 0.2),
        rgb=(round(255 * red), round(255 * green), round(255 * blue)),
    )


def compose(rng: Random, objects: Sequence[SceneObject], layout: str) -> Scene:
    """Put `objects` on a random ground."""
    background = rng.choice(tuple(BACKGROUNDS))
    red, green, blue = (min(255, max(0, channel + rng.randint(-10, 10))) for channel in BACKGROUNDS[background])
    return Scene(tuple(objects), background, layout, (red, green, blue), rng.getrandbits(32))


def sample_scene(rng: Random) -> Scene:
    """A random scene; equal for an equal state of `rng`. No two of its objects share a colour."""
    count = rng.choices((1, 2, 3), weights=(35, 40, 25))[0]
    if count == 1:
        x, y = (rng.choice((45, SIZE / 2, SIZE - 45)) + rng.uniform(-6, 6) for _ in "xy")
        return compose(rng, [sample_object(rng, x, y)], "single")
    layout = rng.choice(("row", "column"))
    along = (62, SIZE - 62) if count == 2 else (39, SIZE / 2, SIZE - 39)
    across = rng.uniform(70, SIZE - 70)
    objects: list[SceneObject] = []
    for centre in along:
        position = centre + (rng.uniform(-14, 14) if count == 2 else rng.uniform(-2, 2))
        offset = across + rng.uniform(-18, 18)
        left = [colour for colour in COLOURS if colour not in {other.colour for other in objects}]
        x, y = (position, offset) if layout == "row" else (offset, position)
        objects.append(sample_object(rng, x, y, left))
    return compose(rng, objects, layout)


@cache
def _outline(shape: str) -> npt.NDArray[np.float64]:
    """Corners of `shape` in the unit circle, float64 [N, 2], y downwards."""
    turn = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape in ("circle", "ring"):
        return circle
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.86
    if shape == "triangle":
        return np.array([(0, -1), (1, 0.8), (-1, 0.8)])
    if shape == "star":
        radii = np.tile([1.05, 0.42], 5)
        spikes = np.arange(10) * math.pi / 5 - math.pi / 2
        return np.stack([radii * np.cos(spikes), radii * np.sin(spikes)], axis=1)
    if shape == "cross":
        arm = 0.33
        corner = [(arm, -1), (arm, -arm), (1, -arm)]
        quarters = [(c * x - s * y, s * x + c * y) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in corner]
        return np.array(quarters)
    if shape == "heart":
        x = np.sin(turn) ** 3
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 16
        return np.stack([x, y], axis=1)
    outer = np.linspace(math.radians(52.4), math.radians(307.6), 30)  # moon: a disc minus a smaller one to its right
    inner = np.linspace(math.radians(278), math.radians(82), 24)
    back = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    front = 0.8 * np.stack([np.cos(inner), np.sin(inner)], axis=1) + (0.5, 0)
    moon: npt.NDArray[np.float64] = np.concatenate([back, front]) + np.array((0.25, 0))
    return moon


def _stamp(thing: SceneObject, scale: float) -> tuple[Image.Image, tuple[int, int]]:
    """Mask of an object, mode L, and the pixel where its upper left corner goes."""
    reach = math.ceil(thing.radius * scale * 1.2) + 1
    left, top = math.floor(thing.x * scale) - reach, math.floor(thing.y * scale) - reach
    zoom = SUPERSAMPLING
    mask = Image.new("L", (2 * reach * zoom, 2 * reach * zoom))
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    corners = _outline(thing.shape) @ np.array([[cos, sin], [-sin, cos]]) * thing.radius
    centre = np.array([thing.x * scale - left, thing.y * scale - top]) * zoom
    draw = ImageDraw.Draw(mask)
    draw.polygon([tuple(corner) for corner in corners * scale * zoom + centre], fill=255)
    if thing.shape == "ring":
        draw.polygon([tuple(corner) for corner in corners * scale * zoom * 0.55 + centre], fill=0)
    return mask.reduce(zoom), (left, top)


def render(scene: Scene, size: int = SIZE, extent: float = SIZE) -> Image.Image:
    """The picture of `scene`, RGB, `size` x `size` pixels: a slightly noisy ground and the objects on it.

    `extent` is the side of the ground in the unit of the objects' coordinates.
    """
    noise = np.frombuffer(Random(scene.noise_seed).randbytes(size * size), np.uint8).reshape(size, size, 1) % 9
    pixels = np.clip(np.array(scene.tint, np.int16) + noise.astype(np.int16) - 4, 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    for thing in scene.objects:
        mask, corner = _stamp(thing, size / extent)
        picture.paste(thing.rgb, corner, mask)
    return picture
