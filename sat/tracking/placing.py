"""Where a run stands in MLflow: found again by its id, else by its key, else made.

What was deleted there by hand is not made again behind the user's back: the error names both ways on.
"""

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

from sat import files
from sat.tracking.client import artifact_location
from sat.tracking.record import DataInput, Record

KEY_TAG = "sat.run_folder"
"""Holds the run's key."""
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "best/CIDEr",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
}
"""The page opens in the mode for training runs, not in that for language models."""


LONGEST_DIGEST = 36
"""Characters of a data set's digest that MLflow takes."""


class Deleted(ValueError):
    """The run or its experiment was deleted in MLflow."""


def run_lock(folder: Path) -> contextlib.AbstractContextManager[bool]:
    """Yields whether this process is now the only one that uploads the run."""
    return files.locked(folder / ".mlflow.lock", wait=False)


def find_or_create(client: Any, folder: Path, record: Record, parent_id: str = "") -> Any:
    """The MLflow run of a folder. Raises Deleted, and whatever MLflow raises."""
    if (run := _known(client, folder, record)) is not None:
        return run
    experiment = _experiment(client, folder, record)
    everything = 3  # ViewType.ALL
    found = client.search_runs([experiment.experiment_id], f"tags.`{KEY_TAG}` = '{record.key}'", everything)
    if found:
        _refuse_deleted(found[0], folder)
        return found[0]
    tags = {KEY_TAG: record.key, "sat.folder": str(folder), **record.tags}
    if parent_id:
        tags["mlflow.parentRunId"] = parent_id
    started = round(record.started * 1000)
    return client.create_run(experiment.experiment_id, started, tags, record.run_name)


def lacking_inputs(run: Any, inputs: tuple[DataInput, ...]) -> list[Any]:
    """The data sets that MLflow does not know to be inputs of the run, as `mlflow.data` has them."""
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.entities import Dataset, DatasetInput, InputTag

    known = run.inputs.dataset_inputs if run.inputs else []
    has = {(each.dataset.name, each.dataset.digest, tag.value) for each in known for tag in each.tags}
    lacking = []
    for each in inputs:
        digest = each.digest[:LONGEST_DIGEST]
        if (each.name, digest, each.context) in has:
            continue
        with warnings.catch_warnings(action="ignore"):  # it has two classes for a local folder
            source = resolve_dataset_source(each.source)
        profile = json.dumps({"sha256": each.digest, "images": dict(each.images)})
        dataset = Dataset(each.name, digest, source._get_source_type(), source.to_json(), None, profile)
        lacking.append(DatasetInput(dataset, [InputTag("mlflow.data.context", each.context)]))
    return lacking


def _known(client: Any, folder: Path, record: Record) -> Any:
    """The run that the uploader has found before, whatever its experiment is called by now."""
    from mlflow.exceptions import MlflowException

    run_id, _ = record.uploaded(folder)
    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None  # gone for good
    _refuse_deleted(run, folder)
    return run


def _experiment(client: Any, folder: Path, record: Record) -> Any:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(record.experiment)
    if experiment is None:
        with contextlib.suppress(MlflowException):  # another run may have been first
            client.create_experiment(record.experiment, artifact_location(record.uri), EXPERIMENT_TAGS)
        experiment = client.get_experiment_by_name(record.experiment)
    if experiment.lifecycle_stage != "active":
        raise Deleted(
            f"the experiment {record.experiment!r} was deleted in MLflow; restore it: mlflow experiments restore -x "
            f"{experiment.experiment_id}, or go on in another: sat sync {folder} --anew --experiment NAME"
        )
    return experiment


def _refuse_deleted(run: Any, folder: Path) -> None:
    if run.info.lifecycle_stage != "active":
        raise Deleted(
            f"the run {run.info.run_id} was deleted in MLflow; restore it: mlflow runs restore --run-id "
            f"{run.info.run_id}, or go on in another: sat sync {folder} --anew"
        )
