"""The caption loss as sums with counts, so that it is the same for any batch split; divided once, after the reduction.

The vocabulary projection and its cross-entropy are one operation that walks over the words in chunks: logits of the
whole batch never exist. Surprising: its gradients are computed in the forward pass, where the chunk's logits are at
hand, and only scaled in the backward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sat.model.kernels.interface import Kernels
from sat.model.kernels.products import enough_columns, enough_rows, padded, prepares_for_sizes

CHUNK_BYTES, ON_GPU = 24 << 20, 512 << 20
"""Memory of one chunk of logits: about a CPU's last-level cache; on a GPU what is small beside its memory."""


class LossSums(NamedTuple):
    """Sums over this micro-batch. Scalars; float32 (float64 in a float64 model), counts of things int64."""

    per_token: Tensor
    """Differentiable; to be divided by the number of tokens of the global batch."""
    per_caption: Tensor
    """Differentiable; to be divided by the number of captions of the global batch."""
    counts: dict[str, Tensor]
    """Detached sums by name, at least:

    `nll`: negative log-likelihood of the target tokens, in nats, without smoothing; `penalty`: attention regulariser,
    weight included; `tokens`: predicted tokens; `captions`: captions that have at least one token; `correct`: tokens
    whose most probable prediction is right. Where there is attention also `entropy`, of alpha in nats, and `top`, the
    greatest weight of alpha, summed over the tokens.
    """


def total_loss(sums: LossSums, global_tokens: Tensor | float, global_captions: Tensor | float) -> Tensor:
    """The objective's share of this micro-batch; the shares of all ranks and micro-batches add up to the loss."""
    return sums.per_token / max(global_tokens, 1) + sums.per_caption / max(global_captions, 1)


class WordLoss(NamedTuple):
    objective: Tensor
    """Scalar, differentiable: summed cross-entropy against the (smoothed) targets."""
    nll: Tensor
    """[M], detached: negative log-likelihood of each target."""
    correct: Tensor
    """bool [M]: whether the most probable word is the target."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    smoothing: float,
    kernels: Kernels,
    factors: Tensor | None = None,
) -> WordLoss:
    """Cross-entropy of `hidden` [M, E] @ `weight` [V, E]^T + `bias` [V] against `targets` int64 [M]; keeps no logits.

    Matrix products run in the type of `hidden`, softmax and sums in float32 (float64 for float64). In the objective
    each word counts as often as `factors` [M] says, which has no gradient; None: once.
    """
    return WordLoss(*_LinearCrossEntropy.apply(hidden, weight, bias, targets, smoothing, kernels, factors))


class _LinearCrossEntropy(torch.autograd.Function):
    """With p = softmax(logits) and q = (1 - s) onehot + s / V: loss = -sum q log p, d loss / d logits = p - q."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        smoothing: float,
        kernels: Kernels,
        factors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dtypes = (hidden.dtype, weight.dtype, bias.dtype)
        V, bias = len(weight), bias.to(wide)
        weight = padded(weight.to(hidden.dtype), enough_columns(V, hidden))
        chunks = _chunks(hidden, V)
        nll, correct = hidden.new_empty(len(hidden), dtype=wide), torch.empty_like(targets, dtype=torch.bool)
        objective = nll.new_zeros(())
        gradients = None
        if any(ctx.needs_input_grad[:3]):
            of_hidden = hidden.new_empty(sum(rows for _, rows in chunks), hidden.shape[1])
            gradients = of_hidden, torch.zeros_like(weight, dtype=wide), bias.new_zeros(len(weight))
        for part, rows in chunks:
            fed = padded(hidden[part], rows)
            logits = fed @ weight.t()
            delta = logits[: len(nll[part]), :V]
            nll[part], sum_log_p, correct[part] = kernels.cross_entropy(delta, bias, targets[part], smoothing)
            loss, counted = nll[part], None
            if factors is not None:
                loss, sum_log_p = loss * factors[part], sum_log_p * factors[part]
                counted = padded(factors[part, None], rows)
            objective += (1 - smoothing) * loss.sum() - smoothing / V * sum_log_p.sum()
            if gradients is not None:  # what was made up of the logits are zeros, which add nothing
                of_part, once = of_hidden[part.start : part.start + rows], logits.new_ones(1, rows)
                torch.mm(logits, weight, out=of_part)
                if counted is not None:  # not the logits, which are larger than all the rest
                    of_part *= counted
                    fed, once = (fed * counted).to(fed.dtype), counted.t().to(logits.dtype)
                _add_product(gradients[1], logits.t(), fed)
                gradients[2].add_((once @ logits)[0])
        if gradients is not None:
            ctx.save_for_backward(*(each[:n] for each, n in zip(gradients, (len(hidden), V, V), strict=True)))
            ctx.dtypes = dtypes
        ctx.mark_non_differentiable(nll, correct)
        return objective, nll, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_objective, _, _ = grads
        gradients = ((g * grad_objective).to(d) for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *gradients, None, None, None, None


def _chunks(hidden: Tensor, words: int) -> list[tuple[slice, int]]:
    """Parts of `hidden` [M, E] whose logits over so many `words` are at hand at a time, and rows of their products.

    Each is as large as may be and the last one what is left; where products prepare for sizes, all have alike many
    rows, of few numbers, and the last ones of the last part are made up.
    """
    total, room = len(hidden), CHUNK_BYTES if hidden.device.type == "cpu" else ON_GPU
    size = max(1, room // (words * hidden.element_size()))
    alike = prepares_for_sizes(hidden)
    if alike and total:
        size = enough_rows(-(-total // -(-total // size)))
    parts = [slice(begin, min(begin + size, total)) for begin in range(0, total, size)]
    return [(part, size if alike else part.stop - part.start) for part in parts]


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add `one` [V, n] @ `other` [n, E] to the `total` [V, E], in the product itself where the types are alike."""
    if total.dtype == other.dtype:
        total.addmm_(one, other)
    else:
        total.add_(one @ other)
