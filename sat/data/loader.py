"""Plan -> CaptionBatch: the training batches of an epoch, the images of a split, their references.

The surprising decision: the loader keeps no state. A batch is a pure function of its number, so any DataLoader worker
can make any batch, and the cursor (which the trainer advances after its optimizer step) is all there is to save. Never
hand these loaders to `accelerator.prepare`: they are already shared among the ranks.
"""

import atexit
import gc
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sat import stopping
from sat.credentials import shown
from sat.data.batch import BatchReader, CaptionBatch, GridRow, InTransit, Stretch, stretches_of
from sat.data.buffers import Ring
from sat.data.captions import CaptionOptions
from sat.data.options import CacheOptions, LoaderOptions
from sat.data.plan import (
    Cursor,
    EvaluationPlan,
    Share,
    Slots,
    Sources,
    TrainingPlan,
    choose_shards,
    plan_training,
    sources_digest,
)
from sat.data.reader import SampleReader
from sat.shards.location import read_retrying
from sat.shards.manifest import Manifest, check_files
from sat.shards.schema import place_of_rows
from sat.shards.store import FolderStore, make_store
from sat.text import CaptionTokenizer

logger = logging.getLogger(__name__)

PLANNED_TOGETHER = 32
SLOTS, AHEAD = 4, 2
"""The least batches whose memory is kept per worker, and how many of them wait or are filled; the others are in use,
and what finds no place gets memory of its own."""
BURST = 8
"""Without workers so many batches are read in one go, if they fit BURST_BYTES. A step drives the reader's code and
tables out of the processor's caches, and to fetch them again takes as long as to read a small batch."""
BURST_BYTES = 8 << 20
CHECKED_AT_START = 20_000
"""Up to so many shards rank 0 compares all sizes before it starts; every size is compared when its shard is opened."""


@dataclass(frozen=True)
class Pictures:
    """How a picture file becomes what the encoder sees; for image shards."""

    decode: Callable[[bytes], Tensor]
    """Picture file -> uint8 [3, S, S]. Raises ValueError or OSError for what is no picture. Workers call it."""
    size: int
    """S."""


@dataclass(frozen=True)
class Reading:
    """How samples are read into batches."""

    options: LoaderOptions = LoaderOptions()
    pictures: Pictures | None = None
    """Needed for image shards, and only for them."""
    pin_memory: bool = False
    """Batches lie in locked memory, from which a GPU copies beside its work; needs one."""
    keep_references: bool = False
    """Training batches hold the captions as they were given, too."""


@dataclass
class PlannedBatches(Dataset[CaptionBatch | InTransit]):
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
        for later in range(index, min(index + self.ahead * stride + 1, len(self)), stride):
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
    reading: Reading,
    *,
    splits: Sequence[str],
    cursor: Cursor,
    epochs: int = 1,
    global_batch: int,
    share: Share = Share(),
) -> Generator[CaptionBatch, None, None]:
    """The rest of the cursor's epoch, then further ones up to `epochs` in all.

    Per optimizer step these are `share.accumulation_steps` micro-batches, on every rank alike. The global batches
    depend neither on the share nor on the number of workers; the last of an epoch may be short. The workers live, read
    ahead and remember what they encoded through all epochs; close the iterator to end them before its end.

    Raises ValueError at once for settings and data that do not fit, and for missing or cut shards; while iterating
    BadSample (a ValueError) for damage, or, with quarantine, for more than `max_bad_samples` of it in an epoch; and
    OSError for storage that fails for good.
    """
    options = reading.options
    _check_sources(sources, cursor)
    row = _row(sources[0][0], reading)
    plan = plan_training(sources, splits, cursor, epochs, global_batch, share, options.run_length, options.window)
    readers = [_open_reader(manifest, options, check=share.rank == 0) for manifest, _ in sources]
    if share.rank == 0:
        _warn_of_repeated_downloads(plan, readers, options)
    captions = CaptionOptions(
        tokenizer, options.captions_per_image, options.max_caption_length, cursor.seed, reading.keep_references
    )
    decode = reading.pictures.decode if reading.pictures else None
    ring = _make_ring(plan, row, reading, share.accumulation_steps)
    reader = BatchReader(readers, captions, row, decode, options.on_bad_sample == "quarantine", ring)
    return _iterate(plan, reader, reading)


