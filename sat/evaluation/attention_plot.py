"""Draw where a captioner looked: the picture, then once per word under a map of that word's attention.

Colours lie over a picture whose own colours and contrast are taken back, so they show on dark and on bright alike; the
first panel has the picture as it is. One scale, with its bar, serves all words: attention that is spread evenly stays
pale, and a word that looks nowhere in particular does not look as sure as one that does.
"""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sat import files
from sat.evaluation.attention_map import Floats, Locations, Regions, even_scale, panel_size
from sat.evaluation.prediction import Prediction

FORMATS = ("png", "svg", "pdf")
PAGE_INCHES = 10.5
"""Width that panels share."""
PANEL_AREA = 4.6
"""Square inches of a panel."""
LONGEST = 4.2
"""Inches of a panel's longer side at most."""
DPI = 150
TITLE_INCHES = 0.5
COLOURS = "turbo"
OPACITY = 0.8
"""Of the full colour; it falls with the weight."""
OUTLINED = 3
"""Regions whose boxes are drawn, the strongest of a word."""
_FUNCTION_WORDS = """a an the of in on at to into onto by for from with without as and or but that which who its his
her their it he she they we is are was were be been being has have there this these those up out off"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that name nothing to look at, folded unless asked for."""
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans")
"""Families tried in turn for a letter; those that are not installed are passed over."""


