"""What all measurements share: alternated medians, what the machine can do at most, peak memory, a table as JSON too.

Contenders take turns within one run, so that a slow minute of a shared machine hits all of them alike; and
what we are compared with runs in a process of its own, so that none of our settings (oneDNN, malloc) reaches it.
"""

import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from sat import files


def alternated_medians(
    contenders: dict[str, Callable[[], object]], *, rounds: int = 5, warmup: int = 1, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each of `contenders`, called in turn `rounds` times after `warmup` calls that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, function in contenders.items():
            _synchronise(device)
            begin = time.perf_counter()
            function()
            _synchronise(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


class InOwnProcess:
    """A function in a fresh interpreter, called from here: it sees PyTorch as it comes.

    `make(*arguments)` is called there and returns the function; both are defined at the top of a module, tensors are
    shared. A call returns what the function returns; EOFError if it failed there (its traceback is printed).
    """

    def __init__(self, make: Callable[..., Callable[[], object]], *arguments: object, device: str = "cpu"):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, device), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # ready

    def __call__(self) -> object:
        self._pipe.send(None)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(
    pipe: Connection, make: Callable[..., Callable[[], object]], arguments: tuple[object, ...], device: str
) -> None:
    function, result = make(*arguments), None
    try:
        while True:
            pipe.send(result)
            pipe.recv()
            result = function()
            _synchronise(device)
    except EOFError:
        return  # the other side is done


@dataclass(frozen=True)
class Ceilings:
    """Work whose time says what this machine can do; to be taken in turns with what is measured against it."""

    product: Callable[[], object]
    """A matrix product."""
    gflop: float
    """Of it."""
    copy: Callable[[], object]
    """A copy in memory, too large for any cache."""
    gigabytes: float
    """Read and written by it."""

    @classmethod
    def of(cls, dtype: torch.dtype, device: str) -> "Ceilings":
        """For products in `dtype`; with torch's current settings."""
        on_gpu = device.startswith("cuda")
        size, times, length = (8192, 10, 1 << 30) if on_gpu else (2048, 2, 1 << 27)
        a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        source, target = (torch.ones(length, dtype=torch.uint8, device=device) for _ in range(2))

        def product() -> None:
            for _ in range(times):
                torch.mm(a, b, out=out)

        def copy() -> None:
            for _ in range(times):
                target.copy_(source)

        return cls(product, times * 2 * size**3 / 1e9, copy, times * 2 * length / 1e9)


@dataclass(frozen=True)
class Traffic:
    """What a function asked of a GPU."""

    launches: int
    """Kernels, copies and fills."""
    kernels: int
    synchronisations: int
    """How often the host waited for the device, as far as torch knows."""
    busy_s: float
    """Time of the kernels."""


def traffic(function: Callable[[], object], device: str) -> Traffic | None:
    """What a call of `function` asks of a GPU, by the last of three; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    from torch.profiler import ProfilerActivity, profile

    function()
    _synchronise(device)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        function()
        _synchronise(device)
    events = [each for each in seen.events() if each.device_type.name == "CUDA" and not each.is_user_annotation]
    kernels = [event for event in events if not event.name.lower().startswith(("memcpy", "memset"))]
    synchronised = sum("synchron" in str(each.message) for each in waits)
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    return Traffic(len(events), len(kernels), synchronised, busy)


def peak_memory_mb(function: Callable[[], object], device: str = "cpu") -> float:
    """Highest memory in MB while `function` runs: of the GPU, or resident in this process, libraries included."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: restart the high-water mark
        function()
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except OSError:
        function()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(rows: Sequence[Mapping[str, object]], json_file: Path | None = None) -> None:
    """Print `rows` (dicts with the same keys) as an aligned table and write them as a JSON list to `json_file`.

    What is a dict itself is for the file alone.
    """
    flat = [{name: value for name, value in row.items() if not isinstance(value, dict)} for row in rows]
    print(table(flat), flush=True)
    if json_file:
        files.write_json(json_file, list(rows))


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Aligned columns under their keys; numbers to the right with three significant digits or whole."""
    if not rows:
        return "(no rows)"
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
