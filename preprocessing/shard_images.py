"""Pack annotated pictures into WebDataset shards, once, so that nothing later opens a hundred thousand small files.

    python -m preprocessing.shard_images --images coco --out data/coco/images --num-workers 8 \\
        --annotations train=captions_train2017.json --annotations val=captions_val2017.json

Every picture is decoded to prove that it can be; its file goes into the shard unchanged.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from preprocessing.annotations.clean import RULES
from preprocessing.annotations.formats import AUTO, FORMATS
from preprocessing.annotations.read import Records, read_annotations
from preprocessing.console import Step, refuse_urls, run
from preprocessing.sharding.changed import FileTimes, settle_changed
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.jobs import Summary, run_stripe
from preprocessing.sharding.ownership import publish_plan
from preprocessing.sharding.plan import WRITER, ImageRecord, ImageSettings, Plan, PlannedShard, load_plan
from preprocessing.sharding.rebuild import Before, as_before
from preprocessing.sharding.records import check_left_out, plan_records
from preprocessing.sharding.write import Sample, write_shard
from sat.machine import available_cores
from sat.shards.location import read_retrying
from sat.shards.pictures import MAX_BYTES, NOTE, BadPicture, decode, extension_of
from sat.shards.schema import LeftOut, Sidecar

UNPACKED = "unpacked"
"""Folder, inside that of the shards, for the pictures of containers (Parquet, tar)."""
GONE = "file gone since the plan"
"""Reason to leave a picture out."""


def plan_images(
    records: Records,
    image_root: Path,
    out: Path,
    *,
    shard_size: int,
    seed: int,
    max_bad_fraction: float,
    overwrite: bool = False,
) -> Plan:
    """Assign records to shards and publish the plan.

    Raises ValueError when there is nothing to shard, too much is left out already, `out` was planned otherwise, or a
    picture is another one than was packed.
    """
    check_left_out(len(records.images), records.left_out, image_root, max_bad_fraction)
    shards, groups, digest = plan_records(records.images, shard_size, seed)
    fingerprint = {"writer": WRITER, "rules": RULES, "records": digest, "shard_size": shard_size, "seed": seed}
    settings = ImageSettings(os.path.abspath(image_root))
    plan = Plan(out, fingerprint, settings, shards, records.left_out, records.notes)
    plan = publish_plan(plan, groups, overwrite)
    settle_changed(plan, partial(pack_picture, plan), partial(picture_files, plan), overwrite)
    return plan


def build_image_shard(plan: Plan, shard: PlannedShard, before: Mapping[str, Before] | None = None) -> Sidecar:
    """Write one shard of pictures; returns its sidecar.

    Raises ValueError or OSError, and publishes nothing, when the pictures are not the planned ones (a folder that is
    not mounted must not become a finished shard of nothing) or not as the shard was `before`.
    """
    check_pictures(plan)
    notes, times = Counter[str](), FileTimes()

    def extra() -> dict[str, Any]:
        return times.extra() | ({"notes": dict(sorted(notes.items()))} if notes else {})

    samples = as_before(_samples(plan, shard, notes, times), before, plan.root / shard.name)
    return write_shard(plan.root, shard, plan.digest, samples, extra)


def check_pictures(plan: Plan) -> None:
    """ValueError when the folder of the planned pictures is not there."""
    images = plan.settings_as(ImageSettings).images
    if not Path(images).is_dir():
        raise ValueError(f"{images}: no such image folder; {plan.root} was planned from it")


def shard_stripe(
    plan: Plan,
    *,
    stripe: str = "0/1",
    num_workers: int = 1,
    max_bad_fraction: float = 1.0,
    before: Mapping[str, Before] | None = None,
) -> Summary:
    """Write the shards of a stripe with `num_workers` processes; raises as `run_shards` and `build_image_shard` do."""
    build = partial(build_image_shard, before=before)
    return run_stripe(plan, build, "image shards", stripe, num_workers, max_bad_fraction)


def read_picture(path: Path, file_bytes: int) -> bytes:
    """The bytes of a planned picture file.

    Raises BadPicture when it is too large to be one, OSError when it is missing or storage keeps failing, ValueError
    when its size has changed.
    """
    if file_bytes > MAX_BYTES:
        raise BadPicture("file too large", f"{file_bytes} bytes")

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(file_bytes + 1)

    data = read_retrying(str(path.parent), path.name, read)
    if len(data) != file_bytes:
        raise ValueError(f"{path} is not {file_bytes} bytes long as it was planned; plan again with --overwrite")
    return data


def picture_files(plan: Plan, record: ImageRecord) -> tuple[Path]:
    """The file of a record."""
    return (Path(plan.settings_as(ImageSettings).images) / record.file_name,)


def pack_picture(plan: Plan, record: ImageRecord, notes: Counter[str] | None = None) -> Sample | LeftOut:
    """A picture as it goes into its shard, or left out where it cannot be decoded. Raises as `read_picture`."""
    try:
        data = read_picture(*picture_files(plan, record), record.file_bytes)
        image = decode(data)
    except BadPicture as bad:
        return LeftOut(record.image_id, record.file_name, bad.reason, bad.detail)
    if notes is not None and NOTE in image.info:
        notes[image.info[NOTE]] += 1
    return Sample(record, data, extension_of(image), image.width, image.height)


def _samples(plan: Plan, shard: PlannedShard, notes: Counter[str], times: FileTimes) -> Iterator[Sample | LeftOut]:
    """A shard's pictures; those whose files are gone come last, left out. OSError where all are gone."""
    records, gone = plan.records(shard), list[LeftOut]()
    for record in records:
        times.take(record, picture_files(plan, record))
        try:
            packed = pack_picture(plan, record, notes)
        except (FileNotFoundError, NotADirectoryError):
            gone.append(LeftOut(record.image_id, record.file_name, GONE))
            if len(gone) == len(records):  # rather a folder that is not mounted
                raise
            continue
        yield packed
    yield from gone


