"""Draw where a captioner looked: the picture, then once per word, lit by that word's attention.

The surprise: the attention is brightness, not a coloured layer, so nothing hides what the model looked at. Each word is
scaled by its own greatest weight: panels show where it looked, not how surely.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = 5
PANEL_INCHES = 2.2
DARK = 0.3
"""Brightness left where a word does not look."""


def plot_attention(
    picture: Image.Image | np.ndarray, words: Sequence[str], alphas: np.ndarray, path: str | os.PathLike
) -> None:
    """Write a PNG with the picture and a panel per word.

    `picture`: exactly what the encoder saw, S x S, as an image or uint8 [3, S, S]. `alphas`: [T, L], array or CPU
    tensor, weights of the L = g x g cells in row-major order, one row per word.
    Raises ValueError where T is not the number of words or L is no square.
    """
    from matplotlib.figure import Figure

    weights = np.asarray(alphas, dtype=np.float32)
    if len(weights) != len(words):
        raise ValueError(f"{path}: {len(words)} words but attention of {len(weights)} steps")
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.moveaxis(np.asarray(picture), 0, -1))
    panels = [("", image), *((word, light(image, alpha)) for word, alpha in zip(words, weights))]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL_INCHES * columns, (PANEL_INCHES + 0.25) * rows), layout="constrained")
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for ax in axes:
        ax.axis("off")
    for ax, (word, panel) in zip(axes, panels):
        ax.imshow(panel)
        ax.set_title(word, fontsize=11, parse_math=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def light(image: Image.Image, alpha: np.ndarray) -> Image.Image:
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
