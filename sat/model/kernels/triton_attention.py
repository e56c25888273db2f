"""Attention on a GPU, compiled by Triton: scores, softmax, context and gate of the rows of a step, and their gradients.

As `triton_programs`. What changes from word to word (the number of rows, where numbers of width L lie) is no reason to
compile anew. EMULATED: Triton's interpreter runs the program on a CPU, where numpy has no bfloat16 products and PTX has
no meaning.
"""

import triton
import triton.language as tl

from sat.model.kernels.triton_programs import sigmoid, tanh


@triton.jit
def _hidden(x, TANH: tl.constexpr, QUICK: tl.constexpr):
    """Hidden unit of the score. QUICK: by the hardware's tanh, whose error of 2^-11 is below bfloat16's own."""
    if not TANH:
        return tl.where(x <= 0.0, 0.0, x)  # NaN stays NaN
    if QUICK:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tanh(x)


@triton.jit
def _slope(hidden, TANH: tl.constexpr):
    """Derivative of the non-linearity, from its value."""
    if TANH:
        return 1.0 - hidden * hidden
    return tl.where(hidden > 0.0, 1.0, 0.0)


@triton.jit
def _product(a, b, total, EMULATED: tl.constexpr):
    if EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


# ------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=["n"])
def score(
    projection,
    query,
    query_stride,
    vector,
    ends,
    rows,
    regions,
    n,
    scores,
    L,
    A,
    TANH: tl.constexpr,
    QUICK: tl.constexpr,
    REGIONS: tl.constexpr,
    BL: tl.constexpr,
    BA: tl.constexpr,
):
    """Grid: images, blocks of L. BA covers A: the projection is read once for all rows of the image."""
    image, location, a = tl.program_id(0), tl.program_id(1) * BL + tl.arange(0, BL), tl.arange(0, BA)
    here, units = location < L, a < A
    of_tile = (image.to(tl.int64) * L + location[:, None]) * A + a[None, :]
    tile = tl.load(projection + of_tile, mask=here[:, None] & units[None, :], other=0.0).to(tl.float32)
    weight = tl.load(vector + a, mask=units, other=0.0).to(tl.float32)
    real = here
    if REGIONS:
        real = location < tl.load(regions + image)
    for place in range(tl.load(ends + image).to(tl.int32), tl.load(ends + image + 1).to(tl.int32)):
        row = tl.load(rows + place)
        if row < n:
            q = tl.load(query + row * query_stride + a, mask=units, other=0.0).to(tl.float32)
            found = tl.sum(_hidden(tile + q[None, :], TANH, QUICK) * weight[None, :], axis=1)
            tl.store(scores + row * L + location, tl.where(real, found, -float("inf")), mask=here)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["alpha"])
def look(
    scores,
    grid,
    ends,
    rows,
    n,
    alpha,
    context,
    gate,
    gate_stride,
    bias,
    gated,
    L,
    D,
    GATE: tl.constexpr,
    EMULATED: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
):
    """Grid: images, blocks of D. Softmax, weighted sum of the grid, and its gate: GATE 0 none, 1 scalar, 2 vector."""
    image, part = tl.program_id(0), tl.program_id(1)
    d = part * BD + tl.arange(0, BD)
    columns = d < D
    begin, end = tl.load(ends + image).to(tl.int32), tl.load(ends + image + 1).to(tl.int32)
    for first in range(begin, end, BK):
        places = first + tl.arange(0, BK)
        row = tl.load(rows + places, mask=places < end, other=n)
        running = row < n
        top, total = _softmax_sums(scores, row, running, L, BK, BL)
        found = tl.zeros([BK, BD], dtype=tl.float32)
        for low in range(0, L, BL):
            location = low + tl.arange(0, BL)
            here = location < L
            mask = running[:, None] & here[None, :]
            score = tl.load(scores + row[:, None] * L + location[None, :], mask=mask, other=-float("inf"))
            share = tl.exp(score - top[:, None]) / total[:, None]
            if part == 0:
                tl.store(alpha + row[:, None] * L + location[None, :], share, mask=mask)
            of_tile = (image.to(tl.int64) * L + location[:, None]) * D + d[None, :]
            tile = tl.load(grid + of_tile, mask=here[:, None] & columns[None, :], other=0.0)
            found = _product(share.to(tile.dtype), tile, found, EMULATED)
        mask = running[:, None] & columns[None, :]
        out = row[:, None] * D + d[None, :]
        tl.store(context + out, found, mask=mask)
        if GATE == 1:
            own = gate + row * gate_stride
            opened = sigmoid(tl.load(own, mask=running, other=0.0).to(tl.float32) + tl.load(bias).to(tl.float32))
            tl.store(gated + out, found * opened[:, None], mask=mask)
        if GATE == 2:
            own = gate + row[:, None] * gate_stride + d[None, :]
            shift = tl.load(bias + d, mask=columns, other=0.0).to(tl.float32)
            opened = sigmoid(tl.load(own, mask=mask, other=0.0).to(tl.float32) + shift[None, :])
            tl.store(gated + out, found * opened, mask=mask)
            tl.store(own, opened, mask=mask)


