"""Where products prepare for every size they have not met, few are met, and what is made up for that adds nothing."""

from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sat.model import loss
from sat.model.captioner import Captioner
from sat.model.draws import Draws
from sat.model.kernels import choose, products
from sat.model.kernels.choose import choose_products
from sat.model.kernels.products import Bounded, Plain, enough_for, enough_rows, padded, prepares_for_sizes, room_for
from sat.model.loss import LossSums, total_loss
from sat.model.objectives.hard_attention import hard_attention_sums
from sat.model.objectives.rollout import roll_out, word_losses
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.packing import pack
from sat.model.spec import PRESETS, CaptionerSpec, Sizes
from tests.helpers_captioner import all_attentions, both_presets, make_batch, make_model
from tests.test_fast_loop import REGIONS

IMAGES, CAPTIONS, BATCHES = 8, 6, 16
L, D, E, H, A, V = 5, 11, 7, 9, 3, 101
WIDTHS = {D, E, H, 4 * H, A, V, L * IMAGES} | {4 * H + A + gate for gate in (0, 1, D)}
"""None of them is a number of words or of distinct words of these batches."""
CHUNK = 85
PRODUCTS = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.mkldnn._linear_pointwise


@pytest.fixture
def prepares(monkeypatch):
    """A function that says whether products prepare for sizes, from then on."""

    def say(answer: bool) -> None:
        for module in (products, choose, loss):
            monkeypatch.setattr(module, "prepares_for_sizes", lambda like: answer)

    return say


class Met(TorchDispatchMode):
    """The shapes of what was multiplied, where a size is none of the model's."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple] = set()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            added = function.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.addmm_)
            shapes = tuple(tuple(each.shape) for each in (args[1:3] if added else args[:2]))
            sizes = {size for shape in shapes for size in shape} - WIDTHS
            if max(sizes, default=0) > IMAGES * CAPTIONS:
                self.shapes.add(shapes)
            self.sizes |= sizes
        return function(*args, **(kwargs or {}))


def random_batches(seed=0):
    """Captions whose words are of ever other numbers, and of ever other numbers of different ones."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(BATCHES):
        lengths = torch.randint(5, 9, (IMAGES, CAPTIONS), generator=generator)
        highest = int(torch.randint(84, 100, (), generator=generator))
        captions = torch.randint(4, highest, (IMAGES, CAPTIONS, 13), generator=generator)
        yield torch.randn(IMAGES, L, D, generator=generator), captions, lengths


def tiny(preset: str, attention: str) -> Captioner:
    torch.manual_seed(0)
    widths = {"embedding_dim": E, "lstm_dim": H, "attention_dim": A}
    return Captioner(CaptionerSpec.of_preset(preset, attention=attention, dropout=0.3, **widths), Sizes(V, L, D))


def products_of(model: Captioner) -> Met:
    with Met() as met:
        for grid, captions, lengths in random_batches():
            with torch.autocast("cpu", torch.bfloat16):
                sums = TeacherForcing(model)(grid, captions, lengths)
            total_loss(sums, sums.counts["tokens"], sums.counts["captions"]).backward()
    return met


