"""The two tables of a data set: how they are written, read piece by piece, and named by the digests of their values."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sat import files
from sat.shards.location import open_file, read_retrying
from sat.shards.retry import Result
from sat.shards.schema import (
    SAMPLES_SCHEMA,
    SHARDS,
    SHARDS_PER_GROUP,
    SHARDS_SCHEMA,
    ShardInfo,
    Sidecar,
    place_of_rows,
    sample_table,
)

KEPT_GROUPS = 64
"""Decoded row groups of shards.parquet kept in memory."""


KEPT_INFOS = 16_384
"""Rows of shards.parquet kept in memory, at most 10 MB."""


class ShardTable(Sequence[ShardInfo]):
    """The rows of `shards.parquet`: samples and splits in memory, the rest decoded by the row group when asked for.

    A folder's table was hashed before and is not checked again: a wrong name, size or digest fails where it is used.
    """

    def __init__(self, root: str, blob: bytes = b""):
        """blob: the bytes of the table; without them it is read from the folder `root`."""
        self.root, self.blob = root, blob
        self._groups: dict[int, pa.Table] = {}
        self._info = lru_cache(maxsize=KEPT_INFOS)(self._find_info)  # finding one takes 30 us
        self._metadata: Any = None  # pq.FileMetaData
        self._metadata = self._parquet(lambda table: table.metadata)
        self.samples, self._splits = self._parquet(_samples_and_splits)
        """Samples of each shard, int64 [number of shards]; indices of the shards of each split."""

    def __reduce__(self) -> tuple[type["ShardTable"], tuple[str, bytes]]:
        return ShardTable, (self.root, self.blob)

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in the order of the shards."""
        return list(self._splits)

    def of_split(self, split: str) -> range:
        """Indices of the shards of one split; empty when there is none."""
        return self._splits.get(split, range(0))

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...

    @overload
    def __getitem__(self, index: slice) -> list[ShardInfo]: ...

    def __getitem__(self, index: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(index, slice):
            return [self._info(each) for each in range(len(self))[index]]
        return self._info(range(len(self))[index])

    def __iter__(self) -> Iterator[ShardInfo]:
        return (self[index] for index in range(len(self)))

    def _find_info(self, index: int) -> ShardInfo:
        number, row = divmod(index, self._metadata.row_group(0).num_rows)
        group = self._groups.get(number)
        if group is None:
            group = self._parquet(lambda table: table.read_row_group(number, use_threads=False))
            if len(self._groups) >= KEPT_GROUPS:
                self._groups.pop(next(iter(self._groups)))
            self._groups[number] = group
        values = {name: group[name][row].as_py() for name in SHARDS_SCHEMA.names}
        return ShardInfo(**{**values, "sha256": values["sha256"].hex(), "rows_sha256": values["rows_sha256"].hex()})

    def _parquet(self, read: Callable[[pq.ParquetFile], Result]) -> Result:
        def attempt() -> Result:
            with pa.BufferReader(self.blob) if self.blob else open_file(self.root, SHARDS) as file:
                # no pre_buffer, and never use_threads: their threads can abort a short process at its end
                return read(pq.ParquetFile(file, metadata=self._metadata, pre_buffer=False))

        return read_retrying(self.root, SHARDS, attempt)


def _samples_and_splits(table: pq.ParquetFile) -> tuple[npt.NDArray[np.int64], dict[str, range]]:
    """Samples of each shard, and the indices of each split's shards; the column of the splits is never held whole."""
    samples = np.empty(table.metadata.num_rows, dtype=np.int64)
    splits: dict[str, range] = {}
    done = 0
    for group in range(table.num_row_groups):
        rows = table.read_row_group(group, ["split", "samples"], use_threads=False)
        samples[done : done + rows.num_rows] = rows["samples"].combine_chunks().to_numpy()
        for each in rows["split"].value_counts().to_pylist():
            begin = splits[each["values"]].start if each["values"] in splits else done
            done += each["counts"]
            splits[each["values"]] = range(begin, done)
    return samples, splits


def read_rows(root: str, name: str, sha256: str, group: int) -> pa.Table:
    """One row group of a table of samples, unchecked. `sha256`, of the whole table, tells rewritten tables apart."""
    metadata = _parquet_metadata(root, name, sha256)
    with open_file(root, name) as file:
        return pq.ParquetFile(file, metadata=metadata, pre_buffer=False).read_row_group(group, use_threads=False)


@lru_cache(maxsize=8)
def _parquet_metadata(root: str, name: str, sha256: str) -> pq.FileMetaData:
    """Footer of a table of samples, kept for a while."""
    with open_file(root, name) as file:
        return pq.read_metadata(file)


def forget_footers() -> None:
    """Read the footers anew: one of them may be what is damaged."""
    _parquet_metadata.cache_clear()


# ------------------------------------------------------------------ writing


def write_table(
    path: Path, schema: pa.Schema, tables: Iterable[pa.Table], *, rows_per_group: int = 0, folder: Path | None = None
) -> None:
    """Write a Parquet file, whole or not at all; one row group per table, or (with `rows_per_group`) of so many rows.

    `folder` takes the temporary file. The same values give the same bytes.
    """
    with (
        files.replacing(path, folder) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_statistics=False) as writer,
    ):
        for table in tables:
            writer.write_table(table, row_group_size=rows_per_group or max(table.num_rows, 1))


