"""Plan -> CaptionBatch: the training batches of an epoch, the images of a split, their references.

The surprising decision: the loader keeps no state. A batch is a pure function of its number, so any DataLoader worker
can make any batch, and the cursor (which the trainer advances after its optimizer step) is all there is to save. Never
hand these loaders to `accelerator.prepare`: they are already shared among the ranks.
"""

import gc
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sat.data.batch import BatchReader, CaptionBatch, CaptionOptions, InTransit, Stretch, row_of, stretches_of
from sat.data.buffers import Ring
from sat.data.plan import (
    Cursor,
    EvaluationPlan,
    Slots,
    Sources,
    TrainingPlan,
    choose_shards,
    plan_training,
    sources_digest,
)
from sat.data.reader import SampleReader
from sat.shards.manifest import Manifest, check_files
from sat.shards.store import make_store
from sat.text import CaptionTokenizer

logger = logging.getLogger(__name__)

PLANNED_TOGETHER = 8
SLOTS = 4
"""Batches whose memory is kept per worker: two wait, one is filled, one is in use; more get memory of their own."""
CHECKED_AT_START = 20_000
"""Up to so many shards rank 0 compares all sizes before it starts; every size is compared when its shard is opened."""
SAME_IN_A_MIXTURE = ("grid", "dim", "dtype", "encoder", "transform", "scale_sha256")


@dataclass
class PlannedBatches:
    """A plan and its reader as a map-style data set: item i is batch i. Asks for batches ahead of their use."""

    plan: TrainingPlan | EvaluationPlan
    reader: BatchReader
    ahead: int
    _planned: dict[int, tuple[Slots, list[Stretch]]] = field(default_factory=dict, init=False)
    """The batches ahead, by number."""
    _expected: int = field(default=-1, init=False)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> CaptionBatch | InTransit:
        info = torch.utils.data.get_worker_info()
        stride = info.num_workers if info else 1
        for later in range(index + stride, min(index + self.ahead * stride + 1, len(self)), stride):
            if later > self._expected:
                self._expected = later
                self.reader.expect(self._planned_batch(later, stride)[1])
        planned = self._planned_batch(index, stride)
        del self._planned[index]
        return self.reader.read(*planned)

    def _planned_batch(self, index: int, stride: int) -> tuple[Slots, list[Stretch]]:
        if index not in self._planned:
            block = range(index, min(index + PLANNED_TOGETHER * stride, len(self)), stride)
            for number, slots in zip(block, self.plan.slots(block), strict=True):
                self._planned[number] = slots, stretches_of(slots)
        return self._planned[index]


def training_batches(
    sources: Sources,
    tokenizer: CaptionTokenizer,
    *,
    splits: Sequence[str],
    cursor: Cursor,
    epochs: int = 1,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
    captions_per_image: int = 5,
    max_caption_length: int = 50,
    run_length: int = 4,
    num_workers: int = 0,
    on_bad_sample: str = "fail",
    max_bad_samples: int = 100,
    decode: Callable[[bytes], Tensor] | None = None,
    image_size: int = 0,
    cache_dir: str = "",
    cache_gb: float = 50.0,
    pin_memory: bool = False,
) -> Iterator[CaptionBatch]:
    """The rest of the cursor's epoch, then further ones up to `epochs` in all.

    Per optimizer step these are `accumulation_steps` micro-batches, on every rank alike. The global batches depend on
    neither rank, world_size, accumulation_steps nor num_workers; the last of an epoch may be short. The workers live,
    read ahead and remember what they encoded through all epochs.

    decode: picture file -> uint8 [3, S, S] with S = image_size, needed for image shards.

    Raises ValueError at once for settings and data that do not fit, and for missing or cut shards; while iterating
    BadSample (a ValueError) for damage, or, with on_bad_sample="quarantine", for more than max_bad_samples of it; and
    OSError for storage that fails for good.
    """
    _check_training(sources, cursor, on_bad_sample, global_batch, accumulation_steps)
    _check_decode(sources[0][0], decode, image_size)
    world = (rank, world_size, accumulation_steps)
    plan = plan_training(sources, splits, cursor, epochs, global_batch, *world, run_length)
    readers = [_open_reader(manifest, cache_dir, cache_gb, check=rank == 0) for manifest, _ in sources]
    options = CaptionOptions(tokenizer, captions_per_image, max_caption_length, cursor.seed)
    ring = _make_ring(plan, sources[0][0], image_size, num_workers)
    reader = BatchReader(readers, options, decode, image_size, on_bad_sample == "quarantine", ring)
    return _iterate(plan, reader, num_workers, max_bad_samples, pin_memory)


def steps_per_epoch(sources: Sources, splits: Sequence[str], global_batch: int) -> int:
    """Optimizer steps of one epoch; the last may be short. Raises ValueError for a split that is not there."""
    plan = plan_training(sources, splits, Cursor.start(sources, 0), 1, global_batch, 0, 1, 1, 1)
    return len(plan)


