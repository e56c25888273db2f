"""Which MLflow a run's figures go to."""

import os
from dataclasses import dataclass
from pathlib import Path

from sat.config import TrackingConfig, refuse_store
from sat.credentials import shown

VARIABLE = "MLFLOW_TRACKING_URI"
"""MLflow's own variable: where figures go that the settings do not send anywhere."""


@dataclass(frozen=True)
class Store:
    """The MLflow that a run's figures go to."""

    uri: str
    """Empty: none."""
    said: str = ""
    """Where the address is from, if not from the settings."""
    problem: str = ""
    """Why the one that the environment names is not used."""


def store_of(tracking: TrackingConfig, folder: Path, before: str = "") -> Store:
    """What `tracking.mlflow_uri` names; where it is empty MLFLOW_TRACKING_URI, else `mlflow.db` beside the folder.

    `before`: the store of the run's earlier lives; a server stays the run's own until another one is named.
    """
    if tracking.mlflow_uri:
        return Store("" if tracking.mlflow_uri == "none" else _absolute_uri(tracking.mlflow_uri))
    own, named = f"sqlite:///{folder.resolve().parent / 'mlflow.db'}", os.environ.get(VARIABLE, "")
    if not named:
        return Store(before if before and not before.startswith("sqlite:") else own)
    try:
        refuse_store(named, VARIABLE)
    except ValueError as error:
        return Store(own, problem=f"warning: {error}; MLflow is kept in {own}")
    said = f"MLflow: {shown(named)}, as {VARIABLE} says (tracking.mlflow_uri is empty)"
    return Store("" if named == "none" else _absolute_uri(named), said)


def sqlite_file(uri: str) -> Path | None:
    """The file that an address names; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _absolute_uri(uri: str) -> str:
    scheme, _, path = uri.partition(":///")
    return f"sqlite:///{Path(path).resolve()}" if scheme == "sqlite" else uri
