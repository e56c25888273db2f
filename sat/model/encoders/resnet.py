"""ResNets as grid encoders: pictures in, one vector per cell of the last kept stage out.

Parameters carry torchvision's names, so any checkpoint of its ResNet-50, -101 or -152 fits.

Shapes: B pictures, H x W pixels, L = (H / s) * (W / s) grid cells of D features.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.model.encoders.encoder import normalise, opened_stages
from sat.model.encoders.geometry import spec_of
from sat.model.encoders.opening import has_gradients, open_parts, run_twice
from sat.model.encoders.weights import LAST_RESNET_STAGE, RESNETS, Pixels, named_stage
from sat.shards.features import EncoderSpec

STAGES = tuple(range(1, LAST_RESNET_STAGE + 1))
"""torchvision's layer1 to layer4."""


class ResNet(nn.Module):
    """A ResNet (He et al. 2015, arXiv:1512.03385; torchvision's variant) without its pooling and classifier.

    A new one is random and open for training as a whole; `open_for_training` opens some stages of it.
    """

    fixed_size = False

    def __init__(self, architecture: str = RESNETS[0], stage: int = 0, pixels: Pixels | None = None) -> None:
        """Keep the stem and the stages 1 to `stage`; 0 is the last. ValueError for a stage that does not exist."""
        super().__init__()
        if stage not in (0, *STAGES):
            raise ValueError(f"encoder stage {stage} does not exist; choose one of {STAGES}, or 0 for the last")
        network = _network(architecture)
        self.architecture, self.stage = architecture, named_stage(architecture, stage)
        self.stages = STAGES[: self.stage]
        self.pixels = pixels or Pixels()
        self.conv1, self.bn1, self.maxpool = (network.get_submodule(name) for name in ("conv1", "bn1", "maxpool"))
        for number in self.stages:
            setattr(self, f"layer{number}", getattr(network, f"layer{number}"))
        self.checkpointing = False
        self._frozen_norms: list[nn.BatchNorm2d] = []

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures, float [B, 3, H, W] -> grid [B, L, D] in row-major order of the cells."""
        x: Tensor = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for number in self.stages:
            x = self._run_stage(self.stage_module(number), x)
        grid: Tensor = x.permute(0, 2, 3, 1).flatten(1, 2)  # a view where x is channels_last
        return grid

    def _run_stage(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        recompute = self.checkpointing and torch.is_grad_enabled() and has_gradients(blocks)
        for block in blocks:
            x = run_twice(block, block, x) if recompute else block(x)
        return x

    @cached_property
    def spec(self) -> EncoderSpec:
        """What its features are and where its cells look; see `geometry`."""
        return spec_of(self)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 of the same shape. ValueError for another type."""
        return normalise(images, self.pixels)

    def stage_module(self, stage: int) -> nn.Sequential:
        """The residual blocks of one kept stage."""
        blocks = getattr(self, f"layer{stage}")
        assert isinstance(blocks, nn.Sequential)
        return blocks

    def open_for_training(
        self, stages: Sequence[int], freeze_batchnorm: bool = True, checkpointing: bool = False
    ) -> "ResNet":
        """As `GridEncoder.open_for_training`; the stem stays closed."""
        parts = [self.stage_module(stage) for stage in opened_stages(self, stages)]
        self._frozen_norms = open_parts(self, parts, freeze_batchnorm)
        self.checkpointing = checkpointing
        return self.train(self.training)

    def train(self, mode: bool = True) -> "ResNet":
        """As nn.Module.train, but frozen BatchNorms stay in eval mode."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self


def whole_names(architecture: str) -> frozenset[str]:
    """Names of everything in a checkpoint of torchvision's, classifier included."""
    with torch.device("meta"):
        return frozenset(_network(architecture).state_dict())


def _network(architecture: str) -> nn.Module:
    from torchvision import models

    network: nn.Module = {
        "resnet50": models.resnet50,
        "resnet101": models.resnet101,
        "resnet152": models.resnet152,
    }[architecture](weights=None)
    return network
