"""Whether the processes find one another, are alike, and how fast they exchange."""

import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from sat.doctor.machine import versions
from sat.doctor.rows import Row, failed, ok, refused, sized, warning
from sat.engine.engine import Engine
from sat.engine.exchange import measure_exchange
from sat.engine.processes import Processes
from sat.engine.start import start
from sat.machine import available_cores, best_precision

LEAST_BYTES = 16_000_000
"""Of an exchange that says something of the bandwidth."""


def form_group(precision: str, timeout: float) -> tuple[Engine | None, list[Row]]:
    """The engine of a training, and the row that says whether its process group formed. All ranks enter."""
    began = time.perf_counter()
    try:
        engine = start(precision, timeout)
    except Exception as error:  # whatever it is, a training would end in it
        return None, [refused("process group", error)]
    processes, seconds = engine.processes, time.perf_counter() - began
    if processes.world_size == 1:
        words = "one process; --launch FILE [--processes N] examines several"
        return engine, [ok("process group", f"{words}; on {processes.device}", ranks=1)]
    said = f"{processes.world_size} ranks found one another in {seconds:.1f} s, {type(engine).__name__.upper()}"
    return engine, [ok("process group", f"{said} on {processes.device.type}", ranks=processes.world_size)]


@dataclass(frozen=True)
class About:
    """What a rank says of itself."""

    host: str
    torch: str
    accelerate: str
    deepspeed: str
    precision: str
    device: str
    cores: int


def check_alike(processes: Processes, precision: str) -> Iterator[Row]:
    """Whether all ranks compute alike. All ranks enter."""
    ranks = processes.gather(_about(processes))
    if processes.world_size == 1:
        return
    hosts = Counter(rank.host for rank in ranks)
    said = ", ".join(f"{count} on {host}" for host, count in hosts.items())
    differing = {
        name: sorted({str(asdict(rank)[name]) for rank in ranks})
        for name in asdict(ranks[0])
        if name != "host" and len({asdict(rank)[name] for rank in ranks}) > 1
    }
    words = "; ".join(f"{name}: {' and '.join(values)}" for name, values in differing.items())
    if differing.keys() & {"torch", "accelerate", "deepspeed"}:
        yield failed("ranks", f"{said}; they differ in {words}", "make the same environment on every machine")
    elif "precision" in differing and precision == "auto":
        yield failed("ranks", f"{said}; they differ in {words}", "set train.precision to one that all compute in")
    elif differing:
        mend = "take machines of one kind: a step is as fast as the slowest rank"
        yield warning("ranks", f"{said}; they differ in {words}", mend)
    else:
        yield ok("ranks", f"{said}; all alike: {ranks[0].device}, {ranks[0].cores} cores")


def local_ranks(processes: Processes) -> int:
    """How many of the ranks are on this machine. All ranks enter."""
    here = socket.gethostname()
    return processes.gather(here).count(here)


def _about(processes: Processes) -> About:
    found, device = versions(), "CPU"
    if processes.device.type == "cuda":
        import torch

        device = torch.cuda.get_device_name(processes.device)
    packages = (found["torch"], found["accelerate"], found["deepspeed"])
    return About(socket.gethostname(), *packages, best_precision(), device, available_cores())


def check_exchange(processes: Processes, gradient_bytes: int) -> Iterator[Row]:
    """The sum of the gradients over all ranks: right, and how fast. All ranks enter."""
    found = measure_exchange(processes, max(gradient_bytes, LEAST_BYTES))
    if found is None:
        return
    said = (
        f"{sized(found.bytes)} are summed in {found.seconds * 1e3:.0f} ms, "
        f"{found.gigabytes_per_s:.2f} GB/s; a count in {found.latency_s * 1e3:.1f} ms"
    )
    figures = {"exchange_s": found.seconds, "gigabytes_per_s": found.gigabytes_per_s, "latency_s": found.latency_s}
    if not found.right:
        yield failed("exchange", f"{said}, and the sums are wrong", "take the machine or the network out of service")
    else:
        yield ok("exchange", said, **figures)
