"""Fix, before any work, which samples go into which shard, so that every worker on every machine agrees.

Below the data set's folder:

    work/plan.json               sealed: kind, fingerprint, settings, shards, what was left out
    work/plan-DIGEST.parquet     the samples of each shard, one row group per shard; no rows for feature shards

The surprising decision: a folder keeps its first plan. Running again with the same inputs and settings reuses it, other
ones are refused (or start from nothing with `overwrite`), so a folder never holds shards of two plans.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.sharding.write import (
    LOCK,
    WORK,
    PlannedShard,
    crash_point,
    exclusive,
    publish_exclusive,
    replace_file,
    sync_file,
    temporary_path,
    write_file,
)
from sat.shards.schema import MANIFEST, SHARDS, STATISTICS, LeftOut
from sat.shards.sealed import seal, unseal

PLAN, LEFT_OUT = "plan.json", "left_out.jsonl"
PLAN_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.string()),
        ("file_name", pa.string()),
        ("split", pa.string()),
        ("file_bytes", pa.int64()),
        ("captions", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Plan:
    """What a data set will be made of."""

    root: Path
    kind: str
    """`images` or `features`."""
    fingerprint: dict
    """Everything that shapes the bytes."""
    settings: dict
    """What a worker or a repair needs and the bytes do not depend on: folders, batch size."""
    shards: tuple[PlannedShard, ...]
    """Sorted by (split, name)."""
    left_out: tuple[LeftOut, ...] = ()
    """Pictures left out before any was opened."""
    notes: dict = field(default_factory=dict)
    """Counts worth telling: captions cleaned, truncated, dropped."""

    @property
    def digest(self) -> str:
        """sha256 of the fingerprint; every sidecar carries it."""
        return fingerprint_digest(self.fingerprint)

    @property
    def samples(self) -> int:
        """Pictures planned."""
        return sum(shard.samples for shard in self.shards)

    def rows(self, shard: PlannedShard) -> list[dict]:
        """Planned samples of one shard, columns as in `PLAN_SCHEMA`. Raises ValueError when the table is damaged."""
        return _read_rows(self, _open_table(self), self.shards.index(shard))


_AGAIN = "run the plan step again, with the same options"


def check_table(plan: Plan) -> None:
    """ValueError when the table is missing or damaged."""
    table = _open_table(plan)
    for index in range(len(plan.shards) if plan.kind == "images" else 0):
        _read_rows(plan, table, index)


def _open_table(plan: Plan) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(table_path(plan), pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{table_path(plan)}: cannot be read ({error}); {_AGAIN}") from error


def _read_rows(plan: Plan, table: pq.ParquetFile, index: int) -> list[dict]:
    path, shard = table_path(plan), plan.shards[index]
    try:
        rows = table.read_row_group(index, use_threads=False).to_pylist()
    except (pa.ArrowException, OSError, IndexError) as error:
        raise ValueError(f"{path}: the plan of {shard.name} cannot be read ({error}); {_AGAIN}") from error
    if plan_rows_digest(rows) != shard.rows_sha256:
        raise ValueError(f"{path}: the plan of {shard.name} is not the one that was written; {_AGAIN}")
    return rows


def fingerprint_digest(fingerprint: dict) -> str:
    """sha256 of a fingerprint, hex."""
    return hashlib.sha256(seal(fingerprint)).hexdigest()


def plan_rows_digest(rows: Iterable[dict]) -> str:
    """sha256 of the planned samples of one shard, hex."""
    return hashlib.sha256(seal({"rows": list(rows)})).hexdigest()


def publish_plan(plan: Plan, row_groups: Iterable[list[dict]] = (), overwrite: bool = False) -> Plan:
    """Write the plan, with `row_groups` (the samples of each shard) as its table; one with this fingerprint is reused.

    Raises ValueError, naming what differs, when the folder was planned otherwise; `overwrite` then deletes the old data
    set.
    """
    path = plan.root / WORK / PLAN
    with exclusive(plan.root):
        if path.exists() and standing_plan(plan.root) is None:  # a damaged one, which nobody can use
            path.unlink()
        if overwrite and path.exists() and _difference(plan):
            delete_data_set(load_plan(plan.root))
        if not path.exists() or not _difference(plan):
            if not _table_stands(plan):
                _write_table(plan, row_groups)
            crash_point("plan-table-written")
            if publish_exclusive(path, _to_bytes(plan)):
                return plan
        if difference := _difference(plan):
            raise ValueError(
                f"{plan.root} was planned with other inputs or settings ({', '.join(difference)}); "
                "choose another --out, or delete what is there with --overwrite"
            )
        if path.read_bytes() != _to_bytes(plan):  # the same data set from another folder, or with another batch size
            write_file(plan.root, path, _to_bytes(plan))
    return plan


def standing_plan(root: Path) -> Plan | None:
    """The plan of a folder, None when there is none or it is damaged."""
    try:
        return load_plan(root)
    except ValueError:
        return None


def _difference(plan: Plan) -> list[str]:
    """Names of the entries in which the fingerprint of the plan that stands differs from this one."""
    standing = load_plan(plan.root)
    names = sorted(standing.fingerprint.keys() | plan.fingerprint.keys())
    different = [name for name in names if standing.fingerprint.get(name) != plan.fingerprint.get(name)]
    return different + (["kind"] if standing.kind != plan.kind else [])


def _to_bytes(plan: Plan) -> bytes:
    document = {"kind": plan.kind, "fingerprint": plan.fingerprint, "settings": plan.settings, "notes": plan.notes}
    document["shards"] = [asdict(shard) for shard in plan.shards]
    document["left_out"] = [asdict(item) for item in plan.left_out]
    return seal(document)


def load_plan(root: Path) -> Plan:
    """The plan of a folder. Raises ValueError when there is none or it is damaged."""
    path = root / WORK / PLAN
    try:
        document = unseal(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{root} has no plan ({path}); run the plan step first") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); {_AGAIN}") from None
    shards = tuple(PlannedShard(**shard) for shard in document.pop("shards"))
    left_out = tuple(LeftOut(**item) for item in document.pop("left_out"))
    return Plan(root=root, shards=shards, left_out=left_out, **document)


def table_path(plan: Plan) -> Path:
    """The table's name carries the digest of its plan, so that two plans tried at once cannot mix."""
    return plan.root / WORK / f"plan-{plan.digest[:16]}.parquet"


def _table_stands(plan: Plan) -> bool:
    try:
        check_table(plan)
    except ValueError:
        return False
    return True


def _write_table(plan: Plan, row_groups: Iterable[list[dict]]) -> None:
    """Write the planned samples, one row group per shard."""
    path = table_path(plan)
    temporary = temporary_path(plan.root, path.name)
    try:
        with open(temporary, "wb") as file:
            with pq.ParquetWriter(file, PLAN_SCHEMA, compression="zstd", write_statistics=False) as writer:
                for rows in row_groups:
                    writer.write_table(pa.Table.from_pylist(rows, PLAN_SCHEMA), row_group_size=len(rows))
            sync_file(file)
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def delete_data_set(plan: Plan) -> None:
    """Delete what these programs wrote by a plan, the manifest first and the plan last; other files stay."""
    tables = (path.name for path in plan.root.glob("samples*.parquet"))
    for name in (MANIFEST, *tables, SHARDS, STATISTICS, LEFT_OUT, *(shard.name for shard in plan.shards)):
        (plan.root / name).unlink(missing_ok=True)
    work = plan.root / WORK
    for entry in sorted(set(os.listdir(work)) - {LOCK}, key=lambda name: (name == PLAN, name)):
        (work / entry).unlink(missing_ok=True)
