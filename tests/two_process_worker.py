"""One rank of tests/test_two_process.py: takes some optimizer steps and writes down what they did.

usage: two_process_worker.py CONFIG STEPS OUT [key=value ...]
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sat.config import load_config
from sat.data.plan import Cursor
from sat.engine.processes import start
from sat.learner import build_learner
from sat.meter import Meter
from sat.run_folder import Run
from sat.train import steps_from, take_step
from sat.training_data import open_data


def gradients_are_kept(learner, kept: list[torch.Tensor]):
    """Write down the exchanged gradient before each update."""

    def hook(optimizer, *_):
        kept.append(torch.cat([parameter.grad.flatten().clone() for parameter in learner.module.parameters()]))

    learner.optimizer.optimizer.register_step_pre_hook(hook)


def losses_are_kept(learner, kept: list[float]):
    """Write down this rank's NLL per token of each micro-batch."""

    def hook(_module, _arguments, sums):
        kept.append(float(sums.counts["nll"] / sums.counts["tokens"].clamp_min(1)))

    learner.objective.register_forward_hook(hook)


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[4:])
    runtime = start(config.train.precision)
    data = open_data(config)
    learner = build_learner(config, data, runtime)
    run, meter, kept, lines, weights = Run(Path(config.train.run_dir), runtime, None), Meter(), [], [], []
    losses, micro_batches, baselines = [], [], []
    losses_are_kept(learner, losses)
    if not runtime.deepspeed:
        gradients_are_kept(learner, kept)
    cursor = Cursor.start(data.sources, config.train.seed)
    for step, batches in zip(range(int(sys.argv[2])), steps_from(config, data, cursor, runtime, meter), strict=False):
        take_step(config, learner, batches, step, run, meter)
        line = meter.line(runtime)
        micro_batches.append(torch.tensor(runtime.gather(losses[-len(batches) :])).double().flatten())
        if config.model.attention == "hard":
            baselines.append(torch.tensor(runtime.gather(float(learner.module.reward_baseline))).double())
        lines.append(torch.tensor([line["nll_per_token"], line["penalty_per_caption"], line["gradient_norm"]]).double())
        weights.append(torch.cat([parameter.detach().flatten().float() for parameter in learner.module.parameters()]))
    if runtime.is_main:
        found = {"lines": lines, "weights": weights, "gradients": kept}
        found |= {"baselines": baselines, "micro_batches": micro_batches}
        save_file({name: torch.stack(values) for name, values in found.items() if values}, sys.argv[3])
    runtime.leave()


if __name__ == "__main__":
    main()
