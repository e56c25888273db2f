"""Weights and optimizer state by the names that parameters have in the model: the same for every engine and world.

weights/NAME       of every parameter and buffer; float32 where it is a number with a fraction
exp_avg/NAME       float32, Adam's moments of every parameter that is open for training
exp_avg_sq/NAME
step               float32 scalar: updates that Adam has made
loss_scale/scale, loss_scale/good_steps    of fp16 alone
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

WEIGHTS, STEP = "weights", "step"
MOMENTS = ("exp_avg", "exp_avg_sq")


def model_of(objective: nn.Module) -> nn.Module:
    """Whose names of parameters a checkpoint has: no objective has any of its own."""
    model = objective.model
    assert isinstance(model, nn.Module)
    return model


def open_parameters(objective: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of those that the optimizer moves, in the same order on every rank."""
    return ((name, each) for name, each in model_of(objective).named_parameters() if each.requires_grad)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers as `weights/NAME`; no copies."""
    return {f"{WEIGHTS}/{name}": value.detach() for name, value in module.state_dict().items()}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, without it."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, floats as float32, that later steps do not change.

    From a GPU into pinned memory, which torch keeps for the next time: all copies are under way before one is waited
    for.
    """
    copies, waits = {}, False
    for name, value in tensors.items():
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        on_gpu = value.device.type == "cuda"
        copies[name] = torch.empty(value.shape, dtype=dtype, pin_memory=on_gpu)
        copies[name].copy_(value.detach(), non_blocking=on_gpu)
        waits = waits or on_gpu
    if waits:
        torch.cuda.synchronize()
    return copies
