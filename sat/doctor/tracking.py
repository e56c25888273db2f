"""Whether the run's MLflow answers in time and takes what the run would write to it."""

from collections.abc import Iterator
from pathlib import Path

from sat import files
from sat.config import Config
from sat.credentials import shown
from sat.doctor.rows import Row, ok, warning
from sat.tracking.probe import probe
from sat.tracking.record import RECORD, UPLOADED
from sat.tracking.store import store_of

BOUND_S = 60.0


def check_mlflow(config: Config, bound_s: float = BOUND_S) -> Iterator[Row]:
    """A warning at most: a training goes on without MLflow and catches up."""
    folder = Path(config.train.run_dir)
    store = store_of(config.tracking, folder, files.read_json(folder / RECORD).get("uri", ""))
    if store.problem:
        yield warning("MLflow", store.problem.removeprefix("warning: "), "set it anew, or tracking.mlflow_uri")
    if not store.uri:
        yield ok("MLflow", "none, as tracking.mlflow_uri or MLFLOW_TRACKING_URI says")
        return
    known = files.read_json(folder / UPLOADED)
    run_id = known.get("run_id", "") if known.get("uri") == store.uri else ""
    answer = probe(store.uri, config.tracking.experiment, run_id, bound_s)
    place, said = store.said.partition(" (")[0].removeprefix("MLflow: ") or shown(store.uri), shown(answer.said)
    if answer.works:
        yield ok("MLflow", f"{place}: {said}")
        return
    mend = (
        "start the server, name the right one by tracking.mlflow_uri (or `none`); a run that starts without it loses "
    )
    mend += f"nothing and catches up: sat sync {folder}"
    found, semicolon, way_out = said.rpartition("; ")
    yield warning("MLflow", f"{place}: {found or said}", way_out if semicolon else mend)
