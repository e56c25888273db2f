"""Train a captioner: the file to read first. Fetch, step, log, save, score.

The surprise: there is no hidden state. Which samples a step sees, its learning rate and its random numbers are pure
functions of the seed, the step and the samples, so a run continues from its counters and weights alone.
"""

import itertools
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from tqdm import tqdm

from sat import checkpoint
from sat.cli import run_program
from sat.config import Config, fixed_settings, load_config
from sat.data.batch import CaptionBatch
from sat.data.loader import training_batches
from sat.data.plan import Cursor, Share
from sat.engine import losses
from sat.engine.engine import Engine, StepResult
from sat.engine.launched import is_first_announced
from sat.engine.processes import Processes
from sat.engine.start import start
from sat.engine.state import part
from sat.engine.watchdog import watched
from sat.evaluation.metrics import scorer_kept
from sat.learner import Learner, build_learner
from sat.machine import best_precision, speed_up
from sat.meter import AttentionUse, Meter, Step, Watch
from sat.optim import learning_rate
from sat.run_folder import CONFIG_FILE, Run, forget_stop, open_run, owned_run, read_status
from sat.saving import Saves
from sat.scoring import Evaluations, scoring_is_due
from sat.stopping import StartAgain, Wish, follow_launcher, listen
from sat.train_state import Identity, Progress, TrainState, finished_before
from sat.training_data import TrainingData, open_data

FLAT_SHARE = 0.8
"""Attention over more than this share of the cells, in effect, is flat."""


def train(config: Config, engine: Engine, wish: Wish | None = None) -> Progress:
    """Run, or continue, the training that `config` describes. All ranks enter; returns where it ended.

    `wish`: to stop, where the caller listens already. Raises ValueError where the run folder is another training's or
    is being trained in, and StartAgain for what nobody is to blame for.
    """
    wish, processes = wish or listen(), engine.processes
    with losses.named(processes), owned_run(Path(config.train.run_dir), processes):
        data = open_data(config)
        learner = build_learner(config, data, engine)
        begun = resume(config, data, learner, fresh_state(config, data, engine), processes)
        opened = open_run(config, engine, begun.progress, wish, data.about(config), begun.unscored)
        with opened as run, losses.named(processes), scorer_kept():
            with watched(processes, config.train.timeout, run.fail), progress_bar(data, begun.progress, run) as bar:
                progress = take_all_steps(config, data, learner, begun, run, bar)
            if has_ended(config, data, progress):
                run.keep_model()
            run.write_status(run.status_of("finished" if has_ended(config, data, progress) else "stopped", progress))
    if not progress.step:
        raise StartAgain("stopped before the first step: start it again")
    return progress


def take_all_steps(
    config: Config, data: TrainingData, learner: Learner, begun: TrainState, run: Run, bar: "tqdm[object]"
) -> Progress:
    """The loop, until the training has ended or a rank is asked to stop; what was reached is saved then."""
    progress, meter, watch = begun.progress, Meter(begun.unlogged), Watch(config.train.max_skipped_steps)
    saves = Saves(checkpoint.Saver(run.checkpoints, run.processes, config.train.keep_checkpoints), run, progress)
    evaluations = Evaluations(config, data, learner, run, progress.step, begun.unscored)
    stop, owed = run.any_stop_wanted(), False

    def state() -> TrainState:
        unlogged = meter.sums(run.processes)
        return replace(begun, progress=progress, unlogged=unlogged, unscored=evaluations.unscored)

    with closing(steps_from(config, data, progress.cursor, run.processes, meter)) as steps:
        while not stop:
            if evaluations.must_be_waited_for(progress):
                with meter.paused(), bar_paused(bar):
                    progress, stop = evaluations.finish(progress)
                continue
            if has_ended(config, data, progress):
                break
            if evaluations.is_due(progress):
                with meter.paused(), bar_paused(bar), learner.stepper.whole():
                    stop = evaluations.begin(progress)
                continue
            run.processes.pulse.beat(f"the data of step {progress.step + 1}")
            batches = next(steps)
            result, told = take_step(config, learner, batches, progress.step, run, meter)
            progress, stop = advanced(progress, batches), told.stop
            bar.update()
            last, diverged = progress.step == data.total_steps, watch.see(result)
            if progress.step % config.train.log_every == 0 or last or diverged:
                log_step(progress.step, meter, learner, run, bar)
            saves.look(progress)
            if diverged:
                if evaluations.waiting:  # it may be the best yet, with which one can begin anew
                    progress, _ = evaluations.finish(progress)
                raise ValueError(divergence(config, progress, watch, run, saves))
            if told.scored:
                with meter.paused(), bar_paused(bar):
                    progress, _ = evaluations.finish(progress)
            owed = owed or progress.step % data.save_every == 0 or last
            if owed and not watch.skipped:  # while steps are skipped the older checkpoints are the better ones
                saves.begin(learner, state())
                owed = False
    saves.finish(learner, state(), ended=has_ended(config, data, progress))
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


