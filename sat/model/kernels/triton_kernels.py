"""The fast step's kernels on GPUs: Triton's programs, a launch or two for each kernel.

A word costs four launches forward beside its two matrix products, and five backward: nothing of size [rows, L, A] is
ever written. What each kernel does: `sat.model.kernels.interface`. The programs (`triton_programs`, `triton_attention`)
are compiled when they are first met, for each kind of numbers and sizes; `usable` says whether they can be.
"""

import functools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sat.model.kernels import torch_kernels
from sat.model.kernels.interface import Gate, Seen
from sat.model.kernels.torch_kernels import dropout_threshold
from sat.model.packing import Packing

TYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)
"""The oldest GPUs served: those that compute in bfloat16."""
TILE = 1024
"""Elements of a projection that a program holds: with more, too few of a GPU's programs wait for memory at once."""
ROWS = 16
"""Rows of an image that meet its grid in one product of `backward_alpha`: the fewest that tensor cores take."""
HELD = 256
"""Most locations that a program holds at once."""
WARP = 8192
"""Bytes of a tile that a warp holds in registers."""
MOST_WORDS = 1 << 15
"""Of a vocabulary whose logits a program holds."""
PROGRAMS = 1024
"""Enough for all processors of a large GPU to have several."""


@functools.cache
def usable(device: int) -> str:
    """Why the kernels cannot serve on a GPU, by a small trial; empty where they can."""
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than they need"
    try:
        x, keys = torch.ones(2, 40, device=f"cuda:{device}"), torch.arange(2, device=f"cuda:{device}")
        right = torch.equal(dropout(x, keys, 0.5), torch_kernels.dropout(x, keys, 0.5))
    except Exception as error:  # no Triton, no compiler, no driver that fits: it says so in many ways
        return f"Triton fails: {' '.join(str(error).split())[:300] or type(error).__name__}"
    return "" if right else "Triton's programs compute something else here"


@functools.cache
def _programs() -> ModuleType:
    from sat.model.kernels import triton_programs

    return triton_programs


@functools.cache
def _attention() -> ModuleType:
    from sat.model.kernels import triton_attention

    return triton_attention


@functools.cache
def _emulated() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def prepare(projection: Tensor, tanh: bool) -> Tensor:
    """`projection` [B, L, A] as the kernels want it."""
    return projection.contiguous()


class _Sight(NamedTuple):
    """What rows look at, as the programs take it."""

    grid: Tensor
    projection: Tensor
    score: Tensor
    tanh: bool
    regions: Tensor | None
    ends: Tensor
    rows: Tensor
    images: int
    """How many have rows that run."""

    @classmethod
    def of(cls, seen: Seen, t: int) -> "_Sight":
        packing = seen.packing
        rest = (packing.row_ends, packing.image_rows, packing.images_running[t])
        return cls(seen.grid, seen.projection, seen.score, seen.tanh, seen.regions, *rest)


def attend(seen: Seen, t: int, query: Tensor, alpha: Tensor, context: Tensor) -> None:
    """Fill `alpha` [n, L] and `context` [n, D] for the `query` [n, A] of the rows running at step t."""
    _look(_Sight.of(seen, t), query, None, alpha, context, context)


def look(seen: Seen, t: int, query: Tensor, gate: Gate, alpha: Tensor, context: Tensor, gated: Tensor) -> None:
    """`attend`, and fill `gated` [n, D] with the context behind its gate."""
    _look(_Sight.of(seen, t), query, gate, alpha, context, gated)


