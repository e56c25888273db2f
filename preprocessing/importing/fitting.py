"""What was found of a picture -> features and boxes as a data set holds them, or a named reason why not."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from preprocessing.features.statistics import Floats, restore, store
from preprocessing.importing.arrays import BadFeatures
from preprocessing.importing.sources import Found
from sat.shards.features import FeatureSpec

SLACK = 0.01
"""A box may leave its picture by this share of a side: detectors round, and clip one pixel late."""


class Rows(NamedTuple):
    """Features as rows, before they are rounded."""

    values: npt.NDArray[Any]
    """[L, D] as found."""
    cells: tuple[int, int] | None
    """Rows and columns of the grid, where the array told them."""


class Fitted(NamedTuple):
    """What goes into the shard."""

    stored: npt.NDArray[Any]
    """[L, D] in the stored type."""
    values: Floats
    """float32 [L, D]: what a reader gets back."""
    boxes: npt.NDArray[np.float32] | None
    """float32 [L, 4] in 0..1."""


def rows_of(found: Found) -> Rows:
    """The features as rows, turned where the boxes tell that they lie on their side, without a release's padding.

    Raises BadFeatures for arrays of another rank, and for boxes that are not one per row.
    """
    values = found.features
    if values.ndim == 3:
        return Rows(values.reshape(-1, values.shape[2]), (values.shape[0], values.shape[1]))
    if values.ndim != 2:
        raise BadFeatures("wrong rank", f"shape {list(values.shape)}; expected [L, D] or [H, W, D]")
    boxes = found.boxes
    if boxes is not None:
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise BadFeatures("boxes of another shape", f"{list(boxes.shape)}; expected [L, 4]")
        if values.shape[0] != len(boxes) and values.shape[1] == len(boxes):
            values = values.T
        if values.shape[0] != len(boxes):
            raise BadFeatures("not one box per region", f"features {list(values.shape)}, {len(boxes)} boxes")
    if found.count is not None and found.count < len(values):
        values = values[: found.count]
    return Rows(values, None)


def fit(found: Found, spec: FeatureSpec, scale: Floats, size: tuple[int, int]) -> Fitted:
    """Features and boxes for a data set of `spec`; `size` is the picture's by the annotations, (0, 0) if unknown.

    Raises BadFeatures, whose reason is counted and whose detail says what was expected.
    """
    values, cells = rows_of(found)
    _check_shape(found, values, cells, spec)
    if not np.isfinite(values).all():
        raise BadFeatures("not finite", "it holds NaN or inf")
    with np.errstate(over="ignore"):
        stored = store(values.astype(np.float32), spec.dtype, scale)
    kept = restore(stored, spec.dtype, scale)
    if not np.isfinite(kept).all():
        raise BadFeatures(f"too large for {spec.dtype}", f"a magnitude of {np.abs(values).max():g}; use --dtype bf16")
    boxes = _boxes(found, len(values), size) if spec.boxes else None
    return Fitted(stored, kept, boxes)


def _check_shape(found: Found, values: npt.NDArray[Any], cells: tuple[int, int] | None, spec: FeatureSpec) -> None:
    shape = list(found.features.shape)
    if values.shape[1] != spec.dim:
        turned = spec.dim in (shape[0], values.shape[0])
        reason = "transposed" if turned else "another width"
        raise BadFeatures(reason, f"shape {shape}; the width D of this data set is {spec.dim} and comes last")
    if not len(values):
        raise BadFeatures("no regions", f"shape {shape}")
    if spec.kind == "regions":
        if len(values) > spec.max_regions:
            raise BadFeatures("too many regions", f"{len(values)}; --max-regions allows {spec.max_regions}")
    elif len(values) != spec.locations or (cells is not None and cells != spec.cells):
        raise BadFeatures("another grid", f"shape {shape}; this data set has {spec.cells[0]}x{spec.cells[1]} cells")


def _boxes(found: Found, count: int, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """float32 [count, 4] x0 y0 x1 y1 in 0..1; what lies outside 0..1 is taken for pixels."""
    if found.boxes is None:
        raise BadFeatures("no boxes")
    boxes = found.boxes[:count].astype(np.float64)
    if not np.isfinite(boxes).all():
        raise BadFeatures("boxes not finite", "they hold NaN or inf")
    if boxes.min() < 0 - SLACK or boxes.max() > 1 + SLACK:
        width, height = found.size if all(found.size) else size
        if not (width and height):
            raise BadFeatures("boxes in pixels of a picture of unknown size", "give image_w and image_h in the npz")
        boxes = boxes / [width, height, width, height]
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise BadFeatures("boxes inside out", "expected x0 y0 x1 y1 with x0 <= x1 and y0 <= y1")
    if boxes.min() < -SLACK or boxes.max() > 1 + SLACK:
        raise BadFeatures("boxes outside the picture", f"from {boxes.min():.3f} to {boxes.max():.3f} of its sides")
    return boxes.clip(0, 1).astype(np.float32)


def grid_of(cells: int) -> tuple[int, int] | None:
    """(side, side) of a square grid of so many cells; None where they form none."""
    side = math.isqrt(cells)
    return (side, side) if side * side == cells else None
