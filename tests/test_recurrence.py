"""The hand-derived backward of the time loop, and the loss in chunks: gradcheck, native against PyTorch, rounding."""

import pytest
import torch

from sat.model.kernels import native, torch_kernels
from sat.model.loss import linear_cross_entropy
from sat.model.packing import pack
from sat.model.passage import Inputs, Weights
from sat.model.recurrence import Loop, recur
from tests.helpers_kernels import both_scores, every_kernels, needs_compiler

LENGTHS = torch.tensor([[3, 1, 4], [0, 0, 0], [2, 2, 0], [1, 0, 3]])


def make_packing(lengths=LENGTHS):
    captions = torch.arange(lengths.numel() * (int(lengths.max()) + 1)).view(*lengths.shape, -1)
    return pack(captions, lengths)


def make_inputs(packing, gate_width, L=5, D=4, A=3, H=2, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    B, N, M = len(packing.images), packing.rows[0], len(packing.inputs)

    def random(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    weights = random(4 * H + A + gate_width, H), random(gate_width), random(4 * H, D), random(A)
    wide = torch.promote_types(dtype, torch.float32)
    c = random(N, H).detach().to(wide).requires_grad_()
    return random(B, L, D), random(B, L, A), random(M, 4 * H), random(N, H), c, *weights


def call(kernels, packing, tanh, *inputs):
    return recur(Loop(kernels, packing, tanh), Inputs(*inputs[:5]), Weights(*inputs[5:]))


@every_kernels
@pytest.mark.parametrize("gate_width", [0, 1, 4])
@both_scores
def test_the_derived_backward_agrees_with_finite_differences(kernels, gate_width, tanh):
    packing = make_packing()
    inputs = make_inputs(packing, gate_width)
    assert torch.autograd.gradcheck(lambda *x: call(kernels, packing, tanh, *x), inputs, fast_mode=True)


def results_of(kernels, tanh, gate_width, dtype, inputs_dtype):
    """Outputs and gradients in `dtype`, from inputs rounded to `inputs_dtype`; sizes are no round numbers."""
    packing = make_packing(torch.randint(0, 6, (4, 7), generator=torch.Generator().manual_seed(1)))
    inputs = make_inputs(packing, gate_width, L=11, D=37, A=19, H=21, dtype=inputs_dtype, scale=0.5)
    wide = torch.promote_types(dtype, torch.float32)
    if not tanh:  # away from the kink of ReLU, where rounding would choose the slope
        inputs = [x + 4 * x.sign() if i == 1 else x for i, x in enumerate(inputs)]
    inputs = [x.detach().to(wide if i == 4 else dtype).requires_grad_() for i, x in enumerate(inputs)]  # 4: the cells
    outputs = call(kernels, packing, tanh, *inputs)
    loss = sum((o.to(torch.float64) * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x for x in inputs if x.numel()])]


@needs_compiler
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("gate_width", [0, 1, 37])
@both_scores
def test_native_kernels_compute_what_the_pytorch_kernels_compute(tanh, gate_width, dtype, tolerance):
    results = [results_of(kernels, tanh, gate_width, dtype, dtype) for kernels in (native, torch_kernels)]
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@needs_compiler
@pytest.mark.parametrize("gate_width", [0, 1, 37])
@both_scores
def test_native_bf16_kernels_round_no_worse_than_the_pytorch_kernels(tanh, gate_width):
    exact = results_of(torch_kernels, tanh, gate_width, torch.float64, torch.bfloat16)
    ours, theirs = (
        results_of(kernels, tanh, gate_width, torch.bfloat16, torch.bfloat16) for kernels in (native, torch_kernels)
    )
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert (one - truth).norm() <= 1.5 * (other - truth).norm()


@needs_compiler
def test_native_results_do_not_depend_on_the_number_of_threads():
    packing = make_packing()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        inputs = make_inputs(packing, 1, dtype=torch.float32)
        outputs = call(native, packing, True, *inputs)
        results.append([*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), inputs)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_kernels
def test_saturated_scores_and_gates_stay_finite_and_nan_stays_nan(kernels):
    packing = make_packing()
    for scale, finite in ((1e3, True), (float("nan"), False)):
        inputs = make_inputs(packing, 1, dtype=torch.float32, scale=scale)
        outputs = call(kernels, packing, True, *inputs)
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), inputs)
        assert all(bool(x.isfinite().all()) == finite for x in (*outputs, *gradients))


@every_kernels
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunked_cross_entropy_equals_the_whole_one(kernels, smoothing, dtype, tolerance, monkeypatch):
    monkeypatch.setattr("sat.model.loss.CHUNK_BYTES", 3 * 29 * 8)  # a few rows at a time
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 17, generator=generator).to(dtype).requires_grad_() for n in (10, 29))
    bias = torch.randn(29, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(29, (10,), generator=generator)
    words = linear_cross_entropy(hidden, weight, bias, targets, smoothing, kernels)
    ours = torch.autograd.grad(3 * words.objective, (hidden, weight, bias))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = wide[0] @ wide[1].t() + wide[2]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    theirs = torch.autograd.grad(3 * expected, wide)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert words.objective.item() == pytest.approx(expected.item(), rel=tolerance)
    assert torch.allclose(words.nll.double(), nll, rtol=10 * tolerance, atol=10 * tolerance)
    assert all((a - b).norm() <= tolerance * b.norm() for a, b in zip(ours, theirs, strict=True))
    if dtype != torch.bfloat16:
        assert torch.equal(words.correct, logits.argmax(1) == targets)
