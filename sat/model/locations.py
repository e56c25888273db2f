"""Where hard attention looks in the fast time loop: at one location for each word, or as alpha says (paper, 4.1).

N rows, n of them running at step t, M packed words, L locations, D features, G width of the gate.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sat.model import attention
from sat.model.kernels.interface import Gate, Seen


class Locations(NamedTuple):
    """What decides it, and what became of it."""

    exact: Tensor
    """bool [N]: captions that see what alpha says."""
    uniform: Tensor | None
    """float64 [M]: of each word, which share of alpha its location falls to; None: it is where alpha is greatest."""
    chosen: Tensor
    """int64 [M], which the loop fills: the location that each word saw alone, -1 where it saw what alpha says."""

    def look(self, seen: Seen, t: int, opened: Tensor | None, sight: "Sight") -> None:
        """Choose for the rows running at step t, after `Kernels.look`, and let them see what they chose alone.

        `opened` is the activation [n, G] of their gate; None: there is none.
        """
        step, n = seen.packing.steps[t], len(sight.alpha)
        if self.uniform is None:
            chosen = sight.alpha.argmax(1)
        else:
            chosen = attention.drawn_location(sight.alpha, self.uniform[step])
        alone, exact = seen.grid[seen.packing.row_image[:n], chosen], self.exact[:n]
        self.chosen[step] = chosen.masked_fill(exact, -1)
        sight.context.copy_(torch.where(exact[:, None], sight.context, alone))
        if opened is not None:
            sight.gated.copy_(torch.where(exact[:, None], sight.gated, alone * opened))

    def through_alpha(self, grad_context: Tensor) -> Tensor:
        """The share of `grad_context` [n, D] that reaches alpha: a location that was chosen passes none on."""
        return grad_context * self.exact[: len(grad_context), None]

    def weights(self, alphas: Tensor) -> Tensor:
        """What the locations of each word weighed, [M, L]: as `alphas` [M, L] say, or one and zeros."""
        one = torch.zeros_like(alphas).scatter_(1, self.chosen.clamp_min(0)[:, None], 1)
        return torch.where((self.chosen < 0)[:, None], alphas, one)


class Sight(NamedTuple):
    """What `Kernels.look` fills for the rows of a step."""

    alpha: Tensor
    """[n, L]"""
    context: Tensor
    """[n, D]"""
    gated: Tensor
    """[n, D], the context itself where there is no gate."""


def open_gate(gate: Gate) -> Tensor | None:
    """The activation [n, G] of a gate as no kernel has met it yet; None where there is none."""
    return (gate.values + gate.bias).sigmoid() if len(gate.bias) else None
