"""The decoder of Show, Attend and Tell: an LSTM that looks at the image's grid before every word.

Both the paper and its popular re-implementation are settings of this one module (names as in `sat.config.ModelConfig`).
Surprising: without autocast the type of the weights decides (so weights cast to bf16 compute in bf16, whatever the
features' type); LSTM state, softmax and sums are float32 or wider in any case.

B images, K captions per image, k beams per image, T steps, L locations, D features, E embedding, H LSTM, A attention
width, V words; N captions that exist ("rows"), M their words packed time-major (see `sat.model.packing`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sat.model.attention import BASELINE_DECAY, Attended, Attention, attend_for_inference, reinforce_sums
from sat.model.initialise import initialise
from sat.model.kernels import native
from sat.model.kernels.choose import choose_kernels
from sat.model.loss import LossSums, doubly_stochastic_penalty, linear_cross_entropy
from sat.model.packing import Packing, pack
from sat.model.rollout import Rollout, roll_out

START = 1
"""Token id of `<start>` (the same in `sat.text`)."""
CLAMP = 5.0
"""Standardised features are clamped to this many standard deviations: ResNet features have long tails."""


class Memory(NamedTuple):
    """What decoding needs of an image, computed once; the first dimension is the image."""

    grid: Tensor
    """[B, L, D] standardised grid in the type of the matrix products."""
    projection: Tensor
    """[B, L, A] its part of the attention score; A = 0 without attention."""
    prepared: Tensor | None = None
    """[B, L, A] the same as the native kernels want it; A = 0 where they do not serve."""


class State(NamedTuple):
    """LSTM state of k beams per image, float32 or wider."""

    h: Tensor
    """[B, k, H] output."""
    c: Tensor
    """[B, k, H] cell."""


class Captioner(nn.Module):
    """Grid -> caption. Call it for the training loss; `encode`, `init_state` and `step` serve decoding."""

    def __init__(
        self,
        *,
        vocab_size: int,
        grid_size: int,
        feature_dim: int = 2048,
        embedding_dim: int = 512,
        lstm_dim: int = 512,
        attention_dim: int = 512,
        dropout: float = 0.5,
        attention: str = "soft",
        state_init: str = "mlp",
        score: str = "tanh",
        gate: str = "scalar",
        output: str = "deep",
        first_input: str = "zero",
        penalty: str = "sum",
        penalty_weight: float = 1.0,
        weight_init: str = "normal",
        hard_inference: str = "expectation",
        label_smoothing: float = 0.0,
        kernels: str = "auto",
    ):
        super().__init__()
        self.grid_size, self.kind, self.hard_inference, self.kernels = grid_size, attention, hard_inference, kernels
        self.first_input, self.label_smoothing = first_input, label_smoothing
        self.penalty, self.penalty_weight = penalty, penalty_weight
        attends, deep = attention != "none", output == "deep"

        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.word_gates = nn.Linear(embedding_dim, 4 * lstm_dim)  # gate order: input, forget, cell, output
        self.state_gates = nn.Linear(lstm_dim, 4 * lstm_dim, bias=False)
        self.context_gates = nn.Linear(feature_dim, 4 * lstm_dim, bias=False) if attends else None
        self.attention = Attention(feature_dim, lstm_dim, attention_dim, score) if attends else None
        self.init_h = _state_initialiser(state_init, feature_dim, lstm_dim, dropout) if attends else None
        self.init_c = _state_initialiser(state_init, feature_dim, lstm_dim, dropout) if attends else None
        self.gate = nn.Linear(lstm_dim, feature_dim if gate == "vector" else 1) if attends and gate != "none" else None
        self.image_word = None if attends else nn.Linear(feature_dim, embedding_dim)
        self.output_state = nn.Linear(lstm_dim, embedding_dim) if deep else None
        self.output_context = nn.Linear(feature_dim, embedding_dim, bias=False) if deep and attends else None
        self.output_dropout = nn.Dropout(dropout)
        self.vocabulary = nn.Linear(embedding_dim if deep else lstm_dim, vocab_size)
        initialise(self, weight_init)

        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.register_buffer("feature_scale", torch.ones(feature_dim))
        if attention == "hard":
            self.register_buffer("reward_baseline", torch.zeros(()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts as usual, but keeps the buffers in float32: bf16 weights must not round the statistics."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, exact[name].to(buffer.device))
        return self

    # ------------------------------------------------------------------ decoding

    def encode(self, grid: Tensor, order: Tensor | None = None) -> Memory:
        """Standardise `grid` [B, L, D] (as stored: any float type or int8) and project it, once per image.

        `order` int64 [B'] picks and orders the images. Raises ValueError where L or D are not the model's.
        """
        if grid.shape[1:] != (self.grid_size, len(self.feature_mean)):
            raise ValueError(f"grid [B, {self.grid_size}, {len(self.feature_mean)}] expected, got {list(grid.shape)}")
        grid = self._standardised(grid, order)
        projection = self.attention.project(grid) if self.attention else grid[:, :, :0]
        softly = self.kind == "soft" or self.hard_inference == "expectation"
        serves = (
            self.attention and softly and not torch.is_grad_enabled() and choose_kernels(self.kernels, grid) is native
        )
        prepared = native.prepare(projection, self.attention.activation == "tanh") if serves else grid[:, :, :0]
        return Memory(grid, projection, prepared)

    def init_state(self, memory: Memory) -> State:
        """LSTM state before the first word, h and c: [B, 1, H]. Show and Tell reads the image as a first word."""
        mean = memory.grid.mean(1, keepdim=True, dtype=_wide(memory.grid.dtype)).to(memory.grid.dtype)  # [B, 1, D]
        if self.attention:
            return State(self.init_h(mean).to(_wide(mean.dtype)), self.init_c(mean).to(_wide(mean.dtype)))
        zeros = mean.new_zeros(len(mean), 1, self.state_gates.in_features, dtype=_wide(mean.dtype))
        return State(*self.lstm(self.word_gates(self.image_word(mean)), None, zeros, zeros))

    def step(self, memory: Memory, state: State, tokens: Tensor) -> tuple[Tensor, State, Tensor]:
        """Feed `tokens` int64 [B, k] (`<start>` first); returns logits [B, k, V], the new state and alpha [B, k, L].

        Logits and alpha are float32 or wider. Without attention alpha is uniform.
        """
        words = self.embed(tokens)
        h, c, context, attended = self.advance(
            words, state.h, state.c, lambda query: self._attend_for_inference(memory, query)
        )
        logits = self.vocabulary(self.output_features(words, h, context)).to(h.dtype)
        alpha = attended.alpha if attended else h.new_full((), 1 / self.grid_size).expand(*tokens.shape, self.grid_size)
        return logits, State(h, c), alpha

    def _attend_for_inference(self, memory: Memory, query: Tensor) -> Attended:
        how = "expectation" if self.kind == "soft" else self.hard_inference
        fused = memory.prepared is not None and memory.prepared.numel() and not torch.is_grad_enabled()
        if how != "expectation" or not fused:
            return attend_for_inference(self.attention, memory.grid, memory.projection, query, how)
        score = self.attention.score.weight[0].to(query.dtype)
        tanh = self.attention.activation == "tanh"
        return Attended(*native.attend_beams(memory.grid, memory.prepared, query, score, tanh), None)

    # ------------------------------------------------------------------ training

    def forward(self, grid: Tensor, captions: Tensor, lengths: Tensor, sampling_probability: float = 0.0) -> LossSums:
        """Loss sums of `grid` [B, L, D] (as stored) with `captions` int64 [B, K, T + 1] and `lengths` int64 [B, K].

        `lengths` counts predicted tokens (words and `<end>`), 0 for a caption that does not exist. In train mode
        dropout, hard attention and scheduled sampling (with `sampling_probability` the model's own last word is fed)
        draw from the default generators. Without any caption the sums are zeros that still reach every parameter.
        """
        packing = pack(captions, lengths)
        if not packing.rows:
            return self._zero_sums(grid)
        memory = self.encode(grid, packing.images)
        return self._loss(roll_out(self, memory, packing, sampling_probability), packing)

    @torch.no_grad()
    def update_baseline(self, mean_nll: Tensor | float) -> None:
        """Move hard attention's reward baseline towards the global batch's mean NLL per token; the same on all."""
        if self.kind == "hard":
            self.reward_baseline.lerp_(torch.as_tensor(mean_nll).to(self.reward_baseline), 1 - BASELINE_DECAY)

    def _loss(self, rollout: Rollout, packing: Packing) -> LossSums:
        features = self.output_features(rollout.words, rollout.hidden, rollout.context)
        words = linear_cross_entropy(
            features,
            *self.vocabulary.parameters(),
            packing.targets,
            self.label_smoothing,
            choose_kernels(self.kernels, features),
        )
        per_token, penalty, zero = words.objective, torch.zeros_like(words.nll[0]), torch.zeros_like(words.nll[0])
        if self.kind == "soft":  # the regulariser belongs to soft attention (paper, section 4.2.1)
            penalty = self.penalty_weight * doubly_stochastic_penalty(rollout.alpha_sum, self.penalty).sum()
        elif self.kind == "hard" and self.training:
            per_token = per_token + reinforce_sums(rollout.alpha, rollout.chosen, words.nll, self.reward_baseline)
        return LossSums(
            per_token=per_token + penalty if self.penalty == "sum" else per_token,
            per_caption=zero if self.penalty == "sum" else penalty,
            nll=words.nll.sum(),
            penalty=penalty.detach(),
            tokens=words.correct.new_tensor(len(packing.targets)),
            captions=words.correct.new_tensor(packing.rows[0]),
            correct=words.correct,
        )

    def _zero_sums(self, grid: Tensor) -> LossSums:
        total = sum((p.sum() * 0 for p in self.parameters() if p.requires_grad), self.vocabulary.bias.sum() * 0)
        total = total + grid.sum() * 0 if grid.requires_grad else total
        count = torch.zeros((), dtype=torch.int64, device=total.device)
        return LossSums(total, total * 0, total.detach(), total.detach(), count, count, count)

    # ------------------------------------------------------------------ parts of one step, for any leading dimensions

    def embed(self, tokens: Tensor) -> Tensor:
        """Word vectors [..., E] of `tokens` [...]; `<start>` is the zero vector where `first_input` says so (paper)."""
        words = self.embedding(tokens).to(self._matmul_dtype())
        return words * (tokens != START)[..., None] if self.first_input == "zero" else words

    def advance(
        self, words: Tensor, h: Tensor, c: Tensor, attend: Callable[[Tensor], Attended]
    ) -> tuple[Tensor, Tensor, Tensor | None, Attended | None]:
        """One word on: `words` [..., E], `h` and `c` [..., H], `attend` from a query [..., A] to what was seen.

        Returns the new h and c, the gated context [..., D] and what `attend` returned (None without attention).
        """
        if self.attention is None:
            return *self.lstm(self.word_gates(words), None, h, c), None, None
        before = h.to(words.dtype)
        attended = attend(self.attention.query(before))
        context = attended.context * self.gate(before).sigmoid() if self.gate else attended.context
        return *self.lstm(self.word_gates(words), context, h, c), context, attended

    def lstm(self, word_gates: Tensor, context: Tensor | None, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The LSTM cell (paper, eq. 1-3) from the words' share [..., 4H] of its gates and the context [..., D]."""
        gates = word_gates.to(c.dtype) + self.state_gates(h.to(word_gates.dtype))
        if context is not None:
            gates = gates + self.context_gates(context)
        i, f, g, o = gates.chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def output_features(self, words: Tensor, h: Tensor, context: Tensor | None, dropout: bool = True) -> Tensor:
        """What the vocabulary layer sees: h_t, or E y_{t-1} + L_h h_t + L_z z_t (paper, eq. 7), after dropout."""
        features = h.to(words.dtype)
        if self.output_state:
            features = words + self.output_state(features)
            if self.output_context:
                features = features + self.output_context(context)
        return self.output_dropout(features) if dropout else features

    def _standardised(self, grid: Tensor, order: Tensor | None) -> Tensor:
        """Image by image on a CPU, where passes over the whole batch would each go to memory and back."""
        scale = self.feature_scale / self.feature_std
        shift, dtype = -self.feature_mean / self.feature_std, self._matmul_dtype()
        if grid.requires_grad or grid.device.type != "cpu":
            grid = grid if order is None else grid[order]
            return torch.addcmul(shift, grid.to(scale.dtype), scale).clamp(-CLAMP, CLAMP).to(dtype)
        images = range(len(grid)) if order is None else order.tolist()
        result = torch.empty(len(images), *grid.shape[1:], dtype=dtype)
        for image, out in zip(images, result, strict=True):
            out.copy_(torch.addcmul(shift, grid[image].to(scale.dtype), scale).clamp_(-CLAMP, CLAMP))
        return result

    def _matmul_dtype(self) -> torch.dtype:
        device = self.vocabulary.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.vocabulary.weight.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _state_initialiser(kind: str, feature_dim: int, lstm_dim: int, dropout: float) -> nn.Module:
    """Mean grid [..., D] -> h0 or c0 [..., H]."""
    if kind == "linear":
        return nn.Linear(feature_dim, lstm_dim)
    return nn.Sequential(
        nn.Linear(feature_dim, lstm_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(lstm_dim, lstm_dim), nn.Tanh()
    )
