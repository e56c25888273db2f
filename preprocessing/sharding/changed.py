"""Files that changed after they were packed, though their size did not: a plan of names and sizes does not see them.

A sidecar has the time of each file that its shard was made from. When the plan is made again, a file of another time is
packed once more, in memory, and its bytes are held against those in the shard; what differs is told, or with
`overwrite` packed anew. The surprising decision: a file's time is compared with nothing but itself, for equality, so
that no clock matters; and it only says where to look, so that a copied folder is the same folder.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from preprocessing.sharding.ownership import withdraw_shards
from preprocessing.sharding.plan import ImageRecord, Plan, PlannedShard
from preprocessing.sharding.write import Sample, members_of, read_sidecar
from sat.shards.schema import LeftOut, Sidecar

FILE_TIMES = "file_times"
"""The entry of a sidecar's `extra`: by a record's key when its file last changed, in nanoseconds; of two the sum."""
LOOK_UPS = 16
"""Under way at once: each is a round trip on a network file system."""

Pack = Callable[[ImageRecord], Sample | LeftOut]
"""What becomes of a record now. Raises FileNotFoundError for a file that is gone."""
FilesOf = Callable[[ImageRecord], Sequence[Path]]
"""What a record is packed from."""


class FileTimes:
    """The times of the files of one shard, taken before each is read."""

    def __init__(self) -> None:
        self.by_key: dict[str, int] = {}

    def take(self, record: ImageRecord, paths: Sequence[Path]) -> None:
        """Note the time of a record's files, if they are there."""
        time = _time_of(paths)
        if time is not None:
            self.by_key[record.key] = time

    def extra(self) -> dict[str, Any]:
        """For the sidecar."""
        return {FILE_TIMES: self.by_key}


def settle_changed(plan: Plan, pack: Pack, files_of: FilesOf, overwrite: bool) -> None:
    """Look for files of a published plan that changed after they were packed, and withdraw their shards if `overwrite`.

    Raises ValueError, naming one, where there are some and they are not to be packed again.
    """
    with ThreadPoolExecutor(LOOK_UPS) as pool:
        found = list(_changed(plan, pack, files_of, pool))
    if not found:
        return
    names = [record.file_name for _, records in found for record in records]
    if not overwrite:
        raise ValueError(
            f"{plan.root}: {len(names)} of {plan.samples} files are not those that were packed, though of their size, "
            f"e.g. {names[0]}; pack their shards again with --overwrite"
        )
    withdraw_shards(plan, [shard for shard, _ in found])


def times_if_packed(
    records: Iterable[ImageRecord], checksums: Mapping[str, int], pack: Pack, files_of: FilesOf
) -> FileTimes:
    """The times of those files that still are what was packed; `checksums` of the samples by key, as in their rows."""
    times, kept = FileTimes(), FileTimes()
    for record in records:
        with suppress(ValueError, OSError):  # it is of another size by now, or cannot be read
            times.take(record, files_of(record))
            if record.key in times.by_key and not _differs(record, checksums, pack):
                kept.by_key[record.key] = times.by_key[record.key]
    return kept


def _changed(
    plan: Plan, pack: Pack, files_of: FilesOf, pool: Executor
) -> Iterator[tuple[PlannedShard, list[ImageRecord]]]:
    """Every shard that has such files, with their records."""
    for shard in plan.shards:
        sidecar = _sidecar_of(plan, shard)
        if sidecar is None:
            continue
        known, records = sidecar.extra.get(FILE_TIMES, {}), plan.records(shard)
        times = pool.map(lambda record: _time_of(files_of(record)), records)
        other = [each for each, time in zip(records, times, strict=True) if time not in (None, known.get(each.key))]
        checksums = {row.key: row.xxh3 for row in sidecar.rows}
        if changed := [record for record in other if _differs(record, checksums, pack)]:
            yield shard, changed


def _differs(record: ImageRecord, checksums: Mapping[str, int], pack: Pack) -> bool:
    """Whether packing a record gives another sample than the shard has, or one where it has none; not if it is gone."""
    try:
        now = pack(record)
    except (FileNotFoundError, NotADirectoryError):
        return False
    checksum = None if isinstance(now, LeftOut) else xxhash.xxh3_64_intdigest(members_of(now))
    return checksum != checksums.get(record.key)


def _sidecar_of(plan: Plan, shard: PlannedShard) -> Sidecar | None:
    """The sidecar of a shard of this plan; None for one that is not there, or damaged."""
    try:
        sidecar = read_sidecar(plan.root, shard)
    except ValueError:
        return None
    return sidecar if sidecar is not None and sidecar.fingerprint == plan.digest else None


def _time_of(paths: Sequence[Path]) -> int | None:
    """When a file last changed, in nanoseconds, of several the sum; None where one is gone."""
    try:
        return sum(path.stat().st_mtime_ns for path in paths)
    except (FileNotFoundError, NotADirectoryError):
        return None
