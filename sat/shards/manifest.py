"""The contract of a data set on disk: shards of samples, two tables that describe them, `manifest.json` written last.

    ROOT/manifest.json          sealed: kind, fingerprint, digest, sizes and sha256 of the files below
    ROOT/shards.parquet         one row per shard, sorted by (split, name)
    ROOT/samples.parquet        one row group per shard, in the order of shards.parquet; from the 257th shard on
                                samples-000001.parquet and so on, because a reader parses the whole footer of a table
    ROOT/statistics.safetensors features only: mean, std and scale per channel
    ROOT/SPLIT-000000.tar       plain WebDataset tar; a sample is its data member, then its .json member

The surprising decision: opening costs nothing per sample and 8 bytes per shard. `shards.parquet` is hashed whole when
it is opened, but only the numbers of samples are kept; it carries the digest of each shard's rows, so a row group of
`samples.parquet` is checked when it is read.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sat.shards.retry import Result, StillFailing, io_error, remote_error, retrying

logger = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST, SAMPLES, SHARDS, STATISTICS = "manifest.json", "samples.parquet", "shards.parquet", "statistics.safetensors"
TAR_BLOCK = 512
SHARDS_PER_TABLE = 256
"""Row groups of each table of samples, whose footer then takes 5 ms and 2 MB. Another number needs another SCHEMA."""
SHARDS_PER_GROUP = 1000
"""Rows of each row group of shards.parquet, decoded together when one of them is needed."""
KEPT_GROUPS = 64
NPY_HEADER = 128
"""Bytes of the npy header before a grid: the payload of a feature sample begins at offset + TAR_BLOCK + NPY_HEADER."""

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


class Damaged(ValueError):
    """A file that is not as it was written; over a network it is asked for again, because an answer can be cut."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard: file name, split, number of samples, size in bytes and hex digests of the file and of its rows."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    rows_sha256: str


class ShardTable(Sequence[ShardInfo]):
    """The rows of `shards.parquet`: samples and splits in memory, the rest decoded by the row group when asked for.

    A folder's table was hashed before and is not checked again: a wrong name, size or digest fails where it is used.
    """

    def __init__(self, root: str, blob: bytes = b""):
        """blob: the bytes of the table; without them it is read from the folder `root`."""
        self.root, self.blob = root, blob
        self._groups: dict[int, pa.Table] = {}
        self._metadata = None
        self._metadata = self._parquet(lambda table: table.metadata)
        self.samples, self._splits = self._parquet(_samples_and_splits)
        """Samples of each shard, int64 [number of shards]; indices of the shards of each split."""

    def __reduce__(self):
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

    def __getitem__(self, index: int) -> ShardInfo:
        number, row = divmod(range(len(self))[index], self._metadata.row_group(0).num_rows)
        group = self._groups.get(number)
        if group is None:
            group = self._parquet(lambda table: table.read_row_group(number, use_threads=False))
            if len(self._groups) >= KEPT_GROUPS:
                self._groups.pop(next(iter(self._groups)))
            self._groups[number] = group
        values = {name: group[name][row].as_py() for name in SHARDS_SCHEMA.names}
        return ShardInfo(**{**values, "sha256": values["sha256"].hex(), "rows_sha256": values["rows_sha256"].hex()})

    def __iter__(self) -> Iterator[ShardInfo]:
        return (self[index] for index in range(len(self)))

    def _parquet(self, read: Callable[[pq.ParquetFile], Result]) -> Result:
        def attempt() -> Result:
            with pa.BufferReader(self.blob) if self.blob else open_file(self.root, SHARDS) as file:
                # no pre_buffer, and never use_threads: their threads can abort a short process at its end
                return read(pq.ParquetFile(file, metadata=self._metadata, pre_buffer=False))

        return _retrying(self.root, SHARDS, attempt)


