"""The captioner against the paper's equations, written out slowly: one caption, one word at a time, in float64."""

import pytest
import torch

from sat.model.attention import attend_for_inference, attend_hard
from sat.model.captioner import Captioner
from sat.model.loss import total_loss

PAPER = dict(
    state_init="mlp", score="tanh", gate="scalar", output="deep", first_input="zero", penalty="sum",
    weight_init="normal",
)  # fmt: skip
TUTORIAL = dict(
    state_init="linear", score="relu", gate="vector", output="linear", first_input="start", penalty="mean",
    weight_init="uniform",
)  # fmt: skip
ONE_ROW_CHANGED = [PAPER | {key: value} for key, value in TUTORIAL.items()] + [PAPER | {"gate": "none"}]
V, L, D, E, H, A = 13, 6, 7, 5, 4, 3
LENGTHS = torch.tensor([[4, 1, 6], [0, 0, 0], [2, 5, 0], [3, 0, 3]])  # ragged; one image without captions


def make_model(dtype=torch.float64, **settings) -> Captioner:
    torch.manual_seed(3)
    settings = PAPER | {"penalty_weight": 0.7, "dropout": 0.0} | settings
    model = Captioner(
        vocab_size=V, grid_size=L, feature_dim=D, embedding_dim=E, lstm_dim=H, attention_dim=A, **settings
    )
    for parameter in model.parameters():  # the authors' N(0, 0.01) would leave nothing to compare
        torch.nn.init.normal_(parameter, std=0.4)
    model.feature_mean.normal_()
    model.feature_std.uniform_(0.5, 1)
    model.feature_scale.uniform_(0.5, 2)
    return model.to(dtype)


def make_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    grid = torch.randn(len(LENGTHS), L, D, generator=generator, dtype=torch.float64).to(dtype)
    captions = torch.zeros(*LENGTHS.shape, int(LENGTHS.max()) + 1, dtype=torch.int64)
    for b, k in LENGTHS.nonzero().tolist():
        n = int(LENGTHS[b, k])
        captions[b, k, : n + 1] = torch.randint(4, V, (n + 1,), generator=generator)
        captions[b, k, 0], captions[b, k, n] = 1, 2
    return grid, captions, LENGTHS