class Told(NamedTuple):
    """What the ranks tell one another at a step."""

    stop: bool
    """One of them was asked to stop."""
    scored: bool
    """The scores that were computed beside the steps are there."""


def take_step(
    config: Config, learner: Learner, batches: list[CaptionBatch], step: int, run: Run, meter: Meter
) -> tuple[StepResult, Told]:
    """One optimizer step over `batches`; what became of it, and what there is to be known. All ranks enter."""
    processes = run.processes
    weights = [learner.objective.weighs(batch.lengths) for batch in batches]
    there = run.scores is not None and run.scores.done
    local = [*map(sum, zip(*weights, strict=True)), run.stop_wanted(), run.failed_saves, there]
    processes.pulse.beat(f"step {step + 1}")
    tokens, captions, stop, failed, scored = processes.sum_over_ranks(local)
    run.refuse_failing_saves(failed)
    rate = learner.set_learning_rate(step)
    counts = [
        learner.learn(batch, step, tokens, captions, last=batch is batches[-1], processes=processes)
        for batch in batches
    ]
    result = learner.stepper.step()
    learner.after_step(result, counts, processes)
    meter.steps.append(Step(counts, captions, rate, sum(batch.bad for batch in batches), result))
    return result, Told(stop > 0, scored > 0)


def advanced(progress: Progress, batches: list[CaptionBatch]) -> Progress:
    """After a step over `batches`. The cursor moves only here, so what was read ahead is neither lost nor repeated."""
    cursor, batch = progress.cursor, batches[0]
    cursor = (cursor if batch.epoch == cursor.epoch else cursor.next_epoch()).advanced(batch.samples_done)
    return replace(progress, step=progress.step + 1, cursor=cursor)


def has_ended(config: Config, data: TrainingData, progress: Progress) -> bool:
    """Whether all steps are done and scored, or too many evaluations in a row have brought nothing."""
    done = progress.step >= data.total_steps and not scoring_is_due(data, progress)
    return done or 0 < config.train.patience <= progress.evaluations_without_gain


# ------------------------------------------------------------------ continue and save


def identity(config: Config, data: TrainingData) -> Identity:
    """Which training this is, whatever the engine and the number of ranks."""
    features: list[list[str | float]] = [[manifest.digest, weight] for manifest, weight in data.sources]
    return Identity(fixed_settings(config), features, data.tokenizer.digest)


def fresh_state(config: Config, data: TrainingData, engine: Engine) -> TrainState:
    """Before the first step."""
    start = Progress(Cursor.start(data.sources, config.train.seed))
    spread = f"{engine.name} on {engine.processes.world_size} ranks"
    return TrainState(start, identity(config, data), data.total_steps, spread, config.train.learning_rate)