def attend_beams(
    grid: Tensor, prepared: Tensor, query: Tensor, score: Tensor, tanh: bool, regions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Context [B, k, D] and alpha [B, k, L] of `query` [B, k, A], k beams per image of `grid` [B, L, D]."""
    (B, L, D), k = grid.shape, query.shape[1]
    alpha, context = query.new_empty(B, k, L, dtype=torch.float32), query.new_empty(B, k, D)
    rows = torch.arange(B * k, device=grid.device)
    ends = torch.arange(0, B * k + 1, k, device=grid.device)
    sight = _Sight(grid.contiguous(), prepared.contiguous(), score.contiguous(), tanh, regions, ends, rows, B)
    flat = context.view(B * k, D)
    _look(sight, query.contiguous().view(B * k, -1), None, alpha.view(B * k, L), flat, flat)
    return context, alpha


def _look(sight: _Sight, query: Tensor, gate: Gate | None, alpha: Tensor, context: Tensor, gated: Tensor) -> None:
    (_, L, D), (n, A) = sight.grid.shape, query.shape
    scores, wide = torch.empty_like(alpha), _power(A)
    block = min(max(1, TILE // wide), _power(L))
    _attention().score[sight.images, _blocks(L, block)](
        sight.projection,
        query,
        query.stride(0),
        sight.score,
        sight.ends,
        sight.rows,
        sight.regions,
        n,
        scores,
        L,
        A,
        TANH=sight.tanh,
        QUICK=_quick(query),
        REGIONS=sight.regions is not None,
        BL=block,
        BA=wide,
        num_warps=1,
    )
    width = 0 if gate is None else gate.values.shape[1]
    values, stride, bias = (None, 0, None) if gate is None else (gate.values, gate.values.stride(0), gate.bias)
    block, part = _held_grid(sight, L, D)
    _attention().look[sight.images, _blocks(D, part)](
        scores,
        sight.grid,
        sight.ends,
        sight.rows,
        n,
        alpha,
        context,
        values,
        stride,
        bias,
        gated,
        L,
        D,
        GATE=_kind(width, D),
        WHOLE=block >= L,
        BL=block,
        BD=part,
        num_stages=1,
        num_warps=1,
    )


def _held_grid(sight: _Sight, L: int, D: int) -> tuple[int, int]:
    """Locations and features that a program of `look` holds, which is one warp: what was fastest on an H200."""
    block = max(16, _power(L)) if L <= HELD else 64
    if sight.grid.dtype == torch.float32:
        part = max(16, 2048 // block)
    else:
        part = 128 if block <= 64 and sight.images >= 128 else 4096 // block
    return block, min(part, max(16, _power(D)))


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
    sight, (_, L, D), (n, A) = _Sight.of(seen, t), seen.grid.shape, query.shape
    asked, how = grad_context.contiguous(), _parts_of_alpha(sight, L, D)
    parts = _blocks(D, how["SPAN"])
    totals = alpha.new_empty(parts, n, L)
    _attention().backward_alpha[sight.images, _blocks(L, how["BL"]), parts](
        asked,
        sight.grid,
        sight.ends,
        sight.rows,
        n,
        grad_alpha.contiguous(),
        totals,
        L,
        D,
        EMULATED=_emulated(),
        **how,
    )
    block = _power(L) if L <= HELD else 32
    part = 16 if block > 128 and seen.grid.itemsize == 2 else 32
    _attention().backward_query[sight.images, _blocks(A, part)](
        *(sight.projection, query, query.stride(0), sight.score, sight.ends, sight.rows, n, alpha, totals),
        *(grad_scores, grad_query, grad_query.stride(0), L, A),
        TANH=seen.tanh,
        QUICK=_quick(query),
        PARTS=parts,
        WHOLE=block >= L,
        BL=block,
        BA=part,
        num_stages=1,
        num_warps=max(1, block * part * seen.grid.itemsize // WARP),
    )


def _parts_of_alpha(sight: _Sight, L: int, D: int) -> dict[str, int]:
    """How `backward_alpha` divides its work: by parts of D too, where images and locations are too few programs."""
    if sight.grid.dtype == torch.float32:
        width = min(_power(D), 256)
        return {"SPAN": width, "STAGES": 1, "BK": 1, "BL": 4, "BD": width, "num_warps": 1}
    wanted = min(_blocks(PROGRAMS, sight.images * _blocks(L, 32)), _blocks(D, 256))
    span = _blocks(D, 64 * _power(wanted)) * 64
    return {"SPAN": span, "STAGES": 3, "BK": ROWS, "BL": 32, "BD": 64}


def attend_backward_shared(seen: Seen, query: Tensor, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of projection [B, L, A] and score vector [A] from all words' `query` [M, A], `grad_scores` [M, L]."""
    B, L, A = seen.projection.shape
    grad_projection = torch.empty_like(seen.projection)
    grad_score = grad_scores.new_empty(B, _blocks(L, 32), A)
    _attention().backward_shared[B, _blocks(L, 32), _blocks(A, 64)](
        seen.projection,
        query,
        query.stride(0),
        seen.score,
        *seen.packing.words_by_image,
        grad_scores,
        grad_projection,
        grad_score,
        L,
        A,
        TANH=seen.tanh,
        QUICK=_quick(query),
        BL=32,
        BA=64,
    )
    return grad_projection, grad_score.sum((0, 1))


def gate_backward(
    gate: Gate, grad: Tensor, asked: Tensor | None, context: Tensor, grad_gate: Tensor, out: Tensor
) -> None:
    """Fill `out` [n, D], the gradient of the `context`, and `grad_gate` [n, G], from that of the gated context."""
    n, D = grad.shape
    values, bias, of_gate = (gate.values, gate.bias, grad_gate) if gate.values.shape[1] else (grad, grad, grad)
    _programs().gate_backward[n,](
        grad,
        asked,
        context,
        values,
        values.stride(0),
        bias,
        of_gate,
        of_gate.stride(0),
        out,
        D,
        ASKED=asked is not None,
        GATE=_kind(gate.values.shape[1], D),
        BLOCK=min(_power(D), 1024),
    )


def alpha_sums(packing: Packing, alphas: Tensor) -> Tensor:
    """`alphas` [M, L] summed over the words of each row, [N, L]."""
    N, L = packing.rows[0], alphas.shape[1]
    sums, block = alphas.new_empty(N, L), min(_power(L), 256)
    _programs().alpha_sums[N, _blocks(L, block)](alphas, packing.step_begins, packing.row_lengths, sums, L, BL=block)
    return sums


def cell(state: Tensor, word: Tensor, context: Tensor, c_before: Tensor, c: Tensor, h: Tensor) -> None:
    """LSTM cell from three shares [n, 4H] of its gates: fill `c` and `h` [n, H], leave the activations in `state`."""
    n, H = c.shape
    block = min(_power(H), 512)
    _programs().cell[n, _blocks(H, block)](state, state.stride(0), word, context, c_before, c, h, H, BLOCK=block)


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
    block = min(_power(H), 512)
    _programs().cell_backward[n, _blocks(H, block)](
        activations,
        activations.stride(0),
        c_before,
        c,
        grad_h,
        asked,
        grad_c,
        grad_gates,
        grad_gates.stride(0),
        H,
        ASKED=asked is not None,
        BLOCK=block,
    )


def cross_entropy(logits: Tensor, bias: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """NLL [n], summed log-probabilities [n] and hits (bool [n]) of `logits` [n, V] + `bias` [V], `targets` int64 [n].

    `logits` become the gradient of the loss smoothed by `smoothing`, what follows each row up to a block's end zeros.
    """
    (n, V), stride = logits.shape, logits.stride(0)
    assert logits.stride(1) == 1
    nll, sum_log_p = bias.new_empty(n), bias.new_empty(n)
    correct = torch.empty(n, dtype=torch.bool, device=bias.device)
    outputs, block, warps = (nll, sum_log_p, correct), min(_power(V), 1024), 2 * logits.element_size()
    far = pad(bias, (0, stride - V)) if stride > V else bias  # as far as the next row
    given = (logits, stride, far, targets)
    _programs().cross_entropy[n,](*given, *outputs, float(smoothing), V, BLOCK=block, num_warps=warps)
    return nll, sum_log_p, correct


def best_words(logits: Tensor, blocked: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """As the native kernels', of `logits` [..., V] of any type, V up to MOST_WORDS, without at most three `blocked`."""
    *leading, V = logits.shape
    rows = logits.flatten(0, -2)
    assert rows.stride(1) == 1
    values = logits.new_empty(*leading, count, dtype=torch.float32)
    ids = torch.empty_like(values, dtype=torch.int64)
    unwanted = (*blocked, *[-1] * (3 - len(blocked)))
    block = _power(V)
    how = {"COUNT": count, "BC": _power(count), "BLOCK": block, "num_warps": min(16, max(1, block // 512))}
    _programs().best_words[len(rows),](rows, rows.stride(0), *unwanted, values, ids, V, **how)
    return values, ids


def dropout(x: Tensor, keys: Tensor, rate: float) -> Tensor:
    """`x` [..., W] with a share `rate` of its elements zero and the others scaled; int64 `keys` [...], one per row."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    W, block = x.shape[-1], min(_power(x.shape[-1]), 1024)
    threshold, scale = dropout_threshold(rate)
    _programs().dropout[keys.numel(), _blocks(W, block)](x, keys.contiguous(), out, threshold, scale, W, BLOCK=block)
    return out


def _quick(like: Tensor) -> bool:
    """Whether the hardware's tanh is exact enough."""
    return like.dtype != torch.float32 and not _emulated()


def _kind(width: int, features: int) -> int:
    """Of gate: none, scalar or vector."""
    return 0 if width == 0 else 1 if width == 1 < features else 2


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _power(size: int) -> int:
    """The power of two from `size` on."""
    return 1 << max(0, size - 1).bit_length()
