"""Hard attention's estimator against the true gradient, on a model small enough to go through all its draws.

One image of 2 cells with two captions of 2 and 3 words has 2^5 sequences of locations; the true gradient is that of the
bound sum_s p(s) log p(y | s), differentiated as it stands.
"""

import itertools

import pytest
import torch

from sat.model import attention
from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import CaptionerSpec, Sizes
from tests import helpers_captioner as helpers
from tests.helpers_captioner import PAPER, TUTORIAL, Reference

CELLS, D, H, V = 2, helpers.D, helpers.H, 8
CAPTIONS = torch.tensor([[[1, 4, 5, 2], [1, 6, 2, 0]]])
LENGTHS = torch.tensor([[3, 2]])
BASELINE = 1.5


def small_model(preset: dict, **settings) -> Captioner:
    torch.manual_seed(3)
    sizes = {"embedding_dim": 5, "lstm_dim": H, "attention_dim": 3, "dropout": 0.0}
    spec = CaptionerSpec(**preset | sizes | {"attention": "hard", "hard_exact": 0.0} | settings)
    model = Captioner(spec, Sizes(V, CELLS, D)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    model.reward_baseline.fill_(BASELINE)
    return model


def features() -> torch.Tensor:
    return torch.randn(1, CELLS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def all_sequences() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Locations of the words of both captions."""
    three, two = (list(itertools.product(range(CELLS), repeat=n)) for n in LENGTHS[0].tolist())
    return list(itertools.product(three, two))


def log_probabilities(reference: Reference, grid: torch.Tensor, sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiable log p(s | a) and log p(y | s, a) of both captions together, word by word."""
    log_s = log_y = torch.zeros((), dtype=torch.float64)
    for caption, length, locations in zip(CAPTIONS[0].tolist(), LENGTHS[0].tolist(), sequences, strict=True):
        alphas, upcoming = [], iter(locations)

        def choose(alpha, alphas=alphas, upcoming=upcoming):
            alphas.append(alpha)
            return next(upcoming)

        *_, logits = reference.caption(grid[0], caption[: length + 1], choose=choose)
        log_s = log_s + sum(alpha[place].log() for alpha, place in zip(alphas, locations, strict=True))
        targets = caption[1 : length + 1]
        log_y = log_y + sum(each.log_softmax(0)[word] for each, word in zip(logits, targets, strict=True))
    return log_s, log_y


def flat(gradients) -> torch.Tensor:
    return torch.cat([each.flatten() for each in gradients])


@pytest.fixture(params=[PAPER, TUTORIAL], ids=["paper", "tutorial"])
def exact(request, monkeypatch):
    """The preset, each sequence's probability, and the true gradient of the negated bound, per token."""
    for name, value in {"L": CELLS, "V": V}.items():
        monkeypatch.setattr(helpers, name, value)
    preset, probabilities, bound = request.param, [], 0.0
    reference = Reference(small_model(preset), preset | {"attention": "hard"})
    for sequences in all_sequences():
        log_s, log_y = log_probabilities(reference, features(), sequences)
        bound = bound + log_s.exp() * log_y
        probabilities.append(log_s.exp().item())
    assert sum(probabilities) == pytest.approx(1)
    return preset, probabilities, flat(reference.gradients(-bound / LENGTHS.sum()).values())


def estimates(preset: dict, monkeypatch, **settings) -> torch.Tensor:
    """The estimator's gradient [sequences, parameters] at each sequence that can be drawn."""
    model, found = small_model(preset, **settings), []
    for sequences in all_sequences():
        steps = iter(itertools.zip_longest(*sequences))
        monkeypatch.setattr(
            attention,
            "drawn_location",
            lambda *_, steps=steps: torch.tensor([place for place in next(steps) if place is not None]),
        )
        model.zero_grad()
        sums = TeacherForcing(model)(features(), CAPTIONS, LENGTHS)
        total_loss(sums, LENGTHS.sum(), 2).backward()
        found.append(flat(parameter.grad for parameter in model.parameters()))
    return torch.stack(found)


def mean_and_variance(exact, monkeypatch, **settings) -> tuple[torch.Tensor, float]:
    preset, probabilities, _ = exact
    found, weights = estimates(preset, monkeypatch, **settings), torch.tensor(probabilities).double()
    mean = weights @ found
    return mean, float(weights @ (found - mean).square().sum(1))


def test_the_expected_estimate_is_the_true_gradient_of_the_bound(exact, monkeypatch):
    truth, variances = exact[2], {}
    for reward in ("caption", "later"):
        mean, variances[reward] = mean_and_variance(exact, monkeypatch, hard_reward=reward, hard_entropy_weight=0.0)
        assert (mean - truth).norm() <= 1e-6 * truth.norm(), reward
    assert variances["later"] < variances["caption"]


def test_rewarding_the_very_word_or_the_mean_is_another_gradient(exact, monkeypatch):
    truth = exact[2]
    for reward in ("word", "mean"):
        mean, _ = mean_and_variance(exact, monkeypatch, hard_reward=reward, hard_entropy_weight=0.0)
        assert (mean - truth).norm() >= 1e-3 * truth.norm(), reward


def test_the_entropy_and_the_weight_of_the_reward_come_on_top(exact, monkeypatch):
    """lambda_e adds its share at each sequence alike, lambda_r scales the rest beside the cross-entropy."""
    preset, _, _ = exact
    plain, bonus, double, none = (
        estimates(preset, monkeypatch, hard_reward_weight=reward, hard_entropy_weight=entropy)
        for reward, entropy in ((1.0, 0.0), (1.0, 0.3), (2.0, 0.0), (0.0, 0.0))
    )
    half = estimates(preset, monkeypatch, hard_reward_weight=0.0, hard_entropy_weight=0.15)
    assert torch.allclose(bonus - plain, 2 * (half - none), atol=1e-12) and (bonus - plain).norm() > 1e-3
    assert torch.allclose(double - plain, plain - none, atol=1e-12)


def test_captions_that_see_alpha_itself_have_the_gradient_of_soft_attention(monkeypatch):
    hard = small_model(PAPER, hard_exact=1.0, hard_entropy_weight=0.0)
    soft = Captioner(CaptionerSpec(**vars(hard.spec) | {"attention": "soft", "penalty_weight": 0.0}), hard.sizes)
    soft.double().load_state_dict({name: value for name, value in hard.state_dict().items() if "reward" not in name})
    for model in (hard, soft):
        total_loss(TeacherForcing(model)(features(), CAPTIONS, LENGTHS), 1, 1).backward()
    for (name, ours), theirs in zip(hard.named_parameters(), soft.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12), name
