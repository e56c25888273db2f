"""What hard attention's gradient has beside the cross-entropy's own: REINFORCE at the drawn locations, and the entropy.

A caption y is learnt by the bound L = sum_s p(s | a) log p(y | s, a) on log p(y | a) over all sequences s of locations
(paper, section 4.1, eq. 10 and 11):

    dL = sum_s p(s | a) [d log p(y | s, a) + log p(y | s, a) d log p(s | a)]

One sequence s~ is drawn per caption; with the paper's reductions of variance the estimate is

    d log p(y | s~, a) + lambda_r (log p(y | s~, a) - b) d log p(s~ | a) + lambda_e d H[s~]

where b is a moving average and a share of the captions (`model.hard_exact`) sees alpha itself and no draw: it has the
first and the last term only. The first is what the cross-entropy gives by itself.

Surprising: b is kept per word and counts for as many words as the reward does, because captions of all lengths share a
batch here; among captions of one length, as in the paper's batches, that is the paper's b.
"""

import torch
from torch import Tensor

from sat.model.objectives.rollout import Rollout
from sat.model.packing import Packing
from sat.model.spec import CaptionerSpec

BASELINE_DECAY = 0.9
"""Decay of the moving average of the NLL per word that serves as the reward's baseline (paper, section 4.1)."""


def hard_attention_sums(
    spec: CaptionerSpec, rollout: Rollout, packing: Packing, nll: Tensor, baseline: Tensor
) -> Tensor:
    """Scalar whose gradient is that of the last two terms, negated and summed over the captions.

    `nll` [M] of the word that followed each location, `baseline` scalar, the mean NLL per word to be expected. With
    lambda_r 1, lambda_e 0 and no caption that sees alpha itself, the rewards `caption` and `later` are without bias;
    `word` leaves out what a location does to later words, `mean` weighs a caption by one over its length.
    """
    alpha, chosen = rollout.alpha, rollout.chosen
    assert alpha is not None and chosen is not None
    log_alpha = alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log()
    drawn = log_alpha.gather(1, chosen.clamp_min(0)[:, None]).squeeze(1) * (chosen >= 0)
    advantage = credited((baseline.to(nll.dtype) - nll.detach()) * packing.real, packing, spec.hard_reward)
    entropy = -(alpha * log_alpha).sum()
    return -spec.hard_reward_weight * (advantage * drawn * packing.real).sum() - spec.hard_entropy_weight * entropy


def credited(gains: Tensor, packing: Packing, reward: str) -> Tensor:
    """What the location before each word is credited with, [M], from each word's own gain [M].

    `reward`: the gains of the whole `caption` (paper), of the word and those `later`, of the very `word`, or the
    caption's `mean` (authors' code, where RL_sumCost is set).
    """
    if reward == "word":
        return gains
    if reward == "later":
        behind, found = gains.new_zeros(packing.rows[0]), torch.empty_like(gains)
        for n, step in zip(reversed(packing.rows), reversed(packing.steps), strict=True):
            behind[:n] += gains[step]
            found[step] = behind[:n]
        return found
    total = gains.new_zeros(packing.rows[0]).index_add(0, packing.word_row, gains)
    total = total / packing.row_lengths.clamp(min=1) if reward == "mean" else total
    return total[packing.word_row]
