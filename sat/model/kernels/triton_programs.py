"""What runs on a GPU, compiled by Triton: the programs of `triton_kernels`, but for attention's (`triton_attention`).

Loaded by that module alone, when it is used. Everything is computed in float32, whatever the tensors hold. Legend of
the sizes: `sat.model.kernels.interface`. Offsets that grow with the batch are 64-bit.
"""

import triton
import triton.language as tl

# ------------------------------------------------------------------ non-linearities


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


# ------------------------------------------------------------------ LSTM cell


@triton.jit
def cell(state, state_stride, word, context, c_before, c, h, H, BLOCK: tl.constexpr):
    """Grid: rows, blocks of H."""
    row, unit = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = unit < H
    own, other = state + row * state_stride + unit, row * 4 * H + unit
    i = sigmoid(_gate(own, word + other, context + other, real))
    f = sigmoid(_gate(own + H, word + other + H, context + other + H, real))
    g = tanh(_gate(own + 2 * H, word + other + 2 * H, context + other + 2 * H, real))
    o = sigmoid(_gate(own + 3 * H, word + other + 3 * H, context + other + 3 * H, real))
    place = row * H + unit
    now = i * g + f * tl.load(c_before + place, mask=real, other=0.0)
    tl.store(c + place, now, mask=real)
    tl.store(h + place, o * tanh(now), mask=real)
    tl.store(own, i, mask=real)
    tl.store(own + H, f, mask=real)
    tl.store(own + 2 * H, g, mask=real)
    tl.store(own + 3 * H, o, mask=real)


@triton.jit
def _gate(state, word, context, real):
    shares = tl.load(state, mask=real, other=0.0).to(tl.float32) + tl.load(word, mask=real, other=0.0).to(tl.float32)
    return shares + tl.load(context, mask=real, other=0.0).to(tl.float32)


