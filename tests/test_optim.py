"""Groups, rate and average: pure functions of the model and the step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from sat.model.captioner import Captioner
from sat.model.spec import CaptionerSpec, Sizes
from sat.optim import WeightAverage, build_optimizer, clip_gradients, learning_rate


def captioner() -> Captioner:
    torch.manual_seed(0)
    return Captioner(CaptionerSpec(embedding_dim=6, lstm_dim=5, attention_dim=7), Sizes(11, 4, 8))


def test_matrices_decay_and_biases_vectors_and_embeddings_never_do():
    module = nn.ModuleDict({"encoder": nn.Conv2d(3, 4, 1), "captioner": captioner()})
    optimizer = build_optimizer(module, learning_rate=1e-3, weight_decay=0.1, encoder_learning_rate=1e-5)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            matrix = parameter.ndim > 1 and name != "captioner.embedding.weight"
            assert group["weight_decay"] == (0.1 if matrix else 0.0), name
            assert group["peak_lr"] == (1e-5 if name.startswith("encoder.") else 1e-3), name
    assert sorted(seen) == sorted(names.values())


@pytest.mark.parametrize("share", [0.5, 1.0, 1.000001, 2.0])
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_gradients_are_clipped_as_pytorch_clips_them_to_the_last_bit(value, share):
    found, expected = captioner(), captioner()
    for module in (found, expected):
        module.embedding.weight.requires_grad_(False)
        for parameter in filter(lambda each: each.requires_grad, module.parameters()):
            parameter.grad = torch.full_like(parameter, value)
    most = share * math.sqrt(sum(each.numel() for each in found.parameters() if each.requires_grad))
    norms = clip_gradients(found.parameters(), most), nn.utils.clip_grad_norm_(expected.parameters(), most)
    torch.testing.assert_close(*norms, rtol=0, atol=0, equal_nan=True)
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0, equal_nan=True)


def test_closed_parameters_are_left_out():
    module = captioner()
    module.embedding.weight.requires_grad_(False)
    optimizer = build_optimizer(module, learning_rate=1.0, weight_decay=0.0, encoder_learning_rate=1.0)
    assert all(
        parameter is not module.embedding.weight for group in optimizer.param_groups for parameter in group["params"]
    )


@hypothesis_settings(deadline=None, max_examples=50)
@given(warmup=st.integers(0, 50), more=st.integers(1, 400), peak=st.floats(1e-6, 1))
def test_the_rate_rises_to_its_peak_and_falls_to_almost_zero(warmup, more, peak):
    total = warmup + more
    rates = [learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=total) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) == pytest.approx(peak)
    assert rates[-1] <= peak * 0.5 * (1 - math.cos(math.pi / more)) + 1e-12


def test_the_average_follows_the_weights_by_its_decay_and_copies_buffers():
    module = captioner()
    first = module.vocabulary.weight.detach().clone()
    average = WeightAverage(module, decay=0.9)
    average.update(module)  # the first update takes the weights as they are
    with torch.no_grad():
        module.vocabulary.weight += 1
        module.feature_mean += 2
    average.update(module)
    torch.testing.assert_close(average.module.vocabulary.weight, first + 0.1)
    assert torch.equal(average.module.feature_mean, module.feature_mean)


def test_the_average_of_bf16_weights_arrives_where_they_stay():
    module = torch.nn.Linear(2, 2).bfloat16()
    torch.nn.init.constant_(module.weight, 1.0)
    average = WeightAverage(module, decay=0.99)
    average.update(module)
    torch.nn.init.constant_(module.weight, 1.0078125)  # the next number of bf16
    for _ in range(1000):
        average.update(module)
    assert average.module.weight.dtype == torch.float32
    torch.testing.assert_close(average.module.weight, module.weight.float(), rtol=0, atol=1e-5)
