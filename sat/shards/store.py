"""Where the bytes of a shard come from: a folder, or any fsspec URL through a bounded cache of whole shards.

The surprising decision: a cached shard is named by its sha256, so the cache never holds a stale or a half file and
serves every data set and every job of a machine at once; processes agree through file locks, which the kernel frees
when one dies. A copy that the local disk damaged later is found by the reader's checksums and fetched once more.
"""

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from io import BufferedIOBase
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import fsspec
import pyarrow as pa

from sat import files
from sat.shards.location import REPAIR, check_root
from sat.shards.manifest import Manifest
from sat.shards.retry import remote_error, retrying
from sat.shards.schema import ShardInfo, place_of_rows

logger = logging.getLogger(__name__)

CHUNK = 4 << 20
"""Bytes read from a remote file at once."""
READ_TIMEOUT_S = 60
"""An HTTP server that sends nothing for so long is tried anew."""
DOWNLOADS = 2
"""Shards that a process fetches at once, ahead of use."""


class FolderStore:
    """Shards of a local or mounted folder."""

    is_remote = False
    open_files = 128
    """File descriptors that a reader keeps."""
    retries = 0

    def __init__(self, folder: str):
        self.folder = folder

    def open(self, shard: ShardInfo) -> int:
        """A descriptor of the shard, for reading. ValueError where the file is missing."""
        try:
            return os.open(os.path.join(self.folder, shard.name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ValueError(f"{self.folder}: {shard.name} is missing; {REPAIR}") from None

    def rows(self, manifest: Manifest, shard: int) -> pa.Table:
        """`manifest.rows(shard)`."""
        return manifest.rows(shard)


class RemoteStore:
    """Shards of an fsspec URL, kept as FOLDER/SHA256.tar: at most `limit` bytes, the least recently used go first.

    A shard that was evicted while it is open stays on disk until it is closed: at most one per process. A table of
    samples is fetched whole, once, and kept beside the shards; it does not count.
    """

    is_remote = True
    open_files = 1

    def __init__(self, root: str, folder: str, limit: int):
        self.root = root
        self.folder = Path(folder)
        self.limit = limit
        self.retries = 0
        """Downloads that failed and were tried again."""
        self._ahead: dict[str, int] = {}
        self._expected: SimpleQueue[ShardInfo] = SimpleQueue()
        self._fetching_process = 0

    def __reduce__(self) -> tuple[type["RemoteStore"], tuple[str, str, int]]:
        return RemoteStore, (self.root, str(self.folder), self.limit)

    def open(self, shard: ShardInfo) -> int:
        """A descriptor of the shard, fetched if need be. ValueError where the remote file is missing or too large."""
        self._ahead.pop(shard.name, None)
        try:
            descriptor = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return self._fetch_shard(shard)
        if os.fstat(descriptor).st_size != shard.bytes:
            self.forget(shard, descriptor)
            os.close(descriptor)
            return self._fetch_shard(shard)
        os.utime(descriptor)
        return descriptor

    def forget(self, shard: ShardInfo, descriptor: int) -> Path:
        """Remove the damaged copy that this descriptor reads, so that the next `open` fetches the shard; its path.

        A copy that another process has fetched since is kept.
        """
        path = self._path(shard)
        logger.warning("%s, the copy of %s/%s, is damaged and is fetched anew", path, self.root, shard.name)
        if _is_at(descriptor, path):
            path.unlink(missing_ok=True)
        return path

    def rows(self, manifest: Manifest, shard: int) -> pa.Table:
        """`manifest.rows(shard)`, from a copy of the table: many servers cannot serve a part of a file."""
        name, _ = place_of_rows(shard)
        record = manifest.files[name]
        path = self.folder / "tables" / record["sha256"] / name
        copy = replace(manifest, root=str(path.parent))
        if path.exists():
            try:
                return copy.rows(shard)
            except ValueError as error:  # it was whole when it was fetched: the copy is damaged
                logger.warning("%s; it is fetched anew", error)
                path.unlink(missing_ok=True)
        os.close(self._fetch(name, record["bytes"], record["sha256"], path, lambda descriptor: None))
        return copy.rows(shard)

    def expect(self, shard: ShardInfo) -> None:
        """Fetch the shard in the background, unless half the cache already waits to be used."""
        if shard.name in self._ahead or sum(self._ahead.values()) + shard.bytes > self.limit // 2:
            return
        if self._fetching_process != os.getpid():  # threads do not survive a fork
            self._expected, self._fetching_process = SimpleQueue(), os.getpid()
            for _ in range(DOWNLOADS):
                # Daemons: a process that is done must not wait for downloads that nobody needs any more.
                threading.Thread(target=self._fetch_expected, name="fetch-shards", daemon=True).start()
        self._ahead[shard.name] = shard.bytes
        self._expected.put(shard)

    def _fetch_expected(self) -> None:
        while True:
            shard = self._expected.get()
            try:
                if shard.name in self._ahead and not self._path(shard).exists():
                    os.close(self._fetch_shard(shard))
            except Exception:
                # The reader meets the same error when it needs the shard, and names it.
                self._ahead.pop(shard.name, None)

    def _path(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _fetch_shard(self, shard: ShardInfo) -> int:
        if shard.bytes > self.limit:
            raise ValueError(
                f"{self.root}: {shard.name} has {shard.bytes} bytes, more than the cache; raise data.cache_gb"
            )

        def reserve(descriptor: int) -> None:
            self._make_room(shard.bytes, descriptor)

        return self._fetch(shard.name, shard.bytes, shard.sha256, self._path(shard), reserve)

    def _fetch(self, name: str, size: int, sha256: str, path: Path, reserve: Callable[[int], None]) -> int:
        """Download under an exclusive lock, check, publish; a descriptor of the file that was published."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        while True:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                published = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if _is_at(descriptor, part):
                    break
                os.close(descriptor)  # another process removed it while this one waited for its lock
                continue
            if _is_at(descriptor, part):
                part.unlink()
            os.close(descriptor)
            return published
        url = f"{self.root}/{name}"
        try:
            os.ftruncate(descriptor, 0)  # what a killed process left
            reserve(descriptor)
            retrying(lambda: _download(url, size, sha256, descriptor), url, self._count, remote_error)
            os.fsync(descriptor)
            os.rename(part, path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            os.close(descriptor)
            if isinstance(error, FileNotFoundError):
                raise ValueError(f"{self.root}: {name} is missing there") from error
            raise
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return descriptor

    def _count(self) -> None:
        self.retries += 1

    def _make_room(self, need: int, descriptor: int) -> None:
        """Reserve `need` bytes for the open part file, evicting shards; waits while other downloads hold the room."""
        while True:
            with files.locked(self.folder / ".lock"):
                found = sorted(self._entries(), key=lambda entry: (entry[1].st_mtime_ns, entry[0].name))
                used = sum(status.st_size for _, status in found)
                for path, status in found:
                    if used + need <= self.limit:
                        break
                    if path.suffix == ".tar" or _is_abandoned(path):
                        path.unlink(missing_ok=True)
                        used -= status.st_size
                if used + need <= self.limit:
                    os.ftruncate(descriptor, need)
                    return
            time.sleep(0.05)

    def _entries(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".part"):
                try:
                    found.append((path, path.stat()))
                except FileNotFoundError:
                    continue
        return found


ShardStore = FolderStore | RemoteStore


def make_store(root: str, cache_dir: str = "", cache_gb: float = 50.0) -> ShardStore:
    """The store of a data set's root: a folder, `file://` or another fsspec URL.

    cache_dir: where remote shards are kept; empty: a folder under the user's cache. Raises ValueError as
    `check_root` does.
    """
    check_root(root)
    if root.startswith("file://"):
        return FolderStore(root.removeprefix("file://"))
    if "://" not in root:
        return FolderStore(root)
    return RemoteStore(root, cache_dir or str(files.cache_folder()), int(cache_gb * 1e9))


def _download(url: str, size: int, sha256: str, descriptor: int) -> None:
    """Stream a remote file into an open one. ConnectionError where other bytes arrive than were written."""
    digest, done = hashlib.sha256(), 0
    with _open_url(url) as remote:
        while chunk := remote.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if done > size:
                break
            os.pwrite(descriptor, chunk, done - len(chunk))
    if done != size:
        raise ConnectionError(f"{done} bytes arrived, {size} were written")
    if digest.hexdigest() != sha256:
        raise ConnectionError(f"the sha256 of what arrived is {digest.hexdigest()}, {sha256} was written")


def _open_url(url: str) -> BufferedIOBase:
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # The default of 5 minutes for the whole file would end every long download.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_read=READ_TIMEOUT_S)}
    return cast(BufferedIOBase, fsspec.open(url, "rb", **options).open())


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _is_abandoned(part: Path) -> bool:
    """Whether nobody downloads into this part file: its lock is free."""
    try:
        with open(part, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
    except (FileNotFoundError, BlockingIOError):
        return False
    return True
