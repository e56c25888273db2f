"""Checkpoints: a folder `step-N` that is complete or ignored.

Whether a checkpoint is good is decided by digests in COMMIT.json, written last, and never by file times; so a
half-written, damaged or foreign folder is passed over by name, and an older whole one is used.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from sat import files
from sat.engine.processes import Processes

FOLDER = re.compile(r"step-(\d+)")
COMMIT = "COMMIT.json"


def save(folder: Path, step: int, processes: Processes, write: Callable[[Path], None], keep: int) -> bool:
    """Commit `folder/step-N` whole or not at all; prune to the newest `keep` (at least 2). All ranks enter.

    `write(path)` runs on every rank and writes this rank's files below `path`. Returns False, with a warning, when any
    rank failed: training may go on with the older checkpoint.
    """
    final = folder / f"step-{step:08d}"
    temporary = processes.broadcast(files.temporary_name(final, folder))
    errors = _errors(processes, (lambda: temporary.mkdir(parents=True)) if processes.is_main else None)
    errors = errors or _errors(processes, lambda: write(temporary))
    errors = errors or _errors(processes, (lambda: _commit(temporary, final, step)) if processes.is_main else None)
    if errors:
        if processes.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            warnings.warn(
                f"checkpoint of step {step} was NOT saved ({'; '.join(errors)}); the older one stays", stacklevel=2
            )
        return False
    if processes.is_main:
        _prune(folder, max(keep, 2))
    return True


def latest(folder: Path) -> Path | None:
    """The whole checkpoint with the greatest step number, or None where there is no checkpoint at all.

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


def begun(folder: Path) -> bool:
    """Whether there is any checkpoint, whole or not."""
    return bool(_checkpoints(folder))


def damage(path: Path) -> str | None:
    """Why the checkpoint `path` must not be used, or None when every byte is as it was written."""
    try:
        commit = json.loads((path / COMMIT).read_text())
        expected = {name: (each["bytes"], each["sha256"]) for name, each in commit["files"].items()}
        step = commit["step"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"no readable {COMMIT} ({type(error).__name__}: {error})"
    if not isinstance(step, int) or path.name != f"step-{step:08d}":
        return f"its {COMMIT} is of step {step!r}"
    if not expected:
        return f"its {COMMIT} names no files"
    for name, (size, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
        if files.sha256(file) != sha256:
            return f"{name} does not have the SHA-256 it was written with"
    return None


def _errors(processes: Processes, action: Callable[[], None] | None) -> list[str]:
    """Run `action` where there is one; every rank learns of every rank's failure, so that nobody hangs."""
    error = None
    try:
        if action:
            action()
    except Exception as caught:  # whatever fails here, a full disk above all, training outlives it
        error = f"rank {processes.rank}: {type(caught).__name__}: {caught}"
    return [each for each in processes.gather(error) if each]


def _commit(temporary: Path, final: Path, step: int) -> None:
    """Digest what all ranks have written, and publish it."""
    written = sorted(path for path in temporary.rglob("*") if path.is_file())
    digests = {
        str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in written
    }
    files.write_json(temporary / COMMIT, {"step": step, "files": digests})
    files.publish_folder(temporary, final)


def _checkpoints(folder: Path) -> list[Path]:
    """Committed or not, newest step first; temporary folders are not among them."""
    named = [(int(match[1]), path) for path in folder.glob("step-*") if (match := FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(named, reverse=True)]


def _prune(folder: Path, keep: int) -> None:
    for path in _checkpoints(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    files.sweep(folder, "step-*")
