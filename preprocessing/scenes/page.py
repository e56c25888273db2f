"""One HTML page of captioned scenes: picture, caption, claims green or red, references, where each word looked.

It is self-contained: pictures are data URIs, there is no script and nothing is loaded. A scene's picture stands in the
page once, as a property that all its panels share; a word's attention is an image of one pixel per cell that the
browser stretches over it. So hundreds of scenes take a few megabytes.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocessing.scenes.attention import Floats, SeenWords, spacing
from preprocessing.scenes.captions import Claim
from preprocessing.scenes.truth import is_wholly_true

PIXELS = 224
"""Side of a picture in the page; larger ones are made smaller."""
FOLDED = frozenset(
    ["a", "an", "the", "of", "in", "on", "at", "to", "and", "with", "is", "there", "we", "see", "shows", "<unk>"]
)
"""Words without a panel."""
OPACITY = 0.8
COLOURS = ((0.27, 0.45, 0.88), (0.16, 0.74, 0.82), (0.43, 0.9, 0.38), (0.93, 0.8, 0.2), (0.85, 0.18, 0.08))
"""From weak to strong."""
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c1c1e; --pale: #6b6b70; --line: #d9d9de;
  --true: #116b34; --true-ground: #def3e4; --false: #a01c1c; --false-ground: #fbe3e1 }
@media (prefers-color-scheme: dark) { :root { --ground: #161618; --text: #ececee; --pale: #9a9aa2; --line: #3a3a40;
  --true: #7fdc9d; --true-ground: #153320; --false: #ff9d94; --false-ground: #43201e } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem 1.2rem 3rem; background: var(--ground); color: var(--text);
  font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif }
h1 { font-size: 1.4rem; margin: .4rem 0 }
h2 { font-size: 1.08rem; margin: 0 0 .4rem; font-weight: 600; overflow-wrap: anywhere }
table { border-collapse: collapse; margin: .8rem 0 } td, th { padding: .2rem .8rem .2rem 0; text-align: right }
th:first-child { text-align: left } th { font-weight: 600 } tr + tr > * { border-top: 1px solid var(--line) }
.wide { overflow-x: auto }
article { display: grid; grid-template-columns: 224px minmax(0, 1fr); gap: 0 1.2rem; padding: 1.2rem 0;
  border-top: 1px solid var(--line) }
@media (max-width: 40rem) { article { grid-template-columns: minmax(0, 1fr); gap: .8rem } }
.picture { width: 224px; aspect-ratio: 1; background: var(--picture) center / 100% 100%; border-radius: 3px }
ul { list-style: none; margin: 0 0 .6rem; padding: 0 } .claims { display: flex; flex-wrap: wrap; gap: .35rem }
.claims li { padding: .1rem .55rem; border-radius: 1rem } .true { color: var(--true); background: var(--true-ground) }
.false { color: var(--false); background: var(--false-ground) } .false s { text-decoration-thickness: 2px }
.pale, small, details { color: var(--pale) } small { display: block; font-size: .74rem } details { margin: 0 0 .5rem }
summary { cursor: pointer } .words { display: flex; flex-wrap: wrap; gap: .6rem }
figure { margin: 0; width: 96px } figcaption { text-align: center; font-size: .85rem; line-height: 1.25 }
.seen { position: relative; overflow: hidden; aspect-ratio: 1; border-radius: 2px }
.seen::before { content: ""; position: absolute; inset: 0; background: var(--picture) center / 100% 100%;
  filter: grayscale(.6) contrast(.55) }
.seen img { position: absolute }
label { margin-right: 1rem } body:has(#only-false:checked) .holds, body:has(#only-true:checked) .fails { display: none }
"""


@dataclass(frozen=True)
class Shown:
    """A captioned scene."""

    name: str
    picture: bytes
    """The file."""
    caption: str
    claims: Sequence[Claim]
    references: Sequence[str]
    seen: SeenWords | None
    """Where the model looked at each word; None: no panels."""


