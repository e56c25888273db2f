"""How fast the ranks exchange what a step exchanges: measured on the group that carries the gradients."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sat.engine.processes import Processes

SMALL = 8
"""Numbers of an exchange that is all latency, as the counts of a step are."""


@dataclass(frozen=True)
class Exchange:
    """Of all ranks; the same on each."""

    right: bool
    """The sums were those of all ranks."""
    seconds: float
    """Of one all-reduce of the gradients, the median."""
    bytes: int
    latency_s: float
    """Of one all-reduce of a few numbers over the hosts' group."""

    @property
    def gigabytes_per_s(self) -> float:
        """Gradient bytes reduced per second."""
        return self.bytes / max(self.seconds, 1e-9) / 1e9


def measure_exchange(processes: Processes, nbytes: int, rounds: int = 5) -> Exchange | None:
    """All-reduce `nbytes` of float32 so many times, after one that does not count; None for one rank alone.

    All ranks enter. Raises what the group raises: a rank that is gone, a network that does not carry.
    """
    world = processes.world_size
    if world == 1:
        return None
    latencies = [_timed(lambda: processes.sum_over_ranks([0.0] * SMALL), processes) for _ in range(rounds + 1)]
    gradients = torch.empty(max(1, nbytes // 4), device=processes.device)
    seconds, right = [], True
    for _ in range(rounds + 1):
        gradients.fill_(processes.rank + 1)
        seconds.append(_timed(lambda: dist.all_reduce(gradients), processes))
        right = right and bool((gradients == world * (world + 1) // 2).all())
    mine = (right, statistics.median(seconds[1:]), statistics.median(latencies[1:]))
    every = processes.gather(mine)
    return Exchange(
        all(each[0] for each in every), max(each[1] for each in every), nbytes, max(each[2] for each in every)
    )


def _timed(action: Callable[[], object], processes: Processes) -> float:
    """Seconds of an action that all ranks enter together."""
    processes.barrier()
    _synchronise(processes)
    began = time.perf_counter()
    action()
    _synchronise(processes)
    return time.perf_counter() - began


def _synchronise(processes: Processes) -> None:
    if processes.device.type == "cuda":
        torch.cuda.synchronize(processes.device)
