"""The settings against the ranks and the run folder: what cannot work here, and what belongs to another training."""

import os
from collections.abc import Iterator
from pathlib import Path

from sat import checkpoint
from sat.config import Config, load_config, refuse_ranks
from sat.doctor.rows import Row, attempted, counted, failed, ok, refused, warning
from sat.machine import available_cores
from sat.run_folder import CONFIG_FILE, STOP_FILE, read_status
from sat.run_lock import living_owner
from sat.train import identity
from sat.train_state import TrainState, finished_before
from sat.training_data import TrainingData


def check_ranks(config: Config, ranks: int, local_ranks: int) -> Iterator[Row]:
    """Settings that cannot work on this number of ranks, `local_ranks` of which are on this machine."""
    train, passes = config.train, ranks * config.train.accumulation_steps
    batch, rows = train.global_batch, -(-train.global_batch // passes)
    said = f"train.global_batch {batch} over {counted(ranks, 'rank')} x accumulation {train.accumulation_steps}"
    above = rows * passes
    even = f"{above - passes} or {above}" if rows > 1 else f"{above}"
    if ranks * (train.accumulation_steps - 1) * rows + ranks - 1 >= batch:  # the last rank's last micro-batch is empty
        most = counted(max(1, batch // train.accumulation_steps), "rank")
        fewer = f", or at most {most}" if ranks > 1 else ", or a lower train.accumulation_steps"
        yield failed("batch", f"{said}: some never hold a picture", f"use train.global_batch={even}{fewer}")
    elif batch % passes:
        idle = f"{1 - batch / above:.0%} of the ranks' time is waiting"
        yield warning("batch", f"{said} is uneven: {idle}", f"use {even}; the losses are right in any case")
    else:
        yield ok("batch", f"{said}: {rows} at once")
    try:
        refuse_ranks(config, ranks)
    except ValueError as error:
        yield refused("BatchNorm", error)
    yield from attempted("workers", lambda: _workers(config, local_ranks))


def _workers(config: Config, local_ranks: int) -> Iterator[Row]:
    """Processes and threads against the cores."""
    import torch

    cores, workers = available_cores(), config.data.num_workers * local_ranks
    threads = torch.get_num_threads() * local_ranks
    said = (
        f"ranks here: {local_ranks}, each with {counted(torch.get_num_threads(), 'thread')} and "
        f"{counted(config.data.num_workers, 'reader')} (data.num_workers); {counted(cores, 'core')}"
    )
    if not torch.cuda.is_available() and threads > max(cores, local_ranks):
        mend = f"set OMP_NUM_THREADS={max(1, cores // local_ranks)}: threads that share a core wait for one another"
        yield warning("workers", said, mend)
    elif workers > 2 * cores:
        mend = f"set data.num_workers={max(0, cores // local_ranks)}, or give the job more cores"
        yield warning("workers", said, mend)
    else:
        yield ok("workers", said)


def check_run_folder(config: Config, data: TrainingData | None) -> Iterator[Row]:
    """Whether the run folder is new, or goes on with these settings, features and vocabulary. Rank 0 only."""
    folder = Path(config.train.run_dir)
    place = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK) or os.statvfs(place).f_flag & os.ST_RDONLY:
        yield failed("run folder", f"{place} cannot be written", "name another folder by train.run_dir")
        return
    if owner := living_owner(folder):
        mend = f"wait for it, stop it (touch {folder / STOP_FILE}), or name another train.run_dir"
        yield failed("run folder", f"{folder} is being trained by {owner}", mend)
        return
    saved = folder / CONFIG_FILE
    if not saved.is_file():
        yield ok("run folder", f"{folder} is new: the training begins at step 1")
        return
    if (folder / STOP_FILE).exists():
        yield warning("run folder", f"{folder / STOP_FILE} asks for a stop", "remove it before you start")
    finished_before(config, load_config(saved))  # refuses other settings
    if data is not None:
        yield from _checkpoint(config, data, folder)


def _checkpoint(config: Config, data: TrainingData, folder: Path) -> Iterator[Row]:
    """The newest checkpoint, if there is one: whole, and of this very training."""
    status, path = read_status(folder), checkpoint.latest(folder / "checkpoints")
    said = f"{folder} is {status.state}" if status else f"{folder} says no status"
    if path is None:
        yield ok("run folder", f"{said}; without a checkpoint the training begins at step 1")
        return
    state = TrainState.read(path)
    state.identity.refuse(identity(config, data))
    step, best = state.progress.step, state.progress.best_cider
    scored = f", best CIDEr {best:.4f}" if best >= 0 else ""
    yield ok(
        "run folder",
        f"{said}; {path.name} is whole and of this training: it goes on at step {step:,} of {data.total_steps:,}"
        f"{scored}",
        step=step,
    )
