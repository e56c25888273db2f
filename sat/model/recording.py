"""Work on a GPU that is recorded once as a CUDA graph and replayed: one launch from Python for all of it.

A launch is dearer for Python than what it launches often is for the GPU. A graph repeats its work at the same addresses
with the same sizes, so whoever has work recorded brings its inputs into memory that stays, and takes results from such.
"""

import contextlib
import gc
from collections.abc import Callable

import torch

Play = Callable[[], object]
Record = Callable[[Callable[[], None]], Play]
"""Runs a function, and returns what repeats its work at the same addresses."""


def record_on_gpu() -> Record:
    """Records CUDA graphs whose passing memory is shared, on the current device."""
    side, one = torch.cuda.Stream(), torch.ones(1, device="cuda")
    with torch.cuda.stream(side):
        keeper = _captured(one.clone, None)  # shared memory goes with its last graph and is not to be had again

    def record(work: Callable[[], None]) -> Play:
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            work()  # programs are compiled and libraries loaded, which a recording does not allow
            graph = _captured(work, keeper)
        current.wait_stream(side)
        return graph.replay

    return record


def _captured(work: Callable[[], object], beside: torch.cuda.CUDAGraph | None) -> torch.cuda.CUDAGraph:
    graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()  # an older recording that is collected meanwhile would spoil this one
    try:
        # Other threads let go of pinned memory meanwhile (a checkpoint's), which is none of this one's business.
        graph.capture_begin(pool=beside.pool() if beside else None, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error says what spoilt it
                graph.capture_end()
            raise
        graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    return graph
