"""Measure preprocessing itself at any size: plan, shard jobs, finalize and verify of pictures of 1 x 1 pixel.

    sat bench plan --records 1000000 --record-shards 100000      or: python -m preprocessing.bench_scale

Every step runs in a process of its own, as on a cluster, and says what it cost: CPU seconds per 1,000 records, which
stay what they are while a step is linear, and the peak of its memory. Pictures are as small as they can be, so what is
measured is the bookkeeping: plans, claims, sidecars, tables, digests.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from preprocessing.annotations.read import Records
from preprocessing.console import run
from preprocessing.shard_images import plan_images, shard_stripe
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.plan import ImageRecord, load_plan
from preprocessing.sharding.verify import verify

PICTURE = b"P5 1 1 255\n\x80"
"""A grey PGM of one pixel."""
NAME = "picture.pgm"
Row = dict[str, float | str]


def records_of(count: int) -> Records:
    """So many records of one picture file, each with five captions of its own."""
    captions = [[f"a thing {place} of {number}" for place in range(5)] for number in range(1000)]
    images = (
        ImageRecord(str(n), NAME, "train", (*captions[n % 1000],), f"{n:09d}", len(PICTURE)) for n in range(count)
    )
    return Records(tuple(images), (), {})


def _plan(root: Path, records: int, shards: int) -> None:
    (root / "pictures").mkdir()
    (root / "pictures" / NAME).write_bytes(PICTURE)
    size = -(-records // shards)
    plan_images(records_of(records), root / "pictures", root / "set", shard_size=size, seed=1, max_bad_fraction=0)


def _shards(root: Path, records: int, shards: int) -> None:
    shard_stripe(load_plan(root / "set"))


def _finalize(root: Path, records: int, shards: int) -> None:
    assert sum(finalize(load_plan(root / "set")).splits.values()) == records


def _verify(root: Path, records: int, shards: int) -> None:
    report = verify(root / "set", num_workers=2)
    assert not report.faults and not report.foreign, f"{len(report.faults)} faults"


STEPS: dict[str, Callable[[Path, int, int], None]] = {
    "plan": _plan,
    "shards": _shards,
    "finalize": _finalize,
    "verify": _verify,
}


def measure(step: str, root: Path, records: int, shards: int) -> Row:
    """Run one step here and say what it cost this process, imports left out of the time."""
    began, busy = time.perf_counter(), time.process_time()
    STEPS[step](root, records, shards)
    busy, seconds = time.process_time() - busy, time.perf_counter() - began
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    cost = {"seconds": seconds, "cpu_seconds": busy, "cpu_ms_per_record": 1e3 * busy / records, "peak_mb": peak}
    return {"step": step, "records": records, "shards": shards, **cost}


def measured(records: int, shards: int, folder: Path | None = None) -> list[Row]:
    """A row for every step, each run in a process of its own on a fresh data set below `folder`."""
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for step in STEPS:
            command = [sys.executable, "-m", "preprocessing.bench_scale", str(records), str(shards), "--step", step]
            done = subprocess.run([*command, "--folder", temporary], check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def main(
    records: Annotated[int, typer.Argument(min=1, help="pictures planned")] = 10**6,
    shards: Annotated[int, typer.Argument(min=1, help="shards they are packed in")] = 10**5,
    folder: Annotated[Path | None, typer.Option(help="where the data set goes; default: temporary")] = None,
    step: Annotated[str, typer.Option(help="one step alone, on what the others left in --folder")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows to this file")] = None,
) -> None:
    """CPU seconds, also by the record, and peak memory of each step of preprocessing."""
    if step:
        if step not in STEPS or folder is None:
            raise ValueError(f"--step {step!r}: expected one of {', '.join(STEPS)}, with --folder")
        print(json.dumps(measure(step, folder, records, shards)))
        return
    from sat.bench.harness import report

    report(measured(records, shards, folder), json_file)


if __name__ == "__main__":
    run(main)
