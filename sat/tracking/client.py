"""MLflow's client, quiet and impatient, and what its sqlite files need."""

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from sat import files
from sat.tracking.store import sqlite_file

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
"""By itself MLflow waits four minutes for a dead server and reports usage to its makers. Values already set win."""


def connect(uri: str) -> Any:
    """MLflow's client; makes a fresh sqlite file first."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    file = sqlite_file(uri)
    if file and not file.exists():
        _create_sqlite(file)
    return MlflowClient(uri, uri)


def artifact_location(uri: str) -> str | None:
    """Beside an sqlite file, where MLflow would take the current folder; a server knows its own place."""
    file = sqlite_file(uri)
    return (file.parent / "mlartifacts").as_uri() if file else None


def store_lock(uri: str) -> contextlib.AbstractContextManager[object]:
    """Of several processes that meet a fresh sqlite file, one makes its tables; the others would crash."""
    file = sqlite_file(uri)
    return contextlib.nullcontext() if file is None else files.locked(Path(f"{file}.lock"))


def reason(error: BaseException) -> str:
    """The first line of what lies at the bottom of MLflow's wrappings, e.g. `Connection refused`."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {error}".partition("\n")[0][:400]


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
