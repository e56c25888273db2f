"""Bring a run folder's journal and artifacts to MLflow: `sat sync RUN`, at any time, repeatedly.

MLflow is asked what it has and gets what is missing, so nothing is lost or sent twice, whatever broke when. Of a
step that was taken again after a crash MLflow keeps the first point; the journal has the one that
counts.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sat import files
from sat.cli import run_program
from sat.tracking.journal import ARTIFACTS, JOURNAL, SETTINGS, UPLOADED, entries

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
"""By itself MLflow waits four minutes for a dead server and reports usage to its makers. Values already set win."""

KEY_TAG = "sat.run_folder"
"""Tag that names our run on the server: it is found again even when the answer to its creation was lost."""
POINTS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
LONGEST_PARAM = 6000
"""Limits of MLflow's interface; the last in characters."""
SEND_EVERY_S = 1.0
LONGEST_RETRY_S = 60.0
LAST_WORDS_S = 10
"""Time to finish after the training has died without a word."""


def sync(run_dir: str | os.PathLike[str]) -> int:
    """Send MLflow all it lacks of the run, now; returns the number of points and artifacts sent.

    Raises ValueError for a folder without tracking settings and for one whose own uploader is at work, and whatever
    MLflow raises when it cannot be reached.
    """
    folder = Path(run_dir).resolve()
    settings = files.read_json(folder / SETTINGS)
    if not settings:
        raise ValueError(f"{folder} has no {SETTINGS}: it is no run folder, or the run had tracking.mlflow_uri=none")
    with _run_lock(folder) as mine:
        if not mine:
            raise ValueError(f"{folder} is being uploaded by another process; its training is still running")
        uploader = Uploader(folder, settings)
        sent = uploader.send()
        if settings["status"]:
            uploader.mark(settings["status"], settings.get("ended"))
    return sent


def follow(folder: Path, parent: int) -> None:
    """Keep MLflow up to date until the training (process `parent`) closes its tracker or dies. Raises nothing."""
    uploader, failures = None, 0
    while True:
        settings, alive = files.read_json(folder / SETTINGS), os.getppid() == parent
        last = not alive or settings.get("status") is not None
        if not alive:
            signal.alarm(LAST_WORDS_S)
        try:
            if uploader is None:
                uploader = Uploader(folder, settings)
                uploader.mark("RUNNING")
            sent = uploader.send()
            if last:
                uploader.mark(settings.get("status") or "FAILED", settings.get("ended"))
            if failures:
                _say(f"MLflow answers again; {sent} points and artifacts caught up")
            failures = 0
        except Exception as error:  # whatever it is, the journal has everything
            if not failures:
                _say(f"no MLflow at {settings.get('uri')}: {reason(error)}; {JOURNAL} keeps everything")
            uploader, failures = None, failures + 1
        if last:
            if failures:
                _say(f"MLflow lacks a part of this run; catch up: sat sync {folder}")
            return
        _pause(folder, parent, min(SEND_EVERY_S * 2 ** min(failures, 10), LONGEST_RETRY_S))


