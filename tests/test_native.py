"""The time loop's hand-derived backward and its kernels: gradcheck, PyTorch against native kernels, the fallback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sat import machine
from sat.model.kernels import native, torch_kernels
from sat.model.kernels.choose import choose_kernels
from sat.model.loss import linear_cross_entropy
from sat.model.packing import pack
from sat.model.recurrence import Inputs, Loop, Weights, recur

needs_compiler = pytest.mark.skipif(native.library()[0] is None, reason=f"no native kernels: {native.library()[1]}")
KERNELS = [pytest.param(torch_kernels, id="pytorch"), pytest.param(native, id="native", marks=needs_compiler)]
OLD_AMD, NEW_AMD = {"AuthenticAMD", "avx2"}, {"AuthenticAMD", "avx2", "avx512f"}
LENGTHS = torch.tensor([[3, 1, 4], [0, 0, 0], [2, 2, 0], [1, 0, 3]])


@pytest.fixture(autouse=True)
def the_route_of_fp32_products_is_restored():
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


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


def call(module, packing, tanh, *inputs):
    return recur(Loop(module, packing, tanh), Inputs(*inputs[:5]), Weights(*inputs[5:]))


@pytest.mark.parametrize("module", KERNELS)
@pytest.mark.parametrize("gate_width", [0, 1, 4])
@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "relu"])
def test_the_derived_backward_agrees_with_finite_differences(module, gate_width, tanh):
    packing = make_packing()
    inputs = make_inputs(packing, gate_width)
    assert torch.autograd.gradcheck(lambda *x: call(module, packing, tanh, *x), inputs, fast_mode=True)


def results_of(module, tanh, gate_width, dtype, inputs_dtype):
    """Outputs and gradients in `dtype`, from inputs rounded to `inputs_dtype`; sizes are no round numbers."""
    packing = make_packing(torch.randint(0, 6, (4, 7), generator=torch.Generator().manual_seed(1)))
    inputs = make_inputs(packing, gate_width, L=11, D=37, A=19, H=21, dtype=inputs_dtype, scale=0.5)
    wide = torch.promote_types(dtype, torch.float32)
    if not tanh:  # away from the kink of ReLU, where rounding would choose the slope
        inputs = [x + 4 * x.sign() if i == 1 else x for i, x in enumerate(inputs)]
    inputs = [x.detach().to(wide if i == 4 else dtype).requires_grad_() for i, x in enumerate(inputs)]  # 4: the cells
    outputs = call(module, packing, tanh, *inputs)
    loss = sum((o.to(torch.float64) * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x for x in inputs if x.numel()])]


@needs_compiler
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("gate_width", [0, 1, 37])
@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "relu"])
def test_native_kernels_compute_what_the_pytorch_kernels_compute(tanh, gate_width, dtype, tolerance):
    results = [results_of(module, tanh, gate_width, dtype, dtype) for module in (native, torch_kernels)]
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@needs_compiler
@pytest.mark.parametrize("gate_width", [0, 1, 37])
@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "relu"])
def test_native_bf16_kernels_round_no_worse_than_the_pytorch_kernels(tanh, gate_width):
    exact = results_of(torch_kernels, tanh, gate_width, torch.float64, torch.bfloat16)
    ours, theirs = (
        results_of(module, tanh, gate_width, torch.bfloat16, torch.bfloat16) for module in (native, torch_kernels)
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


@pytest.mark.parametrize("module", KERNELS)
def test_saturated_scores_and_gates_stay_finite_and_nan_stays_nan(module):
    packing = make_packing()
    for scale, finite in ((1e3, True), (float("nan"), False)):
        inputs = make_inputs(packing, 1, dtype=torch.float32, scale=scale)
        outputs = call(module, packing, True, *inputs)
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), inputs)
        assert all(bool(x.isfinite().all()) == finite for x in (*outputs, *gradients))


@pytest.mark.parametrize("module", KERNELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunked_cross_entropy_equals_the_whole_one(module, smoothing, dtype, tolerance, monkeypatch):
    monkeypatch.setattr("sat.model.loss.CHUNK_BYTES", 3 * 29 * 8)  # a few rows at a time
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 17, generator=generator).to(dtype).requires_grad_() for n in (10, 29))
    bias = torch.randn(29, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(29, (10,), generator=generator)
    words = linear_cross_entropy(hidden, weight, bias, targets, smoothing, module)
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
        assert words.correct.item() == (logits.argmax(1) == targets).sum()


def test_without_a_compiler_the_pytorch_kernels_serve_and_always_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    native.library.cache_clear()
    try:
        assert choose_kernels("auto", torch.empty(0)) is torch_kernels
        assert "there is no C++ compiler" in machine.speed_up("auto", "cpu")
        with pytest.raises(ValueError, match="train.kernels is native, but .* there is no C\\+\\+ compiler; use auto"):
            choose_kernels("native", torch.empty(0))
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_is_named_with_its_message(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho out of registers >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        library, explanation = native.library()
        assert library is None and "out of registers" in explanation
    finally:
        native.library.cache_clear()


@needs_compiler
def test_two_processes_build_at_once_and_leave_one_library(tmp_path):
    program = "from sat.model.kernels import native; assert native.library()[0]"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len(list((tmp_path / "show-attend-and-tell").iterdir())) == 1


def test_never_calls_no_compiler(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: pytest.fail("built"))
    assert choose_kernels("torch", torch.empty(0)) is torch_kernels
    assert "train.kernels=torch" in machine.speed_up("torch", "cpu")


def test_fp32_products_stay_exact_whatever_route_was_chosen():
    machine.speed_up("torch", "cpu")
    a, b = torch.randn(33, 2048), torch.randn(2048, 65)
    assert ((a @ b) - a.double() @ b.double()).norm() < 4e-6 * (a.double() @ b.double()).norm()


@pytest.mark.parametrize(
    "flags",
    [NEW_AMD | {"amx_tile", "amx_bf16"}, OLD_AMD, {"GenuineIntel", "avx512f"}, set()],
    ids=["AMX", "no AVX-512", "Intel", "unknown"],
)
def test_fp32_products_keep_their_route_on_cpus_that_might_round_or_gain_nothing(flags, monkeypatch):
    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(machine, "_product_error", lambda: pytest.fail("tried the other route"))
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert machine.speed_up("torch", "cpu").endswith("; fp32 products by torch's default library")
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("before", ["none", "ieee"])
@pytest.mark.parametrize(
    "error, after, line",
    [
        (3e-7, "bf16", "oneDNN (full precision: relative error 3e-07)"),
        (2e-3, None, "torch's default library (oneDNN would round: relative error 2e-03)"),
        (float("nan"), None, "torch's default library (oneDNN would round: relative error nan)"),
    ],
)
def test_fp32_products_go_to_onednn_only_where_it_was_seen_to_be_exact(before, error, after, line, monkeypatch):
    routes = []

    def product_error():
        routes.append(torch.backends.mkldnn.matmul.fp32_precision)
        return error

    monkeypatch.setattr(machine, "_cpu_flags", lambda: NEW_AMD)
    monkeypatch.setattr(machine, "_product_error", product_error)
    torch.backends.mkldnn.matmul.fp32_precision = before
    assert machine.speed_up("torch", "cpu").endswith(f"; fp32 products by {line}")
    assert routes == ["bf16"]  # it was measured on the route it judges
    assert torch.backends.mkldnn.matmul.fp32_precision == (after or before)


def test_the_error_of_products_tells_bf16_rounding_from_fp32(monkeypatch):
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert machine._product_error() < machine.EXACT

    def rounded(a, b):
        return torch.mm(a.bfloat16().float(), b.bfloat16().float()) if a.dtype == torch.float32 else torch.mm(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert machine._product_error() > 100 * machine.EXACT


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_built_anew(monkeypatch, tmp_path):
    whole = native.library()[1].partition(", built in ")[0]
    compiler = tmp_path / "c++"  # it only copies: `-o FILE` comes last
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || cp "{whole}" "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        path = Path(native.library()[1].partition(", built in ")[0])
    finally:
        native.library.cache_clear()
    assert path.is_relative_to(tmp_path)
    path.unlink()  # a file in use must not be written to
    path.write_text("<html>not a library</html>")
    program = "from sat.model.kernels import native; print(native.library())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "<CDLL" in done.stdout and f"{path}, built in " in done.stdout
    assert path.read_bytes() == Path(whole).read_bytes()
