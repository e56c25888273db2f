"""Optimizer, learning rate and weight average.

The surprise: the rate is a pure function of the step, set on the groups before each update. A scheduler object has state
that a resumed run, or one with another number of ranks, gets wrong.
"""

import math

import torch
from torch import nn


def build_optimizer(
    module: nn.Module, *, learning_rate: float, weight_decay: float, encoder_learning_rate: float
) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that are open for training, in up to four groups.

    Weight matrices decay; biases, vectors and embeddings never do. Parameters under `encoder.` get their own peak rate.
    Each group carries its peak rate as "peak_lr".
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in embeddings
            groups.setdefault((name.startswith("encoder."), decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak_lr": encoder_learning_rate if in_encoder else learning_rate,
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (in_encoder, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=learning_rate,
        fused=True,
    )


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up to `peak`, then half a cosine to zero at `total_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def weight_average(module: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """A copy of `module` that follows it: after each update, average <- decay * average + (1 - decay) * weights.

    Buffers are copied from the module, so the copy can be scored as it stands.
    """
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