def resume(config: Config, data: TrainingData, learner: Learner, fresh: TrainState, processes: Processes) -> TrainState:
    """`fresh`, or what the newest whole checkpoint of the run folder holds, which is loaded. All ranks enter.

    Raises ValueError when it belongs to another training, or when all checkpoints are damaged.
    """
    path = processes.run_on_main(lambda: checkpoint.latest(Path(config.train.run_dir) / "checkpoints"))
    if path is None:
        return fresh
    state = TrainState.read(path)
    state.identity.refuse(fresh.identity)
    tensors = checkpoint.read(path)
    learner.load_state(tensors)
    if processes.is_main:
        print(f"continuing {path} at step {state.progress.step} of {data.total_steps}", flush=True)
        if state.written_by != fresh.written_by:
            print(f"it was written by {state.written_by}, and goes on with {fresh.written_by}", flush=True)
        if state.total_steps != data.total_steps:
            print(other_length(config, state, data.total_steps), flush=True)
        if state.learning_rate != fresh.learning_rate:
            rates = f"{fresh.learning_rate:g} instead of {state.learning_rate:g}"
            print(f"train.learning_rate is now {rates}, from this step on", flush=True)
        if has_ended(config, data, state.progress):
            print(f"{config.train.run_dir} is finished: nothing is left to do", flush=True)
    unscored = state.unscored and replace(state.unscored, weights=part(tensors, checkpoint.CANDIDATE))
    return replace(fresh, progress=state.progress, unlogged=state.unlogged, unscored=unscored)


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


# ------------------------------------------------------------------ log and score


def progress_bar(data: TrainingData, progress: Progress, run: Run) -> "tqdm[object]":
    """Of the steps; rank 0 shows it, in a file a line every ten seconds."""
    return tqdm(
        total=data.total_steps,
        initial=progress.step,
        desc="train",
        unit="step",
        disable=not run.processes.is_main,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )


@contextmanager
def bar_paused(bar: "tqdm[object]") -> Iterator[None]:
    """The time spent inside is no step's: the time left does not jump."""
    began = time.time()
    yield
    if not bar.disable:
        bar.start_t += time.time() - began
        bar.last_print_t += time.time() - began


def log_step(step: int, meter: Meter, learner: Learner, run: Run, bar: "tqdm[object]") -> None:
    """One line of the journal. All ranks enter."""
    line = meter.line(run.processes)
    run.log(step, line.values())
    use = None if line.sampling else line.attention  # the regulariser takes no part where samples are rewarded
    if use and run.processes.is_main and (said := flat_attention(step, use, learner)):
        tqdm.write(said)
    what = f"reward {line.sampling.reward:.3f}" if line.sampling else f"nll {line.nll_per_token:.3f}"
    bar.set_postfix_str(f"{what}, {line.captions_per_s:.0f} captions/s", refresh=False)


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


def divergence(config: Config, progress: Progress, watch: Watch, run: Run, saves: Saves) -> str:
    """Why the run ends here, and the way on. All ranks enter."""
    saves.saver.wait()
    train, path = config.train, run.processes.run_on_main(lambda: checkpoint.latest(run.checkpoints))
    lower = f"the same command with train.learning_rate={train.learning_rate / 2:g}"
    way_on = f"there is no checkpoint yet; begin anew with a lower rate, {lower}, or with a longer train.warmup_steps"
    if path:
        way_on = f"the last checkpoint, {path}, is good; go on from there at a lower rate, {lower}"
    if progress.best_step:
        way_on += (
            f"; or, should that diverge too, begin anew with the best model, "
            f"train.start_from={train.run_dir} train.run_dir={train.run_dir}-2"
        )
    return (
        f"step {progress.step}: the loss or the gradient of {watch.skipped + watch.overflowed} steps in a row was not "
        f"finite, train.max_skipped_steps allows {train.max_skipped_steps}; they have changed nothing, and {way_on}; "
        "at the first steps, look for features that are not finite"
    )


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
    follow_launcher()
    config = with_precision(load_config(configuration, settings or ()))
    if is_first_announced():
        forget_stop(Path(config.train.run_dir))
    if said := already_finished(config):
        if is_first_announced():
            print(said)
        return
    with losses.named():
        engine = start(config.train.precision, config.train.timeout)
        found = set(engine.processes.gather(config.train.precision))
    wish = listen()
    if len(found) > 1:
        raise ValueError(
            f"the machines differ: some are best at {' and others at '.join(sorted(found))}; set train.precision"
        )
    kernels = speed_up(config.train.kernels, engine.processes.device)
    if engine.processes.is_main:
        print(kernels, flush=True)
    train(config, engine, wish)
    engine.processes.leave()


if __name__ == "__main__":
    run_program(main)
