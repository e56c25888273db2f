"""Turn finished shards into a data set: check that all stand, write the tables, then `manifest.json`, last.

The surprising decision: nothing is computed here that is not in the sidecars, so finalizing again, anywhere, gives the
same bytes, and a repair needs nothing else.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from preprocessing.sharding.plan import LEFT_OUT, Plan
from preprocessing.sharding.write import (
    WORK,
    crash_point,
    exclusive,
    hash_file,
    read_sidecar,
    sync_folder,
    write_file,
)
from sat.shards.manifest import Manifest, check_files, load_manifest, manifest_bytes
from sat.shards.schema import MANIFEST, SHARDS, STATISTICS, LeftOut, Sidecar, place_of_rows
from sat.shards.tables import write_sample_tables, write_shard_table


def finalize(
    plan: Plan, statistics: Callable[[Iterable[dict]], bytes] | None = None, max_bad_fraction: float = 1.0
) -> Manifest:
    """Publish the data set; one that stands already is reused. Of several at once, one publishes and the others wait.

    `statistics` makes the bytes of `statistics.safetensors` from the sidecars, in the order of the shards. Raises
    ValueError naming shards that are missing, damaged or of another fingerprint, or when too many pictures were left
    out.
    """
    with exclusive(plan.root):
        if _standing(plan) is None:
            _check_sidecars(plan)
            left_out = list(plan.left_out) + [LeftOut(**item) for car in _sidecars(plan) for item in car["left_out"]]
            _check_fraction(plan, left_out, max_bad_fraction)
            _write_tables(plan, statistics, left_out)
        _sweep(plan.root)
        return load_manifest(plan.root)


def _write_tables(plan: Plan, statistics: Callable[[Iterable[dict]], bytes] | None, left_out: list[LeftOut]) -> None:
    """Write all files beside the shards, the manifest last."""
    root, names = plan.root, [SHARDS, LEFT_OUT]
    (root / MANIFEST).unlink(missing_ok=True)
    shards = write_sample_tables(root, map(Sidecar.from_document, _sidecars(plan)), root / WORK)
    write_shard_table(root, shards, root / WORK)
    if statistics is not None:
        write_file(root, root / STATISTICS, statistics(_sidecars(plan)))
        names.append(STATISTICS)
    write_file(root, root / LEFT_OUT, "".join(json.dumps(asdict(item)) + "\n" for item in left_out).encode())
    crash_point("tables-written")
    write_file(root, root / MANIFEST, _manifest(plan, shards, names, left_out))
    crash_point("manifest-written")


def _standing(plan: Plan) -> Manifest | None:
    """The published data set when it is of this plan, whole by name and size, and of the shards that stand now."""
    try:
        manifest = load_manifest(plan.root)
        check_files(manifest)
        shards = {sidecar["shard"]: sidecar["sha256"] for sidecar in _sidecars(plan) if sidecar["samples"]}
    except ValueError:
        return None
    equal = shards == {shard.name: shard.sha256 for shard in manifest.shards}
    return manifest if equal and manifest.fingerprint == plan.fingerprint and manifest.kind == plan.kind else None


def _check_sidecars(plan: Plan) -> None:
    """ValueError naming every shard that does not stand, with the reason."""
    faults = []
    for shard in plan.shards:
        try:
            sidecar = read_sidecar(plan.root, shard)
        except ValueError as error:
            faults.append(str(error))
            continue
        path = plan.root / shard.name
        if sidecar is None:
            faults.append(f"{shard.name} is missing (no sidecar)")
        elif sidecar["fingerprint"] != plan.digest:
            faults.append(
                f"{shard.name} has fingerprint {sidecar['fingerprint'][:12]}, the plan has {plan.digest[:12]}"
            )
        elif sidecar["samples"] and (not path.exists() or path.stat().st_size != sidecar["bytes"]):
            faults.append(f"{shard.name} is missing or not {sidecar['bytes']} bytes long")
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(f"{plan.root}: {'; '.join(faults[:10])}{more}; run the shard step again")


def _check_fraction(plan: Plan, left_out: list[LeftOut], max_bad_fraction: float) -> None:
    total = plan.samples + len(plan.left_out)
    if len(left_out) > max_bad_fraction * total:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(Counter(item.reason for item in left_out).items()))
        raise ValueError(
            f"{plan.root}: {len(left_out)} of {total} pictures had to be left out ({counts}), "
            f"more than --max-bad-fraction {max_bad_fraction} allows"
        )


def _sidecars(plan: Plan) -> Iterator[dict]:
    """All sidecars in the order of the shards, one at a time in memory."""
    for shard in plan.shards:
        sidecar = read_sidecar(plan.root, shard)
        if sidecar is None:
            raise ValueError(f"{plan.root}: the sidecar of {shard.name} vanished; run the shard step again")
        yield sidecar


def _manifest(plan: Plan, shards: pa.Table, names: list[str], left_out: list[LeftOut]) -> bytes:
    """The content of manifest.json."""
    names = {*names, *(place_of_rows(shard)[0] for shard in range(len(shards)))}
    files = {
        name: {"bytes": (plan.root / name).stat().st_size, "sha256": hash_file(plan.root / name)} for name in names
    }
    reasons = dict(sorted(Counter(item.reason for item in left_out).items()))
    return manifest_bytes(plan.kind, plan.fingerprint, shards, files, reasons)


def _sweep(root: Path) -> None:
    """Remove what killed workers left: every shard stands, so temporary files and claims serve nobody."""
    for entry in sorted(os.listdir(root / WORK)):
        if ".tmp-" in entry or entry.endswith(".claim"):
            (root / WORK / entry).unlink(missing_ok=True)
    sync_folder(root / WORK)
