"""The only writers of the program: a file or folder appears whole or not at all, is on the disk, and obeys the umask.

Everything is written under a temporary name in the same folder, synced, and then renamed, exchanged or linked; a kill
at any point leaves the old or the new content. Temporary names hold `.tmp-`, so that `sweep` and the readers know them.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
"""Stands in the name of everything that is not finished."""
OLD = ".old-"
"""Stands in the name of a folder while it is being replaced where the file system cannot exchange two names."""
_TEMPORARY_NAME = re.compile(f".+{TEMPORARY}[0-9a-f]{{32}}")
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2  # from linux/fs.h
_NO_RENAME = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK)


# ------------------------------------------------------------------ files


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yields a temporary name to write to by any library; afterwards `path` holds what was written, whole and synced.

    Nothing changes when the block raises. `folder`, on the same file system, takes the temporary file; default: the
    folder of `path`, which is made where it is missing.
    """
    place = folder or path.parent
    place.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path, place)
    try:
        with naming(path), open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777  # what the umask leaves
        with naming(path):
            yield temporary
        os.chmod(temporary, mode)  # safetensors, for one, makes files that nobody else may read
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, folder: Path | None = None) -> None:
    """Give `path` these bytes, replacing what is there; `folder` as for `replacing`."""
    with replacing(path, folder) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Give `path` this text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Give `path` this value as indented JSON. Raises ValueError for NaN and infinities, which JSON has not."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def create(path: Path, data: bytes) -> bool:
    """Make `path` with these bytes, whole and synced; False when it exists already (or our temporary was swept)."""
    temporary = temporary_name(path, path.parent)
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data)
            sync_open(file)
        give_name(temporary, path)
    except (FileExistsError, FileNotFoundError):
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def give_name(temporary: Path, path: Path) -> None:
    """Give a finished file its name, if that is free; `temporary` may still be there afterwards, to be removed.

    Raises FileExistsError where `path` is taken, FileNotFoundError where `temporary` was swept, and OSError that says
    what to do on a file system that can do this neither by a link nor by a rename.
    """
    try:
        os.link(temporary, path)
        return
    except OSError as error:  # FUSE, exFAT and SMB have no links
        if error.errno not in _NO_LINKS:
            raise
    code = _rename(temporary, path, _RENAME_NOREPLACE)
    if code in _NO_RENAME:
        raise OSError(
            code,
            "this file system has neither links nor renames that replace nothing, one of which publishing takes; "
            "write to another one and copy the result",
            str(path),
        )
    if code:
        raise OSError(code, os.strerror(code), str(temporary), None, str(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the error of a disk that is full while bytes are written name `path`: of itself it names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def temporary_name(path: Path, folder: Path) -> Path:
    """A fresh temporary name for `path` in `folder`."""
    return folder / f"{path.name}{TEMPORARY}{uuid4().hex}"


def is_temporary(name: str) -> bool:
    """Whether a name is one that `temporary_name` gives; of another one with the same mark the owner is unknown."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


def sync_open(file: IO[bytes]) -> None:
    """Bring everything written so far to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Bring a file's bytes, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path, pattern: str = "*") -> None:
    """Remove what killed writers left directly in `folder` of names like `pattern`. Call it as the only writer."""
    for path in sorted(folder.glob(f"{pattern}{TEMPORARY}*")):
        if not is_temporary(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------ folders


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder to fill; afterwards it stands at `path`, synced, in place of what was there.

    At every moment `path` is a whole folder, the old or the new one. On a file system that cannot exchange two names
    (NFS) there is a moment without one; a kill in it is mended by `recover_folder`.
    """
    temporary = temporary_name(path, path.parent)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(new: Path, path: Path) -> None:
    """Sync everything in the folder `new` and give it the name `path`; what stood there is removed."""
    for each in [*new.rglob("*"), new]:
        sync(each)
    crash_point("folder-written")
    _swap(new, path)
    crash_point("folder-swapped")
    sync(path.parent)
    shutil.rmtree(new, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Put back the folder `path` where a kill came between the two renames that replace it."""
    if not path.exists():
        for old in sorted(path.parent.glob(f"{path.name}{OLD}*")):
            os.rename(old, path)
            return


def _swap(new: Path, path: Path) -> None:
    """Exchange two folders, or give `new` the name `path` where that is free; what was there is left at `new`."""
    if not path.exists():
        os.rename(new, path)
    elif not _exchange(new, path):
        for superseded in path.parent.glob(f"{path.name}{OLD}*"):
            _discard(superseded)
        old = path.with_name(f"{path.name}{OLD}{uuid4().hex}")
        os.rename(path, old)
        crash_point("folder-set-aside")
        os.rename(new, path)
        _discard(old)


def _discard(old: Path) -> None:
    """Remove a folder set aside, under a temporary name: a kill must not leave a part of it to be put back."""
    doomed = temporary_name(old, old.parent)
    os.rename(old, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    code = _rename(a, b, _RENAME_EXCHANGE)
    if code and code not in _NO_RENAME:
        raise OSError(code, os.strerror(code), str(a), None, str(b))
    return code == 0


def _rename(a: Path, b: Path, flag: int) -> int:
    """Linux's rename of `a` to `b` with a flag; 0, or the error's number."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # another system, or a C library from before 2018
        return errno.ENOSYS
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), flag) == 0:
        return 0
    return ctypes.get_errno()


# ------------------------------------------------------------------ digests, locks, places


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(data: bytes | str) -> str:
    """SHA-256 of these bytes, or of this text in UTF-8, hex."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of the file `path`, which is made and stays; yields False where another has it and `wait` is false.

    A killed holder's lock ends with its process. It is freed by name: a process forked meanwhile has the file open too.
    On a file system without locks everybody gets it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        with suppress(OSError):  # another user's file
            os.fchmod(file.fileno(), 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:  # no locks here
            _tell_of_no_locks(path.parent, os.strerror(error.errno or errno.ENOLCK))
            yield True
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@lru_cache(maxsize=64)
def _tell_of_no_locks(folder: Path, why: str) -> None:
    """Once for each folder."""
    logger.warning("%s: no file locks here (%s); let no two jobs replace things in this folder at once", folder, why)


def cache_folder(*, private: bool = False) -> Path:
    """Where this program keeps what it can make again; made if need be.

    The user's cache (XDG_CACHE_HOME, else ~/.cache); where that cannot be written, a new folder of the machine's
    temporary one. `private`: for code that is loaded, so that nobody else may write there.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "show-attend-and-tell"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # the latter for a user without a home
        pass
    return Path(tempfile.mkdtemp(prefix="show-attend-and-tell-"))


def crash_point(name: str) -> None:
    """Die here, as by a power cut, when a test names this place in SAT_CRASH_POINT; else do nothing."""
    if os.environ.get("SAT_CRASH_POINT") == name:
        os.kill(os.getpid(), signal.SIGKILL)
