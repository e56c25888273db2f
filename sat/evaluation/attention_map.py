"""Where the locations that attention weighs lie in a picture, and the map of their weights over it. numpy alone.

The surprising decision: a cell of the grid stands for the centre of its receptive field, not for the middle of the i-th
of n equal parts. A ResNet's cell i sees around pixel 32 i, half a cell further up and left than that middle.

Positions are in pixels of the picture as it is, not as the encoder saw it; 0 is its left or upper edge.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sat.shards.features import FeatureSpec

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Cells:
    """The cells of a grid over a picture."""

    x: npt.NDArray[np.float64]
    """[columns] where they look, evenly spaced."""
    y: npt.NDArray[np.float64]
    """[rows]"""
    seen: tuple[float, float, float, float]
    """Left, top, right and bottom of what the encoder saw of the picture."""
    size: tuple[int, int]
    """Width and height of the picture."""

    def __len__(self) -> int:
        return len(self.x) * len(self.y)

    def heat(self, alpha: Floats, width: int, height: int) -> npt.NDArray[np.float64]:
        """Weights float [L], row-major -> map [height, width] of the whole picture drawn at that size.

        At the place of a cell the map is its weight; between them it runs smoothly, beyond the last ones it stays as it
        is, and outside what the encoder saw it is zero.
        """
        px = (np.arange(width) + 0.5) * self.size[0] / width
        py = (np.arange(height) + 0.5) * self.size[1] / height
        grid = np.asarray(alpha, dtype=np.float64).reshape(len(self.y), len(self.x))
        smooth: npt.NDArray[np.float64] = (_between(py, self.y) @ grid @ _between(px, self.x).T).clip(min=0)
        left, top, right, bottom = self.seen
        return smooth * ((py >= top) & (py < bottom))[:, None] * ((px >= left) & (px < right))


@dataclass(frozen=True)
class Regions:
    """Boxes in a picture, one per region."""

    boxes: Floats
    """[L, 4] x0 y0 x1 y1 in 0..1."""

    def __len__(self) -> int:
        return len(self.boxes)

    def heat(self, alpha: Floats, width: int, height: int) -> npt.NDArray[np.float64]:
        """Weights float [L] -> map [height, width]: of the boxes over a pixel the greatest weight."""
        px, py = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
        heat = np.zeros((height, width))
        for weight, (x0, y0, x1, y1) in zip(np.asarray(alpha, dtype=np.float64), self.boxes, strict=True):
            inside = ((py >= y0) & (py < y1))[:, None] & ((px >= x0) & (px < x1))
            heat[inside] = np.maximum(heat[inside], weight)
        return heat


Locations = Cells | Regions


def cells_over(spec: FeatureSpec, width: int, height: int) -> Cells:
    """The cells of a grid of `spec` over a picture of `width` x `height` pixels that went through its transform.

    A grid whose encoder is not known is taken for equal parts of the whole picture. Raises ValueError for regions.
    """
    if spec.kind != "grid":
        raise ValueError(f"features of kind {spec.kind!r} have no cells; their boxes come with each picture")
    geometry = spec.transform.geometry if spec.transform else ""
    return cells_at(unit_centres(spec), geometry, width, height)


def cells_at(centres: npt.NDArray[np.float64], geometry: str, width: int, height: int) -> Cells:
    """Cells that look at `centres` [L, 2], x, y in 0..1 of what `geometry` left of a picture."""
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    if geometry == "center_crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2  # as `pictures.fit` cuts
        right, bottom = left + side, top + side
    columns = int((centres[:, 1] == centres[0, 1]).sum())
    x = left + centres[:columns, 0] * (right - left)
    y = top + centres[::columns, 1] * (bottom - top)
    return Cells(x, y, (left, top, right, bottom), (width, height))


def unit_centres(spec: FeatureSpec) -> npt.NDArray[np.float64]:
    """Centres of the cells' receptive fields, float64 [L, 2]: x, y in 0..1 of what the encoder saw."""
    if spec.encoder is not None and spec.transform is not None:
        return (spec.centres() + 0.5) / spec.transform.size
    rows, columns = ((np.arange(count) + 0.5) / count for count in spec.cells)
    return np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)


def even_scale(alphas: Floats, locations: int) -> float:
    """The weight that has the full colour in all panels of a picture: their greatest, but at least `8 / L`.

    So attention that is spread evenly stays pale.
    """
    return max(float(np.max(alphas, initial=0)), min(1.0, 8 / max(locations, 1)))


def _between(at: npt.NDArray[np.float64], nodes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weights [positions, nodes] of the cubic (Catmull-Rom) through values at evenly spaced `nodes`."""
    weights = np.zeros((len(at), len(nodes)))
    last = len(nodes) - 1
    if last == 0:
        weights[:] = 1
        return weights
    place = ((at - nodes[0]) / (nodes[1] - nodes[0])).clip(0, last)
    before = np.minimum(place.astype(int), last - 1)
    t = place - before
    cubic = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3)
    for step, weight in zip(range(-1, 3), cubic, strict=True):
        np.add.at(weights, (np.arange(len(at)), (before + step).clip(0, last)), weight / 2)
    return weights


def panel_size(width: int, height: int, area: float, longest: float) -> tuple[float, float]:
    """Width and height of a panel of this `area` that keeps the picture's proportions, no side above `longest`."""
    ratio = width / height
    side = min(math.sqrt(area * ratio), longest, longest * ratio)
    return side, side / ratio
