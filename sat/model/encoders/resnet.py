"""ResNet-50 as a grid encoder: pictures in, one vector per cell of the last kept stage out.

Parameters carry torchvision's names, so any ResNet-50 checkpoint fits. The surprising decision: what is frozen stays
frozen through `train()`. A BatchNorm left in train mode silently replaces its statistics by those of the current batch,
the most common way to spoil a frozen encoder; `Encoder.train` therefore keeps every closed BatchNorm in eval mode.

Shapes: B pictures, H x W pixels, L = (H / s) * (W / s) grid cells of D features; s and D: `sat.shards.features`.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from sat.shards.features import GEOMETRY, EncoderSpec

IMAGE_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's pixels in [0, 1], per RGB channel."""
IMAGE_STD = (0.229, 0.224, 0.225)
"""Standard deviation of the same."""
ARCHITECTURE = "resnet50"
"""Its name in `sat.shards.features.GEOMETRY`."""
STAGES = tuple(GEOMETRY[ARCHITECTURE])
"""ResNet's stages: torchvision's layer1 to layer4."""


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 of the same shape, with ImageNet's mean and standard deviation per channel."""
    if images.dtype != torch.uint8:
        raise ValueError(f"normalise expects uint8 pixels, got {images.dtype}")
    mean = torch.tensor(IMAGE_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)


class Encoder(nn.Module):
    """ResNet-50 (He et al. 2015, arXiv:1512.03385; torchvision's variant) without its pooling and classifier.

    A new encoder is random and open for training as a whole; `load_encoder` gives a frozen one, and
    `open_for_training` opens some stages of it.
    """

    def __init__(self, stage: int = 4) -> None:
        """Keep the stem and the stages 1 to `stage`; ValueError unless `stage` is one of 1 to 4."""
        super().__init__()
        if stage not in STAGES:
            raise ValueError(f"encoder stage {stage} does not exist; choose one of {STAGES}")
        from torchvision.models import resnet50

        network = resnet50(weights=None)
        self.conv1, self.bn1, self.maxpool = network.conv1, network.bn1, network.maxpool
        for number in STAGES[:stage]:
            setattr(self, f"layer{number}", getattr(network, f"layer{number}"))
        self.stage = stage
        self.feature_dim = EncoderSpec(ARCHITECTURE, stage).dim
        self.checkpointing = False
        self._frozen_norms: list[nn.BatchNorm2d] = []

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures, float [B, 3, H, W] -> grid [B, L, D] in row-major order of the cells."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for number in STAGES[: self.stage]:
            x = self._run_stage(self.stage_module(number), x)
        grid: Tensor = x.permute(0, 2, 3, 1).flatten(1, 2)  # a view where x is channels_last
        return grid

    def _run_stage(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        recompute = self.checkpointing and torch.is_grad_enabled() and _has_gradients(blocks)
        for block in blocks:
            if recompute:
                contexts = partial(_recompute_contexts, block)
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
            else:
                x = block(x)
        return x

    def stage_module(self, stage: int) -> nn.Sequential:
        """The residual blocks of one kept stage."""
        blocks = getattr(self, f"layer{stage}")
        assert isinstance(blocks, nn.Sequential)
        return blocks

    def open_for_training(
        self, stages: Sequence[int], freeze_batchnorm: bool = True, checkpointing: bool = False
    ) -> "Encoder":
        """Open `stages` for training and close all else, the stem included; returns self.

        `freeze_batchnorm` keeps statistics and affine parameters of the open stages fixed too. `checkpointing` keeps
        only the residual blocks' inputs for the backward pass and computes the rest again. ValueError for a stage that
        is not kept.
        """
        unknown = sorted(set(stages) - set(STAGES[: self.stage]))
        if unknown:
            raise ValueError(f"cannot open stages {unknown}: this encoder has the stages {STAGES[: self.stage]}")
        self.requires_grad_(False)
        for stage in stages:
            self.stage_module(stage).requires_grad_(True)
        opened = {id(module) for stage in stages for module in self.stage_module(stage).modules()}
        norms = list(_batchnorms(self))
        self._frozen_norms = norms if freeze_batchnorm else [norm for norm in norms if id(norm) not in opened]
        for norm in self._frozen_norms:
            norm.requires_grad_(False)
        self.checkpointing = checkpointing
        return self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        """As nn.Module.train, but frozen BatchNorms stay in eval mode."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self


def _batchnorms(module: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (child for child in module.modules() if isinstance(child, nn.BatchNorm2d))


def _has_gradients(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _recompute_contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of `block`'s first pass and of its recomputation."""
    return nullcontext(), _as_in_the_first_pass(block, [norm for norm in _batchnorms(block) if norm.training])


@contextmanager
def _as_in_the_first_pass(block: nn.Module, trained: list[nn.BatchNorm2d]) -> Iterator[None]:
    """Run `block` again, with `trained` its BatchNorms in train mode, without moving their statistics a second time."""
    before = [(norm, norm.training, norm.momentum) for norm in _batchnorms(block)]
    counters = [(counter, counter.clone()) for norm in trained if (counter := norm.num_batches_tracked) is not None]
    for norm, _, _ in before:
        norm.train(any(norm is each for each in trained))
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, mode, momentum in before:
            norm.train(mode)
            norm.momentum = momentum
        for counter, batches in counters:
            counter.copy_(batches)


def load_encoder(path: str | Path, stage: int = 4) -> Encoder:
    """A frozen encoder in eval mode from a safetensors file with torchvision's ResNet-50 names.

    The classifier and the stages above `stage` may be there or not; all else has to fit exactly. ValueError naming the
    file and the keys that are missing, unknown or of another shape.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"encoder weights {path} do not exist; make them with `python -m preprocessing.pretrain_encoder --out "
            f"{path}` or, for ImageNet, `python -m preprocessing.fetch_weights --out {path}`"
        )
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    encoder = Encoder(stage)
    unused = ("fc.", *(f"layer{number}." for number in STAGES[stage:]))
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(unused)}
    _check_fit(path, weights, encoder.state_dict())
    encoder.load_state_dict(weights, strict=False)  # only num_batches_tracked may be absent
    return encoder.requires_grad_(False).eval()


def _check_fit(path: str | Path, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    faults = {
        "missing": sorted(expected.keys() - weights.keys() - counters),
        "unknown": sorted(weights.keys() - expected.keys()),
        "of another shape": sorted(
            name for name in weights.keys() & expected.keys() if weights[name].shape != expected[name].shape
        ),
    }
    found = [f"{len(names)} {kind} ({', '.join(names[:5])})" for kind, names in faults.items() if names]
    if found:
        raise ValueError(f"{path} is not a ResNet-50 with torchvision's names: keys {'; '.join(found)}")


def fold_batchnorm(encoder: Encoder) -> Encoder:
    """A copy for inference with every BatchNorm folded into the convolution before it; the input stays as it is.

    Equal up to rounding, and faster where BatchNorm is not free (CPU). ValueError for an encoder in train mode, whose
    statistics are not fixed yet.
    """
    if encoder.training:
        raise ValueError("fold_batchnorm needs an encoder in eval mode; call encoder.eval() first")
    folded = copy.deepcopy(encoder)
    for module in list(folded.modules()):
        names = [name for name, _ in module.named_children()]
        for before, name in itertools.pairwise(names):
            norm = getattr(module, name)
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, before, fuse_conv_bn_eval(getattr(module, before), norm))
                setattr(module, name, nn.Identity())
    folded._frozen_norms = []
    return folded
