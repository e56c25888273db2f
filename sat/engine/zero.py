"""Optimizer state, gradients and weights are split over the ranks: DeepSpeed's ZeRO 1, 2 and 3, offloaded or not.

Surprising: DeepSpeed is always given float32 weights, and bf16 and fp16 are autocast's matter as without it, so every
engine computes, saves and exports the same. Under ZeRO 3 the objective is gathered as one leaf: it uses parameters
directly, and the native kernels take pointers to them.
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
"""At most so many elements are exchanged at once."""


@dataclass(frozen=True)
class ZeroSettings:
    """What the launcher's file says, no more."""

    stage: int
    """1: optimizer state is split; 2: gradients too; 3: weights too."""
    offload_optimizer: bool = False
    """Optimizer state and its step on the CPU."""
    offload_weights: bool = False
    """Weights wait on the CPU; stage 3."""


@dataclass(frozen=True)
class Zero:
    """The engine."""

    processes: Processes
    settings: ZeroSettings

    @property
    def name(self) -> str:
        """With its stage."""
        offloaded = self.settings.offload_optimizer or self.settings.offload_weights
        return f"ZeRO {self.settings.stage}{' offloaded' if offloaded else ''}"

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
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        leaf = _Leaf(objective)
        set_z3_leaf_modules(leaf, [_Leaf])
        shares = self.processes.world_size * accumulation_steps
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation_steps,
            "train_batch_size": micro_batch * shares,
            "gradient_clipping": clip_norm,
            "zero_optimization": self._split(sum(each.numel() for each in objective.parameters())),
            "zero_allow_untested_optimizer": True,  # torch's own AdamW, also where it is offloaded
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 62,
        }
        engine, *_ = deepspeed.initialize(model=leaf, optimizer=optimizer, config=settings, dist_init_required=False)
        stepper = ZeroStepper(engine, self.processes, shares, LossScale.of(self.processes))
        stepper.begin_adam(torch.zeros(()))
        return stepper

    def _split(self, elements: int) -> dict[str, Any]:
        """DeepSpeed's section for a model of so many elements."""
        bucket = min(elements, BUCKET)
        split: dict[str, Any] = {
            "stage": self.settings.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": 0,  # what is gathered as one leaf needs no exceptions
        }
        place = {"device": "cpu", "pin_memory": self.processes.device.type == "cuda"}
        if self.settings.offload_optimizer:
            split["offload_optimizer"] = place
        if self.settings.offload_weights:
            split["offload_param"] = place
        return split


class _Leaf(nn.Module):
    """An objective that ZeRO 3 gathers and lets go as a whole.

    DeepSpeed exchanges the gradients of a leaf when the gradient of its inputs is there. None of ours has one, so there
    is one more, which is met first in the forward pass and hence last in the backward pass.
    """

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, first: Tensor, *batch: Any) -> LossSums:
        sums = self.objective(*batch)
        assert isinstance(sums, LossSums)
        return sums._replace(per_token=sums.per_token + first * 0)


@dataclass(frozen=True)
class ZeroStepper:
    """See `Stepper`."""

    engine: Any
    """DeepSpeed's."""
    processes: Processes
    shares: int
    """What DeepSpeed divides a gradient by: ranks times micro-batches."""
    loss_scale: LossScale | None = None
    """Of fp16."""

    @property
    def objective(self) -> nn.Module:
        """Unwrapped; under ZeRO 3 its weights are there inside `whole` only."""
        leaf = self.engine.module
        assert isinstance(leaf, _Leaf)
        return leaf.objective

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Ours, which DeepSpeed has given this rank's parts of all parameters."""
        adam = self.engine.optimizer.optimizer
        assert isinstance(adam, torch.optim.Optimizer)
        return adam

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """DeepSpeed exchanges with every micro-batch; only after the `last` one there is a step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        return contextlib.nullcontext()

    def __call__(self, *batch: Any) -> LossSums:
        """Through DeepSpeed, which counts."""
        sums = self.engine(torch.zeros((), device=self.processes.device, requires_grad=True), *batch)
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

    def whole(self, changes: bool = False) -> AbstractContextManager[object]:
        """Gathers what ZeRO 3 has split."""
        import deepspeed

        rank = 0 if changes else None
        context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            list(self.objective.parameters()), modifier_rank=rank
        )
        return context

    def state(self) -> dict[str, Tensor]:
        """Gathered parameter by parameter."""
        from deepspeed.utils import safe_get_full_optimizer_state

        is_main, found = self.processes.is_main, {}
        with self.whole():
            if is_main:
                scale = self.loss_scale.state() if self.loss_scale else {}
                found = host_copies(weights_of(model_of(self.objective)) | scale | {STEP: self._steps})
        for name, parameter in open_parameters(self.objective):
            for moment in MOMENTS:
                value = safe_get_full_optimizer_state(parameter, moment)
                if is_main:
                    found |= host_copies({f"{moment}/{name}": value})
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Each rank keeps its part."""
        if self.loss_scale:
            self.loss_scale.load_state(tensors)
        self.begin_adam(tensors[STEP])
        with self.whole(changes=True):
            model_of(self.objective).load_state_dict(part(tensors, WEIGHTS))
        for name, parameter in open_parameters(self.objective):
            self._set(parameter, tensors[f"{WEIGHTS}/{name}"], None)
            for moment in MOMENTS:
                self._set(parameter, tensors[f"{moment}/{name}"], moment)

    def begin_adam(self, steps: Tensor) -> None:
        """Moments of zero after so many `steps`. DeepSpeed itself links those of the first group of parameters only."""
        split, stage3 = self.engine.optimizer, self.engine.zero_optimization_stage() == 3
        flats = split.fp32_partitioned_groups_flat if stage3 else split.single_partition_of_fp32_groups
        for flat in flats:
            step = steps.to(flat.device, torch.float32, copy=True)
            self.optimizer.state[flat] = {"step": step} | {moment: torch.zeros_like(flat) for moment in MOMENTS}
        if not stage3:
            split._hp_optimizer_states_linked = False
            split._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Give the optimizer this rank's part of a parameter's master weights, or of one of its moments."""
        from deepspeed import utils

        value = value.to(self.processes.device)
        if self.engine.zero_optimization_stage() == 3:
            own = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's, padded to equal parts
            padded = value.new_zeros(own * self.processes.world_size)
            padded[: value.numel()] = value.flatten()
            value = padded[own * self.processes.rank :][:own]
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, value)
            else:
                utils.safe_set_local_optimizer_state(parameter, value, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)

    @property
    def _steps(self) -> Tensor:
        steps = next(iter(self.optimizer.state.values()))["step"]
        assert isinstance(steps, Tensor)
        return steps
