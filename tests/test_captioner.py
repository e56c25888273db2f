"""The captioner against the paper's equations, written out slowly: one caption, one word at a time, in float64."""

import pytest
import torch

from sat.model import captioner
from sat.model.attention import attend_for_inference, attend_hard
from sat.model.captioner import Captioner
from sat.model.draws import Draws
from sat.model.loss import total_loss
from sat.model.objectives.rollout import roll_out
from sat.model.packing import pack
from sat.model.spec import PRESETS, CaptionerSpec, Sizes
from tests.helpers_captioner import (
    LENGTHS,
    PAPER,
    TUTORIAL,
    A,
    D,
    H,
    L,
    Reference,
    V,
    all_attentions,
    assert_same,
    both_presets,
    draw_by_quantile,
    loss_sums,
    make_batch,
    make_model,
    third_quantile,
)

CHANGED = {key: value for key, value in TUTORIAL.items() if value != PAPER[key]}
ONE_ROW_CHANGED = [PAPER | {key: value} for key, value in CHANGED.items()] + [PAPER | {"gate": "none"}]


CAPTIONS = 2000


def many_captions(model, sampling_probability):
    """2,000 captions of one image, half of six words and half of three, rolled out; none holds word 5."""
    lengths = torch.tensor([[6, 3] * (CAPTIONS // 2)])
    captions = torch.randint(6, V, (1, CAPTIONS, 7))
    captions[:, :, 0] = 1
    packing = pack(captions, lengths)
    memory = model.encode(make_batch()[0][:1], packing.images)
    return packing, roll_out(model, memory, Draws.of(None, packing), sampling_probability)


def test_the_presets_are_the_columns_of_the_table_of_differences():
    assert PRESETS["paper"] == {
        "state_init": "mlp",
        "score": "tanh",
        "gate": "scalar",
        "output": "deep",
        "first_input": "zero",
        "penalty": "sum",
        "penalty_weight": 1.0,
        "weight_init": "normal",
    }
    assert PRESETS["tutorial"] == {
        "state_init": "linear",
        "score": "relu",
        "gate": "vector",
        "output": "linear",
        "first_input": "start",
        "penalty": "mean",
        "penalty_weight": 1.0,
        "weight_init": "uniform",
    }


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("attention", ["soft", "none"])
@both_presets
def test_loss_and_every_gradient_are_those_of_the_equations(preset, attention, dtype, tolerance, kernels):
    settings = preset | {"attention": attention}
    assert_same(make_model(dtype, kernels=kernels, **settings), settings, tolerance=tolerance)


@pytest.mark.parametrize("settings", ONE_ROW_CHANGED, ids=lambda s: "-".join(map(str, s.values())))
def test_each_setting_alone_follows_the_equations(settings):
    assert_same(make_model(**settings), settings, tolerance=1e-6)


@both_presets
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reward", ["caption", "later", "word", "mean", "alpha itself"])
def test_hard_attention_has_the_reinforce_gradient_of_its_draws(preset, reward, dtype, tolerance, monkeypatch):
    drawn = reward != "alpha itself"
    draw_by_quantile(monkeypatch, drawn)
    settings = preset | {"attention": "hard"} | ({"hard_reward": reward} if drawn else {})
    model = make_model(dtype, **settings)
    model.reward_baseline.fill_(1.5)
    assert_same(model, settings, tolerance=tolerance, choose=third_quantile if drawn else None)


def test_hard_attention_uses_alpha_itself_for_half_of_the_captions_and_all_their_words():
    model = make_model(attention="hard")
    packing, rollout = many_captions(model, sampling_probability=0.0)
    exact = rollout.chosen == -1
    words = torch.zeros(CAPTIONS).index_add(0, packing.word_row, torch.ones(len(exact)))
    share = torch.zeros(CAPTIONS).index_add(0, packing.word_row, exact.float()) / words
    assert set(share.tolist()) == {0.0, 1.0}
    assert share.mean().item() == pytest.approx(0.5, abs=4 * 0.5 / CAPTIONS**0.5)
    assert rollout.chosen[~exact].unique().tolist() == list(range(L))


def test_hard_attention_draws_its_locations_from_alpha():
    model = make_model(**PAPER | {"attention": "hard"})
    memory = model.encode(torch.randn(1, L, D).double())
    query = torch.randn(1, 1, A).double().expand(1, 20_000, A)
    never_exact = torch.zeros(1, 20_000, dtype=torch.bool)
    uniform = torch.rand(1, 20_000, dtype=torch.float64)
    attended = attend_hard(model.attention, memory.grid, memory.projection, query, never_exact, uniform)
    frequency = attended.chosen[0].bincount(minlength=L) / 20_000
    assert torch.allclose(frequency.double(), attended.alpha[0, 0], atol=0.02)
    assert torch.equal(attended.context[0], memory.grid[0, attended.chosen[0]])


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_label_smoothing_mixes_the_targets_with_the_uniform_distribution(smoothing):
    settings = PAPER | {"label_smoothing": smoothing}
    assert_same(make_model(**settings), settings, tolerance=1e-6)


@pytest.mark.parametrize("attention", ["soft", "none"])
def test_full_scheduled_sampling_feeds_only_the_models_own_words(attention):
    settings = PAPER | {"attention": attention}
    assert_same(make_model(**settings), settings, tolerance=1e-6, sampling=1.0, own_words=True)


def test_scheduled_sampling_decides_word_by_word():
    """The model's own word is always word 5, which no caption holds; a caption's first input is never replaced."""
    model, p = make_model(), 0.3
    with torch.no_grad():
        model.vocabulary.bias[5] += 1e3
    packing, rollout = many_captions(model, sampling_probability=p)
    own = (rollout.words == model.embed(torch.tensor(5))).all(1)
    assert torch.equal(rollout.words[~own], model.embed(packing.inputs)[~own])
    steps = own[packing.word_row < CAPTIONS // 2].view(-1, CAPTIONS // 2).double()  # [T, captions] of the longer half
    assert len(steps) == 6 and steps[0].sum() == 0
    pairs = steps[1:-1] * steps[2:]  # a word and the next: independent, and so are those of two captions
    for shares, expected in ((steps[1:].mean(1), p), (pairs.mean(1), p * p)):
        sigma = (expected * (1 - expected) / (CAPTIONS // 2)) ** 0.5
        assert shares.tolist() == pytest.approx([expected] * len(shares), abs=4 * sigma)


@both_presets
def test_dropout_sits_on_the_initial_hidden_layer_and_before_the_vocabulary(preset, monkeypatch):
    def dropout(x, *_):
        return x * 1.5

    monkeypatch.setattr(captioner, "dropout", dropout)
    assert_same(make_model(**preset, dropout=0.5), preset, tolerance=1e-6, dropout=dropout)
    model = make_model(**preset, dropout=0.5).eval()
    grid, captions, lengths = make_batch()
    nll = Reference(model, preset).batch(grid, captions, lengths)[2]
    assert loss_sums(model, grid, captions, lengths).counts["nll"].item() == pytest.approx(nll.item())


@pytest.mark.parametrize("attention", ["soft", "none"])
@both_presets
@pytest.mark.parametrize("kernels", ["torch", "auto"])
@torch.no_grad()
def test_forward_equals_decoding_step_by_step(preset, attention, kernels):
    model = make_model(kernels=kernels, **preset | {"attention": attention}).eval()
    grid, captions, lengths = make_batch()
    memory = model.encode(grid)
    state, nll = model.init_state(memory), torch.zeros(()).double()
    assert state.h.shape == state.c.shape == (len(grid), 1, H)
    for t in range(int(lengths.max())):
        state = type(state)(*(s.expand(-1, captions.shape[1], -1) for s in state))
        logits, state, alpha = model.step(memory, state, captions[:, :, t])
        assert alpha.shape == (*lengths.shape, L) and torch.allclose(alpha.sum(-1), torch.ones(()).double())
        log_p = logits.log_softmax(-1).gather(2, captions[:, :, t + 1, None]).squeeze(2)
        nll -= log_p[lengths > t].sum()
    assert loss_sums(model, grid, captions, lengths).counts["nll"].item() == pytest.approx(nll.item(), rel=1e-9)


def test_hard_attention_decodes_by_expectation_sampling_or_argmax():
    contexts = {}
    for how in ("expectation", "sample", "argmax"):
        model = make_model(**PAPER | {"attention": "hard", "hard_inference": how}).eval()
        memory = model.encode(make_batch()[0])._replace(keys=torch.arange(len(LENGTHS)))
        query, numbers = torch.randn(len(LENGTHS), 2, A).double() * 9, torch.rand(len(LENGTHS), 2).double()
        attended = attend_for_inference(model.attention, memory.grid, memory.projection, query, how, uniform=numbers)
        contexts[how] = attended.context
        logits, _, alpha = model.step(memory, model.init_state(memory), torch.ones(len(LENGTHS), 1, dtype=torch.int64))
        assert logits.shape == (len(LENGTHS), 1, V) and torch.allclose(alpha.sum(-1), torch.ones(()).double())
        if how == "expectation":
            assert torch.allclose(attended.context, attended.alpha @ memory.grid)
        else:
            rows = torch.arange(len(LENGTHS))[:, None]
            assert torch.equal(attended.context, memory.grid[rows, attended.chosen])
        if how == "argmax":
            assert torch.equal(attended.chosen, attended.alpha.argmax(2))


@all_attentions
@both_presets
def test_captions_sharing_a_grid_count_as_captions_with_a_copy_each(preset, attention, monkeypatch):
    draw_by_quantile(monkeypatch)
    grid, captions, lengths = make_batch()
    shared, copies = (make_model(**preset | {"attention": attention}) for _ in range(2))
    K = lengths.shape[1]
    gradients = []
    for model, batch in (
        (shared, (grid, captions, lengths)),
        (copies, (grid.repeat_interleave(K, 0), captions.flatten(0, 1)[:, None], lengths.flatten()[:, None])),
    ):
        sums = loss_sums(model, *batch)
        total_loss(sums, 10, 4).backward()
        gradients.append([sums.per_token, sums.per_caption, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_features_are_standardised_by_the_stored_statistics_and_clamped():
    model = make_model(torch.float32)
    stored = torch.randint(-128, 128, (2, L, D), dtype=torch.int8)
    expected = (stored * model.feature_scale - model.feature_mean) / model.feature_std
    grid = model.encode(stored).grid
    assert torch.allclose(grid, expected.clamp(-5, 5), atol=1e-4) and grid.abs().max() == 5


def test_gradients_reach_the_grid_for_end_to_end_training():
    grid, captions, lengths = make_batch()
    grid.requires_grad_()
    model = make_model()
    loss = total_loss(loss_sums(model, grid, captions, lengths), 1, 1)
    loss.backward()
    leaf = grid.detach().clone().requires_grad_()
    sums = Reference(model, PAPER).batch(leaf, captions, lengths)
    (sums[0] + sums[1]).backward()
    assert (grid.grad - leaf.grad).norm() < 1e-6 * leaf.grad.norm()


def test_the_authors_initial_weights_are_small_normal_with_orthogonal_recurrent_blocks():
    torch.manual_seed(0)
    model = Captioner(CaptionerSpec(embedding_dim=32, lstm_dim=32, attention_dim=16), Sizes(50, L, 64))
    for block in model.state_gates.weight.chunk(4):
        assert torch.allclose(block @ block.T, torch.eye(32), atol=1e-5)
    others = [p for name, p in model.named_parameters() if "bias" not in name and name != "state_gates.weight"]
    assert all(0.005 < p.std() < 0.015 for p in others)
    assert all(p.count_nonzero() == 0 for name, p in model.named_parameters() if "bias" in name)


def test_uniform_initial_weights_are_a_tenth_for_words_and_torchs_own_elsewhere():
    torch.manual_seed(0)
    spec = CaptionerSpec(embedding_dim=48, lstm_dim=40, attention_dim=32, weight_init="uniform")
    model = Captioner(spec, Sizes(500, L, 64))
    assert model.vocabulary.bias.count_nonzero() == 0
    bounds = {"embedding.weight": 0.1, "vocabulary.weight": 0.1}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            for kind, _ in module.named_parameters():
                bounds.setdefault(f"{name}.{kind}", module.in_features**-0.5)
    assert bounds.keys() == dict(model.named_parameters()).keys()
    for name, bound in bounds.items():
        values = model.get_parameter(name).detach().flatten()
        assert values.abs().max() <= bound, name
        if len(values) > 30 and name != "vocabulary.bias":
            spread = bound / 3**0.5
            assert values.mean().item() == pytest.approx(0, abs=4 * spread / len(values) ** 0.5), name
            assert values.std().item() == pytest.approx(spread, rel=2 / len(values) ** 0.5), name


def test_wrong_shapes_are_refused_with_the_expected_ones():
    model, (grid, captions, lengths) = make_model(), make_batch()
    with pytest.raises(ValueError, match=r"grid \[B, 6, 7\] expected, got \[4, 5, 7\]"):
        loss_sums(model, grid[:, :5], captions, lengths)
    with pytest.raises(ValueError, match="lengths must be 0 .. 3"):
        loss_sums(model, grid, captions[:, :, :4], lengths)
    with pytest.raises(ValueError, match=r"captions \[B, K, T\]"):
        loss_sums(model, grid, captions[:, 0], lengths)
