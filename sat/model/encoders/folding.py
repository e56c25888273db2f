"""BatchNorm folded into the convolution before it, in any network, for inference.

Which belongs to which is seen in one pass over a picture without values: a BatchNorm that is given exactly what a
convolution gave, which nothing else uses.
"""

import copy
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sat.model.encoders.resnet import ResNet
from sat.model.encoders.timm_network import TimmNetwork

Network = TypeVar("Network", bound=ResNet | TimmNetwork)

PLAIN = ("Conv2d", "Conv2dSame")
"""Classes of convolutions whose weights are used as they are; others (standardised ones) are left alone."""


def fold_batchnorm(encoder: Network) -> Network:
    """A copy for inference with every BatchNorm folded into the convolution before it; the input stays as it is.

    Equal up to rounding, and faster where BatchNorm is not free (CPU). An activation inside a BatchNorm of timm's
    stays in its place. ValueError for an encoder in train mode, whose statistics are not fixed yet.
    """
    if encoder.training:
        raise ValueError("fold_batchnorm needs an encoder in eval mode; call encoder.eval() first")
    folded = copy.deepcopy(encoder)
    for before, name in pairs(encoder):
        convolution, norm = folded.get_submodule(before), folded.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        replace_module(folded, before, fuse_conv_bn_eval(convolution, norm))
        replace_module(folded, name, getattr(norm, "act", nn.Identity()))
    folded._frozen_norms = []
    return folded


def pairs(encoder: ResNet | TimmNetwork) -> list[tuple[str, str]]:
    """(convolution, BatchNorm) by name, where nothing but that BatchNorm uses what the convolution gives."""
    return [(before, name) for before, name in follow(encoder) if _is(encoder, before, name)]


def follow(encoder: ResNet | TimmNetwork) -> list[tuple[str, str]]:
    """(module, module) by name: the second's input is the first's output, which nothing else uses; each is run once."""
    network = _without_values(encoder).eval()
    made: dict[int, tuple[str, Any]] = {}
    found, runs = [], Counter[str]()
    uses = _Uses()

    def enter(name: str, inputs: Any) -> None:
        runs[name] += 1
        if len(inputs) and id(inputs[0]) in made:
            found.append((made[id(inputs[0])][0], name, id(inputs[0])))

    for name, module in network.named_modules():
        if not any(True for _ in module.children()) or isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _m, inputs, name=name: enter(name, inputs))
            module.register_forward_hook(lambda _m, _i, out, name=name: made.__setitem__(id(out), (name, out)))
    size = encoder.pixels.size
    with torch.no_grad(), uses:
        network(torch.empty(1, 3, size, size, device="meta"))
    return [(a, b) for a, b, place in found if uses.count[place] == 1 and runs[a] == runs[b] == 1]


def _without_values(encoder: Network) -> Network:
    """A copy on the meta device in float32, whatever type it computes in; no value is copied."""
    memo: dict[int, Any] = {}
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=dtype)
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(encoder, memo)


class _Uses(TorchDispatchMode):
    """Counts in how many operations each tensor takes part; holds them all, so that no identity is used twice."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.count: Counter[int] = Counter()
        self.held: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        self.count.update({id(each) for each in tensors})
        self.held += [*tensors, result]
        return result


def _is(encoder: nn.Module, before: str, name: str) -> bool:
    convolution, norm = encoder.get_submodule(before), encoder.get_submodule(name)
    return type(convolution).__name__ in PLAIN and isinstance(norm, nn.BatchNorm2d)


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one of this name."""
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)
