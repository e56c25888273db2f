"""One training's folder: settings, journal, status, and the wish to stop.

The surprise: a signal never interrupts anything. It is remembered, rides on the next step's count reduction, and all
ranks then save the same step and leave with exit code 0; `status.json` says whether training is finished or to be
resumed. What the disk does not take is a warning.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sat import files
from sat.config import Config, flatten, save_config
from sat.credentials import masked
from sat.engine.beside import Beside
from sat.engine.engine import Engine
from sat.engine.processes import Processes
from sat.run_lock import owned
from sat.stopping import Wish
from sat.tracking.journal import CLOSE_TIMEOUT_S, STOPPED_TIMEOUT_S, Tracker
from sat.tracking.record import About
from sat.train_state import Progress, Unscored

STOP_FILE = "STOP"
STATUS_FILE = "status.json"
CONFIG_FILE = "config.yaml"
BEST = "best"
CHECKPOINTS = "checkpoints"
FAILED_SAVES_ALLOWED = 2
"""In a row."""
STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""How a life of a run ends -> the same for MLflow. Until then the run is `running`."""


@dataclass(frozen=True)
class Status:
    """The content of status.json."""

    state: str
    """running, stopped (to be resumed), finished or failed (an error ended it)."""
    step: int = 0
    saved_step: int = 0
    """Of the newest checkpoint."""
    best_step: int = 0
    best_cider: float = -1.0
    error: str = ""
    """What ended a failed run, or why the newest checkpoint is not newer."""


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
    saved_step: int = 0
    """Of the newest checkpoint; known on rank 0 and, after the end, on all."""
    failed_saves: int = 0
    """In a row; known as `saved_step` is."""
    save_error: str = ""
    """Of the last of them."""
    scores: Beside[Any] | None = None
    """Of an evaluation, while they are being computed; rank 0 only."""
    held: list[tuple[int, dict[str, float | None]]] | None = None
    """Lines of the journal that are to come after those scores; None: nothing is waited for. Rank 0 only."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def best(self) -> Path:
        """Folder of the exported model."""
        return self.folder / BEST

    def stop_wanted(self) -> bool:
        """Whether this rank has been asked to stop, by a signal or (rank 0) by the file STOP in the run folder."""
        return self.wish.is_there() or (self.processes.is_main and (self.folder / STOP_FILE).exists())

    def any_stop_wanted(self) -> bool:
        """Whether any rank has been asked to stop. All ranks enter."""
        return self.processes.sum_over_ranks([self.stop_wanted()])[0] > 0

    def refuse_failing_saves(self, failed: float) -> None:
        """Raise ValueError where too many saves in a row have `failed`. All ranks enter with the same number."""
        if failed > FAILED_SAVES_ALLOWED:
            error = self.processes.broadcast(self.save_error)
            raise ValueError(f"{failed:.0f} saves in a row have failed, {error}; make room, and start it again")

    def status_of(self, state: str, progress: Progress) -> Status:
        """For `write_status`: how training stands."""
        return Status(state, progress.step, self.saved_step, progress.best_step, progress.best_cider)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """One line of the journal. Rank 0 writes, or holds it back."""
        if self.held is not None:
            self.held.append((step, dict(values)))
        elif self.tracker:
            self.tracker.log(step, values)

    def release(self) -> None:
        """Write the lines that were held back."""
        lines, self.held = self.held or [], None
        for step, values in lines:
            self.log(step, values)

    def keep_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file into the MLflow run. Rank 0 does."""
        if self.tracker:
            self.tracker.artifact(path, folder)

    def keep_model(self) -> None:
        """Have the best model logged in MLflow. Rank 0 does."""
        if self.tracker:
            self.tracker.model()

    def flush(self) -> None:
        """Bring the journal to the disk."""
        if self.tracker:
            self.tracker.flush()

    def write_status(self, status: Status) -> None:
        """Rank 0 writes; a full disk keeps what was there."""
        self.status = status
        if self.processes.is_main:
            known = {name: value for name, value in asdict(status).items() if value != ""}
            try:
                files.write_json(self.folder / STATUS_FILE, known)
            except OSError as error:
                print(f"warning: {self.folder / STATUS_FILE} is not up to date: {error}", file=sys.stderr, flush=True)

    def fail(self, error: str) -> None:
        """Rank 0 writes that it has ended by this."""
        self.write_status(replace(self.status, state="failed", error=error))


def read_status(folder: Path) -> Status | None:
    """What status.json says; None where there is none that can be read."""
    known = files.read_json(folder / STATUS_FILE)
    return (
        Status(**{name: known[name] for name in (each.name for each in fields(Status)) if name in known})
        if known
        else None
    )


@contextlib.contextmanager
def owned_run(folder: Path, processes: Processes) -> Iterator[None]:
    """Be the only training in a run folder; see `sat.run_lock.owned`. All ranks enter, rank 0 holds the lock."""
    with contextlib.ExitStack() as held:
        processes.run_on_main(lambda: held.enter_context(owned(folder)))
        yield


def forget_stop(folder: Path) -> None:
    """Remove the wish that was for an earlier life; at a program's very beginning, later ones are for this life."""
    (folder / STOP_FILE).unlink(missing_ok=True)


def _prepare(folder: Path, config: Config) -> None:
    """Make the folder, or remove what a kill has left half done in it."""
    folder.mkdir(parents=True, exist_ok=True)
    files.recover_folder(folder / BEST)
    files.sweep(folder / CHECKPOINTS, "step-*")
    for names in (f"{BEST}*", "*.json", "*.yaml"):
        files.sweep(folder, names)
    save_config(config, folder / CONFIG_FILE)


@contextlib.contextmanager
def open_run(
    config: Config,
    engine: Engine,
    progress: Progress,
    wish: Wish,
    about: About | None = None,
    unscored: Unscored | None = None,
) -> Iterator[Run]:
    """Make or re-open the run folder, and say in its status how it was left; MLflow is told what it is `about`.

    All ranks enter; only rank 0 writes. Journal lines after the step of `progress`, and those of an evaluation that is
    to be done or scored again, belong to a life that was lost and are superseded; what came after `unscored` is held
    back until it has its scores. Inside, the last act is to write a status; an
    exception makes it `failed`.
    """
    folder, processes = Path(config.train.run_dir), engine.processes

    processes.run_on_main(lambda: _prepare(folder, config))
    tracker = None
    if processes.is_main:
        about, spread = about or About(), {"world_size": processes.world_size, "engine": engine.name}
        params = masked(flatten(config)) | spread | {"device": str(processes.device), **about.digests}
        step, redone = progress.step, f"{config.data.eval_split}/" if progress.evaluated_step != progress.step else ""
        if unscored:
            step, redone = unscored.step, f"{unscored.split}/"
        tracker = Tracker(folder, config.tracking, params, step, redone, about.inputs)
    run = Run(folder, processes, tracker, wish=wish, saved_step=progress.step)
    if unscored and processes.is_main:
        run.held = list(unscored.lines)
    run.keep_artifact(folder / CONFIG_FILE)
    run.write_status(run.status_of("running", progress))
    try:
        yield run
    except BaseException as error:
        run.fail(str(error) or type(error).__name__)
        raise
    finally:
        if tracker:
            run.release()
            patience = STOPPED_TIMEOUT_S if wish.is_there() else CLOSE_TIMEOUT_S
            tracker.close(STATES.get(run.status.state, "KILLED"), patience)
