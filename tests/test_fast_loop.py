"""The fast time loop against the readable one, word by word and differentiated by autograd: alike for every setting."""

import dataclasses

import pytest
import torch

from sat.model.captioner import Captioner
from sat.model.draws import Draws
from sat.model.objectives.hard_attention import hard_attention_sums
from sat.model.objectives.rollout import fast, roll_out, step_by_step, word_losses
from sat.model.packing import pack
from tests.helpers_captioner import L, both_presets, make_batch, make_model
from tests.helpers_kernels import needs_compiler

EXACT = 1e-9
both_kernels = pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=needs_compiler)])
REGIONS = torch.tensor([L, 1, 3, L - 1])


def drawn_batch() -> tuple[torch.Tensor, Draws]:
    """A grid [B, L, D] that wants a gradient, and captions with keys of their own."""
    grid, captions, lengths = make_batch()
    keys = torch.randint(-(1 << 62), 1 << 62, lengths.shape, generator=torch.Generator().manual_seed(7))
    return grid.requires_grad_(), Draws.of(keys, pack(captions, lengths))


def through(loop, model: Captioner, regions: torch.Tensor | None):
    """The rollout of one loop and the gradients of a loss that asks for all of it, of the grid and every parameter."""
    grid, draws = drawn_batch()
    memory = model.encode(grid, draws.packing.images, regions)
    rollout = loop(model, memory, draws)
    words = word_losses(model, rollout, draws, 0.1)
    loss = words.objective
    if model.spec.attention == "hard":
        spec = dataclasses.replace(model.spec, hard_entropy_weight=0.3)
        baseline = torch.tensor(1.5, dtype=torch.float64)
        loss = loss + hard_attention_sums(spec, rollout, draws.packing, words.nll, baseline)
    if rollout.alpha_sum is not None:
        loss = loss + (1 - rollout.alpha_sum).square().sum()
    inputs = [grid, *model.parameters()]
    return rollout, loss, torch.autograd.grad(loss, inputs)


def assert_same_as_step_by_step(model: Captioner, regions: torch.Tensor | None = None):
    found = through(lambda *all: roll_out(*all, sampling_probability=0.0), model, regions)
    expected = through(lambda *all: step_by_step(*all, sampling_probability=0.0), model, regions)
    (ours, our_loss, our_gradients), (theirs, their_loss, their_gradients) = found, expected
    assert abs(our_loss - their_loss) <= EXACT * their_loss.abs()
    names = ["grid", *(name for name, _ in model.named_parameters())]
    for name, one, other in zip(names, our_gradients, their_gradients, strict=True):
        assert other.norm() > 0 and (one - other).norm() <= EXACT * other.norm(), name
    assert (ours.chosen is None) == (theirs.chosen is None)
    assert ours.chosen is None or torch.equal(ours.chosen, theirs.chosen)
    return ours


@both_kernels
@pytest.mark.parametrize("reward", ["caption", "later", "word", "mean"])
@both_presets
def test_hard_attention_draws_and_learns_what_it_does_word_by_word(preset, reward, kernels):
    model = make_model(**preset, attention="hard", hard_reward=reward, kernels=kernels, dropout=0.5)
    chosen = assert_same_as_step_by_step(model).chosen
    assert (chosen == -1).any() and (chosen >= 0).any()


@both_kernels
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_any_share_of_captions_may_see_what_alpha_says_behind_any_gate(gate, share, kernels):
    model = make_model(attention="hard", gate=gate, hard_exact=share, kernels=kernels)
    assert ((assert_same_as_step_by_step(model).chosen == -1) == bool(share)).all()


@both_kernels
@pytest.mark.parametrize("attention", ["soft", "hard", "none"])
@both_presets
def test_regions_of_any_number_are_alike_in_both_loops(preset, attention, kernels):
    model = make_model(**preset, attention=attention, kernels=kernels)
    chosen = assert_same_as_step_by_step(model, REGIONS).chosen
    if chosen is not None:
        packing = drawn_batch()[1].packing
        assert (chosen < REGIONS[packing.images][packing.row_image][packing.word_row]).all()


@both_kernels
@both_presets
def test_without_attention_the_loop_is_the_same_lstm(preset, kernels):
    assert_same_as_step_by_step(make_model(**preset, attention="none", kernels=kernels, dropout=0.5))


@both_kernels
@pytest.mark.parametrize("how", ["expectation", "sample", "argmax"])
@torch.no_grad()
def test_hard_attention_is_scored_where_its_inference_looks(how, kernels):
    model = make_model(attention="hard", gate="none", hard_inference=how, kernels=kernels).eval()
    grid, draws = drawn_batch()
    memory = model.encode(grid, draws.packing.images)
    ours, theirs = fast(model, memory, draws), step_by_step(model, memory, draws, 0.0)
    for name in ("hidden", "context", "alpha", "alpha_sum"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), rtol=EXACT, atol=1e-12), name
    if ours.chosen is not None:
        assert torch.equal(ours.context, memory.grid[draws.packing.row_image[draws.packing.word_row], ours.chosen])
    assert (ours.chosen is None) == (how == "expectation")