def write_sample_tables(root: Path, sidecars: Iterable[Sidecar], folder: Path | None = None) -> pa.Table:
    """Write the tables of samples, one row group per shard that has samples; returns the table of those shards.

    One sidecar at a time is in memory.
    """
    infos: list[dict[str, Any]] = []

    def row_groups() -> Iterator[pa.Table]:
        for sidecar in sidecars:
            if sidecar.samples:
                rows = sample_table(sidecar.rows)
                digests = {"sha256": bytes.fromhex(sidecar.sha256), "rows_sha256": rows_digest(rows)}
                sizes = {"samples": sidecar.samples, "bytes": sidecar.bytes}
                infos.append({"name": sidecar.shard, "split": sidecar.split} | sizes | digests)
                yield rows

    def rest_of_table(name: str) -> Iterator[pa.Table]:
        while place_of_rows(len(infos))[0] == name and (rows := next(groups, None)) is not None:
            yield rows

    groups = row_groups()
    for first in groups:
        name, _ = place_of_rows(len(infos) - 1)
        write_table(root / name, SAMPLES_SCHEMA, chain([first], rest_of_table(name)), folder=folder)
    return pa.Table.from_pylist(infos, SHARDS_SCHEMA)


def write_shard_table(root: Path, shards: pa.Table, folder: Path | None = None) -> None:
    """Write `shards.parquet`."""
    write_table(root / SHARDS, SHARDS_SCHEMA, [shards], rows_per_group=SHARDS_PER_GROUP, folder=folder)


# ------------------------------------------------------------------ digests of values


def rows_digest(rows: pa.Table) -> bytes:
    """sha256 of the values of sample rows, the same for every version of the Parquet library. ValueError for nulls."""
    digest = hashlib.sha256()
    for name in SAMPLES_SCHEMA.names:
        column = rows[name].combine_chunks()
        if pa.types.is_list(column.type):
            digest.update(pc.list_value_length(column).to_numpy().astype("<i8").tobytes())
            column = column.flatten()
        if column.null_count:
            raise ValueError(f"column {name} has no value in {column.null_count} places")
        if pa.types.is_string(column.type):
            for part in _string_parts(column) if len(column) else ():
                digest.update(part)
        else:
            values = column.to_numpy(zero_copy_only=False)
            digest.update(values.astype(values.dtype.newbyteorder("<")))
    return digest.digest()


def _string_parts(column: pa.StringArray) -> tuple[Any, Any]:
    """Lengths in bytes of the strings, int64, and their bytes, read where they lie: that halves the time."""
    _, ends, blob = column.buffers()
    ends = np.frombuffer(ends, np.int32)[column.offset : column.offset + len(column) + 1]
    return np.diff(ends).astype("<i8"), blob[ends[0] : ends[-1]] if ends[-1] > ends[0] else b""


def shards_digest_parts(shards: pa.Table) -> Iterator[bytes]:
    """The values of the table of shards as bytes, column by column."""
    for name in SHARDS_SCHEMA.names:
        column = shards[name].combine_chunks()
        if pa.types.is_int64(column.type):
            yield cast(bytes, column.to_numpy().astype("<i8").tobytes())
        else:  # values without their lengths are unambiguous: names have no newline, digests are 32 bytes
            yield b"\n".join(value.encode() if isinstance(value, str) else value for value in column.to_pylist())
