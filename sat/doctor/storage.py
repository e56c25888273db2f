"""Whether the disk has room for what a run keeps: checkpoints and the best model."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from sat.config import Config
from sat.doctor.rows import Row, failed, ok, sized, warning
from sat.learner import Learner

GB = 1e9
BESIDE = 0.2 * GB
"""For the journal, the captions of every evaluation and MLflow's file."""


def checkpoint_bytes(learner: Learner) -> int:
    """Of one checkpoint: every tensor in float32, two moments of what is trained, and the average."""
    model = learner.model
    weights = sum(map(numbers_in, model.parameters())) + sum(each.numel() for each in model.buffers())
    trained = sum(numbers_in(each) for each in model.parameters() if each.requires_grad)
    return 4 * (weights * (1 if learner.average is None else 2) + 2 * trained)


def numbers_in(parameter: nn.Parameter) -> int:
    """How many a parameter has as a whole, also where ZeRO 3 holds a part of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def check_disk(config: Config, checkpoint: int) -> Iterator[Row]:
    """Free space at the run folder against checkpoints of so many bytes, those that are there already counted."""
    folder = Path(config.train.run_dir)
    place = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    kept = max(config.train.keep_checkpoints, 2)
    there = sum(path.stat().st_size for path in folder.glob("checkpoints/step-*/*") if path.is_file())
    exported = 2 * checkpoint // 3  # the best model's weights, twice while it is replaced
    needed = max((kept + 1) * checkpoint - there, checkpoint) + exported + BESIDE
    free = shutil.disk_usage(place).free
    said = (
        f"{place}: {sized(free)} free; {kept} checkpoints of {sized(checkpoint)} are kept while one more is written, "
        f"with the best model and the journal {sized(needed)}"
    )
    mend = f"free {sized(2 * needed - free)}, name another disk by train.run_dir, or lower "
    mend += "train.keep_checkpoints"
    figures = {"free_gb": free / GB, "needed_gb": needed / GB, "checkpoint_gb": checkpoint / GB}
    if free < needed:
        yield failed("disk", said, mend, **figures)
    elif free < 2 * needed:
        yield warning("disk", said, mend, **figures)
    else:
        yield ok("disk", said, **figures)
