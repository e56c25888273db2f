"""The ranks of a run and what they tell one another.

Counts and flags travel over a gloo group on the host, so that learning the global token count never waits for a GPU;
only gradients use the fast interconnect.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sat.engine.beside import Beside

T = TypeVar("T")
LOOK_EVERY_S = 0.2
"""How often the ranks look at their wishes while rank 0 is busy."""


class Interrupted(Exception):
    """Work was left on all ranks together because one of them had the wish to."""


@dataclass
class Pulse:
    """When this rank last got on, and with what; `sat.engine.watchdog` looks at it."""

    at: float = field(default_factory=time.monotonic)
    doing: str = "starting"

    def beat(self, doing: str = "") -> None:
        """Something has ended well; the next thing is `doing`, or the same as before."""
        self.at, self.doing = time.monotonic(), doing or self.doing


@dataclass(frozen=True)
class Processes:
    """This process among the others; `Processes()` is one alone on the CPU. `sat.engine.start` alone looks ranks up."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this rank computes."""
    autocast_type: torch.dtype | None = None
    """Type of the matrix products where it is not that of the weights."""
    host_group: Any = None
    """All ranks, over gloo; None for one alone."""
    pulse: Pulse = field(default_factory=Pulse, compare=False)
    """Each collective that ends is a beat."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[object]:
        """Context of every forward pass."""
        if self.autocast_type is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_type)

    # ------------------------------------------------------------------ collectives on the host: all ranks enter

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.host_group)
        self.pulse.beat()
        sums: list[float] = total.tolist()
        return sums

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        self.pulse.beat()
        return values  # type: ignore[return-value]  # every place has been filled

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        self.pulse.beat()
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.host_group)
        self.pulse.beat()

    def run_on_main(self, action: Callable[[], T]) -> T:
        """Rank 0 runs `action()`, all ranks get its result; if it raises, all ranks raise, so nobody waits for ever."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (action(), None)
            except Exception as error:
                outcome = (None, error)
        result, failed = self.broadcast(outcome)
        if failed is not None:
            raise failed
        return result  # type: ignore[return-value]  # that of `action`

    def run_beside_on_main(self, action: Callable[[], T], interrupted: Callable[[], bool] = lambda: False) -> T:
        """As `run_on_main`, for what takes long: nobody waits in silence, and it can be left.

        Raises Interrupted on all ranks a moment after one's `interrupted()`; what `action` does then has no effect.
        """
        return self.result_beside(Beside(action) if self.is_main else None, interrupted)

    def result_beside(self, beside: Beside[T] | None, interrupted: Callable[[], bool] = lambda: False) -> T:
        """What rank 0's work has come to, on all ranks, which wait for it; the others have None.

        Raises what it has raised, and Interrupted as `run_beside_on_main` does.
        """
        done = 0.0
        while not done:
            if beside:
                beside.wait(LOOK_EVERY_S)
            done, stop = self.sum_over_ranks([beside is not None and beside.done, interrupted()])
            if stop and not done:
                raise Interrupted
        result, failed = self.broadcast(beside.outcome if beside else (None, None))
        if failed is not None:
            raise failed
        return result  # type: ignore[return-value]  # that of the work

    def leave(self) -> None:
        """End this process after all work is done, with exit code 0.

        With several ranks the interpreter's own shutdown is skipped: a gloo thread that still drops a tensor then
        aborts the process now and then, after a complete training.
        """
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.world_size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
