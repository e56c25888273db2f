"""Measure the plan of a training on 1e9 samples in 1e6 shards over 1,024 ranks x 8 workers, without the samples.

Nothing is scaled down. A data set's manifest and its table of all
shards are written once; then each figure comes from a fresh process that opens them and plans as the loader does, for
rank 0 and for the last rank, at the start and far into an epoch. Not measured here: reading the planned samples (`sat
bench loader`); a set read by URL, whose process holds the table of shards besides (74 MB for 1e6). With `--records`
preprocessing at that size is measured too, on pictures of one pixel (by the program `preprocessing.bench_scale`).
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

CHILD = """
import time
began, busy = time.perf_counter(), time.process_time()
import json, sys
from sat.shards.manifest import load_manifest
from sat.data.plan import Cursor, Share, plan_training

root, (ranks, rank, worker, done, global_batch) = sys.argv[1], map(int, sys.argv[2:])
sources = [(load_manifest(root), 1.0)]
cursor = Cursor.start(sources, seed=1).advanced(done)
plan = plan_training(sources, ["train"], cursor, 1, global_batch, Share(rank, ranks), 4)
(slots,) = plan.slots([worker])
shards = {sources[0][0].shards[shard].name for shard in slots.shard.tolist()}
seconds, busy = time.perf_counter() - began, time.process_time() - busy
status = open("/proc/self/status").read()  # the resource module would count the process that started this one
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
numbers = {"seconds": seconds, "cpu_seconds": busy, "peak_mb": peak, "rows": len(slots.filled), "shards": len(shards)}
print(json.dumps(numbers))
"""


def run(
    samples: Annotated[int, typer.Option(help="samples of an epoch")] = 10**9,
    shards: Annotated[int, typer.Option(help="shards they lie in")] = 10**6,
    ranks: Annotated[int, typer.Option(help="processes that train")] = 1024,
    workers: Annotated[int, typer.Option(help="reader processes of each rank")] = 8,
    batch_per_rank: Annotated[int, typer.Option(help="samples of a rank in a global batch")] = 64,
    records: Annotated[int, typer.Option(min=0, help="also plan, pack, finalize and verify so many pictures")] = 0,
    record_shards: Annotated[int, typer.Option(min=1, help="shards that those pictures are packed in")] = 1000,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows to this file")] = None,
) -> list[dict[str, float]]:
    """Time to the first batch's plan and to a resumed one, peak memory of a process (interpreter, imports included)."""
    from sat.bench.harness import report

    # One sample short of full, so that the ranks' shares of a batch differ.
    global_batch = ranks * batch_per_rank - 1
    late = samples * 2 // 3
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), samples, shards)
        started, resumed = (
            [
                plan_in_new_process(folder, ranks, rank, worker, done, global_batch)
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
            "cpu_seconds": max(each["cpu_seconds"] for each in started + resumed),
            "peak_mb": max(each["peak_mb"] for each in started + resumed),
            "rows_apart": max(each["rows"] for each in started) - min(each["rows"] for each in started),
        }
    ]
    report(rows, json_file)
    if records:
        command = [sys.executable, "-m", "preprocessing.bench_scale", str(records), str(record_shards)]
        subprocess.run(command, check=True)
    return rows


def write_manifest(root: Path, samples: int, shards: int) -> None:
    """What finalizing writes of a data set of this size, without the samples: its manifest and the table of shards."""
    from sat.shards.manifest import manifest_bytes
    from sat.shards.schema import MANIFEST, SHARDS, place_of_rows
    from sat.shards.tables import write_shard_table

    table = shard_table(samples, shards)
    write_shard_table(root, table)
    blob = (root / SHARDS).read_bytes()
    files = {place_of_rows(shard)[0]: {"bytes": 0, "sha256": "0" * 64} for shard in range(shards)}
    files[SHARDS] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    (root / MANIFEST).write_bytes(manifest_bytes("features", {}, table, files, left_out={}))


def shard_table(samples: int, shards: int) -> pa.Table:
    """Shards of features whose digests nothing can compress, as real ones."""
    import numpy as np

    from sat.shards.schema import SHARDS_SCHEMA

    random = np.random.default_rng(1)
    counts = np.full(shards, samples // shards, dtype=np.int64)
    counts[: shards // 2 * 2 : 2] += 3
    counts[1::2] -= 3  # ragged, so that the runs at the shards' ends are short
    names, sizes = [f"train-{number:06d}.tar" for number in range(shards)], counts * 201_216
    blobs = [pa.py_buffer(random.bytes(32 * shards)) for _ in range(2)]
    digests = [pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), shards, [None, blob]) for blob in blobs]
    return pa.table([names, ["train"] * shards, counts, sizes, *digests], SHARDS_SCHEMA)


def plan_in_new_process(root: str | Path, *numbers: int) -> dict[str, float]:
    """Seconds (imports included), peak memory in MB and rows of the first micro-batch, of one worker of one rank."""
    command = [sys.executable, "-c", CHILD, str(root), *map(str, numbers)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found