@dataclass(frozen=True)
class Table:
    """Figures above the scenes: a title, the columns' names, and rows of a name and its cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def page(title: str, tables: Sequence[Table], notes: Sequence[str], scenes: Sequence[Shown], centres: Floats) -> str:
    """The whole document. `centres` float [L, 2]: x, y where each cell looks, in 0..1 of the picture."""
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\"><title>{escape(title)}</title><style>{STYLE}</style></head><body>"
    )
    parts = [head, f"<h1>{escape(title)}</h1>", *map(_table, tables), *(f"<p>{escape(note)}</p>" for note in notes)]
    choices = (("all", "all scenes"), ("true", "wholly true"), ("false", "with a false claim or none"))
    for name, label in choices:
        checked = " checked" if name == "all" else ""
        parts.append(f'<label><input type="radio" name="only" id="only-{name}"{checked}> {label}</label>')
    parts += [_article(scene, centres) for scene in scenes]
    return "\n".join([*parts, "</body></html>\n"])


def _table(table: Table) -> str:
    columns = "".join(f"<th>{escape(column)}</th>" for column in ("", *table.columns))
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in table.rows
    )
    return f'<p class="pale">{escape(table.title)}</p><div class="wide"><table><tr>{columns}</tr>{rows}</table></div>'


def _article(scene: Shown, centres: Floats) -> str:
    holds = "holds" if is_wholly_true(scene.claims) else "fails"
    caption = escape(scene.caption or "(no words)")
    claims = "".join(_chip(claim) for claim in scene.claims) or '<li class="false">claims nothing</li>'
    references = "".join(f"<li>{escape(text)}</li>" for text in scene.references)
    return (
        f'<article class="{holds}" style="--picture: url({_picture_uri(scene.picture)})">'
        f'<div><div class="picture" role="img" aria-label="{caption}"></div><small>{escape(scene.name)}</small></div>'
        f'<div><h2>{caption}</h2><ul class="claims">{claims}</ul>'
        f"<details open><summary>what people would say</summary><ul>{references}</ul></details>"
        f"{_panels(scene.seen, centres) if scene.seen else ''}</div></article>"
    )


def _chip(claim: Claim) -> str:
    """A claim, green or red, with a mark for who does not see colours; what is wrong of an object is struck out."""
    words = claim.text.replace("_", " ")
    text = escape(words)
    if claim.kind == "object" and not claim.holds:
        judged = [claim.size, claim.colour, claim.shape]  # in the order of the words; None: not said
        rights = [right for right in judged if right is not None]
        pairs = zip(map(escape, words.split()), rights, strict=True)
        text = " ".join(word if right else f"<s>{word}</s>" for word, right in pairs)
    return f'<li class="{"true" if claim.holds else "false"}">{"✓" if claim.holds else "✗"} {text}</li>'


def _panels(seen: SeenWords, centres: Floats) -> str:
    """A small picture per word under its attention, all on one scale."""
    places = [place for place, word in enumerate(seen.words) if word not in FOLDED]
    if not places:
        return ""
    scale = max(float(seen.attention.max()), min(1.0, 8 / len(centres)))
    figures = []
    for place in places:
        gate = "" if np.isnan(seen.gates[place]) else f"<small>gate {seen.gates[place]:.2f}</small>"
        figures.append(
            f'<figure><div class="seen">{_overlay(seen.attention[place] / scale, centres)}</div>'
            f"<figcaption>{escape(seen.words[place])}<small>p {seen.probabilities[place]:.2f}</small>"
            f"{gate}</figcaption></figure>"
        )
    even = f"attention per cell: even {1 / len(centres):.3f}, full colour {scale:.2f}"
    return f'<div class="words">{"".join(figures)}</div><small>{even}</small>'


def _overlay(strength: Floats, centres: Floats) -> str:
    """The cells' colours as an image laid so that each cell's middle is where it looks."""
    columns = len(np.unique(centres[:, 0].round(6)))
    grid = np.pad(strength.reshape(-1, columns), 1, mode="edge")  # beyond the last cells it goes on as it is
    step, first = spacing(centres), centres[0]
    box = [*(first - 1.5 * step), grid.shape[1] * step[0], grid.shape[0] * step[1]]
    left, top, width, height = (f"{100 * value:.2f}%" for value in box)
    style = f"left: {left}; top: {top}; width: {width}; height: {height}"
    return f'<img alt="" src="{_png_uri(_coloured(grid))}" style="{style}">'


def _coloured(strength: Floats) -> npt.NDArray[np.uint8]:
    """Shares of the scale [H, W] -> RGBA uint8 [H, W, 4]."""
    strength = strength.clip(0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(strength, stops, [colour[channel] for colour in COLOURS]) for channel in range(3)]
    return (255 * np.stack([*channels, OPACITY * strength**0.7], axis=-1)).round().astype(np.uint8)


def _picture_uri(data: bytes) -> str:
    """The file as it is, or a smaller JPEG of a larger picture."""
    with Image.open(io.BytesIO(data)) as picture:
        kind = picture.format or ""
        if kind in ("JPEG", "PNG") and max(picture.size) <= PIXELS:
            return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
        small = picture.convert("RGB")
    small.thumbnail((PIXELS, PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _png_uri(pixels: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
