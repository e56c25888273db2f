"""The contract of a data set on disk: shards of samples, two tables that describe them, `manifest.json` written last.

    ROOT/manifest.json          sealed: kind, fingerprint, digest, sizes and sha256 of the files below
    ROOT/shards.parquet         one row per shard, sorted by (split, name)
    ROOT/samples.parquet        one row group per shard, in the order of shards.parquet
    ROOT/statistics.safetensors features only: mean, std and scale per channel
    ROOT/SPLIT-000000.tar       plain WebDataset tar; a sample is its data member, then its .json member

The surprising decision: opening costs nothing per sample. `shards.parquet` is hashed whole when it is opened and
carries the digest of each shard's rows, so a row group of `samples.parquet` is checked when it is read, however long
the table.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sat.data.retry import Result, StillFailing, io_error, remote_error, retrying

logger = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST, SAMPLES, SHARDS, STATISTICS = "manifest.json", "samples.parquet", "shards.parquet", "statistics.safetensors"
TAR_BLOCK = 512
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
    """The rows of `shards.parquet`, made into `ShardInfo` one at a time: a million shards stay a few arrays."""

    def __init__(self, table: pa.Table):
        self.table = table

    @property
    def samples(self) -> np.ndarray:
        """Samples of each shard, int64 [number of shards]."""
        return self.table["samples"].to_numpy()

    def of_split(self, split: str) -> range:
        """Indices of the shards of one split; empty when there is none."""
        found = np.flatnonzero(pc.equal(self.table["split"], split).to_numpy())
        return range(int(found[0]), int(found[-1]) + 1) if len(found) else range(0)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> ShardInfo:
        row = {name: self.table[name][index].as_py() for name in SHARDS_SCHEMA.names}
        return ShardInfo(**{**row, "sha256": row["sha256"].hex(), "rows_sha256": row["rows_sha256"].hex()})

    def __iter__(self) -> Iterator[ShardInfo]:
        return (self[index] for index in range(len(self)))


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
        counts, ranges = self.shards.samples, {}
        for name in sorted(pc.unique(self.shards.table["split"]).to_pylist()):
            ranges[name] = self.shards.of_split(name)
        return {name: int(counts[shards.start : shards.stop].sum()) for name, shards in ranges.items()}

    def rows(self, shard_index: int) -> pa.Table:
        """Rows of one shard, columns as in `SAMPLES_SCHEMA`, in the order of the tar; checked against their digest.

        Raises ValueError naming the shard when the rows are not those that were written.
        """
        shard = self.shards[shard_index]
        try:
            metadata = _parquet_metadata(self.root, self.files[SAMPLES]["sha256"])
            with open_file(self.root, SAMPLES) as file:
                rows = pq.ParquetFile(file, metadata=metadata, pre_buffer=False).read_row_group(
                    shard_index, use_threads=False
                )
            damaged = rows.schema != SAMPLES_SCHEMA or rows_digest(rows).hex() != shard.rows_sha256
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            _parquet_metadata.cache_clear()  # the footer may be what is damaged
            raise ValueError(f"{self.root}/{SAMPLES}: the rows of {shard.name} cannot be read: {error}") from error
        if damaged:
            _parquet_metadata.cache_clear()
            raise ValueError(
                f"{self.root}/{SAMPLES}: the rows of {shard.name} are not those that were written; "
                "run preprocessing.verify_shards with --repair"
            )
        return rows


def load_manifest(root: str | os.PathLike) -> Manifest:
    """Open a finished data set in a folder or at an fsspec URL.

    Raises ValueError when there is no `manifest.json` (not a finished data set) or when a file of the contract is
    damaged.
    """
    root = os.fspath(root).rstrip("/")
    check_root(root)
    try:
        document = _read_checked(root, MANIFEST, unseal)
    except FileNotFoundError:
        raise ValueError(f"{root}: not a finished data set (no {MANIFEST}); finish its preprocessing first") from None
    except Damaged as error:
        raise ValueError(
            f"{root}/{MANIFEST}: damaged ({error}); run preprocessing.verify_shards with --repair"
        ) from None
    if document["schema"] != SCHEMA:
        raise ValueError(f"{root}/{MANIFEST}: schema {document['schema']}, this program reads {SCHEMA}")
    blob = _read_recorded(root, SHARDS, document["files"])
    # not pq.read_table, and no pre_buffer: their threads can abort a short process at its end
    shards = ShardTable(pq.ParquetFile(pa.BufferReader(blob), pre_buffer=False).read(use_threads=False))
    size = file_size(root, SAMPLES)
    if size != document["files"][SAMPLES]["bytes"]:
        raise ValueError(f"{root}/{SAMPLES}: {size} bytes, {document['files'][SAMPLES]['bytes']} were written")
    digest = dataset_digest(document["kind"], document["fingerprint"], shards.table)
    assert digest == document["digest"], f"{root}: the digest was computed in another way when it was written"
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
    """Compare the size of every shard with the manifest; ValueError naming those that are missing or cut."""
    faults = []
    for shard in manifest.shards:
        size = file_size(manifest.root, shard.name)
        if size != shard.bytes:
            found = "missing" if size is None else f"{size} bytes"
            faults.append(f"{shard.name}: {found}, {shard.bytes} bytes were written")
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


def _read_recorded(root: str, name: str, files: dict) -> bytes:
    """A file whose sha256 stands in the manifest; ValueError when it is missing or another."""

    def check(blob: bytes) -> bytes:
        if hashlib.sha256(blob).hexdigest() != files[name]["sha256"]:
            raise Damaged(
                f"{root}/{name}: not the bytes that were written; run preprocessing.verify_shards with --repair"
            )
        return blob

    try:
        return _read_checked(root, name, check)
    except FileNotFoundError:
        raise ValueError(f"{root}/{name} is missing; run preprocessing.verify_shards with --repair") from None


def _read_checked(root: str, name: str, check: Callable[[bytes], Result]) -> Result:
    """`check` of the bytes of ROOT/NAME, which raises Damaged for other bytes than were written."""
    try:
        return _retrying(root, name, lambda: check(read_file(root, name)))
    except StillFailing as error:
        raise error.__cause__ if isinstance(error.__cause__, Damaged) else error


def _retrying(root: str, name: str, operation: Callable[[], Result]) -> Result:
    def is_transient(error: Exception) -> object:
        return (isinstance(error, Damaged) or remote_error(error)) if "://" in root else io_error(error)

    def report() -> None:
        logger.warning("%s/%s: reading failed and is tried again", root, name)

    return retrying(operation, f"{root}/{name}", report, is_transient)


@lru_cache(maxsize=16)
def _parquet_metadata(root: str, sha256: str) -> pq.FileMetaData:
    """Footer of samples.parquet, parsed once per process; the digest in the key tells rewritten tables apart."""
    with open_file(root, SAMPLES) as file:
        return pq.read_metadata(file)
