"""Turn finished shards into a data set: check that all stand, write the tables, then `manifest.json`, last.

The surprising decision: nothing is computed here that is not in the sidecars, so finalizing again, anywhere, gives the
same bytes, and a repair needs nothing else.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from preprocessing.sharding.ownership import check_stands, exclusive
from preprocessing.sharding.plan import CLAIM, LEFT_OUT, PLAN, WORK, Plan
from preprocessing.sharding.write import read_sidecar
from sat import files
from sat.shards.manifest import Manifest, check_files, load_manifest, write_manifest
from sat.shards.schema import MANIFEST, STATISTICS, LeftOut, Sidecar
from sat.shards.sealed import unseal
from sat.shards.tables import write_sample_tables, write_shard_table

Statistics = Callable[[Iterable[Sidecar]], bytes]
"""Makes the bytes of `statistics.safetensors` from the sidecars, in the order of the shards."""


def finalize(plan: Plan, statistics: Statistics | None = None, max_bad_fraction: float = 1.0) -> Manifest:
    """Publish the data set; one that stands already is reused. Of several at once, one publishes and the others wait.

    Raises ValueError naming shards that are missing, damaged or of another fingerprint, or when too many pictures were
    left out, or when the folder is by now, or its manifest is, of another plan.
    """
    with exclusive(plan.root):
        check_stands(plan.root, plan.digest)
        check_same_set(plan)
        if _standing(plan) is None:
            left_out = [*plan.left_out, *_check_sidecars(plan)]
            _check_fraction(plan, left_out, max_bad_fraction)
            _write_tables(plan, statistics, left_out)
        _sweep(plan.root)
        return load_manifest(plan.root)


def check_same_set(plan: Plan) -> None:
    """ValueError where the manifest that stands, if one can be read, is of another data set than the plan."""
    try:
        manifest = unseal((plan.root / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return
    if (manifest["kind"], manifest["fingerprint"]) != (plan.holds, dict(plan.fingerprint)):
        raise ValueError(
            f"{plan.root}: {WORK}/{PLAN} plans another data set than {MANIFEST} lists; nothing was changed: "
            f"bring this set's own {WORK}/ back, or move the other's away"
        )


def withdraw_manifest(plan: Plan) -> None:
    """Take the manifest of a plan's data set away, whose tables are damaged: `finalize` then writes all anew."""
    with exclusive(plan.root):
        check_stands(plan.root, plan.digest)
        check_same_set(plan)
        (plan.root / MANIFEST).unlink(missing_ok=True)


def reasons_of(left_out: Iterable[LeftOut]) -> dict[str, int]:
    """How many pictures were left out, by reason."""
    return dict(sorted(Counter(item.reason for item in left_out).items()))


def _write_tables(plan: Plan, statistics: Statistics | None, left_out: list[LeftOut]) -> None:
    """Write all files beside the shards, the manifest last."""
    root, work = plan.root, plan.root / WORK
    (root / MANIFEST).unlink(missing_ok=True)
    shards = write_sample_tables(root, _sidecars(plan), work)
    write_shard_table(root, shards, work)
    if statistics is not None:
        files.write_bytes(root / STATISTICS, statistics(_sidecars(plan)), work)
    lines = "".join(json.dumps(vars(item)) + "\n" for item in left_out)
    files.write_bytes(root / LEFT_OUT, lines.encode(), work)
    files.crash_point("tables-written")
    names = [LEFT_OUT] if statistics is None else [LEFT_OUT, STATISTICS]
    write_manifest(root, plan.holds, plan.fingerprint, shards, names, reasons_of(left_out), work)
    files.crash_point("manifest-written")


def _standing(plan: Plan) -> Manifest | None:
    """The published data set when it is of this plan, whole by name and size, and of the shards that stand now."""
    try:
        manifest = load_manifest(plan.root)
        check_files(manifest)
        shards = {sidecar.shard: sidecar.sha256 for sidecar in _sidecars(plan) if sidecar.samples}
    except ValueError:
        return None
    equal = shards == {shard.name: shard.sha256 for shard in manifest.shards}
    return manifest if equal and manifest.fingerprint == plan.fingerprint and manifest.kind == plan.holds else None


def _check_sidecars(plan: Plan) -> list[LeftOut]:
    """What the shards left out. ValueError naming every shard that does not stand, with the reason."""
    faults: list[str] = []
    left_out: list[LeftOut] = []
    for shard in plan.shards:
        try:
            sidecar = read_sidecar(plan.root, shard)
        except ValueError as error:
            faults.append(str(error))
            continue
        path = plan.root / shard.name
        if sidecar is None:
            faults.append(f"{shard.name} is missing (no sidecar)")
        elif sidecar.fingerprint != plan.digest:
            faults.append(f"{shard.name} has fingerprint {sidecar.fingerprint[:12]}, the plan has {plan.digest[:12]}")
        elif sidecar.samples and (not path.exists() or path.stat().st_size != sidecar.bytes):
            faults.append(f"{shard.name} is missing or not {sidecar.bytes} bytes long")
        else:
            left_out += sidecar.left_out
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(f"{plan.root}: {'; '.join(faults[:10])}{more}; run the shard step again")
    return left_out


def _check_fraction(plan: Plan, left_out: list[LeftOut], max_bad_fraction: float) -> None:
    total = plan.samples + len(plan.left_out)
    if len(left_out) > max_bad_fraction * total:
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons_of(left_out).items())
        raise ValueError(
            f"{plan.root}: {len(left_out)} of {total} pictures had to be left out ({counts}), "
            f"more than --max-bad-fraction {max_bad_fraction} allows"
        )


def _sidecars(plan: Plan) -> Iterator[Sidecar]:
    """All sidecars in the order of the shards, one at a time in memory."""
    for shard in plan.shards:
        sidecar = read_sidecar(plan.root, shard)
        if sidecar is None:
            raise ValueError(f"{plan.root}: the sidecar of {shard.name} vanished; run the shard step again")
        yield sidecar


def _sweep(root: Path) -> None:
    """Remove what killed workers left: every shard stands, so temporary files and claims serve nobody."""
    files.sweep(root / WORK)
    for claim in (root / WORK).glob(f"*{CLAIM}"):
        claim.unlink(missing_ok=True)
    files.sync(root / WORK)
