"""Annotated records become the shards of a plan, by one rule, whether pictures or features from elsewhere are packed.

The surprising decision: the order inside the shards is random once and for ever (by a hash of seed and image id), so
that later readers may read sequential runs and still see mixed samples.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from preprocessing.sharding.finalize import reasons_of
from preprocessing.sharding.plan import ImageRecord, PlannedShard, records_digest
from sat import files
from sat.shards.schema import LeftOut


def plan_records(
    records: Sequence[ImageRecord], shard_size: int, seed: int
) -> tuple[tuple[PlannedShard, ...], list[list[ImageRecord]], str]:
    """Shards of at most `shard_size` records, in their order, the records of each, and a digest of it all.

    Raises ValueError for a size below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard size {shard_size}: expected at least 1")
    shards, groups = [], []
    for split, number, group in _groups(records, shard_size, seed):
        shards.append(PlannedShard(f"{split}-{number:06d}.tar", split, len(group), records_digest(group)))
        groups.append(group)
    return tuple(shards), groups, files.sha256_of("".join(shard.name + shard.rows_sha256 for shard in shards))


def _groups(records: Sequence[ImageRecord], shard_size: int, seed: int) -> Iterator[tuple[str, int, list[ImageRecord]]]:
    """(split, number, records) of every shard, in the order of the shards."""
    by_split = defaultdict(list)
    for record in records:
        by_split[record.split].append(record)
    for split, members in sorted(by_split.items()):
        members.sort(key=lambda r: (xxhash.xxh3_64_intdigest(f"{seed}/{r.image_id}".encode()), r.image_id))
        for number, start in enumerate(range(0, len(members), shard_size)):
            yield split, number, members[start : start + shard_size]


def check_left_out(kept: int, left_out: Sequence[LeftOut], where: Path, max_bad_fraction: float) -> None:
    """ValueError when nothing is kept, or more of the pictures looked for in `where` is left out than is allowed."""
    total = kept + len(left_out)
    if left_out and (not kept or len(left_out) > max_bad_fraction * total):
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons_of(left_out).items())
        first = left_out[0]
        raise ValueError(
            f"{len(left_out)} of {total} pictures have to be left out ({counts}), "
            f"e.g. {first.file_name} ({first.reason}); looked below {where}; "
            f"--max-bad-fraction {max_bad_fraction} allows less"
        )
    if not kept:
        raise ValueError("the annotations list no picture")
