"""The fast time loop: soft attention and LSTM over packed rows, with a backward pass derived by hand.

Surprising: the whole loop is one autograd function. Autograd would keep every intermediate [rows, L, A] and compute
each weight gradient once per step; here a step keeps little, and each weight gradient is one matrix product after the
loop. N rows, n of them running at step t, M packed words, L locations; H LSTM, A attention, D feature width, G width of
the gate (0, 1 or D).
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sat.model.kernels.torch_kernels import Seen
from sat.model.packing import Packing


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


def recur(
    kernels: ModuleType,
    packing: Packing,
    tanh: bool,
    grid: Tensor,
    projection: Tensor,
    word_gates: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Weights,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the loop over `packing`; returns hidden states [M, H], gated contexts [M, D], alpha summed per row [N, L].

    `grid` [B, L, D], `projection` [B, L, A], `word_gates` [M, 4H] (the words' share of the gates), h and c [N, H] from
    before the first step; c and alpha in float32 or wider, all else in the type of the matrix products. `kernels` is
    `sat.model.kernels.native` or `sat.model.kernels.torch_kernels`.
    """
    return _Recurrence.apply(kernels, packing, tanh, grid, projection, word_gates, h, c, *weights)


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
    def forward(ctx, kernels, packing, tanh, grid, projection, word_gates, h, c, *weights):
        state_weight, gate_bias, context_weight, score = weights
        M, H, A = len(word_gates), h.shape[1], len(score)
        seen = Seen(packing, grid.contiguous(), kernels.prepare(projection, tanh), score, tanh)
        states = word_gates.new_empty(M, len(state_weight))
        hidden, cells = word_gates.new_empty(M, H), c.new_empty(M, H)
        contexts = word_gates.new_empty(M, grid.shape[2])
        gated = torch.empty_like(contexts) if len(gate_bias) else contexts
        alphas, alpha_sum = c.new_empty(M, grid.shape[1]), c.new_zeros(len(c), grid.shape[1])
        h_first, c_first = h, c
        for t, step in enumerate(packing.steps):
            n, s = packing.rows[t], states[step]
            torch.mm(h[:n], state_weight.t(), out=s)
            kernels.attend(seen, t, s[:, 4 * H : 4 * H + A], alphas[step], contexts[step])
            alpha_sum[:n] += alphas[step]
            if len(gate_bias):
                gate = s[:, 4 * H + A :].add_(gate_bias).sigmoid_()
                torch.mul(contexts[step], gate, out=gated[step])
            context_gates = gated[step] @ context_weight.t()
            kernels.cell(s[:, : 4 * H], word_gates[step], context_gates, c[:n], cells[step], hidden[step])
            h, c = hidden[step], cells[step]
        ctx.save_for_backward(
            seen.grid,
            seen.projection,
            h_first,
            c_first,
            state_weight,
            context_weight,
            score,
            states,
            hidden,
            cells,
            contexts,
            gated,
            alphas,
        )
        ctx.kernels, ctx.packing, ctx.tanh, ctx.gate_width = kernels, packing, tanh, len(gate_bias)
        ctx.set_materialize_grads(False)
        return hidden, gated, alpha_sum

    @staticmethod
    def backward(ctx, grad_hidden, grad_gated, grad_alpha_sum):
        (
            grid,
            projection,
            h_first,
            c_first,
            state_weight,
            context_weight,
            score,
            states,
            hidden,
            cells,
            contexts,
            gated,
            alphas,
        ) = ctx.saved_tensors
        kernels, packing, H, A = ctx.kernels, ctx.packing, hidden.shape[1], len(score)
        seen = Seen(packing, grid, projection, score, ctx.tanh)
        grad_states, grad_scores = torch.empty_like(states), torch.empty_like(alphas)
        grad_contexts = torch.empty_like(contexts)
        grad_h, grad_c = torch.zeros_like(c_first), torch.zeros_like(c_first)
        if grad_alpha_sum is None:
            grad_alpha_sum = torch.zeros_like(alphas[: len(c_first)])
        grad_alpha_sum = grad_alpha_sum.contiguous()
        for t in reversed(range(len(packing.rows))):
            step, n = packing.steps[t], packing.rows[t]
            s, grad_s = states[step], grad_states[step]
            c_before = cells[packing.steps[t - 1]][:n] if t else c_first
            if grad_hidden is not None:
                grad_h[:n] += grad_hidden[step]
            kernels.cell_backward(s[:, : 4 * H], c_before, cells[step], grad_h[:n], grad_c[:n], grad_s[:, : 4 * H])
            grad = grad_s[:, : 4 * H] @ context_weight
            if grad_gated is not None:
                grad += grad_gated[step]
            if ctx.gate_width:
                gate = s[:, 4 * H + A :]
                asked = grad * contexts[step]
                asked = asked.sum(1, keepdim=True) if ctx.gate_width == 1 else asked
                grad_s[:, 4 * H + A :] = asked * gate * (1 - gate)
                grad *= gate
            grad_contexts[step] = grad
            query = slice(4 * H, 4 * H + A)
            kernels.attend_backward(
                seen, t, s[:, query], alphas[step], grad, grad_alpha_sum[:n], grad_scores[step], grad_s[:, query]
            )
            grad_h[:n] = grad_s @ state_weight

        before = torch.cat([h_first, hidden])[packing.previous]
        grad_projection, grad_score = kernels.attend_backward_shared(seen, states[:, 4 * H : 4 * H + A], grad_scores)
        grad_gates = grad_states[:, : 4 * H]
        return (
            None,
            None,
            None,
            _grad_grid(packing, grid, alphas, grad_contexts) if ctx.needs_input_grad[3] else None,
            grad_projection,
            grad_gates,
            grad_h.to(h_first.dtype),
            grad_c,
            grad_states.t() @ before,
            grad_states[:, 4 * H + A :].sum(0),
            grad_gates.t() @ gated,
            grad_score.to(score.dtype),
        )


def _grad_grid(packing: Packing, grid: Tensor, alphas: Tensor, grad_contexts: Tensor) -> Tensor:
    """d a_i = sum_t alpha_ti dz_t, one product per image."""
    ends, words = packing.words_by_image
    parts = words.split(ends.diff().tolist())
    return torch.stack([alphas[part].to(grid.dtype).t() @ grad_contexts[part] for part in parts])
