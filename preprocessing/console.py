"""What the command lines of the shard programs share: steps, one line per error, one line of progress."""

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import typer


class Step(StrEnum):
    """Parts of a job, to run them apart on a cluster; `all` runs them in turn."""

    ALL = "all"
    PLAN = "plan"
    SHARDS = "shards"
    FINALIZE = "finalize"


def run(program: Callable[..., object]) -> None:
    """Run a typer program; what a user or a file can cause (ValueError, OSError) is one line and exit status 1."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a kill costs nothing here, waiting for shards under way does
    try:
        typer.run(program)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def refuse_urls(*folders: Path | None) -> None:
    """ValueError for a URL where a folder is needed: taken for a path, it would become a folder of that name here."""
    for folder in folders:
        url = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", str(folder))
        if url:
            name = f"{url[1]}://{url[2]}"
            raise ValueError(f"{name} is a URL, and this needs a folder; work in one and copy the result there or back")


@contextmanager
def progress_line(total: int, label: str, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Yields a function that advances one progress line with rate and time left."""
    from tqdm import tqdm

    options = {"unit": "B", "unit_scale": True} if unit == "B" else {"unit": f" {unit}"}
    interval = 0.5 if sys.stderr.isatty() else 10  # seconds; a log file needs few lines
    with tqdm(total=total, desc=label, dynamic_ncols=True, mininterval=interval, **options) as bar:
        yield bar.update
