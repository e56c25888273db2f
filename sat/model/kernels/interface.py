"""What the fast step asks of the code that does its numeric work, and what that code is given to look at.

The kernels write into tensors they are given, so that each step's results land in its slice of the packed buffers.
Modules serve as implementations: `torch_kernels` anywhere, `native` on CPUs. B images, N rows, n of them running at
step t, M packed words, L locations, D features, A attention width, H LSTM width, V words. Sums (alpha, cells, scores,
NLL) are float32 or wider, everything else has the type of the matrix products.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from sat.model.packing import Packing


class Seen(NamedTuple):
    """What attention looks at, the same at every step."""

    packing: Packing
    grid: Tensor
    """[B, L, D]"""
    projection: Tensor
    """[B, L, A] as `prepare` left it."""
    score: Tensor
    """[A]"""
    tanh: bool
    """The score's non-linearity: tanh or ReLU."""
    regions: Tensor | None = None
    """int64 [B] locations that are real, the first ones of each image; None: all. The others get no attention."""


class Gate(NamedTuple):
    """The gate on the context, sigmoid(values + bias): G is 0 (none), 1 or D."""

    values: Tensor
    """[n, G], in which `look` may leave what `gate_backward` needs."""
    bias: Tensor
    """[G]"""


class Kernels(Protocol):
    """The parts of a training step that are no matrix product."""

    def prepare(self, projection: Tensor, tanh: bool) -> Tensor:
        """`projection` [B, L, A] as these kernels want it."""

    def attend(self, seen: Seen, t: int, query: Tensor, alpha: Tensor, context: Tensor) -> None:
        """Fill `alpha` [n, L] and `context` [n, D] for the `query` [n, A] of the rows running at step t."""

    def look(
        self, seen: Seen, t: int, query: Tensor, gate: Gate, alpha: Tensor, context: Tensor, gated: Tensor
    ) -> None:
        """`attend`, and fill `gated` [n, D] with the context behind its gate; without one it is the context itself."""

    def gate_backward(
        self, gate: Gate, grad: Tensor, asked: Tensor | None, context: Tensor, grad_gate: Tensor, out: Tensor
    ) -> None:
        """Fill `out` [n, D], the gradient of the `context`, and `grad_gate` [n, G], that of the gate's argument.

        From the gradient of the gated context, which is `grad` [n, D] and what the output layer `asked` [n, D] of it;
        `grad` may be written to. `gate` is as `look` left it.
        """

    def alpha_sums(self, packing: Packing, alphas: Tensor) -> Tensor:
        """`alphas` [M, L] summed over the words of each row, [N, L]."""

    def attend_backward(
        self,
        seen: Seen,
        t: int,
        query: Tensor,
        alpha: Tensor,
        grad_context: Tensor,
        grad_alpha: Tensor,
        grad_scores: Tensor,
        grad_query: Tensor,
    ) -> None:
        """Fill `grad_scores` [n, L] and `grad_query` [n, A].

        From `grad_context` [n, D] and the regulariser's `grad_alpha` [n, L]; `alpha` [n, L] is that of `attend`.
        """

    def attend_backward_shared(self, seen: Seen, query: Tensor, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of projection [B, L, A] and score vector [A].

        From all words' `query` [M, A] and `grad_scores` [M, L].
        """

    def cell(self, state: Tensor, word: Tensor, context: Tensor, c_before: Tensor, c: Tensor, h: Tensor) -> None:
        """LSTM cell from three shares [n, 4H] of its gates: fill `c` and `h` [n, H].

        The gates' activations are left in `state`.
        """

    def cell_backward(
        self,
        activations: Tensor,
        c_before: Tensor,
        c: Tensor,
        grad_h: Tensor,
        asked: Tensor | None,
        grad_c: Tensor,
        grad_gates: Tensor,
    ) -> None:
        """Fill `grad_gates` [n, 4H] and turn `grad_c` [n, H] into that of the step before.

        From the gradient of h, which is `grad_h` [n, H], the next step's, and what the output layer `asked` [n, H].
        """

    def cross_entropy(
        self, logits: Tensor, bias: Tensor, targets: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """NLL [n], summed log-probabilities [n] and hits (bool [n]) of `logits` [n, V] + `bias` [V].

        `targets` int64 [n]. `logits` become the gradient of the loss smoothed by `smoothing`; what lies between their
        rows may be written to.
        """

    def dropout(self, x: Tensor, keys: Tensor, rate: float) -> Tensor:
        """`x` [..., W] with a share `rate` of its elements zero and the others divided by what is left.

        Which ones, int64 `keys` [...] say, one per row: the same in all implementations, on all devices.
        """


class BeamKernels(Kernels, Protocol):
    """Kernels that attend in decoding too."""

    def attend_beams(
        self, grid: Tensor, prepared: Tensor, query: Tensor, score: Tensor, tanh: bool, regions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Context [B, k, D] and alpha [B, k, L] of `query` [B, k, A], k beams per image of `grid` [B, L, D].

        `prepared` [B, L, A] is the projection as `prepare` left it, `score` [A] the score vector, `tanh` its
        non-linearity, `regions` as in `Seen`. No gradients.
        """
