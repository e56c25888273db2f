"""What would stop a long run, found before it starts: `sat doctor [CONFIG]`.

    sat doctor                                                      # this machine
    sat doctor --launch launch/cpu.yaml configs/coco_mini.yaml      # a training on these processes

Every check is done, whatever the others found. Nothing is written into the run folder. Exit status 1 when any failed
(75 where a rank that hung had to be killed).
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sat import files
from sat.cli import run_program
from sat.config import Config, TrainConfig, load_config
from sat.doctor.data import check_opening, check_samples, check_shards, check_words
from sat.doctor.group import check_alike, check_exchange, form_group, local_ranks
from sat.doctor.machine import check_machine
from sat.doctor.rows import FAILED, Row, attempted, failed, ok, refused, summary, verdict, warning
from sat.doctor.scoring import LONGEST_S, check_metrics
from sat.doctor.settings import check_ranks, check_run_folder
from sat.doctor.steps import measure_steps, rows_of_run, rows_of_steps, seconds_to_evaluate
from sat.doctor.storage import check_disk, checkpoint_bytes, numbers_in
from sat.doctor.together import Agreed, agreed
from sat.doctor.tracking import check_mlflow
from sat.engine.engine import Engine
from sat.engine.launched import announced, is_first_announced
from sat.engine.losses import named
from sat.engine.processes import Processes
from sat.engine.watchdog import watched
from sat.evaluation.options import METRICS
from sat.learner import Learner, build_learner
from sat.machine import best_precision, speed_up
from sat.stopping import StartAgain, follow_launcher
from sat.train import with_precision
from sat.training_data import TrainingData

ASSUMED_BYTES = 84_000_000
"""Gradients that are exchanged where no model is known: those of the paper's, of 21 million numbers."""


def main(
    configuration: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of settings; without it this machine alone")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over those of the file")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="read every byte of the shards again")] = False,
    price_per_hour: Annotated[float, typer.Option(min=0, help="of all machines together; tells what a run costs")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the table to this file")] = None,
) -> None:
    """Examine this machine and, with CONFIG, the training it describes: a line for each check, and how to mend it.

    With --launch FILE on the processes of a launch. Ten steps are taken of the real loop, and forgotten.
    """
    follow_launcher()
    config, rows = read_settings(configuration, settings or [])
    train = with_precision(config).train if config else TrainConfig(precision=best_precision())
    engine, formed = form_group(train.precision, max(train.timeout, 2 * LONGEST_S))
    if engine is None and not is_first_announced():
        return
    processes = engine.processes if engine else Processes()
    for row in (*rows, *formed):
        show(row, processes)
    rows += formed

    def conclude() -> None:
        print(summary(rows), flush=True)
        if json_file:
            document = {"verdict": verdict(rows), "ranks": processes.world_size}
            files.write_json(json_file, document | {"rows": [asdict(row) for row in rows]})

    def give_up(row: Row) -> None:
        """From another thread, while this one waits for a rank in vain."""
        rows.append(row)
        show(row, processes)
        conclude()

    for row in examine(config, engine, full, price_per_hour, give_up):
        rows.append(row)
        show(row, processes)
    if processes.is_main:
        conclude()
    end(engine, processes, 1 if verdict(rows) == FAILED else 0)


def show(row: Row, processes: Processes) -> None:
    """Print a row, at once: what is known is not lost by what comes."""
    if processes.is_main:
        print(row.text(), flush=True)


def end(engine: Engine | None, processes: Processes, status: int) -> None:
    """Leave, all ranks together; rank 0 with the exit status."""
    sys.stdout.flush()
    if processes.world_size > 1:
        if engine is not None and not processes.is_main:
            processes.leave()
        os._exit(status)  # a gloo thread could abort a proper exit
    if status:
        raise typer.Exit(status)


def read_settings(path: Path | None, overrides: list[str]) -> tuple[Config | None, list[Row]]:
    """The settings, None where there are none; the row that says whether they can be read."""
    if path is None:
        return None, []
    try:
        config = load_config(path, overrides)
    except ValueError as error:
        return None, [refused("settings", error)]
    changed = f", with {' '.join(overrides)}" if overrides else ""
    return config, [ok("settings", f"{path}{changed}")]


# ------------------------------------------------------------------ the checks, in their order


