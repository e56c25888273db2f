"""What a check says: a row with its state, what was found, and a mend where it is not as it should be.

A row is printed as soon as it is known, so that a check that hangs or dies takes none of the others with it.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sat.stopping import StartAgain

OK, WARNING, FAILED = "ok", "warning", "failed"
STATES = (OK, WARNING, FAILED)
"""From good to bad."""
WIDTH = 120
"""Columns of the printed table."""
_NAME = 14
"""Width of a check's name."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    state: str
    """One of STATES."""
    found: str
    mend: str = ""
    """What to do; there where the state is not ok."""
    values: Mapping[str, float | str] = field(default_factory=dict)
    """Figures for scripts, by name."""

    def __post_init__(self) -> None:
        assert self.state in STATES and bool(self.mend) == (self.state != OK), self

    def text(self) -> str:
        """The row as it is printed, with its mend below it."""
        head, rest = f"{self.state:8} {self.check:{_NAME}} ", " " * (_NAME + 10)
        parts = [(head, rest, self.found)] + [(f"{rest}-> ", f"{rest}   ", self.mend)] * bool(self.mend)
        return "\n".join(
            textwrap.fill(words, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)
            for first, later, words in parts
        )


def ok(check: str, found: str, **values: float | str) -> Row:
    """All is as it should be."""
    return Row(check, OK, found, values=values)


def warning(check: str, found: str, mend: str, **values: float | str) -> Row:
    """It works, but not as well as it could, or it may come to fail."""
    return Row(check, WARNING, found, mend, values)


def failed(check: str, found: str, mend: str, **values: float | str) -> Row:
    """A run would not survive it, or its numbers would not be what they should."""
    return Row(check, FAILED, found, mend, values)


def refused(check: str, error: Exception, mend: str = "") -> Row:
    """A check that ended in an error, which is one sentence; what it says behind its last semicolon is its way out."""
    said = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, ValueError | OSError | StartAgain):
        said = f"{type(error).__name__}: {said}"[:500]
    found, semicolon, way_out = said.rpartition("; ")
    if mend or not semicolon:
        return failed(check, said, mend or "mend what is named here, then run sat doctor again")
    return failed(check, found, way_out)


def attempted(check: str, rows: Callable[[], Iterable[Row]], mend: str = "") -> Iterator[Row]:
    """The rows of a check; an error of any kind becomes one that failed, so that the checks after it are done too."""
    try:
        yield from rows()
    except Exception as error:  # whatever it is, it is what this check has found
        yield refused(check, error, mend)


def verdict(rows: Iterable[Row]) -> str:
    """The worst state of all."""
    return max((row.state for row in rows), key=STATES.index, default=OK)


def summary(rows: Iterable[Row]) -> str:
    """The line below the table."""
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in reversed(STATES) if state in states)
    words = {OK: "nothing stands in the way", WARNING: "it will run", FAILED: "mend what failed before a long run"}
    return f"{counts}: {words[max(states, key=STATES.index, default=OK)]}"


def sized(size: float) -> str:
    """Bytes for a reader: 12 kB, 84 MB, 3.2 GB."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:,.0f} {name}" if size >= 10 * unit else f"{size / unit:.1f} {name}"


def counted(count: int, name: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"
