"""Score during training, and keep the best model. What fails here costs its result, never the training."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace

from tqdm import tqdm

from sat import files
from sat.config import Config
from sat.engine.processes import Interrupted
from sat.evaluation.report import write_captions
from sat.evaluation.split import Evaluation, evaluate
from sat.export import save_model
from sat.learner import Learner
from sat.run_folder import Run
from sat.train_state import Progress
from sat.training_data import TrainingData


def scoring_is_due(data: TrainingData, progress: Progress) -> bool:
    """Whether the evaluation after the last step is still to be done."""
    at_its_step = progress.step % data.eval_every == 0 or progress.step >= data.total_steps
    return progress.step > 0 and at_its_step and progress.evaluated_step != progress.step


def score_and_keep_best(
    config: Config, data: TrainingData, learner: Learner, progress: Progress, run: Run
) -> tuple[Progress, bool]:
    """Score the evaluation split by free-running decoding; export the best model yet by CIDEr. All ranks enter.

    The second value says that it was left because of a wish to stop: nothing has changed, it is to be done again.
    """
    run.processes.pulse.beat(f"the evaluation after step {progress.step}")
    model, split = learner.evaluated.eval(), config.data.eval_split
    try:
        result = evaluate(
            [model], data.main, split, data.tokenizer, config.eval, data.reading, run.processes, run.stop_wanted
        )
    except Interrupted:
        return progress, True
    finally:
        learner.objective.train()
    cider = result.scores.values["CIDEr"]
    if cider is None and not progress.best_step:
        raise ValueError(f"CIDEr could not be computed: {result.scores.reasons.get('CIDEr')}")
    better = cider is not None and cider > progress.best_cider
    files.crash_point("evaluated")
    log_scores(config, progress, result, better, run)

    def keep() -> bool:
        with kept_if_possible(f"the captions of step {progress.step}"):
            captions = run.folder / "captions" / f"step-{progress.step:08d}.json"
            write_captions(captions, result.captions)
            run.keep_artifact(captions, "captions")
        exported = not better
        if better:
            with kept_if_possible(f"the model of step {progress.step}, the best yet"):
                save_model(run.best, model.state_dict(), data.tokenizer, config, data.features, progress.step)
                exported = True
        return exported

    exported = run.processes.run_on_main(keep)
    files.crash_point("exported")
    return after_evaluation(progress, cider, exported), False


def after_evaluation(progress: Progress, cider: float | None, exported: bool) -> Progress:
    """Where training stands; a better model that could not be `exported` leaves the older one the best."""
    progress = replace(progress, evaluated_step=progress.step)
    if cider is None:
        return progress
    if cider <= progress.best_cider:
        return replace(progress, evaluations_without_gain=progress.evaluations_without_gain + 1)
    progress = replace(progress, evaluations_without_gain=0)
    return replace(progress, best_cider=cider, best_step=progress.step) if exported else progress


def log_scores(config: Config, progress: Progress, result: Evaluation, better: bool, run: Run) -> None:
    """A line of the journal, where a score that is missing is null, and one for the reader. Rank 0 writes."""
    split = config.data.eval_split
    values = result.scores.values | (result.attention.values() if config.model.attention != "none" else {})
    scores = {f"{split}/{name}": value for name, value in values.items()}
    best = {f"best/{name}": value for name, value in values.items() if better and value is not None}
    best |= {"best/step": progress.step} if better else {}
    run.log(progress.step, scores | best | {f"{split}/unfinished": result.unfinished})
    if run.processes.is_main:
        known = (f"{name} {value:.4f}" for name, value in sorted(scores.items()) if value is not None)
        tqdm.write(f"step {progress.step}: {', '.join(known)}")
        for name, reason in result.scores.reasons.items():
            if values.get(name, 0) is None:
                tqdm.write(f"warning: step {progress.step} has no {name}: {reason}", file=sys.stderr)


@contextlib.contextmanager
def kept_if_possible(what: str) -> Iterator[None]:
    """What cannot be written inside, on a full disk above all, is a warning."""
    try:
        yield
    except Exception as error:  # each library has its own for a full disk
        tqdm.write(f"warning: {what} could not be written ({type(error).__name__}: {error})", file=sys.stderr)
