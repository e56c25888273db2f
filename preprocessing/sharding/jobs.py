"""Run the shard jobs of a plan: a stripe of them, several at a time, sharing the work with whoever else is running.

A worker claims a shard before it builds it. The surprising decision: no clock is compared. A claim counts as dead when
its process is gone (same machine) or when we ourselves have watched it for `claim_timeout` seconds without the shard
appearing; file times, which lie on network file systems, are never read. A wrong guess costs double work and nothing
else.
"""

import ctypes
import json
import math
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from preprocessing.console import progress_line
from preprocessing.sharding.ownership import check_stands
from preprocessing.sharding.plan import CLAIM, WORK, Plan, PlannedShard
from preprocessing.sharding.write import finished
from sat import files
from sat.shards.schema import Sidecar

_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h

Build = Callable[[Plan, PlannedShard], Sidecar]
"""Writes one shard and returns its sidecar; for a process pool it must be picklable."""
Work = Callable[[PlannedShard, bool], "Result"]
"""Brings one shard to stand, or leaves it to another live worker unless told to steal it: `work_on` of a plan."""
Progress = Callable[[int, bool], None]
"""Is told the pictures of every finished shard, and whether it was built here."""


@dataclass
class Summary:
    """What a run of the shard step did, for the closing line."""

    built: int = 0
    reused: int = 0
    images: int = 0
    bytes: int = 0
    bad: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    """Of pictures that were taken: what was odd about their files."""
    seconds: float = 0.0

    def add(self, sidecar: Sidecar, built: bool) -> None:
        """Count one finished shard."""
        self.built += built
        self.reused += not built
        if built:
            self.images += sidecar.samples
            self.bytes += sidecar.bytes
        self.bad += len(sidecar.left_out)
        for item in sidecar.left_out:
            self.reasons[item.reason] = self.reasons.get(item.reason, 0) + 1
        for note, count in sidecar.extra.get("notes", {}).items():
            self.notes[note] = self.notes.get(note, 0) + count

    def line(self) -> str:
        """One line: shards, images/s, bytes, left out and why."""
        rate = f" ({self.images / self.seconds:.1f} images/s)" if self.images else ""
        why = (
            "; left out " + ", ".join(f"{n} {reason}" for reason, n in sorted(self.reasons.items())) if self.bad else ""
        )
        why += "".join(f"; {count} with {note}" for note, count in sorted(self.notes.items()))
        return (
            f"{self.built} shards written, {self.reused} reused: {self.images} images{rate}, "
            f"{self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s{why}"
        )


@dataclass(frozen=True)
class Result:
    """What became of one shard: its sidecar, None when another live worker has claimed it."""

    sidecar: Sidecar | None
    built: bool
    """It was written by us, and did not stand already."""


def parse_stripe(stripe: str) -> tuple[int, int]:
    """`I/N` -> (I, N): take every N-th shard from number I, counted from 0. Raises ValueError otherwise."""
    index, _, count = stripe.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"stripe {stripe!r}: expected I/N with I from 0 to N-1, e.g. 0/4")
    return int(index), int(count)


def run_shards(
    plan: Plan,
    work: Work,
    executor: Executor,
    *,
    stripe: str = "0/1",
    slots: int = 1,
    max_bad_fraction: float = 1.0,
    claim_timeout: float = 300.0,
    progress: Progress = lambda images, built: None,
) -> Summary:
    """Bring the shards of a stripe to stand, `slots` at a time; returns when all do.

    `work` is `partial(work_on, plan, build)` in threads, `in_process` in a pool of processes that know the plan. Shards
    claimed by another live worker are left to it and looked at again at the end. Raises ValueError as soon as this
    stripe alone leaves out more than `max_bad_fraction` of the whole plan's pictures (`finalize` counts all stripes),
    and whatever `work` raises.
    """
    index, count = parse_stripe(stripe)
    shards, started, summary = plan.shards[index::count], time.monotonic(), Summary()
    limit = max_bad_fraction * plan.samples
    todo = deque(shard for shard in shards if not _reuse(plan, shard, summary, progress))
    running: dict[Future[Result], PlannedShard] = {}
    claimed: dict[PlannedShard, float] = {}  # since when we have been watching
    try:
        while todo or running or claimed:
            _check_bad(summary, limit, max_bad_fraction)
            while todo and len(running) < slots:
                shard = todo.popleft()
                steal = time.monotonic() - claimed.get(shard, math.inf) > claim_timeout
                running[executor.submit(work, shard, steal)] = shard
            for future in wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                _take_result(future.result(), running.pop(future), summary, claimed, progress)
            if claimed and not todo and not running:
                time.sleep(_POLL_SECONDS)
                todo.extend(claimed)
        _check_bad(summary, limit, max_bad_fraction)
    finally:
        for future in running:
            future.cancel()
    summary.seconds = time.monotonic() - started
    return summary


