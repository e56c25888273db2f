"""fp16's loss is scaled so that small gradients do not vanish: halved at an overflow, doubled after many good steps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sat.engine.processes import Processes

NAME = "loss_scale"
"""What the names of its tensors begin with in a checkpoint."""
BEGIN, GOOD_STEPS = 2.0**16, 2000
"""Where it begins, and after how many good steps it is doubled."""


@dataclass(frozen=True)
class LossScale:
    """Stays on the device, so that no step waits for it; alike on all ranks."""

    scale: Tensor
    """float32 scalar, never below 1."""
    good_steps: Tensor
    """int32 scalar: steps since it last changed."""

    @classmethod
    def of(cls, processes: Processes) -> "LossScale | None":
        """A fresh one where the products are in fp16, else None."""
        if processes.autocast_type != torch.float16:
            return None
        device = processes.device
        return cls(torch.tensor(BEGIN, device=device), torch.zeros((), dtype=torch.int32, device=device))

    def update(self, skipped: Tensor) -> Tensor:
        """After a step; bool, whether it was skipped and the scale to blame or may have been."""
        overflowed = skipped & (self.scale > 1)
        torch._amp_update_scale_(self.scale, self.good_steps, skipped.float(), 2.0, 0.5, GOOD_STEPS)
        self.scale.clamp_(min=1)
        return overflowed

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; no copies."""
        return {f"{NAME}/scale": self.scale, f"{NAME}/good_steps": self.good_steps}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for name, value in self.state().items():
            value.copy_(tensors[name])
