"""The fast step's kernels in plain PyTorch: for GPUs, and for CPUs where `sat.model.kernels.native` cannot be built.

Surprising: they write into tensors they are given, so that each step's results land in its slice of the packed buffers.
B images, N rows, n of them running at step t, M packed words, L locations, D features, A attention width, H LSTM width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sat.model.attention import beyond
from sat.model.kernels.interface import Gate, Seen
from sat.model.packing import Packing

GOLDEN = 0x9E3779B9 - (1 << 32)
LANES = 16
CHUNK_BYTES = 4 << 20
"""Memory of one block of hidden units [images, slots, L, A] on a CPU: what stays in its cache."""


def prepare(projection: Tensor, tanh: bool) -> Tensor:
    """`projection` [B, L, A] as the kernels want it."""
    return projection


def attend(seen: Seen, t: int, query: Tensor, alpha: Tensor, context: Tensor) -> None:
    """Fill `alpha` [n, L] and `context` [n, D] for the `query` [n, A] of the rows running at step t."""
    slots, B = seen.packing.slots(t), seen.packing.images_running[t]
    queries = slots.spread(query)
    scores = torch.cat([hidden @ seen.score for _, hidden in _hidden(seen, queries)])
    if seen.regions is not None:
        scores.masked_fill_(beyond(seen.regions[:B], scores.shape[2])[:, None], -torch.inf)
    alphas = scores.to(alpha.dtype).softmax(-1)  # [B_t, K_t, L]
    alpha.copy_(slots.collect(alphas))
    context.copy_(slots.collect(alphas.to(seen.grid.dtype) @ seen.grid[:B]))


def look(seen: Seen, t: int, query: Tensor, gate: Gate, alpha: Tensor, context: Tensor, gated: Tensor) -> None:
    """`attend`, and fill `gated` [n, D] with the context behind its gate."""
    attend(seen, t, query, alpha, context)
    open_gate(gate, context, gated)


def open_gate(gate: Gate, context: Tensor, gated: Tensor) -> None:
    """Fill `gated` [n, D] with the `context` behind its gate, and leave the gate's activation in its values."""
    if len(gate.bias):
        torch.mul(context, gate.values.add_(gate.bias).sigmoid_(), out=gated)


def gate_backward(
    gate: Gate, grad: Tensor, asked: Tensor | None, context: Tensor, grad_gate: Tensor, out: Tensor
) -> None:
    """Fill `out` [n, D], the gradient of the `context`, and `grad_gate` [n, G], from that of the gated context."""
    if asked is not None:
        grad += asked
    if len(gate.bias):
        opened, of_gate = gate.values, grad * context
        of_gate = of_gate.sum(1, keepdim=True) if opened.shape[1] == 1 else of_gate
        grad_gate.copy_(of_gate * opened * (1 - opened))
        grad *= opened
    out.copy_(grad)


def alpha_sums(packing: Packing, alphas: Tensor) -> Tensor:
    """`alphas` [M, L] summed over the words of each row, [N, L]."""
    sums = alphas.new_zeros(packing.rows[0], alphas.shape[1])
    for n, step in zip(packing.rows, packing.steps, strict=True):
        sums[:n] += alphas[step]
    return sums


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
    slots, B = seen.packing.slots(t), seen.packing.images_running[t]
    total = slots.collect(slots.spread(grad_context) @ seen.grid[:B].mT).to(alpha.dtype) + grad_alpha
    torch.mul(alpha, total - (alpha * total).sum(1, keepdim=True), out=grad_scores)
    spread = slots.spread(grad_scores).to(query.dtype)
    queries = [
        (spread[part, :, None] @ _slope(seen, hidden)).squeeze(2) for part, hidden in _hidden(seen, slots.spread(query))
    ]
    grad_query.copy_(slots.collect(torch.cat(queries)) * seen.score)


