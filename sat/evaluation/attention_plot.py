"""Draw where a captioner looked: the picture, then once per word, lit by that word's attention.

The attention is brightness, not a coloured layer, so nothing hides what the model looked at. Each word is
scaled by its own greatest weight: panels show where it looked, not how surely.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from sat import files

COLUMNS = 5
PANEL_INCHES = 2.2
DARK = 0.3
"""Brightness left where a word does not look."""


def plot_attention(
    picture: npt.NDArray[np.uint8], words: Sequence[str], alphas: npt.NDArray[np.float32], path: Path
) -> None:
    """Write a PNG with the picture and a panel per word.

    `picture`: exactly what the encoder saw, [S, S, 3]. `alphas`: [T, L], weights of the L = g x g cells in row-major
    order, one row per word. Raises ValueError where T is not the number of words or L is no square.
    """
    from matplotlib.figure import Figure

    if len(alphas) != len(words):
        raise ValueError(f"{path}: {len(words)} words but attention of {len(alphas)} steps")
    image = Image.fromarray(picture)
    panels = [("", image), *((word, light(image, alpha)) for word, alpha in zip(words, alphas, strict=True))]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL_INCHES * columns, (PANEL_INCHES + 0.25) * rows), layout="constrained")
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for ax in axes:
        ax.axis("off")
    for ax, (word, panel) in zip(axes, panels, strict=False):  # the last row may have room
        ax.imshow(panel)
        ax.set_title(word, fontsize=11, parse_math=False)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def light(image: Image.Image, alpha: npt.NDArray[np.float32]) -> Image.Image:
    """The image, bright in proportion to `alpha` (float [L], weights of a square grid that covers the image).

    The weights are interpolated between the centres of the cells, each of which covers its stride of the image.
    Raises ValueError where L is no square.
    """
    side = math.isqrt(len(alpha))
    if side * side != len(alpha):
        raise ValueError(f"attention over {len(alpha)} cells cannot be drawn: they form no square grid")
    grid = Image.fromarray(np.asarray(alpha, dtype=np.float32).reshape(side, side))
    smooth = np.asarray(grid.resize(image.size, Image.Resampling.BICUBIC)).clip(min=0)
    brightness = DARK + (1 - DARK) * smooth / max(float(smooth.max()), 1e-12)
    return Image.fromarray((np.asarray(image.convert("RGB")) * brightness[..., None]).round().astype(np.uint8))
