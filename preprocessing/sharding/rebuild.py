"""A shard that is built again, held against what it was: fewer pictures or other bytes are refused, not published.

The bytes of a shard name its data set, and a training goes on with that data set alone. The surprising decision: they
are compared sample by sample while the shard is built, so that the first picture that differs is named, and the shard
that stands is still there.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from preprocessing.sharding.write import Sample, members_of
from sat.shards.schema import LeftOut

ALLOW = "--allow-new-bytes"


@dataclass(frozen=True)
class Before:
    """What is known of a shard that is built again."""

    left_out: int
    """Pictures that were left out; more are refused."""
    samples: Mapping[str, int] = field(default_factory=dict)
    """Checksum of each sample's bytes (XXH3, 64 bits) by key; empty: they are not known, or may be others."""
    made_on: str = ""
    """The machine that computed them."""


def as_before(
    samples: Iterator[Sample | LeftOut],
    before: Mapping[str, Before] | None,
    path: Path,
    here: Callable[[], str] = str,
) -> Iterator[Sample | LeftOut]:
    """The samples of the shard `path`; ValueError naming it for one that `before`, by shard, does not allow.

    `before` is None for a shard that is not built again. `here` says on what it is built now.
    """
    known = Before(0) if before is None else before.get(path.name, Before(0))
    bad, limit = 0, math.inf if before is None else known.left_out
    for sample in samples:
        if isinstance(sample, LeftOut):
            bad += 1
            if bad > limit:
                what = f"{sample.file_name} would be left out ({sample.reason})"
                raise ValueError(f"{path}: {what}; before, {limit} were")
        elif known.samples and known.samples.get(sample.record.key) != xxhash.xxh3_64_intdigest(members_of(sample)):
            raise _other_bytes(sample, path, known, here())
        yield sample


def _other_bytes(sample: Sample, path: Path, known: Before, here: str) -> ValueError:
    where = f" (they were made on {known.made_on}; this is {here})" if known.made_on else ""
    return ValueError(
        f"{path}: key {sample.record.key} ({sample.record.file_name}) comes out with other bytes than were recorded"
        f"{where}; nothing was changed there: repair it where the recorded bytes come out, or take what comes out here "
        f"with {ALLOW}: the data set is then another one, which no training that has begun goes on with"
    )
