"""Train a captioner: the file to read first. Fetch, step, log, save, score.

The surprise: there is no hidden state. Which samples a step sees, its learning rate and its random numbers are pure
functions of the seed, the step and the samples, so a run continues from its counters and weights alone.
"""

import itertools
import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from sat import checkpoint
from sat.cli import run_program
from sat.config import Config, fixed_settings, load_config
from sat.data.batch import CaptionBatch
from sat.data.loader import training_batches
from sat.data.order import derive_key
from sat.data.plan import Cursor, Share
from sat.engine.engine import Engine, StepResult
from sat.engine.processes import Processes
from sat.engine.start import is_first_announced, start
from sat.evaluation.report import write_captions
from sat.evaluation.split import evaluate
from sat.export import save_model
from sat.learner import Learner, build_learner
from sat.machine import best_precision, speed_up
from sat.meter import AttentionUse, Meter, Step, Watch
from sat.optim import learning_rate
from sat.run_folder import CONFIG_FILE, Run, Status, open_run, read_status
from sat.train_state import Identity, Progress, TrainState, finished_before
from sat.training_data import TrainingData, open_data

FLAT_SHARE = 0.8
"""Attention over more than this share of the cells, in effect, is flat."""


def train(config: Config, engine: Engine) -> Progress:
    """Run, or continue, the training that `config` describes. All ranks enter; returns where it ended."""
    data = open_data(config)
    learner = build_learner(config, data, engine)
    this = identity(config, data)
    progress = resume(config, data, learner, this, engine)
    with open_run(config, engine, progress.step) as run, progress_bar(data, progress, run) as bar:
        meter, watch = Meter(), Watch(config.train.max_skipped_steps)
        saver = checkpoint.Saver(run.checkpoints, run.processes, config.train.keep_checkpoints)
        finished, stop = has_ended(config, data, progress), False
        with closing(steps_from(config, data, progress.cursor, run.processes, meter)) as steps:
            while not (finished or stop):
                batches = next(steps)
                result, stop = take_step(config, learner, batches, progress.step, run, meter)
                progress = advanced(progress, batches)
                bar.update()
                last, diverged = progress.step == data.total_steps, watch.see(result)
                if progress.step % config.train.log_every == 0 or last or diverged:
                    log_step(progress.step, meter, learner, run, bar)
                warn_of(saver.poll())
                if diverged:
                    warn_of(saver.wait())
                    raise ValueError(divergence(config, progress.step, watch, run))
                if progress.step % data.eval_every == 0 or last:
                    with meter.paused():
                        progress = score_and_keep_best(config, data, learner, progress, run)
                finished = has_ended(config, data, progress)
                if finished or stop or progress.step % data.save_every == 0:
                    save(learner, TrainState(progress, this, data.total_steps, written_by(engine)), run, saver)
        warn_of(saver.wait())
        for path in sorted(run.best.glob("*")):
            run.keep_artifact(path, "model")
        run.write_status(status_of("finished" if finished else "stopped", progress))
    return progress


def steps_from(
    config: Config, data: TrainingData, cursor: Cursor, processes: Processes, meter: Meter
) -> Generator[list[CaptionBatch], None, None]:
    """The micro-batches of each remaining optimizer step, over all remaining epochs; waiting time goes to the meter."""
    train = config.train
    batches = training_batches(
        data.sources,
        data.tokenizer,
        replace(data.reading, pin_memory=processes.device.type == "cuda"),
        splits=config.data.train_splits,
        cursor=cursor,
        epochs=train.epochs - cursor.epoch,
        global_batch=train.global_batch,
        share=Share(processes.rank, processes.world_size, train.accumulation_steps),
    )
    with closing(batches):
        while of_step := meter.wait_for(lambda: list(itertools.islice(batches, train.accumulation_steps))):
            yield of_step


def take_step(
    config: Config, learner: Learner, batches: list[CaptionBatch], step: int, run: Run, meter: Meter
) -> tuple[StepResult, bool]:
    """One optimizer step over `batches`; what became of it, and whether any rank was asked to stop. All ranks enter."""
    processes = run.processes
    local = [
        sum(int(batch.tokens) for batch in batches),
        sum(int(batch.caption_count) for batch in batches),
        run.stop_wanted(),
    ]
    tokens, captions, stop = processes.sum_over_ranks(local)
    rate = learner.set_learning_rate(step)
    counts = [
        learner.learn(batch, step, tokens, captions, last=batch is batches[-1], processes=processes)
        for batch in batches
    ]
    result = learner.stepper.step()
    learner.after_step(result, counts, processes)
    meter.steps.append(Step(counts, tokens, captions, rate, sum(batch.bad for batch in batches), result))
    return result, stop > 0


