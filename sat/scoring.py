"""Score during training, and keep the best model. What fails here costs its result, never the training.

Captions are decoded by all ranks, and scored by rank 0 beside the steps that follow. Surprising: the outcome is the
same as if everybody had waited. The weights that captioned are kept until the scores are there, lines of the journal
come after them, a checkpoint in between takes all of it along, and where the scores could end the training they are
waited for.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tqdm import tqdm

from sat import files
from sat.config import Config
from sat.data.loader import read_number_ids
from sat.engine.beside import Beside
from sat.engine.processes import Interrupted
from sat.evaluation.metrics import Scores, score
from sat.evaluation.report import write_captions
from sat.evaluation.split import caption_split, scored_references
from sat.export import save_model
from sat.learner import Learner
from sat.run_folder import Run
from sat.train_state import JournalValues, Progress, Unscored
from sat.training_data import TrainingData


def scoring_is_due(data: TrainingData, progress: Progress) -> bool:
    """Whether the evaluation after the last step is still to be done, or has no scores yet."""
    at_its_step = progress.step % data.eval_every == 0 or progress.step >= data.total_steps
    return progress.step > 0 and at_its_step and progress.evaluated_step != progress.step


@dataclass
class Evaluations:
    """Those of one life of a run, on every rank; at most one has no scores yet."""

    config: Config
    data: TrainingData
    learner: Learner
    run: Run
    first: int
    """Step at which this life has begun."""
    waiting: Unscored | None = None
    """The one that has none; its weights are on rank 0 alone."""

    def __post_init__(self) -> None:
        if self.waiting:
            self._score(self.waiting)

    @property
    def unscored(self) -> Unscored | None:
        """For a checkpoint."""
        return self.waiting and replace(self.waiting, lines=tuple(self.run.held or ()))

    def must_be_waited_for(self, progress: Progress) -> bool:
        """Whether nothing can be done before the scores are there.

        Nor before the first step: the processes that read batches are forked there, and would hold the open pipes of a
        Java that reads to their end.
        """
        patience = self.config.train.patience
        could_end = 0 < patience <= progress.evaluations_without_gain + 1
        at_an_end = progress.step in (self.first, self.data.total_steps)
        return self.waiting is not None and (could_end or at_an_end or self.is_due(progress))

    def is_due(self, progress: Progress) -> bool:
        """Whether there is a split to be captioned after the last step."""
        begun = self.waiting is not None and self.waiting.step == progress.step
        return scoring_is_due(self.data, progress) and not begun

    def begin(self, progress: Progress) -> bool:
        """Caption the evaluation split by free-running decoding, and begin to score it. All ranks enter.

        True says that it was left because of a wish to stop: nothing has changed, it is to be done again.
        """
        run, model, split = self.run, self.learner.evaluated.eval(), self.config.data.eval_split
        run.processes.pulse.beat(f"the evaluation after step {progress.step}")
        reading, search = self.data.reading, self.config.eval
        try:
            found = caption_split(
                [model], self.data.main, split, self.data.tokenizer, search, reading, run.processes, run.stop_wanted
            )
        except Interrupted:
            return True
        finally:
            self.learner.objective.train()
        looked = found.attention.values() if self.config.model.attention != "none" else {}
        kept = run.processes.is_main
        weights = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()} if kept else {}
        values: JournalValues = {**looked, "unfinished": found.unfinished}
        self.waiting = Unscored(progress.step, split, found.captions, values, weights)
        run.held = [] if kept else None
        self._score(self.waiting)
        return False

    def finish(self, progress: Progress) -> tuple[Progress, bool]:
        """Wait for the scores, log them and export the model if it is the best yet by CIDEr. All ranks enter.

        The second value says that it was left because of a wish to stop: nothing has changed.
        """
        done, run = self.waiting, self.run
        assert done is not None
        run.processes.pulse.beat(f"the scores of step {done.step}")
        try:
            scores: Scores = run.processes.result_beside(run.scores, run.stop_wanted)
        except Interrupted:
            return progress, True
        cider = scores.values["CIDEr"]
        if cider is None and not progress.best_step:
            raise ValueError(f"CIDEr could not be computed: {scores.reasons.get('CIDEr')}")
        better = cider is not None and cider > progress.best_cider
        files.crash_point("evaluated")
        self.waiting, run.scores, lines, run.held = None, None, run.held, None
        log_scores(done, scores, better, run)
        run.held = lines
        run.release()
        exported = run.processes.run_on_main(lambda: self._keep(done, better))
        files.crash_point("exported")
        return after_evaluation(progress, done.step, cider, exported), False

    def _score(self, waiting: Unscored) -> None:
        """Begin to; the references are read first, as the loop's reader is no other thread's. All ranks enter."""
        data, metrics = self.data, tuple(self.config.eval.metrics)

        def begin() -> None:
            references = scored_references(data.main, waiting.split, data.tokenizer.word_rule, data.reading.options)
            self.run.scores = Beside(lambda: score(references, waiting.captions, metrics))

        self.run.processes.run_on_main(begin)

    def _keep(self, done: Unscored, better: bool) -> bool:
        """Write captions and the best model; False where that should have been exported and could not."""
        run, data = self.run, self.data
        with kept_if_possible(f"the captions of step {done.step}"):
            captions = run.folder / "captions" / f"step-{done.step:08d}.json"
            number_ids = read_number_ids(data.main, done.split, data.reading.options)
            write_captions(captions, done.captions, number_ids)
            run.keep_artifact(captions, "captions")
        exported = not better
        if better:
            with kept_if_possible(f"the model of step {done.step}, the best yet"):
                save_model(run.best, done.weights, data.tokenizer, self.config, data.features, done.step)
                exported = True
        return exported


def after_evaluation(progress: Progress, step: int, cider: float | None, exported: bool) -> Progress:
    """Where training stands with the scores of `step`; one that could not be `exported` leaves the older the best."""
    progress = replace(progress, evaluated_step=step)
    if cider is None:
        return progress
    if cider <= progress.best_cider:
        return replace(progress, evaluations_without_gain=progress.evaluations_without_gain + 1)
    progress = replace(progress, evaluations_without_gain=0)
    return replace(progress, best_cider=cider, best_step=step) if exported else progress


def log_scores(done: Unscored, scores: Scores, better: bool, run: Run) -> None:
    """A line of the journal, where a score that is missing is null, and one for the reader. Rank 0 writes."""
    values = scores.values | {name: value for name, value in done.values.items() if name != "unfinished"}
    named = {f"{done.split}/{name}": value for name, value in values.items()}
    best = {f"best/{name}": value for name, value in values.items() if better and value is not None}
    best |= {"best/step": done.step} if better else {}
    run.log(done.step, named | best | {f"{done.split}/unfinished": done.values["unfinished"]})
    if run.processes.is_main:
        known = (f"{name} {value:.4f}" for name, value in sorted(named.items()) if value is not None)
        tqdm.write(f"step {done.step}: {', '.join(known)}")
        for name, reason in scores.reasons.items():
            if values.get(name, 0) is None:
                tqdm.write(f"warning: step {done.step} has no {name}: {reason}", file=sys.stderr)


@contextlib.contextmanager
def kept_if_possible(what: str) -> Iterator[None]:
    """What cannot be written inside, on a full disk above all, is a warning."""
    try:
        yield
    except Exception as error:  # each library has its own for a full disk
        tqdm.write(f"warning: {what} could not be written ({type(error).__name__}: {error})", file=sys.stderr)
