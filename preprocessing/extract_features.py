"""Image shards -> feature shards: every picture once through the frozen encoder, its grid beside its captions.

    python -m preprocessing.extract_features --images data/coco/images --out data/coco/features --weights imagenet

One feature shard per image shard, with the same name and keys. The surprising decision: a GPU gets two processes. Each
works on one shard at a time; while one writes and syncs, the other computes. A CPU gets one process with two shards
under way.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Annotated

import typer

from preprocessing.console import Step, progress_line, refuse_urls, run
from preprocessing.features.extractor import Extractor
from preprocessing.features.plan import plan_features, recipe_of, source_of
from preprocessing.features.recipe import FeatureOptions
from preprocessing.features.statistics import merge_statistics, scale_of
from preprocessing.features.weights import WEIGHTS_DIR, find_weights
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.jobs import Summary, in_process, parse_stripe, process_pool, run_shards, work_on
from preprocessing.sharding.made_on import Machines
from preprocessing.sharding.plan import Plan, PlannedShard, load_plan
from preprocessing.sharding.rebuild import Before
from preprocessing.sharding.write import is_finished
from sat.machine import available_cores, keep_all_freed_memory
from sat.shards.manifest import Manifest
from sat.shards.schema import Sidecar

SHARDS_UNDER_WAY = 2
"""Shards per CPU process, and processes per GPU: one computes while the other is written."""

_extractor: Extractor | None = None
"""Of a worker process; made by `_start_worker`."""


def extract_stripe(
    plan: Plan,
    *,
    stripe: str = "0/1",
    num_workers: int = 0,
    decode_threads: int = 0,
    before: Mapping[str, Before] | None = None,
) -> Summary:
    """Write the shards of a stripe on this machine; 0 workers: two per GPU, or one on a CPU; 0 threads: by cores.

    torch is not even imported when all shards stand. Raises ValueError where this machine cannot compute as planned,
    and what `Extractor.build` and `run_shards` raise.
    """
    index, count = parse_stripe(stripe)
    shards = plan.shards[index::count]
    if all(is_finished(plan.root, s, plan.digest) for s in shards):
        devices = ["cpu"]
    else:
        _refuse_compute(recipe_of(plan).compute)
        devices = _devices(num_workers)
    threads = decode_threads or max(1, available_cores() // len(devices))
    with progress_line(sum(shard.samples for shard in shards), "feature shards") as advance:
        if len(devices) == 1:
            return _extract_here(plan, stripe, devices[0], threads, advance, before)

        def told(images: int, built: bool) -> None:
            advance(images)

        places = get_context("spawn").Queue()
        for place in zip(devices, _core_groups(len(devices)), strict=True):
            places.put(place)
        with process_pool(len(devices), plan, _build, _start_worker, (plan, places, threads, before)) as pool:
            return run_shards(plan, in_process, pool, stripe=stripe, slots=len(devices), progress=told)


def finalize_features(plan: Plan) -> Manifest:
    """Publish the feature data set with its statistics, and say where its shards were computed on several machines.

    Raises as `finalize`.
    """
    recipe, scale, machines = recipe_of(plan), scale_of(plan), Machines()

    def statistics(sidecars: Iterable[Sidecar]) -> bytes:
        return merge_statistics(machines.counted(sidecars), recipe.statistics_splits, recipe.spec.dim, scale)

    manifest = finalize(plan, statistics)
    for line in machines.lines() if machines.differ else ():
        print(f"note: {plan.root}: {line}")
    return manifest


def _extract_here(
    plan: Plan,
    stripe: str,
    device: str,
    threads: int,
    advance: Callable[[int], None],
    before: Mapping[str, Before] | None,
) -> Summary:
    def reused(images: int, built: bool) -> None:
        advance(0 if built else images)  # the extractor has told of the built ones, batch by batch

    keep_all_freed_memory()
    with (
        _extractor_of(plan, device, threads) as extractor,
        ThreadPoolExecutor(SHARDS_UNDER_WAY, thread_name_prefix="shard") as pool,
    ):
        extractor.progress, extractor.before = advance, before
        work = partial(work_on, plan, extractor.build)
        return run_shards(plan, work, pool, stripe=stripe, slots=SHARDS_UNDER_WAY, progress=reused)


def _extractor_of(plan: Plan, device: str, threads: int) -> Extractor:
    return Extractor(plan, recipe_of(plan), source_of(plan), scale_of(plan), device, threads)


def _start_worker(
    plan: Plan, places: "Queue[tuple[str, list[int]]]", threads: int, before: Mapping[str, Before] | None
) -> None:
    """Take a device and a group of cores (before torch counts them), in a worker process."""
    global _extractor
    keep_all_freed_memory()
    device, cores = places.get()
    if device == "cpu":
        os.sched_setaffinity(0, cores)
    _extractor = _extractor_of(plan, device, threads)
    _extractor.before = before


def _build(plan: Plan, shard: PlannedShard) -> Sidecar:
    assert _extractor is not None, "the worker process was not started by _start_worker"
    return _extractor.build(plan, shard)


def _refuse_plan(step: Step, compute: str) -> None:
    """ValueError for arithmetic that is not named for other machines, or that this one cannot do for itself."""
    if step == Step.PLAN and compute == "auto":
        raise ValueError("another machine may do the work: choose what it computes in, --compute bf16 or fp32")
    if step == Step.ALL and compute == "bf16":
        _refuse_compute(compute)


def _refuse_compute(compute: str) -> None:
    from preprocessing.features.network import refuse_compute

    refuse_compute(compute)


def _devices(num_workers: int) -> list[str]:
    """The device of each process."""
    import torch

    if not torch.cuda.is_available():
        return ["cpu"] * (num_workers or 1)
    gpus = torch.cuda.device_count()
    return [f"cuda:{index % gpus}" for index in range(num_workers or SHARDS_UNDER_WAY * gpus)]


def _core_groups(count: int) -> list[list[int]]:
    """The cores this process may use, in `count` groups of neighbours; more groups than cores share them."""
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        return [cores] * count
    bounds = [round(i * len(cores) / count) for i in range(count + 1)]
    return [cores[low:high] for low, high in pairwise(bounds)]


def main(
    out: Annotated[Path, typer.Option(help="folder of the feature shards")],
    images: Annotated[Path | None, typer.Option(help="folder of the image shards")] = None,
    weights: Annotated[
        str, typer.Option(help="`imagenet` (ResNet-50), `lite0` or `lite2` (EfficientNet-Lite), or a safetensors file")
    ] = "imagenet",
    weights_dir: Annotated[Path, typer.Option(help="where weights with a name lie")] = WEIGHTS_DIR,
    size: Annotated[
        int, typer.Option(help="side of the encoder's input: at a stride of 32, 224 gives 7x7 cells, 448 gives 14x14")
    ] = FeatureOptions.size,
    stage: Annotated[
        int, typer.Option(help="stage of the encoder whose output is kept, from 1; 0: the last features")
    ] = FeatureOptions.stage,
    dtype: Annotated[str, typer.Option(help="format on disk: bf16, fp16, fp32 or int8")] = FeatureOptions.dtype,
    geometry: Annotated[str, typer.Option(help="squash (whole picture) or center_crop")] = FeatureOptions.geometry,
    compute: Annotated[
        str, typer.Option(help="arithmetic of the network: auto, bf16 or fp32")
    ] = FeatureOptions.compute,
    batch_size: Annotated[int, typer.Option(help="pictures per pass through the network")] = FeatureOptions.batch_size,
    statistics_split: Annotated[
        list[str] | None, typer.Option(help="split the statistics are taken from; default: train, or all without it")
    ] = None,
    scale_from: Annotated[
        str, typer.Option(help="int8: folder of an int8 data set whose scales are taken, to mix both or score either")
    ] = FeatureOptions.scale_from,
    num_workers: Annotated[int, typer.Option(min=0, help="processes; 0: two per GPU, one on a CPU")] = 0,
    decode_threads: Annotated[int, typer.Option(min=0, help="per process; 0: by cores")] = 0,
    stripe: Annotated[str, typer.Option(help="I/N: every N-th shard from number I, counted from 0")] = "0/1",
    step: Annotated[Step, typer.Option(help="part of the job to run")] = Step.ALL,
    overwrite: Annotated[bool, typer.Option(help="delete a data set that was planned otherwise")] = False,
) -> None:
    """Extract grids of all pictures; a second run reuses what is whole and goes on where a first one ended."""
    refuse_urls(out, images)
    if step in (Step.ALL, Step.PLAN):
        if images is None:
            raise ValueError("planning needs --images")
        _refuse_plan(step, compute)
        splits = tuple(statistics_split or ())
        options = FeatureOptions(size, stage, dtype, geometry, compute, batch_size, splits, scale_from)
        plan = plan_features(images, out, find_weights(weights, weights_dir), options, overwrite=overwrite)
        about = f"{plan.samples} pictures in {len(plan.shards)} shards, network in {recipe_of(plan).compute}"
        print(f"{out}: plan of {about}")
    if step in (Step.ALL, Step.SHARDS):
        plan = load_plan(out)
        summary = extract_stripe(plan, stripe=stripe, num_workers=num_workers, decode_threads=decode_threads)
        print(f"{out}: {summary.line()}")
    if step == Step.FINALIZE or (step == Step.ALL and stripe == "0/1"):
        manifest = finalize_features(load_plan(out))
        print(f"{out}: data set {manifest.digest[:12]} of {manifest.splits}")


if __name__ == "__main__":
    run(main)
