"""Any folded network in oneDNN's convolutions: weights packed once, the activation after one fused into its call.

Which activation follows which convolution is seen, not assumed: it is given exactly what the convolution gave, which
nothing else uses. What has no convolutions (a ViT) stays as it is.
"""

import copy
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.model.encoders.folding import PLAIN, follow, replace_module
from sat.model.encoders.timm_network import TimmNetwork

ACTIVATIONS: dict[str, tuple[str, list[float], str]] = {
    "ReLU": ("relu", [], ""),
    "ReLU6": ("hardtanh", [0.0, 6.0], ""),
    "Hardswish": ("hardswish", [], ""),
    "SiLU": ("swish", [], ""),
}
"""oneDNN's name, numbers and algorithm of an activation, by its class."""
NO_ACTIVATION: tuple[str, list[float], str] = ("none", [], "")


class PackedConvolution(nn.Module):
    """A convolution whose weights lie in oneDNN's own layout, with what follows it; [B, C, H, W] channels_last."""

    def __init__(self, source: nn.Conv2d, shape: list[int], activation: tuple[str, list[float], str]) -> None:
        """`shape` is of the inputs it will see: weights are packed best for that."""
        super().__init__()
        assert not isinstance(source.padding, str)
        self.same = type(source).__name__ == "Conv2dSame"  # TensorFlow's padding, which depends on the input
        self.kernel, self.stride, self.dilation = source.kernel_size, source.stride, source.dilation
        geometry = (list(source.padding), list(source.stride), list(source.dilation), source.groups)
        padded = [*shape[:2], *(n + sum(self._padding(n, i)) for i, n in enumerate(shape[2:]))]
        weight = torch.ops.mkldnn._reorder_convolution_weight(source.weight.detach(), *geometry, padded)
        bias = None if source.bias is None else source.bias.detach()
        self.arguments: tuple[Any, ...] = (weight, bias, *geometry, *activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            x = F.pad(x, [*self._padding(x.shape[3], 1), *self._padding(x.shape[2], 0)])
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, *self.arguments)
        return y

    def _padding(self, length: int, axis: int) -> tuple[int, int]:
        """Pixels before and after, so that the output has ceil(length / stride); the odd one comes after."""
        if not self.same:
            return 0, 0
        kernel, stride, dilation = self.kernel[axis], self.stride[axis], self.dilation[axis]
        total = max((math.ceil(length / stride) - 1) * stride + (kernel - 1) * dilation + 1 - length, 0)
        return total // 2, total - total // 2


def fuse(folded: TimmNetwork, size: int) -> TimmNetwork:
    """The folded network in packed convolutions, for pictures of one size; on a CPU with oneDNN."""
    fused = copy.deepcopy(folded)
    after = dict(follow(fused))
    for name, shape in input_shapes(fused, size).items():
        source = fused.get_submodule(name)
        if type(source).__name__ not in PLAIN:
            continue
        activation = NO_ACTIVATION
        if (following := after.get(name)) is not None:
            activation = ACTIVATIONS.get(type(fused.get_submodule(following)).__name__, NO_ACTIVATION)
        if activation is not NO_ACTIVATION:
            replace_module(fused, cast(str, following), nn.Identity())
        replace_module(fused, name, PackedConvolution(cast(nn.Conv2d, source), shape, activation))
    return fused


@torch.inference_mode()
def input_shapes(network: nn.Module, size: int) -> dict[str, list[int]]:
    """Shape of the input of every convolution by its name, [B, C, H, W], for which its weights are packed best."""
    shapes: dict[str, list[int]] = {}
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    hooks = [
        module.register_forward_pre_hook(lambda _m, inputs, name=name: shapes.__setitem__(name, list(inputs[0].shape)))
        for name, module in convolutions.items()
    ]
    dtype = next(network.parameters()).dtype
    network(torch.zeros(1, 3, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    return shapes
