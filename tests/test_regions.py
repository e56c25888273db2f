"""Region features: images differ in their number of regions, padding counts for nothing, whatever it holds."""

import copy

import pytest
import torch

from sat.evaluation.decoding import decode
from sat.evaluation.options import DecodeOptions
from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import Sizes
from tests.helpers_captioner import LENGTHS, PAPER, TUTORIAL, D, L, V, draw_by_quantile, make_batch, make_model
from tests.helpers_kernels import needs_compiler

REGIONS = torch.tensor([2, 5, L, 1])  # of the images of make_batch; the second has no captions
SETTINGS = {
    "paper": PAPER,
    "tutorial": TUTORIAL,
    "hard": PAPER | {"attention": "hard"},
    "none": TUTORIAL | {"attention": "none"},
    "scheduled": TUTORIAL | {"scheduled_sampling": 1.0},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
every_kernels = pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=needs_compiler)])
SEARCH = DecodeOptions(beam_size=3, max_length=6, keep_attention=True)


def padded(grid, regions=REGIONS, padding=torch.nan):
    grid = grid.clone()
    for row, count in enumerate(regions):
        grid[row, count:] = padding
    return grid


def with_locations(model: Captioner, count: int) -> Captioner:
    """The same weights for a fixed grid of so many cells: it knows nothing of regions."""
    alone = Captioner(model.spec, Sizes(V, count, D), "torch").to(model.vocabulary.weight.dtype)
    alone.load_state_dict(model.state_dict())
    return alone.train(model.training)


def loss_and_gradients(parts, parameters_of):
    """Of (model, grid, captions, lengths, regions) that share one global batch; gradients added up by name."""
    tokens, captions = int(LENGTHS.sum()), int((LENGTHS > 0).sum())
    loss, gradients = 0.0, {}
    for model, grid, words, lengths, regions in parts:
        model.zero_grad()
        sampling = model.spec.scheduled_sampling
        share = total_loss(TeacherForcing(model)(grid, words, lengths, sampling, regions), tokens, captions)
        share.backward()
        loss += share.item()
        for name, parameter in model.named_parameters():
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[name] = gradients.get(name, 0) + found.clone()
    assert gradients.keys() == dict(parameters_of.named_parameters()).keys()
    return loss, gradients


def assert_close(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * max(gradient.norm(), 1e-3), name


@every_kernels
@every_setting
def test_a_padded_batch_is_each_image_alone(settings, kernels, monkeypatch):
    """Alone each image is a fixed grid of its own regions, which today's path without any mask computes."""
    if settings.get("attention") == "hard":
        draw_by_quantile(monkeypatch)
    if settings.get("scheduled_sampling"):
        monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape))
    model = make_model(kernels=kernels, **settings)
    grid, captions, lengths = make_batch()
    together = loss_and_gradients([(model, padded(grid), captions, lengths, REGIONS)], model)
    alone = []
    for row, count in enumerate(REGIONS.tolist()):
        one = slice(row, row + 1)
        alone.append((with_locations(model, count), grid[one, :count], captions[one], lengths[one], None))
    assert_close(together, loss_and_gradients(alone, model), 1e-6)


@every_kernels
@every_setting
def test_captions_of_a_padded_batch_are_those_of_each_image_alone(settings, kernels):
    model = make_model(kernels=kernels, **settings).eval()
    grid, _, _ = make_batch()
    together = decode(model, padded(grid), SEARCH, regions=REGIONS)
    for row, count in enumerate(REGIONS.tolist()):
        (expected,) = decode(with_locations(model, count), grid[row : row + 1, :count], SEARCH)
        (found,) = together[row]
        assert (found.tokens, found.finished) == (expected[0].tokens, expected[0].finished)
        assert found.score == pytest.approx(expected[0].score, abs=1e-5)
        assert torch.allclose(found.alphas[:, :count], expected[0].alphas, atol=1e-6)
        assert not found.alphas[:, count:].any()


def test_an_ensemble_sees_the_same_regions():
    models = [make_model(**settings).eval() for settings in (PAPER, TUTORIAL)]
    grid, _, _ = make_batch()
    together = decode(models, padded(grid), SEARCH, regions=REGIONS)
    for row, count in enumerate(REGIONS.tolist()):
        alone = [with_locations(model, count) for model in models]
        (expected,) = decode(alone, grid[row : row + 1, :count], SEARCH)
        assert together[row][0].tokens == expected[0].tokens


