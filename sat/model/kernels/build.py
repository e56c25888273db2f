"""C++ of ours, compiled on first use and loaded with ctypes: needs a C++ compiler and nothing else, not even PyTorch.

The finished library is kept in the user's cache. Where there is no compiler, `build` says why, and its callers do the
same work without.
"""

import contextlib
import ctypes
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from sat import files

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order, as PATH has them."""


def build(
    name: str, source: Path, flags: Sequence[str], headers: Sequence[Path] = ()
) -> tuple[ctypes.CDLL | None, str]:
    """The loaded library and where it is from, or None and why there is none.

    Built once per source, compiler and kind of CPU. Processes that build at the same time do not disturb one another:
    each renames its own file into place. A file that cannot be loaded is built anew.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None, "there is no C++ compiler"
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
        sources = [path.read_text() for path in (source, *headers)]
        identity = "\n".join([*sources, compiler, version, *flags, cpu_kind()])
        path = files.cache_folder(private=True) / f"{name}-{files.sha256_of(identity)[:24]}.so"
        if path.exists():
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(path)), str(path)
        begin = time.perf_counter()
        with files.replacing(path) as partial:
            _compile([compiler, *flags, str(source), "-o", str(partial)])
        return ctypes.CDLL(str(path)), f"{path}, built in {time.perf_counter() - begin:.0f} s"
    except subprocess.CalledProcessError as error:
        return None, f"{' '.join(error.cmd)} failed: {error.stderr.strip()[-500:]}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"building them with {compiler} failed: {error}"


def _compile(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def cpu_kind() -> str:
    """What -march=native depends on; homes are shared by machines of several kinds."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        return "\n".join(line for line in text.splitlines() if line.startswith(("model name", "flags", "Features")))
    except OSError:
        return platform.processor() or platform.machine()
