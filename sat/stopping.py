"""The wish to stop: which signals say it, who hears them, and who ends with whom.

A signal never interrupts a training, it is remembered. Whoever serves a training (a process that reads batches, say)
ignores these signals, as a scheduler sends them to everybody at once, and ends with the process that it serves. A rank
of a launch takes the end of its launcher, whatever ended it, for a wish to stop.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
LAUNCHER = "SAT_LAUNCHER"
"""Environment variable: process id of the launcher that is ours."""
_LAUNCHED = (LAUNCHER, "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
"""One of these is set where a launcher (torchrun, accelerate, ours) has started this process."""
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


START_AGAIN = 75
"""Exit status, EX_TEMPFAIL of sysexits.h: a process was lost, or a stop has saved nothing new."""


class StartAgain(Exception):
    """An end for which starting the same command again is right; exit status `START_AGAIN`."""


@dataclass(frozen=True)
class Wish:
    """What has been asked of this process since `listen`."""

    signals: list[int] = field(default_factory=list)
    """Received, in order."""
    launcher: int = 0
    """Process id of the launcher that this process must not outlive; 0: there is none."""

    def is_there(self) -> bool:
        """Whether this process has been asked to stop."""
        return bool(self.signals) or (self.launcher != 0 and os.getppid() != self.launcher)


def heard() -> list[signal.Signals]:
    """The signals to listen to: SIGHUP is not among them under `nohup`."""
    return [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def follow_launcher() -> int:
    """Have the end of the launcher, whatever ended it, come as SIGTERM; its process id, 0 where there is none.

    Until `listen` is called the signals end the process at once: nothing is lost yet, and a call that waits for other
    ranks to begin hears nothing else.
    """
    if not any(name in os.environ for name in _LAUNCHED):
        return 0
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))
    end_with_parent(signal.SIGTERM)
    if os.getppid() != launcher:  # it was gone before the system knew
        os.kill(os.getpid(), signal.SIGTERM)
    return launcher


def listen() -> Wish:
    """Remember the signals from now on."""
    wish = Wish(launcher=follow_launcher())
    for number in heard():
        signal.signal(number, lambda received, _: wish.signals.append(received))
    return wish


def serve(parent: int) -> None:
    """For a forked process that serves `parent`: ignore the signals, and end at once when the parent has ended.

    0: the parent's main thread is not what forked it, and with another thread it would end too early.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if parent:
        end_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the system knew
            os._exit(0)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals wait until the block is left. A process started inside is born with them held, until it calls `serve`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(number: signal.Signals) -> None:
    """Have the system send this process a signal when its parent (the thread that started it) ends."""
    with contextlib.suppress(AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
