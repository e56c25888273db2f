"""Rounding: a bf16 captioner errs no more than plain bf16 code, and a GPU computes what a CPU computes.

The plain code keeps LSTM state, softmax and sums in float32 and rounds only what enters matrix products.
"""

import contextlib
import functools

import pytest
import torch
from torch.nn.functional import cross_entropy

from sat.model import attention
from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives import rollout
from sat.model.spec import PRESETS, CaptionerSpec, Sizes
from tests.helpers_captioner import all_attentions, loss_sums, make_batch, make_model

V, L, D, E, H, A = 97, 9, 64, 40, 48, 32
DRAWN = 2
BATCHES, BATCHES_OF_ONE_LOCATION = 8, 24
"""A ReLU that rounding switches weighs most where one location is looked at, and more batches average that out."""
FACTOR, FACTOR_OF_ONE_NUMBER = 1.5, 3.0
"""Allowed ratio of two errors over all batches; where these are eight numbers, chance alone makes a ratio of two."""
ways = pytest.mark.parametrize("way", ["autocast", "bf16 weights"])
both_presets = pytest.mark.parametrize("preset", list(PRESETS))


@pytest.fixture
def same_draws(monkeypatch):
    """Hard attention draws location 2, always: rounding must not decide what is compared."""
    monkeypatch.setattr(attention, "drawn_location", lambda _, uniform: torch.full_like(uniform, DRAWN).long())
    monkeypatch.setattr(rollout, "uniform", lambda keys: torch.full(keys.shape, 0.9, device=keys.device))


def captioner(preset: str, attention: str, seed: int, kernels: str = "auto") -> Captioner:
    torch.manual_seed(seed)
    widths = {"embedding_dim": E, "lstm_dim": H, "attention_dim": A}
    spec = CaptionerSpec.of_preset(preset, dropout=0.0, attention=attention, **widths)
    model = Captioner(spec, Sizes(V, L, D), kernels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    if attention == "hard":
        model.reward_baseline.fill_(4.0)
    return model


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six images with three captions each, one of which does not exist, of 1 to 8 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (6, 3), generator=generator)
    lengths[1, 1] = 0
    captions = torch.randint(4, V, (6, 3, 9), generator=generator)
    captions[:, :, 0] = 1
    return torch.randn(6, L, D, generator=generator).bfloat16(), captions, lengths


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def plain_loss(model: Captioner, grid, captions, lengths, dtype: torch.dtype) -> torch.Tensor:
    """The objective by autograd, matrix products in `dtype`: a copy of the grid per caption, padding and all."""
    grid = ((grid * model.feature_scale - model.feature_mean) / model.feature_std).clamp(-5, 5).to(dtype)
    grid, captions, lengths = grid.repeat_interleave(lengths.shape[1], 0), captions.flatten(0, 1), lengths.flatten()
    attention, mean = model.attention, grid.mean(1)
    if attention:
        projection = attention.project(grid)
        h, c = wide(model.init_h(mean)), wide(model.init_c(mean))
    else:
        h, c = plain_lstm(model.word_gates(model.image_word(mean)), 0)
    loss, alpha_sum, drawn = 0, 0, 0
    gain = wide(grid.new_zeros(len(lengths)))  # log-likelihood of each caption, beyond what is expected
    for t in range(int(lengths.max())):
        running = lengths > t
        words = model.embedding(captions[:, t]).to(dtype) * (t > 0 or model.spec.first_input == "start")
        before = h.to(dtype)
        gates = model.word_gates(words) + model.state_gates(before)
        if attention:
            hidden = projection + attention.query(before)[:, None]
            hidden = hidden.tanh() if attention.tanh else hidden.relu()
            alpha = wide(attention.score(hidden).squeeze(2)).softmax(1)
            alpha_sum = alpha_sum + alpha * running[:, None]
            context = grid[:, DRAWN] if model.spec.attention == "hard" else (alpha.to(dtype)[:, None] @ grid).squeeze(1)
            context = context * model.gate(before).sigmoid()
            gates = gates + model.context_gates(context)
        h, c = plain_lstm(gates, c)
        features = h.to(dtype)
        if model.output_state:
            features = words + model.output_state(features)
            features = features + model.output_context(context) if attention else features
        nll = cross_entropy(wide(model.vocabulary(features)), captions[:, t + 1], reduction="none")[running]
        loss = loss + nll.sum()
        if model.spec.attention == "hard":
            log_alpha = alpha.log() * running[:, None]
            drawn = drawn + log_alpha[:, DRAWN]
            gain = gain.index_add(0, running.nonzero()[:, 0], wide(model.reward_baseline) - nll.detach())
            loss = loss + 0.002 * (alpha * log_alpha).sum()
    if model.spec.attention == "hard":
        loss = loss - (gain * drawn).sum()
    loss, deviation = loss / lengths.sum(), (1 - alpha_sum) ** 2
    if model.spec.attention != "soft":
        return loss
    deviation = deviation[lengths > 0]
    return loss + (deviation.sum() / lengths.sum() if model.spec.penalty == "sum" else deviation.mean())