@dataclass(frozen=True)
class Manifest:
    """A finished data set. Made by `load_manifest`; picklable, holds no open file."""

    root: str
    """Folder or fsspec URL."""
    kind: str
    """`images` or `features`."""
    fingerprint: dict
    """Everything that shaped the bytes; features: grid, dim, dtype, encoder, transform, source ..."""
    digest: str
    """Names this data set: sha256 over the fingerprint and the digests of both tables."""
    shards: ShardTable
    """Sorted by (split, name)."""
    files: dict
    """Size and sha256 of each table and of the statistics, by file name."""
    left_out: dict
    """Number of pictures left out, by reason."""

    @property
    def splits(self) -> dict[str, int]:
        """Samples of each split."""
        ranges = {name: self.shards.of_split(name) for name in sorted(self.shards.splits)}
        return {name: int(self.shards.samples[r.start : r.stop].sum()) for name, r in ranges.items()}

    def rows(self, shard_index: int) -> pa.Table:
        """Rows of one shard, columns as in `SAMPLES_SCHEMA`, in the order of the tar; checked against their digest.

        Raises ValueError naming the shard when the rows are not those that were written.
        """
        shard, (name, group) = self.shards[shard_index], place_of_rows(shard_index)
        try:
            metadata = _parquet_metadata(self.root, name, self.files[name]["sha256"])
            with open_file(self.root, name) as file:
                rows = pq.ParquetFile(file, metadata=metadata, pre_buffer=False).read_row_group(
                    group, use_threads=False
                )
            damaged = rows.schema != SAMPLES_SCHEMA or rows_digest(rows).hex() != shard.rows_sha256
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            if not io_error(error):
                _parquet_metadata.cache_clear()  # the footer may be what is damaged
            raise ValueError(f"{self.root}/{name}: the rows of {shard.name} cannot be read: {error}") from error
        if damaged:
            _parquet_metadata.cache_clear()
            raise ValueError(
                f"{self.root}/{name}: the rows of {shard.name} are not those that were written; "
                "run preprocessing.verify_shards with --repair"
            )
        return rows


def load_manifest(root: str | os.PathLike) -> Manifest:
    """Open a finished data set in a folder or at an fsspec URL.

    Raises ValueError when there is no `manifest.json` (not a finished data set) or when a file of the contract is
    damaged.
    """
    root = os.fspath(root).rstrip("/").removeprefix("file://")
    check_root(root)
    try:
        document = _retrying(root, MANIFEST, lambda: unseal(read_file(root, MANIFEST)))
    except FileNotFoundError:
        raise ValueError(f"{root}: not a finished data set (no {MANIFEST}); finish its preprocessing first") from None
    except Damaged as error:
        raise ValueError(
            f"{root}/{MANIFEST}: damaged ({error}); run preprocessing.verify_shards with --repair"
        ) from None
    if document["schema"] != SCHEMA:
        raise ValueError(f"{root}/{MANIFEST}: schema {document['schema']}, this program reads {SCHEMA}")
    shards = ShardTable(root, _read_recorded(root, SHARDS, document["files"], keep="://" in root))
    fields = {name: document[name] for name in ("kind", "fingerprint", "digest", "files", "left_out")}
    return Manifest(root=root, shards=shards, **fields)


def load_statistics(manifest: Manifest) -> dict[str, np.ndarray]:
    """float32 [D] arrays `mean` and `std` (over the training split) and `scale` (ones unless int8) of a feature set.

    A stored value times `scale` is the feature. Raises ValueError for image shards and for a damaged file.
    """
    from safetensors.numpy import load

    if manifest.kind != "features":
        raise ValueError(f"{manifest.root} holds {manifest.kind}; only feature shards have statistics")
    return load(_read_recorded(manifest.root, STATISTICS, manifest.files))


def check_files(manifest: Manifest) -> None:
    """Compare the size of every table and shard with the manifest; ValueError naming those that are missing or cut."""
    faults = []
    tables = ((name, record["bytes"]) for name, record in sorted(manifest.files.items()))
    for name, expected in chain(tables, ((shard.name, shard.bytes) for shard in manifest.shards)):
        size = file_size(manifest.root, name)
        if size != expected:
            found = "missing" if size is None else f"{size} bytes"
            faults.append(f"{name}: {found}, {expected} bytes were written")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"{manifest.root}: {'; '.join(faults[:5])}{more}; run preprocessing.verify_shards with --repair"
        )


def seal(document: dict) -> bytes:
    """Canonical JSON of the document with its own sha256 inside: any change of the file can be seen."""
    checksum = hashlib.sha256(_canonical(document)).hexdigest()
    return _canonical({**document, "checksum": checksum})


def unseal(blob: bytes) -> dict:
    """The document in a sealed file; Damaged (a ValueError) when one bit differs from what `seal` wrote."""
    try:
        document = json.loads(blob)
    except ValueError as error:
        raise Damaged(str(error)) from None
    if not isinstance(document, dict) or "checksum" not in document:
        raise Damaged("it has no checksum")
    document.pop("checksum")
    if seal(document) != blob:
        raise Damaged("its checksum does not fit")
    return document


