"""A run folder's way into MLflow, once the run is found there.

MLflow is asked what it has and gets what is missing, so nothing is lost or sent twice, whatever broke when. Of a
step that was taken again after a crash MLflow keeps the first point; the journal has the one that
counts.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sat import files
from sat.tracking import child
from sat.tracking.client import connect, store_lock
from sat.tracking.journal import ARTIFACTS, JOURNAL, SYSTEM, entries
from sat.tracking.placing import find_or_create, lacking_inputs, run_lock
from sat.tracking.record import UPLOADED, Record

POINTS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
LONGEST_VALUE = 5000
"""Limits of MLflow's interface; the last in characters, of a tag (a param may be 1,000 longer)."""
MODEL_TIMEOUT_S = 900.0
"""A model of some hundred MB may take long to a server; nobody waits for it but `sat sync`."""


MODEL_TAG = "sat.model"
"""Of the run: what was logged last of the best model, `model STEP` or `files STEP`."""
REGISTERED_TAG = "sat.model.registered"
"""Of the run: NAME STEP of what was registered last."""


class Uploader:
    """A connection to one run. Every method raises what MLflow raises; after that, go on with a new Uploader."""

    def __init__(self, folder: Path, record: Record) -> None:
        """Find or make the experiment and the run, send its params, and learn which points it has."""
        self._folder, self._record = folder, record
        parent = parent_run(folder / record.parent, record.uri) if record.parent else ""  # it takes the lock itself
        with store_lock(record.uri):
            self._client = connect(record.uri)
            run = find_or_create(self._client, folder, record, parent)
        self.run_id: str = run.info.run_id
        self._offsets = dict.fromkeys((JOURNAL, SYSTEM), 0)
        self._has = {
            name: {point.step for point in self._client.get_metric_history(self.run_id, name)}
            for name in run.data.metrics
        }
        known, artifacts = record.uploaded(folder)
        self._artifacts = artifacts if known == self.run_id else 0
        self._remember()
        self._describe(run)

    def send(self, model: bool = True) -> int:
        """Send what was journalled since the last call and MLflow has not; the number of points and artifacts sent.

        `model`: the model too, which takes its time.
        """
        return self._send_points(JOURNAL) + self._send_points(SYSTEM) + self._send_artifacts(model)

    def mark(self, status: str, ended: float | None = None) -> None:
        """Set the run's status: RUNNING, or FINISHED, FAILED or KILLED at `ended` (s since 1970; default now)."""
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status, end_time=round((ended or time.time()) * 1000))

    def log_model(self) -> None:
        """Have the best model logged as an MLflow model, unless it is there: by a process, for torch is heavy."""
        about, register = files.read_json(self._folder / "best" / "config.json"), self._record.register
        tags = self._client.get_run(self.run_id).data.tags
        there = not register or tags.get(REGISTERED_TAG) == f"{register} {about.get('step')}"
        if not (about and self._record.encoder_weights) or (there and tags.get(MODEL_TAG) == f"model {about['step']}"):
            return
        given = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_HTTP_")}
        module, arguments = "sat.tracking.log_model", (str(self._folder), self.run_id)
        try:
            done = child.ask(module, *arguments, timeout_s=MODEL_TIMEOUT_S, given=given)
        except subprocess.TimeoutExpired:
            raise OSError(f"the model was not logged within {MODEL_TIMEOUT_S:.0f} s") from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise OSError(f"the model was not logged: {said[-1]}")
        if done.stdout:
            print(done.stdout, end="", file=sys.stderr, flush=True)

    def _describe(self, run: Any) -> None:
        """Log params, tags and data sets that are new.

        A second value of a param, which MLflow refuses, or of a tag becomes the tag `resumed.NAME`.
        """
        from mlflow.entities import Param, RunTag

        record = self._record
        params = {name: value[:LONGEST_VALUE] for name, value in sorted(record.params.items())}
        tags = {name: value[:LONGEST_VALUE] for name, value in sorted(record.tags.items())}
        new = [Param(name, value) for name, value in params.items() if name not in run.data.params]
        for first in range(0, len(new), PARAMS_PER_REQUEST):
            self._client.log_batch(self.run_id, params=new[first : first + PARAMS_PER_REQUEST])
        lacking = {name: value for name, value in tags.items() if name not in run.data.tags}
        lacking |= _resumed(run, {**run.data.params, **run.data.tags}, params | tags)
        if lacking:
            self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in lacking.items()])
        if inputs := lacking_inputs(run, record.inputs):
            self._client.log_inputs(self.run_id, inputs)

    def _send_points(self, name: str) -> int:
        sent = 0
        for points, end in self._batches(name):
            if points:
                self._client.log_batch(self.run_id, metrics=points)
            self._offsets[name] = end
            sent += len(points)
        return sent

    def _batches(self, name: str) -> Iterator[tuple[list[Any], int]]:
        """(points that MLflow lacks, where they end in the journal), about `POINTS_PER_REQUEST` at a time."""
        from mlflow.entities import Metric

        points: list[Any] = []
        end = self._offsets[name]
        with contextlib.suppress(FileNotFoundError), open(self._folder / name, "rb") as file:
            file.seek(end)
            for entry, entry_end in entries(file):
                step, moment = entry.pop("step"), round(entry.pop("time") * 1000)
                values = {k: v for k, v in entry.items() if v is not None and step not in self._has.get(k, ())}
                if len(points) + len(values) > POINTS_PER_REQUEST:
                    yield points, end
                    points = []
                points += [Metric(name, value, moment, step) for name, value in values.items()]
                end = entry_end
        yield points, end

    def _send_artifacts(self, model: bool) -> int:
        try:
            lines = (self._folder / ARTIFACTS).read_text().splitlines()
        except FileNotFoundError:
            return 0
        sent = 0
        for line in lines[self._artifacts :]:
            entry = json.loads(line)
            if "model" in entry:
                if model:  # else it is left to `sat sync`, which asks for it each time
                    self.log_model()
            else:
                self._send_file(self._folder / entry["path"], entry["folder"] or None)
            sent += 1
            self._artifacts += 1
            self._remember()
        return sent

    def _send_file(self, path: Path, folder: str | None) -> None:
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder)
        elif path.is_file():
            self._client.log_artifact(self.run_id, str(path), folder)
        else:
            print(f"artifact {path} is gone", file=sys.stderr, flush=True)

    def _remember(self) -> None:
        where = {"key": self._record.key, "uri": self._record.uri, "run_id": self.run_id}
        files.write_json(self._folder / UPLOADED, where | {"artifacts": self._artifacts})


def parent_run(folder: Path, uri: str) -> str:
    """MLflow's id of the run that an evaluation is about, which is made there if need be; "" where it has none.

    Raises OSError where its training is about to make it.
    """
    folder = folder.resolve()
    record = Record.of_folder(folder)
    if record is None or record.uri != uri:
        return ""
    run_id, _ = record.uploaded(folder)
    if run_id:
        return run_id
    with run_lock(folder) as mine:
        if not mine:
            raise OSError(f"the MLflow run of {folder} is not there yet")
        return Uploader(folder, record).run_id


def _resumed(run: Any, first: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """The tags `resumed.NAME` of what differs from what is known."""
    known = run.data.tags
    return {
        f"resumed.{name}": value
        for name, value in now.items()
        if known.get(f"resumed.{name}", first.get(name, value)) != value
    }
