"""Nobody waits for ever: a rank that has not got on for too long shows where it stands and ends.

Each rank has a thread that looks at its pulse, and another that tells the others of it through the launcher's store. So
those that wait for a rank can name it, its host and what it is at, also when it is stopped and cannot speak; and a rank
that is cut off from the store, where a call may never return, ends in time all the same.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sat.engine.processes import Processes
from sat.stopping import START_AGAIN

EARLY = 0.8
"""Share of the time-out after which a rank gives up: the whole job is to have ended within it."""
LOOK_EVERY_S = 5.0
"""At most; a fortieth of a short time-out."""
STUCK_FOR_GOOD_S = 60.0
"""Later than this no thread of ours has had its turn: the interpreter itself hangs."""


@contextlib.contextmanager
def watched(
    processes: Processes, timeout: float, last_words: Callable[[str], None], status: int = START_AGAIN
) -> Iterator[None]:
    """Inside, a pulse that stands still for nearly `timeout` seconds ends this process with an exit status.

    It says who is waited for, shows the stacks of all threads, and gives the sentence to `last_words`.
    """
    watch = _Watch(processes, timeout, last_words, status)
    thread = threading.Thread(target=watch.look, name="watchdog", daemon=True)
    talking = threading.Thread(target=watch.talk, name="watchdog's word", daemon=True)
    processes.pulse.beat()
    thread.start()
    if processes.world_size > 1:
        talking.start()
    try:
        yield
    finally:
        watch.ended.set()
        thread.join()
        if processes.world_size > 1:
            talking.join(watch.every)
        faulthandler.cancel_dump_traceback_later()


@dataclass
class _Watch:
    processes: Processes
    timeout: float
    last_words: Callable[[str], None]
    status: int
    ended: threading.Event = field(default_factory=threading.Event)
    store: Any = None
    """A connection of our own to the launcher's; known to the thread that talks."""
    others: dict[int, str] = field(default_factory=dict)
    """What each other rank last said of itself."""
    talks: int = 0
    """How often the store has been reached."""

    @property
    def every(self) -> float:
        return min(LOOK_EVERY_S, self.timeout / 40)

    def look(self) -> None:
        """The thread that judges. It waits for nobody."""
        while not self.ended.wait(self.every):
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback_later(self.timeout + STUCK_FOR_GOOD_S, exit=True, file=2)
            if time.monotonic() - self.processes.pulse.at > EARLY * self.timeout:
                self._give_up()

    def talk(self) -> None:
        """The thread that tells and hears; a cut connection holds it up for ever."""
        with contextlib.suppress(RuntimeError, ValueError, KeyError):
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            wait = timedelta(seconds=self.every)
            self.store = dist.TCPStore(address, port, is_master=False, timeout=wait)  # type: ignore[attr-defined]  # public
            while True:  # at once, so that a rank that stands still in its first step is known
                self._tell()
                self.others = self._heard()
                self.talks += 1
                if self.ended.wait(self.every):
                    return

    def _tell(self) -> None:
        pulse = self.processes.pulse
        still = f"{self.talks}|{socket.gethostname()}|{os.getpid()}|{time.monotonic() - pulse.at:.0f}|{pulse.doing}"
        self.store.set(f"sat/pulse/{self.processes.rank}", still)

    def _heard(self) -> dict[int, str]:
        keys = {rank: f"sat/pulse/{rank}" for rank in range(self.processes.world_size) if rank != self.processes.rank}
        return {rank: self.store.get(key).decode() for rank, key in keys.items() if self.store.check([key])}

    def _give_up(self) -> None:
        """Say who stands where, show the stacks, and end; those who are waited for end too where they are at hand."""
        pulse, before, talks = self.processes.pulse, self.others, self.talks
        time.sleep(4 * self.every)
        reached = self.talks > talks
        heard = self.others if reached else {}
        others: list[str] = []
        silent: list[tuple[str, int]] = []
        for rank, words in heard.items():
            _, host, number, seconds, doing = words.split("|", 4)
            gone = words == before.get(rank)
            silent += [(host, int(number))] if gone else []
            state = "gives no sign of life since it was at" if gone else f"has been for {seconds} s at"
            others.append(f"rank {rank} on {host} {state}: {doing}")
        if not heard and self.processes.world_size > 1:
            why = "they have said nothing yet" if reached else "the machine of rank 0 is out of reach"
            others.append(f"nothing is heard of the other ranks: {why}")
        waited = time.monotonic() - pulse.at
        if waited < EARLY * self.timeout:
            return  # it has got on meanwhile
        sentence = (
            f"rank {self.processes.rank} on {socket.gethostname()} has not got on for {waited:.0f} s at: {pulse.doing} "
            f"(train.timeout is {self.timeout:g}); {'; '.join([*others, 'what was saved stays: start it again'])}"
        )
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(2, all_threads=True)
        telling = threading.Thread(target=self.last_words, args=(sentence,), daemon=True)
        telling.start()  # the disk may be what hangs
        telling.join(self.every)
        for host, pid in silent:
            if host == socket.gethostname() and _is_stopped(pid):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        os._exit(self.status)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False
