"""The lives of a run under a scheduler: whether another begins, and how the last one ended.

    python -m sat.lives begin CONFIG [KEY=VALUE]...      prints the run folder; refuses a job that has died too often
    python -m sat.lives end RUN STATUS ASKED             exit status 75: queue it again; else it is over

The surprise: what counts first is the run folder's status.json, not an exit status, which a scheduler, its launcher and
a killed process each change in their own way. Every life leaves a line in `lives.jsonl`, also one that died in silence.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from sat import files
from sat.cli import run_program
from sat.config import load_config
from sat.stopping import START_AGAIN

LIVES = "lives.jsonl"
DEATHS = 2
"""So many deaths in a row without a newer checkpoint are a crash loop."""
_STATUS, _STOP = "status.json", "STOP"  # of sat.run_folder, which needs torch


@dataclass(frozen=True)
class Life:
    """One life of a run: how it began, and, in a second line, how it ended."""

    job: str
    began: float
    saved_step: int
    """Newest checkpoint when it began."""
    status: str
    """Which status.json was there, so that one of this life is told from it."""
    end: str = ""
    """`finished`, `stopped` (to go on) or `failed`; "" while it lives and where it died without a word."""


def begin(run: Path, job: str, most: int) -> None:
    """Enter a life of `job` into `lives.jsonl`; at most `most` after its first.

    Raises ValueError where the lives before it show that it would die as they did.
    """
    mine, saved = _of(run, job), saved_step(run)
    if len(mine) > most:
        raise ValueError(_too_many(run, job, most, saved))
    if (dead := deaths(mine, saved)) >= DEATHS:
        raise ValueError(_loop(run, job, dead, saved))
    if _stop_file(run) == job:
        (run / _STOP).unlink(missing_ok=True)  # it was for the life before
    run.mkdir(parents=True, exist_ok=True)
    _enter(run, Life(job, time.time(), saved, _which_status(run)))


def end(run: Path, job: str, launched: int, asked: bool, most: int) -> tuple[int, str]:
    """Enter how the job's newest life has ended; (exit status, why): 75 where it is to be queued again.

    `launched`: exit status of the launcher. `asked`: whether the scheduler has asked for the stop.
    """
    mine, saved = _of(run, job), saved_step(run)
    life, state = mine[-1], _state(run, mine[-1])
    again = f"{run} goes on in its next life, from step {saved}"
    if state == "finished" and launched == 0:
        how, status, words = "finished", 0, f"{run} is finished"
    elif launched in (1, 2) or (state == "failed" and launched == 0):
        how, status, words = "failed", launched or 1, f"an error, said above, ended {run}: it is not queued again"
    elif _stop_file(run) not in ("", job) and state == "stopped":
        how, status, words = (
            "stopped",
            0,
            f"{run} stands at step {saved}, stopped by the file {_STOP}: it is not queued again",
        )
    elif asked or (state == "stopped" and launched == 0):
        how, status, words = "stopped", START_AGAIN, again
    elif (dead := deaths(mine, saved)) >= DEATHS:
        how, status, words = "", launched or 1, _loop(run, job, dead, saved)
    else:
        how, status, words = "", START_AGAIN, f"exit status {launched}: {again}"
    if status == START_AGAIN and len(mine) > most:
        status, words = 1, _too_many(run, job, most, saved)
    if how:
        _enter(run, replace(life, end=how))
    return status, words


def deaths(mine: Sequence[Life], saved: int) -> int:
    """How many of the last lives have died in a row, all since step `saved` was the newest checkpoint."""
    count = 0
    for life in reversed(mine):
        if life.end or life.saved_step != saved:
            break
        count += 1
    return count


def lives(run: Path) -> list[Life]:
    """All that `lives.jsonl` knows, in order; the line of an end replaces that of its beginning."""
    found: dict[tuple[str, float], Life] = {}
    lines = (run / LIVES).read_text().splitlines() if (run / LIVES).exists() else []
    for line in lines:
        try:
            life = Life(**json.loads(line))
        except (ValueError, TypeError):
            continue  # cut off by a full disk, say
        found[life.job, life.began] = life
    return list(found.values())


def saved_step(run: Path) -> int:
    """Step of the newest committed checkpoint; 0 without one."""
    committed = [path.parent.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*/COMMIT.json")]
    return max((int(step) for step in committed if step.isdecimal()), default=0)


def _of(run: Path, job: str) -> list[Life]:
    return [life for life in lives(run) if life.job == job]


def _stop_file(run: Path) -> str:
    """Who has put the file STOP there: a job, by its id, or `a person`; "" where there is none."""
    path = run / _STOP
    return (path.read_text().strip() or "a person") if path.exists() else ""


def _which_status(run: Path) -> str:
    path = run / _STATUS
    return f"{path.stat().st_ino} {path.stat().st_mtime_ns}" if path.exists() else ""


def _state(run: Path, life: Life) -> str:
    """What status.json says of this life; "" where it has not got so far as to write one. Finished is finished."""
    state = str(files.read_json(run / _STATUS).get("state", ""))
    return state if state == "finished" or _which_status(run) != life.status else ""


def _enter(run: Path, life: Life) -> None:
    with open(run / LIVES, "a") as file:
        file.write(json.dumps(asdict(life)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _loop(run: Path, job: str, dead: int, saved: int) -> str:
    return (
        f"{run}: job {job} has died {dead} times in a row without a checkpoint newer than step {saved}: it is not "
        "queued again; its log says why; when that is mended, a new job goes on"
    )


def _too_many(run: Path, job: str, most: int, saved: int) -> str:
    return (
        f"{run}: job {job} has been queued again {most} times, as often as MAX_RESTARTS allows; a new job goes on from "
        f"step {saved}"
    )


def main(
    what: Annotated[str, typer.Argument(help="begin or end")],
    words: Annotated[list[str], typer.Argument(help="CONFIG [KEY=VALUE]..., or RUN STATUS ASKED")],
) -> int:
    """For slurm/train.sh; the job is SLURM_JOB_ID, and MAX_RESTARTS bounds its lives."""
    job, most = os.environ["SLURM_JOB_ID"], os.environ.get("MAX_RESTARTS", "100")
    if not most.isdecimal():
        raise ValueError(f"MAX_RESTARTS is {most!r}; it must be a whole number")
    if what == "begin":
        run = Path(load_config(Path(words[0]), words[1:]).train.run_dir)
        begin(run, job, int(most))
        print(run)
        return 0
    status, said = end(Path(words[0]), job, int(words[1]), words[2] == "1", int(most))
    print(said, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    run_program(main)
