"""Whose a folder is: its plan is published here, a standing set is deleted here, and a straggler is turned away here.

A folder belongs to the plan in `work/plan.json`. Whoever changes what is published (a plan, a shard, the tables) holds
the folder's lock and looks first whether that plan is still the one it works for: a worker of a plan that was
overwritten meanwhile finds another one and ends, without a file touched. tests/test_protocol.py goes through every
order in which these steps can happen.

The surprising decision: a name is no proof. Where no plan stands, a file of one of our names is somebody else's unless
a sealed file of ours (the manifest, a sidecar) says that it is of this plan; it is told, and neither replaced nor
deleted. Only what a plan, a manifest or a sidecar lists is ever deleted.
"""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

from preprocessing.sharding.plan import (
    LEFT_OUT,
    LOCK,
    PLAN,
    WORK,
    ImageRecord,
    Plan,
    PlannedShard,
    plan_bytes,
    read_plan,
    standing_plan,
    table_fault,
    write_records,
)
from sat import files
from sat.shards.manifest import load_manifest
from sat.shards.schema import MANIFEST, SHARDS, STATISTICS, is_sample_table
from sat.shards.sealed import seal, unseal

_PLAN_TABLE = re.compile(r"plan-[0-9a-f]{16}(-\d{6})?\.parquet")


def exclusive(root: Path) -> AbstractContextManager[bool]:
    """Wait until nobody else plans, publishes a shard or finalizes in this folder; a killed holder's lock is free."""
    return files.locked(root / WORK / LOCK)


def check_stands(root: Path, digest: str) -> None:
    """ValueError where the plan that stands in a folder is not the one whose fingerprint has this digest.

    Between two looks at the same plan the file is only opened, not read.
    """
    path = root / WORK / PLAN
    try:
        with open(path, "rb") as file:  # opened, because a network file system looks at the server then
            about = os.fstat(file.fileno())
    except FileNotFoundError:
        raise ValueError(f"{root}: its plan is gone, somebody deletes this data set; nothing was written") from None
    found = _digest_of(path, (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns))
    if found != digest:
        raise ValueError(
            f"{root}: another plan ({found[:12]}) stands there by now, this job works for {digest[:12]}; "
            "nothing was written: use another --out for one of the two"
        )


@lru_cache(maxsize=4)
def _digest_of(path: Path, identity: tuple[int, ...]) -> str:
    return read_plan(path.parent.parent).digest


def publish_plan(plan: Plan, groups: Iterable[Sequence[ImageRecord]] = (), overwrite: bool = False) -> Plan:
    """Write the plan, with `groups` (the samples of each shard) as its table; one with this fingerprint is reused.

    Raises ValueError, naming what differs, when the folder was planned otherwise, and naming the files when there are
    some that are not known to be ours; `overwrite` deletes the old data set, but not such files.
    """
    path = plan.root / WORK / PLAN
    with exclusive(plan.root):
        if standing_plan(plan.root) is None:  # none, or a damaged one, which nobody can use
            _make_way(plan, overwrite)
            if path.exists():
                path.unlink()
        elif overwrite and _difference(plan):
            delete_data_set(plan.root, [shard.name for shard in read_plan(plan.root).shards])
        if not path.exists() or not _difference(plan):
            if table_fault(plan) is not None:
                write_records(plan, groups)
            files.crash_point("plan-table-written")
            if files.create(path, plan_bytes(plan)):
                return plan
        if difference := _difference(plan):
            raise _planned_otherwise(plan, difference)
        if path.read_bytes() != plan_bytes(plan):  # the same data set from another folder, or with another batch size
            files.write_bytes(path, plan_bytes(plan))
    return plan


def _planned_otherwise(plan: Plan, difference: Sequence[str]) -> ValueError:
    return ValueError(
        f"{plan.root} was planned with other inputs or settings ({', '.join(difference)}); "
        "choose another --out, or delete what is there with --overwrite"
    )


