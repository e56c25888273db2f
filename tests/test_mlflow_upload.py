"""MLflow ends up with the journal's points, each once, whatever its server does, without costing a step."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from sat.config import TrackingConfig
from sat.tracking import mlflow as mlflow_upload
from sat.tracking import uploader
from sat.tracking.journal import Tracker, read_journal
from sat.tracking.mlflow import sync
from tests.helpers_tracking import (
    ROOT,
    NoUploader,
    ThreadUploader,
    client,
    points_of_journal,
    points_of_mlflow,
    replace_uploader,
    run_python,
    wait_for,
)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(mlflow_upload, "SEND_EVERY_S", 0.05)
    monkeypatch.setattr(mlflow_upload, "LONGEST_RETRY_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.fixture
def in_thread(monkeypatch):
    replace_uploader(monkeypatch, ThreadUploader)


LIFE = """
import sys, time
from pathlib import Path
from sat.config import TrackingConfig
from sat.tracking.journal import Tracker
folder, first, last, rate, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
params = {"train.learning_rate": rate, "model.width": 8}
tracker = Tracker(folder, TrackingConfig(), params, resume_step=first - 1)
for step in range(first, last + 1):
    scores = {"val/BLEU-4": 0.1} if step % 10 == 0 else {}
    tracker.log(step, {"loss": 1 / step, "captions_per_s": time.time(), **scores})
if end == "close":
    (folder / "captions.json").write_text("[]")
    tracker.artifact(folder / "captions.json", "captions")
    tracker.close()
else:
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.mark.faults
def test_a_killed_run_is_marked_failed_and_its_second_life_continues_the_same_mlflow_run(tmp_path):
    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-c", LIFE, folder, "1", "50", "0.1", "hang"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"ready\n"
    wait_for(lambda: (folder / "mlflow_run.json").exists())
    server, run_id = client(uri), json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    wait_for(lambda: len(server.get_metric_history(run_id, "loss")) == 50)
    first.send_signal(signal.SIGKILL)
    first.wait()
    wait_for(lambda: server.get_run(run_id).info.status == "FAILED", 20)

    second = run_python(LIFE, folder, 41, 60, "0.2", "close")
    assert second.returncode == 0, second.stderr
    assert second.stdout == second.stderr == "", "MLflow's own talk must not reach the terminal"
    assert [entry["step"] for entry in read_journal(folder)] == list(range(1, 61))
    journal, sent = points_of_journal(folder), points_of_mlflow(uri, run_id)
    assert sent.keys() == journal.keys()
    assert {key: v for key, v in sent.items() if key[0] != "captions_per_s"} == {
        key: v for key, v in journal.items() if key[0] != "captions_per_s"
    }
    run = server.get_run(run_id)
    assert run.info.status == "FINISHED" and len(server.search_runs([run.info.experiment_id])) == 1
    assert run.data.params == {"train.learning_rate": "0.1", "model.width": "8"}
    assert run.data.tags["resumed.train.learning_rate"] == "0.2" and "resumed.model.width" not in run.data.tags
    assert [file.path for file in server.list_artifacts(run_id, "captions")] == ["captions/captions.json"]


def write_run(folder: Path, uri: str, rate: float, cider: float) -> None:
    """A finished run that MLflow knows nothing of."""
    params = {"train.learning_rate": rate, "data.train_splits": ["train", "restval"], "long": "x" * 9000}
    with pytest.MonkeyPatch.context() as patch:
        replace_uploader(patch, NoUploader)
        tracker = Tracker(folder, TrackingConfig(mlflow_uri=uri, run_name=folder.name), params=params)
        for step in range(1, 4):
            tracker.log(step, {"nll_per_token": step * rate, "val/CIDEr": cider})
        tracker.close()


