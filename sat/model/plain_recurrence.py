"""The fast time loop without attention: the LSTM over packed rows, with a backward pass derived by hand.

As in `sat.model.recurrence`: one autograd function, so that the weight gradient is one matrix product after the loop.
N rows, n of them running at step t, M packed words, H LSTM width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sat.model.kernels.interface import Kernels
from sat.model.kernels.products import Plain, Prepare, padded, room_for
from sat.model.packing import Packing


class PlainLoop(NamedTuple):
    """What drives the loop."""

    kernels: Kernels
    packing: Packing
    prepare: Prepare = Plain
    """What the weight goes through before all steps' rows are multiplied by it."""


def recur_plain(loop: PlainLoop, word_gates: Tensor, h: Tensor, c: Tensor, state_weight: Tensor) -> Tensor:
    """Hidden states [M, H] of the words' share of the gates [M, 4H], from `h` and `c` [N, H] before the first step.

    `state_weight` [4H, H] is applied to h_{t-1}. `c` is float32 or wider, all else in the type of the matrix products.
    """
    hidden = _PlainRecurrence.apply(loop, word_gates, h, c, state_weight)
    assert isinstance(hidden, Tensor)
    return hidden


class _PlainRecurrence(torch.autograd.Function):
    """(i, f, g, o) = activations of (word gates + W h_{t-1});  c_t = f c_{t-1} + i g;  h_t = o tanh(c_t).

    Backward as in `sat.model.recurrence`, without all that concerns the context.
    """

    @staticmethod
    def forward(ctx: Any, loop: PlainLoop, word_gates: Tensor, h: Tensor, c: Tensor, state_weight: Tensor) -> Tensor:
        kernels, packing, prepare = loop
        by_state, M, (N, H) = prepare(state_weight.t()), len(word_gates), h.shape
        states, hidden, cells = torch.empty_like(word_gates), word_gates.new_empty(M, H), c.new_empty(M, H)
        no_context, before = word_gates.new_zeros(N, 4 * H), (h, c)
        for step, n in zip(packing.steps, packing.rows, strict=True):
            by_state.into(before[0][:n], states[step])
            now = hidden[step], cells[step]
            kernels.cell(states[step], word_gates[step], no_context[:n], before[1][:n], now[1], now[0])
            before = now
        ctx.save_for_backward(h, c, state_weight, states, hidden, cells)
        ctx.loop = loop
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_first, c_first, state_weight, states, hidden, cells = ctx.saved_tensors
        kernels, packing, prepare = ctx.loop
        by_state = prepare(state_weight)
        grad_gates = room_for(len(states), states.shape[1], states)
        grad_h, grad_c, asked = torch.zeros_like(h_first), torch.zeros_like(c_first), grads[0].contiguous()
        for t in reversed(range(len(packing.rows))):
            step, n = packing.steps[t], packing.rows[t]
            c_before = cells[packing.steps[t - 1]][:n] if t else c_first
            of_h = grad_h[:n], asked[step]
            kernels.cell_backward(states[step], c_before, cells[step], *of_h, grad_c[:n], grad_gates[step])
            by_state.into(grad_gates[step], grad_h[:n])
        before = padded(torch.cat([h_first, hidden])[packing.previous], len(grad_gates))
        of_words = grad_gates[: len(hidden)]
        return None, of_words, grad_h, grad_c, grad_gates.t() @ before
