"""Where the cells of an encoder look: stride and first centre of their receptive fields, computed and not assumed.

A stride-2, padding-1 network's cell i sees around pixel 32 i, TensorFlow's "same" padding around 32 i + 31, a ViT's
patches of 32 around 32 i + 15.5. One pass over a picture without values (PyTorch's meta device) follows every
convolution, pooling and padding: a kernel of k pixels, s apart, d between its taps, p of padding before, moves the
first centre by ((k - 1) d / 2 - p) cells of its input and multiplies the stride by s. All else keeps the place; where
that does not explain the number of cells (patches merged by slicing), they are centred in the picture.

The surprising decision: this is where kernels of equal weights look. One-sided padding is answered by training with
one-sided kernels: EfficientNet-Lite0's cells look around 32 i + 18, near the middle of their squares, not 32 i + 31.
For networks with such padding `measure_centre` says where given weights look; their file carries it. Where a network
was trained on another parity (Lite2: 260 px, 17 to 9 cells) its gradient leads by 10 px, and discs have the word.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sat.model.encoders.encoder import GridEncoder
from sat.shards.features import EncoderSpec

PROBE = 448
"""Pixels per side of the picture that is followed: a multiple of every usual stride."""
WHOLE = 32
"""Pixels: centres are measured on pictures whose side is a multiple of this, as 224, 256 and 288 are."""


def spec_of(encoder: GridEncoder) -> EncoderSpec:
    """What an encoder's features are and where its cells look. ValueError where it does not give a square grid."""
    size = encoder.pixels.size if encoder.fixed_size else PROBE
    network = copy.deepcopy(encoder).eval().to("meta", torch.float32)  # whatever type it computes in
    with torch.no_grad(), _Follow() as follow:
        picture = follow.begin_with(torch.empty(1, 3, size, size, device="meta"))
        grid = network(picture)
    _, cells, dim = grid.shape
    side = math.isqrt(cells)
    if side * side != cells:
        raise ValueError(f"{encoder.architecture} gives {cells} cells of {size} x {size} pixels, which is no square")
    place = follow.place_of(grid)
    if place is None or place.stride * side != size:
        place = _Place(size / side, (size / side - 1) / 2)
    return EncoderSpec(encoder.architecture, encoder.stage, dim, float(place.stride), float(place.first))


def pads_one_side(encoder: GridEncoder) -> bool:
    """Whether the network has TensorFlow's "same" padding, whose odd pixel comes after the picture."""
    return any(type(module).__name__ == "Conv2dSame" for module in encoder.modules())


def measure_centre(encoder: GridEncoder, pictures: int = 8) -> float:
    """Where these weights look: first centre of the cells, by which pixels move the middle cell, to a 16th of a cell.

    The gradient of random mixtures of its features over pictures of pink noise, the statistics of photographs, always
    the same ones; the magnitude's centroid, of both directions. A few seconds on a CPU.
    """
    generator, size = torch.Generator().manual_seed(0), encoder.pixels.size
    if not encoder.fixed_size:
        size = size // WHOLE * WHOLE  # "same" padding pads other sizes on both sides, so cells look elsewhere there
    encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
    images = encoder.normalise(_pink_noise(pictures, size, generator)).requires_grad_()
    with torch.enable_grad():
        grid = encoder(images)
        side = math.isqrt(grid.shape[1])
        middle = side // 2
        mixture = torch.randn(grid.shape[0], grid.shape[2], generator=generator)
        (gradient,) = torch.autograd.grad((grid[:, middle * side + middle] * mixture).sum(), images)
    moved = gradient.square().sum(1).mean(0).sqrt()  # [S, S]
    place = torch.arange(size, dtype=torch.float32)
    centroid = float(((moved.sum(0) + moved.sum(1)) * place).sum() / (2 * moved.sum()))
    step = encoder.spec.stride / 16
    return round((centroid - middle * encoder.spec.stride) / step) * step


def _pink_noise(count: int, size: int, generator: torch.Generator) -> Tensor:
    """uint8 [count, 3, size, size], with the spectrum of photographs: amplitude falls with frequency."""
    frequency = torch.fft.fftfreq(size)
    falling = 1 / (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt().clamp_min(1 / size)
    white = torch.randn(count, 3, size, size, generator=generator)
    pink: Tensor = torch.fft.ifft2(torch.fft.fft2(white) * falling).real
    return (pink / pink.std() * 50 + 118).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class _Place:
    """Where the cells of a feature map look: pixels between two, pixel of the first."""

    stride: float
    first: float

    def through(self, kernel: int, stride: int, before: float, dilation: int = 1) -> "_Place":
        """The cells of a window of `kernel` taps that moves by `stride` over a map with `before` cells of padding."""
        return _Place(self.stride * stride, self.first + self.stride * ((kernel - 1) * dilation / 2 - before))


class _Follow(TorchDispatchMode):
    """Notes for each tensor where its cells look; holds all tensors, so that no identity is used twice."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.places: dict[int, tuple[Tensor, _Place]] = {}

    def begin_with(self, picture: Tensor) -> Tensor:
        self.places[id(picture)] = (picture, _Place(1, 0))
        return picture

    def place_of(self, tensor: Any) -> _Place | None:
        return self.places[id(tensor)][1] if id(tensor) in self.places else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        sources = [place for tensor in pytree.tree_leaves(args) if (place := self.place_of(tensor)) is not None]
        if sources:
            place = max(sources, key=lambda source: source.stride)
            step = _STEPS.get(str(func.overloadpacket))
            moved = place if step is None else step(place, *args)
            for tensor in pytree.tree_leaves(results):
                if isinstance(tensor, Tensor):
                    self.places[id(tensor)] = (tensor, moved)
        return results


def _convolution(place: _Place, x: Tensor, weight: Tensor, bias: Any, *geometry: Any) -> _Place:
    stride, padding, dilation, transposed = geometry[:4]
    assert not transposed, "a backbone does not enlarge its maps"
    return place.through(weight.shape[-1], stride[-1], padding[-1], dilation[-1]) if weight.ndim == 4 else place


def _pooling(place: _Place, x: Tensor, kernel: Sequence[int], *geometry: Any) -> _Place:
    stride, padding = ([*geometry, [], [0]] if not geometry else [*geometry, [0]])[:2]
    return place.through(kernel[-1], (stride or kernel)[-1], padding[-1])


def _padding(place: _Place, x: Tensor, pad: Sequence[int], *value: Any) -> _Place:
    return place.through(1, 1, pad[0]) if x.ndim == 4 else place


_STEPS: dict[str, Callable[..., _Place]] = {
    "aten.convolution": _convolution,
    "aten.max_pool2d_with_indices": _pooling,
    "aten.max_pool2d": _pooling,
    "aten.avg_pool2d": _pooling,
    "aten.constant_pad_nd": _padding,
    "aten.pad": _padding,
}
"""The operations that move the centre."""