@triton.jit
def _softmax_sums(scores, row, running, L, BK: tl.constexpr, BL: tl.constexpr):
    """Greatest score of each row and the sum of exp(score - greatest)."""
    top, total = tl.full([BK], -float("inf"), dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)
    for low in range(0, L, BL):
        location = low + tl.arange(0, BL)
        mask = running[:, None] & (location < L)[None, :]
        score = tl.load(scores + row[:, None] * L + location[None, :], mask=mask, other=-float("inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        higher = tl.where(running, higher, 0.0)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(score - higher[:, None]), axis=1)
        top = higher
    return top, tl.where(running, total, 1.0)


# ------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["grad_alpha"])
def backward_alpha(
    grad_context,
    grid,
    ends,
    rows,
    n,
    grad_alpha,
    totals,
    L,
    D,
    EMULATED: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
):
    """Grid: images, blocks of L. `totals` [n, L]: what the context asks of alpha, and the regulariser."""
    image, location = tl.program_id(0), tl.program_id(1) * BL + tl.arange(0, BL)
    here = location < L
    begin, end = tl.load(ends + image).to(tl.int32), tl.load(ends + image + 1).to(tl.int32)
    for first in range(begin, end, BK):
        places = first + tl.arange(0, BK)
        row = tl.load(rows + places, mask=places < end, other=n)
        running = row < n
        found = tl.zeros([BK, BL], dtype=tl.float32)
        for low in range(0, D, BD):
            d = low + tl.arange(0, BD)
            columns = d < D
            asked = tl.load(
                grad_context + row[:, None] * D + d[None, :], mask=running[:, None] & columns[None, :], other=0.0
            )
            of_tile = (image.to(tl.int64) * L + location[None, :]) * D + d[:, None]
            tile = tl.load(grid + of_tile, mask=columns[:, None] & here[None, :], other=0.0)
            found = _product(asked, tile, found, EMULATED)
        mask, out = running[:, None] & here[None, :], row[:, None] * L + location[None, :]
        tl.store(totals + out, found + tl.load(grad_alpha + out, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["alpha", "grad_scores"])
def backward_query(
    projection,
    query,
    query_stride,
    vector,
    ends,
    rows,
    n,
    alpha,
    totals,
    grad_scores,
    grad_query,
    grad_stride,
    L,
    A,
    TANH: tl.constexpr,
    QUICK: tl.constexpr,
    BL: tl.constexpr,
    BA: tl.constexpr,
):
    """Grid: images, blocks of A."""
    image, part = tl.program_id(0), tl.program_id(1)
    a = part * BA + tl.arange(0, BA)
    units = a < A
    weight = tl.load(vector + a, mask=units, other=0.0).to(tl.float32)
    for place in range(tl.load(ends + image).to(tl.int32), tl.load(ends + image + 1).to(tl.int32)):
        row = tl.load(rows + place)
        if row < n:
            mean = tl.zeros([BL], dtype=tl.float32)
            for low in range(0, L, BL):
                location = low + tl.arange(0, BL)
                own = row * L + location
                share = tl.load(alpha + own, mask=location < L, other=0.0)
                mean += share * tl.load(totals + own, mask=location < L, other=0.0)
            average = tl.sum(mean, axis=0)
            q = tl.load(query + row * query_stride + a, mask=units, other=0.0).to(tl.float32)
            found = tl.zeros([BA], dtype=tl.float32)
            for low in range(0, L, BL):
                location = low + tl.arange(0, BL)
                here, own = location < L, row * L + location
                share = tl.load(alpha + own, mask=here, other=0.0)
                of_score = share * (tl.load(totals + own, mask=here, other=0.0) - average)
                if part == 0:
                    tl.store(grad_scores + own, of_score, mask=here)
                of_tile = (image.to(tl.int64) * L + location[:, None]) * A + a[None, :]
                tile = tl.load(projection + of_tile, mask=here[:, None] & units[None, :], other=0.0).to(tl.float32)
                slope = _slope(_hidden(tile + q[None, :], TANH, QUICK), TANH)
                found += tl.sum(of_score[:, None] * slope, axis=0)
            tl.store(grad_query + row * grad_stride + a, found * weight, mask=units)


@triton.jit
def backward_shared(
    projection,
    query,
    query_stride,
    vector,
    ends,
    words,
    grad_scores,
    grad_projection,
    grad_vector,
    L,
    A,
    TANH: tl.constexpr,
    QUICK: tl.constexpr,
    BL: tl.constexpr,
    BA: tl.constexpr,
):
    """Grid: images, blocks of L, blocks of A. `grad_vector` [images, blocks of L, A] is to be summed."""
    image, block = tl.program_id(0), tl.program_id(1)
    location, a = block * BL + tl.arange(0, BL), tl.program_id(2) * BA + tl.arange(0, BA)
    here, units = location < L, a < A
    of_tile = (image.to(tl.int64) * L + location[:, None]) * A + a[None, :]
    mask = here[:, None] & units[None, :]
    tile = tl.load(projection + of_tile, mask=mask, other=0.0).to(tl.float32)
    slopes, hiddens = tl.zeros([BL, BA], dtype=tl.float32), tl.zeros([BL, BA], dtype=tl.float32)
    for place in range(tl.load(ends + image).to(tl.int32), tl.load(ends + image + 1).to(tl.int32)):
        word = tl.load(words + place)
        q = tl.load(query + word * query_stride + a, mask=units, other=0.0).to(tl.float32)
        of_score = tl.load(grad_scores + word * L + location, mask=here, other=0.0)
        hidden = _hidden(tile + q[None, :], TANH, QUICK)
        slopes += of_score[:, None] * _slope(hidden, TANH)
        hiddens += of_score[:, None] * hidden
    weight = tl.load(vector + a, mask=units, other=0.0).to(tl.float32)
    tl.store(grad_projection + of_tile, slopes * weight[None, :], mask=mask)
    place = (image.to(tl.int64) * tl.num_programs(1) + block) * A + a
    tl.store(grad_vector + place, tl.sum(hiddens, axis=0), mask=units)
