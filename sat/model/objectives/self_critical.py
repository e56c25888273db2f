"""Self-critical training: the model's own captions are drawn and rewarded (Rennie et al. 2017). What an engine wraps.

The expected reward J = sum_y p(y | a) r(y) of the captions y of an image a has the gradient

    dJ = sum_y p(y | a) (r(y) - b) d log p(y | a)

for any b that does not depend on y. Of n samples each is an estimate of it; b is the reward of the caption that greedy
search finds (Rennie et al. 2017, eq. 8), or the mean reward of the image's other samples (Luo 2020, "A Better Variant
of Self-Critical Sequence Training"). Samples are drawn without gradients by the batched decoder and then scored again
along the fast path of teacher forcing, each word weighted by its caption's r - b; images are encoded once for both, or
once more in a recording (`sat.model.objectives.replayed`).
Surprising: the reward is all that counts. Neither the regulariser of attention nor smoothing of labels takes part.
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sat.model.at_rest import weights_at_rest
from sat.model.captioner import Memory
from sat.model.draws import Draws, Site, derive
from sat.model.loss import LossSums
from sat.model.objectives.objective import Trained
from sat.model.objectives.options import SelfCriticalOptions
from sat.model.objectives.replayed import MicroBatch, Replay
from sat.model.objectives.rollout import roll_out, word_losses
from sat.model.objectives.sampling import Samples, draw_samples
from sat.model.objectives.teacher_forcing import TeacherForcing, attention_counts
from sat.model.packing import pack


class Reward(Protocol):
    """What a caption is worth beside the human ones of its image; no gradient goes through it."""

    def __call__(self, samples: Sequence[Sequence[int]], references: Sequence[Sequence[str]]) -> Sequence[float]:
        """A number for each of the samples, ids of words and `<end>`, by the captions of its image as given."""


class _Judged(NamedTuple):
    """B images, n samples each."""

    rewards: Tensor
    """float64 [B, n]"""
    baselines: Tensor
    """float64 [B, n]"""


class SelfCritical(nn.Module):
    """The negated expected reward of the model's own captions."""

    def __init__(self, model: Trained, reward: Reward, options: SelfCriticalOptions) -> None:
        """Raises ValueError for a model of hard attention, whose samples would have locations beside words."""
        super().__init__()
        if model.captioner.spec.attention == "hard":
            raise ValueError("self-critical training knows no hard attention")
        self.model, self.reward, self.options = model, reward, options
        self._replay = Replay(model.captioner) if model is model.captioner else None

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
        """Loss sums of `grid` [B, L, D] with the `references` of its B images; arguments as of `TeacherForcing`.

        Only images with a caption, by `lengths`, are sampled, and what `captions` say is not looked at. Samples are
        functions of int64 `keys` [B, K], of the first caption of each image, and of their numbers; without keys they
        are fresh ones. The loss is the `per_caption` sum; its captions are the samples.
        """
        images = (lengths > 0).any(1).nonzero().squeeze(1)  # [B']
        if not len(images):
            return self._nothing(TeacherForcing(self.model, replays=False)(grid, captions, lengths, 0.0, regions))
        if keys is None:
            keys = torch.randint(-(1 << 63), (1 << 63) - 1, lengths.shape)
        assert references is not None and not sampling_probability
        began, model, n = time.perf_counter(), self.model.captioner, self.options.samples
        there = images.to(grid.device, non_blocking=True)
        memory = self.model.encode(grid, there, regions)
        numbers = torch.arange(n, device=grid.device) + (int(Site.SAMPLE) << 32)
        drawn = derive(keys.to(grid.device, non_blocking=True)[there, :1], numbers)  # [B', n]
        greedy, longest = self.options.baseline == "greedy", self.options.max_length
        with weights_at_rest([model]):
            samples = draw_samples(model, model.for_decoding(memory), drawn, longest, greedy).cpu()
        sampled = time.perf_counter()
        judged = self._judge(samples.listed(), [references[image] for image in images.tolist()])
        rewarded = time.perf_counter()
        scored = Samples(samples.captions[:, :n], samples.lengths[:, :n])
        batch = MicroBatch(grid, *scored, regions, drawn.cpu(), judged.rewards - judged.baselines)
        sums = self._sums(batch, there, memory)
        more = {
            "reward": float(judged.rewards.sum()),
            "baseline": float(judged.baselines.sum()),
            "sampling_seconds": sampled - began,
            "reward_seconds": rewarded - sampled,
        }
        return sums._replace(counts=sums.counts | {name: _scalar(value, sums) for name, value in more.items()})

    def weighs(self, lengths: Tensor) -> tuple[int, int]:
        """No token is known before the samples are; their number is."""
        return 0, int((lengths > 0).any(1).sum()) * self.options.samples

    @property
    def follows(self) -> tuple[str, ...]:
        """The baseline follows nothing."""
        return ()

    def after_step(self, totals: Mapping[str, float]) -> None:
        """Nothing."""

    def _judge(self, samples: list[list[list[int]]], references: list[Sequence[str]]) -> _Judged:
        """Of the samples of each image, a greedy one last where there is one."""
        of_each = [texts for texts, mine in zip(references, samples, strict=True) for _ in mine]
        found = self.reward([each for mine in samples for each in mine], of_each)
        rewards = torch.as_tensor(found, dtype=torch.float64).view(len(samples), -1)
        n = self.options.samples
        if self.options.baseline == "greedy":
            return _Judged(rewards[:, :n], rewards[:, n:].expand(-1, n))
        return _Judged(rewards, (rewards.sum(1, keepdim=True) - rewards) / (n - 1))

    def _sums(self, batch: MicroBatch, images: Tensor, memory: Memory) -> LossSums:
        """The samples scored again; they are those of `images` int64 [B'] of the grid, whose `memory` is there."""
        assert batch.gains is not None
        if self._replay:
            regions = None if batch.regions is None else batch.regions[images]
            replayed = self._replay.sums(batch._replace(grid=batch.grid[images], regions=regions), self._sums_of)
            if replayed:
                return replayed
        packing = pack(batch.captions, batch.lengths, memory.grid.device)
        gains = batch.gains.to(memory.grid.device)[packing.images[packing.row_image], packing.row_caption]
        return self._sums_of(memory.pick(packing.images), Draws.of(batch.keys, packing), gains)

    def _sums_of(self, memory: Memory, draws: Draws, gains: Tensor | None) -> LossSums:
        """Of images in the order of the packing; each word is weighed by what its caption gains, float64 [N]."""
        assert gains is not None
        model, packing = self.model.captioner, draws.packing
        rollout = roll_out(model, memory, draws, 0.0)
        factors = (gains[packing.word_row] * packing.real).to(torch.promote_types(rollout.hidden.dtype, torch.float32))
        words = word_losses(model, rollout, draws, 0.0, factors)
        zero = torch.zeros_like(words.objective)
        counts = {
            "nll": (words.nll * packing.real).sum(),
            "penalty": zero.detach(),
            "tokens": packing.real.sum(),
            "captions": (packing.row_lengths > 0).sum(),
            "correct": (words.correct * packing.real).sum(),
        }
        if rollout.alpha is not None:
            counts |= attention_counts(rollout.alpha.detach())
        return LossSums(zero, words.objective, counts)

    def _nothing(self, sums: LossSums) -> LossSums:
        """The zeros of teacher forcing without captions, with all that is counted here."""
        more = ("reward", "baseline", "sampling_seconds", "reward_seconds")
        return sums._replace(counts=sums.counts | {name: _scalar(0.0, sums) for name in more})


def _scalar(value: float, sums: LossSums) -> Tensor:
    return sums.counts["nll"].new_full((), value)
