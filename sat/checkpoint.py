"""Checkpoints: a folder `step-N` that is complete or ignored.

The surprise: whether a checkpoint is good is decided by digests in COMMIT.json, written last, and never by file times; so
a half-written, damaged or foreign folder is passed over by name, and an older whole one is used.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

from sat.engine.processes import Runtime

FOLDER = re.compile(r"step-(\d+)")
COMMIT = "COMMIT.json"


def save(folder: Path, step: int, runtime: Runtime, write: Callable[[Path], None], keep: int) -> bool:
    """Commit `folder/step-N` whole or not at all; prune to the newest `keep` (at least 2). All ranks enter.

    `write(path)` runs on every rank and writes this rank's files below `path`. Returns False, with a warning, when any
    rank failed: training may go on with the older checkpoint.
    """
    temporary = folder / runtime.broadcast(f"step-{step:08d}.tmp-{uuid.uuid4().hex[:8]}")
    errors = _errors(runtime, (lambda: temporary.mkdir(parents=True)) if runtime.is_main else None)
    errors = errors or _errors(runtime, lambda: write(temporary))
    if not errors:
        final = folder / f"step-{step:08d}"
        errors = _errors(runtime, (lambda: _commit(temporary, final, step)) if runtime.is_main else None)
    if errors:
        if runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            warnings.warn(
                f"checkpoint of step {step} was NOT saved ({'; '.join(errors)}); the older one stays", stacklevel=2
            )
        return False
    if runtime.is_main:
        _prune(folder, max(keep, 2))
    return True


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint by step number, or None where there is none at all.

    Damaged ones are named in a warning and passed over. Raises ValueError when every one is damaged: starting afresh
    would silently throw the training away.
    """
    found = _checkpoints(folder)
    for path in found:
        if not (reason := damage(path)):
            return path
        warnings.warn(f"checkpoint {path} is passed over: {reason}", stacklevel=2)
    if found:
        raise ValueError(
            f"all {len(found)} checkpoints in {folder} are damaged; restore one, or remove the folder to start afresh"
        )
    return None


def damage(path: Path) -> str | None:
    """Why the checkpoint `path` must not be used, or None when every byte is as it was written."""
    try:
        files = json.loads((path / COMMIT).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable {COMMIT} ({error})"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} does not have the SHA-256 it was written with"
    return None


def write_json(path: Path, value: object) -> None:
    """Write JSON so that `path` holds the old or the new text at any kill point."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    _fsync(temporary)
    os.replace(temporary, path)


def _errors(runtime: Runtime, action: Callable[[], None] | None) -> list[str]:
    """Run `action` where there is one; every rank learns of every rank's failure, so that nobody hangs."""
    error = None
    try:
        if action:
            action()
    except Exception as caught:  # whatever fails here, a full disk above all, training outlives it
        error = f"rank {runtime.rank}: {type(caught).__name__}: {caught}"
    return [each for each in runtime.gather(error) if each]


def _commit(temporary: Path, final: Path, step: int) -> None:
    """Sync, hash, and rename as the last act."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        _fsync(path)
    digests = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    write_json(temporary / COMMIT, {"step": step, "files": digests})
    _fsync(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    _fsync(final.parent)


def _checkpoints(folder: Path) -> list[Path]:
    """Committed or not, newest step first; temporary folders are not among them."""
    named = [(int(match[1]), path) for path in folder.glob("step-*") if (match := FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(named, reverse=True)]


def _prune(folder: Path, keep: int) -> None:
    for path in [*_checkpoints(folder)[keep:], *folder.glob("step-*.tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
