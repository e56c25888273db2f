"""The paper's equations written out slowly, one caption and one word at a time in float64, and a small model."""

import pytest
import torch

from sat.model import attention
from sat.model.captioner import Captioner
from sat.model.loss import LossSums, total_loss
from sat.model.objectives import rollout
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import PRESETS, CaptionerSpec, Sizes

PAPER, TUTORIAL = (PRESETS[name] | {"penalty_weight": 0.7} for name in ("paper", "tutorial"))
both_presets = pytest.mark.parametrize("preset", [PAPER, TUTORIAL], ids=["paper", "tutorial"])
all_attentions = pytest.mark.parametrize("attention", ["soft", "hard", "none"])
V, L, D, E, H, A = 13, 6, 7, 5, 4, 3
LENGTHS = torch.tensor([[4, 1, 6], [0, 0, 0], [2, 5, 0], [3, 0, 3]])  # ragged; one image without captions


def make_model(dtype=torch.float64, **settings) -> Captioner:
    torch.manual_seed(3)
    settings = PAPER | {"dropout": 0.0, "embedding_dim": E, "lstm_dim": H, "attention_dim": A} | settings
    kernels = settings.pop("kernels", "auto")
    model = Captioner(CaptionerSpec(**settings), Sizes(V, L, D), kernels)
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


def loss_sums(model, grid, captions, lengths, sampling=0.0) -> LossSums:
    return TeacherForcing(model)(grid, captions, lengths, sampling)


class Reference:
    """The equations of Xu et al. (2015) for one caption; `p` holds the parameters by name."""

    def __init__(self, model: Captioner, settings: dict, dropout=lambda x: x):
        self.p = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
        self.b = {name: value.double() for name, value in model.named_buffers()}
        self.s = {"attention": "soft", "label_smoothing": 0.0, "hard_reward": "caption"} | settings
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
        drawn, gains = [], []  # of each word: log alpha of its location, log-likelihood beyond the baseline
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
                    drawn.append(alpha[chosen].log())
                gains.append(log_p[target].detach() + b["reward_baseline"])
                objective = objective + 0.002 * (alpha * alpha.log()).sum()
        objective = objective - self.rewarded(drawn, gains)
        if self.s["attention"] != "soft":
            return objective, 0.0, nll_sum, all_logits
        deviation = (1 - alpha_sum) ** 2
        if self.s["penalty"] == "sum":
            return objective + self.s["penalty_weight"] * deviation.sum(), 0.0, nll_sum, all_logits
        return objective, self.s["penalty_weight"] * deviation.mean(), nll_sum, all_logits

    def rewarded(self, drawn, gains):
        """Sum over the words of log alpha of the location drawn, times its reward."""
        total = 0.0
        for t, log_alpha in enumerate(drawn):
            words = {"caption": gains, "mean": gains, "later": gains[t:], "word": gains[t : t + 1]}
            reward = sum(words[self.s["hard_reward"]]) / (len(gains) if self.s["hard_reward"] == "mean" else 1)
            total = total + reward * log_alpha
        return total

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
    sums = loss_sums(model, grid, captions, lengths, sampling)
    counts = sums.counts
    loss = total_loss(sums, counts["tokens"], counts["captions"])
    loss.backward()
    assert (int(counts["tokens"]), int(counts["captions"])) == (tokens, rows)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert counts["nll"].item() == pytest.approx(nll.item(), rel=tolerance)
    for name, gradient in reference.gradients(expected).items():
        difference = (model.get_parameter(name).grad - gradient).norm()
        assert difference <= tolerance * max(gradient.norm(), 1e-3), name


def third_quantile(alpha):
    """A location that depends on alpha and on nothing else."""
    return (alpha.cumsum(-1) < 0.7).sum(-1).clamp_max(L - 1)


def draw_by_quantile(monkeypatch, drawn: bool = True) -> None:
    """Hard attention draws that location for every caption, or uses alpha itself."""
    monkeypatch.setattr(attention, "drawn_location", lambda alpha, _: third_quantile(alpha))
    monkeypatch.setattr(rollout, "uniform", lambda keys: torch.full(keys.shape, 0.9 if drawn else 0.1))