def advanced(progress: Progress, batches: list[CaptionBatch]) -> Progress:
    """After a step over `batches`. The cursor moves only here, so what was read ahead is neither lost nor repeated."""
    cursor, batch = progress.cursor, batches[0]
    cursor = (cursor if batch.epoch == cursor.epoch else cursor.next_epoch()).advanced(batch.samples_done)
    return replace(progress, step=progress.step + 1, cursor=cursor)


def has_ended(config: Config, data: TrainingData, progress: Progress) -> bool:
    """Whether all steps are done, or too many evaluations in a row have brought nothing."""
    return progress.step >= data.total_steps or 0 < config.train.patience <= progress.evaluations_without_gain


# ------------------------------------------------------------------ continue and save


def identity(config: Config, data: TrainingData) -> Identity:
    """Which training this is, whatever the engine and the number of ranks."""
    features: list[list[str | float]] = [[manifest.digest, weight] for manifest, weight in data.sources]
    return Identity(fixed_settings(config), features, data.tokenizer.digest)


def written_by(engine: Engine) -> str:
    """How training is spread now; the next life may be spread otherwise."""
    return f"{engine.name} on {engine.processes.world_size} ranks"


def resume(config: Config, data: TrainingData, learner: Learner, current: Identity, engine: Engine) -> Progress:
    """Load the newest whole checkpoint of the run folder, if there is one. All ranks enter.

    Raises ValueError when it belongs to another training, or when all checkpoints are damaged.
    """
    processes = engine.processes
    path = processes.run_on_main(lambda: checkpoint.latest(Path(config.train.run_dir) / "checkpoints"))
    if path is None:
        return Progress(Cursor.start(data.sources, config.train.seed))
    state = TrainState.read(path)
    state.identity.refuse(current)
    learner.load_state(checkpoint.read(path))
    if processes.is_main:
        print(f"continuing {path} at step {state.progress.step} of {data.total_steps}", flush=True)
        if state.written_by != written_by(engine):
            print(f"it was written by {state.written_by}, and goes on with {written_by(engine)}", flush=True)
        if state.total_steps != data.total_steps:
            print(other_length(config, state, data.total_steps), flush=True)
        if has_ended(config, data, state.progress):
            print(f"{config.train.run_dir} is finished: nothing is left to do", flush=True)
    return state.progress


def other_length(config: Config, state: TrainState, total_steps: int) -> str:
    """What another number of epochs means for the schedule."""
    then, now = (
        learning_rate(
            state.progress.step,
            peak=config.train.learning_rate,
            warmup_steps=config.train.warmup_steps,
            total_steps=steps,
        )
        for steps in (state.total_steps, total_steps)
    )
    return (
        f"train.epochs is now {config.train.epochs}: {total_steps} steps instead of {state.total_steps}, "
        f"and the learning rate goes on at {now:.3g} instead of {then:.3g}"
    )


def save(learner: Learner, state: TrainState, run: Run, saver: checkpoint.Saver) -> None:
    """Begin to commit a checkpoint. All ranks enter."""
    run.flush()
    saver.begin(state.progress.step, learner.state(run.processes), state)
    run.write_status(status_of("running", state.progress))


def warn_of(results: list[checkpoint.SaveResult]) -> None:
    """Tell of saves that have failed."""
    for each in results:
        if each.error:
            warnings.warn(
                f"checkpoint of step {each.step} was NOT saved ({each.error}); the older one stays", stacklevel=2
            )


def status_of(state: str, progress: Progress) -> Status:
    """The run folder's word for where training stands."""
    return Status(state, progress.step, progress.best_step, progress.best_cider)


# ------------------------------------------------------------------ log and score


def progress_bar(data: TrainingData, progress: Progress, run: Run) -> "tqdm[object]":
    """Of the steps; rank 0 shows it."""
    return tqdm(
        total=data.total_steps, initial=progress.step, desc="train", unit="step", disable=not run.processes.is_main
    )


def log_step(step: int, meter: Meter, learner: Learner, run: Run, bar: "tqdm[object]") -> None:
    """One line of the journal. All ranks enter."""
    line = meter.line(run.processes)
    run.log(step, line.values())
    if line.attention and run.processes.is_main and (said := flat_attention(step, line.attention, learner)):
        tqdm.write(said)
    bar.set_postfix_str(f"nll {line.nll_per_token:.3f}, {line.captions_per_s:.0f} captions/s", refresh=False)