def run_stripe(
    plan: Plan, build: Build, label: str, stripe: str = "0/1", num_workers: int = 1, max_bad_fraction: float = 1.0
) -> Summary:
    """`run_shards` in `num_workers` processes (one: in a thread of this one), with a progress line called `label`."""
    index, count = parse_stripe(stripe)
    pictures = sum(shard.samples for shard in plan.shards[index::count])
    alone = num_workers <= 1
    pool = ThreadPoolExecutor(1) if alone else process_pool(num_workers, plan, build)
    with progress_line(pictures, label) as advance, pool as executor:
        return run_shards(
            plan,
            partial(work_on, plan, build) if alone else in_process,
            executor,
            stripe=stripe,
            slots=max(num_workers, 1),
            max_bad_fraction=max_bad_fraction,
            progress=lambda images, built: advance(images),
        )


_work: Work | None = None
"""Of a worker process; made by `_start_worker`."""


def in_process(shard: PlannedShard, steal: bool) -> "Result":
    """`work_on` in a process of `process_pool`, of the plan that it was started with."""
    assert _work is not None, "the worker process was not started by _start_worker"
    return _work(shard, steal)


@contextmanager
def process_pool(
    processes: int,
    plan: Plan,
    build: Build,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Executor]:
    """Fresh worker processes for `run_shards`; the death of one is an OSError that says how to go on.

    The plan goes to each of them once, not with every shard.
    """
    try:
        arguments = (os.getpid(), plan, build, initializer, initargs)
        with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, arguments) as pool:
            yield pool
    except BrokenProcessPool:
        raise OSError("a worker process died (killed, or out of memory); run the same command again to go on") from None


def _start_worker(
    parent: int, plan: Plan, build: Build, initializer: Callable[..., None] | None, initargs: tuple[Any, ...]
) -> None:
    """Tie the life of a worker to its parent's: one whose parent was killed would wait for work for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked to be told
        os._exit(1)
    global _work
    _work = partial(work_on, plan, build)
    if initializer is not None:
        initializer(*initargs)


def work_on(plan: Plan, build: Build, shard: PlannedShard, steal: bool) -> Result:
    """Build one shard, unless it stands; no sidecar when another live worker has claimed it.

    Raises ValueError where another plan stands by now, before any work.
    """
    standing = finished(plan.root, shard, plan.digest)
    if standing is not None:
        return Result(standing, built=False)
    check_stands(plan.root, plan.digest)
    path = plan.root / WORK / f"{shard.stem}{CLAIM}"
    if steal or _holder_is_gone(path):
        path.unlink(missing_ok=True)
    holder = {"machine": _machine(), "pid": os.getpid(), "start": _start(os.getpid())}
    if not files.create(path, json.dumps(holder).encode()):
        return Result(None, built=False)
    try:
        return Result(build(plan, shard), built=True)
    except (ValueError, OSError):
        check_stands(plan.root, plan.digest)  # if another one does, this says why
        raise
    finally:
        path.unlink(missing_ok=True)


def _reuse(plan: Plan, shard: PlannedShard, summary: Summary, progress: Progress) -> bool:
    """Count a shard that stands already; False when it does not."""
    standing = finished(plan.root, shard, plan.digest)
    if standing is None:
        return False
    summary.add(standing, built=False)
    progress(shard.samples, False)
    return True


def _take_result(
    result: Result, shard: PlannedShard, summary: Summary, claimed: dict[PlannedShard, float], progress: Progress
) -> None:
    if result.sidecar is None:
        claimed.setdefault(shard, time.monotonic())
        return
    claimed.pop(shard, None)
    summary.add(result.sidecar, result.built)
    progress(shard.samples, result.built)


def _check_bad(summary: Summary, limit: float, fraction: float) -> None:
    if summary.bad > limit:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(summary.reasons.items()))
        raise ValueError(
            f"{summary.bad} pictures had to be left out ({reasons}), more than --max-bad-fraction {fraction} allows; "
            "the sidecars in the folder work/ name them"
        )


def _holder_is_gone(path: Path) -> bool:
    """True when a claim was made on this machine by a process that no longer exists."""
    try:
        holder = json.loads(path.read_bytes())
        return bool(holder["machine"] == _machine() and _start(holder["pid"]) != holder["start"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


@lru_cache(maxsize=1)
def _machine() -> str:
    """This machine, boot and process namespace: where a process id has one meaning."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{os.getpid()}"


def _start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, None when it does not live: tells re-used ids apart."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]  # one that is dead, though nobody has collected it, works no more
    except (OSError, IndexError):
        return None
