"""Plan a data set of features from elsewhere: which files, of what kind and width, stored how; all fixed beforehand.

The surprising decision: what the features are is told by a look at some files (the first of the training pictures, in
the order of the shards) and then holds for all: another width or grid later is a picture left out, not another data
set. int8 scales are taken from the same files.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from preprocessing.annotations.clean import RULES
from preprocessing.annotations.read import Records
from preprocessing.features.statistics import CALIBRATION_IMAGES, Floats, calibrate, packed, scale_from
from preprocessing.importing.arrays import BadFeatures
from preprocessing.importing.fitting import Rows, fit, grid_of, rows_of
from preprocessing.importing.sources import Found, Source, open_source, places_of
from preprocessing.sharding.ownership import publish_plan
from preprocessing.sharding.plan import WRITER, ImageRecord, ImportSettings, Plan
from preprocessing.sharding.records import check_left_out, plan_records
from sat.settings import check, setting
from sat.shards.features import STORAGE, FeatureSpec
from sat.shards.schema import LeftOut

LOOKED_AT = 64
"""Pictures whose features tell what all are."""
MOST_REGIONS = 100
"""Regions allowed where nothing else is said, as in the bottom-up releases (10 to 100)."""


@dataclass(frozen=True)
class ImportOptions:
    """What a user may choose about imported features. Raises ValueError, naming the choices, for what is none."""

    dtype: str = setting("bf16", choices=tuple(STORAGE))
    """Format on disk."""
    kind: str = setting("auto", choices=("auto", "grid", "regions"))
    """auto: regions where there are boxes, or no square number of rows that most pictures have; else a grid."""
    dim: int = setting(0)
    """Width D; 0: what the first files have."""
    max_regions: int = setting(0)
    """Most regions of a picture; 0: MOST_REGIONS, or what all have."""
    shard_size: int = setting(1000, at_least=1)
    """Pictures per shard."""
    seed: int = setting(1)
    """Orders the samples inside the shards."""
    statistics_splits: tuple[str, ...] = ()
    """Splits the statistics are taken from; none named: train, or all of a data set without it."""
    name: str = setting("")
    """What made the features; a model refuses those of another name."""
    scale_from: str = ""
    """int8 only: folder of a finished int8 data set whose scales are taken, so that both can be mixed."""

    def __post_init__(self) -> None:
        check(self)
        if self.scale_from and self.dtype != "int8":
            raise ValueError(f"--scale-from is for --dtype int8; {self.dtype} has no scales")


def plan_import(
    records: Records,
    settings: ImportSettings,
    out: Path,
    options: ImportOptions,
    *,
    max_bad_fraction: float,
    overwrite: bool = False,
) -> Plan:
    """Find the features of all records, tell what they are and publish the plan.

    Raises ValueError when too much is left out already, no file can be read, an option does not fit what is found, or
    `out` was planned otherwise.
    """
    source = open_source(settings.features, settings.boxes)
    present, missing = _find(source, records)
    left_out = tuple(sorted((*records.left_out, *missing), key=lambda item: item.image_id))
    check_left_out(len(present), left_out, Path(settings.features), max_bad_fraction)
    splits = options.statistics_splits or ("train",)
    unknown = sorted(set(options.statistics_splits) - {record.split for record in present})
    if unknown:
        raise ValueError(f"--statistics-split {unknown[0]}: the annotations have no such split")
    shards, groups, digest = plan_records(present, options.shard_size, options.seed)
    in_order = [record for group in groups for record in group]
    seen = _look(source, [r for r in in_order if r.split in splits] or in_order, options)
    spec = replace(_spec_of(seen, options), made_by=options.name)
    if spec.dtype == "int8":
        spec, settings = _with_scale(spec, settings, seen, options.scale_from)
    fingerprint = {"writer": WRITER, "rules": RULES, "records": digest, "shard_size": options.shard_size}
    fingerprint |= {"seed": options.seed, "statistics_splits": list(splits)} | spec.to_fingerprint()
    return publish_plan(Plan(out, fingerprint, settings, shards, left_out, records.notes), groups, overwrite)


def spec_of(plan: Plan) -> FeatureSpec:
    """What the features of a plan are. ValueError for a plan of another kind."""
    plan.settings_as(ImportSettings)
    return FeatureSpec.from_fingerprint(plan.fingerprint)


def _find(source: Source, records: Records) -> tuple[list[ImageRecord], list[LeftOut]]:
    """The records whose features are there, with their size, and those left out."""
    present, missing = [], []
    for record, place in zip(records.images, places_of(source, records.images), strict=True):
        if place is None:
            missing.append(LeftOut(record.image_id, record.file_name, "no such file"))
        else:
            present.append(replace(record, file_bytes=place.bytes))
    return present, missing


@dataclass(frozen=True)
class _Seen:
    """What was looked at."""

    found: list[Found]
    rows: list[Rows]


def _look(source: Source, records: Sequence[ImageRecord], options: ImportOptions) -> _Seen:
    """The features of the first records that can be read. Raises ValueError where none can, naming the first."""
    wanted = CALIBRATION_IMAGES if options.dtype == "int8" else LOOKED_AT
    found: list[Found] = []
    rows: list[Rows] = []
    first_bad = ""
    for record in records[: 2 * wanted]:
        if len(found) == wanted:
            break
        place = source.find(record)
        if place is None:  # it was there a moment ago
            continue
        try:
            one = source.read(place)
            rows.append(rows_of(one))
            found.append(one)
        except BadFeatures as error:
            first_bad = first_bad or f"{place.name}: {error}"
    if not found:
        raise ValueError(f"no features can be read, e.g. {first_bad}")
    return _Seen(found, rows)


def _spec_of(seen: _Seen, options: ImportOptions) -> FeatureSpec:
    """What most of those looked at are."""
    dim = options.dim or _most_common([rows.values.shape[1] for rows in seen.rows])
    fitting = [rows for rows in seen.rows if rows.values.shape[1] == dim and len(rows.values)]
    if not fitting:
        widths = sorted({rows.values.shape[1] for rows in seen.rows})
        raise ValueError(f"--dim {dim}: the features are of width {', '.join(map(str, widths))}, which comes last")
    counts = [len(rows.values) for rows in fitting]
    boxes = _most_common([found.boxes is not None for found in seen.found])
    common = _most_common(counts)
    cells = _most_common([rows.cells or grid_of(len(rows.values)) for rows in fitting])
    alike = 2 * counts.count(common) > len(counts)
    kind = options.kind
    if kind == "auto":
        kind = "grid" if alike and not boxes and cells is not None and not options.max_regions else "regions"
    if kind == "regions":
        most = options.max_regions or (common if len(set(counts)) == 1 else MOST_REGIONS)
        return FeatureSpec("regions", (0, 0), dim, options.dtype, None, None, max_regions=most, boxes=boxes)
    if not alike or cells is None:
        raise ValueError(
            f"--kind grid: the pictures have {_range(counts)} rows of features, which is no grid; "
            "save arrays [H, W, D], or use --kind regions"
        )
    return FeatureSpec("grid", cells, dim, options.dtype, None, None)


def _with_scale(
    spec: FeatureSpec, settings: ImportSettings, seen: _Seen, shared: str
) -> tuple[FeatureSpec, ImportSettings]:
    """Both with int8 scales: of the data set `shared`, else of what was looked at."""
    scale, digest = packed(scale_from(shared, spec.dim) if shared else _calibrated(spec, seen))
    return replace(spec, scale_sha256=digest), replace(settings, scale=scale)


def _calibrated(spec: FeatureSpec, seen: _Seen) -> Floats:
    """Scale per channel, float32 [D]: the largest magnitude over the pictures looked at becomes 127."""
    ones, exact = np.ones(spec.dim, np.float32), replace(spec, dtype="fp32", boxes=False)
    sound: list[npt.NDArray[Any]] = []
    for found in seen.found:
        try:
            sound.append(fit(found, exact, ones, (0, 0)).values)
        except BadFeatures:
            continue
    if not sound:
        raise ValueError("int8 scales need sound features, and none of those looked at are; use --dtype bf16")
    return calibrate(sound)


def import_settings(features: Path, boxes: Path | None) -> ImportSettings:
    """Where the files are, by absolute paths."""
    return ImportSettings(os.path.abspath(features), "" if boxes is None else os.path.abspath(boxes))


def _most_common(values: Sequence[Any]) -> Any:
    """The most frequent value, of equals the first."""
    return Counter(values).most_common(1)[0][0]


def _range(counts: Sequence[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
