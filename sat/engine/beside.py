"""Work in a thread of its own, beside what this process goes on with."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """`action()`, begun at once; whoever no longer wants its result leaves it alone."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._outcome: list[tuple[T | None, Exception | None]] = []

        def act() -> None:
            try:
                self._outcome.append((action(), None))
            except Exception as error:
                self._outcome.append((None, error))

        self._thread = threading.Thread(target=act, name="beside", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return bool(self._outcome)

    def wait(self, seconds: float) -> None:
        """Until it has ended, at most so long."""
        self._thread.join(seconds)

    @property
    def outcome(self) -> tuple[T | None, Exception | None]:
        """Its result, or what it raised; once it is done."""
        return self._outcome[0]
