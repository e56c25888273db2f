"""What the tests of the journal and of its way to MLflow share: stand-ins for the uploader, and both sides' points."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from sat.tracking import journal as tracking
from sat.tracking.client import connect
from sat.tracking.journal import read_journal
from sat.tracking.mlflow import follow

ROOT = Path(__file__).resolve().parents[1]


class ThreadUploader:
    """Stands for the uploader's process where a test has no use for a second import of MLflow."""

    def __init__(self, command, **_):
        self._thread = threading.Thread(target=follow, args=(Path(command[4]), os.getppid()), daemon=True)
        self._thread.start()

    def wait(self, timeout):
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the uploader did not end in time"

    def poll(self):
        return None if self._thread.is_alive() else 0


class NoUploader:
    """Stands for an uploader that never gets anywhere."""

    def __init__(self, *_, **__):
        pass

    def wait(self, timeout):
        pass

    def poll(self):
        pass


def replace_uploader(patch, uploader) -> None:
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    patch.setattr(tracking, "subprocess", SimpleNamespace(Popen=uploader, **names))


def client(uri: str):
    connect(uri)  # sets MLflow's environment
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def points_of_journal(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value; fails where one is there twice."""
    pairs = [
        ((name, entry["step"]), value)
        for entry in read_journal(folder)
        for name, value in entry.items()
        if name not in ("step", "time") and value is not None
    ]
    assert not [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return dict(pairs)


def points_of_mlflow(uri: str, run_id: str) -> dict[tuple[str, int], float]:
    server = client(uri)
    pairs = [
        ((name, point.step), point.value)
        for name in server.get_run(run_id).data.metrics
        for point in server.get_metric_history(run_id, name)
    ]
    assert not [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return dict(pairs)


def wait_for(condition, seconds: float = 60, every: float = 0.05) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(every)


def run_python(script: str, *arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)
