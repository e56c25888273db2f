"""Memory for the grids of batches, used again and again, and shared with the DataLoader's workers.

The surprising decision: a worker sends the number of a slot, not a tensor. The slots are one anonymous shared mapping
that every worker inherits by fork, so a batch of 100 MB crosses processes without a copy, a page fault or a file in
/dev/shm (64 MB in many containers). A slot is free again when the last tensor over it is gone.
"""

import itertools
import math
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

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
        array = np.frombuffer(self._memory, kind, math.prod(shape), slot * self._stride)
        if release:
            weakref.finalize(array, self._busy.__setitem__, slot, 0).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)


def attach(ring: int, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that a worker filled, in the process that receives it."""
    return _rings[ring].tensor(slot, shape, dtype)
