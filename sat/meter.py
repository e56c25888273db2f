"""Rates and sums between two log lines.

The surprise: sums stay on the device until a line is due, so that measuring never makes the host wait for a GPU.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from sat.engine.processes import Runtime
from sat.model.loss import LossSums

T = TypeVar("T")


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
        self.sums.append(torch.stack([sums.counts[name].float() for name in ("nll", "penalty", "correct")]))

    def count(self, tokens: float, captions: float, rate: float, bad: int) -> None:
        self.tokens, self.captions, self.steps = self.tokens + tokens, self.captions + captions, self.steps + 1
        self.bad_samples, self.rate = self.bad_samples + bad, rate

    def wait_for(self, fetch: Callable[[], T]) -> T:
        """The result of `fetch()`, its time booked as waiting for data."""
        began = time.perf_counter()
        result = fetch()
        self.waited += time.perf_counter() - began
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside (an evaluation, say) out of the rates."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

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
