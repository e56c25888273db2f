"""The journal is complete whatever happens to the process, the file or the disk."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from sat import files
from sat.config import TrackingConfig, load_config
from sat.data.plan import Cursor
from sat.doctor import tracking as examined
from sat.run_folder import open_run
from sat.stopping import Wish
from sat.tracking import journal as tracking
from sat.tracking import mlflow
from sat.tracking.journal import Tracker, read_journal
from sat.tracking.probe import Answer
from sat.train_state import Progress
from tests.helpers_tracking import NoUploader, replace_uploader, run_python
from tests.slurm_cluster import poll


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_the_journal_is_strict_json_and_keeps_numbers_nan_and_missing_values(tmp_path):
    tracker = Tracker(tmp_path / "run", TrackingConfig(mlflow_uri="none"))
    tracker.log(1, {"loss": 0.1 + 0.2, "nan": math.nan, "inf": -math.inf, "METEOR": None, "count": 3})
    entry = json.loads((tmp_path / "run/metrics.jsonl").read_text(), parse_constant=refuse)
    assert list(entry) == ["step", "time", "loss", "nan", "inf", "METEOR", "count"]
    (read,) = read_journal(tmp_path / "run")
    assert (read["step"], read["loss"], read["inf"], read["METEOR"]) == (1, 0.1 + 0.2, -math.inf, None)
    assert math.isnan(read["nan"]) and abs(read["time"] - time.time()) < 60
    tracker.close()


@pytest.mark.faults
def test_a_journal_cut_at_any_byte_is_continued_without_gaps_or_doubles(tmp_path):
    tracker = Tracker(tmp_path / "whole", TrackingConfig(mlflow_uri="none"))
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
        tracker = Tracker(folder, TrackingConfig(mlflow_uri="none"), resume_step=saved)
        for step in range(saved + 1, 7):
            tracker.log(step, {"loss": step})
        tracker.close()
        assert [(entry["step"], entry["loss"]) for entry in read_journal(folder)] == [(s, s) for s in range(1, 7)]


def test_a_damaged_line_costs_no_other_line(tmp_path):
    whole = [b'{"step": 1, "time": 0, "loss": 1}', b'{"step": 2, "time": 0, "loss": 2}']
    lines = [whole[0], b"\0\0\0", b'["no entry"]', whole[1], b'{"st']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    Tracker(tmp_path, TrackingConfig(mlflow_uri="none"), resume_step=2).close()
    assert [entry["step"] for entry in read_journal(tmp_path)] == [1, 2]


FULL_DISK = """
import resource, sys
from sat import files
from sat.config import TrackingConfig, load_config
from sat.tracking.journal import Tracker
tracker = Tracker(sys.argv[1], TrackingConfig(mlflow_uri="none"))
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

    tracker = Tracker(tmp_path, TrackingConfig(mlflow_uri="none"))
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
    tracker = Tracker(tmp_path, TrackingConfig(mlflow_uri="none"))
    with pytest.raises(ValueError, match="cannot name a metric"):
        tracker.log(1, {"val/BLEU-4": 0.3, name: 1.0})
    assert read_journal(tmp_path) == []
    tracker.close()


@pytest.mark.parametrize("uri", ["mlruns", "/tmp/mlflow.db", "file:///tmp/mlruns"])
def test_uris_that_mlflow_cannot_use_are_refused_before_anything_is_written(tmp_path, uri):
    with pytest.raises(ValueError, match="mlflow_uri=.*sqlite:////absolute"):
        Tracker(tmp_path / "run", TrackingConfig(mlflow_uri=uri))
    assert not (tmp_path / "run").exists()


def test_the_store_is_an_absolute_sqlite_file_beside_the_run_folder(tmp_path, monkeypatch):
    replace_uploader(monkeypatch, NoUploader)
    monkeypatch.chdir(tmp_path)
    for uri, expected in (("", tmp_path / "runs/mlflow.db"), ("sqlite:///other.db", tmp_path / "other.db")):
        Tracker("runs/a", TrackingConfig(mlflow_uri=uri))
        assert json.loads((tmp_path / "runs/a/tracking.json").read_text())["uri"] == f"sqlite:///{expected}"


SERVER = "https://me:secret@mlflow.example.org"


def stores(folder, *lives: tuple[str, str], capsys, monkeypatch) -> list[str]:
    """The store of each life of a run, (setting, MLFLOW_TRACKING_URI) each; what was said is left to `capsys`."""
    found = []
    replace_uploader(monkeypatch, NoUploader)
    for step, (setting, variable) in enumerate(lives):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
        Tracker(folder, TrackingConfig(mlflow_uri=setting), resume_step=step).close()
        found.append(files.read_json(folder / "tracking.json").get("uri", ""))
    return found


