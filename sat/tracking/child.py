"""Our own programs in processes of their own: each can be ended for certain, and its imports cost a caller nothing."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def command(module: str, *arguments: str) -> list[str]:
    """How this Python runs one of our modules; `-P`: what lies in the current folder is not taken for a package."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """`given`, by default that of this process, in which a child finds this package wherever it was imported from."""
    given = os.environ if given is None else given
    root = str(Path(__file__).resolve().parents[2])
    return {**given, "PYTHONPATH": os.pathsep.join(filter(None, [root, given.get("PYTHONPATH")]))}


def ask(
    module: str, *arguments: str, timeout_s: float, given: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of our modules, wait for it, and keep what it says; raises subprocess.TimeoutExpired after killing it."""
    return subprocess.run(
        command(module, *arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(given),
        check=False,
    )
