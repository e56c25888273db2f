"""Write one shard so that it appears whole or not at all, whoever is killed and however many workers try at once.

Below the data set's folder:

    SPLIT-000000.tar          the shard
    work/SPLIT-000000.json    its sidecar: digests, rows and what was left out; a shard without one does not exist
    work/SPLIT-000000.claim   who is working on it; saves work only, nothing breaks when it lies

A tar is written under a temporary name, flushed, synced, read back and hashed, then linked to its name; the sidecar is
linked last, both under the folder's lock. The surprising decision: links, not renames, publish both: a link fails when
the name exists, so that also on a file system without locks one of two workers wins and the other throws its work away;
a pair mixed of both cannot come to stand.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from preprocessing.sharding.ownership import check_stands, exclusive
from preprocessing.sharding.plan import WORK, ImageRecord, PlannedShard
from sat import files
from sat.shards.schema import LeftOut, SampleRow, Sidecar
from sat.shards.sealed import seal, unseal
from sat.shards.tar import END_OF_TAR, sample_bytes


@dataclass(frozen=True)
class Sample:
    """What goes into a shard for one picture: `KEY.EXTENSION` holds `data`, `KEY.json` what the record says."""

    record: ImageRecord
    data: bytes
    """The picture's file, or its features as an npy file."""
    extension: str
    width: int
    height: int
    """Of the picture, in pixels; 0 where that is not known."""
    more: Mapping[str, bytes] = field(default_factory=dict)
    """Further members by extension: `boxes.npy` of region features."""
    about: Mapping[str, str] = field(default_factory=dict)
    """Further entries of the .json: what the numbers of features mean, `FeatureSpec.about_values`."""


def sidecar_path(root: Path, shard: PlannedShard) -> Path:
    """Where the sidecar of a shard lies."""
    return root / WORK / f"{shard.stem}.json"