def _difference(plan: Plan) -> list[str]:
    """Names of the entries in which the fingerprint of the plan that stands differs from this one."""
    standing = read_plan(plan.root)
    names = sorted(standing.fingerprint.keys() | plan.fingerprint.keys())
    different = [name for name in names if standing.fingerprint.get(name) != plan.fingerprint.get(name)]
    return different + (["kind"] if standing.kind != plan.kind else [])


def delete_data_set(root: Path, shards: Iterable[str]) -> None:
    """Delete a data set of these shards, the manifest first and the plan last; what is not ours stays."""
    tables = sorted(name for name in os.listdir(root) if is_sample_table(name))
    names = list(shards)
    for name in (MANIFEST, *tables, SHARDS, STATISTICS, LEFT_OUT, *names):
        (root / name).unlink(missing_ok=True)
    files.crash_point("set-deleted")
    stems = {name.removesuffix(".tar") for name in names}
    for entry in sorted(os.listdir(root / WORK)):
        stem, _, suffix = entry.rpartition(".")
        own = _PLAN_TABLE.fullmatch(entry) or files.is_temporary(entry)
        if own or (suffix in ("json", "claim") and stem in stems):
            (root / WORK / entry).unlink(missing_ok=True)
    (root / WORK / PLAN).unlink(missing_ok=True)


def withdraw_shards(plan: Plan, shards: Iterable[PlannedShard]) -> None:
    """Take the sidecars of some shards away, and first the manifest that lists them: the jobs build them again."""
    with exclusive(plan.root):
        check_stands(plan.root, plan.digest)
        (plan.root / MANIFEST).unlink(missing_ok=True)
        for shard in shards:
            files.crash_point("manifest-withdrawn")
            (plan.root / WORK / f"{shard.stem}.json").unlink(missing_ok=True)


# ------------------------------------------------------------------ where no plan stands


def _make_way(plan: Plan, overwrite: bool) -> None:
    """Refuse, or with `overwrite` delete, another set than the plan's whose own plan is lost; refuse what is nobody's.

    ValueError naming the files that are not known to be ours.
    """
    root, digest = plan.root, plan.digest
    manifest, sidecars = _sealed(root / MANIFEST), _sidecars(root)
    foreign = {name for name, fingerprint in sidecars.items() if fingerprint != digest}
    published = manifest is not None and files.sha256_of(seal(manifest["fingerprint"])) != digest
    if published or foreign:
        if not overwrite:
            raise _planned_otherwise(plan, ["its own plan is lost"])
        delete_data_set(root, {*sidecars, *(_listed(root) if published else ())})
    standing = set(os.listdir(root))
    strangers = sorted(standing & ({shard.name for shard in plan.shards} - _sidecars(root).keys()))
    if manifest is None and (not sidecars or foreign):
        strangers += sorted(standing & {MANIFEST, SHARDS, STATISTICS, LEFT_OUT})
        strangers += sorted(name for name in standing if is_sample_table(name))
    if strangers and not (root / WORK / PLAN).exists():  # beside a damaged plan they are what its workers left
        if manifest is not None and not published:
            raise ValueError(f"{root} holds this very data set, without its {WORK}/: use it, or choose another --out")
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise ValueError(
            f"{root} holds {', '.join(strangers[:3])}{more}, which are not known to be ours and would be replaced; "
            "choose another --out, or move them away"
        )


def _sealed(path: Path) -> dict[str, Any] | None:
    """The document in a sealed file; None where there is none, or a damaged one."""
    try:
        return unseal(path.read_bytes())
    except (OSError, ValueError):
        return None


def _sidecars(root: Path) -> dict[str, str]:
    """The digest of the plan's fingerprint in every sound sidecar of a folder, by the shard's name."""
    documents = (_sealed(path) for path in sorted((root / WORK).glob("*.json")))
    sidecars = (each for each in documents if each is not None and {"shard", "sha256"} <= each.keys())
    return {sidecar["shard"]: sidecar["fingerprint"] for sidecar in sidecars}


def _listed(root: Path) -> list[str]:
    """The shards of the manifest that stands; none where it or its tables are damaged."""
    try:
        return [shard.name for shard in load_manifest(root).shards]
    except ValueError:
        return []
