"""How much of a shape word's attention lies on the object that the word stands for. numpy alone.

An object's cells are those whose square, as wide as the cells are apart and with its centre where the cell looks, holds
a part of the object's disc. The surprising decision: their mass is held against their own share of all cells too, not
only against the object's share of the picture. An object touches more cells than it fills, so even attention would have
several times the object's share; of its cells' share it has exactly once.
"""

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from preprocessing.scenes.captions import objects_named
from preprocessing.scenes.scenes import SIZE, Scene, SceneObject

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class SeenWords:
    """The words of one caption and where the model looked at each."""

    words: tuple[str, ...]
    attention: Floats
    """[words, L]"""


@dataclass(frozen=True)
class CaptionAttention:
    """What `sat evaluate --attention` keeps, as far as it is needed here."""

    centres: Floats
    """[L, 2] x, y where each cell looks, in 0..1 of the picture."""
    captions: Mapping[str, SeenWords]
    """By image id."""


@dataclass(frozen=True)
class Looking:
    """Means over all shape words that name an object which is there."""

    words: int
    """How many these are."""
    mass: float
    """Attention on the object's cells."""
    area: float
    """The object's disc as a share of the picture."""
    cells: float
    """The object's cells as a share of all cells."""
    times_area: float
    """mass / area; even attention has cells / area."""
    times_cells: float
    """mass / cells; even attention has 1."""


def read_attention(path: Path) -> CaptionAttention:
    """The attention of captions of whole pictures. ValueError for a file that is damaged or of something else."""
    try:
        with np.load(path, allow_pickle=False) as found:
            names = ("image_ids", "starts", "words", "attention", "centres")
            image_ids, starts, words, attention, centres = (found[name] for name in names)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no file of attention: {error}; run `sat evaluate --attention` again") from None
    if len(centres) != attention.shape[1]:
        raise ValueError(f"{path}: attention over {attention.shape[1]} locations, {len(centres)} of them known places")
    captions = {}
    for image_id, start, end in zip(image_ids, starts, starts[1:], strict=False):
        its = slice(start, end)
        captions[str(image_id)] = SeenWords(tuple(map(str, words[its])), attention[its])
    return CaptionAttention(centres, captions)


def measure_looking(found: CaptionAttention, scenes: Mapping[str, Scene]) -> Looking | None:
    """How well the attention sits on its objects; None where no caption names an object that is there."""
    rows = [row for image, seen in found.captions.items() for row in _shape_words(seen, found.centres, scenes[image])]
    if not rows:
        return None
    mass, area, cells = np.mean(rows, axis=0).tolist()
    return Looking(len(rows), mass, area, cells, times_area=mass / area, times_cells=mass / cells)


def _shape_words(seen: SeenWords, centres: Floats, scene: Scene) -> Iterator[tuple[float, float, float]]:
    """(mass on its cells, share of the picture, its cells' share of all) of every object named."""
    for place, thing in objects_named(seen.words, scene):
        on = cells_of(thing, centres)
        yield float(seen.attention[place] @ on), np.pi * thing.radius**2 / SIZE**2, float(on.mean())


def cells_of(thing: SceneObject, centres: Floats) -> npt.NDArray[np.bool_]:
    """[L] which cells' squares hold a part of the object's disc; the nearest one at least."""
    positions = centres * SIZE  # [L, 2]
    half = spacing(positions) / 2
    away = np.maximum(np.abs(positions - (thing.x, thing.y)) - half, 0)  # from the square's nearest point
    distance = np.hypot(*away.T)
    on: npt.NDArray[np.bool_] = distance < max(thing.radius, distance.min() + 1e-9)
    return on


def spacing(positions: Floats) -> npt.NDArray[np.float64]:
    """[2] between neighbours of `positions` [L, 2] across and down; the greatest position where there is but one."""
    steps = [np.diff(np.unique(positions[:, axis].round(6))) for axis in (0, 1)]
    return np.array([step.min() if len(step) else float(positions.max()) for step in steps])