class Reference:
    """The equations of Xu et al. (2015) for one caption; `p` holds the parameters by name."""

    def __init__(self, model: Captioner, settings: dict, dropout=lambda x: x):
        self.p = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
        self.b = {name: value.double() for name, value in model.named_buffers()}
        self.s = {"attention": "soft", "penalty_weight": 0.7, "label_smoothing": 0.0} | settings
        self.dropout = dropout

    def linear(self, name, x):
        y = self.p[f"{name}.weight"] @ x
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def initial(self, name, mean):
        if self.s["state_init"] == "linear":
            return self.linear(name, mean)
        hidden = self.dropout(torch.relu(self.linear(f"{name}.0", mean)))
        return torch.tanh(self.linear(f"{name}.3", hidden))

    def lstm(self, x_gates, h, c):
        gates = x_gates + self.linear("state_gates", h)
        i, f, o = (torch.sigmoid(gates[n * H : (n + 1) * H]) for n in (0, 1, 3))
        c = f * c + i * torch.tanh(gates[2 * H : 3 * H])
        return o * torch.tanh(c), c

    def alpha(self, grid, h):
        act = torch.tanh if self.s["score"] == "tanh" else torch.relu
        query = self.linear("attention.query", h)
        scores = [self.linear("attention.score", act(self.linear("attention.project", a) + query))[0] for a in grid]
        return torch.stack(scores).softmax(0)

    def caption(self, grid, tokens, choose=None, own_words=False):
        """Of one caption (tokens with <start> and <end>): objective per token, objective per caption, NLL, logits."""
        b, attends = self.b, self.s["attention"] != "none"
        grid = ((grid.double() * b["feature_scale"] - b["feature_mean"]) / b["feature_std"]).clamp(-5, 5)
        mean = sum(grid) / len(grid)
        if attends:
            h, c = self.initial("init_h", mean), self.initial("init_c", mean)
        else:
            word = self.linear("image_word", mean)
            h, c = self.lstm(self.linear("word_gates", word), torch.zeros(H).double(), torch.zeros(H).double())
        alpha_sum, objective, nll_sum, all_logits = torch.zeros(L).double(), 0.0, 0.0, []
        for t, target in enumerate(tokens[1:]):
            fed = all_logits[-1].argmax() if own_words and t else tokens[t]
            word = self.p["embedding.weight"][fed]
            if t == 0 and self.s["first_input"] == "zero":
                word = torch.zeros(E).double()
            x_gates = self.linear("word_gates", word)
            if attends:
                alpha = self.alpha(grid, h)
                alpha_sum = alpha_sum + alpha
                chosen = None if choose is None else choose(alpha)
                context = sum(a * w for a, w in zip(grid, alpha, strict=True)) if chosen is None else grid[chosen]
                if self.s["gate"] != "none":
                    context = torch.sigmoid(self.linear("gate", h)) * context
                x_gates = x_gates + self.linear("context_gates", context)
            h, c = self.lstm(x_gates, h, c)
            features = h
            if self.s["output"] == "deep":
                features = word + self.linear("output_state", h)
                features = features + self.linear("output_context", context) if attends else features
            all_logits.append(self.linear("vocabulary", features))
            log_p = self.linear("vocabulary", self.dropout(features)).log_softmax(0)
            smooth = self.s["label_smoothing"]
            objective = objective - (1 - smooth) * log_p[target] - smooth * log_p.sum() / V
            nll_sum = nll_sum - log_p[target].detach()
            if self.s["attention"] == "hard":
                if chosen is not None:
                    reward = (b["reward_baseline"] + log_p[target].detach()) / 10
                    objective = objective - reward * alpha[chosen].log()
                objective = objective + 0.002 * (alpha * alpha.log()).sum()
        if self.s["attention"] != "soft":
            return objective, 0.0, nll_sum, all_logits
        deviation = (1 - alpha_sum) ** 2
        if self.s["penalty"] == "sum":
            return objective + self.s["penalty_weight"] * deviation.sum(), 0.0, nll_sum, all_logits
        return objective, self.s["penalty_weight"] * deviation.mean(), nll_sum, all_logits

    def batch(self, grid, captions, lengths, **how):
        per_token = per_caption = nll = 0.0
        for b, k in lengths.nonzero().tolist():
            sums = self.caption(grid[b], captions[b, k, : lengths[b, k] + 1].tolist(), **how)
            per_token, per_caption, nll = per_token + sums[0], per_caption + sums[1], nll + sums[2]
        return per_token, per_caption, nll

    def gradients(self, loss):
        return dict(zip(self.p, torch.autograd.grad(loss, list(self.p.values())), strict=True))


def assert_same(model, settings, *, tolerance, dropout=lambda x: x, sampling=0.0, **how):
    dtype = model.vocabulary.weight.dtype
    grid, captions, lengths = make_batch(dtype)
    reference = Reference(model, settings, dropout)
    per_token, per_caption, nll = reference.batch(grid, captions, lengths, **how)
    tokens, rows = int(lengths.sum()), int((lengths > 0).sum())
    expected = per_token / tokens + per_caption / rows
    sums = model(grid, captions, lengths, sampling)
    loss = total_loss(sums, sums.tokens, sums.captions)
    loss.backward()
    assert (int(sums.tokens), int(sums.captions)) == (tokens, rows)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert sums.nll.item() == pytest.approx(nll.item(), rel=tolerance)
    for name, gradient in reference.gradients(expected).items():
        difference = (model.get_parameter(name).grad - gradient).norm()
        assert difference <= tolerance * max(gradient.norm(), 1e-3), name


@pytest.mark.parametrize("compile", ["never", "auto"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("attention", ["soft", "none"])
@pytest.mark.parametrize("preset", [PAPER, TUTORIAL], ids=["paper", "tutorial"])
def test_loss_and_every_gradient_are_those_of_the_equations(preset, attention, dtype, tolerance, compile):
    settings = preset | {"attention": attention}
    assert_same(make_model(dtype, compile=compile, **settings), settings, tolerance=tolerance)


@pytest.mark.parametrize("settings", ONE_ROW_CHANGED, ids=lambda s: "-".join(s.values()))
def test_each_setting_alone_follows_the_equations(settings):
    assert_same(make_model(**settings), settings, tolerance=1e-6)


@pytest.mark.parametrize("preset", [PAPER, TUTORIAL], ids=["paper", "tutorial"])
@pytest.mark.parametrize("drawn", [True, False], ids=["location drawn", "alpha itself"])
def test_hard_attention_has_the_reinforce_gradient_of_its_draws(preset, drawn, monkeypatch):
    def third_quantile(alpha):
        return (alpha.cumsum(-1) < 0.7).sum(-1).clamp_max(L - 1)

    monkeypatch.setattr(torch, "multinomial", lambda p, n: third_quantile(p)[:, None])
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.9 if drawn else 0.1))
    settings = preset | {"attention": "hard"}
    model = make_model(**settings)
    model.reward_baseline.fill_(1.5)
    assert_same(model, settings, tolerance=1e-6, choose=third_quantile if drawn else None)


