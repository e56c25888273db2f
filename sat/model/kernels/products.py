"""Products of ever new rows with one matrix, as the time loop and decoding have them.

PyTorch's own product lays the matrix out anew every time. On a CPU oneDNN multiplies by one that was laid out
("packed") once, which is quicker where rows are few; but it prepares for every number of rows that it has not met, so
rows are made up to one of few numbers. Which of the two serves is measured: `sat.model.kernels.measured`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

OCTAVE = 16
"""Numbers of rows between one power of two and the next: at most a sixteenth of the rows is made up."""


class Factor(Protocol):
    """A matrix [K, N] that rows are multiplied by. No gradients."""

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """[n, N] of `rows` [n, K], and `bias` [N] added."""

    def into(self, rows: Tensor, out: Tensor) -> None:
        """The product, written to `out` [n, N]."""


Prepare = Callable[[Tensor], Factor]
"""From a matrix [K, N] to the factor that it is."""


class Plain(NamedTuple):
    """PyTorch's own product, anywhere."""

    matrix: Tensor

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Factor`."""
        return rows @ self.matrix if bias is None else torch.addmm(bias, rows, self.matrix)

    def into(self, rows: Tensor, out: Tensor) -> None:
        """See `Factor`."""
        torch.mm(rows, self.matrix, out=out)


class Packed(NamedTuple):
    """oneDNN's, on a CPU."""

    matrix: Tensor
    """As oneDNN has laid it out."""

    @classmethod
    def of(cls, matrix: Tensor) -> "Packed":
        """`matrix` [K, N] in float32 or bfloat16. RuntimeError where this PyTorch or this CPU cannot."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(matrix.t().contiguous()))

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Factor`."""
        n = len(rows)
        if made_up := enough_rows(n) - n:
            rows = pad(rows, (0, 0, 0, made_up))
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.matrix, bias, "none", [], None)
        return result[:n]

    def into(self, rows: Tensor, out: Tensor) -> None:
        """See `Factor`."""
        out.copy_(self.times(rows))


def enough_rows(n: int) -> int:
    """The least number of at least `n` rows that products are prepared for."""
    step = max(1, (1 << max(0, (n - 1).bit_length() - 1)) // OCTAVE)
    return -(-n // step) * step
