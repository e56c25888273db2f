"""Hash every byte of data sets again, name shard and key of every fault, and rebuild exactly what is broken.

    python -m preprocessing.verify_shards data/coco/images data/coco/features --repair

The surprising decision: a rebuilt shard goes through the very job that wrote it. It has to come out with the recorded
bytes, as it does from the same pictures on the same kind of machine; else it is refused, unless --allow-new-bytes says
otherwise: then a new manifest is published, and the data set has a new digest. A damaged tar stays until its successor
is whole: where the pictures are gone, its sound samples are all there is. Files that are no part of the data set are
told, never touched, but for what its own killed workers left in `work/`: a repair removes that.
"""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from preprocessing.console import progress_line, refuse_urls, run
from preprocessing.extract_features import extract_stripe, finalize_features
from preprocessing.features.plan import recipe_of, source_of
from preprocessing.features.weights import check_planned
from preprocessing.import_features import check_source, finalize_import, import_stripe
from preprocessing.shard_images import check_pictures, pack_picture, picture_files, shard_stripe
from preprocessing.sharding.changed import times_if_packed
from preprocessing.sharding.finalize import check_same_set, finalize, withdraw_manifest
from preprocessing.sharding.made_on import MADE_ON
from preprocessing.sharding.ownership import check_stands, exclusive
from preprocessing.sharding.plan import (
    LEFT_OUT,
    WORK,
    AnySettings,
    FeatureSettings,
    ImportSettings,
    Plan,
    PlannedShard,
    load_plan,
)
from preprocessing.sharding.rebuild import ALLOW, Before
from preprocessing.sharding.verify import (
    Fault,
    RecordedShard,
    Report,
    check_shard,
    check_tables,
    recorded_bytes,
    verify,
)
from preprocessing.sharding.write import read_sidecar, sidecar_path
from sat import files
from sat.machine import available_cores
from sat.shards.manifest import Manifest
from sat.shards.schema import LeftOut, SampleRow, Sidecar, sample_rows
from sat.shards.sealed import seal


def repair(
    root: Path,
    report: Report,
    *,
    images: Path | None = None,
    weights: Path | None = None,
    num_workers: int = 1,
    new_bytes: bool = False,
) -> None:
    """Build the shards that the report names again, and the tables where they or the shards' bytes have changed.

    `images` and `weights` replace the paths the plan remembers; with `new_bytes` samples may come out with other bytes
    than were recorded. Raises ValueError when the plan is lost, when the sources are missing, are not the planned ones
    or would give fewer samples or (without `new_bytes`) other ones, and what the jobs raise: then nothing is lost that
    was there.
    """
    plan = load_plan(root)
    check_same_set(plan)
    plan = replace(plan, settings=_moved(plan.settings, images, weights))
    manifest, faults = check_tables(root)
    if manifest is None:
        _check_shards_are_of(plan)
    broken, damaged = {fault.shard for fault in report.faults}, {fault.file for fault in report.faults}
    recorded = {} if manifest is None else {shard.name: index for index, shard in enumerate(manifest.shards)}
    shards = [shard for shard in plan.shards if shard.name in broken]
    if manifest is not None and plan.kind == "images" and LEFT_OUT not in damaged:
        sound = recorded.keys() - damaged
        shards = [s for s in shards if s.name not in sound or not _restore_sidecar(plan, s, manifest, recorded[s.name])]
    if shards:
        before = {shard.name: _before(plan, shard, manifest, recorded, new_bytes) for shard in shards}
        _rebuild(plan, shards, before, num_workers)
    if faults:
        withdraw_manifest(plan)
    {"images": finalize, "features": finalize_features, "imported": finalize_import}[plan.kind](plan)


