"""The journal is complete whatever happens; MLflow ends up with the same points, each once, without costing a step."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from sat import mlflow_upload, tracking
from sat.mlflow_upload import follow, sync
from sat.tracking import Tracker, read_journal

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(mlflow_upload, "SEND_EVERY_S", 0.05)
    monkeypatch.setattr(mlflow_upload, "LONGEST_RETRY_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


class ThreadUploader:
    """Stands for the uploader's process where a test has no use for a second import of MLflow."""

    def __init__(self, command, **_):
        self._thread = threading.Thread(target=follow, args=(Path(command[4]), os.getppid()), daemon=True)
        self._thread.start()

    def wait(self, timeout):
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the uploader did not end in time"


class NoUploader:
    """Stands for an uploader that never gets anywhere."""

    def __init__(self, *_, **__):
        pass

    def wait(self, timeout):
        pass


def replace_uploader(patch, uploader) -> None:
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    patch.setattr(tracking, "subprocess", SimpleNamespace(Popen=uploader, **names))


@pytest.fixture
def in_thread(monkeypatch):
    replace_uploader(monkeypatch, ThreadUploader)


def client(uri: str):
    mlflow_upload._connect(uri)  # sets MLflow's environment
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


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_the_journal_is_strict_json_and_keeps_numbers_nan_and_missing_values(tmp_path):
    tracker = Tracker(tmp_path / "run", mlflow_uri="none")
    tracker.log(1, {"loss": 0.1 + 0.2, "nan": math.nan, "inf": -math.inf, "METEOR": None, "count": 3})
    entry = json.loads((tmp_path / "run/metrics.jsonl").read_text(), parse_constant=refuse)
    assert list(entry) == ["step", "time", "loss", "nan", "inf", "METEOR", "count"]
    (read,) = read_journal(tmp_path / "run")
    assert (read["step"], read["loss"], read["inf"], read["METEOR"]) == (1, 0.1 + 0.2, -math.inf, None)
    assert math.isnan(read["nan"]) and abs(read["time"] - time.time()) < 60
    tracker.close()


