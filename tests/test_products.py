"""Products with packed matrices: those of PyTorch, over few numbers of rows; chosen once on each kind of machine."""

import json
import math
import threading
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sat.model.kernels import choose, measured, native, products, torch_kernels
from sat.model.kernels.choose import choose_products
from sat.model.kernels.products import FEW, OCTAVE, Packed, Plain, Rounded, enough_columns, enough_rows
from sat.model.packing import pack
from sat.model.passage import Inputs, Weights
from sat.model.plain_recurrence import PlainLoop, recur_plain
from sat.model.recurrence import Loop, recur
from tests.helpers_kernels import both_scores, needs_compiler
from tests.test_recurrence import make_inputs, make_packing

CLOSE = 1e-5


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() <= CLOSE * other.norm())


def test_rows_are_made_up_to_few_numbers_by_a_sixteenth_at_most():
    for n in range(1, 5000):
        assert n <= enough_rows(n) <= n + n / OCTAVE
        assert enough_rows(enough_rows(n)) == enough_rows(n) <= enough_rows(n + 1)
    for exponent in range(5, 12):
        assert len({enough_rows(n) for n in range(2**exponent + 1, 2 ** (exponent + 1) + 1)}) == OCTAVE


@pytest.mark.parametrize("K, N", [(1, 1), (5, 3), (64, 96), (129, 33)])
def test_a_packed_product_is_that_of_pytorch_for_every_number_of_rows(K, N):
    generator = torch.Generator().manual_seed(K)
    storage = torch.randn(200, K + 7, generator=generator)
    for matrix in (torch.randn(K, N, generator=generator), torch.randn(N, K, generator=generator).t()):
        packed, plain = Packed.of(matrix), Plain(matrix)
        for n in (1, 2, 3, 15, 16, 17, 31, 33, 47, 64, 65, 100, 129, 200):
            rows = storage[:n, 3 : 3 + K]  # columns of something wider, as in the time loop
            exact = rows.double() @ matrix.double()
            for factor in (packed, plain):
                out = torch.full((n, N), torch.nan)
                factor.into(rows, out)
                assert factor.times(rows).shape == (n, N)
                assert close(factor.times(rows), exact) and close(out, exact)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("K, N", [(5, 3), (64, 96), (129, 33)])
def test_a_product_of_columns_made_up_to_16_is_that_of_pytorch(K, N, biased, monkeypatch):
    monkeypatch.setattr(products, "enough_columns", lambda width, like: enough_columns(width, like.to("meta")))
    generator = torch.Generator().manual_seed(K)
    rows, bias = torch.randn(9, K, generator=generator), torch.randn(N, generator=generator) if biased else None
    for matrix in (torch.randn(K, N, generator=generator), torch.randn(N, K, generator=generator).t()):
        factor = Rounded.of(matrix)
        assert len(factor.columns) % 16 == 0 and factor.times(rows, bias).shape == (9, N)
        exact = rows.double() @ matrix.double()
        assert close(factor.times(rows, bias), exact if bias is None else exact + bias)
        assert factor.times(rows[:0], bias).shape == (0, N)


@needs_compiler
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("K, N", [(1, 1), (5, 3), (64, 96), (129, 33), (70, 700)])
def test_the_native_product_of_few_rows_is_exact_and_the_same_for_any_number_of_threads(K, N, dtype, tolerance):
    generator = torch.Generator().manual_seed(K)
    storage = torch.randn(7, K + 7, generator=generator).to(dtype)
    for matrix in (
        torch.randn(K, N, generator=generator).to(dtype),
        torch.randn(N, K, generator=generator).to(dtype).t(),
    ):
        for n in range(8):
            rows = storage[:n, 3 : 3 + K]
            exact, found, threads = rows.double() @ matrix.double(), [], torch.get_num_threads()
            try:
                for number in (1, 3):
                    torch.set_num_threads(number)
                    found.append(native.few_rows(rows, matrix))
            finally:
                torch.set_num_threads(threads)
            assert found[0].dtype == dtype and torch.equal(*found)
            assert (found[0].double() - exact).norm() <= tolerance * exact.norm()