def examine(
    config: Config | None, engine: Engine | None, full: bool, price: float, give_up: Callable[[Row], None]
) -> Iterator[Row]:
    """All rows after those of the settings and the group. All ranks enter; rank 0 alone looks at what is one.

    `give_up` is called on rank 0, from another thread, with the last row where a rank hangs; then all end.
    """
    processes = engine.processes if engine else Processes()
    yield from attempted("ranks", lambda: check_alike(processes, config.train.precision if config else "auto"))
    yield from on_main(processes, "machine", lambda: check_machine(config))
    yield from on_main(processes, "metrics", lambda: check_metrics(config.eval.metrics if config else METRICS))
    if config is None:
        yield from attempted("exchange", lambda: check_exchange(processes, ASSUMED_BYTES))
        return
    config = with_precision(config)
    here, ranks = local_ranks(processes), processes.world_size if engine else announced()
    yield from on_main(processes, "batch", lambda: check_ranks(config, ranks, here if engine else ranks))
    yield from attempted("shards", lambda: check_shards(config, processes, full))
    data, opened = check_opening(config, processes)
    yield from opened
    yield from on_main(processes, "run folder", lambda: check_run_folder(config, data))
    if data is not None:
        yield from on_main(processes, "samples", lambda: check_samples(config, data, ranks))
        yield from on_main(processes, "words", lambda: check_words(config, data))
    yield from on_main(processes, "MLflow", lambda: check_mlflow(config))
    yield from check_training(config, data, engine, Costs(here, price), give_up)


def on_main(processes: Processes, check: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """A check of what is the same for all ranks."""
    if processes.is_main:
        yield from attempted(check, rows)


@dataclass(frozen=True)
class Costs:
    """What a step's figures are multiplied by."""

    here: int
    """Ranks that share this machine."""
    price: float
    """Of an hour of all machines; 0: not known."""


def check_training(
    config: Config, data: TrainingData | None, engine: Engine | None, costs: Costs, give_up: Callable[[Row], None]
) -> Iterator[Row]:
    """The model, its room on the disk, its exchange and its steps. All ranks enter."""
    if data is None or engine is None:
        lacks = "the data" if data is None else "the process group"
        yield warning("steps", f"not taken: {lacks} failed, see above", "mend that, then run sat doctor again")
        return
    processes = engine.processes
    try:
        learner, model = _built(config, data, engine)
        yield from model
        yield from on_main(processes, "disk", lambda: check_disk(config, checkpoint_bytes(learner)))
        with named(processes), watched(processes, config.train.timeout, partial(hung, processes, give_up), 1):
            yield from check_exchange(processes, gradient_bytes(learner))
            measured = measure_steps(config, data, learner, processes)
            yield from rows_of_steps(measured, costs.here, processes.device.type == "cuda")
            with learner.stepper.whole():
                evaluation = seconds_to_evaluate(config, data, learner, processes)
        yield from rows_of_run(config, data, measured, evaluation, costs.price)
    except Agreed as error:
        yield refused("steps", error)
    except Exception as error:
        yield lost(processes, error)


def _built(config: Config, data: TrainingData, engine: Engine) -> tuple[Learner, list[Row]]:
    processes = engine.processes
    agreed(processes, lambda: speed_up(config.train.kernels, processes.device))
    learner = build_learner(config, data, engine)
    weights = sum(map(numbers_in, learner.model.parameters()))
    return learner, [ok("model", f"{weights / 1e6:.3g} million weights, {config.train.precision}", weights=weights)]


def gradient_bytes(learner: Learner) -> int:
    """That the ranks exchange in a step."""
    return 4 * sum(numbers_in(each) for each in learner.model.parameters() if each.requires_grad)


def hung(processes: Processes, give_up: Callable[[Row], None], sentence: str) -> None:
    """The last row, where the ranks wait for one another in vain; called by the watchdog."""
    if not processes.is_main:
        time.sleep(LONGEST_S)  # as long as the watchdog lets us: rank 0 speaks first
        return
    silent = re.findall(r"(rank \d+) on (\S+) gives no sign of life", sentence)
    mend = "the stacks of all threads stand above: they show what is waited for"
    if silent:
        ranks, hosts = (sorted(set(words)) for words in zip(*silent, strict=True))
        mend = (
            f"see what holds {' and '.join(ranks)} up on {', '.join(hosts)} (a stopped process: kill -CONT; dmesg, "
            f"nvidia-smi), or leave that machine out (sbatch --exclude={','.join(hosts)})"
        )
    give_up(failed("steps", sentence.partition("; what was saved")[0], mend))


def lost(processes: Processes, error: Exception) -> Row:
    """What this rank has met alone: the others may wait for it, so all but rank 0 say it and leave."""
    row = refused("steps", error, "its own words stand above" * isinstance(error, StartAgain) * processes.is_main)
    if not processes.is_main:
        print(f"rank {processes.rank}: {row.found}", file=sys.stderr, flush=True)
        os._exit(0)  # its connections close, and rank 0 learns of it
    return row


if __name__ == "__main__":
    run_program(main)
