"""What an optimizer step is, as one small contract. `ddp` and `zero` keep it; nobody else knows which is at work.

    with stepper.micro_batch(last=...):                   # for each micro-batch of the global batch
        stepper.backward(total_loss(stepper(*batch), tokens, captions))
    result = stepper.step()

A step is looked at before it moves anything: where the loss or the gradient of any rank is not finite, the weights and
the optimizer's state stay as they are.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sat.engine.processes import Processes
from sat.model.loss import LossSums


class StepResult(NamedTuple):
    """What became of a step; alike on all ranks. Scalars on the device, so that nobody waits for a GPU unasked."""

    gradient_norm: Tensor
    """Of the global batch, before clipping."""
    skipped: Tensor
    """Bool: loss or gradient were not finite, so nothing has moved."""
    overflowed: Tensor
    """Bool: skipped, and fp16's loss scale was to blame or may have been; it is halved. No sign of divergence."""


class Stepper(Protocol):
    """An objective and its optimizer under an engine. All ranks enter each of its functions."""

    @property
    def objective(self) -> nn.Module:
        """What is minimised, unwrapped."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its groups' "lr" are the rates of the next step."""
        ...

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Context of one micro-batch's forward and backward; gradients are exchanged in the `last` one only."""
        ...

    def __call__(self, *batch: Any) -> LossSums:
        """The objective's sums of a micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Back-propagate this micro-batch's share of the global batch's loss."""
        ...

    def step(self) -> StepResult:
        """Clip the gradient, update unless something is not finite, and forget the gradient."""
        ...

    def whole(self) -> AbstractContextManager[object]:
        """Inside, every rank holds all weights, to look at and not to change."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name (`sat.engine.state`), copied to the host on rank 0; {} on the others."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`, whatever the engine and the number of ranks that it is from; each rank has them all."""
        ...


class Engine(Protocol):
    """A way to train on these processes."""

    @property
    def processes(self) -> Processes:
        """The ranks."""
        ...

    @property
    def name(self) -> str:
        """For the log and the tracked parameters."""
        ...

    def wrap(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch: int,
        accumulation_steps: int,
        clip_norm: float,
    ) -> Stepper:
        """Ready to take steps of `accumulation_steps` micro-batches of at most `micro_batch` images per rank."""
        ...


def spread(loss: Tensor, scale: int) -> Tensor:
    """`loss` * `scale`; a loss that is not finite makes every gradient NaN.

    So through the exchange the norm alone tells all ranks of it, also where the gradient would have come out finite
    (an infinite loss behind a clamp, say).
    """
    return loss * torch.where(loss.detach().isfinite(), scale, torch.nan)
