"""Random numbers by identity: each is a function of its caption's key, its word, what it is for, and its element.

So they do not depend on the number of ranks, on how a batch is cut, or on what was drawn before. The key says the rest:
training seed, epoch, image and caption (`sat.data.captions`). Surprising: there is no generator and no state; a key and
a number give 64 random bits by an integer mix, alike on every device, and the kernels go on from such bits to an
element of a row (`sat.model.kernels.torch_kernels.random_integers`).
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sat.model.kernels.interface import Kernels
from sat.model.packing import Packing, side_by_side

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""The 64-bit numbers are int64 here, whose products wrap."""


class Site(IntEnum):
    """What a number is for; numbers of one site say nothing about those of another."""

    INITIAL_H = 1
    """Dropout before h0."""
    INITIAL_C = 2
    OUTPUT = 3
    """Dropout before the vocabulary."""
    OWN_WORD = 4
    """Whether scheduled sampling feeds the model's own word."""
    EXACT = 5
    """Whether a caption sees alpha itself in hard attention."""
    LOCATION = 6
    """Where hard attention looks."""
    SAMPLE = 7
    """The samples of an image, by their numbers."""
    SAMPLED_WORD = 8
    """Which word a sample goes on with."""


@dataclass(frozen=True)
class Draws:
    """The keys of a micro-batch, from which each site's own follow."""

    packing: Packing
    images: Tensor
    """int64 [B'], in the order of `packing.images`: that of the image's first caption."""
    captions: Tensor
    """int64 [N]"""

    @classmethod
    def of(cls, keys: Tensor | None, packing: Packing) -> "Draws":
        """From int64 `keys` [B, K] of the captions that were packed; None: fresh ones by torch's default generator."""
        if keys is None:
            keys = torch.randint(-(1 << 63), (1 << 63) - 1, packing.extent)
        image = packing.images
        on_gpu = image.device.type != "cpu"
        if on_gpu and keys.device.type == "cpu":  # from locked memory nobody waits for the copy
            keys = side_by_side([keys.flatten()], image.device).view_as(keys)
        keys = keys.to(image.device, non_blocking=on_gpu)  # the host reads at once what it gets
        return cls(packing, keys[image, 0], keys[image[packing.row_image], packing.row_caption])

    def of_images(self, site: Site) -> Tensor:
        """int64 [B']"""
        return _derived(self.images, self._part(site, 1)[0])

    def of_captions(self, site: Site) -> Tensor:
        """int64 [N]"""
        return _derived(self.captions, self._part(site, 1)[0])

    def of_words(self, site: Site) -> Tensor:
        """int64 [M], packed."""
        steps = self._part(site, len(self.packing.rows))
        return _derived(self.captions[self.packing.word_row], steps[self.packing.word_step])

    def _part(self, site: Site, steps: int) -> Tensor:
        """int64 [steps]: a number for this site and each step."""
        return _parts(site, 1 << max(6, (steps - 1).bit_length()), self.captions.device)[:steps]


@cache
def _parts(site: Site, steps: int, device: torch.device) -> Tensor:
    """Always the same, so each device keeps them: recorded work goes on reading there (`sat.model.recording`)."""
    return mix(torch.arange(steps) + (int(site) << 32)).to(device, non_blocking=True)


def at_step(keys: Tensor, site: Site, step: int) -> Tensor:
    """Keys of a site at one step, as `Draws` has them, of int64 `keys` [...] of captions (or images, at step 0)."""
    return derive(keys, torch.full((), step + (int(site) << 32), device=keys.device))


def derive(keys: Tensor, part: Tensor) -> Tensor:
    """Keys that depend on int64 `keys` and on `part`, which fits them; the same as `sat.data.order.derive_keys`."""
    return _derived(keys, mix(part))


def _derived(keys: Tensor, mixed: Tensor) -> Tensor:
    return mix(keys + GOLDEN ^ mixed)


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al., 2014), a bijection of 64-bit integers, of each element of int64 x."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros following."""
    return (x >> bits) & ((1 << 64 - bits) - 1)


def uniform(keys: Tensor) -> Tensor:
    """One float64 in [0, 1) for each of int64 `keys`, a multiple of 2^-53."""
    return _shifted(keys, 11).double() * 2.0**-53


def dropout(x: Tensor, keys: Tensor, rate: float, kernels: Kernels) -> Tensor:
    """`x` [..., W] with a share `rate` of its elements zero and the others scaled; int64 `keys` [...], one per row."""
    dropped = _Dropout.apply(x, keys, rate, kernels)
    assert isinstance(dropped, Tensor)
    return dropped


class _Dropout(torch.autograd.Function):
    """Linear in x, so the backward pass does the same to the gradient; no mask is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, rate: float, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.how = rate, kernels
        return kernels.dropout(x, keys, rate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keys,), (rate, kernels) = ctx.saved_tensors, ctx.how
        return kernels.dropout(grads[0], keys, rate), None, None, None
