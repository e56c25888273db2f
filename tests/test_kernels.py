"""Each kernel of each implementation against the formulas it stands for, one row at a time, gradients by autograd."""

import pytest
import torch

from sat.model.kernels import native
from sat.model.kernels.interface import Gate, Seen
from sat.model.packing import pack
from tests.helpers_kernels import both_scores, every_kernels, needs_compiler

LENGTHS = torch.tensor(
    [[3, 2, 4, 2, 3], [0, 0, 0, 0, 0], [2, 2, 0, 0, 0], [1, 0, 3, 0, 0], [2, 2, 1, 4, 2], [1, 1, 0, 0, 0]]
)
"""At the second word five, two, one, four and no rows of an image run."""
L, D, A, H, V = 7, 19, 18, 17, 23
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
few_and_many_features = pytest.mark.parametrize("features", [D, 2100])
every_gate = pytest.mark.parametrize("width", [0, 1, D], ids=["none", "scalar", "vector"])
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(found, expected, dtype):
    assert found.dtype == dtype
    expected = expected.detach()
    assert (found.double() - expected).norm() <= TOLERANCE[dtype] * max(1.0, float(expected.norm()))


class Attention:
    """What a kernel is given and should find, of step 1: in float64, every row with its own copy of its image.

    The numbers that it is given are those of the type `given`.
    """

    def __init__(self, tanh: bool, features: int = D, given: torch.dtype = torch.float64):
        self.packing, self.tanh = pack(torch.zeros(*LENGTHS.shape, 5, dtype=torch.int64), LENGTHS), tanh
        self.t, self.n = 1, self.packing.rows[1]
        B, M = len(self.packing.images), len(self.packing.inputs)
        shapes = (B, L, features), (B, L, A), (A,), (M, A)
        numbers = [random(*shape, seed=seed).to(given).double() for seed, shape in enumerate(shapes, 1)]
        self.grid, self.projection, self.score, self.query = numbers
        for each in numbers[1:]:
            each.requires_grad_()
        self.alpha, self.context = self.attend(self.packing.row_image[self.packing.word_row])
        self.step = self.packing.steps[self.t]

    def attend(self, image):
        hidden = self.projection[image] + self.query[:, None]
        hidden = hidden.tanh() if self.tanh else hidden.relu()
        alpha = (hidden @ self.score).softmax(1)
        return alpha, torch.einsum("ml,mld->md", alpha, self.grid[image])

    def seen(self, kernels, dtype) -> Seen:
        projection = kernels.prepare(self.projection.detach().to(dtype), self.tanh)
        return Seen(self.packing, self.grid.to(dtype), projection, self.score.detach().to(dtype), self.tanh)

    def rows(self, tensor, dtype):
        """The rows of this step, strided as they lie in the packed buffers."""
        tensor = tensor.detach().to(dtype)
        return torch.cat([tensor, tensor], 1)[self.step, : tensor.shape[1]]


@every_dtype
@both_scores
@few_and_many_features
@every_kernels
def test_attend_fills_in_the_attention_of_the_running_rows(kernels, features, tanh, dtype):
    expected = Attention(tanh, features)
    alpha, context = (torch.full((expected.n, width), torch.nan, dtype=dtype) for width in (L, features))
    query = expected.rows(expected.query, dtype)
    kernels.attend(expected.seen(kernels, dtype), expected.t, query, alpha, context)
    assert_close(alpha, expected.alpha[expected.step], dtype)
    assert_close(context, expected.context[expected.step], dtype)


@every_dtype
@both_scores
@few_and_many_features
@every_kernels
def test_attend_backward_gives_the_gradients_of_scores_and_query(kernels, features, tanh, dtype):
    expected = Attention(tanh, features)
    grad_context, grad_alpha = random(expected.n, features, seed=5), random(expected.n, L, seed=6)
    loss = (expected.context[expected.step] * grad_context).sum() + (expected.alpha[expected.step] * grad_alpha).sum()
    (query,) = torch.autograd.grad(loss, expected.query)
    found = torch.full((expected.n, A), torch.nan, dtype=dtype)
    scores = torch.full((expected.n, L), torch.nan, dtype=dtype)
    given = (expected.rows(expected.query, dtype), expected.alpha[expected.step].detach().to(dtype).contiguous())
    seen = expected.seen(kernels, dtype)
    kernels.attend_backward(seen, expected.t, *given, grad_context.to(dtype), grad_alpha.to(dtype), scores, found)
    assert_close(found, query[expected.step], dtype)
    alpha = expected.alpha[expected.step].detach()
    total = grad_alpha + torch.einsum(
        "nd,nld->nl", grad_context, expected.grid[expected.packing.row_image[: expected.n]]
    )
    assert_close(scores, alpha * (total - (alpha * total).sum(1, keepdim=True)), dtype)


