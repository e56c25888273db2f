"""The contract of everything that turns pictures into a grid, and what all encoders do alike."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sat.model.encoders.weights import Pixels
from sat.shards.features import EncoderSpec

Self = TypeVar("Self", bound="GridEncoder")


class GridEncoder(Protocol):
    """Pictures -> one vector per cell; an nn.Module. B pictures of S x S pixels, L cells of D features."""

    @property
    def architecture(self) -> str:
        """`resnet50`, `resnet101`, `resnet152` or `timm/NAME`."""

    @property
    def stage(self) -> int:
        """0: the network's last features, else its n-th stage, counted from 1."""

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that are kept and can be opened for training."""

    @property
    def pixels(self) -> Pixels:
        """What it expects of a picture."""

    @property
    def spec(self) -> EncoderSpec:
        """What its features are and where its cells look, computed once; without digests of weights."""

    @property
    def fixed_size(self) -> bool:
        """Whether it takes pictures of `pixels.size` alone."""

    @property
    def training(self) -> bool: ...

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised pictures, float [B, 3, S, S] -> grid [B, L, D] in row-major order of the cells."""

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> what it expects, float32 of the same shape. ValueError for another type."""

    def stage_module(self, stage: int) -> nn.Module:
        """The part of the network that a stage adds to the one before."""

    def open_for_training(
        self: Self, stages: Sequence[int], freeze_batchnorm: bool = True, checkpointing: bool = False
    ) -> Self:
        """Open `stages` for training (none named: all but the first) and close all else; returns self.

        `freeze_batchnorm` keeps statistics and affine parameters of the open stages fixed too. `checkpointing` keeps
        only the blocks' inputs for the backward pass and computes the rest again. ValueError for an unknown stage.
        """

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def train(self: Self, mode: bool = True) -> Self: ...

    def eval(self: Self) -> Self: ...

    def to(self: Self, *args: Any, **kwargs: Any) -> Self: ...

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self: ...


def normalise(images: Tensor, pixels: Pixels) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 of the same shape, with the mean and standard deviation of `pixels` per channel."""
    if images.dtype != torch.uint8:
        raise ValueError(f"normalise expects uint8 pixels, got {images.dtype}")
    mean = torch.tensor(pixels.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(pixels.std, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)


def opened_stages(encoder: GridEncoder, stages: Sequence[int]) -> list[int]:
    """The stages meant by a setting: those named, or all but the first. ValueError for one that is not kept."""
    unknown = sorted(set(stages) - set(encoder.stages))
    if unknown:
        raise ValueError(
            f"cannot open stages {unknown}: this encoder ({encoder.architecture}) has the stages {encoder.stages}"
        )
    return sorted(set(stages)) or list(encoder.stages[1:] or encoder.stages)


def refuse_unfit(
    path: str | Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, whole: frozenset[str]
) -> None:
    """ValueError naming the keys of `weights` that are missing, unknown or of another shape.

    `whole` are the names of the uncut network, which may be there; counters of batches may lack.
    """
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    faults = {
        "missing": sorted(expected.keys() - weights.keys() - counters),
        "unknown": sorted(weights.keys() - expected.keys() - whole),
        "of another shape": sorted(
            name for name in weights.keys() & expected.keys() if weights[name].shape != expected[name].shape
        ),
    }
    found = [f"{len(names)} {fault} ({', '.join(names[:5])})" for fault, names in faults.items() if names]
    if found:
        raise ValueError(f"{path} is not {kind}: keys {'; '.join(found)}")
