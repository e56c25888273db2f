"""One training's folder: settings, journal, status, and the wish to stop.

The surprise: a signal never interrupts anything. It is remembered, rides on the next step's count reduction, and all
ranks then save the same step and leave with exit code 0; `status.json` says whether training is finished or to be
resumed.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from sat import files
from sat.config import Config, TrackingConfig, flatten, load_config, save_config
from sat.engine.engine import Engine
from sat.engine.processes import Processes
from sat.stopping import Wish, listen
from sat.tracking.journal import Tracker

STOP_FILE = "STOP"
STATUS_FILE = "status.json"
CONFIG_FILE = "config.yaml"
STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""How a life of a run ends -> the same for MLflow. Until then the run is `running`."""


@dataclass(frozen=True)
class Status:
    """The content of status.json."""

    state: str
    """running, stopped (to be resumed), finished or failed (an error ended it)."""
    step: int = 0
    best_step: int = 0
    best_cider: float = -1.0
    error: str = ""
    """What ended a failed run."""


@dataclass
class Run:
    """A run folder that is being written."""

    folder: Path
    processes: Processes
    tracker: Tracker | None
    """Rank 0 only."""
    status: Status = field(default_factory=lambda: Status("running"))
    """What `open_run` writes when the run is left."""
    wish: Wish = field(default_factory=Wish)
    """Of this process, to stop."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path:
        """Folder of the exported model."""
        return self.folder / "best"

    def stop_wanted(self) -> bool:
        """Whether this rank has been asked to stop, by a signal or (rank 0) by the file STOP in the run folder."""
        return self.wish.is_there() or (self.processes.is_main and (self.folder / STOP_FILE).exists())

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """One line of the journal. Rank 0 writes."""
        if self.tracker:
            self.tracker.log(step, values)

    def keep_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file into the MLflow run. Rank 0 does."""
        if self.tracker:
            self.tracker.artifact(path, folder)

    def flush(self) -> None:
        """Bring the journal to the disk."""
        if self.tracker:
            self.tracker.flush()

    def write_status(self, status: Status) -> None:
        """Rank 0 writes."""
        self.status = status
        if self.processes.is_main:
            known = {name: value for name, value in asdict(status).items() if value != ""}
            files.write_json(self.folder / STATUS_FILE, known)


def read_status(folder: Path) -> Status | None:
    """What status.json says; None where there is none that can be read."""
    known = files.read_json(folder / STATUS_FILE)
    return (
        Status(**{name: known[name] for name in (each.name for each in fields(Status)) if name in known})
        if known
        else None
    )


@contextlib.contextmanager
def attach(folder: Path) -> Iterator[Tracker]:
    """The journal and MLflow run of a trained run folder, to add figures and files to. Rank 0 only."""
    config = load_config(folder / CONFIG_FILE)
    tracker = _open_tracker(folder, config.tracking, flatten(config), resume_step=sys.maxsize)
    try:
        yield tracker
    finally:
        tracker.close()


@contextlib.contextmanager
def open_run(config: Config, engine: Engine, resume_step: int) -> Iterator[Run]:
    """Make or re-open the run folder, listen to the wish to stop, and say in its status how it was left.

    All ranks enter; only rank 0 writes. Journal lines after `resume_step` belong to a life that was lost, and are
    superseded. Inside, the last act is to write a status; an exception makes it `failed`.
    """
    folder, processes = Path(config.train.run_dir), engine.processes

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / CONFIG_FILE)
        (folder / STOP_FILE).unlink(missing_ok=True)  # it was for an earlier life

    processes.run_on_main(prepare)
    tracker = None
    if processes.is_main:
        params = flatten(config) | {"world_size": processes.world_size, "engine": engine.name}
        tracker = _open_tracker(folder, config.tracking, params, resume_step)
    run = Run(folder, processes, tracker, wish=listen())
    run.keep_artifact(folder / CONFIG_FILE)
    run.write_status(Status("running", resume_step))
    try:
        yield run
    except BaseException as error:
        with contextlib.suppress(OSError):  # the error itself is what is to be told
            run.write_status(replace(run.status, state="failed", error=str(error) or type(error).__name__))
        raise
    finally:
        if tracker:
            tracker.close(STATES.get(run.status.state, "KILLED"))


def _open_tracker(folder: Path, tracking: TrackingConfig, params: Mapping[str, object], resume_step: int) -> Tracker:
    return Tracker(folder, tracking, params, resume_step)
