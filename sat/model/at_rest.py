"""Weights at rest: while a model only speaks, its matrices are laid out once for all the words of all its captions.

Few rows meet them at every word, one for each beam, which is what packed products are for
(`sat.model.kernels.products`); on a GPU they are brought into the rows' type once, not at every word. Nothing else
changes; a layer that is trained after all goes its usual way.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from sat.model.kernels.measured import packs
from sat.model.kernels.products import Packed, Rounded


class _Laid(NamedTuple):
    """A weight as it was laid out."""

    of: tuple[torch.dtype, int, int]
    """Type, and where the weight lay in which version: with another one it is laid out anew."""
    weight: Tensor
    """Held, so that no other one comes to lie there."""
    factor: Packed | Rounded


class PackableLinear(nn.Linear):
    """As PyTorch's, with the same weights under the same names; quicker at rest."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.kernels_at_rest: str | None = None
        """`train.kernels`, while it is at rest."""
        self._laid: _Laid | None = None

    def forward(self, rows: Tensor) -> Tensor:
        """[..., N] of `rows` [..., K]."""
        if self.kernels_at_rest is None or torch.is_grad_enabled():
            return super().forward(rows)
        rows = rows.to(_product_type(rows))
        if self.kernels_at_rest == "torch" or not (rows.is_cuda or packs(self.kernels_at_rest, rows)):
            return super().forward(rows)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        product = self._factor(rows).times(rows.reshape(-1, self.in_features), bias)
        return product.reshape(*rows.shape[:-1], self.out_features)

    def train(self, mode: bool = True) -> Self:
        """As usual; a weight that was trained is laid out anew, as fused optimizers leave its version as it is."""
        if mode:
            self._laid = None
        return super().train(mode)

    def rest(self, kernels: str | None) -> None:
        """Be at rest, or (None) no longer."""
        self.kernels_at_rest, self._laid = kernels, None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which is not at rest; what oneDNN has laid out cannot be copied."""
        return self.__dict__ | {"kernels_at_rest": None, "_laid": None}

    def _factor(self, rows: Tensor) -> Packed | Rounded:
        weight = self.weight
        of = (rows.dtype, weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        laid = self._laid
        if laid is None or laid.of != of:
            lay = Rounded.of if rows.is_cuda else Packed.of
            laid = self._laid = _Laid(of, weight.detach(), lay(weight.detach().to(rows.dtype).t()))
        return laid.factor


def _product_type(rows: Tensor) -> torch.dtype:
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype


def rest(captioner: Any) -> list[PackableLinear]:
    """Lay the weights of a `Captioner` to rest; returns the layers that were not at rest before."""
    awake = [each for each in captioner.modules() if isinstance(each, PackableLinear) and each.kernels_at_rest is None]
    for layer in awake:
        layer.rest(captioner.kernels)
    return awake


@contextmanager
def weights_at_rest(models: Iterable[Any]) -> Iterator[None]:
    """Inside, nobody changes the weights of `models`: captioners, encoder in front or not; others are let be.

    What was at rest before stays so afterwards.
    """
    layers = [layer for model in models if hasattr(model, "captioner") for layer in rest(model.captioner)]
    try:
        yield
    finally:
        for layer in layers:
            layer.rest(None)
