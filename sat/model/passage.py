"""One pass through the fast time loop, word by word: what enters it, what it leaves, and both directions.

It writes into tensors that it is given, asks nothing of the host but the number of rows of each step, and allocates
only what a step needs for itself: so a GPU can record it (`sat.model.recording`). The formulas: `sat.model.recurrence`.
N rows, n of them running at step t, M packed words, L locations; H LSTM, A attention, D feature width, G width of the
gate (0, 1 or D).
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from sat.model.kernels.interface import Gate, Kernels, Seen
from sat.model.kernels.products import Plain, Prepare, enough_for, padded, room_for
from sat.model.locations import Locations, Sight, open_gate
from sat.model.packing import Packing


class Inputs(NamedTuple):
    """What enters it: c in float32 or wider, all else in the type of the matrix products."""

    grid: Tensor
    """[B, L, D]"""
    projection: Tensor
    """[B, L, A]"""
    word_gates: Tensor
    """[M, 4H], the words' share of the gates."""
    h: Tensor
    """[N, H] from before the first step."""
    c: Tensor
    """[N, H]"""


class Weights(NamedTuple):
    """The weights inside the loop, in the type of the matrix products."""

    state: Tensor
    """[4H + A + G, H] applied to h_{t-1}: recurrent gates, attention query, context gate."""
    gate_bias: Tensor
    """[G]"""
    context: Tensor
    """[4H, D] applied to the gated context."""
    score: Tensor
    """[A]"""


class Words(NamedTuple):
    """What the loop leaves of every word, packed."""

    states: Tensor
    """[M, 4H + A + G] activations of the LSTM's gates, query, activation of the context gate."""
    hidden: Tensor
    """[M, H]"""
    cells: Tensor
    """[M, H] wide"""
    contexts: Tensor
    """[M, D]"""
    gated: Tensor
    """[M, D], and behind them rows of zeros where products should have more; the contexts where there is no gate."""
    alphas: Tensor
    """[M, L] wide"""

    @classmethod
    def empty(cls, inputs: Inputs, weights: Weights) -> Self:
        """Room for the words of `inputs`."""
        M, H = len(inputs.word_gates), inputs.h.shape[1]
        gated = room_for(M, inputs.grid.shape[2], inputs.word_gates)
        return cls(
            states=inputs.word_gates.new_empty(M, len(weights.state)),
            hidden=inputs.word_gates.new_empty(M, H),
            cells=inputs.c.new_empty(M, H),
            contexts=torch.empty_like(gated[:M]) if len(weights.gate_bias) else gated[:M],
            gated=gated,
            alphas=inputs.c.new_empty(M, inputs.grid.shape[1]),
        )


class Asked(NamedTuple):
    """The gradients that reach the loop."""

    hidden: Tensor | None
    """[M, H]"""
    gated: Tensor | None
    """[M, D]"""
    alpha_sum: Tensor
    """[N, L] wide"""
    alphas: Tensor | None = None
    """[M, L] wide, of hard attention."""

    @classmethod
    def of(
        cls,
        hidden: Tensor | None,
        gated: Tensor | None,
        alpha_sum: Tensor | None,
        alphas: Tensor | None,
        words: Words,
        rows: int,
    ) -> Self:
        """As autograd gives them to a loop of so many `rows` that left `words`."""
        if alpha_sum is None:
            alpha_sum = torch.zeros_like(words.alphas[:rows])
        hidden, gated = (None if each is None else each.contiguous() for each in (hidden, gated))  # of a sum: expanded
        return cls(hidden, gated, alpha_sum.contiguous(), alphas)

    def of_alpha(self, step: slice, rows: int) -> Tensor:
        """[n, L] that reaches alpha at a `step` of so many `rows` without a way through the contexts."""
        of_rows = self.alpha_sum[:rows]
        return of_rows if self.alphas is None else of_rows + self.alphas[step]


class Gradients(NamedTuple):
    """What the loop's backward direction leaves: d loss / d (states, scores, contexts) of every word, d h_0 and c_0."""

    states: Tensor
    """[M, 4H + A + G] of the gates before their non-linearities, of the query, of the context gate's argument.

    Behind them rows of zeros where products should have more.
    """
    scores: Tensor
    """[M, L] wide"""
    contexts: Tensor
    """[M, D]"""
    h: Tensor
    """[N, H]"""
    c: Tensor
    """[N, H] wide"""

    @classmethod
    def empty(cls, words: Words, c: Tensor) -> Self:
        """Room for those of `words`, in a loop that begins with `c` [N, H]."""
        like = (words.alphas, words.contexts, words.hidden[: len(c)], c)
        states = room_for(len(words.states), words.states.shape[1], words.states)
        return cls(states, *(torch.empty_like(each) for each in like))


