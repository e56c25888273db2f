"""Measure what an epoch reads and how well it is mixed: over disk and over HTTP, by 1, 4 and 8 ranks.

    sat bench reads --samples 8192 --ranks 1,4,8

The set is written for the purpose and served by a server of this process, which counts what it sends; each rank is a
process that reads its whole share, all ranks of a row share one cache. What is counted does not depend on how busy the
machine is; seconds do.

    disk            a folder; "few rows kept": as if the set had four times the samples whose rows a process keeps
    http            a server of byte ranges, and a cache that holds twice the set or half of it
    http, windows   a server without byte ranges, a cache of half the set, data.window_shards at what it holds; where a
                    window is not longer than what the ranks read ahead (4 steps), a shard is fetched twice
"""

import http.server
import multiprocessing
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sat.bench.loader import BATCH, captions_of, write_shards
from sat.data import loader, reader
from sat.data.batch import stretches_of
from sat.data.loader import Reading, training_batches
from sat.data.options import LoaderOptions
from sat.data.plan import Cursor, Share, plan_training
from sat.shards.manifest import Manifest, load_manifest
from sat.text import build_tokenizer

SHARD = 256
EPOCHS = 2
"""The first fills the cache; the last is told apart."""


@dataclass(frozen=True)
class Case:
    """Where a set is read from, and how."""

    name: str
    cache: float = 0.0
    """Of the set that the cache holds; 0 reads the folder."""
    ranges: bool = True
    """Whether the server gives byte ranges."""
    few_rows: bool = False
    """Rows are kept of a quarter of the samples."""

    def options(self, shards: int, set_bytes: int, cache_dir: str) -> LoaderOptions:
        """Settings of the loader for a set of so many shards and bytes."""
        window = 0 if self.ranges else int(self.cache * shards)
        cached = max(self.cache, 1e-9) * set_bytes / 1e9
        return LoaderOptions(cache_dir, cached, num_workers=0, window_shards=window)


CASES = (
    Case("disk"),
    Case("disk, few rows kept", few_rows=True),
    Case("http, cache of 2 sets", cache=2.0),
    Case("http, cache of half a set", cache=0.5),
    Case("http, windows", cache=0.5, ranges=False),
)


class Server(http.server.ThreadingHTTPServer):
    """A folder over HTTP on loopback; `sent` counts the bytes of shards."""

    def __init__(self, folder: Path, ranges: bool):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.sent = folder, ranges, 0
        self.counting = threading.Lock()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        blob, status = path.read_bytes(), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.server.ranges:
            blob, status = blob[int(wanted[1]) : int(wanted[2]) + 1], 206
        if body and path.suffix == ".tar":
            with self.server.counting:
                self.server.sent += len(blob)
        self.send_response(status)
        self.send_header("Content-Length", str(len(blob)))
        self.end_headers()
        if body:
            self.wfile.write(blob)


def run(
    samples: Annotated[int, typer.Option(min=2 * SHARD, help="of 10 kB each, in shards of 256")] = 8192,
    ranks: Annotated[str, typer.Option(help="processes that read together, by commas")] = "1,4,8",
    folder: Annotated[Path | None, typer.Option(help="where the set goes; default: temporary")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows to this file")] = None,
) -> list[dict[str, Any]]:
    """Samples read in one go, bytes per epoch relative to the set, mixing, and the CPU time of a sample."""
    from sat.bench.harness import report

    worlds = [int(each) for each in ranks.split(",") if each.strip().isdigit()]
    if not worlds or min(worlds) < 1 or len(worlds) != len(ranks.split(",")):
        raise ValueError(f"ranks {ranks!r} must be whole numbers from 1 on, separated by commas")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary) / "set"
        write_shards(root, 4, samples, SHARD, dim=256)
        rows = [measure(root, case, world) for case in CASES for world in worlds]
    report(rows, json_file)
    return rows