def test_the_environment_names_the_store_where_the_settings_do_not_and_that_is_said(tmp_path, capsys, monkeypatch):
    run, own = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    assert stores(run, ("", SERVER), capsys=capsys, monkeypatch=monkeypatch) == [SERVER]
    said = capsys.readouterr().err
    assert (
        said == "MLflow: https://***@mlflow.example.org, as MLFLOW_TRACKING_URI says (tracking.mlflow_uri is empty)\n"
    )
    lives = [("http://other", SERVER), ("", ""), ("", SERVER), ("", ""), (own, SERVER), ("", "")]
    found = stores(run, *lives, capsys=capsys, monkeypatch=monkeypatch)
    assert found == ["http://other", "http://other", SERVER, SERVER, own, own]
    assert capsys.readouterr().err.count("MLFLOW_TRACKING_URI") == 1  # of the six it decided one
    assert stores(tmp_path / "none", ("none", SERVER), capsys=capsys, monkeypatch=monkeypatch) == [""]


def test_what_is_said_of_a_store_that_does_not_answer_holds_no_password(tmp_path, capsys, monkeypatch):
    def away(*_):
        raise OSError(f"{SERVER}/?sig=secret is away")

    replace_uploader(monkeypatch, NoUploader)
    monkeypatch.setattr(mlflow, "Uploader", away)
    monkeypatch.setattr(mlflow.signal, "alarm", lambda _: None)
    Tracker(tmp_path, TrackingConfig(mlflow_uri=f"{SERVER}/?sig=secret"))
    mlflow.follow(tmp_path, parent=-1)
    assert (said := capsys.readouterr().err).count("https://***@mlflow.example.org/?sig=***") == 2
    monkeypatch.setattr(examined, "probe", lambda *_: Answer(False, f"{SERVER}/?sig=secret is away; start it"))
    config = load_config(None, [f"train.run_dir={tmp_path}", f"tracking.mlflow_uri={SERVER}/?sig=secret"])
    (row,) = examined.check_mlflow(config)
    assert row.found.count("https://***@mlflow.example.org/?sig=***") == 2 and "secret" not in f"{row}{said}"


@pytest.mark.parametrize("named", ["mlruns", "file:///tmp/mlruns"])
def test_a_store_of_the_environment_that_cannot_be_is_told_and_not_used(tmp_path, capsys, monkeypatch, named):
    found = stores(tmp_path / "run", ("", named), capsys=capsys, monkeypatch=monkeypatch)
    assert found == [f"sqlite:///{tmp_path}/mlflow.db"]
    assert capsys.readouterr().err.startswith(f"warning: MLFLOW_TRACKING_URI={named!r}: give http(s)://SERVER")


class Hanging:
    """Uploaders that never end by themselves, each a real process that has started another, as the real ones do."""

    SCRIPT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"

    def __init__(self):
        self.started = []

    def __call__(self, _command, **options):
        self.started.append(subprocess.Popen([sys.executable, "-c", self.SCRIPT], **options))
        return self.started[-1]


@pytest.fixture
def hanging(monkeypatch):
    uploaders = Hanging()
    replace_uploader(monkeypatch, uploaders)
    yield uploaders
    for each in uploaders.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)
        each.wait()


@pytest.mark.faults
def test_an_uploader_that_is_killed_is_started_again_a_few_times_and_then_the_end_says_so(tmp_path, hanging, caplog):
    tracker = Tracker(tmp_path / "run", TrackingConfig(mlflow_uri="http://127.0.0.1:9"))
    for step in range(1, 8):
        last = hanging.started[-1]
        last.send_signal(signal.SIGKILL)  # out of memory
        last.wait()
        tracker.log(step, {"loss": 1.0})
    assert len(hanging.started) == 1 + tracking.REVIVALS
    assert (
        caplog.text.count("the MLflow uploader has ended with exit status -9, starting it again") == tracking.REVIVALS
    )
    tracker.close()
    assert f"MLflow is behind (its uploader ended with exit status -9); catch up: sat sync {tmp_path}" in caplog.text
    assert len(read_journal(tmp_path / "run")) == 7


def group_of(leader: int) -> str:
    """The processes of its group that there still are."""
    return subprocess.run(["ps", "-o", "pid=", "-g", str(leader)], capture_output=True, text=True).stdout.strip()


@pytest.mark.faults
@pytest.mark.parametrize("stopped", [True, False])
def test_after_a_wish_to_stop_the_end_waits_for_mlflow_only_as_long_as_a_preemption_leaves(
    tmp_path, alone, hanging, caplog, monkeypatch, stopped
):
    monkeypatch.setattr("sat.run_folder.STOPPED_TIMEOUT_S", 0.2 if stopped else 600.0)
    monkeypatch.setattr("sat.run_folder.CLOSE_TIMEOUT_S", 600.0 if stopped else 0.2)
    assert tracking.STOPPED_TIMEOUT_S <= 10, "a launcher's grace is 30 s, and the checkpoint needs most of it"
    config = load_config(None, [f"train.run_dir={tmp_path / 'run'}", "tracking.mlflow_uri=http://127.0.0.1:9"])
    wish = Wish()
    began = time.monotonic()
    with open_run(config, alone, Progress(Cursor(1, "digest", 0, 0, 0)), wish):
        if stopped:
            wish.signals.append(signal.SIGTERM)
    assert time.monotonic() - began < 300
    (uploader,) = hanging.started
    assert uploader.poll() == -signal.SIGKILL and "catch up: sat sync" in caplog.text
    poll(lambda: not group_of(uploader.pid), 30, "the end of what the uploader has started")