@every_dtype
@every_gate
@every_kernels
def test_look_leaves_the_context_behind_its_gate_and_what_the_gate_lets_through(kernels, width, dtype):
    expected = Attention(True)
    values, bias = random(len(expected.query), width, seed=5), random(width, seed=6)
    gate = Gate(expected.rows(values, dtype), bias.to(dtype))
    alpha, context = (torch.full((expected.n, wide), torch.nan, dtype=dtype) for wide in (L, D))
    gated = torch.full_like(context, torch.nan) if width else context
    query = expected.rows(expected.query, dtype)
    kernels.look(expected.seen(kernels, dtype), expected.t, query, gate, alpha, context, gated)
    opened = (values[expected.step] + bias).sigmoid()
    assert_close(alpha, expected.alpha[expected.step], dtype)
    assert_close(context, expected.context[expected.step], dtype)
    assert_close(gated, expected.context[expected.step] * (opened if width else 1), dtype)
    assert_close(gate.values, opened, dtype)


@every_dtype
@every_gate
@pytest.mark.parametrize("asks", [True, False])
@every_kernels
def test_gate_backward_gives_the_gradients_of_context_and_gate(kernels, asks, width, dtype):
    context, argument = random(5, D).requires_grad_(), random(5, width, seed=1).requires_grad_()
    grad, asked = random(5, D, seed=2), random(5, D, seed=3) if asks else None
    gated = context * argument.sigmoid() if width else context + argument.sum()
    loss = (gated * (grad if asked is None else grad + asked)).sum()
    of_context, of_gate = torch.autograd.grad(loss, (context, argument))
    strided = torch.cat([argument.detach().sigmoid()] * 2, 1).to(dtype)
    found, found_gate = torch.full((5, D), torch.nan, dtype=dtype), torch.full((5, width), torch.nan, dtype=dtype)
    given = (grad.to(dtype), None if asked is None else asked.to(dtype), context.detach().to(dtype))
    gate = Gate(strided[:, :width], random(width, seed=4).to(dtype))
    kernels.gate_backward(gate, *given, found_gate, found)
    assert_close(found, of_context, dtype)
    assert_close(found_gate, of_gate, dtype)


@every_dtype
@both_scores
@every_kernels
def test_attend_backward_shared_gives_the_gradients_of_projection_and_score(kernels, tanh, dtype):
    expected = Attention(tanh)
    scores = random(len(expected.query), L, seed=7)
    hidden = expected.projection[expected.packing.row_image[expected.packing.word_row]] + expected.query[:, None]
    hidden = hidden.tanh() if tanh else hidden.relu()
    loss = ((hidden @ expected.score) * scores).sum()
    projection, score = torch.autograd.grad(loss, (expected.projection, expected.score))
    query = expected.query.detach().to(dtype)
    found = kernels.attend_backward_shared(expected.seen(kernels, dtype), query, scores.to(dtype))
    assert_close(found[0], projection, dtype)
    assert_close(found[1], score, dtype)


