"""The ranks of a launch find one another before their group forms, or say in time who has not come.

The surprise: each rank writes its name into the launcher's store first. A process group that lacks a rank waits for
its whole time-out and then names nobody.
"""

import contextlib
import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public

from sat.stopping import StartAgain

_LOOK_EVERY_S = 0.5
"""At most; ranks that come together look sooner."""
_ANSWERS_WITHIN_S = 5
"""Another rank 0."""
_NAMED = 8
"""So many missing ranks are named."""
_REFUSED = "refused"
"""Where the store holds why this launch can be none."""


def meet(timeout: float) -> tuple[Store, int, int]:
    """The store of this launch, this rank and the number of ranks, once all of them have come.

    By RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Raises StartAgain where some have not come within `timeout`
    seconds. Where the variables of two ranks contradict each other, all that have come raise ValueError at once.
    """
    rank, world = _announced_rank()
    until = time.monotonic() + timeout
    store = _store(rank, world, timeout)
    try:
        if wrong := _contradiction(store, rank, world):
            store.set(_REFUSED, wrong)
        came, wait = store.add("came", 1), 0.01
        while came < world or store.check([_REFUSED]):
            if store.check([_REFUSED]):
                time.sleep(2 * _LOOK_EVERY_S * (rank == 0))  # it may serve the store that the others look at
                raise ValueError(store.get(_REFUSED).decode())
            if time.monotonic() > until:
                raise StartAgain(_who_lacks(store, world, timeout))
            time.sleep(wait)
            came, wait = store.add("came", 0), min(2 * wait, _LOOK_EVERY_S)
    except dist.DistError as error:
        raise StartAgain(
            f"rank {rank} on {socket.gethostname()} has lost the process that all ranks meet at, {_address()}, before "
            "all had come; start it again"
        ) from error
    return store, rank, world


def _announced_rank() -> tuple[int, int]:
    """Rank and number of ranks. Raises ValueError where the variables say none."""
    said = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    numbers = (said["RANK"], said["WORLD_SIZE"], said["MASTER_PORT"])
    if not (all(map(str.isdecimal, numbers)) and int(numbers[0]) < int(numbers[1]) and said["MASTER_ADDR"]):
        words = " ".join(f"{name}={value}" for name, value in said.items())
        raise ValueError(
            f"{words}, beside LOCAL_RANK, name no rank of a launch: RANK counts from 0 to WORLD_SIZE - 1; let a "
            "launcher set them, or unset LOCAL_RANK to train on one process"
        )
    return int(numbers[0]), int(numbers[1])


def _contradiction(store: Store, rank: int, world: int) -> str:
    """What this rank's variables and those of the others cannot both say; "" where they agree."""
    me = f"rank {rank} on {socket.gethostname()}"
    if store.add(f"came/{rank}", 1) > 1:
        return _twice(rank, world)
    if (others := store.compare_set("world", "", str(world)).decode()) != str(world):
        return f"WORLD_SIZE is {world} for {me} and {others} for another rank: it must be the same for all"
    return ""


def _twice(rank: int, world: int) -> str:
    return (
        f"two processes take themselves for rank {rank} of {world}, one of them on {socket.gethostname()}: the "
        "variable RANK must be another one for each; let a launcher set it"
    )


def _store(rank: int, world: int, timeout: float) -> Store:
    """That of torch's launcher, where one has started us, else rank 0 serves it."""
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    life = f"sat/life-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # the launcher's store outlives its ranks
    try:
        served = TCPStore(
            host,
            port,
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        me = f"rank {rank} on {socket.gethostname()}"
        if serves:
            _tell_the_first(host, port, life, world)
            raise ValueError(
                f"{me} cannot serve at {_address()}, where the ranks are to meet: another launch is there, or another "
                "process that takes itself for rank 0; give another MASTER_PORT, or let a launcher set the variables"
            ) from error
        raise StartAgain(
            f"{me} has found nobody at {_address()}, where the ranks meet, within {timeout:g} s (train.timeout); see "
            "what the machine of rank 0 says, then start it again"
        ) from error
    return PrefixStore(life, served)


def _tell_the_first(host: str, port: int, life: str, world: int) -> None:
    """If another rank 0 waits at our address, it need not wait longer. What serves there instead may never answer."""

    def tell() -> None:
        with contextlib.suppress(dist.DistError):
            there = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_ANSWERS_WITHIN_S))
            PrefixStore(life, there).set(_REFUSED, _twice(0, world))

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    telling.join(_ANSWERS_WITHIN_S)


def _who_lacks(store: Store, world: int, timeout: float) -> str:
    missing = [rank for rank in range(world) if not store.check([f"came/{rank}"])]
    names = ", ".join(map(str, missing[:_NAMED])) + ", ..." * (len(missing) > _NAMED)
    return (
        f"{world - len(missing)} of {world} ranks have come within {timeout:g} s (train.timeout), not rank {names}; "
        "see what its machine says, then start it again"
    )


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