def _check_shards_are_of(plan: Plan) -> None:
    """ValueError where no manifest says whose the shards are, and most samples are not as the sidecars record them."""
    samples = faulty = 0
    for shard in plan.shards:
        sidecar = _sidecar_of(plan, shard)
        if sidecar is not None and sidecar.samples and (plan.root / shard.name).exists():
            samples += sidecar.samples
            faulty += len({fault.key for fault in _faults(plan, sidecar) if fault.key})
    if 2 * faulty > samples:
        raise ValueError(
            f"{plan.root}: {faulty} of {samples} samples are not as {WORK}/ records them, so it seems to be of another "
            f"data set; nothing was changed: bring this set's own {WORK}/ back, or delete the shards"
        )


def _stands(plan: Plan, shard: PlannedShard) -> bool:
    """Whether every byte of a shard is as its sidecar records it."""
    sidecar = _sidecar_of(plan, shard)
    return sidecar is not None and not (sidecar.samples and _faults(plan, sidecar))


def _faults(plan: Plan, sidecar: Sidecar) -> list[Fault]:
    return check_shard(
        plan.root, RecordedShard(sidecar.shard, sidecar.bytes, sidecar.sha256, partial(_rows_of, sidecar))
    )


def _rows_of(sidecar: Sidecar) -> tuple[SampleRow, ...]:
    return sidecar.rows


def _sidecar_of(plan: Plan, shard: PlannedShard) -> Sidecar | None:
    """The sidecar of a shard; None where there is none, or it is damaged or of another plan."""
    try:
        sidecar = read_sidecar(plan.root, shard)
    except (ValueError, OSError):
        return None
    return sidecar if sidecar is not None and sidecar.fingerprint == plan.digest else None


def _moved(settings: AnySettings, images: Path | None, weights: Path | None) -> AnySettings:
    """The settings with the folders and files where they are now."""
    if isinstance(settings, ImportSettings):
        return settings if images is None else replace(settings, features=os.path.abspath(images))
    if images is not None:
        settings = replace(settings, images=os.path.abspath(images))
    if weights is not None and isinstance(settings, FeatureSettings):
        settings = replace(settings, weights=os.path.abspath(weights))
    return settings


def _restore_sidecar(plan: Plan, shard: PlannedShard, manifest: Manifest, index: int) -> bool:
    """Write the sidecar of an image shard, whose tar is sound, from the tables; False where they do not hold it."""
    try:
        rows, info = tuple(sample_rows(manifest.rows(index))), manifest.shards[index]
        records = plan.records(shard)
        planned = {record.image_id for record in records}
        items = [LeftOut(**json.loads(line)) for line in (plan.root / LEFT_OUT).read_text().splitlines()]
    except (OSError, ValueError, TypeError):
        return False
    left_out = tuple(item for item in items if item.image_id in planned)
    if manifest.fingerprint != plan.fingerprint or len(rows) + len(left_out) != shard.samples:
        return False
    about = (shard.name, shard.split, plan.digest, len(rows), info.bytes, info.sha256)
    checksums = {row.key: row.xxh3 for row in rows}
    times = times_if_packed(records, checksums, partial(pack_picture, plan), partial(picture_files, plan))
    sidecar = Sidecar(*about, rows, left_out, times.extra())
    with exclusive(plan.root):
        check_stands(plan.root, plan.digest)
        files.write_bytes(sidecar_path(plan.root, shard), seal(sidecar.to_document()))
    return True


def _before(
    plan: Plan, shard: PlannedShard, manifest: Manifest | None, recorded: dict[str, int], new_bytes: bool
) -> Before:
    """What a shard was, by the manifest and by its sidecar; where both are lost, nothing was left out."""
    sidecar, index = _sidecar_of(plan, shard), recorded.get(shard.name)
    try:
        rows = sample_rows(manifest.rows(index)) if manifest is not None and index is not None else None
    except ValueError:  # its table is damaged
        rows = None
    if rows is None and sidecar is not None:
        rows = list(sidecar.rows)
    kept = 0 if index is None or manifest is None else manifest.shards[index].samples
    left_out = len(sidecar.left_out) if sidecar is not None else 0 if manifest is None else shard.samples - kept
    samples = {} if new_bytes or rows is None else {row.key: row.xxh3 for row in rows}
    unknown = "a machine that is not known any more" if plan.kind == "features" else ""
    return Before(left_out, samples, unknown if sidecar is None else sidecar.extra.get(MADE_ON, unknown))


