"""A caption's words as small pictures under their attention, for pages that load nothing.

The picture stands in the page once, as a property that all its panels share; a word's attention over a grid is an image
of one pixel per cell that the browser stretches over it. So hundreds of captioned pictures take a few megabytes.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sat.evaluation.attention_map import Cells, Floats, Locations, Regions, even_scale
from sat.evaluation.attention_plot import OUTLINED, coloured
from sat.evaluation.prediction import Prediction

LONGEST = 320
"""Pixels of a shown picture's longer side at most."""
REGION_PIXELS = 56
"""Pixels of the longer side of a map of regions, which the browser stretches too."""


@dataclass(frozen=True)
class Panel:
    """One word and where the model looked at it."""

    word: str
    probability: float | None
    """Of the word after those before it; None where it was not kept."""
    gate: float | None
    """How far the gate on what is seen was open, 0 to 1; None without a gate."""
    overlay: str
    """The attention's colours, a data URI of a PNG with transparency."""
    box: str
    """CSS that lays them over the picture: left, top, width and height in percent."""
    outlines: tuple[str, ...] = ()
    """CSS of the boxes of the strongest regions; none of a grid."""


@dataclass(frozen=True)
class Panels:
    """All words of a caption, on one scale."""

    picture: str
    """What lies under the attention, a data URI."""
    width: int
    height: int
    words: tuple[Panel, ...]
    even: float
    """The weight of each location if all were equal."""
    full: float
    """The weight that has the full colour."""
    location: str
    """`cell` or `region`."""


def panels(prediction: Prediction, picture: Image.Image, where: Locations) -> Panels | None:
    """A panel per word over `picture`, RGB, in which the locations lie at `where`; None where there is no attention.

    Raises ValueError where the attention is over another number of locations.
    """
    alphas = prediction.attention
    if alphas is None or not len(alphas):
        return None
    if alphas.shape[1] != len(where):
        raise ValueError(
            f"{prediction.image_id}: attention over {alphas.shape[1]} locations, but {len(where)} are known"
        )
    scale = even_scale(alphas, len(where))
    words = []
    for place, word in enumerate(prediction.words):
        strength = alphas[place] / scale
        outlines: tuple[str, ...] = ()
        if isinstance(where, Cells):
            overlay, box = _over_grid(strength, where)
        else:
            overlay, box, outlines = _over_regions(strength, where, picture)
        sure, gate = _at(prediction.probabilities, place), _at(prediction.gates, place)
        words.append(Panel(word, sure, gate, overlay, box, outlines))
    location = "region" if isinstance(where, Regions) else "cell"
    return Panels(jpeg_uri(picture), *picture.size, tuple(words), 1 / len(where), scale, location)


def jpeg_uri(picture: Image.Image) -> str:
    """An RGB picture, made smaller where it is larger than `LONGEST`, as a data URI."""
    small = picture.copy()
    small.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _at(values: npt.NDArray[np.float32] | None, place: int) -> float | None:
    return None if values is None else float(values[place])


def _over_grid(strength: Floats, where: Cells) -> tuple[str, str]:
    """The cells' colours, laid so that each cell's middle is where it looks; beyond the last they go on as they are."""
    grid = np.pad(strength.reshape(len(where.y), len(where.x)), 1, mode="edge")
    box = []
    for at, length, count in ((where.x, where.size[0], grid.shape[1]), (where.y, where.size[1], grid.shape[0])):
        step = at[1] - at[0] if len(at) > 1 else length
        box.append(((at[0] - 1.5 * step) / length, count * step / length))
    (left, width), (top, height) = box
    return _png_uri(grid), _box(left, top, width, height)


def _over_regions(strength: Floats, where: Regions, picture: Image.Image) -> tuple[str, str, tuple[str, ...]]:
    """The greatest weight at each place, and the outlines of the strongest boxes."""
    shrunk = REGION_PIXELS / max(picture.size)
    width, height = (max(1, round(side * shrunk)) for side in picture.size)
    strongest = np.argsort(-strength, kind="stable")[:OUTLINED]
    outlines = tuple(_box(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in where.boxes[strongest].tolist())
    return _png_uri(where.heat(strength, width, height)), _box(0, 0, 1, 1), outlines


def _box(left: float, top: float, width: float, height: float) -> str:
    shares = {"left": left, "top": top, "width": width, "height": height}
    return "; ".join(f"{name}: {100 * share:.2f}%" for name, share in shares.items())


def _png_uri(strength: Floats) -> str:
    """Shares of the scale [H, W] as coloured pixels, a data URI."""
    pixels: npt.NDArray[np.uint8] = (255 * coloured(strength.clip(0, 1))).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
