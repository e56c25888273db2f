"""The encoder as fast as the machine runs it: uint8 pictures in, float grids out.

On a GPU: BatchNorm folded, channels_last, bf16, torch.compile for long jobs. On a CPU the surprising decision: the
folded network is driven through oneDNN's fused convolutions directly, with weights packed once (what torch.compile's
freezing arrives at, without its warm-up and without a C++ compiler): convolution, bias, the residual's addition and
ReLU are one call.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from preprocessing.features.fused import fuse, input_shapes
from sat.machine import best_precision
from sat.model.encoders.encoder import GridEncoder
from sat.model.encoders.folding import fold_batchnorm
from sat.model.encoders.resnet import ResNet
from sat.model.encoders.table import load_encoder
from sat.model.encoders.timm_network import TimmNetwork

COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Precisions of the network's arithmetic; fp16 is left out, it is many times slower on a CPU."""
COMPILE_IMAGES = 50_000
"""A GPU job of this many pictures repays the minute that torch.compile takes."""
PIXELS_AT_ONCE = 8 * 224**2
"""Per thread of a CPU: of threads malloc keeps no block above 64 MB, and a map of 32 pictures is larger."""


def refuse_compute(compute: str) -> None:
    """Raise ValueError where this machine cannot compute in `compute`."""
    if compute == "bf16" and not torch.cuda.is_available() and best_precision() != "bf16":
        raise ValueError(
            "this CPU cannot compute in bf16 (it has neither AVX-512 nor AMX); use --compute fp32, or another machine"
        )


def load_network(
    weights: str | Path, stage: int, size: int, compute: str, device: str = "cpu", images: int = 0
) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]]:
    """A function uint8 [B, S, S, 3] -> grids [B, L, D], float32 or (compute bf16) bf16 as uint16 bits.

    `images` is the length of the job, by which torch.compile is chosen on a GPU. Raises ValueError as `load_encoder`.
    """
    encoder = load_encoder(weights, stage=stage)
    forward = fast_forward(encoder, size, compute, device, images)
    slope, bias = _pixel_row(encoder, size, device)

    def normal(rows: Tensor) -> Tensor:
        """uint8 [B, S, S * 3] -> [B, 3, S, S] as the network wants them."""
        pixels = torch.addcmul(bias, rows.float(), slope).to(COMPUTE[compute])
        return pixels.view(-1, size, size, 3).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def run(pictures: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        rows = torch.from_numpy(pictures).to(device).flatten(2)  # [B, S, S * 3]
        at_once = _at_once(size) if device == "cpu" else len(rows)
        grids = torch.cat([forward(normal(some)) for some in rows.split(at_once)]).cpu().contiguous()
        stored: npt.NDArray[Any] = grids.view(torch.uint16).numpy() if compute == "bf16" else grids.numpy()
        return stored

    return run


def _at_once(size: int) -> int:
    """Pictures of a batch that a CPU's network gets in one call; a test wants the bits that the whole batch gives."""
    return max(1, PIXELS_AT_ONCE * torch.get_num_threads() // size**2)


def _pixel_row(encoder: GridEncoder, size: int, device: str) -> tuple[Tensor, Tensor]:
    """(slope, bias), each [S * 3], of `normalise` over a row of RGB pixels: three times as fast as over channels."""
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    black, white = encoder.normalise(black_and_white).flatten(1).to(device)  # [3] each
    return ((white - black) / 255).repeat(size), black.repeat(size)


def fast_forward(
    encoder: ResNet | TimmNetwork, size: int, compute: str, device: str, images: int
) -> Callable[[Tensor], Tensor]:
    """The encoder's forward pass for pictures of one size: [B, 3, S, S] channels_last in `compute` -> [B, L, D]."""
    folded = fold_batchnorm(encoder).to(device, COMPUTE[compute]).to(memory_format=torch.channels_last)
    if torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available():
        return FusedResNet(folded, size) if isinstance(folded, ResNet) else fuse(folded, size)
    return torch.compile(folded) if images >= COMPILE_IMAGES else folded


class FusedResNet:
    """A folded ResNet in oneDNN's fused convolutions; [B, 3, S, S] channels_last -> [B, L, D] like `ResNet`."""

    def __init__(self, folded: ResNet, size: int):
        self.folded = folded
        self.packed = {(m := _convolution(folded, name)): _pack(m, s) for name, s in input_shapes(folded, size).items()}

    def __call__(self, images: Tensor) -> Tensor:
        x = self.folded.maxpool(self._convolve(_convolution(self.folded, "conv1"), images, "relu"))
        for number in self.folded.stages:
            for block in self.folded.stage_module(number):
                first, second, third = (_convolution(block, name) for name in ("conv1", "conv2", "conv3"))
                on_shortcut = None if block.downsample is None else _convolution(block, "downsample.0")
                shortcut = x if on_shortcut is None else self._convolve(on_shortcut, x, "none")
                y = self._convolve(second, self._convolve(first, x, "relu"), "relu")
                x = self._convolve_add_relu(third, y, shortcut)
        grids: Tensor = x.permute(0, 2, 3, 1).flatten(1, 2)
        return grids

    def _convolve(self, module: nn.Conv2d, x: Tensor, activation: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, *self.packed[module], activation, [], "")
        return y

    def _convolve_add_relu(self, module: nn.Conv2d, x: Tensor, shortcut: Tensor) -> Tensor:
        """relu(conv(x) + shortcut), written over `shortcut`."""
        fused = torch.ops.mkldnn._convolution_pointwise_.binary
        y: Tensor = fused(shortcut, x, *self.packed[module], "add", 1.0, "relu", [], "")
        return y


def _convolution(block: nn.Module, name: str) -> nn.Conv2d:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Conv2d)
    return module


def _pack(module: nn.Conv2d, shape: list[int]) -> tuple[Any, ...]:
    """Weights in oneDNN's own layout, bias and geometry: the middle arguments of its convolutions."""
    assert module.bias is not None, "BatchNorm is folded into it"
    geometry = (module.padding, module.stride, module.dilation, module.groups)
    weight = torch.ops.mkldnn._reorder_convolution_weight(module.weight.detach(), *geometry, shape)
    return (weight, module.bias.detach(), *geometry)
