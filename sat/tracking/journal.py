"""Record a run: `metrics.jsonl` in its folder always, MLflow beside it.

The journal is the truth and also the queue: `log` appends one line and returns, and a separate process
(`sat.tracking.mlflow`) follows the file. So MLflow costs the training neither memory, nor a lock, nor time, its import
included; whatever a dead server missed is still in the journal when it returns.
"""

import contextlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from sat import stopping
from sat.config import TrackingConfig
from sat.tracking import child
from sat.tracking.provenance import provenance
from sat.tracking.record import DataInput, Record
from sat.tracking.store import store_of

JOURNAL = "metrics.jsonl"
SYSTEM = "system.jsonl"
"""A journal of the machine's load, which the uploader writes."""
ARTIFACTS = "artifacts.jsonl"
"""What is to be copied into the MLflow run; a line is {path, folder}, or {model} for the best model."""

Entry = dict[str, Any]
"""A line of the journal: step (int), time (s since 1970), and values by name (float or None)."""

CLOSE_TIMEOUT_S = 60.0
"""For a server that answers; one that does not ends the wait within seconds."""
STOPPED_TIMEOUT_S = 5.0
"""After a wish to stop: a preemption leaves little time, and the journal has everything."""
REVIVALS = 3
"""So often an uploader that has died (out of memory, say) is started again."""
MAX_PENDING_BYTES = 1 << 20
"""Lines kept in memory while the disk takes none."""

_NAME = re.compile(r"\w[\w\-. :]*(/\w[\w\-. :]*)*")
_log = logging.getLogger(__name__)


class Tracker:
    """The journal of one run. Rank 0 only; construct it again with the same folder to continue the run."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        tracking: TrackingConfig,
        params: Mapping[str, object] | None = None,
        resume_step: int = 0,
        redone: str = "",
        inputs: Sequence[DataInput] = (),
        parent: Path | None = None,
    ) -> None:
        """Open or continue `run_dir`. Lines of steps after `resume_step` are dropped: the steps will be taken again.

        `redone`: so are lines of that step with names that begin so. `parent`: this is an evaluation of the run in that
        folder, and nested in its MLflow run.

        A start at step 0 is a new MLflow run, with `params` and `inputs`; after any other step that of the folder goes
        on, unless the folder is a copy. Raises OSError for a folder that cannot be written. An MLflow that cannot be
        reached raises nothing, here or later.
        """
        self._folder = Path(run_dir).resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        drop_after(self._folder / JOURNAL, resume_step, redone)
        if not resume_step:
            for name in (ARTIFACTS, SYSTEM):
                (self._folder / name).unlink(missing_ok=True)
        self._file = os.open(self._folder / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size
        self._pending = b""
        self._uploader: subprocess.Popen[bytes] | None = None
        self._revived = 0
        self._record: Record | None = None
        before = (Record.of_folder(self._folder) if resume_step else None) or Record(started=time.time())
        store = store_of(tracking, self._folder if parent is None else parent, before.uri)
        for said in (store.said, store.problem):
            if said and parent is None:
                print(said, file=sys.stderr, flush=True)
        if store.uri:
            about = replace(before.here(self._folder), uri=store.uri, inputs=tuple(inputs), status="", ended=None)
            named = {_checked(name): str(value) for name, value in (params or {}).items()}
            self._record = replace(_asked(about, tracking, parent), params=named, tags=provenance())
            self._start_uploader(self._record)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until the server has been reached for the first time."""
        return (self._record.uploaded(self._folder)[0] or None) if self._record else None

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append one line {step, time, values}; None is null. Never waits for MLflow.

        A full disk is a warning: lines wait in memory for the next call, at most `MAX_PENDING_BYTES` of them.
        Raises ValueError for a name that MLflow would refuse.
        """
        numbers = {_checked(name): _number(value) for name, value in values.items()}
        entry = {"step": int(step), "time": round(time.time(), 3), **numbers}
        self._pending += json.dumps(entry).encode() + b"\n"
        self._revive_uploader()
        try:
            self._append()
        except OSError as error:
            _log.warning("%s: %s; %d bytes are kept in memory", self._folder / JOURNAL, error, len(self._pending))
            while len(self._pending) > MAX_PENDING_BYTES:
                self._pending = self._pending.partition(b"\n")[2]

    def artifact(self, path: str | os.PathLike[str], folder: str = "") -> None:
        """Have a file or folder copied into `folder` of the MLflow run. It is read later: replace it atomically."""
        self._note({"path": os.path.relpath(Path(path).resolve(), self._folder), "folder": folder})

    def model(self) -> None:
        """Have the run's best model logged as an MLflow model, as it is when the uploader comes to it."""
        self._note({"model": "best"})

    def flush(self) -> None:
        """Put the journal on the disk, so that it survives the machine; call it before a checkpoint is committed."""
        try:
            self._append()
            os.fsync(self._file)
        except OSError as error:
            _log.warning("%s: %s", self._folder / JOURNAL, error)

    def close(self, status: str = "FINISHED", patience_s: float = CLOSE_TIMEOUT_S) -> None:
        """End this life of the run as FINISHED, FAILED or KILLED; waits at most `patience_s` for MLflow."""
        self.flush()
        os.close(self._file)
        if self._uploader is None or self._record is None:
            return
        try:
            self._record = replace(self._record, status=status, ended=time.time())
            self._record.write(self._folder)
            self._revive_uploader()
            if self._uploader.wait(patience_s):
                raise OSError(f"its uploader ended with exit status {self._uploader.returncode}")
        except (OSError, subprocess.TimeoutExpired) as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._uploader.pid, signal.SIGKILL)  # and what it has started
            self._uploader.wait()
            _log.warning("MLflow is behind (%s); catch up: sat sync %s", error, self._folder)

    def _note(self, artifact: Mapping[str, str]) -> None:
        try:
            with open(self._folder / ARTIFACTS, "a") as file:
                file.write(json.dumps(artifact) + "\n")
        except OSError as error:
            _log.warning("%s is not recorded as an artifact: %s", next(iter(artifact.values())), error)

    def _revive_uploader(self) -> None:
        if self._record is None or self._uploader is None or not self._uploader.poll() or self._revived == REVIVALS:
            return
        self._revived += 1
        _log.warning("the MLflow uploader has ended with exit status %d, starting it again", self._uploader.returncode)
        self._start_uploader(self._record)

    def _append(self) -> None:
        """Write what is pending, whole lines or nothing."""
        view = memoryview(self._pending)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(self._pending)
        self._pending = b""

    def _start_uploader(self, record: Record) -> None:
        command = child.command("sat.tracking.mlflow", str(self._folder), "--parent", str(os.getpid()))
        try:
            record.write(self._folder)
            # the wish to stop is not for it, by whatever way it comes; it ends when its parent does
            with stopping.held():
                self._uploader = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, env=child.environment(), start_new_session=True
                )
        except OSError as error:
            _log.warning("no MLflow for this run: %s", error)