def test_hard_attention_draws_from_alpha_for_half_of_the_captions():
    model = make_model(**PAPER | {"attention": "hard"})
    memory = model.encode(torch.randn(1, L, D).double())
    query = torch.randn(1, 1, A).double().expand(1, 20_000, A)
    never_exact = torch.zeros(1, 20_000, dtype=torch.bool)
    attended = attend_hard(model.attention, memory.grid, memory.projection, query, never_exact)
    frequency = attended.chosen[0].bincount(minlength=L) / 20_000
    assert torch.allclose(frequency.double(), attended.alpha[0, 0], atol=0.02)
    assert torch.equal(attended.context[0], memory.grid[0, attended.chosen[0]])


def test_the_reward_baseline_moves_a_tenth_of_the_way():
    model = make_model(**PAPER | {"attention": "hard"})
    model.update_baseline(torch.tensor(4.0))
    model.update_baseline(torch.tensor(2.0))
    assert model.reward_baseline.item() == pytest.approx(0.9 * 0.4 + 0.1 * 2.0)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_mixes_the_targets_with_the_uniform_distribution(smoothing):
    settings = PAPER | {"label_smoothing": smoothing}
    assert_same(make_model(**settings), settings, tolerance=1e-6)


@pytest.mark.parametrize("attention", ["soft", "none"])
def test_full_scheduled_sampling_feeds_only_the_models_own_words(attention):
    settings = PAPER | {"attention": attention}
    assert_same(make_model(**settings), settings, tolerance=1e-6, sampling=1.0, own_words=True)


@pytest.mark.parametrize("preset", [PAPER, TUTORIAL], ids=["paper", "tutorial"])
def test_dropout_sits_on_the_initial_hidden_layer_and_before_the_vocabulary(preset, monkeypatch):
    def dropout(x, *_):
        return x * 1.5

    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training, inplace: dropout(x) if training else x)
    assert_same(make_model(**preset), preset, tolerance=1e-6, dropout=dropout)
    model = make_model(**preset).eval()
    grid, captions, lengths = make_batch()
    nll = Reference(model, preset).batch(grid, captions, lengths)[2]
    assert model(grid, captions, lengths).nll.item() == pytest.approx(nll.item())


@pytest.mark.parametrize("attention", ["soft", "none"])
@pytest.mark.parametrize("preset", [PAPER, TUTORIAL], ids=["paper", "tutorial"])
@pytest.mark.parametrize("compile", ["never", "auto"])
@torch.no_grad()
def test_forward_equals_decoding_step_by_step(preset, attention, compile):
    model = make_model(compile=compile, **preset | {"attention": attention}).eval()
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
    assert model(grid, captions, lengths).nll.item() == pytest.approx(nll.item(), rel=1e-9)


def test_hard_attention_decodes_by_expectation_sampling_or_argmax():
    contexts = {}
    for how in ("expectation", "sample", "argmax"):
        model = make_model(**PAPER | {"attention": "hard", "hard_inference": how}).eval()
        memory = model.encode(make_batch()[0])
        query = torch.randn(len(LENGTHS), 2, A).double() * 9
        attended = attend_for_inference(model.attention, memory.grid, memory.projection, query, how)
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