def steps_per_epoch(sources: Sources, splits: Sequence[str], global_batch: int) -> int:
    """Optimizer steps of one epoch; the last may be short. Raises ValueError for a split that is not there."""
    return len(plan_training(sources, splits, Cursor.start(sources, 0), 1, global_batch, Share(), run_length=1))


def evaluation_batches(
    manifest: Manifest, split: str, reading: Reading = Reading(), *, batch_size: int = 64, share: Share = Share()
) -> Generator[CaptionBatch, None, None]:
    """This rank's images of the split, without captions (K = 0) and without padding rows.

    Over all ranks each image comes exactly once; a rank may get one image, or batch, more than another, or none.
    Raises as `training_batches` does, and for the first bad sample.
    """
    row = _row(manifest, reading)
    chosen = choose_shards(manifest, [split], run_length=1, main=True)
    begin, end = (chosen.layout.samples * r // share.world_size for r in (share.rank, share.rank + 1))
    reader = _open_reader(manifest, reading.options, check=share.rank == 0)
    plan = EvaluationPlan(chosen, begin, end, batch_size)
    decode = reading.pictures.decode if reading.pictures else None
    ring = _make_ring(plan, row, reading)
    return _iterate(plan, BatchReader([reader], None, row, decode, quarantine=False, ring=ring), reading)


def read_references(manifest: Manifest, split: str, cache: CacheOptions = CacheOptions()) -> dict[str, list[str]]:
    """image_id -> its captions as they were given, in the shards' order. Raises ValueError for an unknown split."""
    reader = _open_reader(manifest, cache, check=False)
    references: dict[str, list[str]] = {}
    for shard in choose_shards(manifest, [split], run_length=1, main=True).shards.tolist():
        rows = reader.rows(shard)
        references.update((rows.image_ids[sample], rows.texts(sample)) for sample in range(len(rows.keys)))
    return references


def read_number_ids(manifest: Manifest, split: str, cache: CacheOptions = CacheOptions()) -> set[str]:
    """The image ids of a split that are whole numbers in its annotations. Raises as `read_references`."""
    store, found = _open_reader(manifest, cache, check=False).store, set[str]()
    for shard in choose_shards(manifest, [split], run_length=1, main=True).shards.tolist():
        rows = read_retrying(manifest.root, place_of_rows(shard)[0], partial(store.rows, manifest, shard))
        found.update(rows.filter(rows["id_is_number"])["image_id"].to_pylist())
    return found


def _make_ring(plan: TrainingPlan | EvaluationPlan, row: GridRow, reading: Reading, of_a_step: int = 1) -> Ring:
    size, workers = plan.rows * row.nbytes, reading.options.num_workers
    in_use = 2 * of_a_step  # a step's batches are held until the next one's are there
    slots = AHEAD + -(-in_use // workers) if workers else _burst_of(size) + in_use - 1
    return Ring(max(workers, 1), max(SLOTS, slots), size, shared=workers > 0 or reading.pin_memory)


def _burst_of(size: int) -> int:
    """How many batches of `size` bytes are read in one go."""
    return max(1, min(BURST, BURST_BYTES // max(size, 1)))


def _in_bursts(batches: Iterator[CaptionBatch], together: int) -> Iterator[CaptionBatch]:
    """The same batches, `together` read in one go; an error that ends them comes in its place."""
    burst: deque[CaptionBatch] = deque()
    try:
        for batch in batches:
            burst.append(batch)
            if len(burst) == together:
                yield from _emptied(burst)
    except Exception:
        yield from _emptied(burst)
        raise
    yield from _emptied(burst)


def _emptied(burst: "deque[CaptionBatch]") -> Iterator[CaptionBatch]:
    """What it holds; it lets go of each, whose memory is used again."""
    while burst:
        yield burst.popleft()


def _iterate(
    plan: TrainingPlan | EvaluationPlan, reader: BatchReader, reading: Reading
) -> Generator[CaptionBatch, None, None]:
    workers, allowed = reading.options.num_workers, reading.options.max_bad_samples
    remote = any(each.store.is_remote for each in reader.readers)
    # Where a batch takes long, one that waits for a burst would wait for long.
    together = 1 if workers or remote or reader.decode else _burst_of(plan.rows * reader.row.nbytes)
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
    # Item i goes to worker i % workers and comes back in order: DataLoader's own round robin.
    loader: DataLoader[Any] = DataLoader(
        PlannedBatches(plan, reader, ahead=4 if remote else together),
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        worker_init_fn=partial(_settle_worker, parent),
        multiprocessing_context="fork" if workers else None,  # workers inherit the ring
    )
    with stopping.held():  # workers are born deaf to the wish to stop, which schedulers send to everybody
        batches: Iterator[CaptionBatch] = iter(loader)
    end = partial(_end_workers, batches, os.getpid())
    atexit.register(end)  # of who has not closed this: multiprocessing asks by a signal that they ignore, and waits
    epoch = bad = retries = 0
    try:
        if reading.pin_memory:
            reader.ring.lock()
        for batch in _in_bursts(batches, together):
            for problem in batch.problems:
                logger.warning("quarantined: %s", problem)
            epoch, bad = batch.epoch, batch.bad + (bad if batch.epoch == epoch else 0)
            retries += batch.retries
            if bad > allowed:
                last = batch.problems[-1]
                raise ValueError(f"{bad} bad samples, data.max_bad_samples allows {allowed}; the last: {last}")
            yield batch
    finally:
        # Its own __del__ comes too late where an error's frames hold it: then workers end only after 5 s each.
        end()
        atexit.unregister(end)
    if retries:
        logger.warning("%d reads failed and were repeated with success", retries)


def _end_workers(batches: Iterator[CaptionBatch], process: int) -> None:
    """Those that `process` has; one that was forked from it has none."""
    if isinstance(batches, _MultiProcessingDataLoaderIter) and os.getpid() == process:
        batches._shutdown_workers()
        for worker in batches._workers:  # torch gives up on those that read for longer than 5 s
            worker.kill()


def _settle_worker(parent: int, _: int) -> None:
    """For a forked process: it serves its parent, no threads in the tokenizers library, no search for garbage in what
    was inherited.
    """
    stopping.serve(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()


def _open_reader(manifest: Manifest, cache: CacheOptions, check: bool) -> SampleReader:
    store = make_store(manifest.root, cache.cache_dir, cache.cache_gb)
    if check and not store.is_remote and len(manifest.shards) <= CHECKED_AT_START:
        check_files(manifest)
    return SampleReader(manifest, store)


def _warn_of_repeated_downloads(plan: TrainingPlan, readers: Sequence[SampleReader], options: LoaderOptions) -> None:
    """Say where an epoch would fetch shards many times, and the setting that avoids it."""
    for chosen, reader in zip(plan.chosen, readers, strict=True):
        store, shards = reader.store, reader.manifest.shards
        if isinstance(store, FolderStore):
            continue
        first = shards[int(chosen.shards[0])]
        size = first.bytes * chosen.layout.samples / max(first.samples, 1)
        fitting = int(store.limit * len(chosen.shards) / size)
        if fitting >= min(options.window_shards or len(chosen.shards), len(chosen.shards)) or store.serves_ranges():
            continue
        logger.warning(
            "%s: about %.1f GB do not fit in a cache of %g GB and the server gives no byte ranges, so shards are "
            "fetched again and again; raise data.cache_gb, or set data.window_shards=%d (another order of samples)",
            *(shown(store.root), size / 1e9, options.cache_gb, fitting),
        )


def _row(manifest: Manifest, reading: Reading) -> GridRow:
    """What a sample of this data set becomes. ValueError where it holds pictures and nothing decodes them."""
    spec = manifest.spec
    if (spec is None) != (reading.pictures is not None):
        raise ValueError(f"{manifest.root} holds {manifest.kind}; images, and only they, need a way to decode pictures")
    if reading.pictures is not None:
        return GridRow.of_pictures(reading.pictures.size)
    assert spec is not None
    return GridRow.of_features(spec)


def _check_sources(sources: Sources, cursor: Cursor) -> None:
    digest = sources_digest(sources)
    if cursor.manifest != digest:
        raise ValueError(f"the cursor belongs to data set {cursor.manifest}, these samples are of {digest}")
    main = sources[0][0]
    for manifest, _ in sources[1:]:
        if manifest.kind != main.kind:
            raise ValueError(f"{manifest.root} holds {manifest.kind}, {main.root} {main.kind}; they cannot be mixed")
        if main.spec is not None:
            main.spec.refuse(manifest.spec, f"{manifest.root}, to be mixed with {main.root}")
