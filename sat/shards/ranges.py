"""Byte ranges of remote files, fetched ahead of use: how shards are read that the cache has no room for.

A range is one run of consecutive samples. It is asked for when its batch is planned, waits in memory, and is gone once
its last sample was read, so a process fetches no byte twice in an epoch.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import fsspec

from sat.credentials import shown
from sat.shards.retry import naming, remote_error, retrying

THREADS = 8
"""Ranges that a process asks for at once: a store answers each after tens of milliseconds."""
WAITING = 256 << 20
"""Bytes that a process holds before they are used; what is asked for beyond is fetched when it is needed."""


class Range(NamedTuple):
    """Bytes [begin, end) of a file."""

    name: str
    begin: int
    end: int


class RangeReader:
    """Ranges of the files below `root`. Threads start with the first range that is expected."""

    def __init__(self, root: str, count_retry: Callable[[], None]):
        self.root = root
        self.count_retry = count_retry
        self._ahead: dict[Range, Future[bytes]] = {}
        self._held = 0
        """Bytes of `_ahead`."""
        self._asked: SimpleQueue[tuple[Range, Future[bytes]]] = SimpleQueue()
        self._process = 0

    def expect(self, wanted: Range) -> None:
        """Fetch in the background, unless too much waits to be used."""
        size = wanted.end - wanted.begin
        if wanted in self._ahead or self._held + size > WAITING:
            return
        if self._process != os.getpid():  # threads do not survive a fork
            self._asked, self._process, self._ahead, self._held = SimpleQueue(), os.getpid(), {}, 0
            for _ in range(THREADS):
                # Daemons: a process that is done must not wait for ranges that nobody needs any more.
                threading.Thread(target=self._serve, args=(self._asked,), name="fetch-ranges", daemon=True).start()
        answer: Future[bytes] = Future()
        self._ahead[wanted] = answer
        self._held += size
        self._asked.put((wanted, answer))

    def read(self, name: str, begin: int, end: int) -> memoryview:
        """Bytes [begin, end), of a range that was expected if one holds them. Raises as `retrying` does."""
        for wanted in self._ahead:
            if wanted.name == name and wanted.begin <= begin and end <= wanted.end:
                answer = self._ahead[wanted]
                if end == wanted.end:  # samples are read in order: this is the last
                    self.forget(wanted)
                return memoryview(answer.result())[begin - wanted.begin : end - wanted.begin]
        return memoryview(self._fetch(Range(name, begin, end)))

    def forget(self, wanted: Range) -> None:
        """Drop a range that nobody reads."""
        if self._ahead.pop(wanted, None) is not None:
            self._held -= wanted.end - wanted.begin

    def forget_file(self, name: str) -> None:
        """Drop all ranges of a file: one of them arrived damaged."""
        for wanted in [each for each in self._ahead if each.name == name]:
            self.forget(wanted)

    def _serve(self, asked: "SimpleQueue[tuple[Range, Future[bytes]]]") -> None:
        while True:
            wanted, answer = asked.get()
            try:
                answer.set_result(self._fetch(wanted))
            except Exception as error:
                answer.set_exception(error)

    def _fetch(self, wanted: Range) -> bytes:
        url = f"{self.root}/{wanted.name}"
        with naming(shown(url)):
            fetch = partial(fetch_range, url, wanted.begin, wanted.end)
            return retrying(fetch, shown(url), self.count_retry, remote_error)


def fetch_range(url: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a remote file, asked for once. ConnectionError where another number of bytes arrives."""
    filesystem, path = fsspec.core.url_to_fs(url)
    blob: bytes = filesystem.cat_file(path, start=begin, end=end)
    if len(blob) != end - begin:
        raise ConnectionError(f"{len(blob)} bytes arrived, {end - begin} were asked for")
    return blob


def serves_ranges(root: str, name: str) -> bool:
    """Whether the store gives a part of a file (here of the small file `name`) and not the whole of it."""
    url = f"{root}/{name}"

    def ask() -> int:
        filesystem, path = fsspec.core.url_to_fs(url)
        return len(filesystem.cat_file(path, start=1, end=3))

    with naming(shown(url)):
        return retrying(ask, shown(url), lambda: None, remote_error) == 2
