"""The fast step's own kernels on CPUs: `native.cpp`, compiled on first use and called through ctypes.

Surprising: not a PyTorch extension. Without PyTorch's headers the build takes seconds instead of most of a minute and
needs a C++ compiler only (see `sat.model.kernels.build`). Where there is none, `library` says why and
`sat.model.kernels.torch_kernels` does the same work. What each kernel does: `sat.model.kernels.interface`;
shapes as in `native.cpp`.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sat.model.kernels.build import build
from sat.model.kernels.interface import Gate, Seen
from sat.model.kernels.torch_kernels import alpha_sums as alpha_sums  # nothing is gained by kernels of its own
from sat.model.kernels.torch_kernels import both, dropout_threshold

FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
SOURCE, *HEADERS = (
    Path(__file__).with_name(name) for name in ("native.cpp", "attention.h", "few_rows.h", "tiles.h", "numbers.h")
)
NO_GATE = (0, 0, 0, 0, 0)
"""Its width, values, their stride, its bias and where the gated context goes."""


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library and where it is from, or None and why there is none."""
    return build("kernels", SOURCE, FLAGS, HEADERS)


def prepare(projection: Tensor, tanh: bool) -> Tensor:
    """`projection` [B, L, A] as the kernels want it: exp(2p) for the tanh score."""
    return projection.clamp(-40, 40).mul_(2).exp_() if tanh else projection.contiguous()


def attend(seen: Seen, t: int, query: Tensor, alpha: Tensor, context: Tensor) -> None:
    """Fill `alpha` [n, L] and `context` [n, D] for the `query` [n, A] of the rows running at step t."""
    _attend(seen, t, query, alpha, context, NO_GATE)


def look(seen: Seen, t: int, query: Tensor, gate: Gate, alpha: Tensor, context: Tensor, gated: Tensor) -> None:
    """`attend`, and fill `gated` [n, D] with the context behind its gate."""
    G = len(gate.bias)
    behind = (G, gate.values, gate.values.stride(0), gate.bias, gated) if G else NO_GATE
    _attend(seen, t, query, alpha, context, behind)


def _attend(
    seen: Seen, t: int, query: Tensor, alpha: Tensor, context: Tensor, behind: tuple[Tensor | int, ...]
) -> None:
    _, L, D = seen.grid.shape
    _call(
        f"attend_{_score(seen.tanh)}",
        seen.grid.dtype,
        len(query),
        seen.packing.images_running[t],
        L,
        query.shape[1],
        D,
        *seen.packing.rows_by_image,
        _regions(seen.regions),
        seen.grid,
        seen.projection,
        query,
        query.stride(0),
        seen.score,
        alpha,
        context,
        *behind,
    )