def _rebuild(plan: Plan, shards: list[PlannedShard], before: dict[str, Before], num_workers: int) -> None:
    """Build shards again. Only their sidecars are taken away before, and put back where the job fails.

    Both are done as the owner of the folder: not where another plan stands by now.
    """
    if plan.kind == "images":
        check_pictures(plan)
    elif plan.kind == "imported":
        check_source(plan)
    else:
        source_of(plan)
        weights = plan.settings_as(FeatureSettings).weights
        check_planned(Path(weights), recipe_of(plan).encoder.weights_sha256)
    sidecars = _take_sidecars(plan, shards)
    try:
        if plan.kind == "images":
            shard_stripe(plan, num_workers=num_workers, before=before)
        elif plan.kind == "imported":
            import_stripe(plan, num_workers=num_workers, before=before)
        else:
            extract_stripe(plan, before=before)
    except Exception:
        with exclusive(plan.root):
            check_stands(plan.root, plan.digest)
            for path, blob in sidecars.items():
                files.create(path, blob)
        raise


def _take_sidecars(plan: Plan, shards: list[PlannedShard]) -> dict[Path, bytes]:
    """Take the sidecars of some shards away, so that the jobs build these again; what was in them.

    Those stay whose shard is as they record it by now: another repair was faster, or ended before it published.
    """
    with exclusive(plan.root):
        check_stands(plan.root, plan.digest)
        broken = [shard for shard in shards if not _stands(plan, shard)]
        paths = [path for path in (sidecar_path(plan.root, shard) for shard in broken) if path.exists()]
        sidecars = {path: path.read_bytes() for path in paths}
        for path in sidecars:
            path.unlink()
    files.crash_point("sidecars-taken")
    return sidecars


def _check(root: Path, num_workers: int) -> Report:
    with progress_line(recorded_bytes(root), f"verify {root.name}", "B") as advance:
        report = verify(root, num_workers, advance)
    for fault in report.faults:
        print(f"FAULT {root}/{fault}")
    for name in report.foreign:
        print(f"note: {root}/{name} is not part of the data set")
    for note in report.notes:
        print(f"note: {root}: {note}")
    state = f"{len(report.faults)} faults" if report.faults else "sound"
    print(f"{root}: {state}, {report.shards} shards, {report.bytes / 1e6:.1f} MB")
    return report


def main(
    folders: Annotated[list[Path], typer.Argument(help="folders of image or feature shards")],
    repair_faults: Annotated[bool, typer.Option("--repair", help="rebuild what is broken")] = False,
    images: Annotated[
        Path | None, typer.Option(help="with --repair: where the pictures, image shards or imported features are now")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="with --repair: where the encoder weights are now")] = None,
    new_bytes: Annotated[
        bool,
        typer.Option(ALLOW, help="with --repair: take what comes out with other bytes; the set has a new digest"),
    ] = False,
    num_workers: Annotated[
        int, typer.Option(min=0, help="hashing threads, and processes of a repair; 0: by cores")
    ] = 0,
) -> None:
    """Check data sets against what was recorded; exit status 1 when a fault is left at the end."""
    refuse_urls(*folders, images)
    left, num_workers = 0, num_workers or available_cores()
    for root in folders:
        report = _check(root, num_workers)
        if repair_faults and report.calls_for_repair:
            repair(root, report, images=images, weights=weights, num_workers=num_workers, new_bytes=new_bytes)
            report = _check(root, num_workers)
        left += len(report.faults)
    if left:
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