def rows_digest(rows: pa.Table) -> bytes:
    """sha256 of the values of sample rows, the same for every version of the Parquet library."""
    digest = hashlib.sha256()
    for name in SAMPLES_SCHEMA.names:
        column = rows[name].combine_chunks()
        if pa.types.is_list(column.type):
            digest.update(pc.list_value_length(column).to_numpy().astype("<i8").tobytes())
            column = column.flatten()
        if pa.types.is_string(column.type):
            digest.update(pc.binary_length(column).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            digest.update("".join(column.to_pylist()).encode())
        else:
            values = column.to_numpy()
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.digest()


def dataset_digest(kind: str, fingerprint: dict, shards: pa.Table) -> str:
    """The name of a data set: sha256 over its fingerprint and the values of both tables (through `rows_sha256`)."""
    digest = hashlib.sha256(_canonical({"schema": SCHEMA, "kind": kind, "fingerprint": fingerprint}))
    for name in SHARDS_SCHEMA.names:
        column = shards[name].combine_chunks()
        if pa.types.is_int64(column.type):
            digest.update(column.to_numpy().astype("<i8").tobytes())
        else:  # values without their lengths are unambiguous: names have no newline, digests are 32 bytes
            values = [value.encode() if isinstance(value, str) else value for value in column.to_pylist()]
            digest.update(b"\n".join(values))
    return digest.hexdigest()


def place_of_rows(shard_index: int) -> tuple[str, int]:
    """Table and row group that hold the rows of a shard."""
    table, group = divmod(shard_index, SHARDS_PER_TABLE)
    return f"samples-{table:06d}.parquet" if table else SAMPLES, group


def check_root(root: str) -> None:
    """ValueError for a URL that fsspec cannot open, and for one that some readers of shards would hand to a shell."""
    if root.startswith("pipe:"):
        raise ValueError(f"{root!r}: pipe: URLs run a shell command and are refused; give a folder or an fsspec URL")
    for protocol in root.partition("://")[0].split("::") if "://" in root else ():
        try:
            fsspec.get_filesystem_class(protocol)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{root}: {error}; give a folder or a URL that fsspec opens here") from None


def open_file(root: str, name: str) -> BinaryIO:
    """Open ROOT/NAME for reading in binary; ROOT is a folder or an fsspec URL."""
    if "://" in root:
        return fsspec.open(f"{root}/{name}", "rb").open()
    return open(os.path.join(root, name), "rb")


def read_file(root: str, name: str) -> bytes:
    """All bytes of ROOT/NAME."""
    with open_file(root, name) as file:
        return file.read()


def file_size(root: str, name: str) -> int | None:
    """Size of ROOT/NAME in bytes, None when it does not exist. Tried again as reading is."""

    def size() -> int:
        if "://" in root:
            filesystem, path = fsspec.core.url_to_fs(f"{root}/{name}")
            return filesystem.size(path)
        return os.stat(os.path.join(root, name)).st_size

    try:
        return _retrying(root, name, size)
    except FileNotFoundError:
        return None


def _canonical(document: dict) -> bytes:
    return (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _read_recorded(root: str, name: str, files: dict, keep: bool = True) -> bytes:
    """A file whose sha256 stands in the manifest (none of it unless `keep`); ValueError if it is missing or another."""

    def read() -> bytes:
        with open_file(root, name) as file:
            blob = file.read() if keep else b""
            digest = hashlib.sha256(blob) if keep else hashlib.file_digest(file, "sha256")
        if digest.hexdigest() != files[name]["sha256"]:
            raise Damaged(
                f"{root}/{name}: not the bytes that were written; run preprocessing.verify_shards with --repair"
            )
        return blob

    try:
        return _retrying(root, name, read)
    except FileNotFoundError:
        raise ValueError(f"{root}/{name} is missing; run preprocessing.verify_shards with --repair") from None


def _retrying(root: str, name: str, operation: Callable[[], Result]) -> Result:
    """Result of reading ROOT/NAME. Damage over a network is tried again too; in the end it is still Damaged."""

    def is_transient(error: Exception) -> object:
        return (isinstance(error, Damaged) or remote_error(error)) if "://" in root else io_error(error)

    def report() -> None:
        logger.warning("%s/%s: reading failed and is tried again", root, name)

    try:
        return retrying(operation, f"{root}/{name}", report, is_transient)
    except StillFailing as error:
        raise error.__cause__ if isinstance(error.__cause__, Damaged) else error


def _samples_and_splits(table: pq.ParquetFile) -> tuple[np.ndarray, dict[str, range]]:
    """Samples of each shard, and the indices of each split's shards; the column of the splits is never held whole."""
    samples, splits, done = np.empty(table.metadata.num_rows, dtype=np.int64), {}, 0
    for group in range(table.num_row_groups):
        rows = table.read_row_group(group, ["split", "samples"], use_threads=False)
        samples[done : done + rows.num_rows] = rows["samples"].combine_chunks().to_numpy()
        for each in rows["split"].value_counts().to_pylist():
            begin = splits[each["values"]].start if each["values"] in splits else done
            done += each["counts"]
            splits[each["values"]] = range(begin, done)
    return samples, splits


@lru_cache(maxsize=8)
def _parquet_metadata(root: str, name: str, sha256: str) -> pq.FileMetaData:
    """Footer of a table of samples, kept for a while; the digest in the key tells rewritten tables apart."""
    with open_file(root, name) as file:
        return pq.read_metadata(file)
