"""Rates and sums between two log lines.

The surprise: sums stay on the device until a line is due, so that measuring never makes the host wait for a GPU.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sat.model.loss import LossSums
from sat.runtime import Runtime


@dataclass
class Meter:
    """Filled by each step, emptied by `line`."""

    sums: list[Tensor] = field(default_factory=list)
    """One [3] tensor per micro-batch of this rank: NLL, penalty, correct."""
    tokens: float = 0.0
    """Of the global batches."""
    captions: float = 0.0
    steps: int = 0
    waited: float = 0.0
    """Seconds this rank waited for data."""
    bad_samples: int = 0
    gradient_norm: Tensor | float = 0.0
    rate: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def add(self, sums: LossSums) -> None:
        self.sums.append(torch.stack([sums.nll.float(), sums.penalty.float(), sums.correct.float()]))

    def count(self, tokens: float, captions: float, rate: float) -> None:
        self.tokens, self.captions, self.steps, self.rate = self.tokens + tokens, self.captions + captions, self.steps + 1, rate

    def restart(self) -> None:
        """Leave out the time until now (an evaluation, say) from the rates."""
        self.began, self.waited = time.perf_counter(), 0.0

    def line(self, runtime: Runtime) -> dict[str, float]:
        """Averages since the last line over all ranks; the meter starts again. All ranks enter."""
        local = torch.stack(self.sums).double().sum(0).tolist() if self.sums else [0.0] * 3
        nll, penalty, correct, waited, bad = runtime.sum_over_ranks([*local, self.waited, self.bad_samples])
        seconds = time.perf_counter() - self.began
        values = {
            "nll_per_token": nll / max(self.tokens, 1),
            "penalty_per_caption": penalty / max(self.captions, 1),
            "accuracy": correct / max(self.tokens, 1),
            "learning_rate": self.rate,
            "gradient_norm": float(torch.as_tensor(self.gradient_norm).detach()),
            "captions_per_s": self.captions / seconds,
            "data_wait_share": waited / runtime.world_size / seconds,
            "seconds_per_step": seconds / max(self.steps, 1),
        }
        if bad:
            values["bad_samples"] = bad
        self.__init__()
        return values
