"""Fix, before any work, which samples go into which shard, so that every worker on every machine agrees.

Below the data set's folder:

    work/plan.json               sealed: kind, fingerprint, settings, shards, what was left out
    work/plan-DIGEST.parquet     the samples of each shard, one row group per shard; no rows for feature shards;
                                 from the 257th shard on plan-DIGEST-000001.parquet and so on
    work/lock                    held by whoever changes what is published (`ownership`)

The surprising decision: a folder keeps its first plan. Running again with the same inputs and settings reuses it, other
ones are refused (or start from nothing with `overwrite`), so a folder never holds shards of two plans.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from sat import files
from sat.shards.schema import SHARDS_PER_TABLE, LeftOut
from sat.shards.sealed import Damaged, seal, unseal
from sat.shards.tables import write_table

WORK, PLAN, LOCK, LEFT_OUT = "work", "plan.json", "lock", "left_out.jsonl"
CLAIM = ".claim"
"""Ends the name of a file of it that says who is at work on a shard."""
PLAN_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.string()),
        ("file_name", pa.string()),
        ("split", pa.string()),
        ("file_bytes", pa.int64()),
        ("captions", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("id_is_number", pa.bool_()),
    ]
)
WRITER = 3
"""Version of what is written for given inputs, of every kind of plan; part of its fingerprint."""


@dataclass(frozen=True)
class ImageRecord:
    """A picture and its captions, as they are planned; the fields are the columns of the plan's table."""

    image_id: str
    file_name: str
    """Path relative to the image root."""
    split: str
    captions: tuple[str, ...]
    key: str
    """WebDataset key, `[A-Za-z0-9_-]+`: the image id where it fits, else derived from it."""
    file_bytes: int = 0
    """Size of the file when its image root was given: a replaced picture is noticed by the next plan."""
    width: int = 0
    height: int = 0
    """Of the picture in pixels, where the annotations say them, else 0."""
    id_is_number: bool = False
    """The annotations have the image id as a whole number, not as text."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be written: at most `samples` samples, fewer where pictures are left out."""

    name: str
    split: str
    samples: int
    rows_sha256: str
    """Digest of what is planned for it: rows of the plan's table, or of the image shard it is made from."""

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".tar")


@dataclass(frozen=True)
class ImageSettings:
    """What packing pictures needs to know and the bytes do not depend on."""

    images: str
    """Folder of the picture files, absolute."""


@dataclass(frozen=True)
class FeatureSettings:
    """What extracting features needs to know and the bytes do not depend on."""

    images: str
    """Folder of the image shards, absolute."""
    weights: str
    """File of the encoder's weights, absolute."""
    scale: str = ""
    """int8 only: the scales per channel (little-endian float32 in base64), whose digest the fingerprint has."""


@dataclass(frozen=True)
class ImportSettings:
    """What packing features from elsewhere needs to know and the bytes do not depend on."""

    features: str
    """Folder of the feature files, or an HDF5 file; absolute."""
    boxes: str = ""
    """Folder of files of boxes beside those of features; absolute, empty where there is none."""
    scale: str = ""
    """As in FeatureSettings."""


AnySettings = ImageSettings | FeatureSettings | ImportSettings
KINDS: dict[str, type[AnySettings]] = {"images": ImageSettings, "features": FeatureSettings, "imported": ImportSettings}
"""Kinds of plans, by their settings."""
Settings = TypeVar("Settings", ImageSettings, FeatureSettings, ImportSettings)


@dataclass(frozen=True)
class Plan:
    """What a data set will be made of."""

    root: Path
    fingerprint: Mapping[str, Any]
    """Everything that shapes the bytes: the document on disk, sealed into plan, sidecars and manifest."""
    settings: AnySettings
    shards: tuple[PlannedShard, ...]
    """Sorted by (split, name)."""
    left_out: tuple[LeftOut, ...] = ()
    """Pictures left out before any was opened."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Counts worth telling: captions cleaned, truncated, dropped."""

    @property
    def kind(self) -> str:
        """`images`, `features` (extracted from image shards) or `imported` (features from elsewhere)."""
        return next(kind for kind, settings in KINDS.items() if isinstance(self.settings, settings))

    @property
    def holds(self) -> str:
        """What the data set is one of: `images` or `features`."""
        return "images" if self.kind == "images" else "features"

    @property
    def digest(self) -> str:
        """sha256 of the fingerprint; every sidecar carries it."""
        return files.sha256_of(seal(self.fingerprint))

    @property
    def samples(self) -> int:
        """Pictures planned."""
        return sum(shard.samples for shard in self.shards)

    def index(self, shard: PlannedShard) -> int:
        """Place of a shard among `shards`."""
        return self._places[shard.name]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {shard.name: place for place, shard in enumerate(self.shards)}

    def settings_as(self, settings: type[Settings]) -> Settings:
        """The settings, where the plan is of the kind that has such; ValueError where it is of the other kind."""
        if not isinstance(self.settings, settings):
            raise ValueError(f"{self.root} is planned to hold {self.kind}; this program makes another kind")
        return self.settings

    def records(self, shard: PlannedShard) -> list[ImageRecord]:
        """Planned samples of one shard that is not made from another. Raises ValueError when the table is damaged."""
        return _read_records(self, self.index(shard))