def flat_attention(step: int, use: AttentionUse, learner: Learner) -> str:
    """A warning at the first line of the journal after a fifth of the training, if soft attention is flat; else ""."""
    config, cells = learner.config, learner.model.captioner.sizes.grid_size
    due = step >= learner.total_steps / 5 > step - config.train.log_every
    if not (due and config.model.attention == "soft" and cells > 1 and use.effective_cells > FLAT_SHARE * cells):
        return ""
    way_out = "model.penalty_weight is 0 already; try a higher train.learning_rate, or model.weight_init=uniform"
    if weight := config.model.penalty_weight:
        way_out = f"the regulariser holds it even: lower model.penalty_weight, now {weight:g} (0 sets attention free)"
    return (
        f"warning: step {step} of {learner.total_steps}: attention is flat, {use.effective_cells:.1f} of {cells} cells "
        f"in effect, so the captions hardly depend on where the model looks; {way_out}"
    )


def divergence(config: Config, step: int, watch: Watch, run: Run) -> str:
    """Why the run ends here, and the way on. All ranks enter."""
    train, path = config.train, run.processes.run_on_main(lambda: checkpoint.latest(run.checkpoints))
    return (
        f"step {step}: the loss or the gradient of {watch.skipped + watch.overflowed} steps in a row was not finite, "
        f"train.max_skipped_steps allows {train.max_skipped_steps}; they have changed nothing, and "
        + (f"the last checkpoint, {path}, is good; " if path else "there is no checkpoint yet; ")
        + f"begin anew with a lower rate, e.g. train.learning_rate={train.learning_rate / 2:g} "
        f"train.run_dir={train.run_dir}-2, or with a longer train.warmup_steps; at the first steps, "
        "look for features that are not finite"
    )


def score_and_keep_best(config: Config, data: TrainingData, learner: Learner, progress: Progress, run: Run) -> Progress:
    """Score the evaluation split by free-running decoding; export the best model yet by CIDEr. All ranks enter."""
    model = learner.evaluated.eval()
    torch.manual_seed(derive_key(config.train.seed, progress.step, run.processes.rank) >> 1)  # may sample locations
    split = config.data.eval_split
    result = evaluate([model], data.main, split, data.tokenizer, config.eval, data.reading, run.processes)
    learner.objective.train()
    values = result.scores.values | (result.attention.values() if config.model.attention != "none" else {})
    scores = {f"{split}/{name}": value for name, value in values.items() if value is not None}
    cider = result.scores.values["CIDEr"]
    better = cider is not None and cider > progress.best_cider
    best = {f"best/{name}": value for name, value in values.items() if better and value is not None}
    run.log(progress.step, scores | best | {f"{split}/unfinished": result.unfinished})
    if cider is None:
        raise ValueError(f"CIDEr could not be computed: {result.scores.reasons.get('CIDEr')}")

    def keep() -> None:
        tqdm.write(
            f"step {progress.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in sorted(scores.items()))
        )
        captions = run.folder / "captions" / f"step-{progress.step:08d}.json"
        write_captions(captions, result.captions)
        run.keep_artifact(captions, "captions")
        if better:
            save_model(run.best, model.state_dict(), data.tokenizer, config, data.features, progress.step)

    run.processes.run_on_main(keep)
    if better:
        return replace(progress, best_cider=cider, best_step=progress.step, evaluations_without_gain=0)
    return replace(progress, evaluations_without_gain=progress.evaluations_without_gain + 1)


# ------------------------------------------------------------------ the program


def with_precision(config: Config) -> Config:
    """`train.precision=auto` as what this run began with, or else as what this machine is best at."""
    if config.train.precision != "auto":
        return config
    begun = Path(config.train.run_dir) / CONFIG_FILE
    precision = load_config(begun).train.precision if begun.is_file() else best_precision()
    return replace(config, train=replace(config.train, precision=precision))


def already_finished(config: Config) -> str:
    """What to say of a run that has nothing left to do; "" where it has. Raises ValueError for another training's."""
    folder = Path(config.train.run_dir)
    status = read_status(folder)
    if status is None or status.state != "finished" or not (folder / CONFIG_FILE).is_file():
        return ""
    if not finished_before(config, load_config(folder / CONFIG_FILE)):
        return ""
    return f"{folder} is finished: best CIDEr {status.best_cider:.4f} at step {status.best_step}"


def main(
    configuration: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of settings, see configs/")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over those of the file")
    ] = None,
) -> None:
    """Train the captioner that CONFIG describes, or go on with it; under `accelerate launch` one process per rank."""
    config = with_precision(load_config(configuration, settings or ()))
    if said := already_finished(config):
        if is_first_announced():
            print(said)
        return
    engine = start(config.train.precision)
    if len(found := set(engine.processes.gather(config.train.precision))) > 1:
        raise ValueError(
            f"the machines differ: some are best at {' and others at '.join(sorted(found))}; set train.precision"
        )
    kernels = speed_up(config.train.kernels, engine.processes.device)
    if engine.processes.is_main:
        print(kernels, flush=True)
    train(config, engine)
    engine.processes.leave()


if __name__ == "__main__":
    run_program(main)