def evaluation_batches(
    manifest: Manifest,
    *,
    split: str,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    decode: Callable[[bytes], Tensor] | None = None,
    image_size: int = 0,
    cache_dir: str = "",
    cache_gb: float = 50.0,
) -> Iterator[CaptionBatch]:
    """This rank's images of the split, without captions (K = 0) and without padding rows.

    Over all ranks each image comes exactly once; a rank may get one image, or batch, more than another, or none.
    Raises as `training_batches` does.
    """
    _check_decode(manifest, decode, image_size)
    chosen = choose_shards(manifest, [split], run_length=1, main=True)
    begin, end = (chosen.layout.samples * r // world_size for r in (rank, rank + 1))
    reader = _open_reader(manifest, cache_dir, cache_gb, check=rank == 0)
    plan = EvaluationPlan(chosen, begin, end, batch_size)
    ring = _make_ring(plan, manifest, image_size, num_workers)
    batches = BatchReader([reader], None, decode, image_size, quarantine=False, ring=ring)
    return _iterate(plan, batches, num_workers, max_bad=0, pin_memory=False)


def read_references(
    manifest: Manifest, split: str, cache_dir: str = "", cache_gb: float = 50.0
) -> dict[str, list[str]]:
    """image_id -> its captions as they were given, in the shards' order. Raises ValueError for an unknown split."""
    reader = _open_reader(manifest, cache_dir, cache_gb, check=False)
    references: dict[str, list[str]] = {}
    for shard in choose_shards(manifest, [split], run_length=1, main=True).shards.tolist():
        rows = reader.rows(shard)
        references.update(zip(rows.image_ids, rows.captions.to_pylist(), strict=True))
    return references


def _make_ring(plan: TrainingPlan | EvaluationPlan, manifest: Manifest, image_size: int, num_workers: int) -> Ring:
    shape, dtype = row_of(manifest, image_size)
    return Ring(max(num_workers, 1), SLOTS, plan.rows * math.prod(shape) * dtype.itemsize, shared=num_workers > 0)


def _iterate(
    plan: TrainingPlan | EvaluationPlan, reader: BatchReader, num_workers: int, max_bad: int, pin_memory: bool
) -> Iterator[CaptionBatch]:
    remote = any(each.store.is_remote for each in reader.readers)
    batches = PlannedBatches(plan, reader, ahead=4 if remote else 1)
    # Item i goes to worker i % num_workers and comes back in order: DataLoader's own round robin.
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_settle_worker,
        multiprocessing_context="fork" if num_workers else None,  # workers inherit the ring
    )
    bad = retries = 0
    try:
        for batch in loader:
            for problem in batch.problems:
                logger.warning("quarantined: %s", problem)
            bad += batch.bad
            retries += batch.retries
            if bad > max_bad:
                last = batch.problems[-1]
                raise ValueError(f"{bad} bad samples, data.max_bad_samples allows {max_bad}; the last: {last}")
            yield batch
    except Exception as error:
        if num_workers:
            # Its frames hold the DataLoader's iterator, whose workers then end only after 5 s each; what went wrong
            # in a worker is in the message.
            error.__traceback__ = None
        raise
    if retries:
        logger.warning("%d reads failed and were repeated with success", retries)


def _settle_worker(_: int) -> None:
    """For a forked process: no threads in the tokenizers library, and what was inherited is not searched for garbage."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()


def _open_reader(manifest: Manifest, cache_dir: str, cache_gb: float, check: bool) -> SampleReader:
    store = make_store(manifest.root, cache_dir, cache_gb)
    if check and not store.is_remote and len(manifest.shards) <= CHECKED_AT_START:
        check_files(manifest)
    return SampleReader(manifest, store)


def _check_training(
    sources: Sources, cursor: Cursor, on_bad_sample: str, global_batch: int, accumulation_steps: int
) -> None:
    digest = sources_digest(sources)
    if cursor.manifest != digest:
        raise ValueError(f"the cursor belongs to data set {cursor.manifest}, these samples are of {digest}")
    if on_bad_sample not in ("fail", "quarantine"):
        raise ValueError(f"on_bad_sample is {on_bad_sample!r}; choose fail or quarantine")
    if global_batch < 1 or accumulation_steps < 1:
        raise ValueError(f"global_batch {global_batch} and accumulation_steps {accumulation_steps} must be at least 1")
    main = sources[0][0]
    for manifest, _ in sources[1:]:
        for name in ("kind", *SAME_IN_A_MIXTURE):
            ours, theirs = (each.kind if name == "kind" else each.fingerprint.get(name) for each in (main, manifest))
            if ours != theirs:
                raise ValueError(f"cannot mix data sets: {name} is {theirs} in {manifest.root}, {ours} in {main.root}")


def _check_decode(manifest: Manifest, decode: Callable | None, image_size: int) -> None:
    wanted = manifest.kind == "images"
    if wanted != (decode is not None) or wanted != (image_size > 0):
        raise ValueError(
            f"{manifest.root} holds {manifest.kind}; images, and only they, need `decode` and `image_size`"
        )