_AGAIN = "run the plan step again, with the same options"


def table_fault(plan: Plan) -> tuple[str, str] | None:
    """The name of the first table that is missing or damaged, and what is wrong with it."""
    _footer.cache_clear()
    for number, path in enumerate(table_paths(plan)):
        shards = range(len(plan.shards))[number * SHARDS_PER_TABLE :][:SHARDS_PER_TABLE]
        try:
            _footer(path)
            for index in () if plan.kind == "features" else shards:
                _read_records(plan, index)
        except ValueError as error:
            return path.name, str(error)
    return None


@lru_cache(maxsize=2)
def _footer(path: Path) -> pq.FileMetaData:
    """Kept for a while: the shards that a worker takes one after the other lie in the same table."""
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {_AGAIN}") from error


def _read_records(plan: Plan, index: int) -> list[ImageRecord]:
    table, group = divmod(index, SHARDS_PER_TABLE)
    path, shard = _table_path(plan, table), plan.shards[index]
    footer = _footer(path)
    try:
        with pq.ParquetFile(path, metadata=footer, pre_buffer=False) as opened:
            rows = opened.read_row_group(group, use_threads=False).to_pylist()
    except (pa.ArrowException, OSError, IndexError) as error:
        raise ValueError(f"{path}: the plan of {shard.name} cannot be read ({error}); {_AGAIN}") from error
    records = [ImageRecord(**{**row, "captions": tuple(row["captions"])}) for row in rows]
    if records_digest(records) != shard.rows_sha256:
        raise ValueError(f"{path}: the plan of {shard.name} is not the one that was written; {_AGAIN}")
    return records


def records_digest(records: Iterable[ImageRecord]) -> str:
    """sha256 of the planned samples of one shard, hex."""
    return files.sha256_of(seal({"rows": [vars(record) for record in records]}))


def standing_plan(root: Path) -> Plan | None:
    """The plan of a folder, None when there is none or it is damaged. Raises ValueError as `read_plan` else."""
    try:
        return read_plan(root) if (root / WORK / PLAN).exists() else None
    except Damaged:
        return None


def plan_bytes(plan: Plan) -> bytes:
    """The content of `work/plan.json`."""
    given = (one.name for one in fields(plan.settings) if getattr(plan.settings, one.name) != one.default)
    settings = {name: getattr(plan.settings, name) for name in given}
    return seal(
        {
            "kind": plan.kind,
            "fingerprint": plan.fingerprint,
            "settings": settings,
            "notes": plan.notes,
            "shards": [vars(shard) for shard in plan.shards],
            "left_out": [vars(item) for item in plan.left_out],
        }
    )


def load_plan(root: Path) -> Plan:
    """The plan of a folder, to be worked on. Raises ValueError as `read_plan`, and for one of another version."""
    plan = read_plan(root)
    if plan.fingerprint.get("writer", WRITER) != WRITER:
        raise ValueError(
            f"{root} was planned by another version of this program (writer {plan.fingerprint['writer']}, this one is "
            f"{WRITER}); make it again: run the plan step with --overwrite"
        )
    return plan


def read_plan(root: Path) -> Plan:
    """The plan of a folder. Raises ValueError when there is none, it is damaged or of a kind unknown here."""
    path = root / WORK / PLAN
    try:
        document = unseal(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{root} has no plan ({path}); run the plan step first") from None
    except ValueError as error:
        raise Damaged(f"{path}: damaged ({error}); {_AGAIN}") from None
    if document["kind"] not in KINDS:
        raise ValueError(f"{path}: a plan of {document['kind']}, of which this program knows nothing")
    return Plan(
        root=root,
        fingerprint=document["fingerprint"],
        settings=_settings(document["kind"], document["settings"]),
        shards=tuple(PlannedShard(**shard) for shard in document["shards"]),
        left_out=tuple(LeftOut(**item) for item in document["left_out"]),
        notes=document["notes"],
    )


def _settings(kind: str, document: Mapping[str, Any]) -> AnySettings:
    known = {one.name for one in fields(KINDS[kind])}
    return KINDS[kind](**{name: value for name, value in document.items() if name in known})


def table_paths(plan: Plan) -> list[Path]:
    """The tables; their names carry the digest of their plan, so that two plans tried at once cannot mix."""
    shards = 0 if plan.kind == "features" else len(plan.shards)
    return [_table_path(plan, number) for number in range(max(-(-shards // SHARDS_PER_TABLE), 1))]


def _table_path(plan: Plan, number: int) -> Path:
    return plan.root / WORK / f"plan-{plan.digest[:16]}{f'-{number:06d}' if number else ''}.parquet"


def write_records(plan: Plan, groups: Iterable[Sequence[ImageRecord]]) -> None:
    """Write the planned samples, one row group per shard."""
    tables = (pa.Table.from_pylist([vars(record) for record in group], PLAN_SCHEMA) for group in groups)
    for path in table_paths(plan):
        write_table(path, PLAN_SCHEMA, islice(tables, SHARDS_PER_TABLE))
    _footer.cache_clear()
