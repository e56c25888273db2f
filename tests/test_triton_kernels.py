"""Triton's kernels against PyTorch's: on a GPU compiled, elsewhere in Triton's interpreter, program by program."""

import itertools
from dataclasses import replace

import pytest
import torch

from sat.model import loss
from sat.model.kernels import torch_kernels, triton_kernels
from sat.model.kernels.interface import Gate, Seen
from sat.model.kernels.products import enough_columns
from sat.model.packing import pack
from sat.model.passage import Inputs, Weights
from sat.model.recurrence import Loop, recur
from tests.helpers_kernels import both_scores

pytest.importorskip("triton")
from sat.model.kernels import triton_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = torch.tensor([[3, 1, 2], [0, 0, 0], [0, 2, 0], [1, 3, 0]])
L, D, A, H, V = 11, 37, 19, 21, 53
KEYS = torch.randint(-(1 << 63), (1 << 63) - 1, (40,), generator=torch.Generator().manual_seed(0))
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ALLOWED = {dtype: 4.0 if (dtype, DEVICE) == (torch.bfloat16, "cpu") else 1.5 for dtype in ROUNDING}
"""Ratio of two errors. The interpreter cuts bfloat16 off where a GPU rounds, so errors are larger and add up."""
every_dtype = pytest.mark.parametrize("dtype", list(ROUNDING), ids=["fp32", "bf16", "fp16"])
every_setting = pytest.mark.parametrize(("tanh", "gate_width"), [(True, 1), (False, D), (True, 0)])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_near(found, expected, dtype, factor=1.0):
    """`found`, computed in `dtype`, against `expected`, computed in float64."""
    assert found.isfinite().all()
    error = (found.double() - expected.double()).norm() / max(1e-3, float(expected.double().norm()))
    assert error <= factor * ROUNDING[dtype], float(error)


def packing_of(lengths=LENGTHS):
    captions = torch.arange(lengths.numel() * (int(lengths.max()) + 1)).view(*lengths.shape, -1)
    return pack(captions, lengths, torch.device(DEVICE))


def loop_inputs(packing, gate_width, dtype, sizes=(L, D, A)):
    """In `dtype`, the same numbers for each: rounded to bfloat16 or 16-bit floats."""
    (L, D, A), B, N, M = sizes, len(packing.images), packing.rows[0], len(packing.inputs)
    shapes = [
        (B, L, D),
        (B, L, A),
        (M, 4 * H),
        (N, H),
        (N, H),
        (4 * H + A + gate_width, H),
        (gate_width,),
        (4 * H, D),
        (A,),
    ]
    wide = torch.promote_types(dtype, torch.float32)
    found = []
    for place, shape in enumerate(shapes):
        x = 0.5 * random(*shape, seed=place).bfloat16().to(wide if place == 4 else dtype)
        found.append(x.requires_grad_())
    return found


def results_of(kernels, tanh, gate_width, dtype, regions=None, lengths=LENGTHS, sizes=(L, D, A)):
    """Outputs and gradients of the whole loop."""
    packing = packing_of(lengths)
    inputs = loop_inputs(packing, gate_width, dtype, sizes)
    if not tanh:  # away from the kink of ReLU, where rounding would choose the slope
        inputs[1] = (inputs[1] + 4 * inputs[1].sign()).detach().requires_grad_()
    counts = None if regions is None else regions.to(DEVICE)[packing.images]
    outputs = recur(Loop(kernels, packing, tanh, counts), Inputs(*inputs[:5]), Weights(*inputs[5:]))
    weights = (torch.linspace(-1, 1, o.numel(), device=DEVICE, dtype=torch.float64).view_as(o) for o in outputs)
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, [x for x in inputs if x.numel()])]


