"""Checkpoints as the loop needs them: begun at once, their end looked at later; a failure is a state, not a sentence.

A save that fails costs nothing but what it would have saved: training goes on, `status.json` says so, and three in a
row end the run. Its last save is waited for and tried twice.
"""

import sys
from dataclasses import dataclass, replace

from tqdm import tqdm

from sat.checkpoint import CANDIDATE, Saver, SaveResult
from sat.files import crash_point
from sat.learner import Learner
from sat.run_folder import Run
from sat.stopping import StartAgain
from sat.train_state import Progress, TrainState


@dataclass
class Saves:
    """Of one life of a run, on every rank."""

    saver: Saver
    run: Run
    begun: Progress | None = None
    """What the newest checkpoint holds, or will hold."""

    def begin(self, learner: Learner, state: TrainState) -> None:
        """Begin to save `state`; waits for a save that is still under way. All ranks enter."""
        self.run.flush()
        self.run.processes.pulse.beat(f"saving step {state.progress.step}")
        scored = state.unscored.weights if state.unscored else {}
        candidate = {f"{CANDIDATE}/{name}": value for name, value in scored.items()}
        self.saver.begin(state.progress.step, learner.state(self.run.processes) | candidate, state)
        self.begun = state.progress
        crash_point("checkpoint-begun")
        self.look(state.progress)

    def look(self, progress: Progress) -> None:
        """Take note of saves that have ended, without waiting."""
        self._note(self.saver.poll(), progress)

    def finish(self, learner: Learner, state: TrainState, *, ended: bool) -> None:
        """Have `state` saved when this returns; with nothing learnt yet there is nothing to save. All ranks enter.

        Raises ValueError where that fails at a training's end, and StartAgain where it was only stopped.
        """
        progress = state.progress
        if self.begun != progress and progress.step > 0:
            self.begin(learner, state)
        error = self._wait(progress)
        if error:
            self.begin(learner, state)
            error = self._wait(progress)
        if error and ended:
            raise ValueError(f"{self.run.folder} has taken all its steps, but {error}; make room, and start it again")
        if error:
            raise StartAgain(f"stopped, but {error}; make room, and start it again: it goes on from an older one")

    def _wait(self, progress: Progress) -> str:
        """Why the newest save has failed, "" where it has not; whoever has taken note of its end, all ranks know."""
        run = self.run
        self._note(self.saver.wait(), progress)
        known = (run.saved_step, run.failed_saves, run.save_error)
        run.saved_step, run.failed_saves, run.save_error = run.processes.broadcast(known)
        return run.save_error

    def _note(self, results: list[SaveResult], progress: Progress) -> None:
        run = self.run
        for each in results:
            run.failed_saves = run.failed_saves + 1 if each.error else 0
            run.save_error = f"the checkpoint of step {each.step} was NOT saved: {each.error}" if each.error else ""
            if each.error and run.processes.is_main:
                tqdm.write(f"warning: {run.save_error}; the older ones stay", file=sys.stderr)
            if not each.error:
                run.saved_step = each.step
        if results:
            run.write_status(replace(run.status_of("running", progress), error=run.save_error))
