"""Compare every byte of a data set on disk with what was recorded when it was written, and name every fault.

The surprising decision: a sound shard is hashed once, as a whole file; only a shard whose sha256 is wrong is gone
through sample by sample, to name the keys. So a check runs at the speed of the disk.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from preprocessing.sharding.finalize import check_same_set
from preprocessing.sharding.made_on import Machines
from preprocessing.sharding.plan import (
    CLAIM,
    LEFT_OUT,
    LOCK,
    PLAN,
    WORK,
    Plan,
    PlannedShard,
    load_plan,
    table_fault,
    table_paths,
)
from preprocessing.sharding.write import read_sidecar, sidecar_path
from sat import files
from sat.shards.manifest import Manifest, load_manifest
from sat.shards.schema import MANIFEST, SHARDS, STATISTICS, SampleRow, Sidecar, is_sample_table, sample_rows
from sat.shards.sealed import unseal

_CHUNK = 4 << 20


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was written: in which file of the data set and, inside a shard, at which key."""

    file: str
    what: str
    key: str = ""
    shard: str = ""
    """The shard that has to be built again; empty for a fault of the tables or of the plan."""

    def __str__(self) -> str:
        return f"{self.file}: {f'key {self.key}: ' if self.key else ''}{self.what}"


@dataclass(frozen=True)
class Report:
    """Result of a verification."""

    faults: tuple[Fault, ...]
    foreign: tuple[str, ...]
    """Files in the folder that are not part of the data set: strangers, orphans, what killed workers left."""
    shards: int
    bytes: int
    """Shards checked and their recorded bytes."""
    notes: tuple[str, ...] = ()
    """What is worth telling and no fault: on what features were computed."""

    @property
    def calls_for_repair(self) -> bool:
        """Whether there are faults, or files in `work/` that killed workers of a finished set have left."""
        left = (Path(name) for name in self.foreign if name.startswith(f"{WORK}/"))
        return bool(self.faults) or any(path.suffix == CLAIM or files.is_temporary(path.name) for path in left)


@dataclass(frozen=True)
class RecordedShard:
    """A shard as it was recorded in the manifest, or in its sidecar where there is no manifest."""

    name: str
    bytes: int
    sha256: str
    rows: Callable[[], Sequence[SampleRow]]
    """Reads the rows of its samples."""


def verify(root: Path, num_workers: int = 4, progress: Callable[[int], None] = lambda size: None) -> Report:
    """Check tables, plan, sidecars and shards in a folder with `num_workers` threads; `progress` is told bytes read.

    Raises ValueError when the folder holds neither a data set nor a plan.
    """
    if not (root / MANIFEST).exists() and not (root / WORK / PLAN).exists():
        raise ValueError(f"{root}: no data set (neither {MANIFEST} nor {WORK}/{PLAN})")
    manifest, faults = check_tables(root)
    plan, plan_faults = _check_plan(root)
    if manifest is not None and plan is not None and (fault := _of_another_set(plan)):
        plan, plan_faults = None, (fault,)
    recorded = [] if manifest is None else list(_recorded(manifest))
    known = {shard.name: shard for shard in recorded}
    machines = Machines()
    sidecars, sidecar_faults = ([], []) if plan is None else _check_sidecars(plan, known, machines)
    if manifest is None:
        recorded = sidecars
    with ThreadPoolExecutor(num_workers) as pool:
        shard_faults = [f for found in pool.map(partial(check_shard, root, progress=progress), recorded) for f in found]
    faults = (*faults, *plan_faults, *sidecar_faults, *shard_faults)
    size, notes = sum(shard.bytes for shard in recorded), tuple(machines.lines())
    return Report(faults, tuple(_foreign(root, recorded, plan)), len(recorded), size, notes)


def recorded_bytes(root: Path) -> int:
    """Bytes of shards that `verify` is going to read, as far as the manifest tells; for a progress line."""
    try:
        return sum(shard.bytes for shard in load_manifest(root).shards)
    except ValueError:
        return 0


def check_tables(root: Path) -> tuple[Manifest | None, tuple[Fault, ...]]:
    """The manifest, when it and both tables are sound, and the faults of manifest, tables and statistics."""
    try:
        tables = unseal((root / MANIFEST).read_bytes())["files"]
    except FileNotFoundError:
        return None, (Fault(MANIFEST, "missing: the data set is not finished"),)
    except ValueError as error:
        return None, (Fault(MANIFEST, f"damaged ({error})"),)
    faults = []
    for name, recorded in sorted(tables.items()):
        try:
            if files.sha256(root / name) != recorded["sha256"]:
                faults.append(Fault(name, "not the bytes that were written"))
        except FileNotFoundError:
            faults.append(Fault(name, "missing"))
        except OSError as error:
            faults.append(Fault(name, _unreadable(error)))
    try:
        return load_manifest(root), tuple(faults)
    except ValueError as error:
        return None, tuple(faults) or (Fault(MANIFEST, str(error)),)


def check_shard(root: Path, shard: RecordedShard, progress: Callable[[int], None] = lambda size: None) -> list[Fault]:
    """Faults of one shard: missing, of another size, or with other bytes, by key."""
    path, digest = root / shard.name, hashlib.sha256()
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                progress(len(chunk))
    except FileNotFoundError:
        return [Fault(shard.name, "missing", shard=shard.name)]
    except OSError as error:
        return [Fault(shard.name, _unreadable(error), shard=shard.name)]
    if digest.hexdigest() == shard.sha256:
        return []
    faults = (
        []
        if size == shard.bytes
        else [Fault(shard.name, f"{size} bytes, {shard.bytes} were written", shard=shard.name)]
    )
    faults += _faulty_samples(path, shard)
    return faults or [
        Fault(shard.name, "the bytes after the last sample are not those that were written", shard=shard.name)
    ]


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"