def read_sidecar(root: Path, shard: PlannedShard) -> Sidecar | None:
    """The sidecar of a shard, None when there is none. Raises ValueError naming it when it is damaged."""
    path = sidecar_path(root, shard)
    try:
        sidecar = Sidecar.from_document(unseal(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if sidecar.shard != shard.name:
        raise ValueError(f"{path}: belongs to {sidecar.shard}, not to {shard.name}")
    return sidecar


def is_finished(root: Path, shard: PlannedShard, fingerprint: str) -> bool:
    """True when the shard stands: a sound sidecar with this fingerprint and a tar of the recorded size."""
    return finished(root, shard, fingerprint) is not None


def finished(root: Path, shard: PlannedShard, fingerprint: str) -> Sidecar | None:
    """The sidecar of a shard that stands, else None."""
    try:
        sidecar = read_sidecar(root, shard)
    except ValueError:
        return None
    stands = sidecar is not None and sidecar.fingerprint == fingerprint and _tar_size(root, shard) == sidecar.bytes
    return sidecar if stands else None


def write_shard(
    root: Path,
    shard: PlannedShard,
    fingerprint: str,
    samples: Iterable[Sample | LeftOut],
    extra: Callable[[], Mapping[str, Any]] = dict,
) -> Sidecar:
    """Write and publish one shard; returns the sidecar that stands at the end, ours or that of a faster worker.

    `extra()` is called after the last sample and stored in the sidecar. A shard whose samples are all left out has a
    sidecar and no tar. Raises OSError when the disk is full or returns other bytes than were written, ValueError when
    the folder is of another plan by now.
    """
    (root / WORK).mkdir(parents=True, exist_ok=True)
    temporary = files.temporary_name(root / shard.name, root / WORK)
    try:
        with files.naming(root / shard.name), open(temporary, "wb") as file:
            files.crash_point("tar-created")
            written = _write_tar(file, shard, samples)
            files.sync_open(file)
        files.crash_point("tar-written")
        if files.sha256(temporary) != written.sha256:
            raise OSError(f"{root / shard.name}: reading it back gives other bytes than were written")
        sidecar = written.sidecar(shard, fingerprint, extra())
        with exclusive(root):
            check_stands(root, fingerprint)
            _withdraw_unfinished(root, shard, fingerprint)
            return _publish(root, shard, temporary, sidecar)
    except FileNotFoundError:  # our temporary file was swept: another worker was faster and the data set is published
        check_stands(root, fingerprint)
        standing = finished(root, shard, fingerprint)
        if standing is None:
            raise
        return standing
    finally:
        temporary.unlink(missing_ok=True)


def _withdraw_unfinished(root: Path, shard: PlannedShard, fingerprint: str) -> None:
    """Remove a sidecar that is damaged, of another fingerprint or without the tar it describes.

    Only once its successor is written, and never the tar, which is replaced in one step: until then its sound samples
    may be all there is.
    """
    if sidecar_path(root, shard).exists() and not is_finished(root, shard, fingerprint):
        sidecar_path(root, shard).unlink(missing_ok=True)


def _publish(root: Path, shard: PlannedShard, temporary: Path, sidecar: Sidecar) -> Sidecar:
    """Link the tar, then the sidecar; returns the sidecar that stands.

    The loop only turns when another worker put other bytes under the name meanwhile (results of two kinds of machine):
    a sidecar that does not describe the tar is withdrawn and the describing one published.
    """
    path, blob = sidecar_path(root, shard), seal(sidecar.to_document())
    if sidecar.samples == 0 and not path.exists():
        (root / shard.name).unlink(missing_ok=True)  # of a sidecar withdrawn
    uncontested = sidecar.samples == 0 or _link_tar(root, shard, temporary, sidecar.sha256)
    files.crash_point("tar-linked")
    for _ in range(3):
        published = files.create(path, blob)
        files.crash_point("sidecar-linked")
        if published and uncontested:
            return sidecar
        standing = read_sidecar(root, shard)
        if standing and (standing.samples == 0 or files.sha256(root / shard.name) == standing.sha256):
            return standing
        path.unlink(missing_ok=True)
        uncontested = False
    raise OSError(f"{root / shard.name}: other workers keep replacing it; stop them and run the shard step again")


def _link_tar(root: Path, shard: PlannedShard, temporary: Path, sha256: str) -> bool:
    """Give the tar its name; False when one was there (without a sidecar it is replaced, if it has other bytes)."""
    final = root / shard.name
    try:
        files.give_name(temporary, final)
    except FileExistsError:
        if not sidecar_path(root, shard).exists() and not _holds(final, sha256):
            os.replace(temporary, final)
        return False
    except FileNotFoundError:  # swept by a worker that finished before us
        return False
    files.sync(root)
    return True


def _holds(path: Path, sha256: str) -> bool:
    """Whether a file has these bytes; one that the disk cannot read any more has not."""
    try:
        return files.sha256(path) == sha256
    except FileNotFoundError:
        raise
    except OSError:
        return False


@dataclass(frozen=True)
class _Tar:
    """What a tar holds, and what was left out of it."""

    rows: tuple[SampleRow, ...]
    left_out: tuple[LeftOut, ...]
    bytes: int
    sha256: str

    def sidecar(self, shard: PlannedShard, fingerprint: str, extra: Mapping[str, Any]) -> Sidecar:
        size = self.bytes if self.rows else 0
        about = (shard.name, shard.split, fingerprint, len(self.rows), size, self.sha256)
        return Sidecar(*about, self.rows, self.left_out, extra)


def _write_tar(file: BinaryIO, shard: PlannedShard, samples: Iterable[Sample | LeftOut]) -> _Tar:
    """Write all samples and the end of the tar."""
    rows: list[SampleRow] = []
    left_out: list[LeftOut] = []
    offset, digest = 0, hashlib.sha256()
    for sample in samples:
        if isinstance(sample, LeftOut):
            left_out.append(sample)
            continue
        blob = members_of(sample)
        file.write(blob)
        digest.update(blob)
        rows.append(_row(sample, shard, offset, blob))
        offset += len(blob)
        files.crash_point("sample-written")
    file.write(END_OF_TAR)
    digest.update(END_OF_TAR)
    return _Tar(tuple(rows), tuple(left_out), offset + len(END_OF_TAR), digest.hexdigest())


def _row(sample: Sample, shard: PlannedShard, offset: int, blob: bytes) -> SampleRow:
    record = sample.record
    return SampleRow(
        key=record.key,
        image_id=record.image_id,
        file_name=record.file_name,
        split=shard.split,
        shard=shard.name,
        offset=offset,
        nbytes=len(blob),
        xxh3=xxhash.xxh3_64_intdigest(blob),
        captions=record.captions,
        width=sample.width,
        height=sample.height,
        id_is_number=record.id_is_number,
    )


def members_of(sample: Sample) -> bytes:
    """A sample as the bytes it has in a shard."""
    record = sample.record
    return sample_bytes(
        record.key,
        {sample.extension: sample.data, **sample.more},
        image_id=int(record.image_id) if record.id_is_number else record.image_id,
        file_name=record.file_name,
        captions=record.captions,
        width=sample.width,
        height=sample.height,
        **sample.about,
    )


def _tar_size(root: Path, shard: PlannedShard) -> int:
    path = root / shard.name
    return path.stat().st_size if path.exists() else 0