@needs_compiler
@few_and_many_features
def test_native_attention_in_bf16_rounds_only_what_it_returns_in_bf16(features):
    bf16, wide = torch.bfloat16, torch.float32
    expected = Attention(False, features, bf16)
    seen, query, n = expected.seen(native, bf16), expected.rows(expected.query, bf16), expected.n
    alpha, context = torch.full((n, L), torch.nan), torch.full((n, features), torch.nan, dtype=bf16)
    native.attend(seen, expected.t, query, alpha, context)
    exact = expected.alpha[expected.step].detach()
    assert_close(alpha, exact, wide)
    assert torch.allclose(context.double(), expected.context[expected.step].detach(), rtol=2**-8, atol=1e-5)

    grad_context, grad_alpha = random(n, features, seed=5).to(bf16), random(n, L, seed=6)
    scores, found = torch.full((n, L), torch.nan), torch.full((n, A), torch.nan, dtype=bf16)
    given = exact.to(wide), grad_context, grad_alpha.to(wide)
    native.attend_backward(seen, expected.t, query, *given, scores, found)
    image = expected.packing.row_image[:n]
    total = grad_alpha + torch.einsum("nd,nld->nl", grad_context.double(), expected.grid[image])
    of_scores = exact * (total - (exact * total).sum(1, keepdim=True))
    assert_close(scores, of_scores, wide)
    hidden = expected.projection[image] + expected.query[expected.step, None]
    of_query = torch.einsum("nl,nla->na", of_scores, (hidden > 0).double()) * expected.score
    assert torch.allclose(found.double(), of_query, rtol=2**-8, atol=1e-4)


def plain_cell(gates, c_before):
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c_before + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c, torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)


@every_dtype
@every_kernels
def test_cell_and_cell_backward_are_the_lstms(kernels, dtype):
    shares = [random(5, 4 * H, seed=seed).requires_grad_() for seed in range(3)]
    c_before = random(5, H, seed=3).requires_grad_()
    h, c, activations = plain_cell(sum(shares), c_before)
    state, word, context = (share.detach().to(dtype) for share in shares)
    found_h, found_c = torch.empty(5, H, dtype=dtype), torch.empty(5, H, dtype=dtype)
    kernels.cell(state, word, context, c_before.detach().to(dtype), found_c, found_h)
    assert_close(found_h, h, dtype)
    assert_close(found_c, c, dtype)
    assert_close(state, activations, dtype)

    grad_h, grad_c = random(5, H, seed=4), random(5, H, seed=5)
    gates, before = torch.autograd.grad((h * grad_h).sum() + (c * grad_c).sum(), (shares[0], c_before))
    for asked in (None, random(5, H, seed=6).to(dtype)):
        of_next = (grad_h if asked is None else grad_h - asked).to(dtype)
        found, found_before = torch.empty(5, 4 * H, dtype=dtype), grad_c.to(dtype, copy=True)
        kernels.cell_backward(state, c_before.detach().to(dtype), found_c, of_next, asked, found_before, found)
        assert_close(found, gates, dtype)
        assert_close(found_before, before, dtype)


@every_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@every_kernels
def test_cross_entropy_leaves_its_gradient_in_the_logits(kernels, smoothing, dtype):
    logits, bias = random(6, V).requires_grad_(), random(V, seed=1)
    targets = torch.randint(V, (6,), generator=torch.Generator().manual_seed(0))
    log_p = (logits + bias).log_softmax(1)
    nll = -log_p[range(6), targets]
    loss = torch.nn.functional.cross_entropy(logits + bias, targets, reduction="sum", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, logits)
    given = logits.detach().to(dtype)
    found, sum_log_p, correct = kernels.cross_entropy(given, bias.to(dtype), targets, smoothing)
    assert_close(found, nll, dtype)
    assert_close(sum_log_p, log_p.sum(1), dtype)
    assert torch.equal(correct, log_p.argmax(1) == targets)
    assert_close(given, gradient, dtype)


@needs_compiler
@every_dtype
@both_scores
@pytest.mark.parametrize("beams", [1, 3, 7])
def test_attend_beams_sees_what_each_beam_alone_would_see(beams, tanh, dtype):
    grid, projection, query, score = (
        random(3, L, D),
        random(3, L, A, seed=1),
        random(3, beams, A, seed=2),
        random(A, seed=3),
    )
    hidden = projection[:, None] + query[:, :, None]
    alpha = ((hidden.tanh() if tanh else hidden.relu()) @ score).softmax(-1)
    prepared = native.prepare(projection.to(dtype), tanh)
    context, found = native.attend_beams(grid.to(dtype), prepared, query.to(dtype), score.to(dtype), tanh)
    assert_close(found, alpha, dtype)
    assert_close(context, alpha @ grid, dtype)