def _faulty_samples(path: Path, shard: RecordedShard) -> Iterator[Fault]:
    try:
        rows = shard.rows()
    except ValueError as error:
        yield Fault(shard.name, f"its bytes are not those that were written ({error})", shard=shard.name)
        return
    with open(path, "rb") as file:
        for row in rows:
            try:
                file.seek(row.offset)
                blob = file.read(row.nbytes)
            except OSError as error:  # it could be read a moment ago
                yield Fault(shard.name, _unreadable(error), row.key, shard.name)
                continue
            if len(blob) < row.nbytes:
                yield Fault(shard.name, "cut off", row.key, shard.name)
            elif xxhash.xxh3_64_intdigest(blob) != row.xxh3:
                yield Fault(shard.name, "not the bytes that were written", row.key, shard.name)


def _recorded(manifest: Manifest) -> Iterator[RecordedShard]:
    for index, shard in enumerate(manifest.shards):
        rows = partial(lambda number: sample_rows(manifest.rows(number)), index)
        yield RecordedShard(shard.name, shard.bytes, shard.sha256, rows)


def _check_plan(root: Path) -> tuple[Plan | None, tuple[Fault, ...]]:
    """The plan, None where a data set was copied without its work folder, and its faults."""
    if not (root / WORK / PLAN).exists():
        return None, ()
    try:
        plan = load_plan(root)
    except ValueError as error:
        return None, (Fault(f"{WORK}/{PLAN}", str(error)),)
    fault = table_fault(plan)
    return plan, () if fault is None else (Fault(f"{WORK}/{fault[0]}", fault[1]),)


def _of_another_set(plan: Plan) -> Fault | None:
    """The fault of a plan, with all of `work/`, that lies beside the manifest of another data set."""
    try:
        check_same_set(plan)
    except ValueError as error:
        return Fault(f"{WORK}/{PLAN}", str(error))
    return None


def _check_sidecars(
    plan: Plan, recorded: dict[str, RecordedShard], machines: Machines
) -> tuple[list[RecordedShard], list[Fault]]:
    """The shards as their sidecars record them, and the faults of sidecars, beside what the manifest recorded.

    `machines` counts on what the shards were computed.
    """
    shards: list[RecordedShard] = []
    faults: list[Fault] = []
    for shard in plan.shards:
        file = f"{WORK}/{sidecar_path(plan.root, shard).name}"
        try:
            sidecar = read_sidecar(plan.root, shard)
        except (ValueError, OSError) as error:
            what = _unreadable(error) if isinstance(error, OSError) else str(error)
            faults.append(Fault(file, what, shard=shard.name))
            continue
        if sidecar is None:
            faults.append(Fault(file, "missing: this shard was not finished", shard=shard.name))
        elif problem := _problem(plan, sidecar, recorded):
            faults.append(Fault(file, problem, shard=shard.name))
        elif sidecar.samples:
            machines.add(sidecar)
            rows = partial(_sidecar_rows, plan, shard)  # read again when asked for: all of them fill the memory
            shards.append(RecordedShard(shard.name, sidecar.bytes, sidecar.sha256, rows))
    return shards, faults


def _sidecar_rows(plan: Plan, shard: PlannedShard) -> tuple[SampleRow, ...]:
    sidecar = read_sidecar(plan.root, shard)
    if sidecar is None:
        raise ValueError(f"the sidecar of {shard.name} vanished")
    return sidecar.rows


def _problem(plan: Plan, sidecar: Sidecar, recorded: dict[str, RecordedShard]) -> str:
    """What is wrong with a sound sidecar, beside its plan and the shards of the manifest; empty for nothing."""
    if sidecar.fingerprint != plan.digest:
        return f"fingerprint {sidecar.fingerprint[:12]}, the plan has {plan.digest[:12]}"
    listed = recorded.get(sidecar.shard)
    if recorded and sidecar.samples and (listed is None or listed.sha256 != sidecar.sha256):
        return "it does not describe the shard that the manifest lists"
    return ""


def _foreign(root: Path, recorded: list[RecordedShard], plan: Plan | None) -> Iterator[str]:
    """Files that are not part of the data set, sorted; where the manifest cannot be read, no table is foreign.

    Nor is a shard where the plan cannot be read either: nobody knows then which are the set's.
    """
    try:
        tables = set(unseal((root / MANIFEST).read_bytes())["files"])
    except (OSError, ValueError):
        tables = {SHARDS, STATISTICS, *(name for name in os.listdir(root) if is_sample_table(name))}
    own = {MANIFEST, LEFT_OUT, WORK, *tables, *(shard.name for shard in recorded)}
    if not recorded and plan is None:
        own.update(name for name in os.listdir(root) if name.endswith(".tar"))
    yield from sorted(set(os.listdir(root)) - own)
    if plan is not None:
        own = {PLAN, LOCK, *(path.name for path in table_paths(plan))} | {f"{shard.stem}.json" for shard in plan.shards}
        yield from (f"{WORK}/{name}" for name in sorted(set(os.listdir(root / WORK)) - own))