@needs_compiler
def test_few_rows_in_the_time_loop_are_multiplied_by_the_native_product(monkeypatch):
    monkeypatch.setattr(choose, "packs", lambda *_: False)
    monkeypatch.setattr(choose, "prepares_for_sizes", lambda _: True)
    asked = []
    monkeypatch.setattr(native, "few_rows", lambda rows, matrix: asked.append(len(rows)) or rows @ matrix)
    for kernels in ("auto", "torch"):
        factor = choose_products(kernels, torch.zeros(1))(torch.randn(3, 2))
        for n in (1, FEW, FEW + 1):
            assert factor.times(torch.randn(n, 3)).shape == (n, 2)
    assert asked == [1, FEW]


def gradients_of(outputs, inputs):
    loss = sum((o.double() * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs)
    return torch.autograd.grad(loss, [x for x in inputs if x.numel()])


@pytest.mark.parametrize("kernels", [torch_kernels, pytest.param(native, marks=needs_compiler)])
@pytest.mark.parametrize("gate_width", [0, 1, 37])
@both_scores
def test_the_time_loop_gives_the_same_with_packed_weights(kernels, gate_width, tanh):
    packing = make_packing(torch.randint(0, 6, (7, 5), generator=torch.Generator().manual_seed(1)))
    found = []
    for prepare in (Packed.of, Plain):
        inputs = make_inputs(packing, gate_width, L=11, D=37, A=19, H=21, dtype=torch.float32, scale=0.5)
        loop = Loop(kernels, packing, tanh, prepare=prepare)
        outputs = recur(loop, Inputs(*inputs[:5]), Weights(*inputs[5:]))
        found.append([*outputs, *gradients_of(outputs, inputs)])
    for one, other in zip(*found, strict=True):
        assert close(one, other)


def test_the_loop_without_attention_gives_the_same_with_a_packed_weight():
    packing = make_packing(torch.randint(0, 6, (7, 5), generator=torch.Generator().manual_seed(1)))
    M, N, H, found = len(packing.inputs), packing.rows[0], 13, []
    for prepare in (Packed.of, Plain):
        generator = torch.Generator().manual_seed(0)
        shapes = ((M, 4 * H), (N, H), (N, H), (4 * H, H))
        inputs = [torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes]
        hidden = recur_plain(PlainLoop(torch_kernels, packing, prepare), *inputs)
        found.append([hidden, *gradients_of([hidden], inputs)])
    for one, other in zip(*found, strict=True):
        assert close(one, other)


class Met(TorchDispatchMode):
    """The numbers of rows that oneDNN multiplied by matrices of each shape."""

    def __init__(self):
        super().__init__()
        self.rows: dict[tuple[int, int], set[int]] = defaultdict(set)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.mkldnn._linear_pointwise.default:
            self.rows[args[0].shape[1], len(args[1])].add(len(args[0]))
        return function(*args, **(kwargs or {}))


def test_over_many_batches_few_numbers_of_rows_are_met():
    generator, every = torch.Generator().manual_seed(0), set()
    with Met() as met:
        for _ in range(12):
            lengths = torch.randint(0, 13, (40, 6), generator=generator)
            packing = pack(torch.zeros(40, 6, 14, dtype=torch.int64), lengths)
            every |= set(packing.rows)
            inputs = make_inputs(packing, 0, dtype=torch.float32)
            outputs = recur(
                Loop(torch_kernels, packing, True, prepare=Packed.of), Inputs(*inputs[:5]), Weights(*inputs[5:])
            )
            gradients_of(outputs, inputs)
    assert len(met.rows) == 4  # states and contexts, forward and backward
    for numbers in met.rows.values():
        assert numbers == {enough_rows(n) for n in every}
        assert len(numbers) < len(every) / 2


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured._gain.cache_clear()
    yield tmp_path
    measured._gain.cache_clear()


def test_what_was_measured_once_decides_from_then_on(fresh_cache, monkeypatch):
    first = measured.gain(torch.float32)
    assert first.kept.startswith(str(fresh_cache)) and first.ratio > 0
    monkeypatch.setattr(measured, "_measure", lambda dtype: pytest.fail("measured again"))
    measured._gain.cache_clear()  # another process
    assert measured.gain(torch.float32) == first


def test_other_threads_types_and_settings_are_measured_for_themselves(fresh_cache, monkeypatch):
    monkeypatch.setattr(measured, "_measure", lambda dtype: float(len(list(fresh_cache.rglob("products-*")))))
    matmul, threads = torch.backends.mkldnn.matmul, torch.get_num_threads()
    before = matmul.fp32_precision
    try:
        found = [measured.gain(torch.float32).ratio, measured.gain(torch.bfloat16).ratio]
        matmul.fp32_precision = "bf16" if before != "bf16" else "ieee"
        found.append(measured.gain(torch.float32).ratio)
        torch.set_num_threads(threads + 1)
        found.append(measured.gain(torch.float32).ratio)
    finally:
        matmul.fp32_precision = before
        torch.set_num_threads(threads)
    assert found == [0.0, 1.0, 2.0, 3.0]
    assert measured.gain(torch.float32).ratio == 0.0


@pytest.mark.parametrize("ratio, prepare", [(1.3, Packed.of), (1.05, Plain), (0.7, Plain), (0.0, Plain)])
def test_packed_products_serve_where_they_were_faster(ratio, prepare, fresh_cache, monkeypatch):
    monkeypatch.setattr(measured, "_measure", lambda dtype: ratio)
    monkeypatch.setattr(choose, "prepares_for_sizes", lambda like: False)
    assert choose_products("auto", torch.zeros(1)) == choose_products("native", torch.zeros(1)) == prepare
    assert choose_products("torch", torch.zeros(1)) is Plain
    for other in (
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float16),
        torch.zeros(1, device="meta"),
    ):
        assert choose_products("auto", other) is Plain


