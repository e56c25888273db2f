"""Features from elsewhere -> verified feature shards, without a picture: grids, or regions with their boxes.

    python -m preprocessing.import_features --annotations train=captions_train2017.json --annotations \\
        val=captions_val2017.json --features cocobu_att --out data/coco/regions

`--features` is a folder of `NAME.npy` or `NAME.npz`, or one HDF5 file (see `preprocessing.importing.sources` for what
is read), where NAME is the picture's file name without suffix or its image id. What cannot be used is left out by rule
and counted. The shards are written as all others are: the job can be interrupted, repeated and run twice at once.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from preprocessing.annotations.read import read_annotations
from preprocessing.console import Step, refuse_urls, run
from preprocessing.features.statistics import ChannelSums, merge_statistics, scale_of
from preprocessing.importing.arrays import BadFeatures
from preprocessing.importing.fitting import fit, rows_of
from preprocessing.importing.plan import ImportOptions, import_settings, plan_import, spec_of
from preprocessing.importing.sources import open_source
from preprocessing.sharding.changed import FileTimes, settle_changed
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.jobs import Summary, run_stripe
from preprocessing.sharding.plan import ImageRecord, ImportSettings, Plan, PlannedShard, load_plan
from preprocessing.sharding.rebuild import Before, as_before
from preprocessing.sharding.write import Sample, write_shard
from sat.machine import available_cores
from sat.shards.features import FeatureSpec
from sat.shards.manifest import Manifest
from sat.shards.schema import LeftOut, Sidecar


def build_imported_shard(plan: Plan, shard: PlannedShard, before: Mapping[str, Before] | None = None) -> Sidecar:
    """Write one shard of imported features; returns its sidecar.

    Raises ValueError or OSError, and publishes nothing, when the files are not the planned ones or not as the shard was
    `before`.
    """
    sums, times = ChannelSums(spec_of(plan).dim), FileTimes()
    samples = as_before(_samples(plan, shard, sums, times), before, plan.root / shard.name)
    return write_shard(plan.root, shard, plan.digest, samples, lambda: sums.extra(shard.name) | times.extra())


def import_stripe(
    plan: Plan,
    *,
    stripe: str = "0/1",
    num_workers: int = 1,
    max_bad_fraction: float = 1.0,
    before: Mapping[str, Before] | None = None,
) -> Summary:
    """Write the shards of a stripe in `num_workers` processes; raises as `run_shards` and `build_imported_shard` do."""
    build = partial(build_imported_shard, before=before)
    return run_stripe(plan, build, "feature shards", stripe, num_workers, max_bad_fraction)


def finalize_import(plan: Plan, max_bad_fraction: float = 1.0) -> Manifest:
    """Publish the data set with its statistics; raises as `finalize`."""
    dim, scale, splits = spec_of(plan).dim, scale_of(plan), plan.fingerprint["statistics_splits"]
    return finalize(plan, lambda sidecars: merge_statistics(sidecars, splits, dim, scale), max_bad_fraction)


def check_source(plan: Plan) -> None:
    """ValueError when the features a plan was made from are not there."""
    settings = plan.settings_as(ImportSettings)
    open_source(settings.features, settings.boxes)


def feature_files(plan: Plan, record: ImageRecord) -> tuple[Path, ...]:
    """The files that the features of a record are read from; none where they are gone."""
    settings = plan.settings_as(ImportSettings)
    source = open_source(settings.features, settings.boxes)
    place = source.find(record)
    return () if place is None else source.files_of(place)


def pack_features(
    plan: Plan, record: ImageRecord, sums: ChannelSums | None = None, times: FileTimes | None = None
) -> Sample | LeftOut:
    """The features of a record as they go into its shard, or left out where they cannot be used.

    `sums` counts them, `times` takes the time of their files. ValueError where they are not the planned ones.
    """
    settings, spec, scale = plan.settings_as(ImportSettings), spec_of(plan), scale_of(plan)
    source = open_source(settings.features, settings.boxes)
    place = source.find(record)
    if place is None or place.bytes != record.file_bytes:
        what = "are gone" if place is None else f"are not {record.file_bytes} bytes long as they were planned"
        raise ValueError(f"{settings.features}: the features of {record.file_name} {what}; plan again with --overwrite")
    if times is not None:
        times.take(record, source.files_of(place))
    try:
        found = source.read(place)
        fitted = fit(found, spec, scale, (record.width, record.height))
    except BadFeatures as bad:
        return LeftOut(record.image_id, record.file_name, bad.reason, bad.detail)
    if sums is not None:
        if spec.dtype == "int8":
            sums.add_clipped(rows_of(found).values[None].astype(np.float32), scale)
        sums.add(fitted.values)
    width, height = (record.width, record.height) if record.width else found.size
    more = {} if fitted.boxes is None else {"boxes.npy": FeatureSpec.boxes_bytes(fitted.boxes)}
    return Sample(record, spec.npy_bytes(fitted.stored), "npy", width, height, more, spec.about_values)


def _samples(plan: Plan, shard: PlannedShard, sums: ChannelSums, times: FileTimes) -> Iterator[Sample | LeftOut]:
    for record in plan.records(shard):
        yield pack_features(plan, record, sums, times)


def _about(plan: Plan) -> str:
    spec = spec_of(plan)
    what = f"grid {spec.cells[0]}x{spec.cells[1]}" if spec.kind == "grid" else f"at most {spec.max_regions} regions"
    boxes = " with boxes" if spec.boxes else ""
    notes = "".join(f", {count} {note}" for note, count in plan.notes.items())
    return (
        f"plan of {plan.samples} pictures in {len(plan.shards)} shards, {what}{boxes} of {spec.dim} channels, "
        f"{len(plan.left_out)} left out{notes}"
    )


def main(
    out: Annotated[Path, typer.Option(help="folder of the feature shards")],
    annotations: Annotated[list[str] | None, typer.Option(help="SPLIT=FILE or FILE, as for shard_images")] = None,
    features: Annotated[Path | None, typer.Option(help="folder of NAME.npy or NAME.npz files, or one .h5 file")] = None,
    boxes: Annotated[Path | None, typer.Option(help="folder of NAME.npy files of boxes, where they lie apart")] = None,
    split: Annotated[list[str] | None, typer.Option(help="SPLIT=FILE, a list of file names (Flickr)")] = None,
    format: Annotated[str, typer.Option(help="of the annotations; auto: by their content")] = "auto",
    val_fraction: Annotated[
        float, typer.Option(help="share of a lone training set that becomes val, by hash of its id")
    ] = 0.0,
    dtype: Annotated[str, typer.Option(help="format on disk: bf16, fp16, fp32 or int8")] = ImportOptions.dtype,
    kind: Annotated[str, typer.Option(help="grid, regions or auto: what the first files are")] = ImportOptions.kind,
    dim: Annotated[int, typer.Option(help="width D of the features; 0: that of the first files")] = 0,
    name: Annotated[str, typer.Option(help="what made the features; a model refuses those of another name")] = "",
    scale_from: Annotated[str, typer.Option(help="int8: folder of an int8 data set whose scales are taken")] = "",
    max_regions: Annotated[int, typer.Option(help="most regions of a picture; 0: 100, or what all have")] = 0,
    statistics_split: Annotated[
        list[str] | None, typer.Option(help="split the statistics are taken from; default: train, or all without it")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="pictures per shard")] = ImportOptions.shard_size,
    seed: Annotated[int, typer.Option(help="orders the samples inside the shards")] = ImportOptions.seed,
    num_workers: Annotated[int, typer.Option(min=0, help="processes; 0: one per available core")] = 0,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="share of pictures that may be left out")
    ] = 0.01,
    stripe: Annotated[str, typer.Option(help="I/N: every N-th shard from number I, counted from 0")] = "0/1",
    step: Annotated[Step, typer.Option(help="part of the job to run")] = Step.ALL,
    overwrite: Annotated[bool, typer.Option(help="delete a set planned otherwise, pack changed files anew")] = False,
) -> None:
    """Pack features from elsewhere into shards; a second run reuses what is whole and goes on where one ended."""
    refuse_urls(out, features, boxes)
    if step in (Step.ALL, Step.PLAN):
        if features is None or not annotations:
            raise ValueError("planning needs --annotations and --features")
        records = read_annotations(annotations, format, split_lists=split or (), val_fraction=val_fraction)
        options = ImportOptions(
            dtype, kind, dim, max_regions, shard_size, seed, tuple(statistics_split or ()), name, scale_from
        )
        settings = import_settings(features, boxes)
        plan = plan_import(records, settings, out, options, max_bad_fraction=max_bad_fraction, overwrite=overwrite)
        settle_changed(plan, partial(pack_features, plan), partial(feature_files, plan), overwrite)
        print(f"{out}: {_about(plan)}")
    if step in (Step.ALL, Step.SHARDS):
        workers = num_workers or available_cores()
        summary = import_stripe(load_plan(out), stripe=stripe, num_workers=workers, max_bad_fraction=max_bad_fraction)
        print(f"{out}: {summary.line()}")
    if step == Step.FINALIZE or (step == Step.ALL and stripe == "0/1"):
        manifest = finalize_import(load_plan(out), max_bad_fraction)
        print(f"{out}: data set {manifest.digest[:12]} of {manifest.splits}, left out: {manifest.left_out or 'none'}")


if __name__ == "__main__":
    run(main)
