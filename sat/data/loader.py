"""Plan -> CaptionBatch: the training batches of an epoch, the images of a split, their references.

The surprising decision: the loader keeps no state. A batch is a pure function of its number, so any DataLoader worker can
make any batch, and the cursor (which the trainer advances after its optimizer step) is all there is to save. Never hand
these loaders to `accelerator.prepare`: they are already shared among the ranks.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sat.data.batch import BatchReader, CaptionBatch, CaptionOptions, Slots
from sat.data.cache import make_store
from sat.data.manifest import Manifest, check_files
from sat.data.order import EpochOrder, Layout, epoch_order, make_layout, micro_batch_rows
from sat.data.reader import SampleReader
from sat.text import CaptionTokenizer

logger = logging.getLogger(__name__)

Sources = Sequence[tuple[Manifest, float]]
"""The main data set first, each sample once per epoch; then others with the samples drawn per sample of the main one."""
CURSOR_VERSION = 1
SAME_IN_A_MIXTURE = ("grid", "dim", "dtype", "encoder", "transform")


@dataclass(frozen=True)
class Cursor:
    """Where training stands in its samples; continued with any number of ranks, workers or micro-batches."""

    version: int
    manifest: str
    """Digest of what is read: the manifest's, or a digest over those of a mixture and their weights."""
    seed: int
    epoch: int
    samples_done: int
    """Samples of this epoch that optimizer steps have used; between 0 and the epoch's number of samples."""

    @classmethod
    def start(cls, sources: Sources, seed: int) -> "Cursor":
        """Before the first sample of the first epoch."""
        return cls(CURSOR_VERSION, sources_digest(sources), seed, 0, 0)

    def advanced(self, batch: CaptionBatch) -> "Cursor":
        """After the optimizer step that used `batch`."""
        return replace(self, samples_done=batch.samples_done)

    def next_epoch(self) -> "Cursor":
        return replace(self, epoch=self.epoch + 1, samples_done=0)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Cursor":
        """Raises ValueError for a cursor of another version of this program."""
        if values.get("version") != CURSOR_VERSION:
            raise ValueError(f"cursor of version {values.get('version')}; this program reads version {CURSOR_VERSION}")
        return cls(**values)


def sources_digest(sources: Sources) -> str:
    """The digest that names these data sets, their order and weights; a lone manifest's own digest."""
    if len(sources) == 1:
        return sources[0][0].digest
    named = [[manifest.digest, float(weight)] for manifest, weight in sources]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


@dataclass(frozen=True)
class Chosen:
    """The shards of some splits of one source, as the order numbers them."""

    shards: np.ndarray  # int64, indices into the manifest
    layout: Layout


