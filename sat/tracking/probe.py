"""Whether an MLflow store answers within a bound and takes what a run would write to it.

The surprise: it is asked by a process of its own. MLflow's import and its waits are long, and only a process can be
ended for certain.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat.tracking import child
from sat.tracking.client import connect, reason

DEFAULT = "0"
"""Experiment that every store has."""
TAG = "sat.doctor"
"""Of a run that was only made to see whether one can be made."""


@dataclass(frozen=True)
class Answer:
    """What became of the question."""

    works: bool
    said: str
    """What was done, or why it failed."""


def probe(uri: str, experiment: str, run_id: str = "", bound_s: float = 60.0) -> Answer:
    """Write a tag to the run `run_id` of the store, or make a run in the experiment and remove it.

    Takes at most `bound_s`. An sqlite file that is not there yet is not made: its folder is looked at.
    """
    if uri.startswith("sqlite:///") and not (file := Path(uri.removeprefix("sqlite:///"))).exists():
        place = next(path for path in file.absolute().parents if path.exists())
        writable = os.access(place, os.W_OK)
        return Answer(writable, f"{file} is made in {place}" if writable else f"{place} cannot be written")
    given = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    try:
        done = child.ask("sat.tracking.probe", uri, experiment, run_id, timeout_s=bound_s, given=given)
    except subprocess.TimeoutExpired:
        return Answer(False, f"no answer within {bound_s:.0f} s")
    try:
        return Answer(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, LookupError, TypeError):
        words = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        return Answer(False, words[0][:300])


_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE")
"""The process that asks is no rank."""


def ask(uri: str, experiment: str, run_id: str) -> Answer:
    """The same, in this process and without a bound on its time."""
    began = time.perf_counter()
    try:
        client = connect(uri)
        said = _touch(client, run_id) if run_id else _make_and_remove(client, experiment)
    except Exception as error:  # whatever MLflow and what lies below it raise
        return Answer(False, reason(error))
    return Answer(True, f"{said}, {time.perf_counter() - began:.1f} s")


def _touch(client: Any, run_id: str) -> str:
    run = client.get_run(run_id)
    if run.info.lifecycle_stage != "active":
        raise ValueError(f"the run {run_id} is deleted there; restore it: mlflow runs restore --run-id {run_id}")
    client.set_tag(run_id, TAG, time.strftime("%Y-%m-%d %H:%M:%S"))
    return f"the run {run_id} takes a tag"


def _make_and_remove(client: Any, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise ValueError(
            f"the experiment {name!r} is deleted there; restore it (mlflow experiments restore -x "
            f"{experiment.experiment_id}), or name another by tracking.experiment"
        )
    place = experiment or client.get_experiment(DEFAULT)
    run = client.create_run(place.experiment_id, tags={TAG: "made to see whether it can be made"})
    try:
        if experiment is not None:
            client.log_text(run.info.run_id, "made to see whether it can be made\n", "doctor.txt")
    finally:
        client.delete_run(run.info.run_id)
    if experiment is None:
        return f"a run was made and removed; the experiment {name!r} is made when training starts"
    return f"a run with a file was made in the experiment {name!r} and removed"


if __name__ == "__main__":
    print(json.dumps(vars(ask(*sys.argv[1:]))))
