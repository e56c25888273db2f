"""Learning curves from the journals of runs, as SVG that stands in a page and takes its colours."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from sat.evaluation.score_table import Floats
from sat.report.reading import RunReport

COLOURS = 8
"""Runs that have a colour of their own; further ones share them, dashed."""
POINTS = 400
"""Of a longer curve the means over so many stretches are drawn."""
FIRST = (
    "nll_per_token",
    "reward",
    "baseline",
    "CIDEr",
    "BLEU-4",
    "METEOR",
    "penalty_per_caption",
    "accuracy",
    "attention/effective_cells",
)
"""What is shown first, in this order, where there is such a curve; the rest follows folded."""
LEAVE_OUT = ("best/",)
_TEXT, _LINE, _RUN = "#010101", "#020202", "#0303"
"""Colours that stand for those of the page."""

STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _LINE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "font.family": ["sans-serif"],
    "svg.fonttype": "none",
    "svg.hashsalt": "sat",
}
"""Of matplotlib."""


@dataclass(frozen=True)
class Chart:
    """One figure of all runs by step."""

    name: str
    svg: str
    """HTML."""
    first: bool
    """Whether it is shown at once."""


def charts(runs: Sequence[RunReport]) -> list[Chart]:
    """A chart of every figure that some journal has at two steps or more, those of `FIRST` before the others."""
    curves: dict[str, dict[int, tuple[Floats, Floats]]] = {}
    for number, run in enumerate(runs):
        for name, curve in curves_of(run).items():
            if len(curve[0]) > 1 and not name.startswith(LEAVE_OUT):
                curves.setdefault(name, {})[number] = curve
    ranks = {
        name: next((i for i, each in enumerate(FIRST) if name in (each, f"{_split(runs)}/{each}")), None)
        for name in curves
    }
    order = sorted(curves, key=lambda name: (ranks[name] is None, ranks[name] or 0, name))
    return [
        Chart(name, svg(name, curves[name], f"chart{number}"), ranks[name] is not None)
        for number, name in enumerate(order)
    ]


def curves_of(run: RunReport) -> dict[str, tuple[Floats, Floats]]:
    """Name -> steps and values of the journal's finite figures; of a step that was taken again the last counts."""
    points: dict[str, dict[int, float]] = {}
    for entry in run.journal:
        for name, value in entry.items():
            if name not in ("step", "time") and value is not None and np.isfinite(value):
                points.setdefault(name, {})[int(entry["step"])] = value
    return {
        name: (np.array(sorted(each), dtype=np.float64), np.array([each[step] for step in sorted(each)]))
        for name, each in points.items()
    }


def thinned(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """At most `POINTS` of them, each the mean of a stretch."""
    if len(steps) <= POINTS:
        return steps, values
    ends = np.linspace(0, len(steps), POINTS + 1).astype(int)
    counts = np.diff(ends)
    return np.add.reduceat(steps, ends[:-1]) / counts, np.add.reduceat(values, ends[:-1]) / counts


def svg(name: str, curves: Mapping[int, tuple[Floats, Floats]], key: str) -> str:
    """One chart; `curves` by the number of the run, `key` makes its ids unique in the page."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        ax = figure.add_subplot()
        ax.grid(linewidth=0.6)
        for number, (steps, values) in sorted(curves.items()):
            few, style = len(steps) <= 40, ("-", "--", ":", "-.")[number // COLOURS % 4]
            marker = "o" if few else ""
            ax.plot(*thinned(steps, values), style, color=f"{_RUN}{number % COLOURS:02x}", marker=marker, ms=3, lw=1.4)
        ax.set_xlabel("step")
        ax.ticklabel_format(style="sci", scilimits=(-3, 5), useMathText=False)
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _for_page(buffer.getvalue(), name, key)


def _for_page(text: str, name: str, key: str) -> str:
    """What matplotlib drew, in the page's colours, as wide as there is room, without what only a file needs."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<svg[^>]*(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 role="img" aria-label="NAME">', text, count=1)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", text)
    text = text.replace(_TEXT, "currentColor").replace(_LINE, "var(--line)")
    text = re.sub(rf"{_RUN}0(\d)", r"var(--run\1)", text)
    return text.replace("NAME", escape(f"{name} by step"), 1)


def _split(runs: Sequence[RunReport]) -> str:
    return str(runs[0].settings.get("data.eval_split", "val"))