def test_of_processes_that_measure_at_the_same_time_the_first_decides(fresh_cache, monkeypatch):
    ratios, together = iter([1.4, 0.6, 0.7]), threading.Barrier(3, timeout=60)

    def measure(dtype):
        together.wait()
        return next(ratios)

    monkeypatch.setattr(measured, "_measure", measure)
    found: list[measured.Gain] = []
    here = [
        threading.Thread(target=lambda: found.append(measured._gain.__wrapped__(torch.float32, 2, "none")))
        for _ in range(3)
    ]
    for thread in here:
        thread.start()
    for thread in here:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", *(json.dumps({measured.RATIO: ratio}) for ratio in ("fast", True, math.nan, math.inf, -1.5))],
)
def test_a_damaged_file_does_not_decide(content, fresh_cache, monkeypatch):
    path = measured.gain(torch.float32).kept
    with open(path, "w") as file:
        file.write(content)
    measured._gain.cache_clear()
    monkeypatch.setattr(measured, "_measure", lambda dtype: 1.7)
    assert measured.gain(torch.float32).ratio == 1.7
    monkeypatch.setattr(measured, "_measure", lambda dtype: pytest.fail("measured again"))
    measured._gain.cache_clear()
    assert measured.gain(torch.float32).ratio == 1.7


def test_where_nothing_can_be_written_it_is_measured_all_the_same(fresh_cache, monkeypatch):
    def refuses(**_):
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(measured.files, "cache_folder", refuses)
    monkeypatch.setattr(measured, "_measure", lambda dtype: 1.7)
    assert measured.gain(torch.float32) == (1.7, "this process alone: no usable temporary directory")


def test_a_machine_whose_products_fail_or_round_packs_nothing(monkeypatch):
    class Rounded(Packed):
        def times(self, rows):
            return super().times(rows.half().float())

    def refuses(matrix):
        raise RuntimeError("needs the cpu support avx512bw")

    def lacks(matrix):
        return torch.ops.mkldnn.what_a_pytorch_without_onednn_has(matrix)

    for of in (lambda matrix: Rounded(Packed.of(matrix).matrix), refuses, lacks):
        monkeypatch.setattr(measured, "Packed", type("Other", (), {"of": staticmethod(of)}))
        assert measured._measure(torch.float32) == 0
