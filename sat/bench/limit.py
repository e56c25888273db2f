"""What a training step costs at least: the operations and the bytes of its phases against what the machine can do.

A phase takes no less than its operations at the rate of matrix products, nor less than its bytes at that of memory.
Counted is a step that does nothing twice, of the preset `tutorial` with all widths alike: 2 operations per
multiply-add, forward once, backward twice, but for the grid, to which no gradient flows; equal words meet the gates
once. A tensor is read, or written, once by every pass over it that there has to be; attention passes over the grids of
the images that still run at every word. What stays in a cache costs less than its bytes say.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Of the measured model."""

    locations: int
    features: int
    width: int
    vocabulary: int


@dataclass(frozen=True)
class Phase:
    """A part of a step."""

    name: str
    gflop: float
    gigabytes: float

    def seconds(self, gflop_per_s: float, gigabytes_per_s: float) -> float:
        """The least it takes."""
        return max(self.gflop / gflop_per_s, self.gigabytes / gigabytes_per_s)


def phases(sizes: Sizes, captions: Tensor, lengths: Tensor, dtype: torch.dtype) -> list[Phase]:
    """Of one step over `captions` int64 [B, K, T + 1] of `lengths` int64 [B, K], with products in `dtype`."""
    L, D, W, V = sizes.locations, sizes.features, sizes.width, sizes.vocabulary
    B, M, U, size = len(lengths), int(lengths.sum()), len(captions.unique()), dtype.itemsize
    seen = int(lengths.amax(1).sum())  # grids looked at, over all words
    state, context = W * (5 * W + D), 4 * W * D  # weights: gates, query and gate from h; gates from the context
    outside = W * (2 * V + 4 * W) + 3 * D * W  # of the other weights
    counted = {
        "grid": (4 * B * (L * D * W + 2 * D * W), B * L * (D * (2 + 3 * size) + 2 * W * size)),
        "words": (6 * U * 4 * W * W, size * (3 * 4 * W * W + 2 * M * 4 * W)),
        "recurrence": (6 * M * (state + context), size * (3 * (state + context) + M * (5 * (5 * W + D) + 6 * D))),
        "attention": (6 * M * L * (D + W), size * 2 * seen * L * (D + W)),
        "vocabulary": (6 * M * W * V, size * (3 * W * V + 4 * M * V + 4 * M * W)),
        "optimizer": (0, 4 * 8 * (state + context + outside)),
    }
    return [Phase(name, flop / 1e9, moved / 1e9) for name, (flop, moved) in counted.items()]