class Passage(NamedTuple):
    """All that a pass reads and writes."""

    kernels: Kernels
    seen: Seen
    h: Tensor
    """[N, H], as the input's."""
    c: Tensor
    """[N, H]"""
    weights: Weights
    words: Words
    locations: Locations | None = None
    """Where hard attention looks; None: soft attention."""
    prepare: Prepare = Plain
    """What the weights go through before the rows of all steps are multiplied by them."""

    def forward(self, word_gates: Tensor) -> None:
        """Fill `words`; `word_gates` [M, 4H] as the input's."""
        kernels, seen, h, c, weights, words, locations, prepare = self
        by_state, by_context = prepare(weights.state.t()), prepare(weights.context.t())
        H, A = h.shape[1], len(weights.score)
        for t, step in enumerate(seen.packing.steps):
            n, s = seen.packing.rows[t], words.states[step]
            by_state.into(h[:n], s)
            gate = Gate(s[:, 4 * H + A :], weights.gate_bias)
            query, sight = s[:, 4 * H : 4 * H + A], Sight(words.alphas[step], words.contexts[step], words.gated[step])
            opened = open_gate(gate) if locations else None
            kernels.look(seen, t, query, gate, *sight)
            if locations:
                locations.look(seen, t, opened, sight)
            context_gates = by_context.times(sight.gated)
            h_now, c_now = words.hidden[step], words.cells[step]
            kernels.cell(s[:, : 4 * H], word_gates[step], context_gates, c[:n], c_now, h_now)
            h, c = h_now, c_now

    def backward(self, asked: Asked, grads: Gradients) -> None:
        """Fill `grads`, after `forward`."""
        kernels, seen, h_first, c_first, weights, words, locations, prepare = self
        by_state, by_context = prepare(weights.state), prepare(weights.context)
        packing, H, A = seen.packing, h_first.shape[1], len(weights.score)
        query = slice(4 * H, 4 * H + A)
        grads.h.zero_()
        grads.c.zero_()
        for t in reversed(range(len(packing.rows))):
            step, n = packing.steps[t], packing.rows[t]
            s, grad_s = words.states[step], grads.states[step]
            c_before = words.cells[packing.steps[t - 1]][:n] if t else c_first
            of_hidden = None if asked.hidden is None else asked.hidden[step]
            kernels.cell_backward(
                s[:, : 4 * H], c_before, words.cells[step], grads.h[:n], of_hidden, grads.c[:n], grad_s[:, : 4 * H]
            )
            grad, wanted = by_context.times(grad_s[:, : 4 * H]), None if asked.gated is None else asked.gated[step]
            gate, of_context = Gate(s[:, 4 * H + A :], weights.gate_bias), grads.contexts[step]
            kernels.gate_backward(gate, grad, wanted, words.contexts[step], grad_s[:, 4 * H + A :], of_context)
            through_alpha = locations.through_alpha(of_context) if locations else of_context
            of_step = (through_alpha, asked.of_alpha(step, n), grads.scores[step], grad_s[:, query])
            kernels.attend_backward(seen, t, s[:, query], words.alphas[step], *of_step)
            by_state.into(grad_s, grads.h[:n])

    def shared(self, grads: Gradients) -> tuple[Tensor, Weights]:
        """Gradients of the projection [B, L, A] and of the weights, from all words at once, after `backward`."""
        kernels, seen, h_first, _, weights, words, *_ = self
        H, A = h_first.shape[1], len(weights.score)
        before = padded(torch.cat([h_first, words.hidden])[seen.packing.previous], len(grads.states))
        query = words.states[:, 4 * H : 4 * H + A]
        grad_projection, grad_score = kernels.attend_backward_shared(seen, query, grads.scores)
        of_weights = Weights(
            state=grads.states.t() @ before,
            gate_bias=grads.states[:, 4 * H + A :].sum(0),
            context=grads.states[:, : 4 * H].t() @ words.gated,
            score=grad_score.to(weights.score.dtype),
        )
        return grad_projection, of_weights


def grad_of_grid(packing: Packing, alphas: Tensor, grad_contexts: Tensor) -> Tensor:
    """d a_i = sum_t alpha_ti dz_t, one product per image: [B, L, D] of `alphas` [M, L], `grad_contexts` [M, D].

    `alphas` are what the locations weighed, of hard attention `Locations.weights`.
    """
    grads = []
    for part in packing.image_words.split(packing.words_per_image):
        n = enough_for(len(part), grad_contexts)
        weights = padded(alphas[part].to(grad_contexts.dtype), n)
        grads.append(weights.t() @ padded(grad_contexts[part], n))
    return torch.stack(grads)
