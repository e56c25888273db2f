"""Attention on a GPU, compiled by Triton: scores, softmax, context and gate of the rows of a step, and their gradients.

As `triton_programs`. What changes from word to word (the number of rows, where numbers of width L lie) is no reason to
compile anew. The rows of an image ascend, so those that run (row < n) come first, and a program of an image without one
ends before it has read anything large. BK: rows that meet a tile at once, in a product of tensor cores; 1: each meets
it alone, in float32. WHOLE: a block of locations holds them all, so a program reads its tile once, whatever the rows.
EMULATED: Triton's interpreter runs the program on a CPU, where numpy has no bfloat16 products and PTX has no meaning.
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
def _product(a, b, total, EMULATED: tl.constexpr, BK: tl.constexpr):
    """`total` [BK, N] + `a` [BK, K] times `b` [K, N]."""
    if BK == 1:
        total += tl.sum(a.reshape(b.shape[0])[:, None] * b.to(tl.float32), axis=0)[None, :]
    elif EMULATED:
        total = tl.dot(a.to(b.dtype).to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a.to(b.dtype), b, total, input_precision="ieee")
    return total


@triton.jit
def _bounds(ends, image):
    """Where the rows of an image begin and end."""
    return tl.load(ends + image).to(tl.int32), tl.load(ends + image + 1).to(tl.int32)


@triton.jit
def _row(rows, place, end, n):
    """The row at each place; behind the last one n, which does not run."""
    return tl.load(rows + place, mask=place < end, other=n)


@triton.jit
def _block(matrix, high, low, H, W):
    """Block [high, low] of a matrix [H, W]."""
    return tl.load(matrix + high[:, None] * W + low[None, :], mask=(high < H)[:, None] & (low < W)[None, :], other=0.0)


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
    place, end = _bounds(ends, image)
    row = _row(rows, place, end, n)
    if row >= n:
        return
    tile = _block(projection + image.to(tl.int64) * L * A, location, a, L, A)
    units, here = a < A, location < L
    weight = tl.load(vector + a, mask=units, other=0.0).to(tl.float32)
    real = here
    if REGIONS:
        real = location < tl.load(regions + image)
    while row < n:
        q = tl.load(query + row * query_stride + a, mask=units, other=0.0).to(tl.float32)
        place += 1
        following = _row(rows, place, end, n)
        found = tl.sum(_hidden(tile + q[None, :], TANH, QUICK) * weight[None, :], axis=1)
        tl.store(scores + row * L + location, tl.where(real, found, -float("inf")), mask=here)
        row = following


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
    WHOLE: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
):
    """Grid: images, blocks of D. Softmax, weighted sum of the grid, and its gate: GATE 0 none, 1 scalar, 2 vector.

    A product of tensor cores would be of sixteen rows, and images have five: each row by itself was faster on an H200.
    """
    image, part = tl.program_id(0), tl.program_id(1)
    place, end = _bounds(ends, image)
    row = _row(rows, place, end, n)
    if row >= n:
        return
    d, location = part * BD + tl.arange(0, BD), tl.arange(0, BL)
    columns, kept = d < D, 0.0
    grid += image.to(tl.int64) * L * D
    if WHOLE:
        kept = _block(grid, location, d, L, D)
    if GATE == 1:
        shift = tl.load(bias).to(tl.float32)
    if GATE == 2:
        shift = tl.load(bias + d, mask=columns, other=0.0).to(tl.float32)
    while row < n:
        place += 1
        following = _row(rows, place, end, n)
        own = row * L + location
        if GATE == 1:
            closed = tl.load(gate + row * gate_stride)
        if GATE == 2:
            closed = tl.load(gate + row * gate_stride + d, mask=columns, other=0.0)
        if WHOLE:
            score = tl.load(scores + own, mask=location < L, other=-float("inf"))
            likely = tl.exp(score - tl.max(score, axis=0))
            share = likely / tl.sum(likely, axis=0)
            tl.store(alpha + own, share, mask=(location < L) & (part == 0))  # the first part writes it for all of them
            found = _weighed(share, kept)
        else:
            top, total = _softmax_sums(scores, row, L, BL)
            found = tl.zeros([BD], dtype=tl.float32)
            for low in range(0, L, BL):
                here = low + location < L
                share = tl.exp(tl.load(scores + low + own, mask=here, other=-float("inf")) - top) / total
                tl.store(alpha + low + own, share, mask=here & (part == 0))
                found += _weighed(share, _block(grid, low + location, d, L, D))
        tl.store(context + row * D + d, found, mask=columns)
        if GATE:
            opened = sigmoid(closed.to(tl.float32) + shift)
            tl.store(gated + row * D + d, found * opened, mask=columns)
            if GATE == 2:
                tl.store(gate + row * gate_stride + d, opened, mask=columns)
        row = following


@triton.jit
def _weighed(share, tile):
    return tl.sum(share[:, None] * tile.to(tl.float32), axis=0)


@triton.jit
def _softmax_sums(scores, row, L, BL: tl.constexpr):
    """Greatest score of a row and the sum of exp(score - greatest)."""
    top, total = -float("inf"), 0.0
    for low in range(0, L, BL):
        location = low + tl.arange(0, BL)
        score = tl.load(scores + row * L + location, mask=location < L, other=-float("inf"))
        higher = tl.maximum(top, tl.max(score, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(score - higher), axis=0)
        top = higher
    return top, total


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
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
):
    """Grid: images, blocks of L, parts of D. What the context asks of alpha, and the regulariser in the first part.

    `totals` [parts, n, L] are to be summed over parts; SPAN: the width of one.
    """
    image, part = tl.program_id(0), tl.program_id(2)
    place, end = _bounds(ends, image)
    first = _row(rows, place, end, n)
    if first >= n:
        return
    location, begin = tl.program_id(1) * BL + tl.arange(0, BL), part * SPAN
    grid += image.to(tl.int64) * L * D
    totals += part.to(tl.int64) * n * L
    kept = 0.0
    if SPAN == BD and BK == 1:
        kept = _block(grid, location, begin + tl.arange(0, BD), L, D)
    while first < n:
        row = _row(rows, place + tl.arange(0, BK), end, n)
        running = row < n
        place += BK
        first = _row(rows, place, end, n)
        found = tl.zeros([BK, BL], dtype=tl.float32)
        for low in tl.range(begin, begin + SPAN, BD, num_stages=STAGES):
            d = low + tl.arange(0, BD)
            mask = running[:, None] & (d < D)[None, :]
            asked = tl.load(grad_context + (row * D)[:, None] + d[None, :], mask=mask, other=0.0)
            tile = kept if SPAN == BD and BK == 1 else _block(grid, location, d, L, D)
            found = _product(asked, tl.trans(tile), found, EMULATED, BK)
        mask, out = running[:, None] & (location < L)[None, :], (row * L)[:, None] + location[None, :]
        found += tl.load(grad_alpha + out, mask=mask & (part == 0), other=0.0)
        tl.store(totals + out, found, mask=mask)


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
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BL: tl.constexpr,
    BA: tl.constexpr,
):
    """Grid: images, blocks of A. PARTS: how many `totals` [PARTS, n, L] are to be summed."""
    image, part = tl.program_id(0), tl.program_id(1)
    place, end = _bounds(ends, image)
    row = _row(rows, place, end, n)
    if row >= n:
        return
    a, location = part * BA + tl.arange(0, BA), tl.arange(0, BL)
    units, kept = a < A, 0.0
    projection += image.to(tl.int64) * L * A
    if WHOLE:
        kept = _block(projection, location, a, L, A)
    weight = tl.load(vector + a, mask=units, other=0.0).to(tl.float32)
    while row < n:
        q = tl.load(query + row * query_stride + a, mask=units, other=0.0).to(tl.float32)
        place += 1
        following = _row(rows, place, end, n)
        found = tl.zeros([BA], dtype=tl.float32)
        average = 0.0
        if not WHOLE:
            for low in range(0, L, BL):
                share, total = _asked(alpha, totals, row, low + location, n, L, PARTS)
                average += tl.sum(share * total, axis=0)
        for low in range(0, BL if WHOLE else L, BL):
            share, total = _asked(alpha, totals, row, low + location, n, L, PARTS)
            if WHOLE:
                average = tl.sum(share * total, axis=0)
            of_score = share * (total - average)
            tl.store(grad_scores + row * L + low + location, of_score, mask=(low + location < L) & (part == 0))
            tile = kept if WHOLE else _block(projection, low + location, a, L, A)
            slope = _slope(_hidden(tile + q[None, :], TANH, QUICK), TANH)
            found += tl.sum(of_score[:, None] * slope, axis=0)
        tl.store(grad_query + row * grad_stride + a, found * weight, mask=units)
        row = following


@triton.jit
def _asked(alpha, totals, row, location, n, L, PARTS: tl.constexpr):
    """Alpha of a row, and what is asked of it."""
    own, here = row * L + location, location < L
    total = tl.load(totals + own, mask=here, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(totals + own + part * n.to(tl.int64) * L, mask=here, other=0.0)
    return tl.load(alpha + own, mask=here, other=0.0), total


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
