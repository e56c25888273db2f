"""Memory for the grids of batches, used again and again, and shared with the DataLoader's workers.

The surprising decision: a worker sends the number of a slot, not a tensor. The slots are one anonymous shared mapping
that every worker inherits by fork, so a batch of 100 MB crosses processes without a copy, a page fault or a file in
/dev/shm (64 MB in many containers). A slot is free again when the last tensor over it is gone. Locked slots are what a
GPU copies from by itself: the host does not copy a batch at all.
"""

import contextlib
import itertools
import logging
import math
import mmap
import os
import weakref

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NUMPY_STAND_INS = {torch.bfloat16: torch.int16}
"""numpy has no bfloat16: such memory is wrapped as another type of its size and viewed."""
HUGE_PAGE = 2 << 20
"""Memory is asked for in such pages: copying into it is a quarter faster."""
_ids = itertools.count()
_rings: "weakref.WeakValueDictionary[int, Ring]" = weakref.WeakValueDictionary()
"""The rings of this process by number: how a slot that arrives from a worker finds its memory."""


class Ring:
    """`owners` x `per_owner` slots of `size` bytes. An owner is a process, which fills its own slots; all may read."""

    def __init__(self, owners: int, per_owner: int, size: int, shared: bool):
        self.number = next(_ids)
        self.per_owner = per_owner
        page = HUGE_PAGE if size > HUGE_PAGE else mmap.PAGESIZE
        self._stride = -(-size // page) * page
        flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        self._memory = mmap.mmap(-1, max(1, owners * per_owner * self._stride), flags=flags)
        self._memory.madvise(mmap.MADV_HUGEPAGE)  # for shared memory many systems do not follow it
        self._whole = np.frombuffer(self._memory, np.uint8)
        # One byte per slot. Only its owner sets it, only the process that has the tensor clears it: no lock is needed.
        self._busy = np.frombuffer(mmap.mmap(-1, max(1, owners * per_owner)), np.uint8)
        _rings[self.number] = self

    def take(self, owner: int, size: int) -> int | None:
        """A free slot of this owner, marked as busy; None when there is none or it is too small."""
        begin = owner * self.per_owner
        free = np.flatnonzero(self._busy[begin : begin + self.per_owner] == 0)
        if not free.size or size > self._stride:
            return None
        slot = begin + int(free[0])
        self._busy[slot] = 1
        return slot

    def tensor(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype, release: bool = True) -> Tensor:
        """The beginning of a slot as a tensor; with `release`, the slot is free when it and all its views are gone."""
        stand_in = NUMPY_STAND_INS.get(dtype, dtype)
        kind = torch.empty(0, dtype=stand_in).numpy().dtype
        begin = slot * self._stride
        array = self._whole[begin : begin + math.prod(shape) * kind.itemsize].view(kind)
        if release:
            weakref.finalize(array, self._busy.__setitem__, slot, 0).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)

    def lock(self) -> None:
        """Keep the slots where they are in memory until all are gone, so that a GPU can copy from them beside its work.

        Shared ones alone (a process that is forked would be given others), after the workers have been forked.
        """
        runtime, address = torch.cuda.cudart(), self._whole.ctypes.data
        error = runtime.cudaHostRegister(address, len(self._whole), 0)
        if error == runtime.cudaError.success:
            weakref.finalize(self._whole, _unlock, address, os.getpid()).atexit = False
            return
        said = runtime.cudaGetErrorString(error)
        logger.warning(
            "%d MB for batches cannot be locked, so each is copied once more: %s", len(self._whole) >> 20, said
        )
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # is told of the error too, and nobody after it


def _unlock(address: int, process: int) -> None:
    if os.getpid() == process:  # not one that was forked from it
        torch.cuda.cudart().cudaHostUnregister(address)


def attach(ring: int, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that a worker filled, in the process that receives it."""
    return _rings[ring].tensor(slot, shape, dtype)
