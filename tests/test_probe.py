"""Whether an MLflow store takes what a run would write to it is tried on the store, and leaves nothing to be seen."""

import pytest

from sat.tracking.client import connect
from sat.tracking.probe import ask, probe

EXPERIMENT = "captions"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tuple[str, object]:
    """Address of an sqlite store and a client of it."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    return uri, connect(uri)


def runs_of(client, *experiments: str) -> list[str]:
    return [run.info.run_id for run in client.search_runs(list(experiments))]


def test_a_run_is_made_and_removed_and_one_that_is_there_is_touched(store, tmp_path):
    uri, client = store
    first = ask(uri, EXPERIMENT, "")
    assert first.works and "is made when training starts" in first.said
    number = client.create_experiment(EXPERIMENT, tmp_path.as_uri())
    second = probe(uri, EXPERIMENT)  # as it is asked: by a process
    assert second.works and "a run with a file was made in the experiment 'captions' and removed" in second.said
    assert runs_of(client, "0", number) == [] and list(tmp_path.rglob("doctor.txt"))
    run = client.create_run(number).info.run_id
    assert ask(uri, EXPERIMENT, run).works
    assert client.get_run(run).data.tags["sat.doctor"] and runs_of(client, number) == [run]
    client.delete_run(run)
    third = ask(uri, EXPERIMENT, run)
    assert not third.works and f"mlflow runs restore --run-id {run}" in third.said
    client.delete_experiment(number)
    fourth = ask(uri, EXPERIMENT, "")
    assert not fourth.works and f"mlflow experiments restore -x {number}" in fourth.said


def test_a_file_that_is_not_there_is_not_made(tmp_path):
    answer = probe(f"sqlite:///{tmp_path}/deep/mlflow.db", EXPERIMENT)
    assert answer.works and answer.said == f"{tmp_path}/deep/mlflow.db is made in {tmp_path}"
    assert list(tmp_path.iterdir()) == []
