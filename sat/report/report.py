"""One HTML page about one run or several: `sat report RUN [RUN ...]`.

    sat evaluate runs/demo --split test --baselines --attention
    sat report runs/demo --split test

The page needs nothing else: no script, no network, no other file. What the folder does not hold it does not show, and
says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sat import files
from sat.cli import run_program
from sat.data.loader import read_references
from sat.report.articles import Article, article
from sat.report.choose import Section, choose
from sat.report.curves import charts
from sat.report.page import render
from sat.report.pictures import Source, find_sources
from sat.report.reading import RunReport, differing_settings, read_runs
from sat.report.tables import (
    attention_notes,
    difference_table,
    missing_notes,
    score_table,
    signatures,
    truth_table,
)
from sat.shards.manifest import load_manifest
from sat.tracking.journal import add_artifact


def main(
    run: Annotated[
        list[Path], typer.Argument(help="run folders, evaluated on the split; the first is held against the others")
    ],
    split: Annotated[str, typer.Option(help="split that was scored")] = "test",
    out: Annotated[Path | None, typer.Option(help="the file; default: RUN/report-SPLIT.html of the first run")] = None,
    pictures: Annotated[
        str,
        typer.Option(help="folder of the split's pictures, or image shards; default: those the features were made of"),
    ] = "",
    features: Annotated[str, typer.Option(help="data set with the references; default: the one trained on")] = "",
    each: Annotated[int, typer.Option(min=0, help="pictures shown of each kind")] = 8,
    every: Annotated[bool, typer.Option("--all", help="show all pictures of the split too")] = False,
    seed: Annotated[int, typer.Option(min=0, help="of the pictures shown at random")] = 0,
    track: Annotated[bool, typer.Option(help="keep the page as an artifact of the runs in MLflow")] = True,
) -> None:
    """Write one HTML page: scores with intervals, learning curves, and pictures with where each word looked.

    Shown are the best, the worst, the most confidently wrong and random pictures; of several runs also their
    differences and where these are greatest.
    """
    runs = read_runs(run, split)
    sections, data = choose(runs, each, every, seed), features or runs[0].data
    wanted = {image for section in sections for image in section.image_ids}
    sources, references, lacking = gather(pictures, data, split, wanted)
    lacking += [
        f"{known.name}: no attention was kept; sat evaluate {known.folder} --split {split} --attention keeps it"
        for known in runs
        if known.attention is None
    ]
    text = page(runs, split, sections, sources, references, lacking)
    path = out or run[0] / f"report-{split}.html"
    files.write_text(path, text)
    for said in lacking:
        print(f"not shown: {said}", flush=True)
    for folder in run:
        if track:
            add_artifact(folder, path, "report")
    print(f"{path}: {len(wanted)} pictures, {len(text.encode()) / 1e6:.1f} MB", flush=True)


def gather(
    pictures: str, data: str, split: str, wanted: set[str]
) -> tuple[dict[str, Source], dict[str, list[str]], list[str]]:
    """Pictures and references of these images, and what could not be found of what nobody has asked for by name."""
    sources: dict[str, Source] = {}
    references: dict[str, list[str]] = {}
    lacking = []
    try:
        sources = find_sources(pictures, data, split, wanted)
    except ValueError as error:
        if pictures:
            raise
        lacking.append(f"pictures: {error}")
    try:
        references = read_references(load_manifest(data), split) if data else {}
    except ValueError as error:
        lacking.append(f"references: {error}")
    return sources, references, lacking


def page(
    runs: Sequence[RunReport],
    split: str,
    sections: Sequence[Section],
    sources: dict[str, Source],
    references: dict[str, list[str]],
    lacking: Sequence[str],
) -> str:
    """The document."""

    def shown(image: str) -> Article:
        return article(image, runs, sources.get(image), references.get(image, ()), attention=True)

    tables = [each for each in (score_table(runs), difference_table(runs), truth_table(runs)) if each]
    return render(
        "report.html",
        title=f"{' and '.join(run.name for run in runs)} on split {split!r}",
        runs=runs,
        tables=tables,
        notes=[*attention_notes(runs), *missing_notes(runs)],
        lacking=lacking,
        signatures=signatures(runs),
        charts=charts(runs),
        differing=differing_settings(runs),
        sections=[(each, map(shown, each.image_ids)) for each in sections],
        checked=bool(runs[0].claims),
    )


if __name__ == "__main__":
    run_program(main)
