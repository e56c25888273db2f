"""Which MLflow run a folder's figures are in, what that run says of itself, evaluations being runs of their own."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sat.config import TrackingConfig, load_config, save_config
from sat.evaluation.metrics import Scores
from sat.evaluation.recording import Extra, record_evaluation
from sat.evaluation.report import Report
from sat.tracking import load
from sat.tracking.journal import Tracker
from sat.tracking.mlflow import anew, sync
from sat.tracking.placing import Deleted
from sat.tracking.provenance import git_tags
from sat.tracking.record import DataInput
from tests.helpers_tracking import NoUploader, client, points_of_journal, points_of_mlflow, replace_uploader

DATA = DataInput("coco/features/train", "ab" * 32, "/data/coco/features", "training", {"train": 80})


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def no_uploader(monkeypatch):
    replace_uploader(monkeypatch, NoUploader)


def life(folder: Path, store: str, first: int, last: int, experiment: str = "runs", **settings) -> None:
    """One life of a training that logs a loss at each step."""
    tracking = TrackingConfig(mlflow_uri=store, experiment=experiment, **settings)
    tracker = Tracker(folder, tracking, {"a": 1}, first - 1, inputs=[DATA])
    for step in range(first, last + 1):
        tracker.log(step, {"loss": 1 / step})
    tracker.close()


def run_id(folder: Path) -> str:
    return json.loads((folder / "mlflow_run.json").read_text())["run_id"]


def runs_in(store: str, experiment: str) -> set[str]:
    server = client(store)
    return {run.info.run_id for run in server.search_runs([server.get_experiment_by_name(experiment).experiment_id])}


def test_a_run_says_where_it_comes_from_and_what_it_learns_from(tmp_path, store, monkeypatch):
    import mlflow

    life(tmp_path / "run", store, 1, 3)
    sync(tmp_path / "run")
    monkeypatch.setattr("sat.tracking.provenance.socket.gethostname", lambda: "elsewhere")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    life(tmp_path / "run", store, 4, 5)
    sync(tmp_path / "run")
    run = client(store).get_run(run_id(tmp_path / "run"))
    tags, root = run.data.tags, Path(__file__).parents[1]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:  # a checkout, not a copy of the files
        assert tags["mlflow.source.git.commit"] == head.stdout.strip()
        assert tags["mlflow.source.git.dirty"] in ("true", "false")
    assert tags["host"] == os.uname().nodename and tags["resumed.host"] == "elsewhere"
    assert tags["launcher"] == "python" and tags["resumed.launcher"] == "slurm: python" and tags["slurm.job_id"] == "77"
    assert {"version.torch", "version.python", "version.mlflow", "mlflow.user"} <= tags.keys()
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == (DATA.name, DATA.digest[:36])
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
    assert json.loads(given.dataset.profile) == {"sha256": DATA.digest, "images": {"train": 80}}
    assert mlflow.data.get_source(given).uri == "/data/coco/features"
    assert runs_in(store, "runs") == {run.info.run_id}


def test_dirtiness_is_that_of_tracked_files_and_no_password_is_told(tmp_path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", *words], check=True)

    git("init", "-q", "-b", "trunk")
    git("remote", "add", "origin", "https://me:secret@example.org/repo")
    (tmp_path / "code").write_text("1")
    git("add", "code")
    git("commit", "-q", "-m", "first")
    (tmp_path / "untracked").write_text("1")
    tags = git_tags(tmp_path)
    assert tags["mlflow.source.git.dirty"] == "false" and tags["mlflow.source.git.branch"] == "trunk"
    assert tags["mlflow.source.git.repoURL"] == "https://example.org/repo"
    (tmp_path / "code").write_text("2")
    assert git_tags(tmp_path)["mlflow.source.git.dirty"] == "true"
    (tmp_path / "inner").mkdir()
    assert git_tags(tmp_path / "inner") == {}, "a checkout that merely lies around us is not ours"


@pytest.mark.parametrize("resumed", [True, False])
def test_a_copied_folder_is_another_run_and_a_moved_one_is_the_same(tmp_path, store, capsys, resumed):
    experiment = f"copies-{resumed}"
    life(tmp_path / "run", store, 1, 4, experiment)
    sync(tmp_path / "run")
    original = run_id(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "run").rename(tmp_path / "moved")
    for name in ("copy", "moved"):
        if resumed:
            life(tmp_path / name, store, 5, 6 + (name == "copy"), experiment)
        sync(tmp_path / name)
    assert run_id(tmp_path / "moved") == original != run_id(tmp_path / "copy")
    assert capsys.readouterr().err.count("is a copy of") == 1
    for name in ("copy", "moved"):
        assert points_of_mlflow(store, run_id(tmp_path / name)) == points_of_journal(tmp_path / name)
    assert runs_in(store, experiment) == {original, run_id(tmp_path / "copy")}


def test_an_experiment_renamed_in_mlflow_keeps_its_run(tmp_path, store):
    life(tmp_path / "run", store, 1, 2, "before")
    sync(tmp_path / "run")
    server = client(store)
    server.rename_experiment(server.get_experiment_by_name("before").experiment_id, "after")
    life(tmp_path / "run", store, 3, 4, "before")
    assert sync(tmp_path / "run") == 2
    assert runs_in(store, "after") == {run_id(tmp_path / "run")}


def test_what_was_deleted_in_mlflow_has_two_ways_on(tmp_path, store):
    folder, server = tmp_path / "run", client(store)
    life(folder, store, 1, 2, "deleted")
    sync(folder)
    first = run_id(folder)
    server.delete_run(first)
    life(folder, store, 3, 4, "deleted")
    with pytest.raises(Deleted, match=f"mlflow runs restore --run-id {first}, or .* sat sync {folder} --anew"):
        sync(folder)
    server.restore_run(first)
    assert sync(folder) == 2 and run_id(folder) == first
    server.delete_run(first)
    anew(folder)
    assert sync(folder) == 4 and run_id(folder) != first
    number = server.get_experiment_by_name("deleted").experiment_id
    server.delete_experiment(number)  # and its runs with it
    with pytest.raises(Deleted, match="was deleted in MLflow; restore it"):
        sync(folder)
    anew(folder)
    with pytest.raises(Deleted, match=f"experiments restore -x {number}, or .* --anew --experiment NAME"):
        sync(folder)
    anew(folder, "elsewhere")
    assert sync(folder) == 4 and runs_in(store, "elsewhere") == {run_id(folder)}
    assert points_of_mlflow(store, run_id(folder)) == points_of_journal(folder)


def evaluate(run: Path, beams: int, cider: float, out: Path | None = None) -> None:
    (run / "captions-test.json").write_text("[]")
    scores = {"model": Scores({"CIDEr": cider, "METEOR": None}, {}, 5), "blind": Scores({"CIDEr": 0.1}, {}, 5)}
    report = Report("test", 5, 1, beams, 4, scores, {"top_cell": 0.5}, search={"method": "beam", "beam_size": beams})
    data = dataclasses.replace(DATA, context="evaluation")
    extra = Extra((run / "captions-test.json",))
    record_evaluation(out or run, run, report, data, extra)


def test_an_evaluation_is_a_nested_run_and_leaves_its_training_alone(tmp_path, store):
    folder = tmp_path / "run"
    life(folder, store, 1, 4, "evaluations")
    tracking = TrackingConfig(mlflow_uri=store, experiment="evaluations")
    save_config(dataclasses.replace(load_config(), tracking=tracking), folder / "config.yaml")
    ours = ("metrics.jsonl", "tracking.json", "artifacts.jsonl", "config.yaml")
    before = {name: (folder / name).read_bytes() for name in ours if (folder / name).exists()}
    evaluate(folder, 3, 0.8)
    evaluate(folder, 3, 0.8)  # the same again is the same record
    evaluate(folder, 5, 0.9)
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert sync(folder) == 4 + 2 * 5  # four losses; of each evaluation four figures and the captions
    server, parent = client(store), run_id(folder)
    nested = {path.name: run_id(path) for path in (folder / "evaluations").iterdir()}
    assert sorted(name.split("-")[1] for name in nested) == ["beam3", "beam5"]
    assert points_of_mlflow(store, parent) == {("loss", step): 1 / step for step in range(1, 5)}
    for name, found in nested.items():
        run = server.get_run(found)
        assert run.data.tags["mlflow.parentRunId"] == parent and run.info.run_name == name
        beams = int(run.data.params["eval.beam_size"])
        assert run.data.metrics == {
            "test/CIDEr": {3: 0.8, 5: 0.9}[beams],
            "test/top_cell": 0.5,
            "test/unfinished": 1,
            "test_blind/CIDEr": 0.1,
        }
        assert (run.data.params["model_step"], run.data.params["data.digest"]) == ("4", DATA.digest)
        assert [each.dataset.digest for each in run.inputs.dataset_inputs] == [DATA.digest[:36]]
        assert [file.path for file in server.list_artifacts(found)] == ["captions-test.json"]
    evaluate(folder, 5, 0.95)  # other scores, of newer metrics, say: another run, the old one stays
    sync(folder)
    assert len(runs_in(store, "evaluations")) == 4
    evaluate(folder, 3, 0.8, tmp_path / "out")
    (elsewhere,) = (tmp_path / "out/evaluations").iterdir()
    sync(elsewhere)
    assert client(store).get_run(run_id(elsewhere)).data.tags["mlflow.parentRunId"] == parent


def test_an_evaluation_makes_its_trainings_run_where_mlflow_lacks_it(tmp_path, store):
    folder = tmp_path / "run"
    life(folder, store, 1, 2, "late")
    tracking = TrackingConfig(mlflow_uri=store, experiment="late")
    save_config(dataclasses.replace(load_config(), tracking=tracking), folder / "config.yaml")
    evaluate(folder, 3, 0.8)
    (path,) = (folder / "evaluations").iterdir()
    sync(path)
    parent = client(store).get_run(run_id(path)).data.tags["mlflow.parentRunId"]
    assert sync(folder) == 2 and run_id(folder) == parent and len(runs_in(store, "late")) == 2


def test_the_machines_load_is_mlflows_own_figures_and_goes_on_where_it_ended(tmp_path, store, monkeypatch):
    monkeypatch.setattr(load, "EVERY_S", 0.0)
    folder = tmp_path / "run"
    life(folder, store, 1, 2, "load", system_metrics=True)
    for _ in range(2):  # two lives of the uploader
        sampler = load.Sampler(folder)
        sampler.look()
        sampler.look()
    sync(folder)
    points = points_of_mlflow(store, run_id(folder))
    for name in ("system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"):
        assert [(name, step) in points for step in range(1, 6)] == [True] * 4 + [False]
    assert sync(folder) == 0