@every_dtype
@every_setting
def test_the_loop_is_that_of_pytorchs_kernels(tanh, gate_width, dtype):
    exact = results_of(torch_kernels, tanh, gate_width, torch.float64)
    ours, theirs = (results_of(kernels, tanh, gate_width, dtype) for kernels in (triton_kernels, torch_kernels))
    for place, (one, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert one.dtype == other.dtype and one.isfinite().all()
        error, allowed = (one.double() - truth).norm(), (other.double() - truth).norm()
        floor = ALLOWED[dtype] / 1.5 * ROUNDING[dtype] * truth.norm()
        assert error <= max(ALLOWED[dtype] * allowed, floor), (
            place,
            float(error / truth.norm()),
            float(allowed / truth.norm()),
        )


def test_locations_behind_an_images_regions_are_not_seen():
    regions = torch.tensor([3, 11, 1, 7])
    exact = results_of(torch_kernels, True, 1, torch.float64, regions)
    ours = results_of(triton_kernels, True, 1, torch.float32, regions)
    for one, truth in zip(ours, exact, strict=True):
        assert_near(one, truth, torch.float32, 2)
    packing = packing_of()
    beyond = (
        torch.arange(L, device=DEVICE)
        >= regions.to(DEVICE)[packing.images][packing.row_image][packing.word_row][:, None]
    )
    assert (ours[3][beyond] == 0).all()


def test_an_image_may_have_more_captions_than_meet_its_grid_at_once():
    lengths = torch.randint(1, 3, (1, 19), generator=torch.Generator().manual_seed(2))
    exact = results_of(torch_kernels, True, 1, torch.float64, lengths=lengths)
    for one, truth in zip(results_of(triton_kernels, True, 1, torch.float32, lengths=lengths), exact, strict=True):
        assert_near(one, truth, torch.float32, 2)


@every_dtype
@pytest.mark.parametrize("sizes", [(70, 600, 19), (300, 37, 70), (1, 1, 1)])
def test_sizes_that_take_more_than_one_program_or_round(sizes, dtype):
    found, lengths = {}, torch.tensor([[2, 1], [1, 0]])
    for name, kernels, kind in (
        ("exact", torch_kernels, torch.float64),
        ("ours", triton_kernels, dtype),
        ("theirs", torch_kernels, dtype),
    ):
        found[name] = results_of(kernels, True, sizes[1], kind, torch.tensor([sizes[0], 1]), lengths, sizes)
    for place, (one, other, truth) in enumerate(zip(found["ours"], found["theirs"], found["exact"], strict=True)):
        error, allowed = (one.double() - truth).norm(), (other.double() - truth).norm()
        assert one.isfinite().all()
        assert error <= max(ALLOWED[dtype] * allowed, ALLOWED[dtype] / 1.5 * ROUNDING[dtype] * truth.norm()), place


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_programs_of_images_without_a_running_row_read_no_tile_and_write_nothing(kind, monkeypatch):
    lengths = torch.tensor([[3, 1, 2], [1, 1, 0], [2, 0, 0], [1, 0, 0]])
    packing, t = packing_of(lengths), 1
    n, everybody = packing.rows[t], (len(packing.images),) * len(packing.rows)
    whole, found = replace(packing, images_running=everybody), {}
    assert packing.images_running[t] == 2 < everybody[t]
    for name, plan in (("few", packing), ("all", whole)):
        B, read, block = len(plan.images), [], triton_attention._block
        if DEVICE == "cpu":  # the interpreter's, to be counted
            monkeypatch.setattr(
                triton_attention, "_block", lambda *x, block=block, read=read: read.append(1) or block(*x)
            )
        seen = Seen(
            plan, random(B, L, D, dtype=kind), random(B, L, A, seed=1, dtype=kind), random(A, seed=2, dtype=kind), True
        )
        query, gate = (
            random(n, A, seed=3, dtype=kind),
            Gate(random(n, D, seed=4, dtype=kind), random(D, seed=5, dtype=kind)),
        )
        alpha, context, gated, grad_scores, grad_query = (
            torch.full((n + 3, width), 7.0, device=DEVICE, dtype=each)
            for width, each in ((L, torch.float32), (D, kind), (D, kind), (L, torch.float32), (A, kind))
        )
        triton_kernels.look(seen, t, query, gate, alpha[:n], context[:n], gated[:n])
        asked = random(n, D, seed=6, dtype=kind), random(n, L, seed=7)
        triton_kernels.attend_backward(seen, t, query, alpha[:n], *asked, grad_scores[:n], grad_query[:n])
        found[name] = [alpha, context, gated, grad_scores, grad_query]
        found[name].append(torch.tensor(len(read)))
        assert read or DEVICE == "cuda"
        monkeypatch.undo()
    for few, each in zip(found["few"], found["all"], strict=True):
        assert torch.equal(few, each) and (few.dim() == 0 or ((few[n:] == 7).all() and not (few[:n] == 7).any()))


def test_saturated_scores_and_gates_stay_finite_and_nan_stays_nan():
    packing = packing_of()
    for scale, finite in ((1e3, True), (float("nan"), False)):
        inputs = [(scale * x).detach().requires_grad_() for x in loop_inputs(packing, 1, torch.float32)]
        outputs = recur(Loop(triton_kernels, packing, True), Inputs(*inputs[:5]), Weights(*inputs[5:]))
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), inputs)
        for x in (*outputs, *gradients):
            assert bool(x.isfinite().all()) == finite
            assert finite or x.isnan().all()


@pytest.mark.parametrize("gate_width", [0, 1, D])
def test_the_gradient_of_a_plain_sum_which_is_one_number_expanded_is_the_exact_one(gate_width):
    packing = packing_of()
    found = []
    for kernels, dtype in ((torch_kernels, torch.float64), (triton_kernels, torch.float32)):
        inputs = loop_inputs(packing, gate_width, dtype)
        outputs = recur(Loop(kernels, packing, True), Inputs(*inputs[:5]), Weights(*inputs[5:]))
        found.append(torch.autograd.grad(sum(o.sum() for o in outputs), [x for x in inputs if x.numel()]))
    for one, truth in zip(found[1], found[0], strict=True):
        assert_near(one, truth, torch.float32, 2)


