"""Starts trainings on two forked ranks, so that many lives of a run cost one import.

    python -m tests.forked_ranks

Each line on standard input is a JSON object. {"start": [ARGUMENTS], "log": FILE, "how": NAME} forks a launcher and the
ranks of `python -m sat.train ARGUMENTS`; the answer is {"launcher": PID, "ranks": [PID, PID]}, and
"program" names another one of PROGRAMS. {"wait": SECONDS} waits
until nothing that was started is left; the answer is {"codes": {PID: EXIT_CODE}, "orphans": [PID]}, those that were
killed. This process adopts what loses its parent, so nothing escapes it.
"""

import ctypes
import itertools
import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pandas  # noqa: F401  which pyarrow's first table imports: here once for all lives
import torch
import torch._dynamo  # which an optimizer imports

from sat import checkpoint, evaluate, scoring, train
from sat.cli import run_program
from sat.doctor import examine, steps
from sat.engine import start as start_of_group
from sat.evaluation import split

RANKS = 2
LARGEST = 6000
"""Bytes."""
PR_SET_CHILD_SUBREAPER = 36
PROGRAMS = {"train": train.main, "evaluate": evaluate.main, "doctor": examine.main}


def slow_evaluation() -> None:
    """Decoding an image takes a second."""
    plain = split.decode

    def slowly(*arguments, **named):
        time.sleep(1.0)
        return plain(*arguments, **named)

    split.decode = slowly


def failing_export() -> None:
    """The best model finds no room."""

    def fails(*_):
        raise OSError(28, "No space left on device")

    scoring.save_model = fails


def slow_steps() -> None:
    """A step takes a twentieth of a second more."""
    plain = train.take_step

    def slowly(*arguments):
        time.sleep(0.05)
        return plain(*arguments)

    train.take_step = slowly


def slow_saves() -> None:
    """A checkpoint takes two seconds to write."""
    plain = checkpoint._save

    def slowly(folder, step, *rest):
        print(f"writes step {step}", flush=True)
        time.sleep(2.0)
        plain(folder, step, *rest)

    checkpoint._save = slowly


def full_disk() -> None:
    """No file may grow beyond what the small ones of a run have; a checkpoint's tensors do."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))


def out_of_memory() -> None:
    """The last rank asks for more than there is in the fourth step of this life."""
    plain, steps_taken = train.take_step, itertools.count(1)

    def greedy(*arguments):
        if next(steps_taken) == 4 and os.environ["RANK"] == "1":
            torch.empty(1 << 50, dtype=torch.uint8)
        return plain(*arguments)

    train.take_step = greedy


def absent() -> None:
    """The last rank does not come."""
    plain = start_of_group.meet

    def comes_not(timeout):
        if os.environ["RANK"] == "1":
            time.sleep(600)
        return plain(timeout)

    start_of_group.meet = comes_not


def lost_after_meeting() -> None:
    """The last rank is gone as soon as all have met."""
    plain = train.start

    def dies(*arguments):
        engine = plain(*arguments)
        if engine.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return engine

    train.start = dies


def slow_baselines() -> None:
    """To score the baselines takes for ever."""

    def slowly(*_):
        print("scores the baselines", flush=True)
        time.sleep(600)

    evaluate.score_baselines = slowly


def stopped_in_a_step() -> None:
    """The last rank of the doctor's stands still in the third step; no Java."""
    plain = steps.take_step

    def stops(config, learner, batches, step, *rest):
        if step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return plain(config, learner, batches, step, *rest)

    steps.take_step, examine.check_metrics = stops, lambda _: ()


HOW = {
    each.__name__: each
    for each in (
        *(slow_evaluation, failing_export, slow_steps, slow_saves, full_disk, out_of_memory, absent),
        lost_after_meeting,
        *(slow_baselines, stopped_in_a_step),
    )
}


def rank(number: int, port: int, program: str, arguments: list[str]) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GROUP_RANK="0")
    run_program(PROGRAMS[program], arguments, f"sat {program}")


def launcher(program: str, arguments: list[str], log: str, how: list[str], reply: int) -> None:
    """As torch's: the first rank that fails ends the others."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for each in how:
        if each in HOW:
            HOW[each]()
        else:
            os.environ["SAT_CRASH_POINT"] = each
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for number in range(RANKS):
        if (pid := os.fork()) == 0:
            rank(number, port, program, arguments)
            os._exit(0)
        ranks.append(pid)
    os.write(reply, json.dumps({"launcher": os.getpid(), "ranks": ranks}).encode() + b"\n")
    os.close(reply)
    left, code = set(ranks), 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        ended = os.waitstatus_to_exitcode(status)
        Path(f"{log}.{pid}").write_text(str(ended))
        if ended and not code:
            code = ended
            for other in left:
                os.kill(other, signal.SIGTERM)
    os._exit(code & 0xFF)


def start(order: dict) -> dict:
    here, there = os.pipe()
    if os.fork() == 0:
        try:
            launcher(order.get("program", "train"), order["start"], order["log"], order["how"], there)
        finally:
            os._exit(99)
    os.close(there)
    with os.fdopen(here) as reply:
        return json.loads(reply.readline())


def wait(seconds: float) -> dict:
    """Everything that has this process for its parent, sooner or later."""
    codes, until, orphans = {}, time.monotonic() + seconds, []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return {"codes": codes, "orphans": orphans}
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > until:
            mine = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
            for child in map(int, Path(mine).read_text().split()):
                orphans.append(child)
                os.kill(child, signal.SIGKILL)
            until += 5
        else:
            time.sleep(0.02)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(start(order) if "start" in order else wait(order["wait"])), flush=True)
