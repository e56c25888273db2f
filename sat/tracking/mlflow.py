"""Bring a run folder's journal and artifacts to MLflow: `sat sync RUN`, at any time, repeatedly.

The same program, started by the training, follows a run while it is trained.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import typer

from sat.cli import run_program
from sat.credentials import shown
from sat.tracking.client import reason
from sat.tracking.journal import JOURNAL
from sat.tracking.load import Sampler
from sat.tracking.placing import Deleted, run_lock
from sat.tracking.record import RECORD, Record
from sat.tracking.uploader import Uploader

EVALUATIONS = "evaluations"
"""Folder of a run's evaluations, each with a journal and a record of its own."""
SEND_EVERY_S = 1.0
LONGEST_RETRY_S = 60.0
LAST_WORDS_S = 10
"""Time to finish after the training has died without a word."""


def sync(run_dir: str | os.PathLike[str], weights: Path | None = None, model: bool = True) -> int:
    """Send MLflow all it lacks of the run and its evaluations, now; returns the number of points and artifacts sent.

    `weights`: the encoder's, for the logged model, where they are not where the settings said. `model`:
    log the best model too.

    Raises ValueError for a folder without tracking settings and for one whose own uploader is at work, and whatever
    MLflow raises when it cannot be reached.
    """
    folder = Path(run_dir).resolve()
    record = _record_of(folder)
    with run_lock(folder) as mine:
        if not mine:
            raise ValueError(f"{folder} is being uploaded by another process; its training is still running")
        if weights:
            record = replace(record, encoder_weights=str(weights.resolve()))
            record.write(folder)
        uploader = Uploader(folder, record)
        sent = uploader.send(model)
        if model:
            uploader.log_model()
        if record.status:
            uploader.mark(record.status, record.ended)
    return sent + sum(sync(path.parent) for path in sorted((folder / EVALUATIONS).glob(f"*/{RECORD}")))


def anew(run_dir: str | os.PathLike[str], experiment: str = "") -> None:
    """Let the next upload make another MLflow run with everything in it, in `experiment` where that is given."""
    folder = Path(run_dir).resolve()
    record = _record_of(folder)
    with run_lock(folder) as mine:
        if not mine:
            raise ValueError(f"{folder} is being uploaded by another process; stop its training first")
        replace(record, key=uuid4().hex, experiment=experiment or record.experiment).write(folder)
    for path in sorted((folder / EVALUATIONS).glob(f"*/{RECORD}")):
        anew(path.parent, experiment)


def follow(folder: Path, parent: int) -> None:
    """Keep MLflow up to date until the training (process `parent`) closes its tracker or dies. Raises nothing."""
    uploader, failures, told = None, 0, False
    sampler = Sampler(folder)
    while True:
        record, alive = Record.read(folder) or Record(), os.getppid() == parent
        last = not alive or bool(record.status)
        if not alive:
            signal.alarm(LAST_WORDS_S)
        if record.system_metrics:
            sampler.look()
        try:
            if uploader is None:
                uploader = Uploader(folder, record)
                uploader.mark("RUNNING")
            sent = uploader.send(model=alive)
            if last:
                uploader.mark(record.status or "FAILED", record.ended)
            if failures:
                _say(f"MLflow answers again; {sent} points and artifacts caught up")
            failures, told = 0, False
        except Exception as error:  # whatever it is, the journal has everything
            if not failures or (isinstance(error, Deleted) and not told):
                _say(shown(f"no MLflow at {record.uri}: {reason(error)}; {JOURNAL} keeps everything"))
            uploader, failures, told = None, failures + 1, isinstance(error, Deleted)
        if last:
            if failures:
                _say(f"MLflow lacks a part of this run; catch up: sat sync {folder}")
            return
        sampling = sampler.look if record.system_metrics else None
        _pause(folder, parent, min(SEND_EVERY_S * 2 ** min(failures, 10), LONGEST_RETRY_S), sampling)


def _record_of(folder: Path) -> Record:
    record = Record.of_folder(folder)
    if record is None:
        raise ValueError(f"{folder} has no {RECORD}: it is no run folder, or the run had tracking.mlflow_uri=none")
    return record


def _pause(folder: Path, parent: int, seconds: float, meanwhile: Callable[[], None] | None) -> None:
    """Wait, but not longer than the training lives."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and os.getppid() == parent:
        record = Record.read(folder)
        if record is None or record.status:
            return
        if meanwhile is not None:
            meanwhile()
        time.sleep(min(0.25, seconds))


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main(
    run: Annotated[Path, typer.Argument(help="run folder")],
    another: Annotated[
        bool, typer.Option("--anew", help="make another MLflow run, where the old one was deleted there")
    ] = False,
    experiment: Annotated[str, typer.Option(help="with --anew: MLflow experiment that it is made in")] = "",
    weights: Annotated[
        Path | None, typer.Option(help="encoder's file, or its folder, for the logged model; default: as in training")
    ] = None,
    model: Annotated[bool, typer.Option(help="log the best model as an MLflow model, unless it is there")] = True,
    parent: Annotated[int, typer.Option(help="follow the run while this process lives", hidden=True)] = 0,
) -> None:
    """Bring a run's metrics, artifacts, model and evaluations to MLflow; what is there already is not sent twice."""
    folder = run.resolve()
    if experiment and not another:
        raise ValueError("--experiment needs --anew: a run cannot be moved to another experiment, only made anew there")
    if not parent:
        try:
            if another:
                anew(folder, experiment)
            print(f"{sync(folder, weights, model)} points and artifacts sent")
        except ValueError:
            raise
        except Exception as error:  # of MLflow and what lies below it
            raise ValueError(reason(error)) from error
        return None
    while os.getppid() == parent:  # the uploader of the run's previous life may be at its last words
        with run_lock(folder) as mine:
            if mine:
                return follow(folder, parent)
        time.sleep(0.25)
    return None


if __name__ == "__main__":
    run_program(main)
