"""Pictures and labels that teach an encoder to see scenes: every grid cell is told what it looks at. Pure: no files.

The surprising decision: most pictures are crowds of nine objects, which no caption describes. A convolution costs the
same on an empty ground; a crowd shows it four times as many objects for that price. The others are ordinary scenes, so
that statistics, emptiness and arrangement are seen as they will be.

B pictures of S x S pixels, L = (S / 32) ** 2 cells.
"""

from dataclasses import dataclass, replace
from random import Random

import numpy as np

from preprocessing.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, SIZES, Scene
from preprocessing.scenes import compose, render, sample_object, sample_scene

STRIDE = 32
"""Pixels per cell of the encoder's grid."""
SLOTS = 3
"""A crowd has up to this many objects in each direction."""
FILLED = 0.85
"""Share of the slots that hold an object."""
CELL_CLASSES = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "size": len(SIZES) + 1, "column": 3, "row": 3}
"""What is said of each cell, and in how many classes; the last of the first three means that nothing is there."""
ARRANGEMENTS = (("single", 1), ("row", 2), ("row", 3), ("column", 2), ("column", 3), ("crowd", 0))
PICTURE_CLASSES = {"background": len(BACKGROUNDS), "arrangement": len(ARRANGEMENTS)}
"""What is said of the whole picture."""


@dataclass(frozen=True)
class LabelledBatch:
    """Pictures and what their cells show."""

    pixels: np.ndarray
    """uint8 [B, S, S, 3]."""
    cells: np.ndarray
    """int64 [B, L, 5]: the class per entry of CELL_CLASSES."""
    pictures: np.ndarray
    """int64 [B, 2]: the class per entry of PICTURE_CLASSES."""


def sample_crowd(rng: Random) -> Scene:
    """A ground full of objects, each in its own slot, so that none hides another."""
    objects = []
    pitch = SIZE / SLOTS
    for slot in range(SLOTS * SLOTS):
        if rng.random() < FILLED:
            thing = sample_object(rng, 0, 0)
            play = max(2, pitch / 2 - thing.radius)
            x, y = ((place + 0.5) * pitch + rng.uniform(-play, play) for place in (slot % SLOTS, slot // SLOTS))
            objects.append(replace(thing, x=x, y=y))
    return compose(rng, objects, "crowd")


def label_cells(scene: Scene, side: int) -> np.ndarray:
    """Classes of a grid of `side` x `side` cells, int64 [side * side, 5], in row-major order.

    A cell shows the object whose box its centre lies in; a box is at least a cell wide, so no object goes unseen.
    """
    centres = (np.arange(side) + 0.5) * SIZE / side
    nothing = [count - 1 for count in list(CELL_CLASSES.values())[:3]]
    thirds = (centres * 3 // SIZE).astype(np.int64)
    labels = np.empty((side, side, 5), np.int64)
    labels[..., :3] = nothing
    labels[..., 3], labels[..., 4] = thirds[None, :], thirds[:, None]
    for thing in scene.objects:
        reach = max(thing.radius, SIZE / side / 2)
        rows, columns = abs(centres - thing.y) <= reach, abs(centres - thing.x) <= reach
        classes = SHAPES.index(thing.shape), COLOURS.index(thing.colour), SIZES.index(thing.size)
        labels[rows[:, None] & columns[None, :], :3] = classes
    return labels.reshape(side * side, 5)


def labelled_batch(seed: str, count: int, size: int, crowded: float) -> LabelledBatch:
    """`count` pictures of `size` pixels that follow from `seed` alone; a share `crowded` of them are crowds."""
    pixels, cells, pictures = [], [], []
    for number in range(count):
        rng = Random(f"{seed}/{number}")
        scene = sample_crowd(rng) if rng.random() < crowded else sample_scene(rng)
        pixels.append(np.asarray(render(scene, size)))
        cells.append(label_cells(scene, size // STRIDE))
        objects = 0 if scene.layout == "crowd" else len(scene.objects)
        pictures.append([tuple(BACKGROUNDS).index(scene.background), ARRANGEMENTS.index((scene.layout, objects))])
    return LabelledBatch(np.stack(pixels), np.stack(cells), np.array(pictures))
