"""The objective: sums that add up over any split of a batch, and a micro-batch without captions that weighs nothing."""

import copy

import pytest
import torch

from sat.model.captioner import Captioner
from sat.model.encoders.end_to_end import EndToEnd
from sat.model.encoders.resnet import ResNet
from sat.model.loss import total_loss
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import CaptionerSpec, Sizes
from tests.helpers_captioner import (
    PAPER,
    D,
    L,
    all_attentions,
    both_presets,
    draw_by_quantile,
    loss_sums,
    make_batch,
    make_model,
)


@pytest.mark.parametrize("attention, follows", [("hard", ("nll", "tokens")), ("soft", ()), ("none", ())])
def test_hard_attention_alone_follows_counts(attention, follows):
    assert TeacherForcing(make_model(attention=attention)).follows == follows


def test_the_reward_baseline_moves_a_tenth_of_the_way():
    model = make_model(**PAPER | {"attention": "hard"})
    objective = TeacherForcing(model)
    assert objective.follows == ("nll", "tokens")
    objective.after_step({"nll": 40.0, "tokens": 10})
    objective.after_step({"nll": 14.0, "tokens": 7})
    objective.after_step({"nll": 0.0, "tokens": 0})  # a global batch without captions says nothing
    assert model.reward_baseline.item() == pytest.approx(0.9 * 0.4 + 0.1 * 2.0)


@pytest.mark.parametrize("same_length", [3, 5])
def test_the_mean_of_weight_w_is_the_sum_of_w_words_over_cells(same_length):
    grid, captions, lengths = make_batch()
    lengths = torch.full_like(lengths, same_length)
    captions[..., : same_length + 1] = captions[..., : same_length + 1].clamp_min(4)
    losses = []
    for penalty, weight in (("mean", 0.7), ("sum", 0.7 * same_length / L)):
        sums = loss_sums(make_model(**PAPER | {"penalty": penalty, "penalty_weight": weight}), grid, captions, lengths)
        losses.append(total_loss(sums, sums.counts["tokens"], sums.counts["captions"]).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def named(sums):
    return sums.counts | {"per_token": sums.per_token, "per_caption": sums.per_caption}


@all_attentions
@both_presets
def test_sums_and_gradients_of_parts_of_a_batch_add_up_to_those_of_the_whole(preset, attention, monkeypatch):
    draw_by_quantile(monkeypatch)
    grid, captions, lengths = make_batch()
    whole, parts = (make_model(**preset | {"attention": attention}) for _ in range(2))
    expected = loss_sums(whole, grid, captions, lengths)
    tokens, rows = expected.counts["tokens"], expected.counts["captions"]
    total_loss(expected, tokens, rows).backward()
    sums = []
    for part in (slice(0, 1), slice(1, 2), slice(2, None)):  # the middle one has no caption
        sums.append(loss_sums(parts, grid[part], captions[part], lengths[part]))
        total_loss(sums[-1], tokens, rows).backward()
    for name, value in named(expected).items():
        assert sum(named(each)[name].item() for each in sums) == pytest.approx(value.item(), rel=1e-9), name
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@all_attentions
@both_presets
@pytest.mark.parametrize("lengths", [[[0, 0]], [[1, 0]]], ids=["no caption", "only <end>"])
def test_every_parameter_gets_a_gradient_whatever_the_batch(preset, attention, lengths):
    model = make_model(**preset | {"attention": attention})
    lengths = torch.tensor(lengths)
    captions = torch.tensor([[[1, 2], [0, 0]]]) * (lengths > 0)[..., None]
    sums = loss_sums(model, torch.randn(1, L, D), captions, lengths)
    total_loss(sums, 1, 1).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if not lengths.sum():
        assert sums.per_token.item() == 0 and all(p.grad.count_nonzero() == 0 for p in model.parameters())


def ends(sums) -> list:
    return [value.grad_fn for value in (sums.per_token, sums.per_caption) if value.requires_grad]


def operations(ends: list) -> list[str]:
    """The names of all that the backward pass meets."""
    found, seen, waiting = [], set(), list(ends)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node.name())
            waiting += [before for before, _ in node.next_functions]
    return found


@pytest.mark.parametrize("sampling", [0.0, 0.5])
@all_attentions
@both_presets
def test_without_captions_the_graph_is_that_of_any_batch_and_every_gradient_exactly_zero(preset, attention, sampling):
    settings = preset | {"attention": attention, "dropout": 0.3}
    grid, captions, lengths = make_batch()
    full, empty = make_model(**settings), make_model(**settings)
    one = loss_sums(full, grid[:1], captions[:1, :1], torch.tensor([[1]]), sampling)
    total_loss(loss_sums(full, grid, captions, lengths, sampling), 1, 1).backward()
    before = copy.deepcopy(empty.state_dict())
    nothing = loss_sums(empty, torch.zeros_like(grid), torch.zeros_like(captions), torch.zeros_like(lengths), sampling)
    assert {weight.name() for weight in ends(nothing)} == {"MulBackward0"}
    assert operations([weight.next_functions[0][0] for weight in ends(nothing)]) == operations(ends(one))
    total_loss(nothing, 7, 3).backward()
    with_gradient = {name for name, parameter in full.named_parameters() if parameter.grad is not None}
    assert {name for name, parameter in empty.named_parameters() if parameter.grad is not None} == with_gradient
    assert all(parameter.grad.count_nonzero() == 0 for parameter in empty.parameters())
    assert all(value.item() == 0 for value in named(nothing).values())
    assert {name: value.dtype for name, value in named(nothing).items()} == {
        name: value.dtype for name, value in named(one).items()
    }
    assert all(torch.equal(value, before[name]) for name, value in empty.state_dict().items())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_without_captions_no_batchnorm_moves_and_the_encoder_gets_its_zeros(checkpointing):
    torch.manual_seed(0)
    encoder = ResNet(stage=2).open_for_training([1, 2], freeze_batchnorm=False, checkpointing=checkpointing)
    spec = CaptionerSpec.of_preset("tutorial", embedding_dim=4, lstm_dim=4, attention_dim=4)
    model = EndToEnd(encoder, Captioner(spec, Sizes(11, 16, 512))).double().train()
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    captions, lengths = torch.randint(4, 11, (2, 2, 5)), torch.tensor([[4, 2], [3, 1]])
    total_loss(TeacherForcing(other)(images, captions, lengths), 1, 1).backward()
    sums = TeacherForcing(model)(torch.zeros_like(images), captions, torch.zeros_like(lengths))
    total_loss(sums, 1, 1).backward()
    expected = {name for name, parameter in other.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("encoder.layer1") for name in expected)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    assert all(model.get_parameter(name).grad.count_nonzero() == 0 for name in expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.encoder.layer1[0].bn1.training
