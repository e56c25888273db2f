"""The figures above a report's pictures: scores with intervals, differences, what is true, settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sat.evaluation.compare import Side, compare
from sat.report.choose import ranking_metric
from sat.report.reading import RunReport
from sat.summary import COLUMNS, ROWS, TRUTH_COLUMNS, TRUTH_ROWS


@dataclass(frozen=True)
class Cell:
    """A figure, and what stands small under it."""

    value: str
    below: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    run: int | None
    """Number of the run, for its colour; None where there is but one."""
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """Figures with a sentence of what they are."""

    title: str
    what: str
    columns: Sequence[str]
    rows: Sequence[Row]


def score_table(runs: Sequence[RunReport]) -> Table:
    """Each run's scores and those of what it is held against, with the intervals that the evaluation has written."""
    known = {metric for run in runs for scores in run.evaluation["scores"].values() for metric in scores}
    columns = [name for name in COLUMNS if name in known] + sorted(known - set(COLUMNS))
    rows = []
    for number, run in enumerate(runs):
        intervals = run.evaluation.get("intervals", {})
        for name, scores in run.evaluation["scores"].items():
            cells = [_scored(scores.get(column), intervals.get(name, {}).get(column)) for column in columns]
            rows.append(Row(_row_name(run, name, len(runs) > 1), _number(number, runs), cells))
    ranges = any(run.evaluation.get("intervals") for run in runs)
    what = "Under each score the interval in which it lies with 95 % confidence, by bootstrap over the pictures."
    return Table("Scores", what if ranges else "", columns, rows)


def difference_table(runs: Sequence[RunReport]) -> Table | None:
    """The further runs against the first, paired on the pictures; None of one run, and without scores per picture."""
    if len(runs) < 2 or not ranking_metric(runs):
        return None
    sides = [Side(run.name, {str(run.folder): run.table}) for run in runs]
    found = [compare(sides[0], side, pictures=0) for side in sides[1:]]
    columns = list(dict.fromkeys(each.metric for comparison in found for each in comparison.differences))
    rows = []
    for number, comparison in enumerate(found, 1):
        known = {each.metric: each for each in comparison.differences}
        cells = []
        for metric in columns:
            at = known.get(metric)
            below = f"[{at.low:+.3f}, {at.high:+.3f}], p {at.p_pictures:.3f}" if at else ""
            cells.append(Cell(f"{at.difference:+.3f}" if at else "-", below))
        rows.append(Row(f"{runs[number].name} less {runs[0].name}", number, cells))
    what = (
        "Paired on the pictures: the difference, its 95 % interval by bootstrap, and p by permutation. The figures "
        "speak of new pictures, not of other seeds; with several seeds of each use sat compare."
    )
    return Table("Differences", what, columns, rows)


def truth_table(runs: Sequence[RunReport]) -> Table | None:
    """The shares that are true; None where nobody knows the truth."""
    rows = []
    for number, run in enumerate(runs):
        for name, shares in run.truth.get("truth", {}).items():
            title = TRUTH_ROWS.get(name, name) if len(runs) == 1 else f"{run.name}: {TRUTH_ROWS.get(name, name)}"
            cells = [Cell(_three(shares.get(column))) for column in TRUTH_COLUMNS]
            rows.append(Row(title, _number(number, runs), cells))
    what = "The share that is true of the scene: of whole captions, and of what is said of each kind."
    return Table("What is true", what, TRUTH_COLUMNS, rows) if rows else None


def attention_notes(runs: Sequence[RunReport]) -> list[str]:
    """What there is to say of how the models look."""
    notes = []
    for run in runs:
        whose = f"{run.name}: " if len(runs) > 1 else ""
        if spread := run.evaluation.get("attention"):
            notes.append(
                f"{whose}attention is on {spread['effective_cells']:.1f} cells in effect, "
                f"with {spread['top_cell']:.2f} on the first of them."
            )
        if looking := run.truth.get("attention"):
            notes.append(
                f"{whose}at {looking['words']} shape words that name an object of the scene, {looking['mass']:.2f} of "
                f"the attention is on the object's cells: {looking['times_area']:.1f} times the object's share of the "
                f"picture (even attention {looking['cells'] / looking['area']:.1f} times)."
            )
    return notes


def missing_notes(runs: Sequence[RunReport]) -> list[str]:
    """Why a score is not there."""
    return [
        f"{_row_name(run, name, len(runs) > 1)}: {metric} is missing: {reason}"
        for run in runs
        for name, reasons in run.evaluation.get("missing", {}).items()
        for metric, reason in reasons.items()
    ]


def signatures(runs: Sequence[RunReport]) -> Mapping[str, str]:
    """Metric -> how it was computed; the runs compared have the same."""
    return dict(sorted(runs[0].table.signature.items()))


def _row_name(run: RunReport, name: str, several: bool) -> str:
    title = ROWS.get(name, name.replace("_", " "))
    if not several:
        return title
    return run.name if name == "model" else f"{run.name}: {title}"


def _number(number: int, runs: Sequence[RunReport]) -> int | None:
    return number if len(runs) > 1 else None


def _scored(value: float | None, interval: Sequence[float] | None) -> Cell:
    below = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return Cell(_three(value), below)


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
