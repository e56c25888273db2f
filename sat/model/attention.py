"""Soft and hard attention over the grid of an image (Show, Attend and Tell, section 4).

Surprising: the score has no bias and the query none of its own; both would only duplicate others (a softmax ignores a
constant, `project` has one). Where images have regions of their own number, `regions` int64 [B] says how many of the L
locations are real: the others get no attention at all, None means that all are. B images, k queries per image (captions
or beams), L locations, D features, A hidden units.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sat.model.at_rest import PackableLinear


class Attended(NamedTuple):
    context: Tensor
    """[B, k, D] weighted sum of the grid, dtype of the grid."""
    alpha: Tensor
    """[B, k, L] distribution over the locations, float32 or float64."""
    chosen: Tensor | None
    """[B, k] location that was drawn, -1 where alpha itself was used; None for soft attention."""


class Attention(nn.Module):
    """e_ti = u . act(W_a a_i + W_h h_{t-1}), alpha_t = softmax(e_t): the parameters; `attend` is the computation."""

    def __init__(self, feature_dim: int, lstm_dim: int, attention_dim: int, score: str) -> None:
        super().__init__()
        self.project = nn.Linear(feature_dim, attention_dim)
        self.query = PackableLinear(lstm_dim, attention_dim, bias=False)
        self.score = nn.Linear(attention_dim, 1, bias=False)
        self.tanh = score == "tanh"

    def alpha(self, projection: Tensor, query: Tensor, regions: Tensor | None = None) -> Tensor:
        """Distribution over locations [B, k, L], float32 or wider, of `projection` [B, L, A] and `query` [B, k, A]."""
        hidden = projection[:, None] + query[:, :, None]  # [B, k, L, A]
        hidden = hidden.tanh() if self.tanh else hidden.relu()
        scores = hidden @ self.score.weight[0].to(hidden.dtype)
        if regions is not None:
            scores = scores.masked_fill(beyond(regions, scores.shape[-1])[:, None], -torch.inf)
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


def beyond(regions: Tensor, locations: int) -> Tensor:
    """bool [B, L]: the locations that are none, behind the `regions` int64 [B] of each image."""
    return torch.arange(locations, device=regions.device) >= regions[:, None]


def attend_soft(
    attention: Attention, grid: Tensor, projection: Tensor, query: Tensor, regions: Tensor | None = None
) -> Attended:
    """Expected context z_t = sum_i alpha_ti a_i (paper, eq. 13) of `grid` [B, L, D]; the rest as `Attention.alpha`."""
    alpha = attention.alpha(projection, query, regions)
    return Attended(alpha.to(grid.dtype) @ grid, alpha, None)


def attend_hard(
    attention: Attention,
    grid: Tensor,
    projection: Tensor,
    query: Tensor,
    exact: Tensor,
    uniform: Tensor,
    regions: Tensor | None = None,
) -> Attended:
    """Context of one location s_t ~ Multinoulli(alpha_t), or of alpha itself where `exact` (bool [B, k]) is true.

    Paper, section 4.1. `uniform` float64 [B, k] in [0, 1) decides the draw. A drawn location passes no gradient to
    alpha: the objective supplies it.
    """
    alpha = attention.alpha(projection, query, regions)
    chosen = drawn_location(alpha.detach(), uniform)
    weights = torch.where(exact[..., None], alpha, _one_hot(chosen, alpha))
    return Attended(weights.to(grid.dtype) @ grid, alpha, chosen.masked_fill(exact, -1))


def drawn_location(alpha: Tensor, uniform: Tensor) -> Tensor:
    """int64 [B, k]: the location that `uniform` float64 [B, k] in [0, 1) falls to, each by its share in alpha."""
    ends = alpha.double().cumsum(-1)
    return (ends <= uniform[..., None] * ends[..., -1:]).sum(-1)


def attend_for_inference(
    attention: Attention,
    grid: Tensor,
    projection: Tensor,
    query: Tensor,
    how: str,
    regions: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Attended:
    """`expectation` is soft attention; hard attention may also `sample` one location or take the best, `argmax`.

    `uniform` float64 [B, k] in [0, 1) decides what is sampled.
    """
    if how == "expectation":
        return attend_soft(attention, grid, projection, query, regions)
    alpha = attention.alpha(projection, query, regions)
    if how == "sample":
        assert uniform is not None
        draw = drawn_location(alpha, uniform)
    else:
        draw = alpha.argmax(2)
    return Attended(_one_hot(draw, alpha).to(grid.dtype) @ grid, alpha, draw)


def _one_hot(location: Tensor, alpha: Tensor) -> Tensor:
    return torch.zeros_like(alpha).scatter_(2, location[..., None], 1)
