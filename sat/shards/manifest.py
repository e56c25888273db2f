"""A finished data set: `manifest.json`, written last, and what it vouches for. The files are those of `schema`.

The surprising decision: opening costs nothing per sample and 8 bytes per shard. `shards.parquet` is hashed whole when
it is opened, but only the numbers of samples are kept; it carries the digest of each shard's rows, so a row group of
`samples.parquet` is checked when it is read.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sat import files
from sat.shards.features import FeatureSpec
from sat.shards.location import REPAIR, check_root, file_size, is_url, read_file, read_recorded, read_retrying
from sat.shards.retry import io_error
from sat.shards.schema import MANIFEST, SAMPLES_SCHEMA, SCHEMA, SHARDS, STATISTICS, place_of_rows
from sat.shards.sealed import Damaged, canonical, seal, unseal
from sat.shards.tables import ShardTable, forget_footers, read_rows, rows_digest, shards_digest_parts


@dataclass(frozen=True)
class Manifest:
    """A finished data set. Made by `load_manifest`; picklable, holds no open file."""

    root: str
    """Folder or fsspec URL."""
    kind: str
    """`images` or `features`."""
    fingerprint: dict[str, Any]
    """Everything that shaped the bytes; of features `spec` is the typed view."""
    digest: str
    """Names this data set: sha256 over the fingerprint and the digests of both tables."""
    shards: ShardTable
    """Sorted by (split, name)."""
    files: dict[str, dict[str, Any]]
    """Size and sha256 of each table and of the statistics, by file name."""
    left_out: dict[str, int]
    """Number of pictures left out, by reason."""

    @property
    def spec(self) -> FeatureSpec | None:
        """What its features are, None for images. ValueError, naming the data set, for features unknown here."""
        if self.kind != "features":
            return None
        try:
            return FeatureSpec.from_fingerprint(self.fingerprint)
        except ValueError as error:
            raise ValueError(f"{self.root}: {error}") from None

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
            rows = read_rows(self.root, name, self.files[name]["sha256"], group)
            damaged = rows.schema != SAMPLES_SCHEMA or rows_digest(rows).hex() != shard.rows_sha256
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            if not io_error(error):
                forget_footers()
            raise ValueError(f"{self.root}/{name}: the rows of {shard.name} cannot be read: {error}") from error
        if damaged:
            forget_footers()
            raise ValueError(f"{self.root}/{name}: the rows of {shard.name} are not those that were written; {REPAIR}")
        return rows


def load_manifest(root: str | os.PathLike[str]) -> Manifest:
    """Open a finished data set in a folder or at an fsspec URL.

    Raises ValueError when there is no `manifest.json` (not a finished data set) or when a file of the contract is
    damaged.
    """
    root = os.fspath(root).rstrip("/").removeprefix("file://")
    check_root(root)
    try:
        document = read_retrying(root, MANIFEST, lambda: unseal(read_file(root, MANIFEST)))
    except FileNotFoundError:
        raise ValueError(f"{root}: not a finished data set (no {MANIFEST}); finish its preprocessing first") from None
    except Damaged as error:
        raise ValueError(f"{root}/{MANIFEST}: damaged ({error}); {REPAIR}") from None
    if document["schema"] != SCHEMA:
        raise ValueError(
            f"{root} was written by another version of this program (format {document['schema']}, this one reads "
            f"{SCHEMA}); make it again: run its preprocessing with --overwrite"
        )
    shards = ShardTable(root, read_recorded(root, SHARDS, document["files"][SHARDS]["sha256"], keep=is_url(root)))
    fields = {name: document[name] for name in ("kind", "fingerprint", "digest", "files", "left_out")}
    return Manifest(root=root, shards=shards, **fields)


def load_statistics(manifest: Manifest) -> dict[str, npt.NDArray[np.float32]]:
    """float32 [D] arrays `mean` and `std` (over the training split) and `scale` (ones unless int8) of a feature set.

    A stored value times `scale` is the feature. Raises ValueError for image shards and for a damaged file.
    """
    from safetensors.numpy import load

    if manifest.kind != "features":
        raise ValueError(f"{manifest.root} holds {manifest.kind}; only feature shards have statistics")
    statistics: dict[str, npt.NDArray[np.float32]] = load(
        read_recorded(manifest.root, STATISTICS, manifest.files[STATISTICS]["sha256"])
    )
    return statistics


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
        raise ValueError(f"{manifest.root}: {'; '.join(faults[:5])}{more}; {REPAIR}")


def write_manifest(
    root: Path,
    kind: str,
    fingerprint: Mapping[str, Any],
    shards: pa.Table,
    names: Iterable[str] = (),
    left_out: Mapping[str, int] | None = None,
    folder: Path | None = None,
) -> None:
    """Write `manifest.json`, which makes a data set of the shards and tables that stand in `root`.

    `names` are files beside the tables of samples and shards. `folder` takes the temporary file.
    """
    names = {SHARDS, *names, *(place_of_rows(index)[0] for index in range(len(shards)))}
    recorded = {name: {"bytes": (root / name).stat().st_size, "sha256": files.sha256(root / name)} for name in names}
    files.write_bytes(root / MANIFEST, manifest_bytes(kind, fingerprint, shards, recorded, left_out or {}), folder)


def manifest_bytes(
    kind: str,
    fingerprint: Mapping[str, Any],
    shards: pa.Table,
    files: Mapping[str, Mapping[str, Any]],
    left_out: Mapping[str, int],
) -> bytes:
    """The content of `manifest.json`: shards as `write_sample_tables` gives them, the others as in `Manifest`."""
    document = {"schema": SCHEMA, "kind": kind, "fingerprint": fingerprint, "files": files, "left_out": left_out}
    return seal(document | {"digest": dataset_digest(kind, fingerprint, shards)})


def dataset_digest(kind: str, fingerprint: Mapping[str, Any], shards: pa.Table) -> str:
    """The name of a data set: sha256 over its fingerprint and the values of both tables (through `rows_sha256`)."""
    digest = hashlib.sha256(canonical({"schema": SCHEMA, "kind": kind, "fingerprint": fingerprint}))
    for part in shards_digest_parts(shards):
        digest.update(part)
    return digest.hexdigest()
