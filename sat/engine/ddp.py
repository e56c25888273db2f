"""Every rank holds everything and gradients are exchanged (DistributedDataParallel); with one rank, plain torch."""

import contextlib
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sat.engine.engine import StepResult, spread
from sat.engine.loss_scale import LossScale
from sat.engine.processes import Processes
from sat.engine.state import MOMENTS, STEP, WEIGHTS, host_copies, model_of, open_parameters, part, weights_of
from sat.model.loss import LossSums
from sat.optim import clip_gradients


@dataclass(frozen=True)
class Ddp:
    """The engine."""

    processes: Processes
    name: str = "DDP"

    def wrap(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch: int,
        accumulation_steps: int,
        clip_norm: float,
    ) -> "DdpStepper":
        """See `Engine`; any micro-batch will do."""
        del micro_batch, accumulation_steps
        processes, module = self.processes, objective
        if processes.world_size > 1:
            # Otherwise the buckets are laid out anew after the first step of every life, and a ring of three ranks and
            # more then adds the shares of a gradient in another order: a resumed run would differ in its last bits.
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            # Without `device_ids`, which would move the captions to a GPU: the step is planned on the host.
            module = DistributedDataParallel(objective, gradient_as_bucket_view=True, find_unused_parameters=True)
        return DdpStepper(objective, module, optimizer, clip_norm, processes, LossScale.of(processes))


@dataclass(frozen=True)
class DdpStepper:
    """See `Stepper`."""

    objective: nn.Module
    module: nn.Module
    """The objective, wrapped for the exchange of gradients."""
    optimizer: torch.optim.Optimizer
    """Fused: the fused kernels leave weights and state as they are where `found_inf` says so, on the device."""
    clip_norm: float
    processes: Processes
    loss_scale: LossScale | None = None
    """Of fp16."""

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """The exchange is part of the last backward pass."""
        if not last and isinstance(self.module, DistributedDataParallel):
            context: AbstractContextManager[object] = self.module.no_sync()
            return context
        return contextlib.nullcontext()

    def __call__(self, *batch: Any) -> LossSums:
        """Through the wrapper, which prepares the exchange."""
        sums = self.module(*batch)
        assert isinstance(sums, LossSums)
        return sums

    def backward(self, loss: Tensor) -> None:
        """The exchange averages over ranks, which is undone here: the shares are to be added up."""
        loss = spread(loss, self.processes.world_size)
        (loss * self.loss_scale.scale if self.loss_scale else loss).backward()

    def step(self) -> StepResult:
        """Decided on the device, so that the host goes on to the next step at once."""
        if self.loss_scale:
            gradients = [each.grad for each in self.objective.parameters() if each.grad is not None]
            torch._foreach_mul_(gradients, self.loss_scale.scale.reciprocal())
        norm = clip_gradients(self.objective.parameters(), self.clip_norm)
        skipped = norm.isfinite().logical_not()
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]  # as GradScaler hands it over
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        overflowed = self.loss_scale.update(skipped) if self.loss_scale else torch.zeros_like(skipped)
        return StepResult(norm, skipped, overflowed)

    def whole(self) -> AbstractContextManager[object]:
        """They always are."""
        return contextlib.nullcontext()

    def state(self) -> dict[str, Tensor]:
        """All ranks hold the same; the first copies it."""
        if not self.processes.is_main:
            return {}
        found = weights_of(model_of(self.objective)) | (self.loss_scale.state() if self.loss_scale else {})
        steps = torch.zeros(())
        for name, parameter in open_parameters(self.objective):
            known = self.optimizer.state.get(parameter)
            for moment in MOMENTS:
                found[f"{moment}/{name}"] = known[moment] if known else torch.zeros_like(parameter)
            steps = known["step"] if known else steps
        return host_copies(found | {STEP: steps})

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Each rank takes it for itself."""
        model_of(self.objective).load_state_dict(part(tensors, WEIGHTS))
        if self.loss_scale:
            self.loss_scale.load_state(tensors)
        for name, parameter in open_parameters(self.objective):
            known = {moment: tensors[f"{moment}/{name}"].to(parameter, copy=True) for moment in MOMENTS}
            self.optimizer.state[parameter] = {"step": tensors[STEP].to(parameter.device, copy=True)} | known
