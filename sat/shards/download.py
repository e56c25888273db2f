"""Fetch one remote file into a folder of this machine, once among all its processes."""

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import fsspec

logger = logging.getLogger(__name__)

CHUNK = 4 << 20
"""Bytes read from a remote file at once."""
READ_TIMEOUT_S = 60
"""An HTTP server that sends nothing for so long is tried anew."""


@contextmanager
def blamed_on(folder: Path) -> Iterator[None]:
    """Errors of the block are the cache's, not the server's: ValueError naming its folder and the way out."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        room = " or lower data.cache_gb" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ValueError(
            f"the cache of remote shards cannot be written: {where}: {error.strerror}; name another folder with "
            f"data.cache_dir{room}"
        ) from error


def claim(path: Path) -> tuple[int, Path | None]:
    """A descriptor of the published file and None, or of its locked part file and that file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: several processes may fetch the same
            os.close(descriptor)
            part.unlink(missing_ok=True)
            logger.warning("%s: no file locks (%s); processes may fetch a shard twice", path.parent, error.strerror)
            part = path.with_suffix(f".{uuid4().hex}.part")
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            published = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if is_at(descriptor, part):
                return descriptor, part
            os.close(descriptor)  # another process removed it while this one waited for its lock
            continue
        if is_at(descriptor, part):
            part.unlink()
        os.close(descriptor)
        return published, None


def release(descriptor: int) -> None:
    """Free the lock of `claim`: processes forked meanwhile have the file open too."""
    with suppress(OSError):  # no locks here
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def download(url: str, size: int, sha256: str, descriptor: int, folder: Path) -> None:
    """Stream a remote file into an open one of `folder`. ConnectionError where other bytes arrive than were written."""
    digest, done = hashlib.sha256(), 0
    with _open_url(url) as remote:
        while chunk := remote.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if done > size:
                break
            with blamed_on(folder):
                os.pwrite(descriptor, chunk, done - len(chunk))
    if done != size:
        raise ConnectionError(f"{done} bytes arrived, {size} were written")
    if digest.hexdigest() != sha256:
        raise ConnectionError(f"the sha256 of what arrived is {digest.hexdigest()}, {sha256} was written")


def _open_url(url: str) -> BufferedIOBase:
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # The default of 5 minutes for the whole file would end every long download. One answer is read as it comes: by
        # blocks, a proxy's short page in the place of a file would be asked for again and again.
        timeout = aiohttp.ClientTimeout(total=None, sock_read=READ_TIMEOUT_S)
        options = {"client_kwargs": {"timeout": timeout}, "block_size": 0}
    return cast(BufferedIOBase, fsspec.open(url, "rb", **options).open())


def is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def is_abandoned(part: Path) -> bool:
    """Whether nobody downloads into this part file: its lock is free."""
    try:
        with open(part, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
    except (FileNotFoundError, BlockingIOError):
        return False
    return True
