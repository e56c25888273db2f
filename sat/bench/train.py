"""The real training loop against its bare step, on this machine: what the step alone could do, and where the rest goes.

Shards, loader, ranks, exchange, optimizer and journal line are those of `sat train`; the shards hold random features in
a temporary folder. The bare step is forward, backward and update of the same ranks on batches that lie in memory,
without exchange. Surprising: every batch is a fresh one, in both, because a step over lengths that were met before is
quicker than training ever is.
"""

import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sat import files
from sat.bench.captions import COCO_WORDS
from sat.bench.harness import report
from sat.config import load_config, save_config
from sat.machine import best_precision
from sat.shards.features import FeatureSpec
from sat.text import build_tokenizer

ROUNDS_FILE = "rounds.json"
"""What the ranks leave in their folder: see `sat.bench.train_ranks.Round`."""
SHARES = ("wait", "compute", "exchange", "rest")
SAVES = ("save_stops_s", "save_takes_s", "save_costs_steps")


@dataclass(frozen=True)
class Shape:
    """A training to be measured."""

    side: int
    """Cells along a side of the grid."""
    dim: int
    vocabulary: int
    samples: int
    """Images that are written."""
    settings: tuple[str, ...]
    """KEY=VALUE over the defaults."""


SHAPES = {
    "demonstration": Shape(
        side=10,
        dim=320,
        vocabulary=60,
        samples=2048,
        settings=(
            "model.preset=paper",
            "model.embedding_dim=128",
            "model.lstm_dim=256",
            "model.attention_dim=256",
            "model.dropout=0.3",
            "model.weight_init=uniform",
            "train.global_batch=16",
            "data.num_workers=0",
        ),
    ),
    "coco-7x7": Shape(7, 2048, 10_000, 1024, ("model.preset=tutorial", "train.global_batch=64")),
    "coco-14x14": Shape(14, 2048, 10_000, 384, ("model.preset=tutorial", "train.global_batch=64")),
}
"""Those of configs/demo.yaml and of configs/coco_tutorial.yaml with a batch for a CPU, whatever the processes."""


def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    shapes: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(SHAPES)}.")] = ",".join(SHAPES),
    processes: Annotated[str, typer.Option(help="Numbers of processes, comma-separated.")] = "1,2",
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto: what this machine is best at.")] = "auto",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each turn.")] = 8,
    rounds: Annotated[int, typer.Option(help="Turns of loop and bare step; medians count.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where to write 300 MB for a while.")] = None,
    settings: Annotated[str, typer.Option(help="KEY=VALUE over those of the shapes, comma-separated.")] = "",
) -> list[dict[str, Any]]:
    """Captions/s of each process in the real loop and in the bare step, by its CPU time too, which stays true on a
    machine that others use; the loop's shares of the time; and what a checkpoint costs: how long the loop stands still,
    how long all is being written, and how many steps fewer it takes in that time than it otherwise does.
    """
    chosen, numbers = shapes.split(","), processes.split(",")
    if unknown := set(chosen) - set(SHAPES):
        raise ValueError(f"{', '.join(sorted(unknown))} is unknown; choose from {', '.join(SHAPES)}")
    if not all(number.isdecimal() and int(number) for number in numbers) or min(steps, rounds) < 1:
        raise ValueError(f"processes {processes!r}, steps {steps} and rounds {rounds} must be whole numbers from 1 on")
    devices = torch.cuda.device_count()
    if devices and (most := max(map(int, numbers))) > devices:
        raise ValueError(f"{most} processes want a GPU each, and there are {devices}; choose others by --processes")
    precision = best_precision() if precision == "auto" else precision
    rows = []
    for name in chosen:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            more = tuple(filter(None, settings.split(",")))
            shape = replace(SHAPES[name], settings=(*SHAPES[name].settings, *more))
            config = write_training(Path(temporary), shape, precision)
            for number in map(int, numbers):
                found = measure(config, number, steps, rounds)
                rows.append({"shape": name, "processes": number, "precision": precision} | found)
                print(f"{name} on {number}: {rows[-1]['captions_per_s']:.0f} captions/s per process", flush=True)
    report(rows, json_file)
    return rows


def write_training(root: Path, shape: Shape, precision: str) -> Path:
    """Write shards, tokenizer and settings below `root`; the path of the settings. Wrong ones: ValueError at once."""
    import numpy as np
    from safetensors.numpy import save

    from sat.bench.loader import write_shard
    from sat.shards.manifest import write_manifest
    from sat.shards.schema import STATISTICS
    from sat.shards.tables import write_sample_tables, write_shard_table

    data = root / "features"
    places = (f"data.features={data}", f"data.tokenizer={root}/tokenizer.json", f"train.run_dir={root}/run")
    rest = (f"train.precision={precision}", "train.epochs=1000000", "tracking.mlflow_uri=none")
    config = load_config(None, [*places, *rest, *shape.settings])
    words = [f"w{number}" for number in range(shape.vocabulary)]
    build_tokenizer(words, 1).save(root / "tokenizer.json")
    spec = FeatureSpec("grid", (shape.side, shape.side), shape.dim, "fp16", encoder=None, transform=None)
    captions, generator = captions_of(words), np.random.default_rng(1)
    numbers = range(-(-shape.samples // 128))
    sidecars = [write_shard(data, spec, number, 128, generator, captions) for number in numbers]
    sidecars.append(write_shard(data, spec, len(numbers), 1, generator, captions, split="val"))
    shards = write_sample_tables(data, sidecars)
    write_shard_table(data, shards)
    one = np.ones(shape.dim, np.float32)
    files.write_bytes(data / STATISTICS, save({"mean": 0 * one, "std": one, "scale": one}))
    write_manifest(data, "features", spec.to_fingerprint(), shards, [STATISTICS])
    save_config(config, root / "config.yaml")
    return root / "config.yaml"


def captions_of(words: list[str]) -> Iterator[tuple[str, ...]]:
    """Five captions of one image after another: as long as COCO's, words by Zipf's law."""
    rng, chances = random.Random(0), list(itertools.accumulate(1 / (rank + 1) for rank in range(len(words))))
    while True:
        sizes = rng.choices(list(COCO_WORDS), list(COCO_WORDS.values()), k=5)
        yield tuple(" ".join(rng.choices(words, cum_weights=chances, k=size)) for size in sizes)


def measure(config: Path, processes: int, steps: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds of one launch, shares of the time as means over its ranks."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    environment = {"OMP_NUM_THREADS": threads} | os.environ | {"TQDM_DISABLE": "1"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    command = [*launcher, "-m", "sat.bench.train_ranks", str(config), str(steps), str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the training on {processes} processes failed: {(done.stdout + done.stderr)[-2000:]}")
    found = files.read_json(config.parent / ROUNDS_FILE)
    assert found is not None
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "captions_per_s": medians["captions_per_s"],
        "bare_captions_per_s": medians["bare_captions_per_s"],
        "of_bare": medians["captions_per_s"] / medians["bare_captions_per_s"],
        "captions_per_cpu_s": medians["captions_per_cpu_s"],
        "of_bare_cpu": medians["captions_per_cpu_s"] / medians["bare_captions_per_cpu_s"],
        "captions_per_s_in_all": medians["captions_per_s"] * processes,
        "seconds_per_step": medians["seconds_per_step"],
    } | {name: medians[name] for name in (*SAVES, *(f"{share}_share" for share in SHARES))}