def measure(root: Path, case: Case, ranks: int) -> dict[str, Any]:
    """One row: an epoch of this case by so many processes, and another."""
    manifest = load_manifest(root)
    set_bytes = sum(shard.bytes for shard in manifest.shards)
    with tempfile.TemporaryDirectory(dir=root.parent) as cache, _served(root, case) as (url, server):
        options = case.options(len(manifest.shards), set_bytes, cache)
        began, sent, read = time.perf_counter(), [0], [Counter[str]() for _ in range(EPOCHS)]
        for epoch, counts in enumerate(_in_processes(url, case, options, ranks)):
            read[epoch] = counts
            sent.append(server.sent if server else 0)
        seconds = time.perf_counter() - began
    per_epoch = np.diff(sent) if server else [counts["read"] for counts in read]
    total = sum(read, Counter())
    return {
        "case": case.name,
        "ranks": ranks,
        **_planned(manifest, options, ranks),
        "first_epoch_of_set": float(per_epoch[0] / set_bytes),
        "last_epoch_of_set": float(per_epoch[-1] / set_bytes),
        "cpu_us_per_sample": total["cpu_ns"] / 1e3 / total["samples"],
        "samples_per_s": total["samples"] / seconds,
    }


@contextmanager
def _served(root: Path, case: Case) -> Iterator[tuple[str, Server | None]]:
    if not case.cache:
        yield str(root), None
        return
    server = Server(root, case.ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        server.server_close()


def _planned(manifest: Manifest, options: LoaderOptions, ranks: int) -> dict[str, float]:
    """What the order of the first epoch says: samples read in one go, and how well batches are mixed."""
    sources = [(manifest, 1.0)]
    begins = np.cumsum(manifest.shards.samples) - manifest.shards.samples
    shares = []
    for rank in range(ranks):
        settings = (Share(rank, ranks), options.run_length, options.window)
        plan = plan_training(sources, ["train"], Cursor.start(sources, 1), 1, BATCH * ranks, *settings)
        shares.append(plan.slots(range(len(plan))))
    runs = sum(len(stretches_of(slots)) for share in shares for slots in share)
    batches = [np.concatenate([slots.shard for slots in step]) for step in zip(*shares, strict=True)]
    stored = np.concatenate(
        [begins[slots.shard] + slots.sample for step in zip(*shares, strict=True) for slots in step]
    )
    return {
        "samples_per_run": stored.size / runs,
        "storage_correlation": float(np.corrcoef(stored, np.arange(stored.size))[0, 1]),
        "shards_per_batch": float(np.mean([np.unique(batch).size for batch in batches])),
    }


def _in_processes(url: str, case: Case, options: LoaderOptions, ranks: int) -> Iterator[Counter[str]]:
    """What the ranks count together in each epoch; each is a process, and they take every step together."""
    context = multiprocessing.get_context("fork")
    pipes, processes, together = [], [], context.Barrier(ranks)
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        arguments = (theirs, together, url, case, options, Share(rank, ranks))
        processes.append(context.Process(target=_read_epochs, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    for _ in range(EPOCHS):
        for pipe in pipes:
            pipe.send(None)
        yield sum((pipe.recv() for pipe in pipes), Counter())
    for process in processes:
        process.join()


def _read_epochs(
    pipe: Connection, together: Barrier, url: str, case: Case, options: LoaderOptions, share: Share
) -> None:
    """One rank: reads its share of every epoch when it is told to, and sends what that took."""
    sources = [(load_manifest(url), 1.0)]
    loader.BURST = 1  # nothing is read ahead of the epoch in which it is counted
    if case.few_rows:
        reader.CACHED_ROWS = int(sources[0][0].shards.samples.sum()) // 4
    tokenizer = build_tokenizer(captions_of(0), 1)
    batches = training_batches(
        sources,
        tokenizer,
        Reading(options),
        splits=["train"],
        cursor=Cursor.start(sources, 1),
        epochs=EPOCHS,
        global_batch=BATCH * share.world_size,
        share=share,
    )
    steps = -(-int(sources[0][0].shards.samples.sum()) // (BATCH * share.world_size))
    for _ in range(EPOCHS):
        pipe.recv()
        read, busy, counts = _bytes_read(), time.process_time_ns(), Counter[str]()
        for _ in range(steps):
            counts["samples"] += sum(map(bool, next(batches).sample_keys))
            together.wait()
        counts.update(read=_bytes_read() - read, cpu_ns=time.process_time_ns() - busy)
        pipe.send(counts)


def _bytes_read() -> int:
    """Bytes that this process has asked files for."""
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar
