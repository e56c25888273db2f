"""Checkpoints: a folder `step-N` that is complete or ignored, written while training goes on.

Whether a checkpoint is good is decided by digests in COMMIT.json, written last, and never by file times; so a
half-written, damaged or foreign folder is passed over by name, and an older whole one is used. It holds safetensors
and JSON alone: nothing in it is ever executed.
"""

import json
import re
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat import files
from sat.engine.processes import Processes
from sat.train_state import TrainState

FOLDER = re.compile(r"step-(\d+)")
COMMIT = "COMMIT.json"
CANDIDATE = "candidate"
"""What the tensors of a model are called that is still being scored (`sat.train_state.Unscored`)."""
FILES = {
    "model.safetensors": "weights/",
    "average.safetensors": "average/",
    "candidate.safetensors": f"{CANDIDATE}/",
    "optimizer.safetensors": "",
}
"""File -> what the names of its tensors begin with; that is left out in the file. The last holds all others."""


@dataclass(frozen=True)
class SaveResult:
    """How a save ended."""

    step: int
    error: str = ""
    """Why nothing was saved; the older checkpoints stay."""


@dataclass
class Saver:
    """One per run on every rank. At most one save is under way; the next one waits for it."""

    folder: Path
    processes: Processes
    keep: int
    """Newest checkpoints kept, at least two."""
    _thread: threading.Thread | None = None
    _ended: list[SaveResult] = field(default_factory=list)
    """Not yet told, oldest first."""

    def begin(self, step: int, tensors: Mapping[str, Tensor], state: TrainState) -> None:
        """Start to commit `step-N` of these tensors on the host, which nobody may change. All ranks enter.

        Rank 0 writes in a thread and prunes afterwards; only a save that is still under way is waited for.
        """
        self._join()
        if not self.processes.is_main:
            return
        self._thread = threading.Thread(target=self._write, args=(step, tensors, state), name=f"save step {step}")
        self._thread.start()

    def poll(self) -> list[SaveResult]:
        """Rank 0's saves that have ended since the last call; never waits. The other ranks get []."""
        told: list[SaveResult] = []
        while self._ended:
            told.append(self._ended.pop(0))
        return told

    def wait(self) -> list[SaveResult]:
        """No save is under way any more; those that have ended since the last call, on every rank. All ranks enter."""
        self._join()
        return self.processes.broadcast(self.poll())

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, tensors: Mapping[str, Tensor], state: TrainState) -> None:
        try:
            _save(self.folder, step, tensors, state)
            _prune(self.folder, max(self.keep, 2))
            self._ended.append(SaveResult(step))
        except Exception as error:  # whatever fails here, a full disk above all, training outlives it
            self._ended.append(SaveResult(step, f"{type(error).__name__}: {error}"))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a whole checkpoint (see `damage`) by name, mapped from its files."""
    return {
        f"{prefix}{name}": value
        for file, prefix in FILES.items()
        if (path / file).is_file()
        for name, value in load_file(path / file).items()
    }


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


def _save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: TrainState) -> None:
    """Commit `folder/step-N` whole or not at all."""
    if spoilt := [name for name, value in tensors.items() if not _is_finite(value)]:
        raise ValueError(f"not finite: {', '.join(spoilt)}")
    final = folder / f"step-{step:08d}"
    temporary = files.temporary_name(final, folder)
    temporary.mkdir(parents=True)
    try:
        for name, content in _by_file(tensors).items():
            with files.replacing(temporary / name) as file:
                save_file(content, file)
        state.write(temporary)
        _commit(temporary, final, step)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_finite(value: Tensor) -> bool:
    """Whether all numbers are; their sum is only then, which costs a tenth of looking at each beside the training."""
    return bool(torch.isfinite(value.sum()) or torch.isfinite(value).all())


def _by_file(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        file, prefix = next((file, prefix) for file, prefix in FILES.items() if name.startswith(prefix))
        found.setdefault(file, {})[name.removeprefix(prefix)] = value
    return found


def _commit(temporary: Path, final: Path, step: int) -> None:
    """Digest what was written, and publish it."""
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