def add_artifact(run: Path, path: Path, folder: str = "") -> None:
    """Have a file copied into `folder` of a run's MLflow run, now or by the uploader of its training, if that goes on.

    The run's journal and status stay as they are. An MLflow that cannot be reached is a warning.
    """
    run = run.resolve()
    if (record := Record.of_folder(run)) is None:
        return
    line = json.dumps({"path": os.path.relpath(path.resolve(), run), "folder": folder})
    with open(run / ARTIFACTS, "a") as file:
        file.write(line + "\n")
    if not record.status:
        return
    try:
        done = child.ask("sat.tracking.mlflow", str(run), "--no-model", timeout_s=CLOSE_TIMEOUT_S)
        reason = done.stderr.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"no answer within {CLOSE_TIMEOUT_S:.0f} s"
    if reason:
        _log.warning("MLflow is behind (%s); catch up: sat sync %s", reason, run)


def _asked(record: Record, tracking: TrackingConfig, parent: Path | None) -> Record:
    """The record with what the settings ask for; `parent` is the run that this is an evaluation of."""
    folder = Path(record.folder)
    return replace(
        record,
        experiment=tracking.experiment,
        run_name=folder.name if parent else tracking.run_name or folder.name,
        parent=os.path.relpath(parent.resolve(), folder) if parent else "",
        system_metrics=tracking.system_metrics and not parent,
        encoder_weights=os.path.abspath(tracking.encoder_weights) if tracking.log_model and not parent else "",
        register=tracking.register,
    )


def read_journal(run_dir: str | os.PathLike[str]) -> list[Entry]:
    """The entries of a run's journal: step (int), time (s since 1970), values (float or None), in order of writing."""
    path = Path(run_dir) / JOURNAL
    with open(path, "rb") as file:
        return [entry for entry, _ in entries(file)]


def entries(file: IO[bytes]) -> Iterator[tuple[Entry, int]]:
    """(entry, offset of its end) from a journal open for binary reading, from where it stands to its last whole line.

    Lines that are no entries are skipped: a damaged line must not cost the others.
    """
    end = file.tell()
    for line in file:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        entry = _parse(line)
        if entry is not None:
            yield entry, end


def drop_after(path: Path, step: int, redone: str = "") -> None:
    """Cut the journal behind its last whole line whose step is at most `step`. A missing journal is an empty one.

    `redone`: also before the first line of that step with names that begin so.

    One truncation, so it can neither be interrupted nor need room on the disk: within a journal steps only grow.
    """
    if not path.exists():
        return
    keep = 0
    with open(path, "rb+") as file:
        for entry, end in entries(file):
            again = redone and entry["step"] == step and any(name.startswith(redone) for name in entry)
            if again or entry["step"] > step:
                break
            keep = end
        file.truncate(keep)


def _parse(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
        return {name: value if name == "step" or value is None else float(value) for name, value in entry.items()}
    except (ValueError, TypeError, AttributeError):
        return None


def _checked(name: str) -> str:
    """MLflow refuses other names (`Recall@5`, say), with all that is sent together with them."""
    if not _NAME.fullmatch(name) or name in ("step", "time"):
        raise ValueError(f"{name!r} cannot name a metric or param: use letters, digits, `_-. :`, and / between words")
    return name


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinities: they become the strings that `float` understands."""
    value = None if value is None else float(value)
    return value if value is None or math.isfinite(value) else str(value)
