"""The fast time loop: attention and LSTM over packed rows, with a backward pass derived by hand.

Surprising: the whole loop is one autograd function. Autograd would keep every intermediate [rows, L, A] and compute
each weight gradient once per step; here a step keeps little, and each weight gradient is one matrix product after the
loop. N rows, n of them running at step t, M packed words, L locations; H LSTM, A attention, D feature width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sat.model.kernels.interface import Kernels, Seen
from sat.model.kernels.products import Plain, Prepare
from sat.model.locations import Locations
from sat.model.packing import Packing
from sat.model.passage import Asked, Gradients, Inputs, Passage, Weights, Words, grad_of_grid


class Loop(NamedTuple):
    """What drives the loop."""

    kernels: Kernels
    packing: Packing
    tanh: bool
    """The score's non-linearity: tanh or ReLU."""
    regions: Tensor | None = None
    """int64 [B] locations that are real, the first ones of each image; None: all."""
    locations: Locations | None = None
    """Where hard attention looks; None: soft attention."""
    prepare: Prepare = Plain
    """What the weights go through before all steps' rows are multiplied by them."""


def recur(loop: Loop, inputs: Inputs, weights: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the loop; returns hidden states [M, H], gated contexts [M, D], alpha summed per row [N, L], and alpha [M, L].

    Both alphas are wide; the latter, of soft attention, is to be looked at and passes no gradient.
    """
    hidden, gated, alpha_sum, alphas = _Recurrence.apply(loop, *inputs, *weights)
    return hidden, gated, alpha_sum, alphas


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

    Where hard attention has chosen a location s for a word, z_t = a_s: dz_t reaches a_s and not alpha. The gradient of
    alpha is then what the objective makes of it by itself.
    """

    @staticmethod
    def forward(ctx: Any, loop: Loop, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs, weights = Inputs(*tensors[:5]), Weights(*tensors[5:])
        kernels, packing, tanh, regions, locations, prepare = loop
        projection = kernels.prepare(inputs.projection, tanh)
        seen = Seen(packing, inputs.grid.contiguous(), projection, weights.score, tanh, regions)
        words = Words.empty(inputs, weights)
        Passage(kernels, seen, inputs.h, inputs.c, weights, words, locations, prepare).forward(inputs.word_gates)
        if packing.roomy:  # what looks nowhere is asked for nothing by the sums of alpha
            words.alphas.masked_fill_((packing.real == 0)[:, None], 0)
        ctx.loop = loop
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seen.grid, projection, inputs.h, inputs.c, *weights, *words)
        if not locations:
            ctx.mark_non_differentiable(words.alphas)
        gated = words.gated[: len(words.hidden)]
        return words.hidden, gated, kernels.alpha_sums(packing, words.alphas), words.alphas

    @staticmethod
    def backward(ctx: Any, *asks: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, gated, alpha_sum, alphas = asks
        of_grid: bool = ctx.needs_input_grad[1]
        grid, projection, h, c, *kept = ctx.saved_tensors
        kernels, packing, tanh, regions, locations, prepare = ctx.loop
        weights, words = Weights(*kept[:4]), Words(*kept[4:])
        seen = Seen(packing, grid, projection, weights.score, tanh, regions)
        passage = Passage(kernels, seen, h, c, weights, words, locations, prepare)
        grads = Gradients.empty(words, c)
        passage.backward(Asked.of(hidden, gated, alpha_sum, alphas, words, len(c)), grads)
        grad_projection, of_weights = passage.shared(grads)
        weighed = locations.weights(words.alphas) if locations and of_grid else words.alphas
        grad_grid = grad_of_grid(packing, weighed, grads.contexts) if of_grid else None
        of_words = grads.states[: len(words.hidden), : 4 * h.shape[1]]
        return None, grad_grid, grad_projection, of_words, grads.h, grads.c, *of_weights