def attend_backward_shared(seen: Seen, query: Tensor, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of projection [B, L, A] and score vector [A] from all words' `query` [M, A], `grad_scores` [M, L]."""
    grad_projection = torch.zeros_like(seen.projection, dtype=grad_scores.dtype)
    grad_score = grad_scores.new_zeros(len(seen.score))
    for t, step in enumerate(seen.packing.steps):
        slots = seen.packing.slots(t)
        spread = slots.spread(grad_scores[step])
        for part, hidden in _hidden(seen, slots.spread(query[step])):
            grad = spread[part, ..., None]
            grad_score += (grad * hidden).sum((0, 1, 2))
            grad_projection[part] += (grad * _slope(seen, hidden)).sum(1)
    return (grad_projection * seen.score).to(seen.projection.dtype), grad_score


def _hidden(seen: Seen, queries: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Hidden units [images, K_t, L, A] of the score for `queries` [B_t, K_t, A], in blocks of images."""
    B, K, A = queries.shape
    block = B
    if queries.device.type == "cpu":
        block = max(1, CHUNK_BYTES // (K * A * seen.projection.shape[1] * queries.element_size()))
    for begin in range(0, B, block):
        part = slice(begin, min(begin + block, B))
        hidden = seen.projection[part, None] + queries[part, :, None]
        yield part, hidden.tanh_() if seen.tanh else hidden.relu_()


def _slope(seen: Seen, hidden: Tensor) -> Tensor:
    """Derivative of the non-linearity, from its value."""
    return 1 - hidden.square() if seen.tanh else (hidden > 0).to(hidden.dtype)


def cell(state: Tensor, word: Tensor, context: Tensor, c_before: Tensor, c: Tensor, h: Tensor) -> None:
    """LSTM cell from three shares [n, 4H] of its gates: fill `c` and `h` [n, H], leave the activations in `state`."""
    gates = (state.to(c.dtype) + word + context).view(len(c), 4, -1)
    i, f, g, o = gates[:, 0].sigmoid(), gates[:, 1].sigmoid(), gates[:, 2].tanh(), gates[:, 3].sigmoid()
    torch.addcmul(i * g, f, c_before, out=c)
    h.copy_(o * c.tanh())
    state.copy_(torch.cat([i, f, g, o], 1))


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
    i, f, g, o = activations.to(c.dtype).chunk(4, 1)
    grad_h = both(grad_h, asked, c)
    y = c.tanh()
    grad_c += grad_h * o * (1 - y * y)
    grad_i, grad_f = i * (1 - i) * g * grad_c, f * (1 - f) * c_before * grad_c
    grad_g, grad_o = i * (1 - g * g) * grad_c, o * (1 - o) * y * grad_h
    grad_gates.copy_(torch.cat([grad_i, grad_f, grad_g, grad_o], 1))
    grad_c *= f


def both(grad_h: Tensor, asked: Tensor | None, like: Tensor) -> Tensor:
    """Their sum [n, H] in the type of `like`."""
    return grad_h.to(like.dtype) if asked is None else grad_h.to(like.dtype) + asked


def cross_entropy(logits: Tensor, bias: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """NLL [n], summed log-probabilities [n] and hits (bool [n]) of `logits` [n, V] + `bias` [V], `targets` int64 [n].

    `logits` become the gradient of the loss smoothed by `smoothing`.
    """
    target = targets[:, None]
    log_p = torch.log_softmax(logits + bias, 1)
    nll = -log_p.gather(1, target).squeeze(1)
    correct = -nll >= log_p.amax(1)
    sum_log_p = log_p.sum(1)
    delta = log_p.exp_().sub_(smoothing / logits.shape[1])
    logits.copy_(delta.scatter_add_(1, target, torch.full_like(delta[:, :1], smoothing - 1)))
    return nll, sum_log_p, correct


def dropout(x: Tensor, keys: Tensor, rate: float) -> Tensor:
    """`x` [..., W] with a share `rate` of its elements zero and the others scaled; int64 `keys` [...], one per row."""
    threshold, scale = dropout_threshold(rate)
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = (random_integers(keys.reshape(x.shape[:-1]), x.shape[-1]) >= threshold).to(wide).mul_(scale)
    return factor.mul_(x).to(x.dtype)


def dropout_threshold(rate: float) -> tuple[int, float]:
    """A random integer below the first drops its element; the others are multiplied by the second."""
    threshold = min(round(rate * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


def random_integers(keys: Tensor, width: int) -> Tensor:
    """int32 [..., width] in [0, 2^16) for int64 `keys` [...], whatever else is in the tensor and however wide it is.

    A counter-based generator: number c of a row is C. Wellons' 32-bit mix `lowbias32` of the key's low half plus c
    golden ratios, into which the high half enters midway, and gives two integers: elements 32 b + l and 32 b + 16 + l
    (l < 16) are the halves of number 16 b + l, as suits vectors. int32 products wrap on every device.
    """
    blocks = -(-width // (2 * LANES))
    counts = torch.arange(blocks * LANES, device=keys.device) * GOLDEN
    low, high = _low_half(keys)[..., None], _low_half(keys >> 32)[..., None]
    x = low + _low_half(counts)
    x = (x ^ ((x >> 16) & 0xFFFF)).mul_(0x7FEB352D).bitwise_xor_(high)
    x = (x ^ ((x >> 15) & 0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    low, high = x ^ (x >> 16), x >> 16
    halves = torch.stack([half.bitwise_and_(0xFFFF).unflatten(-1, (blocks, LANES)) for half in (low, high)], -2)
    return halves.flatten(-3)[..., :width]


def _low_half(x: Tensor) -> Tensor:
    """The lower 32 bits of int64 x as int32."""
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).int()