@dataclass(frozen=True)
class TrainingPlan:
    """Micro-batches of one rank, from the cursor to the end of the epoch; `slots` is a pure function of the index."""

    order: EpochOrder
    chosen: Sequence[Chosen]
    start: int
    global_batch: int
    rank: int
    world_size: int
    accumulation_steps: int

    def __len__(self) -> int:
        return -(-(self.order.samples - self.start) // self.global_batch) * self.accumulation_steps

    def slots(self, index: int) -> Slots:
        batch, micro = divmod(index, self.accumulation_steps)
        begin = self.start + batch * self.global_batch
        end = min(begin + self.global_batch, self.order.samples)
        places = micro_batch_rows(end - begin, self.rank, self.world_size, self.accumulation_steps, micro)
        filled = np.flatnonzero(places >= 0)
        source, shard, sample = self.order.locate(begin + places[filled])
        for i, chosen in enumerate(self.chosen):
            shard[source == i] = chosen.shards[shard[source == i]]
        step = -(-self.start // self.global_batch) + batch
        return Slots(places.size, filled, source, shard, sample, step, end)


@dataclass(frozen=True)
class EvaluationPlan:
    """One rank's share of a split, in the shards' order; contiguous, so that every rank reads sequentially."""

    chosen: Chosen
    begin: int
    end: int
    batch_size: int

    def __len__(self) -> int:
        return -(-(self.end - self.begin) // self.batch_size)

    def slots(self, index: int) -> Slots:
        begin = self.begin + index * self.batch_size
        end = min(begin + self.batch_size, self.end)
        place = np.arange(begin, end)
        shard = np.searchsorted(self.chosen.layout.ends, place, side="right")
        sample = place - np.where(shard > 0, self.chosen.layout.ends[shard - 1], 0)
        rows = np.arange(place.size)
        return Slots(rows.size, rows, np.zeros_like(rows), self.chosen.shards[shard], sample, index, end - self.begin)


@dataclass
class PlannedBatches:
    """A plan and its reader as a map-style data set: item i is batch i. Asks for batches ahead of their use."""

    plan: TrainingPlan | EvaluationPlan
    reader: BatchReader
    ahead: int
    _asked: int = field(default=-1, init=False)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> CaptionBatch:
        info = torch.utils.data.get_worker_info()
        stride = info.num_workers if info else 1
        for later in range(index + stride, min(index + self.ahead * stride + 1, len(self)), stride):
            if later > self._asked:
                self._asked = later
                self.reader.expect(self.plan.slots(later))
        return self.reader.read(self.plan.slots(index))


def training_batches(
    sources: Sources,
    tokenizer: CaptionTokenizer,
    *,
    splits: Sequence[str],
    cursor: Cursor,
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
    """The rest of the cursor's epoch: per optimizer step `accumulation_steps` micro-batches, on every rank alike.

    The global batches depend on neither rank, world_size, accumulation_steps nor num_workers; the last may be short.
    decode: picture file -> uint8 [3, S, S] with S = image_size, needed for image shards.

    Raises ValueError at once for settings and data that do not fit, and for missing or cut shards; while iterating
    BadSample (a ValueError) for damage, or, with on_bad_sample="quarantine", for more than max_bad_samples of it; and
    OSError for storage that fails for good.
    """
    _check_training(sources, cursor, on_bad_sample, global_batch, accumulation_steps)
    _check_decode(sources[0][0], decode, image_size)
    plan = plan_training(sources, splits, cursor, global_batch, rank, world_size, accumulation_steps, run_length)
    readers = [_open_reader(manifest, cache_dir, cache_gb, check=rank == 0) for manifest, _ in sources]
    options = CaptionOptions(tokenizer, captions_per_image, max_caption_length, cursor.seed)
    reader = BatchReader(readers, cursor.epoch, options, decode, image_size, on_bad_sample == "quarantine")
    return _iterate(plan, reader, num_workers, max_bad_samples, pin_memory)


def plan_training(
    sources: Sources,
    splits: Sequence[str],
    cursor: Cursor,
    global_batch: int,
    rank: int,
    world_size: int,
    accumulation_steps: int,
    run_length: int,
) -> TrainingPlan:
    """What each of the rank's remaining micro-batches of the epoch consists of; reads no shard."""
    chosen = [choose_shards(manifest, splits, run_length, main=i == 0) for i, (manifest, _) in enumerate(sources)]
    digests, weights = zip(*((manifest.digest, weight) for manifest, weight in sources))
    order = epoch_order([each.layout for each in chosen], digests, weights, cursor.seed, cursor.epoch)
    if not 0 <= cursor.samples_done <= order.samples:
        raise ValueError(f"the cursor stands at sample {cursor.samples_done} of an epoch of {order.samples}")
    return TrainingPlan(order, chosen, cursor.samples_done, global_batch, rank, world_size, accumulation_steps)


def steps_per_epoch(sources: Sources, splits: Sequence[str], global_batch: int) -> int:
    """Optimizer steps of one epoch; the last may be short. Raises ValueError for a split that is not there."""
    plan = plan_training(sources, splits, Cursor.start(sources, 0), global_batch, 0, 1, 1, 1)
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
    batches = BatchReader([reader], 0, None, decode, image_size, quarantine=False)
    return _iterate(EvaluationPlan(chosen, begin, end, batch_size), batches, num_workers, 0, False)


def read_references(manifest: Manifest, split: str) -> dict[str, list[str]]:
    """image_id -> its captions as they were given, in the shards' order. Raises ValueError for an unknown split."""
    references: dict[str, list[str]] = {}
    for shard in choose_shards(manifest, [split], run_length=1, main=True).shards.tolist():
        rows = manifest.rows(shard)
        references.update(zip(rows["image_id"].to_pylist(), rows["captions"].to_pylist()))
    return references


def choose_shards(manifest: Manifest, splits: Sequence[str], run_length: int, main: bool) -> Chosen:
    """The shards of these splits. The main source must have every split, a further one at least one of them."""
    ranges = [manifest.shards.of_split(split) for split in sorted(set(splits))]
    if not any(ranges) or (main and not all(ranges)):
        raise ValueError(f"{manifest.root}: no samples of split {list(splits)}; it has {manifest.splits}")
    shards = np.concatenate([np.asarray(each, dtype=np.int64) for each in ranges])
    return Chosen(shards, make_layout(manifest.shards.samples[shards], run_length))


def _iterate(
    plan: TrainingPlan | EvaluationPlan, reader: BatchReader, num_workers: int, max_bad: int, pin_memory: bool
) -> Iterator[CaptionBatch]:
    remote = any(each.store.is_remote for each in reader.readers)
    batches = PlannedBatches(plan, reader, ahead=4 if remote else 1)
    # Item i goes to worker i % num_workers and comes back in order: DataLoader's own round robin.
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, shuffle=False, num_workers=num_workers, pin_memory=pin_memory, worker_init_fn=_quiet_worker
    )
    bad = retries = 0
    for batch in loader:
        for problem in batch.problems:
            logger.warning("quarantined: %s", problem)
        bad += batch.bad
        retries += batch.retries
        if bad > max_bad:
            raise ValueError(f"{bad} bad samples, data.max_bad_samples allows {max_bad}; the last: {batch.problems[-1]}")
        yield batch
    if retries:
        logger.warning("%d reads failed and were repeated with success", retries)


def _quiet_worker(_: int) -> None:
    """The tokenizers library warns of its own threads in every forked process; a worker encodes without them."""
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _open_reader(manifest: Manifest, cache_dir: str, cache_gb: float, check: bool) -> SampleReader:
    store = make_store(manifest.root, cache_dir, cache_gb)
    if check and not store.is_remote:
        check_files(manifest)
    return SampleReader(manifest, store)


def _check_training(
    sources: Sources, cursor: Cursor, on_bad_sample: str, global_batch: int, accumulation_steps: int
) -> None:
    if cursor.manifest != sources_digest(sources):
        raise ValueError(f"the cursor belongs to data set {cursor.manifest}, these samples are of {sources_digest(sources)}")
    if on_bad_sample not in ("fail", "quarantine"):
        raise ValueError(f"on_bad_sample is {on_bad_sample!r}; choose fail or quarantine")
    if global_batch < 1 or accumulation_steps < 1:
        raise ValueError(f"global_batch {global_batch} and accumulation_steps {accumulation_steps} must be at least 1")
    main = sources[0][0]
    for manifest, _ in sources[1:]:
        if manifest.kind != main.kind:
            raise ValueError(f"{manifest.root} holds {manifest.kind}, {main.root} holds {main.kind}: they cannot be mixed")
        for name in SAME_IN_A_MIXTURE if main.kind == "features" else ():
            ours, theirs = main.fingerprint.get(name), manifest.fingerprint.get(name)
            if ours != theirs:
                raise ValueError(f"features cannot be mixed: {name} is {theirs} in {manifest.root}, {ours} in {main.root}")


def _check_decode(manifest: Manifest, decode: Callable | None, image_size: int) -> None:
    wanted = manifest.kind == "images"
    if wanted != (decode is not None) or wanted != (image_size > 0):
        raise ValueError(f"{manifest.root} holds {manifest.kind}: `decode` and `image_size` are for images, and needed for them")
