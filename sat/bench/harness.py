"""What all measurements share: alternated medians, the machine's matrix-product peak, peak memory, a table as JSON too.

Contenders take turns within one run, so that a slow minute of a shared machine hits all of them alike; and
what we are compared with runs in a process of its own, so that none of our settings (oneDNN, malloc) reaches it.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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


def gemm_peak(dtype: torch.dtype, *, device: str = "cpu", size: int = 2048, seconds: float = 1.0) -> float:
    """Best GFLOP/s of a `size` x `size` product in `dtype`, with torch's current settings, within about `seconds`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        _synchronise(device)
        begin = time.perf_counter()
        a @ b
        _synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9


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
    """Print `rows` (dicts with the same keys) as an aligned table and write them as a JSON list to `json_file`."""
    print(table(rows), flush=True)
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
