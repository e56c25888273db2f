"""Products of ever new numbers of rows: with one matrix, as the time loop and decoding have them, and the others.

PyTorch's own product lays the matrix out anew every time. On a CPU oneDNN multiplies by one that was laid out
("packed") once, which is quicker where rows are few. Which of the two serves is measured:
`sat.model.kernels.measured`. But oneDNN prepares for every number of rows that it has not met, packed or not, which
takes milliseconds, and every batch has other ones; so rows are made up to one of few numbers, by zeros.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

FEW = 5
"""Rows for which the native kernels, which leave the matrix as it lies, take half of oneDNN's time or less."""
OCTAVE = 16
"""Numbers of rows between one power of two and the next: at most a sixteenth of the rows is made up."""
ALIGNED = 16
"""A GPU's products of other than multiples of so many columns took up to seven times as long on an H200."""


class Factor(Protocol):
    """A matrix [K, N] that rows are multiplied by. No gradients."""

    def times(self, rows: Tensor) -> Tensor:
        """[n, N] of `rows` [n, K]."""

    def into(self, rows: Tensor, out: Tensor) -> None:
        """The product, written to `out` [n, N]."""


Prepare = Callable[[Tensor], Factor]
"""From a matrix [K, N] to the factor that it is."""


class Plain(NamedTuple):
    """PyTorch's own product, anywhere."""

    matrix: Tensor

    def times(self, rows: Tensor) -> Tensor:
        """See `Factor`."""
        return rows @ self.matrix

    def into(self, rows: Tensor, out: Tensor) -> None:
        """See `Factor`."""
        torch.mm(rows, self.matrix, out=out)


class Bounded(NamedTuple):
    """The same over few numbers of rows."""

    matrix: Tensor
    few: Callable[[Tensor, Tensor], Tensor] | None = None
    """What multiplies at most FEW rows."""

    def times(self, rows: Tensor) -> Tensor:
        """See `Factor`."""
        if self.few and len(rows) <= FEW:
            return self.few(rows, self.matrix)
        return (padded(rows, enough_rows(len(rows))) @ self.matrix)[: len(rows)]

    def into(self, rows: Tensor, out: Tensor) -> None:
        """See `Factor`."""
        out.copy_(self.times(rows))


class Packed(NamedTuple):
    """oneDNN's, on a CPU."""

    matrix: Tensor
    """As oneDNN has laid it out."""

    @classmethod
    def of(cls, matrix: Tensor) -> "Packed":
        """`matrix` [K, N] in float32 or bfloat16.

        Raises AttributeError where this PyTorch has no oneDNN, RuntimeError where this CPU cannot.
        """
        return cls(torch.ops.mkldnn._reorder_linear_weight(matrix.t().contiguous()))

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Factor`; `bias` [N] is added."""
        enough = padded(rows, enough_rows(len(rows)))
        result: Tensor = torch.ops.mkldnn._linear_pointwise(enough, self.matrix, bias, "none", [], None)
        return result[: len(rows)]

    def into(self, rows: Tensor, out: Tensor) -> None:
        """See `Factor`."""
        out.copy_(self.times(rows))


class Rounded(NamedTuple):
    """PyTorch's own, on a GPU, by a matrix in the rows' type with as many columns as products are quick with."""

    columns: Tensor
    """[N', K]"""
    width: int
    """N"""

    @classmethod
    def of(cls, matrix: Tensor) -> "Rounded":
        """`matrix` [K, N]"""
        return cls(padded(matrix.t(), enough_columns(matrix.shape[1], matrix)), matrix.shape[1])

    def times(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Factor`; `bias` [N] is added."""
        more = len(self.columns) - self.width
        bias = pad(bias, (0, more)) if more and bias is not None else bias
        return linear(rows, self.columns, bias)[:, : self.width]


def enough_rows(n: int) -> int:
    """The least number of at least `n` rows that products are prepared for."""
    step = max(1, (1 << max(0, (n - 1).bit_length() - 1)) // OCTAVE)
    return -(-n // step) * step


def prepares_for_sizes(like: Tensor) -> bool:
    """Whether products of tensors such as `like` are oneDNN's, unlike those of a GPU, of float64, of MKL in float32."""
    if like.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if like.dtype == torch.float32:
        backend: Any = torch.backends.mkldnn  # its types do not know `matmul`
        return bool(backend.matmul.fp32_precision == "bf16")
    if like.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return like.dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def enough_for(n: int, like: Tensor) -> int:
    """How many rows products of `n` rows such as `like` should have: `n` itself where nothing is prepared for it."""
    return enough_rows(n) if prepares_for_sizes(like) else n


def padded(rows: Tensor, n: int) -> Tensor:
    """`rows` [m, W] followed by zeros, [n, W]; themselves where they are as many. Differentiable."""
    return pad(rows, (0, 0, 0, n - len(rows))) if n > len(rows) else rows


def room_for(n: int, width: int, like: Tensor) -> Tensor:
    """Memory of `n` rows such as `like`, [n, width], followed by zeros up to as many rows as products should have."""
    rows = like.new_empty(enough_for(n, like), width)
    if len(rows) > n:
        rows[n:].zero_()
    return rows


def enough_columns(width: int, like: Tensor) -> int:
    """To how many columns, or terms of its sums, a product of tensors such as `like` should be made up by zeros."""
    return width if like.device.type == "cpu" else -(-width // ALIGNED) * ALIGNED
