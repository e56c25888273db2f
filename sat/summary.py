"""The table at the end of the demonstration, and the same figures as `summary.json`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sat import files
from sat.cli import run_program

COLUMNS = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L")
ROWS = {"model": "model", "blind": "blind (shuffled features)", "most_frequent": "most frequent caption"}


def main(
    run: Annotated[Path, typer.Argument(help="run folder, evaluated with --baselines")],
    split: Annotated[str, typer.Option(help="split that was scored")] = "test",
    minutes: Annotated[float, typer.Option(help="minutes the whole demonstration took")] = 0.0,
) -> None:
    """Print the scores of RUN/evaluation-SPLIT.json as a table; writes RUN/summary.json."""
    path = run / f"evaluation-{split}.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; run `sat evaluate {run} --split {split} --baselines` first")
    report = json.loads(path.read_text())
    files.write_json(run / "summary.json", {"minutes": round(minutes, 2), "scores": report["scores"]})
    print(f"{report['images']} held-out images of split {split!r}, beam {report['beam_size']}")
    print(f"{'':26}" + "".join(f"{column:>9}" for column in COLUMNS))
    for name, title in ROWS.items():
        if name in report["scores"]:
            values = (report["scores"][name].get(column) for column in COLUMNS)
            print(f"{title:26}" + "".join("        -" if value is None else f"{value:9.3f}" for value in values))
    for name, reasons in report["missing"].items():
        for metric, reason in reasons.items():
            print(f"{name}: {metric} is missing: {reason}")


if __name__ == "__main__":
    run_program(main)
