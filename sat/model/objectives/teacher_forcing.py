"""Teacher forcing: each caption's words are fed, and its next words are to be predicted. What an engine wraps.

Surprising: a micro-batch without any caption runs the graph of any other, on one caption made up for it, with weight
zero: an engine that splits gradients among ranks counts on every parameter's gradient arriving on every rank.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sat.model.attention import beyond
from sat.model.captioner import END, START, Memory
from sat.model.draws import Draws
from sat.model.loss import LossSums
from sat.model.objectives.hard_attention import BASELINE_DECAY, hard_attention_sums
from sat.model.objectives.objective import Trained
from sat.model.objectives.replayed import MicroBatch, Replay
from sat.model.objectives.rollout import roll_out, word_losses
from sat.model.packing import pack


class TeacherForcing(nn.Module):
    """Cross-entropy of the true words, with the regulariser of soft attention or the gradient of hard attention."""

    def __init__(self, model: Trained, replays: bool = True) -> None:
        """`replays`: whether its launches may be recorded where that serves, which hides them from a profile."""
        super().__init__()
        self.model = model
        self._replay = Replay(model.captioner) if replays and model is model.captioner else None

    def forward(
        self,
        grid: Tensor,
        captions: Tensor,
        lengths: Tensor,
        sampling_probability: float = 0.0,
        regions: Tensor | None = None,
        keys: Tensor | None = None,
        references: Sequence[Sequence[str]] | None = None,
    ) -> LossSums:
        """Loss sums of `grid` [B, L, D] (as stored) with `captions` int64 [B, K, T + 1] and `lengths` int64 [B, K].

        `grid` is uint8 pictures [B, 3, S, S] where an encoder stands in front. With `regions` int64 [B] only the first
        so many locations of an image are real, and what is in the others does not matter. `lengths` counts predicted
        tokens (words and `<end>`), 0 for a caption that does not exist; inputs without captions are not looked at. In
        train mode dropout, hard attention and scheduled sampling (with `sampling_probability` the model's own last word
        is fed) draw by int64 `keys` [B, K] of the captions; without them by fresh ones from torch's default generator.
        Without any caption the sums are zeros that still reach every parameter. `references` say nothing here. Raises
        ValueError for shapes and lengths that do not fit.
        """
        del references
        if keys is not None and keys.shape != lengths.shape:
            raise ValueError(f"keys [B, K] of {list(lengths.shape)} expected, got {list(keys.shape)}")
        if self._replay and not sampling_probability:
            replayed = self._replay.sums(MicroBatch(grid, captions, lengths, regions, keys), self._sums_of)
            if replayed:
                return replayed
        packing = pack(captions, lengths, grid.device)
        if packing.rows:
            return self._sums(grid, Draws.of(keys, packing), sampling_probability, regions)
        made_up = pack(torch.tensor([[[START, END]]]), torch.ones(1, 1, dtype=torch.int64), grid.device)
        with _statistics_kept(self):
            sums = self._sums(
                grid, Draws.of(torch.zeros(1, 1, dtype=torch.int64), made_up), sampling_probability, regions
            )
        counts = {name: torch.zeros_like(count) for name, count in sums.counts.items()}
        return LossSums(sums.per_token * 0, sums.per_caption * 0, counts)

    def weighs(self, lengths: Tensor) -> tuple[int, int]:
        """Its predicted tokens and its captions."""
        return int(lengths.sum()), int((lengths > 0).sum())

    @property
    def follows(self) -> tuple[str, ...]:
        """Hard attention's baseline follows the NLL per token."""
        return ("nll", "tokens") if self.model.captioner.spec.attention == "hard" else ()

    @torch.no_grad()
    def after_step(self, totals: Mapping[str, float]) -> None:
        """Move hard attention's reward baseline towards the global batch's mean NLL per token; alike on all ranks."""
        if self.follows and totals["tokens"]:
            baseline = self.model.captioner.reward_baseline
            mean = torch.as_tensor(totals["nll"] / totals["tokens"])
            baseline.lerp_(mean.to(baseline), 1 - BASELINE_DECAY)

    def _sums(self, grid: Tensor, draws: Draws, sampling_probability: float, regions: Tensor | None) -> LossSums:
        memory = self.model.encode(grid, draws.packing.images, regions)
        return self._sums_of(memory, draws, None, sampling_probability)

    def _sums_of(
        self, memory: Memory, draws: Draws, gains: Tensor | None = None, sampling_probability: float = 0.0
    ) -> LossSums:
        """Of images in the order of the packing; all captions count alike, so there are no `gains`."""
        del gains
        model, packing = self.model.captioner, draws.packing
        rollout = roll_out(model, memory, draws, sampling_probability)
        counted = packing.real.to(rollout.hidden.dtype) if packing.roomy else None
        words = word_losses(model, rollout, draws, model.spec.label_smoothing, counted)
        per_token, penalty, zero = words.objective, torch.zeros_like(words.nll[0]), torch.zeros_like(words.nll[0])
        spec, rows = model.spec, packing.row_lengths > 0
        if spec.attention == "soft":  # the regulariser belongs to soft attention (paper, section 4.2.1)
            assert rollout.alpha_sum is not None
            real = None if memory.regions is None else memory.regions[packing.row_image]
            of_rows = doubly_stochastic_penalty(rollout.alpha_sum, spec.penalty, real)
            penalty = spec.penalty_weight * (of_rows * rows).sum()
        elif spec.attention == "hard" and model.training:
            per_token = per_token + hard_attention_sums(spec, rollout, packing, words.nll, model.reward_baseline)
        counts = {
            "nll": (words.nll * packing.real).sum(),
            "penalty": penalty.detach(),
            "tokens": packing.real.sum(),
            "captions": rows.sum(),
            "correct": (words.correct * packing.real).sum(),
        }
        if rollout.alpha is not None:
            counts |= attention_counts(rollout.alpha.detach())
        by_token = spec.penalty == "sum"
        return LossSums(per_token + penalty if by_token else per_token, zero if by_token else penalty, counts)


def attention_counts(alpha: Tensor) -> dict[str, Tensor]:
    """How sharp attention is, summed over the words of `alpha` [M, L]: `entropy` in nats, `top` the greatest weight."""
    log_alpha = alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log_()
    return {"entropy": -(alpha * log_alpha).sum(), "top": alpha.amax(1).sum()}


def doubly_stochastic_penalty(alpha_sum: Tensor, kind: str, regions: Tensor | None = None) -> Tensor:
    """Regulariser of each caption: `sum` or `mean` over locations of (1 - sum_t alpha_ti)^2 (paper, eq. 14).

    `alpha_sum` [N, L] is summed over the words that exist, so padding counts for nothing; with `regions` int64 [N] nor
    do the locations behind the first so many, and the mean is over those. Returns [N].
    """
    deviation = (1 - alpha_sum).square()
    if regions is None:
        return deviation.sum(1) if kind == "sum" else deviation.mean(1)
    total = deviation.masked_fill(beyond(regions, alpha_sum.shape[1]), 0).sum(1)
    return total if kind == "sum" else total / regions


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, no BatchNorm of `module` moves its statistics."""
    moving = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d) and norm.training]
    for norm in moving:
        norm.eval()
    try:
        yield
    finally:
        for norm in moving:
            norm.train()