@dataclass(frozen=True)
class Drawing:
    """How attention is drawn."""

    format: str = "png"
    """`png`, or text and lines as vectors: `svg`, `pdf`."""
    all_words: bool = False
    """Draw function words (a, of, the) too."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} cannot be drawn; choose one of {', '.join(FORMATS)}")


def plot_attention(
    picture: Image.Image,
    prediction: Prediction,
    where: Locations,
    path: Path,
    drawing: Drawing = Drawing(),
    references: Sequence[str] = (),
) -> None:
    """Write the picture, its caption and a panel per word to `path`.

    `picture`: upright, RGB, in its own proportions. The attention is `prediction.attention` [words, L] over the L
    locations of `where`. Raises ValueError where they do not fit.
    """
    words, alphas = prediction.words, prediction.attention
    if alphas is None or len(alphas) != len(words):
        raise ValueError(f"{path}: {len(words)} words but attention of {0 if alphas is None else len(alphas)} steps")
    if alphas.size and alphas.shape[1] != len(where):
        raise ValueError(f"{path}: attention over {alphas.shape[1]} locations, but {len(where)} are known")
    import matplotlib

    settings = {"font.family": _families(), "svg.hashsalt": "sat", "pdf.fonttype": 42, "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = _figure(picture, prediction, where, shown_words(words, drawing.all_words), references)
        metadata = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[drawing.format]
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format=drawing.format, dpi=DPI, metadata=metadata)


def read_references(path: Path | None) -> dict[str, list[str]]:
    """Captions that are known, by file or image id. ValueError for a file that holds something else."""
    if path is None:
        return {}
    try:
        known = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    of_files = known.items() if isinstance(known, dict) else [("", None)]
    if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for _, texts in of_files):
        raise ValueError(f"{path} is no object of the form {{file: [captions]}}")
    return dict(of_files)


def shown_words(words: Sequence[str], all_words: bool = False) -> list[int]:
    """Places of the words that get a panel: those that are no function words, or all where none is left."""
    content = [place for place, word in enumerate(words) if word.lower() not in FUNCTION_WORDS]
    return list(range(len(words))) if all_words or not content else content


def _figure(
    picture: Image.Image, prediction: Prediction, where: Locations, shown: Sequence[int], references: Sequence[str]
) -> Any:
    from matplotlib.figure import Figure

    assert prediction.attention is not None
    width, height = panel_size(*picture.size, PANEL_AREA, LONGEST)
    rows = math.ceil((len(shown) + 1) / max(1, int(PAGE_INCHES / (width + 0.1))))
    columns = math.ceil((len(shown) + 1) / rows)
    page = max(columns * (width + 0.1), 4.0) + 0.2
    heading = _heading(prediction, references, int(page * 10.5))
    head = 0.1 + 0.2 * sum(text.count("\n") + 1 for text, _ in heading)
    body = rows * (height + TITLE_INCHES)
    figure = Figure(figsize=(page, head + body + 0.75))
    _write_heading(figure, heading, head + body + 0.75)
    scale = even_scale(prediction.attention, len(where))
    left = (page - columns * (width + 0.1)) / 2
    for number, word in enumerate([None, *shown]):
        row, column = divmod(number, columns)
        bottom = 0.75 + body - (row + 1) * (height + TITLE_INCHES)
        box = (left + column * (width + 0.1) + 0.05, bottom, width, height)
        ax = figure.add_axes(_share(figure, box))
        ax.axis("off")
        _panel(ax, picture, prediction, where, word, scale)
    _bar(figure, figure.add_axes(_share(figure, (page / 2 - 1.6, 0.42, 3.2, 0.13))), scale, where)
    return figure


def _panel(
    ax: Any, picture: Image.Image, prediction: Prediction, where: Locations, word: int | None, scale: float
) -> None:
    """The picture as it is (`word` None), or under the attention of a word."""
    size = _drawn_size(picture)
    small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    extent = (0, picture.width, picture.height, 0)
    if word is None:
        ax.imshow(small, extent=extent, interpolation="lanczos")
        return
    assert prediction.attention is not None
    alpha = prediction.attention[word]
    ax.imshow(lay_over(small, where.heat(alpha, *size), scale), extent=extent, interpolation="bilinear")
    ax.set_title(prediction.words[word], fontsize=12, pad=14, parse_math=False)
    ax.text(0.5, 1.02, _figures(prediction, word), transform=ax.transAxes, ha="center", fontsize=8, color="0.35")
    if isinstance(where, Regions):
        _outline(ax, where, alpha, scale, picture.size)


def lay_over(picture: Image.Image, heat: Floats, scale: float) -> npt.NDArray[np.uint8]:
    """The picture in pale grey-ish colours under the colours of `heat` [H, W], RGB uint8 [H, W, 3]."""
    pixels = np.asarray(picture, dtype=np.float64) / 255
    grey = pixels @ (0.299, 0.587, 0.114)
    muted = 0.3 + 0.45 * (0.75 * grey[..., None] + 0.25 * pixels)
    colours = coloured((heat / scale).clip(0, 1))
    opacity = colours[..., 3:]
    laid = (1 - opacity) * muted + opacity * colours[..., :3]
    return (255 * laid).round().astype(np.uint8)


def coloured(strength: Floats) -> npt.NDArray[np.float64]:
    """RGBA in 0..1 [..., 4] of shares of the scale [...]: what is strong is opaque."""
    return np.concatenate([_colours(strength), OPACITY * strength[..., None] ** 0.7], axis=-1)


def _colours(strength: Floats) -> npt.NDArray[np.float64]:
    """RGB in 0..1 of a share of the scale."""
    import matplotlib

    colours: npt.NDArray[np.float64] = matplotlib.colormaps[COLOURS](0.15 + 0.8 * strength)[..., :3]
    return colours


def _outline(ax: Any, where: Regions, alpha: Floats, scale: float, size: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    for region in np.argsort(-alpha, kind="stable")[:OUTLINED]:
        x0, y0, x1, y1 = where.boxes[region] * np.array([*size, *size])
        strength = min(1.0, float(alpha[region]) / scale)
        for colour, line in (("black", 2.6), (_colours(np.array([strength]))[0], 1.6)):
            box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=line)
            ax.add_patch(box)


def _figures(prediction: Prediction, word: int) -> str:
    known = (("p", prediction.probabilities), ("gate", prediction.gates))
    return "   ".join(f"{name} {values[word]:.2f}" for name, values in known if values is not None)


def _heading(prediction: Prediction, references: Sequence[str], letters: int) -> list[tuple[str, dict[str, Any]]]:
    """Lines above the panels, each with how it is written."""
    caption = prediction.caption or "(no words)"
    score = f"score {prediction.score:.2f}, log-probability {prediction.log_probability:.2f}"
    score += "" if prediction.finished else ", cut at the greatest length"
    lines = [(textwrap.fill(caption, max(20, int(letters * 0.8))), {"fontsize": 13, "fontweight": "bold"})]
    lines.append((score, {"fontsize": 9, "color": "0.35"}))
    for reference in references:
        text = textwrap.fill(reference, letters, initial_indent="reference: ", subsequent_indent="    ")
        lines.append((text, {"fontsize": 9, "color": "0.35"}))
    return lines


def _write_heading(figure: Any, lines: Sequence[tuple[str, dict[str, Any]]], height: float) -> None:
    down = 0.15
    for text, style in lines:
        figure.text(0.02, 1 - down / height, text, va="top", parse_math=False, linespacing=1.2, **style)
        down += (0.24 if style["fontsize"] > 10 else 0.18) * (text.count("\n") + 1)


def _bar(figure: Any, ax: Any, scale: float, where: Locations) -> None:
    """The scale of all panels, as its colours look on mid-grey."""
    grey = Image.new("RGB", (256, 1), (128, 128, 128))
    ax.imshow(lay_over(grey, np.linspace(0, scale, 256)[None], scale), extent=(0, scale, 0, 1), aspect="auto")
    ax.set_xticks([0, scale / 2, scale], ["0", f"{scale / 2:.2g}", f"{scale:.2g}"], fontsize=8)
    ax.set_yticks([])
    even = 1 / max(len(where), 1)
    ax.annotate("even", (even, 1), (0, 4), textcoords="offset points", ha="center", fontsize=7, color="0.35")
    ax.axvline(even, color="white", linewidth=1)
    ax.set_xlabel(f"attention on a {'region' if isinstance(where, Regions) else 'cell'}", fontsize=8, labelpad=2)


def _share(figure: Any, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """Inches from the lower left corner -> shares of the figure."""
    width, height = figure.get_size_inches()
    x, y, w, h = box
    return x / width, y / height, w / width, h / height


def _drawn_size(picture: Image.Image) -> tuple[int, int]:
    """Pixels that a panel has on the page."""
    width, height = panel_size(*picture.size, PANEL_AREA, LONGEST)
    return max(1, round(width * DPI)), max(1, round(height * DPI))


def _families() -> list[str]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in FONTS if name in installed] or ["sans-serif"]
