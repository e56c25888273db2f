"""A process that is gone, told as what it is: from whom we hear of it, and what to do."""

import contextlib
import re
import socket
from collections.abc import Iterator

import torch
import torch.distributed as dist

from sat.engine.processes import Processes
from sat.stopping import StartAgain

_WORKER = re.compile(r"DataLoader worker \(pid\D* (\d+)\) (is killed by signal: \w+|exited unexpectedly)")
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|can.t allocate memory|Cannot allocate memory")
"""What torch says on a CPU, in an error of no type of its own."""
_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket (timeout|closed)|timed? ?out waiting|application timeout|"
    r"(remote process|peer) (has )?exited|network error|failed to (recv|send)|wait timeout|connectFullMesh",
    re.IGNORECASE,
)


@contextlib.contextmanager
def named(processes: Processes | None = None) -> Iterator[None]:
    """Inside, the loss of another rank or of a process that reads batches is raised as `StartAgain`, in a sentence.

    `processes`: None while they still meet. Raises ValueError where a device has no memory left.
    """
    me = f"{f'rank {processes.rank}' if processes else 'a rank'} on {socket.gethostname()}"
    several = processes is None or processes.world_size > 1
    try:
        yield
    except MemoryError as error:
        raise _out_of_memory(me, error) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY.search(str(error)):
            raise _out_of_memory(me, error) from error
        if found := _WORKER.search(str(error)):
            raise StartAgain(
                f"{me}: its process {found[1]}, which reads batches, {found[2]} (a kill is often lack of memory: lower "
                "data.num_workers); what was saved stays: start it again"
            ) from error
        if several and (isinstance(error, dist.DistError) or _PEER.search(str(error))):
            raise StartAgain(
                f"{me} has lost another rank ({_first_line(error)}); what was saved stays: start it again"
            ) from error
        raise


def _out_of_memory(me: str, error: BaseException) -> ValueError:
    return ValueError(
        f"{me} is out of memory ({_first_line(error)}); lower train.global_batch, or raise train.accumulation_steps"
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
