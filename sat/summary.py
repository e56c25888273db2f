"""The table at the end of the demonstration, and the same figures as `summary.json`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sat import files
from sat.cli import run_program
from sat.evaluation.baselines import AGAINST_REST, BLIND, MOST_FREQUENT, REFERENCE
from sat.evaluation.report import captions_file

COLUMNS = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L")
ROWS = {
    "model": "model",
    BLIND: "blind (shuffled features)",
    MOST_FREQUENT: "most frequent caption",
    REFERENCE: "a reference left out",
    AGAINST_REST: "model against the others",
}
CELL = 14
"""Width of a column of scores; an interval stands below its score."""

TRUTH_COLUMNS = ("captions", "objects", "colours", "places", "relations")
TRUTH_ROWS = {"model": "model", "blind": "blind (shuffled features)", "reference": "a reference left out"}


def main(
    run: Annotated[Path, typer.Argument(help="run folder, evaluated with --baselines")],
    split: Annotated[str, typer.Option(help="split that was scored")] = "test",
    minutes: Annotated[float, typer.Option(help="minutes the whole demonstration took")] = 0.0,
) -> None:
    """Print the scores of RUN/evaluation-SPLIT.json as a table; writes RUN/summary.json.

    Where RUN/truth-SPLIT.json says which shares of the captions are true (`preprocessing.check_scenes` writes it for
    scenes), they are shown and kept too.
    """
    path = run / f"evaluation-{split}.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; run `sat evaluate {run} --split {split} --baselines` first")
    report = files.read_json(path)
    if not {"scores", "missing", "images", "beam_size"} <= report.keys():
        raise ValueError(f"{path} is no report of an evaluation; run `sat evaluate {run} --split {split}` again")
    truth = read_truth(run, split)
    looked = {"attention": report["attention"] | truth.get("attention", {})} if report.get("attention") else {}
    files.write_json(run / "summary.json", {"minutes": round(minutes, 2), "scores": report["scores"]} | truth | looked)
    print_scores(report, split)
    if truth:
        print_truth(report["scores"], truth)


def read_truth(run: Path, split: str) -> dict[str, Any]:
    """The shares that are true, as `truth`, and where the model looked, as `attention`; empty where nobody measured.

    Raises ValueError where they were measured on other captions than the run has now.
    """
    path = run / f"truth-{split}.json"
    if not path.is_file():
        return {}
    found = files.read_json(path)
    if found.get("captions_sha256") != files.sha256(captions_file(run, split)):
        raise ValueError(f"{path} is about captions of an earlier evaluation; run preprocessing.check_scenes again")
    return {name: found[name] for name in ("truth", "attention") if name in found}


def print_scores(report: Mapping[str, Any], split: str) -> None:
    """The table of metrics."""
    print(f"{report['images']} held-out images of split {split!r}, beam {report['beam_size']}")
    print(f"{'':26}" + "".join(f"{column:>{CELL}}" for column in COLUMNS))
    for name, title in ROWS.items():
        if name in report["scores"]:
            print(f"{title:26}" + _cells((report["scores"][name].get(column) for column in COLUMNS), CELL))
            if found := report.get("intervals", {}).get(name):
                print(f"{'  95 % interval':26}" + "".join(_interval(found.get(column)) for column in COLUMNS))
    if spread := report.get("attention"):
        print(
            f"attention: {spread['effective_cells']:.1f} cells in effect, {spread['top_cell']:.2f} on the first of them"
        )
    for name, reasons in report["missing"].items():
        for metric, reason in reasons.items():
            print(f"{name}: {metric} is missing: {reason}")


def print_truth(scores: Mapping[str, Any], truth: Mapping[str, Any]) -> None:
    """The table of shares, each row beside its CIDEr."""
    print("\nshare that is true of the scene: whole captions, and what is said of each kind")
    print(f"{'':26}" + "".join(f"{column:>11}" for column in ("CIDEr", *TRUTH_COLUMNS)))
    for name, title in TRUTH_ROWS.items():
        shares = truth["truth"][name]
        row = (scores.get(name, {}).get("CIDEr"), *(shares[column] for column in TRUTH_COLUMNS))
        print(f"{title:26}" + _cells(row, 11))
    if looking := truth.get("attention"):
        print(
            f"attention at a shape word: {looking['times_area']:.1f} times the object's share of the picture", end=" "
        )
        print(f"(even attention: {looking['cells'] / looking['area']:.1f} times)")


def _cells(values: Iterable[float | None], width: int) -> str:
    return "".join(f"{'-':>{width}}" if value is None else f"{value:{width}.3f}" for value in values)


def _interval(ends: Sequence[float] | None) -> str:
    return f"{'-' if ends is None else f'{ends[0]:.3f}-{ends[1]:.3f}':>{CELL}}"


if __name__ == "__main__":
    run_program(main)
