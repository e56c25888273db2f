"""Train a captioner: the file to read first. Fetch, step, log, save, evaluate.

The surprise: there is no hidden state. Which samples a step sees, its learning rate and its random numbers are pure
functions of (seed, epoch, step, rank), so a run continues from its counters and weights alone.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from sat.data.plan import Cursor
from sat.engine.processes import Runtime, start
from sat.evaluate import Evaluation, evaluate
from sat.export import save_model
from sat.learner import Learner, build_learner, check_resumable, load_tensors, save_tensors
from sat.meter import Meter
from sat.model.kernels.choose import speed_up
from sat.model.loss import total_loss
from sat.run_folder import Run, open_run, read_status
from sat.training_data import TrainingData, open_data


@dataclass(frozen=True)
class Progress:
    """Where training stands; with the weights, all that a checkpoint holds."""

    cursor: Cursor
    step: int = 0
    best_cider: float = -1.0
    best_step: int = 0
    evaluations_without_gain: int = 0


def train(config: Config, runtime: Runtime) -> Progress:
    """Run, or continue, the training that `config` describes. All ranks enter; returns where it ended."""
    data = open_data(config)
    learner = build_learner(config, data, runtime)
    progress = resume(config, data, learner, runtime)
    run = open_run(config, runtime, progress.step)
    finished = progress.step == data.total_steps or out_of_patience(config, progress)
    with tqdm(
        total=data.total_steps, initial=progress.step, desc="train", unit="step", disable=not runtime.is_main
    ) as bar:
        meter = Meter()
        for step_batches in () if finished else steps_from(config, data, progress.cursor, runtime, meter):
            stop = take_step(config, learner, step_batches, progress.step, run, meter)
            progress = replace(progress, step=progress.step + 1, cursor=cursor_after(progress.cursor, step_batches[0]))
            bar.update()
            last = progress.step == data.total_steps
            if progress.step % config.train.log_every == 0 or last:
                log_step(progress.step, learner, meter, run, bar)
            if progress.step % data.eval_every == 0 or last:
                with meter.paused():
                    progress = score_and_keep_best(config, data, learner, progress, run)
            finished = last or out_of_patience(config, progress)
            if finished or stop or progress.step % data.save_every == 0:
                save(config, data, learner, progress, run)
            if finished or stop:
                break
    state = "finished" if finished else "stopped"
    for path in sorted(run.best.glob("*")):
        run.keep_artifact(path, "model")
    run.write_status(state, step=progress.step, best_step=progress.best_step, best_cider=progress.best_cider)
    run.close(finished)
    return progress


def steps_from(
    config: Config, data: TrainingData, cursor: Cursor, runtime: Runtime, meter: Meter
) -> Iterator[list[CaptionBatch]]:
    """The micro-batches of each remaining optimizer step, over all remaining epochs; waiting time goes to the meter."""
    while cursor.epoch < config.train.epochs:
        batches = training_batches(
            data.sources,
            data.tokenizer,
            splits=config.data.train_splits,
            cursor=cursor,
            global_batch=config.train.global_batch,
            rank=runtime.rank,
            world_size=runtime.world_size,
            accumulation_steps=config.train.accumulation_steps,
            captions_per_image=config.data.captions_per_image,
            max_caption_length=config.data.max_caption_length,
            run_length=config.data.run_length,
            num_workers=config.data.num_workers,
            on_bad_sample=config.data.on_bad_sample,
            max_bad_samples=config.data.max_bad_samples,
            pin_memory=runtime.device.type == "cuda",
            **data.reading,
        )
        while step_batches := meter.wait_for(lambda: list(itertools.islice(batches, config.train.accumulation_steps))):
            yield step_batches
        cursor = cursor.next_epoch()


def take_step(config, learner: Learner, batches: list[CaptionBatch], step: int, run: Run, meter: Meter) -> bool:
    """One optimizer step over `batches`. All ranks enter. Returns whether any rank was asked to stop."""
    runtime = run.runtime
    local = [
        sum(int(batch.tokens) for batch in batches),
        sum(int(batch.caption_count) for batch in batches),
        run.stop_wanted(),
    ]
    tokens, captions, stop = runtime.sum_over_ranks(local)
    torch.manual_seed(derive_key(config.train.seed, step, runtime.rank) >> 1)
    rate = learner.set_learning_rate(step)
    for i, batch in enumerate(batches):
        batch = batch.to(runtime.device)
        with runtime.forward_context(learner.model, last=i == len(batches) - 1):
            with runtime.autocast():
                sums = learner.model(batch.grid, batch.captions, batch.lengths, learner.sampling_probability(step))
            runtime.backward(total_loss(sums, tokens, captions), len(batches))
        meter.add(sums)
    meter.gradient_norm = runtime.step(learner.model, learner.optimizer, config.train.clip_norm)
    learner.after_step()
    if config.model.attention == "hard" and tokens:
        nll = runtime.sum_over_ranks([meter.nll_of_last(len(batches))])[0]
        learner.module.update_baseline(nll / tokens)
    meter.count(tokens, captions, rate, bad=sum(batch.bad for batch in batches))
    return stop > 0


def cursor_after(cursor: Cursor, batch: CaptionBatch) -> Cursor:
    """The cursor moves only here, after the update, so that what was read ahead is neither lost nor repeated."""
    return (cursor if batch.epoch == cursor.epoch else cursor.next_epoch()).advanced(batch.samples_done)


def resume(config: Config, data: TrainingData, learner: Learner, runtime: Runtime) -> Progress:
    """Load the newest whole checkpoint of the run folder, if there is one. All ranks enter.

    Raises ValueError when it belongs to another training, or when all checkpoints are damaged.
    """
    fresh = Progress(Cursor.start(data.sources, config.train.seed))
    path = runtime.run_on_main(lambda: checkpoint.latest(Path(config.train.run_dir) / "checkpoints"))
    if path is None:
        return fresh
    saved = json.loads((path / "state.json").read_text())
    check_resumable(saved["identity"], identity(config, data, runtime))
    load_tensors(learner, runtime, path)
    progress = Progress(**saved["progress"] | {"cursor": Cursor.from_dict(saved["progress"]["cursor"])})
    if runtime.is_main:
        print(f"continuing {path} at step {progress.step} of {data.total_steps}", flush=True)
    return progress


def identity(config: Config, data: TrainingData, runtime: Runtime) -> dict:
    """The settings that make a training what it is. Others (workers, ranks, evaluation) may change between its lives."""
    kept = fixed_settings(config)
    kept["features"] = [[manifest.digest, weight] for manifest, weight in data.sources]
    kept["tokenizer"] = data.tokenizer.digest
    kept["total_steps"] = data.total_steps
    kept["engine"] = f"DeepSpeed on {runtime.world_size} ranks" if runtime.deepspeed else "DDP"
    return kept


def save(config: Config, data: TrainingData, learner: Learner, progress: Progress, run: Run) -> None:
    """Commit a checkpoint. All ranks enter."""
    state = {"progress": dataclasses.asdict(progress), "identity": identity(config, data, run.runtime)}

    if run.tracker:
        run.tracker.flush()

    def write(folder: Path) -> None:
        save_tensors(learner, run.runtime, folder)
        if run.runtime.is_main:
            checkpoint.write_json(folder / "state.json", state)

    checkpoint.save(run.checkpoints, progress.step, run.runtime, write, config.train.keep_checkpoints)


def log_step(step: int, learner: Learner, meter: Meter, run: Run, bar: tqdm) -> None:
    """One line of the journal. All ranks enter. Raises RuntimeError where training has diverged."""
    values = meter.line(run.runtime)
    run.log(step, values)
    bar.set_postfix_str(f"nll {values['nll_per_token']:.3f}, {values['captions_per_s']:.0f} captions/s", refresh=False)
    if not (math.isfinite(values["nll_per_token"]) and math.isfinite(values["gradient_norm"])):
        raise RuntimeError(
            f"step {step}: NLL {values['nll_per_token']}, gradient norm {values['gradient_norm']}; a checkpoint written "
            "since the last log line may hold it too; lower train.learning_rate, lengthen train.warmup_steps, or use train.precision=fp32"
        )


def score_and_keep_best(config: Config, data: TrainingData, learner: Learner, progress: Progress, run: Run) -> Progress:
    """Score the evaluation split by free-running decoding; export the model when its CIDEr is the best yet. All ranks enter."""
    model = learner.evaluated.eval()
    split = config.data.eval_split
    result = evaluate(model, data.main, split, data.tokenizer, config, run.runtime, data.reading)
    learner.module.train()
    scores = {f"{split}/{name}": value for name, value in result.scores.values.items() if value is not None}
    run.log(progress.step, scores | {f"{split}/unfinished": result.unfinished})
    cider = result.scores.values["CIDEr"]
    if cider is None:
        raise RuntimeError(f"CIDEr could not be computed: {result.scores.reasons.get('CIDEr')}")
    better = cider > progress.best_cider

    def keep() -> None:
        tqdm.write(
            f"step {progress.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in sorted(scores.items()))
        )
        captions = run.folder / "captions" / f"step-{progress.step:08d}.json"
        write_captions(captions, result)
        run.keep_artifact(captions, "captions")
        if better:
            save_model(run.best, model.state_dict(), data.tokenizer, config, data.features, progress.step)

    run.runtime.run_on_main(keep)
    if better:
        return replace(progress, best_cider=cider, best_step=progress.step, evaluations_without_gain=0)
    return replace(progress, evaluations_without_gain=progress.evaluations_without_gain + 1)


def write_captions(path: Path, result: Evaluation) -> None:
    path.parent.mkdir(exist_ok=True)
    checkpoint.write_json(
        path, [{"image_id": image_id, "caption": caption} for image_id, caption in result.captions.items()]
    )


def out_of_patience(config: Config, progress: Progress) -> bool:
    return 0 < config.train.patience <= progress.evaluations_without_gain


def main(
    configuration: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of settings, see configs/")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over those of the file")
    ] = None,
) -> None:
    """Train the captioner that CONFIG describes, or go on with it; under `accelerate launch` one process per rank."""
    config = load_config(configuration, settings or ())
    status = read_status(Path(config.train.run_dir))
    if status.get("state") == "finished":
        print(
            f"{config.train.run_dir} is finished: best CIDEr {status['best_cider']:.4f} at step {status['best_step']}"
        )
        return
    runtime = start(config.train.precision)
    kernels = speed_up(config.train.kernels, runtime.device)
    if runtime.is_main:
        print(kernels, flush=True)
    train(config, runtime)
    runtime.leave()


if __name__ == "__main__":
    run_program(main)
