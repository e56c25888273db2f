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

from sat.model.at_rest import PackableLinear
from sat.model.attention import Attended, Attention, attend_for_inference, beyond
from sat.model.draws import Site, derive, dropout, uniform
from sat.model.initialise import initialise
from sat.model.kernels.choose import choose_beam_kernels, choose_kernels
from sat.model.spec import CaptionerSpec, Sizes

START = 1
"""Token id of `<start>` (the same in `sat.text`)."""
END = 2
"""Token id of `<end>` (the same in `sat.text`)."""
CLAMP = 5.0
"""Standardised features are clamped to this many standard deviations: ResNet features have long tails."""
_DROPOUT = 2
"""Place of dropout in the two layers of an initial state."""


class Memory(NamedTuple):
    """What decoding needs of an image, computed once; the first dimension is the image."""

    grid: Tensor
    """[B, L, D] standardised grid in the type of the matrix products."""
    projection: Tensor
    """[B, L, A] its part of the attention score; A = 0 without attention."""
    prepared: Tensor
    """[B, L, A] the same as the native kernels want it; A = 0 where they do not serve."""
    regions: Tensor | None = None
    """int64 [B] how many of the L locations are real, the others being zeros; None: all are."""
    keys: Tensor | None = None
    """int64 [B] of this word's draws, where hard attention samples its locations (`draws_locations`)."""

    def pick(self, images: Tensor) -> "Memory":
        """Of those images, int64 [B'] or bool [B]."""
        return Memory(*(None if part is None else part[images] for part in self))  # type: ignore[arg-type]  # as self


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
        self.word_gates = PackableLinear(E, 4 * H)  # gate order: input, forget, cell, output
        self.state_gates = PackableLinear(H, 4 * H, bias=False)
        self.context_gates = PackableLinear(D, 4 * H, bias=False) if attends else None
        self.attention = Attention(D, H, spec.attention_dim, spec.score) if attends else None
        self.init_h = _state_initialiser(spec, D) if attends else None
        self.init_c = _state_initialiser(spec, D) if attends else None
        self.gate = PackableLinear(H, D if spec.gate == "vector" else 1) if attends and spec.gate != "none" else None
        self.image_word = None if attends else nn.Linear(D, E)
        self.output_state = PackableLinear(H, E) if deep else None
        self.output_context = PackableLinear(D, E, bias=False) if deep and attends else None
        self.vocabulary = PackableLinear(E if deep else H, V)
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

    def encode(self, grid: Tensor, order: Tensor | None = None, regions: Tensor | None = None) -> Memory:
        """Standardise `grid` [B, L, D] (as stored: any float type or int8) and project it, once per image.

        `order` int64 [B'] picks and orders the images. With `regions` int64 [B] only the first so many locations of an
        image are looked at (at least one), and L may be below the model's. Raises ValueError where L, D or `regions` do
        not fit the model.
        """
        self.refuse(grid, regions)
        if regions is not None:
            regions = (regions if order is None else regions[order]).clamp(min=1)  # padding rows have none
        grid = self._standardised(grid, order, regions)
        projection = self.attention.project(grid) if self.attention else grid[:, :, :0]
        memory = Memory(grid, projection, grid[:, :, :0], regions)
        return memory if torch.is_grad_enabled() else self.for_decoding(memory)

    def for_decoding(self, memory: Memory) -> Memory:
        """`memory` without its gradient, as `step` likes it best."""
        grid, projection, prepared = memory.grid.detach(), memory.projection.detach(), memory.prepared
        if self.attention and self.expects and (kernels := choose_beam_kernels(self.kernels, grid)):
            prepared = kernels.prepare(projection, self.attention.tanh)
        return memory._replace(grid=grid, projection=projection, prepared=prepared)

    def refuse(self, grid: Tensor, regions: Tensor | None) -> None:
        """Raise ValueError where L, D or `regions` do not fit the model."""
        L, D = self.sizes.grid_size, self.sizes.feature_dim
        if regions is None:
            if list(grid.shape[1:]) != [L, D]:
                raise ValueError(f"grid [B, {L}, {D}] expected, got {list(grid.shape)}")
        elif grid.dim() != 3 or grid.shape[1] > L or grid.shape[2] != D:
            raise ValueError(f"regions [B, at most {L}, {D}] expected, got {list(grid.shape)}")
        elif regions.shape != grid.shape[:1] or (regions.device.type == "cpu" and (regions > grid.shape[1]).any()):
            raise ValueError(f"regions must say how many of the {grid.shape[1]} locations of each image are real")

    @property
    def expects(self) -> bool:
        """Whether decoding looks at the expected context, not at one location."""
        return self.spec.attention == "soft" or self.spec.hard_inference == "expectation"

    @property
    def draws_locations(self) -> bool:
        """Whether decoding looks at locations that are drawn: `Memory.keys` decide where, other ones at each word."""
        return self.spec.attention == "hard" and self.spec.hard_inference == "sample"

    def init_state(self, memory: Memory, keys: Callable[[Site], Tensor] | None = None) -> State:
        """LSTM state before the first word, h and c: [B, 1, H]. Show and Tell reads the image as a first word.

        In train mode with the dropout that the images' `keys` of a site, int64 [B], decide.
        """
        mean = _mean(memory)  # [B, 1, D]
        if self.init_h and self.init_c:
            h = self._initial(self.init_h, mean, keys, Site.INITIAL_H)
            c = self._initial(self.init_c, mean, keys, Site.INITIAL_C)
            return State(h.to(_wide(mean.dtype)), c.to(_wide(mean.dtype)))
        assert self.image_word
        zeros = mean.new_zeros(len(mean), 1, self.state_gates.in_features, dtype=_wide(mean.dtype))
        return State(*self.lstm(self.word_gates(self.image_word(mean)), None, zeros, zeros))

    def step(
        self, memory: Memory, state: State, tokens: Tensor, drop: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, State, Tensor]:
        """Feed `tokens` int64 [B, k] (`<start>` first); returns logits [B, k, V], the new state and alpha [B, k, L].

        Logits and alpha are float32 or wider. Without attention alpha is uniform. The vocabulary sees its features
        [B, k, E or H] as `drop` leaves them.
        """
        words = self.embed(tokens)
        h, c, context, attended = self.advance(
            words, state.h, state.c, lambda attention, query: self._attend_for_inference(attention, memory, query)
        )
        features = self.output_features(words, h, context)
        logits = self.vocabulary(features if drop is None else drop(features)).to(h.dtype)
        return logits, State(h, c), attended.alpha if attended else _uniform(memory, h).expand(*tokens.shape, -1)

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
            how, numbers = "expectation" if self.expects else self.spec.hard_inference, None
            if self.draws_locations:
                if memory.keys is None:
                    raise ValueError("hard attention that samples its locations needs the keys of the images' memory")
                numbers = uniform(derive(memory.keys[:, None], torch.arange(query.shape[1], device=query.device)))
            return attend_for_inference(attention, memory.grid, memory.projection, query, how, memory.regions, numbers)
        score = attention.score.weight[0].to(query.dtype)
        seen = kernels.attend_beams(memory.grid, memory.prepared, query, score, attention.tanh, memory.regions)
        return Attended(*seen, None)

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

    def output_features(self, words: Tensor, h: Tensor, context: Tensor | None) -> Tensor:
        """What the vocabulary layer sees but for dropout: h_t, or E y_{t-1} + L_h h_t + L_z z_t (paper, eq. 7)."""
        features = h.to(words.dtype)
        if self.output_state:
            features = words + self.output_state(features)
            if self.output_context:
                features = features + self.output_context(context)
        return features

    def dropped(self, x: Tensor, keys: Callable[[Site], Tensor], site: Site) -> Tensor:
        """In train mode `x` [..., W] after the dropout that the site's `keys` int64 [...] decide, one per row."""
        if not self.training or not self.spec.dropout:
            return x
        return dropout(x, keys(site), self.spec.dropout, choose_kernels(self.kernels, x))

    def _initial(self, layers: nn.Module, mean: Tensor, keys: Callable[[Site], Tensor] | None, site: Site) -> Tensor:
        """h0 or c0 [B, 1, H] of `mean` [B, 1, D]."""
        if isinstance(layers, nn.Sequential):
            mean = layers[:_DROPOUT](mean)
            mean = mean if keys is None else self.dropped(mean, keys, site)
            layers = layers[_DROPOUT:]
        state: Tensor = layers(mean)
        return state

    def _standardised(self, grid: Tensor, order: Tensor | None, regions: Tensor | None) -> Tensor:
        """Image by image on a CPU, where passes over the whole batch would each go to memory and back.

        `regions` are those of the images in their order; what lies beyond them becomes zero, whatever it was.
        """
        scale = self.feature_scale / self.feature_std
        shift, dtype = -self.feature_mean / self.feature_std, self._matmul_dtype()
        if grid.requires_grad or grid.device.type != "cpu":
            grid = grid if order is None else grid[order]
            every = torch.addcmul(shift, grid.to(scale.dtype), scale).clamp(-CLAMP, CLAMP).to(dtype)
            return every if regions is None else every.masked_fill(beyond(regions, every.shape[1])[..., None], 0)
        images = range(len(grid)) if order is None else order.tolist()
        counts = [grid.shape[1]] * len(images) if regions is None else regions.tolist()
        result = torch.empty(len(images), *grid.shape[1:], dtype=dtype)
        for image, out, count in zip(images, result, counts, strict=True):
            real = grid[image][:count].to(scale.dtype)
            out[:count].copy_(torch.addcmul(shift, real, scale).clamp_(-CLAMP, CLAMP))
            out[count:].zero_()
        return result

    def _matmul_dtype(self) -> torch.dtype:
        device = self.vocabulary.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.vocabulary.weight.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _mean(memory: Memory) -> Tensor:
    """The mean location [B, 1, D], summed in float32 or wider."""
    grid, wide = memory.grid, _wide(memory.grid.dtype)
    if grid.device.type == "cpu" and len(grid):  # image by image: PyTorch would widen the whole grid before it sums
        total = torch.stack([image.sum(0, keepdim=True, dtype=wide) for image in grid])
    else:
        total = grid.sum(1, keepdim=True, dtype=wide)
    count = grid.shape[1] if memory.regions is None else memory.regions[:, None, None]  # zeros beyond the regions
    return (total / count).to(grid.dtype)


def _uniform(memory: Memory, like: Tensor) -> Tensor:
    """Equal attention to every location that is one, [B, 1, L], or [L] where all are."""
    L = memory.grid.shape[1]
    if memory.regions is None:
        return like.new_full((L,), 1 / L)
    weight = (1 / memory.regions.to(like.dtype))[:, None].expand(-1, L)
    return weight.masked_fill(beyond(memory.regions, L), 0)[:, None]


def _state_initialiser(spec: CaptionerSpec, feature_dim: int) -> nn.Module:
    """Mean grid [..., D] -> h0 or c0 [..., H]."""
    H = spec.lstm_dim
    if spec.state_init == "linear":
        return nn.Linear(feature_dim, H)
    # The third does nothing but to keep the names of the weights; there is where dropout comes in.
    return nn.Sequential(nn.Linear(feature_dim, H), nn.ReLU(), nn.Identity(), nn.Linear(H, H), nn.Tanh())
