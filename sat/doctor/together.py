"""How a check that one rank fails in ends on all of them."""

from collections.abc import Callable
from typing import TypeVar

from sat.engine.processes import Processes

T = TypeVar("T")


class Agreed(ValueError):
    """What some rank could not do, raised by all of them: nobody is lost, and they go on together."""


def agreed(processes: Processes, action: Callable[[], T]) -> T:
    """The result of `action()`, which enters no collective; where a rank fails in it, all raise Agreed. All enter."""
    result, error = None, ""
    try:
        result = action()
    except Exception as caught:  # whatever it is, all must learn of it
        error = " ".join(str(caught).split()) or type(caught).__name__
    errors = processes.gather(error)
    if len(set(errors)) == 1 and errors[0]:
        raise Agreed(errors[0])
    if any(errors):
        raise Agreed(", ".join(f"rank {rank}: {each}" for rank, each in enumerate(errors) if each))
    return result  # type: ignore[return-value]  # that of `action`