def _about(plan: Plan) -> str:
    notes = "".join(f", {count} {note}" for note, count in plan.notes.items())
    return f"plan of {plan.samples} pictures in {len(plan.shards)} shards, {len(plan.left_out)} left out{notes}"


def _planned(records: Records, out: Path, shard_size: int, seed: int, max_bad: float, overwrite: bool) -> Plan:
    if records.root is None:
        raise ValueError("planning needs --annotations and --images, the folder that the file names are relative to")
    return plan_images(
        records, records.root, out, shard_size=shard_size, seed=seed, max_bad_fraction=max_bad, overwrite=overwrite
    )


def main(
    out: Annotated[Path, typer.Option(help="folder of the image shards")],
    annotations: Annotated[
        list[str] | None, typer.Option(help="SPLIT=FILE, or FILE that says its splits or is all train; or a folder")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="folder the file names are relative to")] = None,
    split: Annotated[list[str] | None, typer.Option(help="SPLIT=FILE, a list of file names")] = None,
    format: Annotated[str, typer.Option(help=f"{AUTO}, or one of {', '.join(FORMATS)}")] = AUTO,
    val_fraction: Annotated[
        float, typer.Option(help="share of a lone training set that becomes val, by hash of its id")
    ] = 0.0,
    keep_rejected: Annotated[
        bool, typer.Option(help="keep VizWiz's rejected and pre-canned captions; without it they are left out")
    ] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="pictures per shard")] = 1000,
    seed: Annotated[int, typer.Option(help="orders the samples inside the shards")] = 1,
    num_workers: Annotated[int, typer.Option(min=0, help="processes; 0: one per available core")] = 0,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="share of pictures that may be left out")
    ] = 0.01,
    stripe: Annotated[str, typer.Option(help="I/N: every N-th shard from number I, counted from 0")] = "0/1",
    step: Annotated[Step, typer.Option(help="part of the job to run")] = Step.ALL,
    overwrite: Annotated[bool, typer.Option(help="delete a set planned otherwise, pack changed files anew")] = False,
) -> None:
    """Pack pictures and captions into shards; a second run reuses what is whole and goes on where a first one ended."""
    refuse_urls(out, images)
    if step in (Step.ALL, Step.PLAN):
        records = read_annotations(
            annotations or (),
            format,
            image_root=images,
            split_lists=split or (),
            val_fraction=val_fraction,
            unpack_to=out / UNPACKED,
            keep_rejected=keep_rejected,
        )
        plan = _planned(records, out, shard_size, seed, max_bad_fraction, overwrite)
        print(f"{out}: {_about(plan)}")
    if step in (Step.ALL, Step.SHARDS):
        summary = shard_stripe(
            load_plan(out),
            stripe=stripe,
            num_workers=num_workers or available_cores(),
            max_bad_fraction=max_bad_fraction,
        )
        print(f"{out}: {summary.line()}")
    if step == Step.FINALIZE or (step == Step.ALL and stripe == "0/1"):
        manifest = finalize(load_plan(out), max_bad_fraction=max_bad_fraction)
        print(f"{out}: data set {manifest.digest[:12]} of {manifest.splits}, left out: {manifest.left_out or 'none'}")


if __name__ == "__main__":
    run(main)
