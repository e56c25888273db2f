"""Write one shard so that it appears whole or not at all, whoever is killed and however many workers try at once.

Below the data set's folder:

    SPLIT-000000.tar          the shard
    work/SPLIT-000000.json    its sidecar: digests, rows and what was left out; a shard without one does not exist
    work/SPLIT-000000.claim   who is working on it; saves work only, nothing breaks when it lies
    work/lock                 held by whoever plans or finalizes

A tar is written under a temporary name, flushed, synced, read back and hashed, then linked to its name; the sidecar is
linked last. The surprising decision: links, not renames, publish both: a link fails when the name exists, so of two
workers one wins and the other throws its work away; a pair mixed of both cannot come to stand.
"""

import fcntl
import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import xxhash

from sat.shards.schema import LeftOut
from sat.shards.sealed import seal, unseal
from sat.shards.tar import TAR_BLOCK, sample_bytes

WORK, LOCK = "work", "lock"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Sample:
    """What goes into a shard for one picture: `KEY.EXTENSION` holds `data`, `KEY.json` the rest."""

    key: str
    image_id: str
    file_name: str
    captions: tuple[str, ...]
    width: int
    height: int
    extension: str
    data: bytes


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be written: at most `samples` samples, fewer where pictures are left out."""

    name: str
    split: str
    samples: int
    rows_sha256: str
    """Digest of what is planned for it: rows of the plan's table, or of the image shard it is made from."""

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".tar")