class Enough(NamedTuple):
    """The sizes that suffice for all batches."""

    words: set[int]
    distinct: set[int]
    chunks: set[int]
    rows: set[int]

    @classmethod
    def of_all(cls) -> "Enough":
        enough = cls(set(), set(), set(), set())
        for _, captions, lengths in random_batches():
            packing = pack(captions, lengths)
            M = len(packing.inputs)
            even = next(size for size in range(1, M + 1) if size * -(-M // CHUNK) >= M)
            for sizes, numbers in zip(enough, ([M], [len(packing.distinct)], [even], packing.rows), strict=True):
                sizes.update(map(enough_rows, numbers))
        return enough


@all_attentions
@pytest.mark.parametrize("preset", list(PRESETS))
def test_over_many_batches_few_shapes_are_multiplied(preset, attention, prepares, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", CHUNK * V * 2)
    model, enough = tiny(preset, attention), Enough.of_all()
    prepares(False)
    every = products_of(model)
    prepares(True)
    few = products_of(model)
    assert few.sizes <= set().union(*enough) | {1, IMAGES} and not every.sizes <= few.sizes
    of_words = (1 if attention == "none" else 2) * (4 if preset == "paper" else 1)  # weights of the loop, output layers
    assert len(few.shapes) == of_words * len(enough.words) + 3 * len(enough.distinct) + 4 * len(enough.chunks)
    assert len(every.shapes) > 2.5 * len(few.shapes)


def drawn_batch(dtype):
    grid, captions, lengths = make_batch(dtype)
    keys = torch.randint(-(1 << 62), 1 << 62, lengths.shape, generator=torch.Generator().manual_seed(7))
    return grid.requires_grad_(), captions, lengths, keys


def learnt(model: Captioner, sums: LossSums, grid) -> dict:
    """All counts, the loss and every gradient."""
    total, names = total_loss(sums, 3, 2), ["grid", *(name for name, _ in model.named_parameters())]
    gradients = torch.autograd.grad(total, [grid, *model.parameters()], materialize_grads=True)
    return sums.counts | {"loss": total.detach()} | dict(zip(names, gradients, strict=True))


def forced(model: Captioner, sampling=0.0, regions=None) -> dict:
    grid, captions, lengths, keys = drawn_batch(model.vocabulary.weight.dtype)
    sums = TeacherForcing(model)(grid, captions, lengths, sampling, regions, keys)
    assert sums.counts["tokens"] == lengths.sum() and sums.counts["captions"] == (lengths > 0).sum()
    return learnt(model, sums, grid)


def weighed(model: Captioner) -> dict:
    """With a factor for each word, as of a reward."""
    grid, captions, lengths, keys = drawn_batch(model.vocabulary.weight.dtype)
    packing = pack(captions, lengths)
    draws = Draws.of(keys, packing)
    rollout = roll_out(model, model.encode(grid, packing.images), draws, 0.0)
    words = word_losses(model, rollout, draws, 0.1, torch.linspace(-1, 2, len(packing.inputs)).to(grid.dtype))
    assert len(words.nll) == len(packing.inputs)
    objective = words.objective
    if rollout.chosen is not None:
        objective = objective + hard_attention_sums(model.spec, rollout, packing, words.nll, model.reward_baseline)
    return learnt(model, LossSums(objective, objective * 0, {"nll": words.nll, "correct": words.correct}), grid)


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).norm()
        assert difference <= tolerance * max(float(value.double().norm()), 1e-3), name


precisions = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
in_any_way = pytest.mark.parametrize(
    "learn",
    [
        forced,
        weighed,
        lambda model: forced(model, sampling=0.5),
        lambda model: forced(model, regions=REGIONS),
    ],
    ids=["forced", "weighed", "sampled", "regions"],
)


@precisions
@in_any_way
@all_attentions
@both_presets
def test_losses_counts_and_gradients_are_those_of_the_words_alone(
    preset, attention, learn, dtype, tolerance, prepares, monkeypatch
):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 5 * 13 * 8)
    monkeypatch.setattr(products, "OCTAVE", 1)  # even of few rows there are some made up
    model = make_model(dtype, **preset, attention=attention, dropout=0.4, label_smoothing=0.1)
    prepares(False)
    expected = learn(model)
    prepares(True)
    assert enough_for(24, torch.zeros(1)) == 32
    assert_close(learn(model), expected, tolerance)


@pytest.fixture
def memory_is_nan():
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@in_any_way
@all_attentions
@both_presets
def test_what_is_made_up_is_no_memory_that_nobody_has_written_to(
    preset, attention, learn, prepares, monkeypatch, memory_is_nan
):
    monkeypatch.setattr(products, "OCTAVE", 1)
    prepares(True)
    model = make_model(**preset, attention=attention, dropout=0.4)
    assert all(value.isfinite().all() for value in learn(model).values())


@all_attentions
@both_presets
def test_without_captions_every_gradient_is_zero_there_too(preset, attention, prepares, monkeypatch):
    monkeypatch.setattr(products, "enough_rows", lambda n: 4 * -(-n // 4))  # even one row becomes four
    prepares(True)
    model = make_model(**preset, attention=attention)
    grid, captions, lengths = make_batch()
    sums = TeacherForcing(model)(grid, captions, lengths * 0)
    total_loss(sums, 1, 1).backward()
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())
    assert all(value.item() == 0 for value in (*sums.counts.values(), sums.per_token, sums.per_caption))


@pytest.mark.parametrize("sampling", [0.0, 0.5])
@both_presets
def test_words_in_bf16_beside_a_state_in_float32_are_made_up_to_the_same_number(preset, sampling, monkeypatch):
    monkeypatch.setattr(products, "OCTAVE", 1)
    found = []
    for answer in (lambda like: False, lambda like: like.dtype == torch.bfloat16):
        for module in (products, choose, loss):
            monkeypatch.setattr(module, "prepares_for_sizes", answer)
        model = make_model(torch.float32, **preset)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(forced(model, sampling)["loss"])
    assert torch.isclose(*found, rtol=1e-2)


@pytest.fixture
def routed():
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def test_products_in_float32_prepare_for_sizes_where_they_are_routed_to_onednn(routed):
    rows = torch.randn(37, 5)
    assert prepares_for_sizes(rows) and enough_for(37, rows) == 38 and room_for(37, 3, rows).shape == (38, 3)
    assert choose_products("torch", rows) is Bounded
    for other in (rows.double(), rows.to("meta")):
        assert not prepares_for_sizes(other) and room_for(37, 3, other).shape == (37, 3)
        assert choose_products("auto", other) is Plain
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert not prepares_for_sizes(rows) and choose_products("torch", rows) is Plain


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize("can", [True, False])
def test_products_in_16_bits_do_where_the_cpu_has_them(dtype, name, can, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: can)
    assert prepares_for_sizes(torch.zeros(1, dtype=dtype)) == can


def test_rows_are_followed_by_zeros_without_a_copy_where_there_are_enough():
    rows = torch.randn(5, 3, requires_grad=True)
    assert padded(rows, 5) is rows
    more = padded(rows, 8)
    assert torch.equal(more[:5], rows) and not more[5:].any()
    (gradient,) = torch.autograd.grad((more * torch.arange(24.0).view(8, 3)).sum(), rows)
    assert torch.equal(gradient, torch.arange(15.0).view(5, 3))


@pytest.mark.parametrize("n", [1, 16, 33, 47, 200])
def test_a_product_over_few_numbers_of_rows_is_that_of_its_rows(n):
    generator = torch.Generator().manual_seed(n)
    matrix, rows = (torch.randn(*shape, generator=generator).double() for shape in ((9, 5), (n, 20)))
    rows, out = rows[:, 4:13], torch.full((n, 5), torch.nan).double()
    Bounded(matrix).into(rows, out)
    for found in (out, Bounded(matrix).times(rows)):
        assert torch.allclose(found, rows @ matrix, rtol=1e-12, atol=1e-12)
