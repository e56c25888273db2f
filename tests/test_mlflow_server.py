"""Four trainings at once on MLflow as a team runs it: its server, PostgreSQL, passwords, and what goes wrong there."""

import contextlib
import json
import os
import time
from pathlib import Path

import pytest

from sat import files
from sat.config import TrackingConfig
from sat.tracking.journal import Tracker, read_journal
from sat.tracking.mlflow import anew, main, sync
from sat.tracking.placing import Deleted
from tests import helpers_browser
from tests.helpers_server import ADMIN, PASSWORD, Gate, missing, server
from tests.helpers_tracking import client, points_of_journal, points_of_mlflow, wait_for

RUNS = ("one", "two", "three", "four")
USER, SECRET = "trainer", "another-password-of-the-test"
CAPTIONS = '[{"image_id": 7, "caption": "a dog in the snow"}]'


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """The gate to the server of a team, whose names and passwords are those of an ordinary user."""
    if lacking := missing():
        pytest.skip(f"no server: {lacking} is not installed")
    with server(tmp_path_factory.mktemp("server")) as port, pytest.MonkeyPatch.context() as patch:
        import requests

        made = {"username": USER, "password": SECRET}
        answer = requests.post(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/users/create", json=made, auth=(ADMIN, PASSWORD), timeout=60
        )
        answer.raise_for_status()
        patch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # the server answers, however busy the machine
        gate = Gate(port)
        yield gate
        gate.set("refused")


class Training:
    """A training that logs a loss at each step; its uploader is the real one, a process."""

    def __init__(self, folder: Path, uri: str, number: int) -> None:
        self.folder, self.step, self.seconds = folder, 0, []
        experiment = "alone" if folder.name == "four" else "together"
        tracking = TrackingConfig(mlflow_uri=uri, experiment=experiment)
        self.tracker = Tracker(folder, tracking, {"train.seed": number})
        self.number = number

    def steps(self, count: int = 30) -> None:
        for _ in range(count):
            self.step += 1
            began = time.perf_counter()
            scores = {"val/CIDEr": self.number / 10 + self.step / 1000} if self.step % 10 == 0 else {}
            self.tracker.log(self.step, {"loss": self.number / self.step, **scores})
            self.seconds.append(time.perf_counter() - began)

    @property
    def run_id(self) -> str:
        return str(files.read_json(self.folder / "mlflow_run.json").get("run_id", ""))


def known(training: Training, uri: str) -> bool:
    """Whether MLflow has all points of the journal, each once and equal, and no others."""
    run_id = training.run_id
    return bool(run_id) and points_of_mlflow(uri, run_id) == points_of_journal(training.folder)


def best_cider(training: Training) -> str:
    """As MLflow writes it: that of the last evaluation, since each is better than the one before."""
    return f"{points_of_journal(training.folder)['val/CIDEr', 120]:.2f}"


@contextlib.contextmanager
def stderr_to(path: Path):
    """What processes that start here say goes to the file."""
    before = os.dup(2)
    with open(path, "w") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@pytest.fixture(scope="module")
def trainings(team, tmp_path_factory):
    """Four, after a server that was refused, broken, silent and from which a run and an experiment were deleted."""
    root = tmp_path_factory.mktemp("runs")
    direct, said = f"http://127.0.0.1:{team.behind}", root / "said"
    team.set("refused")
    with stderr_to(said):
        found = [Training(root / name, team.uri, number) for number, name in enumerate(RUNS, 1)]

    def all_log() -> None:
        for each in found:
            each.steps()

    all_log()
    team.set("open")
    wait_for(lambda: all(known(each, direct) for each in found), 900, every=1)
    for mode in ("500", "silent"):
        team.set(mode)
        all_log()
        wait_for(lambda: sum(team.met.values()) >= len(RUNS), 900)
    hand = client(direct)
    hand.delete_run(found[2].run_id)
    hand.delete_experiment(hand.get_experiment_by_name("alone").experiment_id)
    team.set("open")
    all_log()
    wait_for(lambda: all(known(each, direct) for each in found[:2]), 900, every=1)
    wait_for(lambda: said.read_text().count("was deleted in MLflow") == 2, 900)
    for each in found:
        each.steps(5)
        (each.folder / "captions.json").write_text(CAPTIONS)
        each.tracker.artifact(each.folder / "captions.json", "captions of the test")
        each.tracker.close()
    return found, direct


@pytest.mark.faults
def test_whatever_the_server_does_trainings_go_on_and_those_that_it_still_knows_are_caught_up(trainings):
    found, direct = trainings
    for each in found:
        assert [entry["step"] for entry in read_journal(each.folder)] == list(range(1, each.step + 1))
        assert sorted(each.seconds)[len(each.seconds) // 2] < 0.001, "log() must not wait for MLflow"
    for each in found[:2]:
        assert known(each, direct)
        run = client(direct).get_run(each.run_id)
        assert run.info.status == "FINISHED" and run.data.params == {"train.seed": str(each.number)}
    runs = client(direct).search_runs([client(direct).get_experiment_by_name("together").experiment_id])
    assert {run.info.run_name for run in runs} == {"one", "two"}
    assert sync(found[0].folder) == 0, "it has everything"


@pytest.mark.faults
def test_sync_says_both_ways_on_from_what_was_deleted_and_each_leads_to_an_equal_history(trainings):
    (_, _, run, experiment), direct = trainings
    hand = client(direct)
    with pytest.raises(Deleted, match=f"mlflow runs restore --run-id {run.run_id}, or .* --anew"):
        sync(run.folder)
    hand.restore_run(run.run_id)
    first = run.run_id
    assert sync(run.folder) > 0 and run.run_id == first and known(run, direct)
    with pytest.raises(Deleted, match=r"was deleted in MLflow; restore it"):
        sync(experiment.folder)
    anew(experiment.folder, "another")
    assert sync(experiment.folder) == len(points_of_journal(experiment.folder)) + 1 and known(experiment, direct)
    for each in (run, experiment):
        assert hand.get_run(each.run_id).info.status == "FINISHED"


@pytest.mark.faults
def test_a_wrong_password_is_a_sentence_of_sync_without_the_password(trainings, monkeypatch):
    (first, *_), _ = trainings
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-and-secret")
    with pytest.raises(ValueError, match="401|not authenticated") as refused:
        main(first.folder)
    assert "wrong-and-secret" not in str(refused.value)


@pytest.mark.end_to_end
def test_a_browser_compares_two_runs_by_cider_draws_both_and_shows_their_captions(trainings, tmp_path):
    if lacking := helpers_browser.missing():
        pytest.skip(f"no browser: {lacking} is not installed")
    (one, two, *_), direct = trainings
    experiment = client(direct).get_run(one.run_id).info.experiment_id
    runs = f"runs={json.dumps([one.run_id, two.run_id])}&experiments={json.dumps([experiment])}"
    cider = json.dumps("val/CIDEr")
    with helpers_browser.browser(tmp_path, USER, SECRET) as page:
        page.open(f"{direct}/#/metric?{runs}&metric={cider}&plot_metric_keys=[{cider}]")
        page.read("val/CIDEr", *(f"{each.folder.name}\t{best_cider(each)} (step=120)" for each in (one, two)))
        page.find(".js-plotly-plot .scatterlayer .trace path.js-line", 2)
        page.open(f"{direct}/#/experiments/{experiment}/runs/{two.run_id}/artifacts")
        page.click("captions of the test")
        page.click("captions.json")
        page.read("a dog in the snow")
