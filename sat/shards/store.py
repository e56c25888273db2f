"""Where the bytes of a shard come from: a folder, or any fsspec URL through a bounded cache of whole shards.

The surprising decision: a cached shard is named by its sha256, so the cache never holds a stale or a half file and
serves every data set and every job of a machine at once; processes agree through file locks, which the kernel frees
when one dies. A copy that the local disk damaged later is found by the reader's checksums and fetched once more.
"""

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import pyarrow as pa

from sat import files
from sat.credentials import shown
from sat.shards.download import blamed_on, claim, download, is_abandoned, is_at, release
from sat.shards.location import REPAIR, check_root
from sat.shards.manifest import Manifest
from sat.shards.ranges import RangeReader, serves_ranges
from sat.shards.retry import StillFailing, answer_of, cause_of, remote_error, retrying
from sat.shards.schema import MANIFEST, ShardInfo, place_of_rows

logger = logging.getLogger(__name__)

BEGAN = time.time_ns()
"""When this process (or the one that it was forked from) began to use the cache, in the clock of its files."""
FULL_FOR_S = 60.0
"""A cache without room is not looked at again for so long."""
OWN = re.compile(r"[0-9a-f]{64}(\.\w+)?\.(tar|part)")
"""Names that this cache gives."""
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


class NoRoom(Exception):
    """The cache is full of shards that are in use: this one is read by ranges."""


