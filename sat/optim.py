"""Optimizer, learning rate, clipping and weight average.

The surprise: the rate is a pure function of the step, set on the groups before each update. A scheduler object has
state that a resumed run, or one with another number of ranks, gets wrong.
"""

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


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


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """The norm of all gradients, which are scaled down to that of `most` where it is above.

    As PyTorch's, which scales by one where it is not: on a CPU one more pass over all of them.
    """
    gradients = [each for each in parameters if each.grad is not None]
    norm = nn.utils.get_total_norm([each.grad for each in gradients if each.grad is not None])
    if norm.device.type != "cpu" or not norm + 1e-6 <= most:
        nn.utils.clip_grads_with_norm_(gradients, most, norm)
    return norm


class WeightAverage(nn.Module):
    """A copy of a module that follows it: at each update, average <- decay * average + (1 - decay) * weights.

    In float32 also where the weights are bf16 (DeepSpeed): steps of 1 - decay would be lost in rounding. The first
    update takes the weights as they are. Buffers are copied, so `module` can be scored as it stands.
    """

    def __init__(self, module: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay = copy.deepcopy(module).float().requires_grad_(False), decay
        self.updates: torch.Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Follow `module`, of which this is a copy."""
        decay = self.decay if self.updates else 0.0
        weights = [weight.float() for weight in module.parameters()]
        torch._foreach_lerp_(list(self.module.parameters()), weights, 1 - decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)
        self.updates += 1
