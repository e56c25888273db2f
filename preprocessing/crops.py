"""Pictures and labels that teach an encoder what the objects of scenes look like: one object on a ground. Pure: no files.

The surprising decision: the crops are barely larger than their object (48 pixels), so that almost every pixel that is paid
for shows one. At the size of a whole scene the same number of objects costs five times as much and is learned worse.

B crops of C x C pixels.
"""

from dataclasses import dataclass
from random import Random

import numpy as np

from preprocessing.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, compose, render, sample_object

CLASSES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "background": tuple(BACKGROUNDS)}
"""What is said of each crop, and the classes of each."""


@dataclass(frozen=True)
class LabelledCrops:
    pixels: np.ndarray
    """uint8 [B, C, C, 3]."""
    labels: np.ndarray
    """int64 [B, 4]: the class per entry of CLASSES."""


def sample_crop(rng: Random, side: int) -> Scene:
    """One object near the middle of a ground of `side` pixels, as large as in a scene."""
    thing = sample_object(rng, 0, 0)
    play = max(2, side / 2 - thing.radius)
    x, y = (side / 2 + rng.uniform(-play, play) for _ in "xy")
    return compose(rng, [thing.moved(x, y)], "single")


def labelled_crops(seed: str, count: int, side: int) -> LabelledCrops:
    """`count` crops of `side` pixels that follow from `seed` alone."""
    pixels, labels = [], []
    for number in range(count):
        crop = sample_crop(Random(f"{seed}/{number}"), side)
        thing = crop.objects[0]
        said = {"shape": thing.shape, "colour": thing.colour, "size": thing.size, "background": crop.background}
        pixels.append(np.asarray(render(crop, side, extent=side)))
        labels.append([classes.index(said[name]) for name, classes in CLASSES.items()])
    return LabelledCrops(np.stack(pixels), np.array(labels))
