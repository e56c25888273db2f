"""What a training step asks of a GPU, counted without one: on tensors that have a device and no numbers."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sat.model import draws
from sat.model.captioner import Captioner
from sat.model.draws import Draws
from sat.model.kernels import choose, torch_kernels, triton_kernels
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.packing import pack
from sat.model.recurrence import Loop, _Recurrence
from sat.model.spec import PRESETS, CaptionerSpec, Sizes

LENGTHS = torch.randint(1, 10, (8, 5), generator=torch.Generator().manual_seed(0))
V, L, D, W = 997, 49, 64, 32
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "unique",
    "bincount",
    "masked_select",
    "is_nonzero",
    "repeat_interleave.Tensor",
)


class Count(TorchDispatchMode):
    """Counts launches, and names what makes the host wait or copies what lies in ordinary memory."""

    def __init__(self):
        super().__init__()
        self.launches, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name, given = (
            str(function),
            [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)],
        )
        alias = [each.alias_info for each in function._schema.returns]
        view = bool(alias) and alias[0] is not None and not alias[0].is_write
        on_gpu = any(
            x.device.type == "cuda"
            for x in [*given, *torch.utils._pytree.tree_leaves(found)]
            if isinstance(x, torch.Tensor)
        )
        if on_gpu and not view and "empty" not in name and "prim" not in name:
            self.launches += 1
        if on_gpu and (
            any(each in name for each in WAITING) or any(x.dtype == torch.bool for x in _indices(name, args))
        ):
            self.waits.append(name)
        if on_gpu and any(x.device.type == "cpu" and x.dim() for x in given) and not (kwargs or {}).get("non_blocking"):
            self.waits.append(f"{name} of a tensor on the host")
        return found


def _indices(name, args):
    return [x for x in args[1] if x is not None] if name.startswith("aten.index.") or "index_put" in name else []


class Programs:
    """In place of Triton's: counts launches."""

    def __init__(self, count: Count):
        self.count = count

    def __getattr__(self, name):
        return self

    def __getitem__(self, grid):
        assert all(isinstance(each, int) and each > 0 for each in grid)
        return self.launch

    def launch(self, *arguments, **options):
        assert all(a.device.type == "cuda" for a in arguments if isinstance(a, torch.Tensor))
        self.count.launches += 1


class Context:
    """What autograd hands to the two directions of a function."""

    needs_input_grad = (False,) * 10

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, _):
        pass

    def mark_non_differentiable(self, _):
        pass


def on_gpu(packing):
    """The plan on a device that is not there."""
    names = {name: value for name, value in vars(packing).items() if isinstance(value, torch.Tensor)}
    return replace(
        packing, **{name: torch.empty(value.shape, dtype=value.dtype, device="cuda") for name, value in names.items()}
    )


def make_packing():
    captions = torch.zeros(*LENGTHS.shape, 11, dtype=torch.int64)
    return pack(captions, LENGTHS)


@pytest.fixture
def counted(monkeypatch):
    """A counter inside the mode of tensors without numbers, where Triton's kernels serve."""
    count = Count()
    for room in ("_programs", "_attention"):
        monkeypatch.setattr(triton_kernels, room, lambda: Programs(count))
    monkeypatch.setattr(choose, "_native_serves", lambda *_: False)
    monkeypatch.setattr(choose, "_triton_serves", lambda *_: True)
    monkeypatch.setattr(draws, "_parts", draws._parts.__wrapped__)  # what has no numbers must not be kept
    return count


@pytest.mark.parametrize("attention", ["soft", "hard", "none"])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_forward_pass_waits_for_nothing_and_costs_few_launches_a_word(preset, attention, counted):
    planned = make_packing()
    with FakeTensorMode(), torch.device("cuda"):
        spec = CaptionerSpec.of_preset(preset, attention=attention, embedding_dim=W, lstm_dim=W, attention_dim=W)
        model = Captioner(spec, Sizes(V, L, D))
        grid, keys = torch.empty(8, L, D), torch.empty(8, 5, dtype=torch.int64)
        drawn = Draws.of(keys, on_gpu(planned))
        with counted:
            sums = TeacherForcing(model)._sums(grid, drawn, 0.0, None)
    assert sums.per_token.device.type == "cuda" and counted.waits == []
    if attention == "soft":
        assert counted.launches <= 5 * len(planned.rows) + 160


def test_the_host_waits_for_keys_on_a_gpu_that_it_is_to_read():
    copies, planned = [], make_packing()

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                copies.append((args[0].device.type, (kwargs or {}).get("non_blocking", False)))
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True):
        keys = torch.empty(8, 5, dtype=torch.int64, device="cuda")
        with Copies():
            assert Draws.of(keys, planned).captions.device.type == "cpu"
    assert copies == [("cuda", False)]


@pytest.mark.parametrize("gate_width", [0, 1, D])
def test_a_word_costs_five_launches_forward_and_nine_backward(gate_width, counted):
    planned = make_packing()
    launches = {}
    for kernels in (triton_kernels, torch_kernels):
        ctx = Context()
        with FakeTensorMode(), torch.device("cuda"):
            packing, (M, N) = on_gpu(planned), (len(planned.inputs), planned.rows[0])
            shapes = [
                (8, L, D),
                (8, L, W),
                (M, 4 * W),
                (N, W),
                (N, W),
                (5 * W + gate_width, W),
                (gate_width,),
                (4 * W, D),
                (W,),
            ]
            tensors = [torch.empty(shape) for shape in shapes]
            for direction in ("forward", "backward"):
                before = counted.launches
                with counted:
                    if direction == "forward":
                        outputs = _Recurrence.forward(ctx, Loop(kernels, packing, True), *tensors)
                    else:
                        _Recurrence.backward(ctx, *[torch.empty_like(x) for x in outputs])
                launches[kernels, direction] = counted.launches - before
    assert counted.waits == []
    T = len(planned.rows)
    assert launches[triton_kernels, "forward"] <= 5 * T + 5
    assert launches[triton_kernels, "backward"] <= 9 * T + 20
    assert launches[torch_kernels, "forward"] + launches[torch_kernels, "backward"] > 4 * sum(
        launches[triton_kernels, each] for each in ("forward", "backward")
    )