def crash_point(name: str) -> None:
    """Die here, as by a power cut, when a test names this place in SAT_CRASH_POINT; else do nothing."""
    if os.environ.get("SAT_CRASH_POINT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


def sidecar_path(root: Path, shard: PlannedShard) -> Path:
    """Where the sidecar of a shard lies."""
    return root / WORK / f"{shard.stem}.json"


def read_sidecar(root: Path, shard: PlannedShard) -> dict | None:
    """The sidecar of a shard, None when there is none. Raises ValueError naming it when it is damaged."""
    path = sidecar_path(root, shard)
    try:
        document = unseal(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if document["shard"] != shard.name:
        raise ValueError(f"{path}: belongs to {document['shard']}, not to {shard.name}")
    return document


def is_finished(root: Path, shard: PlannedShard, fingerprint: str) -> bool:
    """True when the shard stands: a sound sidecar with this fingerprint and a tar of the recorded size."""
    try:
        sidecar = read_sidecar(root, shard)
    except ValueError:
        return False
    return sidecar is not None and sidecar["fingerprint"] == fingerprint and _tar_size(root, shard) == sidecar["bytes"]


def write_shard(
    root: Path,
    shard: PlannedShard,
    fingerprint: str,
    samples: Iterable[Sample | LeftOut],
    extra: Callable[[], dict] = dict,
) -> dict:
    """Write and publish one shard; returns the sidecar that stands at the end, ours or that of a faster worker.

    `extra()` is called after the last sample and stored in the sidecar. A shard whose samples are all left out has a
    sidecar and no tar. Raises OSError when the disk is full or returns other bytes than were written.
    """
    temporary = temporary_path(root, shard.name)
    try:
        with open(temporary, "wb") as file:
            crash_point("tar-created")
            rows, left_out, size, digest = _write_tar(file, shard, samples)
            sync_file(file)
        crash_point("tar-written")
        if hash_file(temporary) != digest:
            raise OSError(f"{root / shard.name}: reading it back gives other bytes than were written")
        size = size if rows else 0
        sidecar = make_sidecar(shard, fingerprint, size, digest, rows, [asdict(item) for item in left_out], extra())
        remove_unfinished(root, shard, fingerprint)
        return _publish(root, shard, temporary, sidecar)
    except FileNotFoundError:  # our temporary file was swept: another worker was faster and the data set is published
        if not is_finished(root, shard, fingerprint):
            raise
        return read_sidecar(root, shard)
    finally:
        temporary.unlink(missing_ok=True)


def make_sidecar(
    shard: PlannedShard, fingerprint: str, size: int, sha256: str, rows: list[dict], left_out: list[dict], extra: dict
) -> dict:
    """The content of a sidecar."""
    sidecar = {"shard": shard.name, "split": shard.split, "fingerprint": fingerprint, "samples": len(rows)}
    return sidecar | {"bytes": size, "sha256": sha256, "rows": rows, "left_out": left_out, "extra": extra}


def remove_unfinished(root: Path, shard: PlannedShard, fingerprint: str) -> None:
    """Remove a sidecar that is damaged, of another fingerprint or without the tar it describes, and its tar.

    Only once its successor is written: until then its sound samples may be all there is.
    """
    if sidecar_path(root, shard).exists() and not is_finished(root, shard, fingerprint):
        sidecar_path(root, shard).unlink(missing_ok=True)
        (root / shard.name).unlink(missing_ok=True)


def temporary_path(root: Path, name: str) -> Path:
    """A fresh temporary name on the file system of the data set."""
    (root / WORK).mkdir(parents=True, exist_ok=True)
    return root / WORK / f"{name}.tmp-{uuid4().hex}"


def publish_exclusive(path: Path, blob: bytes) -> bool:
    """Create `path` with these bytes, whole and synced; False when it exists already."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(blob)
            sync_file(file)
        os.link(temporary, path)
    except (FileExistsError, FileNotFoundError):  # not found: swept by a worker that finished before us
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Wait until nobody else plans or finalizes this data set. A killed holder's lock ends with its process."""
    (root / WORK).mkdir(parents=True, exist_ok=True)
    with open(root / WORK / LOCK, "ab") as file:
        with suppress(OSError):  # another user's file
            os.fchmod(file.fileno(), 0o666)
        with suppress(OSError):  # a file system without locks: of two at once one may fail, and is run again
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_file(root: Path, path: Path, blob: bytes) -> None:
    """Give a file of the data set these bytes, whole and synced, replacing what is there."""
    temporary = temporary_path(root, path.name)
    try:
        with open(temporary, "wb") as file:
            file.write(blob)
            sync_file(file)
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(temporary: Path, path: Path) -> None:
    """Give a synced temporary file its name, replacing what is there."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_file(file: BinaryIO) -> None:
    """Bring everything written so far to the disk, readable by all: another user's job may be the one that trains."""
    file.flush()
    os.fchmod(file.fileno(), 0o644)
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(root: Path, shard: PlannedShard, temporary: Path, sidecar: dict) -> dict:
    """Link the tar, then the sidecar; returns the sidecar that stands.

    The loop only turns when another worker put other bytes under the name meanwhile (results of two kinds of machine):
    a sidecar that does not describe the tar is withdrawn and the describing one published.
    """
    uncontested = sidecar["samples"] == 0 or _link_tar(root, shard, temporary, sidecar["sha256"])
    crash_point("tar-linked")
    for _ in range(3):
        published = publish_exclusive(sidecar_path(root, shard), seal(sidecar))
        crash_point("sidecar-linked")
        if published and uncontested:
            return sidecar
        standing = read_sidecar(root, shard)
        if standing and (standing["samples"] == 0 or hash_file(root / shard.name) == standing["sha256"]):
            return standing
        sidecar_path(root, shard).unlink(missing_ok=True)
        uncontested = False
    raise OSError(f"{root / shard.name}: other workers keep replacing it; stop them and run the shard step again")


def _link_tar(root: Path, shard: PlannedShard, temporary: Path, sha256: str) -> bool:
    """Give the tar its name; False when one was there (without a sidecar it is replaced, if it has other bytes)."""
    final = root / shard.name
    try:
        os.link(temporary, final)
    except FileExistsError:
        if not sidecar_path(root, shard).exists() and hash_file(final) != sha256:
            os.replace(temporary, final)
        return False
    except FileNotFoundError:  # swept by a worker that finished before us
        return False
    sync_folder(root)
    return True


def _write_tar(
    file: BinaryIO, shard: PlannedShard, samples: Iterable[Sample | LeftOut]
) -> tuple[list[dict], list[LeftOut], int, str]:
    """Write all samples; returns their rows, what was left out, the size in bytes and the sha256 of the tar."""
    rows, left_out, offset, digest = [], [], 0, hashlib.sha256()
    for sample in samples:
        if isinstance(sample, LeftOut):
            left_out.append(sample)
            continue
        blob = sample_bytes(**vars(sample))
        file.write(blob)
        digest.update(blob)
        row = {"key": sample.key, "image_id": sample.image_id, "file_name": sample.file_name, "split": shard.split}
        row |= {"shard": shard.name, "offset": offset, "nbytes": len(blob), "xxh3": xxhash.xxh3_64_intdigest(blob)}
        row |= {"captions": list(sample.captions), "width": sample.width, "height": sample.height}
        rows.append(row)
        offset += len(blob)
        crash_point("sample-written")
    end = bytes(2 * TAR_BLOCK)
    file.write(end)
    digest.update(end)
    return rows, left_out, offset + len(end), digest.hexdigest()


def _tar_size(root: Path, shard: PlannedShard) -> int:
    path = root / shard.name
    return path.stat().st_size if path.exists() else 0