class RemoteStore:
    """Shards of an fsspec URL, kept as FOLDER/SHA256.tar: at most `limit` bytes of them.

    Where the store serves byte ranges, only shards that nobody used since this process began make room for others; what
    then finds no room is read by ranges, so no process fetches a byte twice in an epoch, however small the cache.
    Where it serves none, the least recently used go. A shard that was evicted while it is open stays on disk until it
    is closed: at most one per process. A table of samples is fetched whole, once, and kept beside the shards; it does
    not count.
    Other files of the folder are nobody's business: they neither count nor go.
    """

    is_remote = True
    open_files = 1

    def __init__(self, root: str, folder: str, limit: int):
        self.root = root
        self.folder = Path(folder)
        self.limit = limit
        self.retries = 0
        """Downloads that failed and were tried again."""
        self.ranges = RangeReader(root, self._count)
        self._serves_ranges: bool | None = None
        self._full_until = 0.0
        self._ahead: dict[str, int] = {}
        self._expected: SimpleQueue[ShardInfo] = SimpleQueue()
        self._fetching_process = 0

    def __reduce__(self) -> tuple[type["RemoteStore"], tuple[str, str, int]]:
        return RemoteStore, (self.root, str(self.folder), self.limit)

    def serves_ranges(self) -> bool:
        """Whether a part of a shard can be asked for; asked once. Raises as reading does."""
        if self._serves_ranges is None:
            self._serves_ranges = serves_ranges(self.root, MANIFEST)
        return self._serves_ranges

    def open(self, shard: ShardInfo) -> int | None:
        """A descriptor of the shard, fetched if need be; None where it is to be read by `ranges`.

        ValueError where the remote file is missing or too large.
        """
        self._ahead.pop(shard.name, None)
        try:
            descriptor = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return self._fetch_shard(shard)
        if os.fstat(descriptor).st_size != shard.bytes:
            self.forget(shard, descriptor)
            os.close(descriptor)
            return self._fetch_shard(shard)
        with suppress(PermissionError):  # of another user; then it looks less used than it is
            os.utime(descriptor)
        return descriptor

    def forget(self, shard: ShardInfo, descriptor: int) -> Path:
        """Remove the damaged copy that this descriptor reads, so that the next `open` fetches the shard; its path.

        A copy that another process has fetched since is kept.
        """
        path, url = self._path(shard), shown(f"{self.root}/{shard.name}")
        logger.warning("%s, the copy of %s, is damaged and is fetched anew", path, url)
        if is_at(descriptor, path):
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

    def expect(self, shard: ShardInfo) -> bool:
        """Fetch the shard in the background, unless half the cache already waits; False if it is read by ranges."""
        if shard.name in self._ahead or self._path(shard).exists():
            return True
        if self._is_full(shard):
            return False
        if sum(self._ahead.values()) + shard.bytes > self.limit // 2:
            return True
        if self._fetching_process != os.getpid():  # threads do not survive a fork
            self._expected, self._fetching_process = SimpleQueue(), os.getpid()
            for _ in range(DOWNLOADS):
                # Daemons: a process that is done must not wait for downloads that nobody needs any more.
                threading.Thread(target=self._fetch_expected, name="fetch-shards", daemon=True).start()
        self._ahead[shard.name] = shard.bytes
        self._expected.put(shard)
        return True

    def _fetch_expected(self) -> None:
        while True:
            shard = self._expected.get()
            try:
                if shard.name in self._ahead and not self._path(shard).exists():
                    descriptor = self._fetch_shard(shard)
                    if descriptor is None:
                        self._ahead.pop(shard.name, None)
                    else:
                        os.close(descriptor)
            except Exception:
                # The reader meets the same error when it needs the shard, and names it.
                self._ahead.pop(shard.name, None)

    def _path(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _is_full(self, shard: ShardInfo) -> bool:
        """Whether there was no room lately, or never will be, and the store serves ranges."""
        return (shard.bytes > self.limit or time.monotonic() < self._full_until) and self.serves_ranges()

    def _fetch_shard(self, shard: ShardInfo) -> int | None:
        if self._is_full(shard):
            return None
        if shard.bytes > self.limit:
            raise ValueError(
                f"{shown(self.root)}: {shard.name} has {shard.bytes} bytes, more than the cache; raise data.cache_gb"
            )

        def reserve(descriptor: int) -> None:
            self._make_room(shard.bytes, descriptor)

        try:
            return self._fetch(shard.name, shard.bytes, shard.sha256, self._path(shard), reserve)
        except NoRoom:
            self._full_until = time.monotonic() + FULL_FOR_S
            return None

    def _fetch(self, name: str, size: int, sha256: str, path: Path, reserve: Callable[[int], None]) -> int:
        """Download under an exclusive lock, check, publish; a descriptor of the file that was published."""
        with blamed_on(self.folder):
            descriptor, part = claim(path)
        if part is None:
            return descriptor
        url = f"{self.root}/{name}"
        try:
            with blamed_on(self.folder):
                os.ftruncate(descriptor, 0)  # what a killed process left
                reserve(descriptor)
            fetch = partial(download, url, size, sha256, descriptor, self.folder)
            retrying(fetch, shown(url), self._count, remote_error)
            with blamed_on(self.folder):
                os.fsync(descriptor)
                os.rename(part, path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            os.close(descriptor)
            if isinstance(error, FileNotFoundError) and answer_of(error) in (None, 404, 410):
                raise ValueError(f"{shown(self.root)}: {name} is missing there") from error
            if isinstance(error, Exception) and not isinstance(error, (ValueError, StillFailing, NoRoom)):
                raise StillFailing(errno.EIO, f"{shown(url)}: {cause_of(error)}") from error
            raise
        release(descriptor)
        return descriptor

    def _count(self) -> None:
        self.retries += 1

    def _make_room(self, need: int, descriptor: int) -> None:
        """Reserve `need` bytes for the open part file, evicting shards.

        Without room for it raises NoRoom where the store serves ranges, else waits while other downloads hold it.
        """
        while True:
            with files.locked(self.folder / ".lock"):
                found = sorted(self._entries(), key=lambda entry: (entry[1].st_mtime_ns, entry[0].name))
                used = sum(status.st_size for _, status in found)
                keep_from = BEGAN if used + need > self.limit and self.serves_ranges() else time.time_ns()
                for path, status in found:
                    if used + need <= self.limit:
                        break
                    unused = path.suffix == ".tar" and status.st_mtime_ns < keep_from
                    if unused or (path.suffix == ".part" and is_abandoned(path)):
                        path.unlink(missing_ok=True)
                        used -= status.st_size
                if used + need <= self.limit:
                    os.ftruncate(descriptor, need)
                    return
            if self.serves_ranges():
                raise NoRoom
            time.sleep(0.05)

    def _entries(self) -> list[tuple[Path, os.stat_result]]:
        """The shards and unfinished downloads of the cache, by their names: the folder may hold files of the user."""
        found = []
        for path in self.folder.iterdir():
            if OWN.fullmatch(path.name):
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
