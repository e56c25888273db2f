"""The contract of a data set on disk: names of its files, columns of its tables, what a sample and a shard are there.

ROOT/manifest.json          sealed: kind, fingerprint, digest, sizes and sha256 of the files below
ROOT/shards.parquet         one row per shard, sorted by (split, name)
ROOT/samples.parquet        one row group per shard, in the order of shards.parquet; from the 257th shard on
                            samples-000001.parquet and so on, because a reader parses the whole footer of a table
ROOT/statistics.safetensors features only: mean, std and scale per channel
ROOT/SPLIT-000000.tar       plain WebDataset tar; a sample is its data member, then its .json member: what the row says
                            of the picture; of features also their `dtype` (bf16 is stored as uint16) and, of
                            int8, `scale_sha256`, of the scales per channel, which are in the statistics
ROOT/work                   preprocessing's own: the plan, and the sidecar of each shard
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

SCHEMA = 2
MANIFEST, SAMPLES, SHARDS, STATISTICS = "manifest.json", "samples.parquet", "shards.parquet", "statistics.safetensors"
SHARDS_PER_TABLE = 256
"""Row groups of each table of samples, whose footer then takes 5 ms and 2 MB. Another number needs another SCHEMA."""
SHARDS_PER_GROUP = 1000
"""Rows of each row group of shards.parquet, decoded together when one of them is needed."""

_SAMPLE_TABLE = re.compile(r"samples(-\d{6})?\.parquet")

SAMPLES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.string()),
        ("file_name", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("nbytes", pa.int64()),
        ("xxh3", pa.uint64()),
        ("captions", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("id_is_number", pa.bool_()),
    ]
)
SHARDS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("split", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
        ("rows_sha256", pa.binary(32)),
    ]
)


@dataclass(frozen=True)
class SampleRow:
    """A sample: what it is and where in its shard it lies. The fields are the columns of the table of samples."""

    key: str
    image_id: str
    file_name: str
    split: str
    shard: str
    """File name of the shard."""
    offset: int
    nbytes: int
    """Place of its members in the shard, headers and padding included."""
    xxh3: int
    """Checksum (XXH3, 64 bits) of those bytes."""
    captions: tuple[str, ...]
    width: int
    height: int
    """Of the picture file, in pixels."""
    id_is_number: bool
    """The annotations have the image id as a whole number, not as text: so have the sample's .json and the results."""


@dataclass(frozen=True)
class LeftOut:
    """A picture that is not in the data set: the reason names the rule (and is counted), the detail tells the case."""

    image_id: str
    file_name: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class ShardInfo:
    """One shard: file name, split, number of samples, size in bytes and hex digests of the file and of its rows."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    rows_sha256: str


@dataclass(frozen=True)
class Sidecar:
    """All that is known of a finished shard, in a file beside it; a shard without one does not exist."""

    shard: str
    """File name of the shard."""
    split: str
    fingerprint: str
    """Digest of the plan's fingerprint."""
    samples: int
    bytes: int
    """Size of the tar; 0 where all samples were left out, and there is no tar."""
    sha256: str
    rows: tuple[SampleRow, ...]
    left_out: tuple[LeftOut, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What its builder adds: sums for the statistics of features."""

    def to_document(self) -> dict[str, Any]:
        """The content of the file, as JSON knows it."""
        rows = [{**vars(row), "captions": list(row.captions)} for row in self.rows]
        left_out = [dict(vars(item)) for item in self.left_out]
        return {**vars(self), "rows": rows, "left_out": left_out, "extra": dict(self.extra)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Sidecar":
        """Inverse of `to_document`. TypeError or KeyError for another document."""
        rows = tuple(sample_rows(document["rows"]))
        left_out = tuple(LeftOut(**item) for item in document["left_out"])
        return cls(**{**document, "rows": rows, "left_out": left_out})


def sample_rows(rows: pa.Table | Iterable[Mapping[str, Any]]) -> list[SampleRow]:
    """The rows of a table of samples (or of its `to_pylist`) as values."""
    listed = rows.to_pylist() if isinstance(rows, pa.Table) else rows
    return [SampleRow(**{**row, "captions": tuple(row["captions"])}) for row in listed]


def sample_table(rows: Iterable[SampleRow]) -> pa.Table:
    """Inverse of `sample_rows`: a table of SAMPLES_SCHEMA."""
    return pa.Table.from_pylist([vars(row) for row in rows], SAMPLES_SCHEMA)


def is_sample_table(name: str) -> bool:
    """Whether a file has the name of a table of samples."""
    return _SAMPLE_TABLE.fullmatch(name) is not None


def place_of_rows(shard_index: int) -> tuple[str, int]:
    """Table and row group that hold the rows of a shard."""
    table, group = divmod(shard_index, SHARDS_PER_TABLE)
    return f"samples-{table:06d}.parquet" if table else SAMPLES, group
