"""Measure the plan of a training on 1e9 samples in 1e6 shards over 1,024 ranks x 8 workers, without the data.

Surprising: nothing is scaled down and nothing is special about the size. Each figure comes from a fresh process that
calls `plan_training` as the loader does, for rank 0 and for the last rank, at the start and far into an epoch.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

CHILD = """
import time
began = time.perf_counter()
import json, sys
import numpy as np
from types import SimpleNamespace
from sat.data.plan import Cursor, plan_training

samples, shards, ranks, workers, rank, worker, done, global_batch = map(int, sys.argv[1:])
counts = np.full(shards, samples // shards, dtype=np.int64)
counts[::2] += 3
counts[1::2] -= 3  # ragged, so that the runs at the shards' ends are short
table = SimpleNamespace(samples=counts, of_split=lambda split: range(shards))
sources = [(SimpleNamespace(root="plan", digest="0123456789abcdef" * 4, shards=table), 1.0)]
cursor = Cursor.start(sources, seed=1).advanced(done)
plan = plan_training(sources, ["train"], cursor, 1, global_batch, rank, ranks, 1, 4)
(slots,) = plan.slots([worker])
seconds = time.perf_counter() - began
status = open("/proc/self/status").read()  # the resource module would count the process that started this one
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps({"seconds": seconds, "peak_mb": peak, "rows": len(slots.filled)}))
"""


def run(
    samples: Annotated[int, typer.Option(help="samples of an epoch")] = 10**9,
    shards: Annotated[int, typer.Option(help="shards they lie in")] = 10**6,
    ranks: Annotated[int, typer.Option(help="processes that train")] = 1024,
    workers: Annotated[int, typer.Option(help="reader processes of each rank")] = 8,
    batch_per_rank: Annotated[int, typer.Option(help="samples of a rank in a global batch")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows to this file")] = None,
) -> list[dict]:
    """Time to the first batch and to a resumed one, peak memory of a process (interpreter and numpy included)."""
    from sat.bench.harness import report

    # One sample short of full, so that the ranks' shares of a batch differ.
    global_batch = ranks * batch_per_rank - 1
    late = samples * 2 // 3
    started, resumed = (
        [
            plan_in_new_process(samples, shards, ranks, workers, rank, worker, done, global_batch)
            for rank, worker in ((0, 0), (ranks - 1, workers - 1))
        ]
        for done in (0, late)
    )
    rows = [
        {
            "samples": samples,
            "shards": shards,
            "ranks": ranks,
            "workers": workers,
            "seconds_to_first_batch": max(each["seconds"] for each in started),
            "seconds_to_resume": max(each["seconds"] for each in resumed),
            "peak_mb": max(each["peak_mb"] for each in started + resumed),
            "rows_apart": max(each["rows"] for each in started) - min(each["rows"] for each in started),
        }
    ]
    report(rows, json_file)
    return rows


def plan_in_new_process(*numbers: int) -> dict:
    """Seconds (imports included), peak memory in MB and rows of the first micro-batch, of one worker of one rank."""
    command = [sys.executable, "-c", CHILD, *map(str, numbers)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
