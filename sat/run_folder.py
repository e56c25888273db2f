"""One training's folder: settings, journal, status, and the wish to stop.

The surprise: a signal never interrupts anything. It is remembered, rides on the next step's count reduction, and all
ranks then save the same step and leave with exit code 0; `status.json` says whether training is finished or to be resumed.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sat.checkpoint import write_json
from sat.config import Config, flatten, load_config, save_config
from sat.engine.processes import Runtime
from sat.tracking.journal import Tracker

STOP_FILE = "STOP"


@dataclass(frozen=True)
class Run:
    folder: Path
    runtime: Runtime
    tracker: Tracker | None
    """Rank 0 only."""
    signals: list[int] = field(default_factory=list)
    """Signals received, in order."""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path:
        return self.folder / "best"

    def stop_wanted(self) -> bool:
        """Whether this rank has been asked to stop, by a signal or (rank 0) by the file STOP in the run folder."""
        return bool(self.signals) or (self.runtime.is_main and (self.folder / STOP_FILE).exists())

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.tracker:
            self.tracker.log(step, values)

    def keep_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file into the MLflow run."""
        if self.tracker:
            self.tracker.artifact(path, folder)

    def write_status(self, state: str, **facts: object) -> None:
        """`state` is running, stopped (to be resumed) or finished. Rank 0 writes."""
        if self.runtime.is_main:
            write_json(self.folder / "status.json", {"state": state, **facts})

    def close(self, finished: bool) -> None:
        if self.tracker:
            self.tracker.close("FINISHED" if finished else "KILLED")


def read_status(folder: Path) -> dict:
    """The content of status.json; {} where there is none."""
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@contextlib.contextmanager
def attach(folder: Path) -> Iterator[Tracker]:
    """The journal and MLflow run of a trained run folder, to add figures and files to. Rank 0 only."""
    config = load_config(folder / "config.yaml")
    tracker = Tracker(
        folder,
        mlflow_uri=config.tracking.mlflow_uri,
        experiment=config.tracking.experiment,
        run_name=config.tracking.run_name,
        params=flatten(config),
        resume_step=sys.maxsize,
    )
    try:
        yield tracker
    finally:
        tracker.close()


def open_run(config: Config, runtime: Runtime, resume_step: int) -> Run:
    """Make or re-open the run folder, and start listening for SIGTERM and SIGUSR1. All ranks enter; only rank 0 writes.

    Journal lines after `resume_step` belong to a life that was lost, and are superseded.
    """
    folder = Path(config.train.run_dir)

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        (folder / STOP_FILE).unlink(missing_ok=True)  # it was for an earlier life

    runtime.run_on_main(prepare)
    tracker = None
    if runtime.is_main:
        tracker = Tracker(
            folder,
            mlflow_uri=config.tracking.mlflow_uri,
            experiment=config.tracking.experiment,
            run_name=config.tracking.run_name,
            params=flatten(config) | {"world_size": runtime.world_size, "deepspeed": runtime.deepspeed},
            resume_step=resume_step,
        )
    run = Run(folder, runtime, tracker)
    run.keep_artifact(folder / "config.yaml")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: run.signals.append(received))
    run.write_status("running", step=resume_step)
    return run
