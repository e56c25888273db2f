"""Optimizer state, gradients and weights are split over the ranks: DeepSpeed's ZeRO 1, 2 and 3.

The launcher's file says which. Surprising: DeepSpeed is always given float32 weights, and bf16 and fp16 are autocast's
matter as without it, so that every engine computes, saves and exports the same.
"""

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sat.engine.engine import StepResult, spread
from sat.engine.loss_scale import LossScale
from sat.engine.processes import Processes
from sat.engine.state import MOMENTS, STEP, WEIGHTS, host_copies, model_of, open_parameters, part, weights_of
from sat.model.loss import LossSums

BUCKET = 50_000_000
"""Elements that are exchanged at once."""


@dataclass(frozen=True)
class Zero:
    """The engine."""

    processes: Processes
    accelerator: Any
    """Accelerate's, which configures DeepSpeed from what the launcher announced."""

    @property
    def name(self) -> str:
        """With its stage."""
        return f"DeepSpeed ZeRO {self.accelerator.state.deepspeed_plugin.zero_stage}"

    def wrap(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch: int,
        accumulation_steps: int,
        clip_norm: float,
    ) -> "ZeroStepper":
        """See `Engine`."""
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = micro_batch
        settings["gradient_accumulation_steps"] = accumulation_steps
        settings["train_batch_size"] = micro_batch * accumulation_steps * self.processes.world_size
        settings["gradient_clipping"] = clip_norm
        self.accelerator.gradient_accumulation_steps = accumulation_steps
        engine, wrapped = self.accelerator.prepare(objective, optimizer)
        shares = self.processes.world_size * accumulation_steps
        stepper = ZeroStepper(engine, wrapped, self.processes, shares, LossScale.of(self.processes))
        stepper.begin_adam(torch.zeros(()))
        return stepper


@dataclass(frozen=True)
class ZeroStepper:
    """See `Stepper`."""

    engine: Any
    """DeepSpeed's."""
    optimizer: torch.optim.Optimizer
    """Accelerate's view of DeepSpeed's view of ours."""
    processes: Processes
    shares: int
    """What DeepSpeed divides a gradient by: ranks times micro-batches."""
    loss_scale: LossScale | None = None
    """Of fp16."""

    @property
    def objective(self) -> nn.Module:
        """Unwrapped."""
        module = self.engine.module
        assert isinstance(module, nn.Module)
        return module

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """DeepSpeed exchanges with every micro-batch; only after the `last` one there is a step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        return contextlib.nullcontext()

    def __call__(self, *batch: Any) -> LossSums:
        """Through DeepSpeed, which counts."""
        sums = self.engine(*batch)
        assert isinstance(sums, LossSums)
        return sums

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over ranks and micro-batches, which is undone here: the shares are to be added up."""
        if self.loss_scale:
            self.engine.optimizer.override_loss_scale(float(self.loss_scale.scale))
        self.engine.backward(spread(loss, self.shares))

    def step(self) -> StepResult:
        """DeepSpeed looks at the norm of all ranks before it updates; an update in spite of it is not survived."""
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32).detach()
        skipped = not self.engine.was_step_applied()
        if not skipped and not norm.isfinite():
            raise RuntimeError(
                "this version of DeepSpeed updates weights by a gradient that is not finite; take 0.19.8"
            )
        there = torch.tensor(skipped, device=self.processes.device)
        overflowed = self.loss_scale.update(there) if self.loss_scale else torch.zeros_like(there)
        return StepResult(norm, there, overflowed)

    def state(self) -> dict[str, Tensor]:
        """Gathered parameter by parameter."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found = weights_of(model_of(self.objective)) | (self.loss_scale.state() if self.loss_scale else {})
        for name, parameter in open_parameters(self.objective):
            for moment in MOMENTS:
                value = safe_get_full_optimizer_state(parameter, moment)
                if self.processes.is_main:
                    found |= host_copies({f"{moment}/{name}": value})
        steps = next(iter(self._adam.state.values()))["step"]
        return host_copies(found | {STEP: steps}) if self.processes.is_main else {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Each rank keeps its part."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.loss_scale:
            self.loss_scale.load_state(tensors)
        self.begin_adam(tensors[STEP])
        model_of(self.objective).load_state_dict(part(tensors, WEIGHTS))
        for name, parameter in open_parameters(self.objective):
            safe_set_full_fp32_param(parameter, parameter.detach())
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{moment}/{name}"].to(parameter.device), moment)

    def begin_adam(self, steps: Tensor) -> None:
        """Moments of zero after so many `steps`. DeepSpeed itself links those of the first group of parameters only."""
        split = self.engine.optimizer
        for flat in split.single_partition_of_fp32_groups:
            step = steps.to(flat.device, copy=True)
            self._adam.state[flat] = {"step": step} | {moment: torch.zeros_like(flat) for moment in MOMENTS}
        split._hp_optimizer_states_linked = False
        split._lazy_init_hp_params_optimizer_state()

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """Ours, which DeepSpeed has given this rank's parts of all parameters."""
        adam = self.engine.optimizer.optimizer
        assert isinstance(adam, torch.optim.Optimizer)
        return adam
