"""Gradients and optimizer state are split over the ranks: DeepSpeed's ZeRO, as the launcher's file configures it.

With bf16 and fp16 it casts the weights themselves, so there is no autocast. It saves a folder of its own, which the
same number of ranks can read again.
"""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat.engine.engine import StepResult, spread
from sat.engine.processes import Processes
from sat.model.loss import LossSums

FOLDER = "deepspeed"
"""Of a checkpoint: what DeepSpeed wrote."""
_TAG = "engine"


@dataclass(frozen=True)
class Zero:
    """The engine."""

    processes: Processes
    accelerator: Any
    """Accelerate's, which configures DeepSpeed from what the launcher announced."""
    casts_weights: bool = True

    @property
    def layout(self) -> str:
        """Its folder is for as many ranks as wrote it."""
        return f"DeepSpeed on {self.processes.world_size} ranks"

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
        scaler = wrapped.optimizer.loss_scaler
        if scaler.dynamic:
            scaler.raise_error_at_min_scale = False  # it is told as any other step that is not finite
        return ZeroStepper(engine, wrapped, self.processes.world_size * accumulation_steps)


@dataclass(frozen=True)
class ZeroStepper:
    """See `Stepper`."""

    engine: Any
    """DeepSpeed's."""
    optimizer: torch.optim.Optimizer
    """Accelerate's view of DeepSpeed's view of ours."""
    shares: int
    """What DeepSpeed divides a gradient by: ranks times micro-batches."""

    @property
    def objective(self) -> nn.Module:
        """Its weights are those of the forward pass, in the type of the precision."""
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
        self.engine.backward(spread(loss, self.shares))

    def step(self) -> StepResult:
        """DeepSpeed looks at the norm of all ranks before it updates; an update in spite of it is not survived."""
        reducible = self.engine.optimizer.loss_scale > 1
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32).detach()
        skipped = not self.engine.was_step_applied()
        if not skipped and not norm.isfinite():
            raise RuntimeError(
                "this version of DeepSpeed updates weights by a gradient that is not finite; take 0.19.8"
            )
        return StepResult(norm, torch.tensor(skipped), torch.tensor(skipped and reducible))

    def save(self, folder: Path) -> None:
        """Each rank writes its part."""
        self.engine.save_checkpoint(str(folder / FOLDER), tag=_TAG)

    def load(self, folder: Path) -> None:
        """Each rank reads its part."""
        self.engine.load_checkpoint(str(folder / FOLDER), tag=_TAG)
