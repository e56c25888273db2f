"""The fast time loop: soft attention and LSTM over packed rows, with a backward pass derived by hand.

Surprising: the whole loop is one autograd function. Autograd would keep every intermediate [rows, L, A] and compute
each weight gradient once per step; here a step keeps little, and each weight gradient is one matrix product after the
loop. N rows, n of them running at step t, M packed words, L locations; H LSTM, A attention, D feature width, G width of
the gate (0, 1 or D).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sat.model.kernels.interface import Gate, Kernels, Seen
from sat.model.packing import Packing


class Loop(NamedTuple):
    """What drives the loop."""

    kernels: Kernels
    packing: Packing
    tanh: bool
    """The score's non-linearity: tanh or ReLU."""
    regions: Tensor | None = None
    """int64 [B] locations that are real, the first ones of each image; None: all."""


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


def recur(loop: Loop, inputs: Inputs, weights: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the loop; returns hidden states [M, H], gated contexts [M, D], alpha summed per row [N, L], and alpha [M, L].

    Both alphas are wide; the latter is to be looked at and passes no gradient.
    """
    hidden, gated, alpha_sum, alphas = _Recurrence.apply(loop, *inputs, *weights)
    return hidden, gated, alpha_sum, alphas


class _Words(NamedTuple):
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
    """[M, D]; the contexts themselves where there is no gate."""
    alphas: Tensor
    """[M, L] wide"""

    @classmethod
    def empty(cls, inputs: Inputs, weights: Weights) -> "_Words":
        M, H = len(inputs.word_gates), inputs.h.shape[1]
        contexts = inputs.word_gates.new_empty(M, inputs.grid.shape[2])
        return cls(
            states=inputs.word_gates.new_empty(M, len(weights.state)),
            hidden=inputs.word_gates.new_empty(M, H),
            cells=inputs.c.new_empty(M, H),
            contexts=contexts,
            gated=torch.empty_like(contexts) if len(weights.gate_bias) else contexts,
            alphas=inputs.c.new_empty(M, inputs.grid.shape[1]),
        )


class _Recurrence(torch.autograd.Function):
    """Forward, for the rows running at step t (W_h, W_z, b, u: the weights above; p_i the projection, a_i the grid):

        s_t = W_h h_{t-1} = (r_t, q_t, b_t)                 recurrent gates, query, gate
        e_ti = u . act(p_i + q_t),  alpha_t = softmax(e_t)
        z_t = sum_i alpha_ti a_i,  beta_t = sigmoid(b_t + b),  y_t = beta_t * z_t
        (i, f, g, o) = activations of (word gates + r_t + W_z y_t)
        c_t = f c_{t-1} + i g,  h_t = o tanh(c_t)

    Backward, t from the last step to the first, d x for d loss / d x; dh_t is what output layer and step t + 1 ask:

        dc_t += dh_t o (1 - tanh^2 c_t);   do = dh_t tanh(c_t), di = dc_t g, dg = dc_t i, df = dc_t c_{t-1}
        d gates = (di i (1 - i), df f (1 - f), dg (1 - g^2), do o (1 - o));   dc_{t-1} = dc_t f
        dy_t = W_z^T d gates + (what the output layer asks);   dz_t = beta_t dy_t
        db_t = z_t dy_t beta_t (1 - beta_t), summed over D for a scalar gate
        dalpha_ti = a_i . dz_t + d alpha_sum_i
        de_ti = alpha_ti (dalpha_ti - sum_j alpha_tj dalpha_tj)
        dq_t = u * sum_i de_ti act'(p_i + q_t)
        dh_{t-1} = W_h^T (d gates, dq_t, db_t)

    After the loop, over all M words at once:

        dW_h = sum_t (d gates, dq_t, db_t) h_{t-1}^T,   dW_z = sum_t (d gates) y_t^T,   db = sum_t db_t
        dp_i = u * sum_t de_ti act'(p_i + q_t),   du = sum_ti de_ti act(p_i + q_t),   da_i = sum_t alpha_ti dz_t
    """

    @staticmethod
    def forward(ctx: Any, loop: Loop, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs, weights = Inputs(*tensors[:5]), Weights(*tensors[5:])
        kernels, packing, tanh, regions = loop
        H, A = inputs.h.shape[1], len(weights.score)
        projection = kernels.prepare(inputs.projection, tanh)
        seen = Seen(packing, inputs.grid.contiguous(), projection, weights.score, tanh, regions)
        words = _Words.empty(inputs, weights)
        h, c = inputs.h, inputs.c
        for t, step in enumerate(packing.steps):
            n, s = packing.rows[t], words.states[step]
            torch.mm(h[:n], weights.state.t(), out=s)
            gate = Gate(s[:, 4 * H + A :], weights.gate_bias)
            query, gated = s[:, 4 * H : 4 * H + A], words.gated[step]
            kernels.look(seen, t, query, gate, words.alphas[step], words.contexts[step], gated)
            context_gates = gated @ weights.context.t()
            h_now, c_now = words.hidden[step], words.cells[step]
            kernels.cell(s[:, : 4 * H], inputs.word_gates[step], context_gates, c[:n], c_now, h_now)
            h, c = h_now, c_now
        ctx.save_for_backward(seen.grid, seen.projection, inputs.h, inputs.c, *weights, *words)
        ctx.loop = loop
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(words.alphas)
        return words.hidden, words.gated, kernels.alpha_sums(packing, words.alphas), words.alphas

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grid, projection, h_first, c_first, *kept = ctx.saved_tensors
        (kernels, packing, tanh, regions), weights, words = ctx.loop, Weights(*kept[:4]), _Words(*kept[4:])
        H, A = words.hidden.shape[1], len(weights.score)
        grad_hidden, grad_gated, grad_alpha_sum, _ = grads
        seen = Seen(packing, grid, projection, weights.score, tanh, regions)
        grad_states, grad_scores = torch.empty_like(words.states), torch.empty_like(words.alphas)
        grad_contexts = torch.empty_like(words.contexts)
        grad_h, grad_c = torch.zeros_like(c_first), torch.zeros_like(c_first)
        if grad_alpha_sum is None:
            grad_alpha_sum = torch.zeros_like(words.alphas[: len(c_first)])
        grad_alpha_sum = grad_alpha_sum.contiguous()
        if grad_gated is not None:
            grad_gated = grad_gated.contiguous()  # that of a sum is one number, expanded
        query = slice(4 * H, 4 * H + A)
        for t in reversed(range(len(packing.rows))):
            step, n = packing.steps[t], packing.rows[t]
            s, grad_s = words.states[step], grad_states[step]
            c_before = words.cells[packing.steps[t - 1]][:n] if t else c_first
            if grad_hidden is not None:
                grad_h[:n] += grad_hidden[step]
            kernels.cell_backward(
                s[:, : 4 * H], c_before, words.cells[step], grad_h[:n], grad_c[:n], grad_s[:, : 4 * H]
            )
            grad, asked = grad_s[:, : 4 * H] @ weights.context, None if grad_gated is None else grad_gated[step]
            gate, of_context = Gate(s[:, 4 * H + A :], weights.gate_bias), grad_contexts[step]
            kernels.gate_backward(gate, grad, asked, words.contexts[step], grad_s[:, 4 * H + A :], of_context)
            of_step = (of_context, grad_alpha_sum[:n], grad_scores[step], grad_s[:, query])
            kernels.attend_backward(seen, t, s[:, query], words.alphas[step], *of_step)
            grad_h[:n] = grad_s @ weights.state

        before = torch.cat([h_first, words.hidden])[packing.previous]
        grad_projection, grad_score = kernels.attend_backward_shared(seen, words.states[:, query], grad_scores)
        grad_grid = _grad_grid(packing, grid, words.alphas, grad_contexts) if ctx.needs_input_grad[1] else None
        grad_gates = grad_states[:, : 4 * H]
        of_inputs = (grad_grid, grad_projection, grad_gates, grad_h.to(h_first.dtype), grad_c)
        of_weights = Weights(
            state=grad_states.t() @ before,
            gate_bias=grad_states[:, 4 * H + A :].sum(0),
            context=grad_gates.t() @ words.gated,
            score=grad_score.to(weights.score.dtype),
        )
        return None, *of_inputs, *of_weights


def _grad_grid(packing: Packing, grid: Tensor, alphas: Tensor, grad_contexts: Tensor) -> Tensor:
    """d a_i = sum_t alpha_ti dz_t, one product per image."""
    parts = packing.image_words.split(packing.words_per_image)
    return torch.stack([alphas[part].to(grid.dtype).t() @ grad_contexts[part] for part in parts])