@pytest.mark.faults
def test_runs_that_meet_a_fresh_store_at_once_stand_side_by_side_with_params_and_metrics(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    runs = {tmp_path / f"runs/run{i}": (0.1 * i, 2.0 * i) for i in (1, 2, 3)}
    for folder, (rate, cider) in runs.items():
        write_run(folder, uri, rate, cider)
    children = [
        subprocess.Popen([sys.executable, "-m", "sat.tracking.mlflow", folder], cwd=ROOT, stdout=subprocess.PIPE)
        for folder in runs
    ]
    said = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert said == [b"6 points and artifacts sent\n"] * 3
    server = client(uri)
    experiment = server.get_experiment_by_name("show-attend-and-tell")
    found = server.search_runs([experiment.experiment_id], order_by=["metrics.`val/CIDEr` DESC"])
    assert [run.info.run_name for run in found] == ["run3", "run2", "run1"]
    for run in found:
        rate, cider = runs[tmp_path / "runs" / run.info.run_name]
        assert run.info.status == "FINISHED"
        assert run.data.metrics == {"nll_per_token": 3 * rate, "val/CIDEr": cider}
        assert run.data.params["train.learning_rate"] == str(rate)
        assert run.data.params["data.train_splits"] == "['train', 'restval']"
    assert sync(tmp_path / "runs/run1") == 0
    assert len(server.search_runs([experiment.experiment_id])) == 3


def test_sync_refuses_a_folder_that_is_no_tracked_run(tmp_path):
    with pytest.raises(ValueError, match="no tracking.json"):
        sync(tmp_path)


class Gate:
    """MLflow's own server behind a gate that a test sets to `open`, `500` or `silent`, or takes away altogether."""

    def __init__(self, application):
        self._application, self.mode, self.requests = application, "open", Counter()
        self.start(0)

    def __call__(self, environ, respond):
        self.requests[self.mode] += 1
        if self.mode == "silent":
            wait_for(lambda: self.mode != "silent")
        if self.mode == "500":
            respond("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"broken"]
        return self._application(environ, respond)

    def start(self, port: int) -> None:
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", port, self, threaded=True)
        self.port = self._server.port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        client(f"sqlite:///{folder}/mlflow.db").search_experiments()
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(folder / "artifacts"))
        from mlflow.server import app

        gate = Gate(app)
        yield gate
        gate.stop()


@pytest.mark.faults
def test_a_server_that_is_refused_broken_silent_dies_and_returns_misses_no_point(tmp_path, gate, in_thread, capfd):
    folder = tmp_path / "run"
    port = gate.port
    gate.stop()  # refused
    tracker = Tracker(folder, TrackingConfig(mlflow_uri=gate.uri), params={"a": 1})
    seconds, step = [], 0

    def some_steps():
        nonlocal step
        for _ in range(20):
            step += 1
            began = time.perf_counter()
            tracker.log(step, {"loss": step, "rate": 1 / step})
            seconds.append(time.perf_counter() - began)
            time.sleep(0.01)

    some_steps()
    gate.requests.clear()
    for mode in ("500", "silent", "open"):
        gate.mode = mode
        if mode == "500":
            gate.start(port)
        some_steps()
        wait_for(lambda: gate.requests[gate.mode] > 0)
    wait_for(lambda: tracker.run_id and len(points_of_mlflow(gate.uri, tracker.run_id)) == 2 * step)
    gate.stop()  # dies
    some_steps()
    (folder / "picture.png").write_text("picture")
    tracker.artifact(folder / "picture.png", "pictures")
    gate.start(port)  # returns
    some_steps()
    wait_for(lambda: len(points_of_mlflow(gate.uri, tracker.run_id)) == 2 * step)
    tracker.close()
    assert points_of_mlflow(gate.uri, tracker.run_id) == points_of_journal(folder)
    assert [e["step"] for e in read_journal(folder)] == list(range(1, step + 1))
    run = client(gate.uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and len(client(gate.uri).search_runs([run.info.experiment_id])) == 1
    assert sorted(seconds)[len(seconds) // 2] < 0.001, "log() must not wait for MLflow"
    said = capfd.readouterr().err.splitlines()
    assert [line.split()[0:2] for line in said] == [["no", "MLflow"], ["MLflow", "answers"]] * 2, said
    assert "Connection refused" in said[0]


@pytest.mark.faults
def test_a_run_that_ends_while_the_server_is_silent_ends_soon_and_is_caught_up_by_sync(
    tmp_path, gate, in_thread, monkeypatch
):
    folder = tmp_path / "run"
    gate.mode = "silent"
    tracker = Tracker(folder, TrackingConfig(mlflow_uri=gate.uri))
    for step in range(1, 2501):
        tracker.log(step, {"loss": step})
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 10
    gate.mode = "open"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # now the server answers, however busy the machine
    assert sync(folder) == 2500
    assert points_of_mlflow(gate.uri, tracker.run_id) == points_of_journal(folder)
    assert client(gate.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_a_start_from_step_0_in_a_used_folder_is_a_new_mlflow_run(tmp_path, gate, in_thread):
    folder, ids = tmp_path / "run", []
    for loss in (1.0, 2.0):
        tracker = Tracker(folder, TrackingConfig(mlflow_uri=gate.uri, experiment="anew"), params={"loss": loss})
        tracker.log(1, {"loss": loss})
        tracker.close()
        ids.append(tracker.run_id)
        assert points_of_mlflow(gate.uri, tracker.run_id) == points_of_journal(folder) == {("loss", 1): loss}
    assert ids[0] != ids[1]


@pytest.mark.faults
def test_a_read_only_store_costs_no_line_and_is_caught_up(tmp_path):
    folder, store = tmp_path / "run", tmp_path
    binds = " && ".join(f"mount --bind '{path}' '{path}'" for path in (store, folder))
    mount = f"{binds} && mount -o remount,ro,bind '{store}'"
    folder.mkdir()
    client(f"sqlite:///{store}/mlflow.db")
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a folder read-only (unshare -Urm)")
    life = [sys.executable, "-c", LIFE, folder, "1", "20", "0.1", "close"]
    command = ["unshare", "-Urm", "sh", "-c", f'{mount}; exec "$0" "$@"', *life]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Read-only" in done.stderr and "catch up: sat sync" in done.stderr
    assert [entry["step"] for entry in read_journal(folder)] == list(range(1, 21))
    assert sync(folder) == 43  # 20 losses, 20 rates, 2 scores, 1 artifact
    run_id = json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    assert points_of_mlflow(f"sqlite:///{store}/mlflow.db", run_id) == points_of_journal(folder)


@pytest.mark.faults
def test_a_locked_store_costs_no_line_and_no_time(tmp_path, in_thread, monkeypatch):
    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    client(uri)
    monkeypatch.setattr(uploader, "POINTS_PER_REQUEST", 1)
    import sqlite3

    locked = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    tracker = Tracker(folder, TrackingConfig(mlflow_uri=uri))
    began = time.perf_counter()
    for step in range(1, 12):
        tracker.log(step, {"loss": step})
    assert time.perf_counter() - began < 0.1
    time.sleep(0.5)
    locked.execute("ROLLBACK")
    tracker.close()
    assert points_of_mlflow(uri, tracker.run_id) == points_of_journal(folder) == {("loss", s): s for s in range(1, 12)}


@pytest.mark.faults
def test_the_real_uploader_costs_a_step_nothing_when_its_server_is_a_black_hole(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as black_hole:  # accepts nothing, answers nothing
        tracker = Tracker(
            tmp_path / "run", TrackingConfig(mlflow_uri=f"http://127.0.0.1:{black_hole.getsockname()[1]}")
        )
        seconds = []
        for step in range(1, 301):
            began = time.perf_counter()
            tracker.log(step, {"loss": step})
            seconds.append(time.perf_counter() - began)
            time.sleep(0.005)
        assert sorted(seconds)[150] < 0.001
        tracker.close()
    assert len(read_journal(tmp_path / "run")) == 300