@pytest.mark.parametrize("preset", [PAPER, TUTORIAL], ids=["paper", "tutorial"])
def test_captions_sharing_a_grid_count_as_captions_with_a_copy_each(preset):
    grid, captions, lengths = make_batch()
    shared, copies = make_model(**preset), make_model(**preset)
    K = lengths.shape[1]
    gradients = []
    for model, batch in (
        (shared, (grid, captions, lengths)),
        (copies, (grid.repeat_interleave(K, 0), captions.flatten(0, 1)[:, None], lengths.flatten()[:, None])),
    ):
        sums = model(*batch)
        total_loss(sums, 10, 4).backward()
        gradients.append([sums.per_token, sums.per_caption, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("preset", [PAPER, TUTORIAL], ids=["paper", "tutorial"])
def test_sums_and_gradients_of_two_half_batches_add_up_to_those_of_the_whole(preset):
    grid, captions, lengths = make_batch()
    whole, halves = make_model(**preset), make_model(**preset)
    expected = whole(grid, captions, lengths)
    total_loss(expected, expected.tokens, expected.captions).backward()
    sums = []
    for part in (slice(0, 1), slice(1, 2), slice(2, None)):  # the middle one has no caption
        sums.append(halves(grid[part], captions[part], lengths[part]))
        total_loss(sums[-1], expected.tokens, expected.captions).backward()
    for name, value in expected._asdict().items():
        assert sum(getattr(s, name).item() for s in sums) == pytest.approx(value.item(), rel=1e-9), name
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("attention", ["soft", "hard", "none"])
@pytest.mark.parametrize("preset", [PAPER, TUTORIAL], ids=["paper", "tutorial"])
@pytest.mark.parametrize("lengths", [[[0, 0]], [[1, 0]]], ids=["no caption", "only <end>"])
def test_every_parameter_gets_a_gradient_whatever_the_batch(preset, attention, lengths):
    model = make_model(**preset | {"attention": attention})
    lengths = torch.tensor(lengths)
    captions = torch.tensor([[[1, 2], [0, 0]]]) * (lengths > 0)[..., None]
    sums = model(torch.randn(1, L, D), captions, lengths)
    total_loss(sums, 1, 1).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if not lengths.sum():
        assert sums.per_token.item() == 0 and all(p.grad.count_nonzero() == 0 for p in model.parameters())


@pytest.mark.parametrize("attention", ["soft", "hard", "none"])
@pytest.mark.parametrize("preset", [PAPER, TUTORIAL], ids=["paper", "tutorial"])
def test_bf16_by_autocast_and_by_bf16_weights_stays_near_float32(preset, attention):
    settings = preset | {"attention": attention}
    grid, captions, lengths = make_batch(torch.bfloat16)
    expected = make_model(torch.float32, **settings)(grid, captions, lengths).nll.item()
    with torch.autocast("cpu", torch.bfloat16):
        cast = make_model(torch.float32, **settings)(grid, captions, lengths)
    weights = make_model(torch.bfloat16, **settings)(grid, captions, lengths)
    for sums in (cast, weights):
        assert sums.nll.dtype == sums.per_token.dtype == torch.float32
        # hard attention may draw other locations where alpha is rounded otherwise
        assert sums.nll.item() == pytest.approx(expected, rel=0.15 if attention == "hard" else 0.02)


def test_bf16_weights_leave_the_feature_statistics_in_float32():
    model = make_model(torch.float32)
    mean = model.feature_mean.clone()
    assert torch.equal(model.bfloat16().feature_mean, mean)
    assert model.encode(make_batch()[0]).grid.dtype == torch.bfloat16


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
    loss = total_loss(model(grid, captions, lengths), 1, 1)
    loss.backward()
    leaf = grid.detach().clone().requires_grad_()
    sums = Reference(model, PAPER).batch(leaf, captions, lengths)
    (sums[0] + sums[1]).backward()
    assert (grid.grad - leaf.grad).norm() < 1e-6 * leaf.grad.norm()


def test_the_authors_initial_weights_are_small_normal_with_orthogonal_recurrent_blocks():
    torch.manual_seed(0)
    model = Captioner(vocab_size=50, grid_size=L, feature_dim=64, embedding_dim=32, lstm_dim=32, attention_dim=16)
    for block in model.state_gates.weight.chunk(4):
        assert torch.allclose(block @ block.T, torch.eye(32), atol=1e-5)
    others = [p for name, p in model.named_parameters() if "bias" not in name and name != "state_gates.weight"]
    assert all(0.005 < p.std() < 0.015 for p in others)
    assert all(p.count_nonzero() == 0 for name, p in model.named_parameters() if "bias" in name)


def test_wrong_shapes_are_refused_with_the_expected_ones():
    model, (grid, captions, lengths) = make_model(), make_batch()
    with pytest.raises(ValueError, match=r"grid \[B, 6, 7\] expected, got \[4, 5, 7\]"):
        model(grid[:, :5], captions, lengths)
    with pytest.raises(ValueError, match="lengths must be 0 .. 3"):
        model(grid, captions[:, :, :4], lengths)
    with pytest.raises(ValueError, match=r"captions \[B, K, T\]"):
        model(grid, captions[:, 0], lengths)