@pytest.mark.faults
def test_a_journal_cut_at_any_byte_is_continued_without_gaps_or_doubles(tmp_path):
    tracker = Tracker(tmp_path / "whole", mlflow_uri="none")
    for step in range(1, 7):
        tracker.log(step, {"loss": step})
    tracker.close()
    whole = (tmp_path / "whole/metrics.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_bytes(whole[:cut])
        saved = min(4, sum(end <= cut for end in ends))  # the newest checkpoint is of step 4 at most
        tracker = Tracker(folder, mlflow_uri="none", resume_step=saved)
        for step in range(saved + 1, 7):
            tracker.log(step, {"loss": step})
        tracker.close()
        assert [(entry["step"], entry["loss"]) for entry in read_journal(folder)] == [(s, s) for s in range(1, 7)]


def test_a_damaged_line_costs_no_other_line(tmp_path):
    whole = [b'{"step": 1, "time": 0, "loss": 1}', b'{"step": 2, "time": 0, "loss": 2}']
    lines = [whole[0], b"\0\0\0", b'["no entry"]', whole[1], b'{"st']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    Tracker(tmp_path, mlflow_uri="none", resume_step=2).close()
    assert [entry["step"] for entry in read_journal(tmp_path)] == [1, 2]


def run_python(script: str, *arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


FULL_DISK = """
import resource, sys
from sat.tracking import Tracker
tracker = Tracker(sys.argv[1], mlflow_uri="none")
for step in range(1, 31):
    limit = 450 if 5 < step < 20 else -1  # a file cannot grow beyond: as a full disk, in the middle of a line
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    tracker.log(step, {"loss": step})
tracker.close()
"""


@pytest.mark.faults
def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room_again(tmp_path):
    done = run_python(FULL_DISK, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stderr and "kept in memory" in done.stderr
    assert [entry["step"] for entry in read_journal(tmp_path)] == list(range(1, 31))
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_what_a_full_disk_refuses_for_long_is_bounded_in_memory(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    tracker = Tracker(tmp_path, mlflow_uri="none")
    monkeypatch.setattr(tracking, "MAX_PENDING_BYTES", 500)
    with monkeypatch.context() as patch:
        patch.setattr(tracking.os, "write", full)
        for step in range(1, 101):
            tracker.log(step, {"loss": step})
    tracker.log(101, {"loss": 101})
    steps = [entry["step"] for entry in read_journal(tmp_path)]
    assert steps == list(range(steps[0], 102)) and 3 < len(steps) < 12
    tracker.close()


@pytest.mark.parametrize("name", ["Recall@5", "val//CIDEr", "../x", "", "step"])
def test_names_that_mlflow_would_refuse_are_refused_at_once(tmp_path, name):
    tracker = Tracker(tmp_path, mlflow_uri="none")
    with pytest.raises(ValueError, match="cannot name a metric"):
        tracker.log(1, {"val/BLEU-4": 0.3, name: 1.0})
    assert read_journal(tmp_path) == []
    tracker.close()


@pytest.mark.parametrize("uri", ["mlruns", "/tmp/mlflow.db", "file:///tmp/mlruns"])
def test_uris_that_mlflow_cannot_use_are_refused_before_anything_is_written(tmp_path, uri):
    with pytest.raises(ValueError, match="mlflow_uri=.*sqlite:////absolute"):
        Tracker(tmp_path / "run", mlflow_uri=uri)
    assert not (tmp_path / "run").exists()


def test_the_store_is_an_absolute_sqlite_file_beside_the_run_folder(tmp_path, monkeypatch):
    replace_uploader(monkeypatch, NoUploader)
    monkeypatch.chdir(tmp_path)
    for uri, expected in (("", tmp_path / "runs/mlflow.db"), ("sqlite:///other.db", tmp_path / "other.db")):
        Tracker("runs/a", mlflow_uri=uri)
        assert json.loads((tmp_path / "runs/a/tracking.json").read_text())["uri"] == f"sqlite:///{expected}"


LIFE = """
import sys, time
from pathlib import Path
from sat.tracking import Tracker
folder, first, last, rate, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
tracker = Tracker(folder, params={"train.learning_rate": rate, "model.width": 8}, resume_step=first - 1)
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
        tracker = Tracker(folder, mlflow_uri=uri, run_name=folder.name, params=params)
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
        subprocess.Popen([sys.executable, "-m", "sat.mlflow_upload", folder], cwd=ROOT, stdout=subprocess.PIPE)
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
    tracker = Tracker(folder, mlflow_uri=gate.uri, params={"a": 1})
    seconds, step = [], 0

    def some_steps():
        nonlocal step
        for step in range(step + 1, step + 21):
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
def test_a_run_that_ends_while_the_server_is_silent_ends_soon_and_is_caught_up_by_sync(tmp_path, gate, in_thread):
    folder = tmp_path / "run"
    gate.mode = "silent"
    tracker = Tracker(folder, mlflow_uri=gate.uri)
    for step in range(1, 2501):
        tracker.log(step, {"loss": step})
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 10
    gate.mode = "open"
    assert sync(folder) == 2500
    assert points_of_mlflow(gate.uri, tracker.run_id) == points_of_journal(folder)
    assert client(gate.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_a_start_from_step_0_in_a_used_folder_is_a_new_mlflow_run(tmp_path, gate, in_thread):
    folder, ids = tmp_path / "run", []
    for loss in (1.0, 2.0):
        tracker = Tracker(folder, mlflow_uri=gate.uri, experiment="anew", params={"loss": loss})
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
    assert "Read-only" in done.stderr and "catch up: python -m sat.mlflow_upload" in done.stderr
    assert [entry["step"] for entry in read_journal(folder)] == list(range(1, 21))
    assert sync(folder) == 43  # 20 losses, 20 rates, 2 scores, 1 artifact
    run_id = json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    assert points_of_mlflow(f"sqlite:///{store}/mlflow.db", run_id) == points_of_journal(folder)


@pytest.mark.faults
def test_a_locked_store_costs_no_line_and_no_time(tmp_path, in_thread, monkeypatch):
    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    client(uri)
    monkeypatch.setattr(mlflow_upload, "POINTS_PER_REQUEST", 1)
    import sqlite3

    locked = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    tracker = Tracker(folder, mlflow_uri=uri)
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
        tracker = Tracker(tmp_path / "run", mlflow_uri=f"http://127.0.0.1:{black_hole.getsockname()[1]}")
        seconds = []
        for step in range(1, 301):
            began = time.perf_counter()
            tracker.log(step, {"loss": step})
            seconds.append(time.perf_counter() - began)
            time.sleep(0.005)
        assert sorted(seconds)[150] < 0.001
        tracker.close()
    assert len(read_journal(tmp_path / "run")) == 300
