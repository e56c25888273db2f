"""Ten steps of the real loop on the real data, and what they say of the time, the memory and the cost of the whole run.

Nothing is written: the run folder is neither made nor touched. Surprising: an evaluation is measured with a model that
has learnt nothing, whose captions run to their greatest length, so its time is an upper bound.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from sat.bench.harness import peak_memory_mb
from sat.config import Config
from sat.data.batch import CaptionBatch
from sat.data.loader import evaluation_batches
from sat.data.plan import Cursor, Share
from sat.doctor.machine import GB, free_memory
from sat.doctor.rows import Row, counted, failed, ok, sized, warning
from sat.doctor.scoring import seconds_to_score
from sat.doctor.together import agreed
from sat.engine.processes import Processes
from sat.evaluation.decoding import decode
from sat.learner import Learner
from sat.meter import JournalLine, Meter
from sat.run_folder import Run
from sat.train import steps_from, take_step
from sat.training_data import TrainingData

STEPS = 10
WARM_UP = 2
"""Steps that are not counted: memory is found, kernels are chosen."""
WAITING = 0.3
"""Share of a step's time that may be waiting for data."""
FULL = 0.9
"""Share of the memory that may be used."""


@dataclass(frozen=True)
class Measured:
    """Of some steps, over all ranks."""

    steps: int
    seconds: float
    """Per step, the mean without the first ones."""
    memory_mb: float
    """Greatest of the ranks: of the GPU, or resident, libraries included."""
    save_s: float
    """That a save holds the training up: what it writes is copied, and written while training goes on."""
    line: JournalLine
    """What the journal would say of them."""


def measure_steps(config: Config, data: TrainingData, learner: Learner, processes: Processes) -> Measured:
    """Take the first steps of the training. All ranks enter. Raises Agreed where data cannot be read.

    What else is raised is raised by this rank alone: the others may wait for it.
    """
    run, meter, seconds = Run(Path(config.train.run_dir), processes, None), Meter(), list[float]()
    count = min(STEPS, data.total_steps)

    def steps() -> None:
        cursor = Cursor.start(data.sources, config.train.seed)
        opened = steps_from(config, data, cursor, processes, meter)
        with closing(opened) as batches:
            for step in range(count):
                began = time.perf_counter()
                of_step: list[CaptionBatch] = agreed(processes, lambda: next(batches))
                take_step(config, learner, of_step, step, run, meter)
                if processes.device.type == "cuda":
                    torch.cuda.synchronize(processes.device)
                seconds.append(time.perf_counter() - began)

    memory = peak_memory_mb(steps, str(processes.device))
    counted = seconds[WARM_UP:] or seconds
    slowest = max(processes.gather(sum(counted) / len(counted)))
    began = time.perf_counter()
    learner.state(processes)
    save = max(processes.gather(time.perf_counter() - began))
    return Measured(count, slowest, max(processes.gather(memory)), save, meter.line(processes))


def rows_of_steps(found: Measured, local_ranks: int, on_gpu: bool) -> Iterator[Row]:
    """What the steps say of themselves."""
    line, per_second = found.line, found.line.captions_per_s * found.line.seconds_per_step / found.seconds
    said = (
        f"{counted(found.steps, 'step')} taken, then forgotten: {found.seconds:.3g} s a step, "
        f"{per_second:,.0f} captions/s, NLL {line.nll_per_token:.3f} a word"
    )
    figures = {"seconds_per_step": found.seconds, "captions_per_s": per_second, "data_wait": line.data_wait_share}
    if line.skipped_steps:
        mend = (
            "look for features that are not finite (sat doctor --full, verify_shards); or train.learning_rate is high"
        )
        yield failed("steps", f"{said}; loss or gradient of {line.skipped_steps} was not finite", mend)
    elif line.data_wait_share > WAITING:
        mend = "raise data.num_workers, put the shards on a faster disk, or give the job more cores"
        yield warning("steps", f"{said}; {line.data_wait_share:.0%} of it is waiting for data", mend, **figures)
    else:
        yield ok("steps", f"{said}; {line.data_wait_share:.0%} of it is waiting for data", **figures)
    yield _memory(found.memory_mb, local_ranks, on_gpu)


def _memory(used_mb: float, local_ranks: int, on_gpu: bool) -> Row:
    used, smaller = used_mb * 2**20, "raise train.accumulation_steps: smaller passes, the same training"
    if on_gpu:
        total = float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
        said = f"{sized(used)} of the GPU's {sized(total)} at most"
        full = used > FULL * total
    else:
        total = free_memory() + used * local_ranks
        said = f"{sized(used)} a rank at most, {counted(local_ranks, 'rank')} here, {sized(total)} of memory for all"
        full = used * local_ranks > FULL * total
    if full:
        return warning("memory", f"{said}; longer captions may exceed it", smaller, memory_gb=used / GB)
    return ok("memory", said, memory_gb=used / GB)


# ------------------------------------------------------------------ the whole run


def seconds_to_evaluate(config: Config, data: TrainingData, learner: Learner, processes: Processes) -> float:
    """About how long an evaluation takes at most: two batches are decoded, captions are scored. All ranks enter."""
    images = data.main.splits[config.data.eval_split]
    share = Share(processes.rank, processes.world_size)
    per_image = agreed(processes, lambda: _seconds_to_decode(config, data, learner, processes, share))
    learner.objective.train()
    decoding = max(processes.gather(per_image)) * -(-images // processes.world_size)

    def scored() -> float:
        return seconds_to_score(images, config.eval.metrics)

    return decoding + processes.run_beside_on_main(scored, lambda: False)


@torch.inference_mode()
def _seconds_to_decode(
    config: Config, data: TrainingData, learner: Learner, processes: Processes, share: Share
) -> float:
    """Of an image, by the last of two batches; 0 for a rank without any."""
    model, seconds = learner.evaluated.eval(), 0.0
    batches = evaluation_batches(
        data.main, config.data.eval_split, data.reading, batch_size=config.eval.batch_size, share=share
    )
    with closing(batches):
        began = time.perf_counter()
        for batch in itertools.islice(batches, 2):
            there = batch.to(processes.device)
            with processes.autocast():
                decode([model], there.grid, config.eval, batch.image_ids, there.regions)
            now = time.perf_counter()
            seconds, began = (now - began) / len(batch.image_ids), now
    return seconds


def rows_of_run(
    config: Config, data: TrainingData, found: Measured, evaluation_s: float, price: float
) -> Iterator[Row]:
    """How long the whole run takes, evaluations included, and what it costs at `price` an hour (0: not known)."""
    evaluations, saves = -(-data.total_steps // data.eval_every), -(-data.total_steps // data.save_every)
    hours = (data.total_steps * found.seconds + evaluations * evaluation_s + saves * found.save_s) / 3600
    said = (
        f"{counted(data.total_steps, 'step')} of {found.seconds:.3g} s, {counted(evaluations, 'evaluation')} of "
        f"at most {evaluation_s:.3g} s, {counted(saves, 'save')} of {found.save_s:.2g} s: {duration(hours * 3600)}"
    )
    said += f", earlier if {config.train.patience} evaluations in a row bring nothing" * bool(config.train.patience)
    figures = {"hours": hours, "evaluations": evaluations, "evaluation_s": evaluation_s, "save_s": found.save_s}
    if price:
        said, figures = f"{said}; {hours * price:,.2f} at {price:g} an hour", figures | {"cost": hours * price}
    yield ok("whole run", said, **figures)


def duration(seconds: float) -> str:
    """For a reader: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
