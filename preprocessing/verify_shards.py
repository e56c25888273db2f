"""Hash every byte of data sets again, name shard and key of every fault, and rebuild exactly what is broken.

    python -m preprocessing.verify_shards data/coco/images data/coco/features --repair

The surprising decision: a rebuilt shard goes through the very job that wrote it. Where it comes out with the recorded
bytes, as it does from the same pictures on the same kind of machine, the manifest does not change; else a new one is
published and the data set has a new digest. Files that are no part of the data set are told, never touched.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from preprocessing.console import available_cores, progress_line, run
from preprocessing.extract_features import extract_stripe, finalize_features
from preprocessing.finalize import finalize
from preprocessing.plan import load_plan
from preprocessing.shard_images import shard_stripe
from preprocessing.shards import sidecar_path
from preprocessing.verify import Report, check_tables, recorded_bytes, verify
from sat.data.manifest import MANIFEST


def repair(
    root: Path, report: Report, *, images: Path | None = None, weights: Path | None = None, num_workers: int = 1
) -> None:
    """Build the shards that the report names again, and the tables where they or the shards' bytes have changed.

    `images` and `weights` replace the paths the plan remembers. Raises ValueError when the plan is lost, and what the
    jobs raise.
    """
    plan = load_plan(root)
    moved = {name: os.path.abspath(path) for name, path in (("images", images), ("weights", weights)) if path}
    plan = replace(plan, settings=plan.settings | moved)
    broken = {fault.shard for fault in report.faults}
    for shard in plan.shards:
        if shard.name in broken:
            sidecar_path(root, shard).unlink(missing_ok=True)
            (root / shard.name).unlink(missing_ok=True)
    if plan.kind == "images":
        shard_stripe(plan, num_workers=num_workers)
    else:
        extract_stripe(plan)
    if check_tables(root)[1]:
        (root / MANIFEST).unlink(missing_ok=True)
    finalize(plan) if plan.kind == "images" else finalize_features(plan)


def _check(root: Path, num_workers: int) -> Report:
    with progress_line(recorded_bytes(root), f"verify {root.name}", "B") as advance:
        report = verify(root, num_workers, advance)
    for fault in report.faults:
        print(f"FAULT {root}/{fault}")
    for name in report.foreign:
        print(f"note: {root}/{name} is not part of the data set")
    state = f"{len(report.faults)} faults" if report.faults else "sound"
    print(f"{root}: {state}, {report.shards} shards, {report.bytes / 1e6:.1f} MB")
    return report


def main(
    folders: Annotated[list[Path], typer.Argument(help="folders of image or feature shards")],
    repair_faults: Annotated[bool, typer.Option("--repair", help="rebuild what is broken")] = False,
    images: Annotated[
        Path | None, typer.Option(help="with --repair: where the pictures or image shards are now")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="with --repair: where the encoder weights are now")] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="hashing threads, and processes of a repair; 0: by cores")] = 0,
) -> None:
    """Check data sets against what was recorded; exit status 1 when a fault is left at the end."""
    left, num_workers = 0, num_workers or available_cores()
    for root in folders:
        report = _check(root, num_workers)
        if report.faults and repair_faults:
            repair(root, report, images=images, weights=weights, num_workers=num_workers)
            report = _check(root, num_workers)
        left += len(report.faults)
    if left:
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
