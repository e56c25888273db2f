"""Weights at rest: the same captions from matrices laid out once, and never those of weights that have changed."""

import copy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sat.evaluation.decoding import decode
from sat.evaluation.options import DecodeOptions
from sat.model import at_rest
from sat.model.at_rest import PackableLinear, weights_at_rest
from sat.model.kernels import measured
from sat.model.kernels.products import Packed
from tests.helpers_captioner import make_model


@pytest.fixture(autouse=True)
def packed_products_are_the_quicker_ones(monkeypatch):
    monkeypatch.setattr(measured, "gain", lambda dtype: measured.Gain(2.0, "here"))


@pytest.fixture
def laid(monkeypatch):
    """The shapes of the matrices that were laid out, one after the other."""
    shapes, pack = [], Packed.of
    monkeypatch.setattr(at_rest.Packed, "of", lambda matrix: shapes.append(tuple(matrix.shape)) or pack(matrix))
    return shapes


def model_and_grid(**settings):
    model = make_model(torch.float32, **settings).eval()
    grid = torch.randn(6, model.sizes.grid_size, model.sizes.feature_dim, generator=torch.Generator().manual_seed(3))
    return model, grid


def logits_of(model, grid, words=4):
    tokens = torch.arange(3 * len(grid)).view(len(grid), 3) % model.sizes.vocab_size
    with torch.no_grad():
        memory = model.encode(grid)
        state, found = model.init_state(memory), []
        state = state._replace(h=state.h.expand(-1, 3, -1), c=state.c.expand(-1, 3, -1))
        for _ in range(words):
            logits, state, _ = model.step(memory, state, tokens)
            found.append(logits)
    return torch.stack(found)


def close(one, other):
    return bool((one - other).norm() <= 1e-5 * other.norm())


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "paper"},
        {"preset": "tutorial"},
        {"preset": "paper", "attention": "hard"},
        {"preset": "paper", "attention": "none"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_every_word_scores_as_it_does_without(settings, laid):
    model, grid = model_and_grid(**settings)
    expected = logits_of(model, grid)
    assert not laid
    with weights_at_rest([model]):
        assert close(logits_of(model, grid), expected)
        layers = [each for each in model.modules() if isinstance(each, PackableLinear)]
        assert len(laid) == len(layers)  # each once, for all words
        logits_of(model, grid)
        assert len(laid) == len(layers)
    assert torch.equal(logits_of(model, grid), expected)


def test_captions_are_those_of_the_model_as_it_is(laid):
    models = [model_and_grid(preset=preset)[0] for preset in ("paper", "tutorial")]
    grid, options = model_and_grid()[1], DecodeOptions(beam_size=3, max_length=6, n_best=2)
    expected = decode(models, grid, options)
    with weights_at_rest(models):
        found = decode(models, grid, options)
    assert laid
    assert [[each.tokens for each in best] for best in found] == [[each.tokens for each in best] for best in expected]


@torch.no_grad()
def trained_on(model):
    for parameter in model.parameters():
        parameter.mul_(1.5)


def loaded(model):
    model.load_state_dict({name: value * 0.7 for name, value in model.state_dict().items()})


def replaced(model):
    for layer in model.modules():
        if isinstance(layer, PackableLinear):
            layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.3)


def trained_by_a_fused_optimizer(model):
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # which may leave the weights' versions as they are
    model.eval()


@pytest.mark.parametrize("change", [trained_on, loaded, replaced, trained_by_a_fused_optimizer])
def test_weights_that_change_after_all_are_laid_out_anew(change):
    model, grid = model_and_grid()
    with weights_at_rest([model]):
        before = logits_of(model, grid)
        change(model)
        after = logits_of(model, grid)
    assert not close(after, before)
    assert close(after, logits_of(model, grid))


@torch.no_grad()
def test_the_memory_of_a_laid_weight_is_no_other_ones_until_it_is_laid_out_anew():
    layer, rows = PackableLinear(64, 96), torch.randn(5, 64)
    memory = StorageWeakRef(layer.weight.untyped_storage())
    layer.rest("auto")
    layer(rows)
    layer.weight.data = torch.randn(96, 64)  # as a cast does, which leaves the version as it is
    assert not memory.expired()
    assert close(layer(rows), torch.nn.functional.linear(rows, layer.weight, layer.bias))
    assert memory.expired()


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64), (2, 0, 64), (64,), (2, 3, 64)])
def test_rows_of_any_shape_are_multiplied(shape, device):
    layer, rows = PackableLinear(64, 97).to(device), torch.randn(shape, device=device)
    expected = layer(rows)
    layer.rest("auto")
    assert layer(rows).shape == expected.shape and close(layer(rows), expected)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("words", [96, 97])
def test_a_gpus_weights_are_brought_into_the_type_of_the_products_once(words):
    layer, rows = PackableLinear(64, words).cuda(), torch.randn(5, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected = layer(rows).float()
        layer.rest("auto")
        assert (layer(rows) - expected).norm() <= 1e-2 * expected.norm()
        layer.weight.data = 2 * layer.weight.data
        layer.bias *= 2
        assert (layer(rows) - 2 * expected).norm() <= 2e-2 * expected.norm()
    assert layer(rows).dtype == torch.float32


def test_what_was_at_rest_stays_so(laid):
    model, grid = model_and_grid()
    with weights_at_rest([model]):
        logits_of(model, grid)
        found = len(laid)
        with weights_at_rest([model, model]):
            logits_of(model, grid)
        logits_of(model, grid)
    assert len(laid) == found
    logits_of(model, grid)
    assert len(laid) == found


def test_training_goes_its_usual_way_at_rest_too(laid):
    model, grid = model_and_grid()
    memory = model.encode(grid)
    tokens = torch.ones(len(grid), 1, dtype=torch.int64)
    gradients = []
    for resting in (False, True):
        with weights_at_rest([model] if resting else []):
            logits, *_ = model.step(memory, model.init_state(memory), tokens)
        gradients.append(torch.autograd.grad(logits.square().sum(), model.vocabulary.weight, retain_graph=True)[0])
    assert torch.equal(*gradients) and not laid


def test_the_names_of_the_weights_and_a_copy_are_as_ever():
    model, grid = model_and_grid()
    names, expected = list(model.state_dict()), logits_of(model, grid)
    with weights_at_rest([model]):
        logits_of(model, grid)
        assert list(model.state_dict()) == names
        other = copy.deepcopy(model)
        trained_on(other)
        assert close(logits_of(model, grid), expected)
        changed = logits_of(other, grid)
    trained_on(model)
    assert close(changed, logits_of(model, grid))


def test_kernels_by_pytorch_alone_are_its_own_products(laid):
    model, grid = model_and_grid()
    model.kernels = "torch"
    expected = logits_of(model, grid)
    with weights_at_rest([model]):
        assert torch.equal(logits_of(model, grid), expected)
    assert not laid


def test_rest_ends_with_an_error_too_and_others_are_let_be(laid):
    model, grid = model_and_grid()
    with pytest.raises(KeyError), weights_at_rest([object(), model]):
        raise KeyError
    logits_of(model, grid)
    assert not laid


def test_under_autocast_products_are_of_its_type(monkeypatch):
    types = []
    monkeypatch.setattr(at_rest, "packs", lambda kernels, rows: types.append(rows.dtype))
    model, grid = model_and_grid()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(model, grid)
        with weights_at_rest([model]):
            assert torch.equal(logits_of(model, grid), expected)
    assert set(types) == {torch.bfloat16}
