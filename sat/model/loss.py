"""The caption loss as sums with counts, so that it is the same for any batch split; divided once, after the reduction.

The vocabulary projection and its cross-entropy are one operation that walks over the words in chunks: logits of the whole
batch never exist. Surprising: its gradients are computed in the forward pass, where the chunk's logits are at hand, and only
scaled in the backward pass.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 16 << 20
"""Memory of one chunk of fp32 logits; about a CPU's last-level cache."""


class LossSums(NamedTuple):
    """Sums over this micro-batch. Scalars; float32 (float64 in a float64 model), counts int64."""

    per_token: Tensor
    """Differentiable; to be divided by the number of tokens of the global batch."""
    per_caption: Tensor
    """Differentiable; to be divided by the number of captions of the global batch."""
    nll: Tensor
    """Detached: summed negative log-likelihood of the target tokens, in nats, without smoothing."""
    penalty: Tensor
    """Detached: summed attention regulariser, weight included."""
    tokens: Tensor
    """Predicted tokens."""
    captions: Tensor
    """Captions that have at least one token."""
    correct: Tensor
    """Tokens whose most probable prediction is right."""


def total_loss(sums: LossSums, global_tokens: Tensor | float, global_captions: Tensor | float) -> Tensor:
    """The objective's share of this micro-batch; the shares of all ranks and micro-batches add up to the loss."""
    return sums.per_token / max(global_tokens, 1) + sums.per_caption / max(global_captions, 1)


def doubly_stochastic_penalty(alpha_sum: Tensor, kind: str) -> Tensor:
    """Regulariser of each caption: `sum` or `mean` over locations of (1 - sum_t alpha_ti)^2 (paper, eq. 14).

    `alpha_sum` [N, L] is summed over the words that exist, so padding counts for nothing. Returns [N].
    """
    deviation = (1 - alpha_sum).square()
    return deviation.sum(1) if kind == "sum" else deviation.mean(1)


class WordLoss(NamedTuple):
    objective: Tensor
    """Scalar, differentiable: summed cross-entropy against the (smoothed) targets."""
    nll: Tensor
    """[M], detached: negative log-likelihood of each target."""
    correct: Tensor
    """Scalar int64: how often the most probable word is the target."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float = 0.0) -> WordLoss:
    """Cross-entropy of `hidden` [M, E] @ `weight` [V, E]^T + `bias` [V] against `targets` int64 [M], never keeping logits.

    `hidden` and `weight` share one dtype (that of the matrix products); softmax and sums are in float32, or float64.
    """
    return WordLoss(*_LinearCrossEntropy.apply(hidden, weight, bias, targets, smoothing))


class _LinearCrossEntropy(torch.autograd.Function):
    """With p = softmax(logits) and q = (1 - s) onehot + s / V: d loss / d logits = p - q."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, smoothing):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = max(1, CHUNK_BYTES // (len(weight) * wide.itemsize))
        needs_grad = any(ctx.needs_input_grad[:3])
        nll = hidden.new_zeros(len(hidden), dtype=wide)
        correct = targets.new_zeros(())
        objective = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_grad else None
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            target = targets[part, None]
            log_p = F.linear(hidden[part], weight).to(wide).add_(bias)
            correct += (log_p.argmax(1, keepdim=True) == target).sum()
            log_p.sub_(log_p.logsumexp(1, keepdim=True))
            nll[part] = -log_p.gather(1, target).squeeze(1)
            objective += (1 - smoothing) * nll[part].sum()
            if smoothing:
                objective -= smoothing * log_p.mean(1).sum()
            if needs_grad:
                delta = log_p.exp_()
                delta.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=wide))
                delta.sub_(smoothing / len(weight)) if smoothing else None
                grad_bias += delta.sum(0)
                delta = delta.to(hidden.dtype)
                torch.mm(delta, weight, out=grad_hidden[part])
                grad_weight += delta.t() @ hidden[part]
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype)
        ctx.mark_non_differentiable(nll, correct)
        return objective, nll, correct

    @staticmethod
    def backward(ctx, grad_objective, _nll, _correct):
        return *((g * grad_objective).to(d) for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)), None, None
