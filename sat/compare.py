"""Whether one run is better than another, and where: `sat compare RUN_A RUN_B`.

    sat compare runs/soft runs/hard                                # on the pictures of split test
    sat compare 'runs/soft-*' 'runs/hard-*' --split val            # each pattern is one side: runs of several seeds

Reads RUN/scores-SPLIT.parquet, which `sat evaluate` writes. What is tested and of what the p-values speak is told in
`sat.evaluation.compare`.
"""

from collections.abc import Iterable
from dataclasses import asdict
from glob import glob as folders_like
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any

import typer

from sat import files
from sat.cli import run_program
from sat.evaluation.compare import Comparison, PictureDifference, Side, compare
from sat.evaluation.score_table import read_table, table_file

HEAD = f"{'':14}{'A':>8}{'B':>9}{'B - A':>9}  {'interval':^18}{'p pictures':>12}{'p runs':>9}"


def main(
    run: Annotated[str, typer.Argument(help="run folder, or a quoted pattern of the runs of several seeds: side A")],
    others: Annotated[list[str], typer.Argument(help="further ones, each of which is compared with the first: side B")],
    split: Annotated[str, typer.Option(help="split that was scored")] = "test",
    resamples: Annotated[int, typer.Option(min=1, help="of the bootstrap, and as many permutations")] = 1000,
    level: Annotated[float, typer.Option(help="of the intervals")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="of the random numbers")] = 0,
    pictures: Annotated[int, typer.Option(min=0, help="shown where B is better, and where it is worse")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the comparisons to this file")] = None,
) -> None:
    """Compare runs on the same pictures: differences with intervals and p-values, and where they differ most.

    A pattern ('runs/soft-*', quoted) makes one side of several runs that differ in their seed. Its score is the mean of
    theirs; the interval is then of new pictures and new seeds, `p runs` takes a run for the unit, `p pictures` asks of
    these very runs.
    """
    first = read_side(run, split)
    found = [
        compare(first, read_side(other, split), resamples=resamples, level=level, seed=seed, pictures=pictures)
        for other in others
    ]
    for each in found:
        print(table_of(each, split))
    if json_file:
        files.write_json(
            json_file, {"split": split, "seed": seed, "comparisons": [document_of(each) for each in found]}
        )


def read_side(pattern: str, split: str) -> Side:
    """The runs of a folder's name or of a pattern. ValueError where it fits none, or one was not evaluated."""
    folders = sorted(each for each in folders_like(pattern) if Path(each).is_dir()) if has_magic(pattern) else [pattern]
    if not folders:
        raise ValueError(f"{pattern} fits no folder; name run folders that sat evaluate has scored")
    missing = [each for each in folders if not Path(each).is_dir()]
    if missing:
        raise ValueError(f"{missing[0]} is no folder; name run folders that sat evaluate has scored")
    return Side(pattern.rstrip("/"), {each.rstrip("/"): read_table(table_file(Path(each), split)) for each in folders})


def document_of(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON."""
    sides = {
        name: {"name": side.name, "runs": list(side.runs)} for name, side in (("a", comparison.a), ("b", comparison.b))
    }
    return {
        **sides,
        "images": comparison.images,
        "level": comparison.level,
        "resamples": comparison.resamples,
        "differences": {
            each.metric: {name: value for name, value in asdict(each).items() if name != "metric"}
            for each in comparison.differences
        },
        "pictures": {
            "metric": comparison.metric,
            "better": [asdict(each) for each in comparison.better],
            "worse": [asdict(each) for each in comparison.worse],
        },
    }


def table_of(comparison: Comparison, split: str) -> str:
    """A comparison for the reader."""
    how = f"{comparison.level:.0%} intervals of B - A by paired bootstrap, p by paired permutation"
    lines = [
        f"{comparison.images:,} pictures of split {split!r}; {how}, {comparison.resamples:,} of each",
        *(f"{name}: {said(side)}" for name, side in (("A", comparison.a), ("B", comparison.b))),
        HEAD,
    ]
    for each in comparison.differences:
        interval = f"[{each.low:+.4f}, {each.high:+.4f}]"
        runs = "-" if each.p_runs is None else f"{each.p_runs:.4f}"
        scores = f"{each.a:>8.4f}{each.b:>9.4f}{each.difference:>+9.4f}"
        lines.append(f"{each.metric:14}{scores}  {interval:18}{each.p_pictures:>12.4f}{runs:>9}")
    lines += said_of_seeds(comparison)
    for title, pictures in (("better", comparison.better), ("worse", comparison.worse)):
        if pictures:
            lines += [f"\nwhere B is {title} by {comparison.metric}, most first:", *map(shown, pictures)]
    return "\n".join([*lines, ""])


def said(side: Side) -> str:
    """A side and how many runs it has."""
    return side.name if len(side.runs) == 1 else f"{side.name} ({len(side.runs)} runs: {', '.join(side.runs)})"


def said_of_seeds(comparison: Comparison) -> Iterable[str]:
    """Of what the figures speak."""
    sizes = len(comparison.a.runs), len(comparison.b.runs)
    if min(sizes) > 1:
        yield "the interval speaks of new pictures and new seeds; p pictures of these very runs, p runs of new seeds"
    elif max(sizes) > 1:
        yield "one side is a single run: nothing here tells how another seed of it would score"
    else:
        yield "one run against one: the figures speak of new pictures, not of other seeds"


def shown(picture: PictureDifference) -> str:
    """A picture, its scores and captions."""
    head = f"  {picture.image_id}  A {picture.a:.3f}  B {picture.b:.3f}"
    captions = (("A", picture.captions_a), ("B", picture.captions_b))
    return "\n".join([head, *(f"    {name}: {text}" for name, texts in captions for text in texts)])


if __name__ == "__main__":
    run_program(main)
