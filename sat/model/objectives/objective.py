"""What an objective is: a module that turns a micro-batch into sums, and is what an engine wraps."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from sat.model.captioner import Captioner, Memory
from sat.model.loss import LossSums


class Trained(Protocol):
    """What an objective trains: a `Captioner`, or one with its encoder in front."""

    training: bool

    @property
    def captioner(self) -> Captioner:
        """The part that says words."""

    def encode(self, grid: Tensor, order: Tensor | None = None, regions: Tensor | None = None) -> Memory:
        """What the captioner needs of the inputs that `order` int64 [B'] picks, in that order."""


class Objective(Protocol):
    """A module (torch.nn.Module) whose parameters are those of `model`."""

    @property
    def follows(self) -> tuple[str, ...]:
        """Names of the counts whose sums over the global batch `after_step` wants."""

    def __call__(
        self,
        grid: Tensor,
        captions: Tensor,
        lengths: Tensor,
        sampling_probability: float = 0.0,
        regions: Tensor | None = None,
        keys: Tensor | None = None,
        references: Sequence[Sequence[str]] | None = None,
    ) -> LossSums:
        """Loss sums of one micro-batch; random numbers are functions of int64 `keys` [B, K] of its captions.

        `references` are the captions of each of its B images as they were given, where they are asked for.
        """

    def weighs(self, lengths: Tensor) -> tuple[int, int]:
        """What a micro-batch of captions of these `lengths` int64 [B, K] adds to the global numbers of `total_loss`."""

    def train(self) -> object:
        """Drop out and draw again, after `model` was scored in eval mode."""

    def after_step(self, totals: Mapping[str, float]) -> None:
        """Called after each optimizer step with the sums that it follows, the same on all ranks."""