class Uploader:
    """A connection to one run. Every method raises what MLflow raises; after that, go on with a new Uploader."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Find or make the experiment and the run, send its params, and learn which points it has."""
        self._folder, self._settings = folder, settings
        with _store_lock(settings["uri"]):
            self._client = connect(settings["uri"])
            run = self._find_or_create_run()
        self._run_id = run.info.run_id
        self._offset = 0
        self._has = {
            name: {point.step for point in self._client.get_metric_history(self._run_id, name)}
            for name in run.data.metrics
        }
        uploaded = files.read_json(folder / UPLOADED)
        known = (uploaded.get("uri"), uploaded.get("run_id")) == (settings["uri"], self._run_id)
        self._artifacts = uploaded["artifacts"] if known else 0
        self._remember()
        self._send_params(run)

    def send(self) -> int:
        """Send what was journalled since the last call and MLflow has not; the number of points and artifacts sent."""
        return self._send_points() + self._send_artifacts()

    def mark(self, status: str, ended: float | None = None) -> None:
        """Set the run's status: RUNNING, or FINISHED, FAILED or KILLED at `ended` (s since 1970; default now)."""
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status, end_time=round((ended or time.time()) * 1000))

    def _find_or_create_run(self) -> Any:
        from mlflow.exceptions import MlflowException

        settings = self._settings
        experiment = self._client.get_experiment_by_name(settings["experiment"])
        if experiment is None:
            with contextlib.suppress(MlflowException):  # another run may have been first
                self._client.create_experiment(settings["experiment"], _artifact_location(settings["uri"]))
            experiment = self._client.get_experiment_by_name(settings["experiment"])
        found = self._client.search_runs([experiment.experiment_id], f"tags.`{KEY_TAG}` = '{settings['key']}'")
        if found:
            return found[0]
        return self._client.create_run(
            experiment.experiment_id,
            start_time=round(settings["started"] * 1000),
            tags={KEY_TAG: settings["key"], "sat.folder": str(self._folder)},
            run_name=settings["run_name"],
        )

    def _send_params(self, run: Any) -> None:
        """Log new params. MLflow refuses a second value for a known one: that becomes the tag `resumed.NAME`."""
        from mlflow.entities import Param

        params = {name: value[:LONGEST_PARAM] for name, value in sorted(self._settings["params"].items())}
        new = [Param(name, value) for name, value in params.items() if name not in run.data.params]
        for first in range(0, len(new), PARAMS_PER_REQUEST):
            self._client.log_batch(self._run_id, params=new[first : first + PARAMS_PER_REQUEST])
        for name, value in params.items():
            before = run.data.tags.get(f"resumed.{name}", run.data.params.get(name, value))
            if before != value:
                self._client.set_tag(self._run_id, f"resumed.{name}", value)

    def _send_points(self) -> int:
        sent = 0
        for points, end in self._batches():
            if points:
                self._client.log_batch(self._run_id, metrics=points)
            self._offset = end
            sent += len(points)
        return sent

    def _batches(self) -> Iterator[tuple[list[Any], int]]:
        """(points that MLflow lacks, where they end in the journal), about `POINTS_PER_REQUEST` at a time."""
        from mlflow.entities import Metric

        points: list[Any] = []
        end = self._offset
        with contextlib.suppress(FileNotFoundError), open(self._folder / JOURNAL, "rb") as file:
            file.seek(self._offset)
            for entry, entry_end in entries(file):
                step, moment = entry.pop("step"), round(entry.pop("time") * 1000)
                values = {k: v for k, v in entry.items() if v is not None and step not in self._has.get(k, ())}
                if len(points) + len(values) > POINTS_PER_REQUEST:
                    yield points, end
                    points = []
                points += [Metric(name, value, moment, step) for name, value in values.items()]
                end = entry_end
        yield points, end

    def _send_artifacts(self) -> int:
        try:
            lines = (self._folder / ARTIFACTS).read_text().splitlines()
        except FileNotFoundError:
            return 0
        waiting = lines[self._artifacts :]
        for line in waiting:
            entry = json.loads(line)
            path = self._folder / entry["path"]
            if path.is_dir():
                self._client.log_artifacts(self._run_id, str(path), entry["folder"] or None)
            elif path.is_file():
                self._client.log_artifact(self._run_id, str(path), entry["folder"] or None)
            else:
                _say(f"artifact {path} is gone")
            self._artifacts += 1
            self._remember()
        return len(waiting)

    def _remember(self) -> None:
        uploaded = {"uri": self._settings["uri"], "run_id": self._run_id, "artifacts": self._artifacts}
        files.write_json(self._folder / UPLOADED, uploaded)


def connect(uri: str) -> Any:
    """MLflow's client; makes a fresh sqlite file first."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    file = _sqlite_file(uri)
    if file and not file.exists():
        _create_sqlite(file)
    return MlflowClient(uri, uri)


def _create_sqlite(file: Path) -> None:
    """Make MLflow's tables: all or none, even if we are killed, and without its hundreds of waits for the disk."""
    from mlflow.tracking import MlflowClient
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def hurry(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", hurry)
    try:
        with files.replacing(file) as temporary:
            uri = f"sqlite:///{temporary}"
            MlflowClient(uri, uri).search_experiments(max_results=1)
    finally:
        event.remove(Engine, "connect", hurry)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _artifact_location(uri: str) -> str | None:
    """Beside an sqlite file, where MLflow would take the current folder; a server knows its own place."""
    file = _sqlite_file(uri)
    return (file.parent / "mlartifacts").as_uri() if file else None


def _store_lock(uri: str) -> contextlib.AbstractContextManager[object]:
    """Of several processes that meet a fresh sqlite file, one makes its tables; the others would crash."""
    file = _sqlite_file(uri)
    return contextlib.nullcontext() if file is None else files.locked(Path(f"{file}.lock"))


def _run_lock(folder: Path) -> contextlib.AbstractContextManager[bool]:
    """Yields whether this process is now the only one that uploads the run."""
    return files.locked(folder / ".mlflow.lock", wait=False)


def _pause(folder: Path, parent: int, seconds: float) -> None:
    """Wait, but not longer than the training lives."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and os.getppid() == parent and not files.read_json(folder / SETTINGS).get("status"):
        time.sleep(min(0.25, seconds))


def reason(error: BaseException) -> str:
    """The first line of what lies at the bottom of MLflow's wrappings, e.g. `Connection refused`."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main(
    run: Annotated[Path, typer.Argument(help="run folder")],
    parent: Annotated[int, typer.Option(help="follow the run while this process lives", hidden=True)] = 0,
) -> None:
    """Bring a run folder's metrics and artifacts to MLflow; what is there already is not sent twice."""
    folder = run.resolve()
    if not parent:
        try:
            print(f"{sync(folder)} points and artifacts sent")
        except ValueError:
            raise
        except Exception as error:  # of MLflow and what lies below it
            raise ValueError(reason(error)) from error
        return None
    while os.getppid() == parent:  # the uploader of the run's previous life may be at its last words
        with _run_lock(folder) as mine:
            if mine:
                return follow(folder, parent)
        time.sleep(0.25)
    return None


if __name__ == "__main__":
    run_program(main)
