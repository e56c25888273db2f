"""The decoder of Show, Attend and Tell: an LSTM that looks at the image's grid before every word.

The parameters and one step. What is minimised, and how a caption is walked along in training, is the objective's matter
(`sat.model.objectives`). Both the paper and its popular re-implementation are settings of this one module
(`sat.model.spec`).
Surprising: without autocast the type of the weights decides (so weights cast to bf16 compute in bf16, whatever the
features' type); LSTM state, softmax and sums are float32 or wider in any case.

B images, K captions per image, k beams per image, T steps, L locations, D features, E embedding, H LSTM, A attention
width, V words; N captions that exist ("rows"), M their words packed time-major (see `sat.model.packing`).
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from sat.model.attention import Attended, Attention, attend_for_inference
from sat.model.initialise import initialise
from sat.model.kernels.choose import choose_beam_kernels
from sat.model.spec import CaptionerSpec, Sizes

START = 1
"""Token id of `<start>` (the same in `sat.text`)."""
END = 2
"""Token id of `<end>` (the same in `sat.text`)."""
CLAMP = 5.0
"""Standardised features are clamped to this many standard deviations: ResNet features have long tails."""


class Memory(NamedTuple):
    """What decoding needs of an image, computed once; the first dimension is the image."""

    grid: Tensor
    """[B, L, D] standardised grid in the type of the matrix products."""
    projection: Tensor
    """[B, L, A] its part of the attention score; A = 0 without attention."""
    prepared: Tensor
    """[B, L, A] the same as the native kernels want it; A = 0 where they do not serve."""


class State(NamedTuple):
    """LSTM state of k beams per image, float32 or wider."""

    h: Tensor
    """[B, k, H] output."""
    c: Tensor
    """[B, k, H] cell."""


class Captioner(nn.Module):
    """Grid -> words: `encode`, `init_state` and `step` serve decoding, the parts of a step serve the objectives."""

    feature_mean: Tensor
    """[D] of the stored features, as all three buffers."""
    feature_std: Tensor
    feature_scale: Tensor
    """What a stored number is multiplied by: one, but for int8 features."""
    reward_baseline: Tensor
    """Scalar, of hard attention alone: moving average of the NLL per token."""

    def __init__(self, spec: CaptionerSpec, sizes: Sizes, kernels: str = "auto") -> None:
        """Fresh weights from torch's default generator. `kernels`: see `sat.model.kernels.choose`."""
        super().__init__()
        self.spec, self.sizes, self.kernels = spec, sizes, kernels
        attends, deep = spec.attention != "none", spec.output == "deep"
        V, D, E, H = sizes.vocab_size, sizes.feature_dim, spec.embedding_dim, spec.lstm_dim

        self.embedding = nn.Embedding(V, E)
        self.word_gates = nn.Linear(E, 4 * H)  # gate order: input, forget, cell, output
        self.state_gates = nn.Linear(H, 4 * H, bias=False)
        self.context_gates = nn.Linear(D, 4 * H, bias=False) if attends else None
        self.attention = Attention(D, H, spec.attention_dim, spec.score) if attends else None
        self.init_h = _state_initialiser(spec, D) if attends else None
        self.init_c = _state_initialiser(spec, D) if attends else None
        self.gate = nn.Linear(H, D if spec.gate == "vector" else 1) if attends and spec.gate != "none" else None
        self.image_word = None if attends else nn.Linear(D, E)
        self.output_state = nn.Linear(H, E) if deep else None
        self.output_context = nn.Linear(D, E, bias=False) if deep and attends else None
        self.output_dropout = nn.Dropout(spec.dropout)
        self.vocabulary = nn.Linear(E if deep else H, V)
        initialise(
            self,
            spec.weight_init,
            embedding=self.embedding,
            vocabulary=self.vocabulary,
            recurrent=self.state_gates,
        )

        self.register_buffer("feature_mean", torch.zeros(D))
        self.register_buffer("feature_std", torch.ones(D))
        self.register_buffer("feature_scale", torch.ones(D))
        if spec.attention == "hard":
            self.register_buffer("reward_baseline", torch.zeros(()))

    @property
    def captioner(self) -> Self:
        """Itself: whoever trains or decodes need not know whether there is an encoder in front (`EndToEnd`)."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as usual, but keeps the buffers in float32: bf16 weights must not round the statistics."""
        exact = dict(self.named_buffers(recurse=False))
        nn.Module._apply(self, fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, exact[name].to(buffer.device))
        return self

    # ------------------------------------------------------------------ decoding

    def encode(self, grid: Tensor, order: Tensor | None = None) -> Memory:
        """Standardise `grid` [B, L, D] (as stored: any float type or int8) and project it, once per image.

        `order` int64 [B'] picks and orders the images. Raises ValueError where L or D are not the model's.
        """
        expected = [self.sizes.grid_size, self.sizes.feature_dim]
        if list(grid.shape[1:]) != expected:
            raise ValueError(f"grid [B, {expected[0]}, {expected[1]}] expected, got {list(grid.shape)}")
        grid = self._standardised(grid, order)
        projection = self.attention.project(grid) if self.attention else grid[:, :, :0]
        prepared = grid[:, :, :0]
        if self.attention and self.expects and not torch.is_grad_enabled():
            kernels = choose_beam_kernels(self.kernels, grid)
            prepared = kernels.prepare(projection, self.attention.tanh) if kernels else prepared
        return Memory(grid, projection, prepared)

    @property
    def expects(self) -> bool:
        """Whether decoding looks at the expected context, not at one location."""
        return self.spec.attention == "soft" or self.spec.hard_inference == "expectation"

    def init_state(self, memory: Memory) -> State:
        """LSTM state before the first word, h and c: [B, 1, H]. Show and Tell reads the image as a first word."""
        mean = memory.grid.mean(1, keepdim=True, dtype=_wide(memory.grid.dtype)).to(memory.grid.dtype)  # [B, 1, D]
        if self.init_h and self.init_c:
            return State(self.init_h(mean).to(_wide(mean.dtype)), self.init_c(mean).to(_wide(mean.dtype)))
        assert self.image_word
        zeros = mean.new_zeros(len(mean), 1, self.state_gates.in_features, dtype=_wide(mean.dtype))
        return State(*self.lstm(self.word_gates(self.image_word(mean)), None, zeros, zeros))

    def step(self, memory: Memory, state: State, tokens: Tensor) -> tuple[Tensor, State, Tensor]:
        """Feed `tokens` int64 [B, k] (`<start>` first); returns logits [B, k, V], the new state and alpha [B, k, L].

        Logits and alpha are float32 or wider. Without attention alpha is uniform.
        """
        words = self.embed(tokens)
        h, c, context, attended = self.advance(
            words, state.h, state.c, lambda attention, query: self._attend_for_inference(attention, memory, query)
        )
        logits = self.vocabulary(self.output_features(words, h, context)).to(h.dtype)
        L = self.sizes.grid_size
        alpha = attended.alpha if attended else h.new_full((), 1 / L).expand(*tokens.shape, L)
        return logits, State(h, c), alpha

    def gate_mean(self, state: State) -> Tensor | None:
        """How far the gate on the context is open in the step from `state`, [B, k] in 0..1, the mean of its components.

        None for a model without a gate.
        """
        if self.gate is None:
            return None
        gate: Tensor = self.gate(state.h.to(self._matmul_dtype())).sigmoid()
        return gate.to(state.h.dtype).mean(-1)

    def _attend_for_inference(self, attention: Attention, memory: Memory, query: Tensor) -> Attended:
        kernels = None
        if self.expects and memory.prepared.numel() and not torch.is_grad_enabled():
            kernels = choose_beam_kernels(self.kernels, memory.grid)
        if kernels is None:
            how = "expectation" if self.expects else self.spec.hard_inference
            return attend_for_inference(attention, memory.grid, memory.projection, query, how)
        score = attention.score.weight[0].to(query.dtype)
        return Attended(*kernels.attend_beams(memory.grid, memory.prepared, query, score, attention.tanh), None)

    # ------------------------------------------------------------------ parts of one step, for any leading dimensions

    def embed(self, tokens: Tensor) -> Tensor:
        """Word vectors [..., E] of `tokens` [...]; `<start>` is the zero vector where `first_input` says so (paper)."""
        words: Tensor = self.embedding(tokens).to(self._matmul_dtype())
        return words * (tokens != START)[..., None] if self.spec.first_input == "zero" else words

    def advance(
        self, words: Tensor, h: Tensor, c: Tensor, attend: Callable[[Attention, Tensor], Attended]
    ) -> tuple[Tensor, Tensor, Tensor | None, Attended | None]:
        """One word on: `words` [..., E], `h` and `c` [..., H], `attend` from the attention and a query [..., A] to
        what was seen.

        Returns the new h and c, the gated context [..., D] and what `attend` returned (None without attention).
        """
        if self.attention is None:
            return *self.lstm(self.word_gates(words), None, h, c), None, None
        before = h.to(words.dtype)
        attended = attend(self.attention, self.attention.query(before))
        context = attended.context * self.gate(before).sigmoid() if self.gate else attended.context
        return *self.lstm(self.word_gates(words), context, h, c), context, attended

    def lstm(self, word_gates: Tensor, context: Tensor | None, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The LSTM cell (paper, eq. 1-3) from the words' share [..., 4H] of its gates and the context [..., D]."""
        gates = word_gates.to(c.dtype) + self.state_gates(h.to(word_gates.dtype))
        if self.context_gates and context is not None:
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


def _state_initialiser(spec: CaptionerSpec, feature_dim: int) -> nn.Module:
    """Mean grid [..., D] -> h0 or c0 [..., H]."""
    H = spec.lstm_dim
    if spec.state_init == "linear":
        return nn.Linear(feature_dim, H)
    return nn.Sequential(nn.Linear(feature_dim, H), nn.ReLU(), nn.Dropout(spec.dropout), nn.Linear(H, H), nn.Tanh())