@pytest.mark.parametrize("how", ["sample", "argmax"])
def test_hard_attention_never_looks_at_padding(how):
    model = make_model(**PAPER, attention="hard", hard_inference=how).eval()
    grid, captions, lengths = make_batch()
    found = decode(model, padded(grid), SEARCH, [f"image {row}" for row in range(len(grid))], REGIONS)
    assert all(torch.isfinite(best.alphas).all() for (best,) in found)
    for _ in range(20):
        sums = TeacherForcing(model.train())(padded(grid), captions, lengths, 0.0, REGIONS)
        assert torch.isfinite(sums.per_token)


@every_kernels
@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_padding_holds_never_matters(settings, kernels, dtype, monkeypatch):
    if settings.get("attention") == "hard":
        draw_by_quantile(monkeypatch)
    model = make_model(dtype, kernels=kernels, **settings | {"scheduled_sampling": 0.0})
    grid, captions, lengths = make_batch(dtype)
    results = [
        loss_and_gradients([(model, padded(grid, padding=padding), captions, lengths, REGIONS)], model)
        for padding in (0.0, torch.nan, torch.inf, 1e30)
    ]
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(gradient, results[0][1][name]) for name, gradient in gradients.items())


@every_kernels
@every_setting
def test_the_order_of_regions_is_only_the_order_of_the_attention(settings, kernels):
    if settings.get("attention") == "hard" or settings.get("scheduled_sampling"):
        pytest.skip("draws locations or words")
    model = make_model(kernels=kernels, **settings)
    grid, captions, lengths = make_batch()
    shuffled, orders = padded(grid), []
    for row, count in enumerate(REGIONS.tolist()):
        orders.append(torch.randperm(count, generator=torch.Generator().manual_seed(row)))
        shuffled[row, :count] = grid[row, orders[row]]
    given = [(model, each, captions, lengths, REGIONS) for each in (padded(grid), shuffled)]
    assert_close(loss_and_gradients(given[:1], model), loss_and_gradients(given[1:], model), 1e-9)
    model.eval()
    for (one,), (other,), order in zip(
        decode(model, padded(grid), SEARCH, regions=REGIONS), decode(model, shuffled, SEARCH, regions=REGIONS), orders
    ):
        assert one.tokens == other.tokens
        assert torch.allclose(one.alphas[:, order], other.alphas[:, : len(order)], atol=1e-6)


@every_setting
def test_images_that_all_have_as_many_regions_are_a_grid(settings, monkeypatch):
    if settings.get("attention") == "hard":
        draw_by_quantile(monkeypatch)
    model = make_model(**settings | {"scheduled_sampling": 0.0})
    grid, captions, lengths = make_batch()
    full = torch.full_like(REGIONS, L)
    given = [(model, grid, captions, lengths, regions) for regions in (full, None)]
    assert_close(loss_and_gradients(given[:1], model), loss_and_gradients(given[1:], model), 1e-12)


def test_a_shorter_batch_is_the_same_batch():
    """The loader pads to the image of the batch that has most."""
    model, regions = make_model(**PAPER), REGIONS.clamp(max=3)
    grid, captions, lengths = make_batch()
    given = [(model, each, captions, lengths, regions) for each in (grid, grid[:, :3])]
    assert_close(loss_and_gradients(given[:1], model), loss_and_gradients(given[1:], model), 1e-9)


def test_rows_without_an_image_have_no_region_and_no_weight():
    model = make_model(**TUTORIAL)
    grid, captions, lengths = make_batch()
    nothing = torch.zeros_like(lengths)
    sums = TeacherForcing(model)(torch.zeros_like(grid), captions, nothing, 0.0, torch.zeros_like(REGIONS))
    (sums.per_token + sums.per_caption).backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("shape", "regions", "expected"),
    [
        ((2, L + 1, D), [1, 1], f"regions .B, at most {L}, {D}. expected"),
        ((2, L, D + 1), [1, 1], f"regions .B, at most {L}, {D}. expected"),
        ((2, L, D), [1, L + 1], "how many of the 6 locations of each image are real"),
        ((2, L, D), [1], "how many of the 6 locations"),
        ((2, L - 1, D), None, f"grid .B, {L}, {D}. expected"),
    ],
)
def test_regions_that_do_not_fit_are_refused(shape, regions, expected):
    regions = None if regions is None else torch.tensor(regions)
    with pytest.raises(ValueError, match=expected):
        make_model(torch.float32).encode(torch.zeros(shape), regions=regions)


def test_a_copy_of_the_model_keeps_its_regions_apart():
    """A memory indexes as its tensors do: images leave the search with their number of regions."""
    model = make_model(**PAPER).eval()
    grid, _, _ = make_batch()
    both = decode([model, copy.deepcopy(model)], padded(grid), SEARCH, regions=REGIONS)
    assert [best.tokens for (best,) in both] == [
        best.tokens for (best,) in decode(model, padded(grid), SEARCH, regions=REGIONS)
    ]
