"""One training at a time in a run folder, on this machine and on any other that sees the folder.

The lock is a file that names its owner. Whether an owner is dead is asked of the system where it is our own machine;
elsewhere its file is watched for a sign of life, and no two clocks are compared. So it needs no locks of the file
system, which NFS has or has not.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from sat import files
from sat.stopping import START_AGAIN

LOCK = "lock"
BEAT_S = 5.0
"""Seconds between an owner's signs of life."""
PATIENCE_S = 25.0
"""An owner elsewhere that gives none for so long is dead."""


@dataclass(frozen=True)
class Owner:
    """Who trains in a folder: the content of its lock."""

    host: str
    pid: int
    job: str
    """Of Slurm; "" where there is none."""
    since: str
    machine: str
    """Boot of the machine and space of process ids."""
    born: str
    """When the process was, in the machine's own count."""
    token: str

    def __str__(self) -> str:
        job = f", Slurm job {self.job}," if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own the run folder inside; the lock of a dead owner is taken over.

    Raises ValueError that names the owner where it is alive. One that finds itself taken for dead (it was stopped for
    long, say) ends with exit status 75 and touches nothing more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, me, left = folder / LOCK, _myself(), threading.Event()
    while not _create(path, me):
        _refuse_the_living(path, folder)
    thread = threading.Thread(target=_show_life, args=(path, me, left), name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
        if _read(path) == me:
            path.unlink(missing_ok=True)


def living_owner(folder: Path) -> str:
    """Who trains in the run folder, "" where nobody does. Asked of an owner elsewhere it may take `PATIENCE_S`."""
    path = folder / LOCK
    if not path.exists():
        return ""
    owner = _read(path)
    return str(owner or "another process") if _is_alive(path, owner) else ""


def _create(path: Path, me: Owner) -> bool:
    data = json.dumps(asdict(me), indent=1).encode() + b"\n"
    try:
        return files.create(path, data)
    except PermissionError:  # a file system without links
        with contextlib.suppress(FileExistsError), open(path, "xb") as file:
            file.write(data)
            return True
        return False


def _refuse_the_living(path: Path, folder: Path) -> None:
    """Raise ValueError where the lock's owner is alive; else remove its lock, unless somebody else has."""
    owner = _read(path)
    if _is_alive(path, owner):
        raise ValueError(
            f"{folder} is being trained by {owner or 'another process'}: wait for it, stop it (touch {folder}/STOP), "
            "or give another train.run_dir"
        )
    with files.locked(folder / ".lock.guard"):  # of several that judge so, one removes it
        if path.exists() and _read(path) == owner:
            print(f"{folder}: the lock of {owner or 'an unknown process'} is taken over, it is dead", flush=True)
            path.unlink(missing_ok=True)


def _is_alive(path: Path, owner: Owner | None) -> bool:
    if owner is not None and owner.machine == _machine():
        return _born(owner.pid) == owner.born
    print(f"{path} is of {owner or 'an unknown process'}: {PATIENCE_S:g} s to see whether it is alive", flush=True)
    before, until = _last_sign(path), time.monotonic() + PATIENCE_S
    while before and time.monotonic() < until:
        time.sleep(min(1.0, PATIENCE_S / 10))
        if (now := _last_sign(path)) != before:
            return bool(now) and _read(path) is not None
    return False


def _show_life(path: Path, me: Owner, left: threading.Event) -> None:
    while not left.wait(BEAT_S):
        try:
            if not path.exists() and _create(path, me):
                continue  # removed by hand
            if (owner := _read(path)) not in (me, None):
                print(f"error: {path} has been taken over by {owner}; nothing more is written", file=sys.stderr)
                sys.stderr.flush()
                os._exit(START_AGAIN)
            os.utime(path)
        except OSError:
            continue  # a file system that is away for a while


def _read(path: Path) -> Owner | None:
    known = files.read_json(path)
    try:
        return Owner(**known)
    except TypeError:
        return None


def _last_sign(path: Path) -> int:
    """When the owner gave a sign of life, by the file system's clock; 0 without a lock."""
    try:
        with open(path, "rb") as file:  # opening asks a server anew
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _myself() -> Owner:
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        machine=_machine(),
        born=_born(os.getpid()),
        token=uuid4().hex,
    )


def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str:
    """When a process was born, in ticks since the machine's start; "" for one that is dead."""
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in ("Z", "X") else values[18]