@triton.jit
def cell_backward(
    activations,
    stride,
    c_before,
    c,
    grad_h,
    asked,
    grad_c,
    grad_gates,
    grad_stride,
    H,
    ASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: rows, blocks of H."""
    row, unit = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, place, own = unit < H, row * H + unit, activations + row * stride + unit
    i = tl.load(own, mask=real, other=0.0).to(tl.float32)
    f = tl.load(own + H, mask=real, other=0.0).to(tl.float32)
    g = tl.load(own + 2 * H, mask=real, other=0.0).to(tl.float32)
    o = tl.load(own + 3 * H, mask=real, other=0.0).to(tl.float32)
    of_h = tl.load(grad_h + place, mask=real, other=0.0).to(tl.float32)
    if ASKED:
        of_h += tl.load(asked + place, mask=real, other=0.0).to(tl.float32)
    y = tanh(tl.load(c + place, mask=real, other=0.0))
    of_c = tl.load(grad_c + place, mask=real, other=0.0) + of_h * o * (1.0 - y * y)
    out = grad_gates + row * grad_stride + unit
    tl.store(out, i * (1.0 - i) * g * of_c, mask=real)
    tl.store(out + H, f * (1.0 - f) * tl.load(c_before + place, mask=real, other=0.0) * of_c, mask=real)
    tl.store(out + 2 * H, i * (1.0 - g * g) * of_c, mask=real)
    tl.store(out + 3 * H, o * (1.0 - o) * y * of_h, mask=real)
    tl.store(grad_c + place, of_c * f, mask=real)


# ------------------------------------------------------------------ what is done word by word


@triton.jit
def gate_backward(
    grad,
    asked,
    context,
    gate,
    gate_stride,
    bias,
    grad_gate,
    grad_stride,
    out,
    D,
    ASKED: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: rows. `out` [n, D] of the context; a scalar gate (1) is opened anew, a vector (2) was left open."""
    row = tl.program_id(0).to(tl.int64)
    own = gate + row * gate_stride
    opened, of_gate = 1.0, tl.zeros([BLOCK], dtype=tl.float32)
    if GATE == 1:
        opened = sigmoid(tl.load(own).to(tl.float32) + tl.load(bias).to(tl.float32))
    for low in range(0, D, BLOCK):
        d = low + tl.arange(0, BLOCK)
        real, place = d < D, row * D + d
        total = tl.load(grad + place, mask=real, other=0.0).to(tl.float32)
        if ASKED:
            total += tl.load(asked + place, mask=real, other=0.0).to(tl.float32)
        if GATE == 1:
            of_gate += total * tl.load(context + place, mask=real, other=0.0).to(tl.float32)
            total *= opened
        if GATE == 2:
            opens = tl.load(own + d, mask=real, other=0.0).to(tl.float32)
            asks = total * tl.load(context + place, mask=real, other=0.0).to(tl.float32)
            tl.store(grad_gate + row * grad_stride + d, asks * opens * (1.0 - opens), mask=real)
            total *= opens
        tl.store(out + place, total, mask=real)
    if GATE == 1:
        tl.store(grad_gate + row * grad_stride, tl.sum(of_gate, axis=0) * opened * (1.0 - opened))


@triton.jit
def alpha_sums(alphas, begins, lengths, sums, L, BL: tl.constexpr):
    """Grid: rows, blocks of L. Adds up alpha [M, L] over the words of each row, the first word first."""
    row, location = tl.program_id(0), tl.program_id(1) * BL + tl.arange(0, BL)
    here, total = location < L, tl.zeros([BL], dtype=tl.float32)
    for t in range(tl.load(lengths + row).to(tl.int32)):
        word = tl.load(begins + t) + row
        total += tl.load(alphas + word * L + location, mask=here, other=0.0)
    tl.store(sums + row.to(tl.int64) * L + location, total, mask=here)


@triton.jit
def cross_entropy(logits, stride, bias, targets, nll, sum_log_p, correct, smoothing, V, BLOCK: tl.constexpr):
    """Grid: rows, which begin `stride` apart. The logits become the gradient, what follows in the last block zeros.

    Rows are read to their ends, as a GPU reads 16 bytes at once only where a mask changes at multiples of as many.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    right = tl.load(logits + target).to(tl.float32) + tl.load(bias + target)  # first: it is overwritten below
    top = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    total, plain = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for low in range(0, V, BLOCK):
        word = low + tl.arange(0, BLOCK)
        real = word < V
        x = tl.load(logits + word, mask=word < stride, other=0.0).to(tl.float32)
        x += tl.load(bias + word, mask=word < stride, other=0.0)
        plain += tl.where(real, x, 0.0)
        higher = tl.where(real & ((x > top) | (x != x)), x, top)
        known = higher > -float("inf")
        total = total * tl.where(known, tl.exp(top - higher), 1.0)
        total += tl.where(real, tl.where(known | (x != x), tl.exp(x - higher), 0.0), 0.0)
        top = higher
    most = tl.max(top, axis=0)
    sum_of_exp = tl.sum(tl.where(top > -float("inf"), total * tl.exp(top - most), total), axis=0)
    normaliser = most + tl.log(sum_of_exp)
    tl.store(nll + row, normaliser - right)
    tl.store(sum_log_p + row, tl.sum(plain, axis=0) - V * normaliser)
    tl.store(correct + row, (right >= most) & (normaliser == normaliser))
    for low in range(0, V, BLOCK):
        word = low + tl.arange(0, BLOCK)
        x = tl.load(logits + word, mask=word < stride, other=0.0).to(tl.float32)
        x += tl.load(bias + word, mask=word < stride, other=0.0)
        delta = tl.exp(x - normaliser) - smoothing / V
        delta = tl.where(word == target, delta + (smoothing - 1.0), delta)
        tl.store(logits + word, tl.where(word < V, delta, 0.0), mask=word < stride)


@triton.jit
def best_words(
    logits, stride, first, second, third, values, ids, V, COUNT: tl.constexpr, BC: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: rows, which BLOCK holds. Log-probabilities and ids of the COUNT best words but three, in order of ids."""
    row = tl.program_id(0).to(tl.int64)
    word, place = tl.arange(0, BLOCK), tl.arange(0, BC)
    x = tl.load(logits + row * stride + word, mask=word < V, other=-float("inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    log_sum = tl.log(tl.sum(tl.exp(x - top), axis=0))  # NaN where a logit is, or is infinite, or none is finite
    x = tl.where((word == first) | (word == second) | (word == third), -float("inf"), x)
    found, chosen = tl.full([BC], -float("inf"), dtype=tl.float32), tl.full([BC], BLOCK, dtype=tl.int32)
    for number in tl.static_range(COUNT):
        best = tl.max(x, axis=0)
        which = tl.min(tl.where(x == best, word, BLOCK), axis=0)  # of equals the first one
        x = tl.where(word == which, -float("inf"), x)
        which = tl.where(best > -float("inf"), which, BLOCK)
        found, chosen = tl.where(place == number, best, found), tl.where(place == number, which, chosen)
    order = chosen * BC + place  # what there is not comes last
    rank = tl.sum((order[:, None] > order[None, :]).to(tl.int32), axis=1)
    out, mask = row * COUNT + rank, place < COUNT
    tl.store(values + out, found - top - log_sum, mask=mask)
    tl.store(ids + out, tl.where(chosen < BLOCK, chosen, 0).to(tl.int64), mask=mask)


@triton.jit
def dropout(x, keys, out, threshold, scale, W, BLOCK: tl.constexpr):
    """Grid: rows, blocks of W. The numbers are those of `torch_kernels.random_integers`."""
    row, element = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = element < W
    key = tl.load(keys + row)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    rest = element % 32
    count = (element // 32 * 16 + rest % 16).to(tl.uint32)
    mixed = low + count * tl.full([BLOCK], 0x9E3779B9, dtype=tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * tl.full([BLOCK], 0x7FEB352D, dtype=tl.uint32)
    mixed = mixed ^ high
    mixed = (mixed ^ (mixed >> 15)) * tl.full([BLOCK], 0x846CA68B, dtype=tl.uint32)
    mixed = mixed ^ (mixed >> 16)
    drawn = tl.where(rest >= 16, mixed >> 16, mixed & 0xFFFF).to(tl.int32)
    factor = tl.where(drawn >= threshold, scale, 0.0)
    place = row * W + element
    tl.store(out + place, factor * tl.load(x + place, mask=real, other=0.0).to(tl.float32), mask=real)
