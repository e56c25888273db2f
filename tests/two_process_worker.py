"""One rank of tests/test_two_process.py: takes some optimizer steps, for each of some variants, and writes down what
they did.

usage: two_process_worker.py CONFIG STEPS OUT [key=value ...] [-- key=value ...] ...

Each `--` begins a variant: settings over those of CONFIG. `infinite=STEP` adds infinity to the loss of that step's last
micro-batch on rank 0, which leaves its gradient finite; `nan=STEP` makes the last rank's gradient NaN in that step.
`engine=NAME` takes another engine of ENGINES than the launcher's; `keep=FILE` writes the learner's state after HALF of
the steps, and `go_on=FILE` takes the other steps from there.
"""

import itertools
import math
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sat.config import load_config
from sat.data.plan import Cursor
from sat.engine.ddp import Ddp
from sat.engine.engine import Engine
from sat.engine.start import start
from sat.engine.zero import Zero, ZeroSettings
from sat.learner import Learner, build_learner
from sat.meter import Meter
from sat.run_folder import Run
from sat.train import steps_from, take_step
from sat.training_data import open_data

HALF = 2
ENGINES = {
    "zero1": ZeroSettings(1),
    "zero2": ZeroSettings(2),
    "zero3": ZeroSettings(3),
    "zero2_offload": ZeroSettings(2, offload_optimizer=True),
    "zero3_offload": ZeroSettings(3, offload_optimizer=True, offload_weights=True),
}
TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def chosen(engine: Engine, name: str | None, precision: str) -> Engine:
    """The engine of that name on the same ranks, at a precision that `start` would refuse on a CPU too."""
    if name is None:
        return engine
    processes = replace(engine.processes, autocast_type=TYPES[precision])
    return Ddp(processes) if name == "ddp" else Zero(processes, ENGINES[name])


def gradients_are_kept(learner: Learner, kept: list[torch.Tensor]) -> None:
    """Write down the exchanged gradient before each update."""

    def hook(optimizer, *_):
        kept.append(torch.cat([parameter.grad.flatten().clone() for parameter in learner.model.parameters()]))

    learner.stepper.optimizer.register_step_pre_hook(hook)


def losses_are_kept(learner: Learner, kept: list[float]) -> None:
    """Write down this rank's NLL per token of each micro-batch."""

    def hook(_module, _arguments, sums):
        kept.append(float(sums.counts["nll"] / sums.counts["tokens"].clamp_min(1)))

    learner.objective.register_forward_hook(hook)


def losses_are_spoilt(learner: Learner, rank: int, world_size: int, spoilt: dict[str, int]) -> None:
    """Make the loss of the chosen steps not finite."""
    calls = itertools.count()

    def hook(_module, _arguments, sums):
        step = next(calls) // learner.config.train.accumulation_steps
        if rank == 0 and step == spoilt.get("infinite"):
            return sums._replace(per_token=sums.per_token + math.inf)
        if rank == world_size - 1 and step == spoilt.get("nan"):
            return sums._replace(per_token=(sums.per_token * math.nan).nan_to_num(nan=1.0) + sums.per_token)
        return None

    learner.objective.register_forward_hook(hook)


def take_steps(engine: Engine, path: str, steps: int, settings: list[str]) -> dict[str, torch.Tensor]:
    """What the steps of one variant did."""
    names = ("infinite=", "nan=", "engine=", "keep=", "go_on=")
    words = dict(setting.split("=", 1) for setting in settings if setting.startswith(names))
    config = load_config(path, [setting for setting in settings if not setting.startswith(names)])
    engine = chosen(engine, words.get("engine"), config.train.precision)
    processes, data = engine.processes, open_data(config)
    learner = build_learner(config, data, engine)
    if "go_on" in words:
        learner.load_state(load_file(words["go_on"]))
    spoilt = {name: int(words[name]) for name in ("infinite", "nan") if name in words}
    run, meter, gradients, losses = Run(Path(config.train.run_dir), processes, None), Meter(), [], []
    losses_are_spoilt(learner, processes.rank, processes.world_size, spoilt)
    losses_are_kept(learner, losses)
    if isinstance(engine, Ddp):
        gradients_are_kept(learner, gradients)
    found = {name: [] for name in ("lines", "weights", "micro_batches", "baselines", "averages")}
    cursor = Cursor.start(data.sources, config.train.seed)
    with closing(steps_from(config, data, cursor, processes, meter)) as batches:
        for step in range(steps):
            of_step = next(batches)
            if "go_on" in words and step < HALF:
                continue
            take_step(config, learner, of_step, step, run, meter)
            line = meter.line(processes)
            found["micro_batches"].append(torch.tensor(processes.gather(losses[-len(of_step) :])).double().flatten())
            if config.model.attention == "hard":
                baselines = processes.gather(float(learner.model.reward_baseline))
                found["baselines"].append(torch.tensor(baselines).double())
            numbers = [line.nll_per_token, line.penalty_per_caption, line.gradient_norm, line.skipped_steps]
            found["lines"].append(torch.tensor(numbers).double())
            with learner.stepper.whole():
                found["weights"].append(flat(learner.model))
            if "keep" in words and step == HALF - 1:
                state = learner.state(processes)
                processes.run_on_main(lambda state=state: save_file(state, words["keep"]))
            if learner.average is not None:
                found["averages"].append(flat(learner.average.module))
    return {name: torch.stack(values) for name, values in (found | {"gradients": gradients}).items() if values}


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().float() for parameter in module.parameters()])


def main() -> None:
    path, steps, out, *rest = sys.argv[1:]
    config = load_config(path)
    engine = start(config.train.precision, config.train.timeout)
    variants = [list(group) for is_cut, group in itertools.groupby(rest, lambda word: word == "--") if not is_cut]
    found = [take_steps(engine, path, int(steps), settings) for settings in variants or [[]]]
    if engine.processes.is_main:
        save_file({f"{i}.{name}": value for i, each in enumerate(found) for name, value in each.items()}, out)
    engine.processes.leave()


if __name__ == "__main__":
    main()
