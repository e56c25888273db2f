"""The time loop through a recording: the outcome of the loop without one, whatever came before in the same memory."""

from itertools import pairwise

import pytest
import torch

from sat.model.kernels import native, triton_kernels
from sat.model.packing import pack
from sat.model.passage import Inputs, Weights
from sat.model.recurrence import Loop, recur
from sat.model.replay import LIMIT, Player, Shape, record_on_gpu
from tests.helpers_kernels import both_scores, needs_compiler

L, D, A, H = 11, 37, 19, 21
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def again(work):
    """In place of a CUDA graph: at the same addresses, by running it again."""
    work()
    return work


class Counted:
    """A recorder that counts."""

    def __init__(self, record):
        self.record, self.recorded, self.replayed = record, 0, 0

    def __call__(self, work):
        play = self.record(work)
        self.recorded += 1

        def replay():
            self.replayed += 1
            play()

        return replay


def player_on(device):
    counted = Counted(again if device == "cpu" else record_on_gpu())
    return counted, Player(counted)


def batch(seed, images=5, captions=4, longest=9):
    """Lengths [B, K] of captions, some of which are not there."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(-1, longest + 1, (images, captions), generator=generator).clamp(min=0)
    lengths[0, 0] = longest
    return lengths


def loop_inputs(packing, gate_width, dtype, seed, device):
    generator = torch.Generator().manual_seed(seed)
    B, N, M = len(packing.images), packing.rows[0], len(packing.inputs)
    of_inputs = [(B, L, D), (B, L, A), (M, 4 * H), (N, H), (N, H)]
    of_weights = [(4 * H + A + gate_width, H), (gate_width,), (4 * H, D), (A,)]
    found = [0.5 * torch.randn(size, generator=generator, dtype=torch.float64) for size in of_inputs + of_weights]
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(wide if i == 4 else dtype).to(device).requires_grad_() for i, x in enumerate(found)]


def run(lengths, player, device, *, tanh=True, gate_width=1, dtype=torch.float64, seed=0, regions=False, of_gated=True):
    """Outputs and gradients of a loss of all outputs, or of all but the gated contexts."""
    captions = torch.arange(lengths.numel() * (int(lengths.max()) + 1)).view(*lengths.shape, -1)
    packing = pack(captions, lengths, torch.device(device))
    inputs = loop_inputs(packing, gate_width, dtype, seed, device)
    real = torch.arange(1, len(packing.images) + 1, device=device).clamp(max=L) if regions else None
    kernels = native if device == "cpu" else triton_kernels
    outputs = recur(Loop(kernels, packing, tanh, real, player), Inputs(*inputs[:5]), Weights(*inputs[5:]))
    losses = [
        (o.double() * torch.linspace(-1, 1, o.numel(), device=device, dtype=torch.float64).view_as(o)).sum()
        for o in outputs
    ]
    if not of_gated:
        del losses[1]
    return [*outputs, *torch.autograd.grad(sum(losses), [x for x in inputs if x.numel()], allow_unused=True)]


def assert_same(found, expected, tolerance):
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.isfinite().all() and float((one - other).norm()) <= tolerance * max(1.0, float(other.norm())), place


def settings(device):
    return (torch.float64, 1e-12) if device == "cpu" else (torch.float32, 2e-5)


each_device = pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_compiler), ON_GPU])


@each_device
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("gate_width", [0, 1, D])
@both_scores
def test_batches_of_any_lengths_one_after_the_other_get_what_they_get_without_a_recording(
    tanh, gate_width, regions, device
):
    counted, player = player_on(device)
    dtype, tolerance = settings(device)
    how = {"tanh": tanh, "gate_width": gate_width, "regions": regions, "dtype": dtype}
    sizes = [(5, 4, 9), (5, 4, 9), (11, 5, 6), (1, 1, 1), (5, 4, 13), (11, 5, 9), (4, 9, 9), (5, 4, 9)]
    for seed, (images, captions, longest) in enumerate(2 * sizes):
        lengths = batch(seed, images, captions, longest)
        found = run(lengths, player, device, seed=seed, of_gated=bool(seed % 3), **how)
        expected = run(lengths, None, device, seed=seed, of_gated=bool(seed % 3), **how)
        assert_same(found, expected, tolerance)
    assert counted.replayed >= len(sizes)  # both directions of the second time


@each_device
def test_a_pass_between_another_ones_two_directions_disturbs_nothing(device):
    _, player = player_on(device)
    dtype, tolerance = settings(device)
    packings = [pack(torch.zeros(5, 4, 11, dtype=torch.int64), batch(seed), torch.device(device)) for seed in (0, 1)]
    kernels, found = native if device == "cpu" else triton_kernels, {}
    for who in (player, None):
        inputs = [loop_inputs(packing, 1, dtype, seed, device) for seed, packing in enumerate(packings)]
        outputs = [
            recur(Loop(kernels, packing, True, None, who), Inputs(*x[:5]), Weights(*x[5:]))
            for packing, x in zip(packings, inputs, strict=True)
        ]
        found[who] = [
            each
            for x, out in reversed(list(zip(inputs, outputs, strict=True)))
            for each in torch.autograd.grad(sum(o.square().sum() for o in out), x)
        ]
    assert_same(found[player], found[None], tolerance)


@each_device
def test_a_pass_that_nobody_differentiates_holds_nothing(device):
    counted, player = player_on(device)
    dtype, _ = settings(device)
    for _ in range(3):
        with torch.no_grad():
            packing = pack(torch.zeros(5, 4, 11, dtype=torch.int64), batch(0), torch.device(device))
            x = loop_inputs(packing, 1, dtype, 0, device)
            kernels = native if device == "cpu" else triton_kernels
            recur(Loop(kernels, packing, True, None, player), Inputs(*x[:5]), Weights(*x[5:]))
    assert (counted.recorded, counted.replayed) == (1, 2)


@each_device
def test_a_second_backward_pass_is_refused_as_its_words_may_be_gone(device):
    _, player = player_on(device)
    packing = pack(torch.zeros(5, 4, 11, dtype=torch.int64), batch(0), torch.device(device))
    x = loop_inputs(packing, 1, settings(device)[0], 0, device)
    kernels = native if device == "cpu" else triton_kernels
    loss = recur(Loop(kernels, packing, True, None, player), Inputs(*x[:5]), Weights(*x[5:]))[0].square().sum()
    torch.autograd.grad(loss, x[0], retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        torch.autograd.grad(loss, x[0])


@each_device
def test_a_batch_that_is_not_finite_leaves_nothing_behind(device):
    _, player = player_on(device)
    dtype, tolerance = settings(device)
    packing = pack(torch.zeros(5, 4, 11, dtype=torch.int64), batch(0), torch.device(device))
    kernels = native if device == "cpu" else triton_kernels
    x = [(float("nan") * each).detach().requires_grad_() for each in loop_inputs(packing, 1, dtype, 0, device)]
    outputs = recur(Loop(kernels, packing, True, None, player), Inputs(*x[:5]), Weights(*x[5:]))
    gradients = torch.autograd.grad(sum(o.square().sum() for o in outputs), x)
    assert all(each.isnan().all() for each in (*outputs, *gradients))
    for seed in (1, 2):
        found, expected = (run(batch(seed, 4, 3), who, device, seed=seed, dtype=dtype) for who in (player, None))
        assert_same(found, expected, tolerance)


@needs_compiler
@pytest.mark.parametrize("images, captions", [(40, 5), (7, 5), (40, 1), (1, 3)])
def test_each_row_is_a_running_images_and_those_that_do_not_exist_are_shared_out(images, captions):
    _, player = player_on("cpu")
    run(batch(0, 60, 6), player, "cpu")
    lengths = batch(1, images, captions)
    packing = pack(torch.zeros(*lengths.shape, 11, dtype=torch.int64), lengths)
    x = loop_inputs(packing, 1, torch.float64, 1, "cpu")
    outputs = recur(Loop(native, packing, True, None, player), Inputs(*x[:5]), Weights(*x[5:]))
    there, N = player._last()._recording.passage.seen.packing, packing.rows[0]
    owned = [there.image_rows[begin:end].tolist() for begin, end in pairwise(there.row_ends.tolist())]
    for n, running in zip(there.rows, there.images_running, strict=True):
        assert sorted(row for each in owned[:running] for row in each if row < n) == list(range(n)) and running <= n
    assert [
        each[: end - begin] for each, (begin, end) in zip(owned, pairwise(packing.row_ends.tolist()), strict=False)
    ] == [packing.image_rows[begin:end].tolist() for begin, end in pairwise(packing.row_ends.tolist())]
    spare = [sum(row >= N for row in each) for each in owned[: len(packing.images)]]
    assert sum(spare) == there.rows[0] - N > 0 and max(spare) - min(spare) <= 1
    assert all(each == sorted(each) for each in owned)
    del outputs


@needs_compiler
def test_recordings_are_few_and_what_none_of_them_covers_runs_without():
    _, player = player_on("cpu")
    for seed in range(LIMIT + 20):
        lengths = torch.full((1 + seed // 8, 33), 1 + 4 * (seed % 8))
        found, expected = (run(lengths, who, "cpu", seed=seed) for who in (player, None))
        assert_same(found, expected, 1e-12)
    assert len(player._recordings) <= LIMIT


@pytest.mark.parametrize("seed", range(20))
def test_a_shape_covers_its_batch_in_steps_of_rows_that_only_fall(seed):
    lengths = batch(seed, images=3 + 7 * seed, captions=1 + seed % 6, longest=1 + seed)
    packing = pack(torch.zeros(*lengths.shape, int(lengths.max()) + 1, dtype=torch.int64), lengths)
    shape = Shape.of(packing)
    assert all(mine >= needed for mine, needed in zip(shape.rows, packing.rows, strict=False))
    assert len(shape.rows) >= len(packing.rows) and list(shape.rows) == sorted(shape.rows, reverse=True)
    larger = shape.with_room_for(Shape(2, (64,) * 40))
    assert shape.covers(shape) and larger.covers(shape) and not shape.covers(larger)
    assert list(larger.rows) == sorted(larger.rows, reverse=True)