def plain_lstm(gates, c):
    i, f, g, o = wide(gates).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def our_loss(model: Captioner, grid, captions, lengths) -> torch.Tensor:
    sums = loss_sums(model, grid, captions, lengths)
    assert (
        sums.counts["nll"].dtype
        == sums.per_token.dtype
        == torch.promote_types(model.vocabulary.weight.dtype, torch.float32)
    )
    return total_loss(sums, sums.counts["tokens"], sums.counts["captions"])


def loss_and_gradients(model: Captioner, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {"loss": loss.detach().cpu().double()} | {n: g.cpu().double() for n, g in zip(names, gradients, strict=True)}


def autocast(device: str, way: str):
    return torch.autocast(device, torch.bfloat16) if way == "autocast" else contextlib.nullcontext()


@functools.cache
def exact_results(way: str, preset: str, attention: str, seed: int) -> dict[str, torch.Tensor]:
    """In float64, from the same weights: those rounded to bf16 where they are the model's."""
    model = captioner(preset, attention, seed)
    model = (model.bfloat16() if way == "bf16 weights" else model).double()
    return loss_and_gradients(model, plain_loss(model, *batch(seed), torch.float64))


def errors(way: str, preset: str, attention: str, compute, device: str = "cpu", **options) -> dict[str, torch.Tensor]:
    """Root of the summed squares of the errors of bf16 results over all batches, against float64."""
    total: dict[str, torch.Tensor] = {}
    for seed in range(BATCHES_OF_ONE_LOCATION if attention == "hard" else BATCHES):
        exact = exact_results(way, preset, attention, seed)
        model = captioner(preset, attention, seed, **options).to(device)
        model = model.bfloat16() if way == "bf16 weights" else model
        with autocast(device, way):
            loss = compute(model, *(x.to(device) for x in batch(seed)))
        for name, found in loss_and_gradients(model, loss).items():
            total[name] = total.get(name, 0) + (found - exact[name]).square().sum()
    return {name: value.sqrt() for name, value in total.items()}


def plain_in_bf16(model, *arguments):
    return plain_loss(model, *arguments, torch.bfloat16)


@functools.cache
def plain_errors(way: str, preset: str, attention: str) -> dict[str, torch.Tensor]:
    """On the CPU; the plain code knows no kernels of ours."""
    return errors(way, preset, attention, plain_in_bf16)


def assert_no_worse(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, error in theirs.items():
        factor = FACTOR_OF_ONE_NUMBER if name in ("loss", "gate.bias") else FACTOR  # `paper` has one gate
        assert ours[name] <= factor * error, f"{name}: {ours[name] / error}"


@all_attentions
@both_presets
def test_the_plain_code_computes_our_objective(preset, attention, same_draws):
    model = captioner(preset, attention, 0).double()
    expected = loss_and_gradients(model, plain_loss(model, *batch(0), torch.float64))
    for name, found in loss_and_gradients(model, our_loss(model, *batch(0))).items():
        assert (found - expected[name]).norm() <= 1e-9 * expected[name].norm(), name


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@ways
@all_attentions
@both_presets
def test_bf16_loss_and_gradients_err_no_more_than_plain_bf16_code(preset, attention, way, kernels, same_draws):
    ours = errors(way, preset, attention, our_loss, kernels=kernels)
    assert_no_worse(ours, plain_errors(way, preset, attention))


@ways
@all_attentions
@both_presets
@torch.no_grad()
def test_state_logits_and_attention_are_float32_where_matrix_products_are_bf16(preset, attention, way):
    model = captioner(preset, attention, 0).eval()
    model = model.bfloat16() if way == "bf16 weights" else model
    with autocast("cpu", way):
        memory = model.encode(batch(0)[0])
        first = model.init_state(memory)
        logits, state, alpha = model.step(memory, first, torch.full((6, 1), 7))
    assert memory.grid.dtype == memory.projection.dtype == torch.bfloat16
    assert {x.dtype for x in (*first, *state, logits, alpha)} == {torch.float32}
    assert all((x != x.bfloat16()).any() for x in state)  # not rounded on the way either


def test_bf16_weights_leave_the_feature_statistics_in_float32():
    model = make_model(torch.float32)
    mean = model.feature_mean.clone()
    assert torch.equal(model.bfloat16().feature_mean, mean)
    assert model.encode(make_batch()[0]).grid.dtype == torch.bfloat16


@pytest.mark.gpu
@all_attentions
@both_presets
def test_a_gpus_fp32_loss_and_gradients_are_those_of_a_cpu(preset, attention, same_draws):
    model = captioner(preset, attention, 0)
    expected = loss_and_gradients(model, our_loss(model, *batch(0)))
    model = model.cuda()
    found = loss_and_gradients(model, our_loss(model, *(x.cuda() for x in batch(0))))
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.gpu
@ways
@all_attentions
@both_presets
def test_a_gpus_bf16_loss_and_gradients_err_no_more_than_a_cpus(preset, attention, way, same_draws):
    """Against a CPU with the same kernels; the native ones round less."""
    ours = errors(way, preset, attention, our_loss, "cuda")
    assert_no_worse(ours, errors(way, preset, attention, our_loss, kernels="torch"))
