"""Stopped, killed, watched: real ranks, each life of one run with another fault, and the end as undisturbed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sat import checkpoint, files
from sat.run_lock import owned
from sat.stopping import START_AGAIN
from sat.tracking.journal import drop_after
from sat.train_state import LineSums
from tests.chaos import GRACE_S, ROOT, Ranks, arguments_of, chaos, make_config, result_of

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def ranks():
    """Where trainings on two ranks are started."""
    server = Ranks.serve()
    yield server
    server.close()


class Run:
    """A run folder and the lives of its training."""

    def __init__(self, root: Path, ranks: Ranks) -> None:
        self.settings, self.folder, self.ranks = make_config(root), root / "run", ranks
        self.log = root / "run.log"

    def begin(self, *more: str, how: tuple[str, ...] = ()) -> None:
        self.log.write_text("")
        self.ranks.start(arguments_of(self.settings, self.folder, *more), self.log, *how)

    def call(self, program: str, *arguments: str, how: str) -> None:
        self.log.write_text("")
        self.ranks.start([*arguments], self.log, how, program=program)

    def until(self, words: str, seconds: float = GRACE_S) -> None:
        """Wait until the log has these words."""
        end = time.monotonic() + seconds
        while not re.search(words, self.said()):
            assert time.monotonic() < end, f"no {words!r} in\n{self.said()}"
            time.sleep(0.02)

    def reached(self, step: int) -> None:
        """Wait until this step or a later one is saved."""
        end = time.monotonic() + GRACE_S
        while self.status().get("saved_step", 0) < step:
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        return self.log.read_text()

    def status(self) -> dict:
        return files.read_json(self.folder / "status.json")

    def ended(self) -> list[int | None]:
        """Exit codes of launcher and ranks; nothing is left."""
        codes, orphans = self.ranks.wait()
        assert not orphans, self.said()
        return codes

    def workers(self, rank: int) -> list[int]:
        """Processes that read batches for a rank; the kernel may leave out any while others end."""
        pid = self.ranks.pids["ranks"][rank]
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def worker(self, rank: int) -> int:
        """One of them, of a rank that is at work."""
        end = time.monotonic() + GRACE_S
        while not (found := self.workers(rank)):
            assert time.monotonic() < end, self.said()
        return found[-1]


def is_stopped_in_a_save(run: Run) -> None:
    """And asked again and again to stop, in that save and in those that follow."""
    run.begin("data.num_workers=2", how=("slow_steps", "slow_saves"))
    run.until("writes step 2")  # SIGTERM to everybody at once, as schedulers send it
    os.killpg(run.ranks.pids["launcher"], signal.SIGTERM)
    run.until("writes step (?!2\\b)")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for pid in (*run.ranks.pids["ranks"], *run.workers(0), *run.workers(1)):
            os.kill(pid, number)
    codes = run.ended()
    assert codes[1:] == [0, 0] and run.status()["state"] == "stopped", run.said()
    assert 2 < run.status()["step"] == run.status()["saved_step"] < 10
    assert checkpoint.damage(checkpoint.latest(run.folder / "checkpoints")) is None
    assert not [*run.folder.rglob("*.tmp-*")]


def test_a_run_goes_on_through_every_way_to_stop_as_if_nothing_had_been(tmp_path, ranks):
    undisturbed, run = Run(tmp_path / "undisturbed", ranks), Run(tmp_path / "disturbed", ranks)
    undisturbed.begin()
    assert undisturbed.ended() == [0, 0, 0], undisturbed.said()

    is_stopped_in_a_save(run)

    run.begin(how=("slow_steps",))  # another rank than the first, another signal; the launcher is fine
    run.until("continuing")
    run.reached(run.status()["saved_step"] + 2)
    os.kill(ranks.pids["ranks"][1], signal.SIGUSR1)
    assert run.ended() == [0, 0, 0] and run.status()["state"] == "stopped", run.said()

    run.begin(how=("slow_evaluation",))  # in an evaluation, which is left and done again
    run.until("decode val")
    began = time.monotonic()
    os.kill(ranks.pids["ranks"][0], signal.SIGHUP)
    os.kill(ranks.pids["ranks"][1], signal.SIGINT)
    assert run.ended() == [0, 0, 0] and run.status()["step"] == run.status()["saved_step"] == 12, run.said()
    assert time.monotonic() - began < 30 and "step 12: val" not in run.said()

    run.begin(how=("slow_steps",))  # the launcher is killed
    run.until("step 12: val")
    run.reached(14)
    os.kill(ranks.pids["launcher"], signal.SIGKILL)
    assert run.ended() == [-signal.SIGKILL, 0, 0] and run.status()["state"] == "stopped", run.said()

    run.begin()
    assert run.ended() == [0, 0, 0] and run.status()["state"] == "finished", run.said()
    assert result_of(run.folder) == result_of(undisturbed.folder)

    run.call("evaluate", str(run.folder), "--split", "val", "--baselines", how="slow_baselines")
    run.until("scores the baselines")  # on rank 0, while the other one waits
    began = time.monotonic()
    os.kill(ranks.pids["ranks"][1], signal.SIGINT)
    assert run.ended() == [START_AGAIN] * 3 and time.monotonic() - began < 30, run.said()
    assert "error: stopped before" in run.said() and "Traceback" not in run.said()
    assert not (run.folder / "evaluation-val.json").exists()


def test_a_rank_whose_launcher_was_gone_before_it_looked_ends_at_once():
    program = "import time; from sat.stopping import follow_launcher as f; f(); time.sleep(60)"
    for launcher, expected in ((os.getpid(), None), (os.getpid() + 1, -signal.SIGTERM)):
        environment = os.environ | {"SAT_LAUNCHER": str(launcher)}
        rank = subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=ROOT)
        try:
            found = rank.wait(3 if expected is None else GRACE_S)
        except subprocess.TimeoutExpired:
            found = None
        rank.kill()
        rank.wait()
        assert found == expected


def test_a_rank_that_is_lost_before_the_run_is_open_is_nobodys_fault(tmp_path, ranks):
    run = Run(tmp_path, ranks)
    run.begin(how=("lost_after_meeting",))
    codes = run.ended()  # what comes from the launcher before anything can be lost may be the end
    assert codes[1] in (START_AGAIN, -signal.SIGTERM) and codes[2] == -signal.SIGKILL, run.said()
    assert ("has lost another rank" in run.said()) == (codes[1] == START_AGAIN) and "Traceback" not in run.said()


def test_a_lost_process_ends_all_in_a_sentence_and_the_run_goes_on(tmp_path, ranks):
    run = Run(tmp_path, ranks)
    run.begin("train.epochs=40", how=("slow_steps",))
    run.reached(2)
    owner = rf"trained by process {ranks.pids['ranks'][0]} on .* since 20.*STOP"
    with pytest.raises(ValueError, match=owner), owned(run.folder):
        pass
    os.kill(ranks.pids["ranks"][1], signal.SIGKILL)
    codes = run.ended()
    assert codes[1] == START_AGAIN and "rank 0 on" in run.said() and "has lost another rank" in run.said()
    assert "Traceback" not in run.said() and run.status()["state"] == "failed"

    run.begin("train.epochs=40", how=("slow_steps",))
    run.until("continuing")
    run.reached(run.status()["saved_step"] + 2)
    killed = run.worker(1)
    os.kill(killed, signal.SIGKILL)
    codes = run.ended()
    assert codes[2] == START_AGAIN and f"its process {killed}, which reads batches" in run.said(), run.said()

    run.begin("train.epochs=40", how=("slow_steps", "out_of_memory"))
    codes = run.ended()
    assert codes[2] == 1 and "error: rank 1 on" in run.said() and "Traceback" not in run.said(), run.said()
    assert re.search(r"is out of memory \(.*\); lower train.global_batch, or raise train.accumul", run.said())

    saved = checkpoint.latest(run.folder / "checkpoints")
    run.begin("train.epochs=40", "data.num_workers=0", how=("full_disk",))
    assert run.ended()[1:] == [1, 1], run.said()
    assert re.search(r"error: 3 saves in a row have failed, .*File too large.*; make room, and start it ag", run.said())
    assert run.said().count("NOT saved") >= 4 and "Traceback" not in run.said()  # three warnings before it
    assert run.status()["state"] == "failed" and checkpoint.latest(run.folder / "checkpoints") == saved

    run.begin("train.epochs=40", "train.timeout=10", how=("slow_steps",))
    run.until("continuing")
    run.reached(run.status()["saved_step"] + 2)
    stopped = ranks.pids["ranks"][1]
    os.kill(stopped, signal.SIGSTOP)
    codes = run.ended()
    assert codes[1:] == [START_AGAIN, -signal.SIGKILL], run.said()
    assert re.search(r"rank 0 on \S+ has not got on for \d+ s at: .*rank 1 on \S+ gives no sign of life", run.said())
    assert "most recent call first" in run.said() and "take_step" in run.said()
    assert "rank 1 on" in run.status()["error"] and run.status()["state"] == "failed"

    run.begin("train.epochs=1")
    assert run.ended() == [0, 0, 0] and run.status()["state"] == "finished", run.said()


def test_a_rank_that_never_comes_ends_the_others_in_time_and_is_named(tmp_path, ranks):
    run, began = Run(tmp_path, ranks), time.monotonic()
    run.begin("train.timeout=3", how=("absent",))
    assert run.ended() == [START_AGAIN, START_AGAIN, -signal.SIGTERM], run.said()
    assert "error: 1 of 2 ranks have come within 3 s (train.timeout), not rank 1; see what its" in run.said()
    assert time.monotonic() - began < 30 and not run.folder.exists()


def test_the_doctor_finds_a_rank_that_hangs_and_keeps_its_table(tmp_path, ranks):
    run, table = Run(tmp_path, ranks), tmp_path / "doctor.json"
    arguments = arguments_of(run.settings, run.folder, "train.timeout=10", "--json", str(table))
    run.call("doctor", *arguments, how="stopped_in_a_step")
    assert run.ended()[1:] == [1, -signal.SIGKILL], run.said()
    assert "most recent call first" in run.said()
    document = json.loads(table.read_text())
    last, states = document["rows"][-1], [row["state"] for row in document["rows"]]
    assert (document["verdict"], last["check"], states.count("failed")) == ("failed", "steps", 1)
    assert re.search(r"rank 1 on \S+ gives no sign of life", last["found"])
    assert re.search(r"see what holds rank 1 up on \S+ .*kill -CONT.*--exclude=", last["mend"])
    assert last["mend"][:30] in run.said() and "1 failed, " in run.said().splitlines()[-1]


def test_random_kills_change_nothing(tmp_path, ranks):
    assert chaos(tmp_path, ranks, kills=4, seed=5) >= 1


# ------------------------------------------------------------------ the journal


def test_a_journal_is_cut_before_an_evaluation_that_is_done_again(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", [{"step": 4}, {"step": 5, "nll": 1.0}, {"step": 5, "val/CIDEr": 0.5}]
    path.write_text("".join(json.dumps(line | {"time": 1.0}) + "\n" for line in [*lines, {"step": 6}]))
    drop_after(path, 5)
    assert len(path.read_text().splitlines()) == 3
    drop_after(path, 5, "val/")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [4, 5]


def test_sums_of_two_lives_are_those_of_one():
    parts = LineSums(steps=2, tokens=3.0, totals={"nll": 1.5}), LineSums(steps=1, skipped=1, totals={"nll": 0.25})
    assert parts[0] + parts[1] == LineSums(steps=3, skipped=1, tokens=3.0, totals={"nll": 1.75})
    assert LineSums() + parts[0] == parts[0]