def attend_beams(
    grid: Tensor, prepared: Tensor, query: Tensor, score: Tensor, tanh: bool, regions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Context [B, k, D] and alpha [B, k, L] of `query` [B, k, A], k beams per image of `grid` [B, L, D].

    `prepared` [B, L, A] is the projection as `prepare` left it, `score` [A] the score vector, `tanh` its non-linearity,
    `regions` int64 [B] how many locations are real, None for all.
    """
    (B, L, D), (_, k, A) = grid.shape, query.shape
    alpha = query.new_empty(B, k, L, dtype=torch.promote_types(grid.dtype, torch.float32))
    context = query.new_empty(B, k, D)
    rows = torch.arange(B * k + 1)
    which = (rows[::k].contiguous(), rows, _regions(regions))
    tensors = (*which, grid.contiguous(), prepared.contiguous(), query.contiguous())
    _call(
        f"attend_{_score(tanh)}",
        grid.dtype,
        B * k,
        B,
        L,
        A,
        D,
        *tensors,
        A,
        score.contiguous(),
        alpha,
        context,
        *NO_GATE,
    )
    return context, alpha


def gate_backward(
    gate: Gate, grad: Tensor, asked: Tensor | None, context: Tensor, grad_gate: Tensor, out: Tensor
) -> None:
    """Fill `out` [n, D], the gradient of the `context`, and `grad_gate` [n, G], from that of the gated context."""
    (n, D), G = grad.shape, len(gate.bias)
    ends = (gate.values, gate.values.stride(0), grad_gate, grad_gate.stride(0)) if G else (0, 0, 0, 0)
    _call("gate_backward", grad.dtype, n, D, G, *ends, grad, 0 if asked is None else asked, context, out)


def attend_backward(
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
    _, L, D = seen.grid.shape
    _call(
        f"attend_backward_{_score(seen.tanh)}",
        seen.grid.dtype,
        len(query),
        seen.packing.images_running[t],
        L,
        query.shape[1],
        D,
        *seen.packing.rows_by_image,
        _regions(seen.regions),
        seen.grid,
        seen.projection,
        query,
        query.stride(0),
        seen.score,
        alpha,
        grad_context,
        grad_alpha,
        grad_scores,
        grad_query,
        grad_query.stride(0),
    )


def attend_backward_shared(seen: Seen, query: Tensor, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of projection [B, L, A] and score vector [A] from all words' `query` [M, A], `grad_scores` [M, L]."""
    B, L, A = seen.projection.shape
    grad_projection = torch.empty_like(seen.projection)
    grad_score = grad_scores.new_empty(B, A)
    _call(
        f"attend_backward_shared_{_score(seen.tanh)}",
        seen.grid.dtype,
        B,
        L,
        A,
        *seen.packing.words_by_image,
        _regions(seen.regions),
        seen.projection,
        query,
        query.stride(0),
        seen.score,
        grad_scores,
        grad_projection,
        grad_score,
    )
    return grad_projection, grad_score.sum(0)


def cell(state: Tensor, word: Tensor, context: Tensor, c_before: Tensor, c: Tensor, h: Tensor) -> None:
    """LSTM cell from three shares [n, 4H] of its gates: fill `c` and `h` [n, H], leave the activations in `state`."""
    n, H = c.shape
    _call("cell", h.dtype, n, H, state, state.stride(0), word, context, c_before, c, h)


def cell_backward(
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
    n, H = c.shape
    _call(
        "cell_backward",
        activations.dtype,
        n,
        H,
        activations,
        activations.stride(0),
        c_before,
        c,
        both(grad_h, asked, c),
        grad_c,
        grad_gates,
        grad_gates.stride(0),
    )


def cross_entropy(logits: Tensor, bias: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """NLL [n], summed log-probabilities [n] and hits (bool [n]) of `logits` [n, V] + `bias` [V], `targets` int64 [n].

    `logits` become the gradient of the loss smoothed by `smoothing`.
    """
    n, V = logits.shape
    nll, sum_log_p = bias.new_empty(n), bias.new_empty(n)
    correct = torch.empty(n, dtype=torch.bool)
    _call("cross_entropy", logits.dtype, n, V, logits, bias, targets, smoothing, nll, sum_log_p, correct)
    return nll, sum_log_p, correct


def best_words(logits: Tensor, blocked: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities float32 and ids int64 [..., count] of the best words by float32 `logits` [..., V].

    In order of their ids; of equal words the lower ids count. None is among the `blocked`, and where there are no more,
    -inf. NaN where a row's logits are not finite.
    """
    *leading, V = logits.shape
    values, ids = logits.new_empty(*leading, count), torch.empty(*leading, count, dtype=torch.int64)
    unwanted = torch.tensor(blocked, dtype=torch.int64)
    rows = logits.contiguous(), len(unwanted), unwanted
    _call("best_words", logits.dtype, logits.numel() // V, V, count, *rows, values, ids)
    return values, ids


def few_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """[n, N] of `rows` [n, K] and `matrix` [K, N], which or whose transpose is contiguous; quick where n is small."""
    out = rows.new_empty(len(rows), matrix.shape[1])
    name, stored = ("few_rows", matrix) if matrix.is_contiguous() else ("few_rows_transposed", matrix.t())
    assert stored.is_contiguous()
    _call(name, rows.dtype, len(rows), *matrix.shape, rows, rows.stride(0), stored, out)
    return out


def dropout(x: Tensor, keys: Tensor, rate: float) -> Tensor:
    """`x` [..., W] with a share `rate` of its elements zero and the others scaled; int64 `keys` [...], one per row."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _call("dropout", x.dtype, keys.numel(), x.shape[-1], keys.contiguous(), *dropout_threshold(rate), x, out)
    return out


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float) -> None:
    """Call a kernel: tensors as pointers (rows may be strided, columns are not), the number of threads last."""
    assert all(a.stride(-1) == 1 for a in arguments if isinstance(a, Tensor))
    values = (a.data_ptr() if isinstance(a, Tensor) else a for a in (*arguments, torch.get_num_threads()))
    _function(f"{name}_{str(dtype).removeprefix('torch.')}")(
        *(ctypes.c_double(v) if isinstance(v, float) else ctypes.c_int64(v) for v in values)
    )


def _regions(regions: Tensor | None) -> Tensor | int:
    """The numbers of regions as the kernels take them: a null pointer means that every location is real."""
    return 0 if regions is None else regions.contiguous()


def _score(tanh: bool) -> str:
    return "tanh" if tanh else "relu"


@functools.cache
def _function(symbol: str) -> Callable[..., None]:
    loaded, explanation = library()
    assert loaded is not None, explanation
    address = ctypes.c_void_p.in_dll(loaded, symbol).value
    assert address is not None, symbol
    return ctypes.CFUNCTYPE(None)(address)