@every_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("apart", [V, V + 11, V + 3000], ids=["together", "aligned", "far apart"])
def test_cross_entropy_is_pytorchs_and_leaves_its_gradient_in_the_logits(apart, smoothing, dtype):
    whole, bias = random(9, apart, dtype=dtype), random(V, seed=1)
    whole[:, V:] = torch.nan  # as memory may be that nobody has written to
    given = whole[:, :V].mul_(3)
    targets = torch.randint(V, (9,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    given[4] = -torch.inf
    given[4, targets[4]] = 0.0
    wide = given.double()
    expected = torch_kernels.cross_entropy(wide, bias.double(), targets, smoothing)
    found = triton_kernels.cross_entropy(given, bias, targets, smoothing)
    finite = expected[1].isfinite()
    assert_near(found[0], expected[0], torch.float32)
    assert_near(found[1][finite], expected[1][finite], torch.float32)
    assert torch.equal(found[2], expected[2])
    assert_near(given, wide, dtype)


@pytest.mark.parametrize("words", [V, 64])
def test_the_loss_is_the_same_with_logits_made_up_to_a_multiple_of_16(words, monkeypatch):
    assert enough_columns(words, torch.empty(0, device="meta")) == 64
    targets, factors = torch.arange(9, device=DEVICE), random(9).abs()
    found = []
    for kernels, columns in ((torch_kernels, words), (torch_kernels, 64), (triton_kernels, 64)):
        monkeypatch.setattr(loss, "enough_columns", lambda width, like, columns=columns: columns)
        given = [random(*shape).requires_grad_() for shape in ((9, 17), (words, 17), (words,))]
        summed = loss.linear_cross_entropy(*given, targets, 0.1, kernels, factors)
        found.append([summed.objective.detach(), *torch.autograd.grad(summed.objective, given)])
    for one, other, truth in zip(found[1], found[2], found[0], strict=True):
        assert one.shape == other.shape == truth.shape
        assert_near(one, truth, torch.float32, 2)
        assert_near(other, truth, torch.float32, 2)


def test_cross_entropy_of_what_is_not_finite_is_nan_and_no_hit():
    given = random(3, V)
    given[0, 5], given[1, 6] = torch.nan, torch.inf
    targets = torch.tensor([1, 6, 2], device=DEVICE)
    nll, sum_log_p, correct = triton_kernels.cross_entropy(given, random(V, seed=1), targets, 0.0)
    assert nll.isnan().tolist() == sum_log_p.isnan().tolist() == [True, True, False]
    assert not correct[:2].any() and given[0].isnan().all() and given[2].isfinite().all()


@every_dtype
def test_dropout_gives_the_same_bits(dtype):
    for width, rate in itertools.product((1, 31, 32, 50, 75), (1e-9, 0.5, 0.999999)):
        x = random(2, 4, width, seed=1, dtype=dtype)
        keys = KEYS[:8].view(2, 4).to(DEVICE)
        found, expected = (kernels.dropout(x, keys, rate) for kernels in (triton_kernels, torch_kernels))
        assert torch.equal(found, expected) and found.dtype == dtype


@every_dtype
@both_scores
def test_beams_see_what_each_alone_would_see(tanh, dtype):
    grid, projection, query, score = (
        random(3, L, D, dtype=dtype),
        random(3, L, A, seed=1, dtype=dtype),
        random(3, 4, A, seed=2, dtype=dtype),
        random(A, seed=3, dtype=dtype),
    )
    regions = torch.tensor([L, 2, 5], device=DEVICE)
    hidden = projection.double()[:, None] + query.double()[:, :, None]
    scores = (hidden.tanh() if tanh else hidden.relu()) @ score.double()
    real = torch.arange(L, device=DEVICE) < regions[:, None]
    alpha = scores.masked_fill(~real[:, None], -torch.inf).softmax(-1)
    prepared = triton_kernels.prepare(projection, tanh)
    context, found = triton_kernels.attend_beams(grid, prepared, query, score, tanh, regions)
    assert found.dtype == torch.float32 and context.dtype == dtype
    assert_near(found, alpha, dtype)
    assert_near(context, alpha @ grid.double(), dtype)


def test_attention_alone_leaves_the_gate_closed_and_other_rows_untouched():
    packing = packing_of()
    n, t = packing.rows[1], 1
    seen = Seen(packing, random(len(packing.images), L, D), random(len(packing.images), L, A), random(A), True)
    found, expected = ([torch.full((n + 2, width), 7.0, device=DEVICE) for width in (L, D)] for _ in range(2))
    for kernels, out in ((triton_kernels, found), (torch_kernels, expected)):
        kernels.attend(seen, t, random(n, A, seed=5), *(each[:n] for each in out))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert (one[n:] == 7).all()


def test_the_gradient_of_the_context_goes_on_without_a_gate_and_without_an_output_layer():
    grad, out = random(6, D), torch.empty(6, D, device=DEVICE)
    none = torch.empty(6, 0, device=DEVICE)
    gate = Gate(none, none[0])
    triton_kernels.gate_backward(gate, grad.clone(), None, random(6, D, seed=1), none, out)
    assert torch.equal(out, grad)
    triton_kernels.gate_backward(gate, grad.clone(), random(6, D, seed=2), random(6, D, seed=1), none, out)
    torch.testing.assert_close(out, grad + random(6, D, seed=2))
