"""Which samples every micro-batch of a rank consists of, and the cursor that says where training stands.

The surprising decision: a plan holds no list of samples. It is the order, the cursor and a few counts, so a process
plans an epoch of 1e9 samples as it plans one of a hundred, and any micro-batch can be asked for by its number.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from sat.data.order import EpochOrder, Ints, Layout, epoch_order, make_layout, micro_batch_rows
from sat.shards.manifest import Manifest

Sources = Sequence[tuple[Manifest, float]]
"""The main data set first, each sample once per epoch; then others, with the samples drawn per sample of the first."""
CURSOR_VERSION = 1


@dataclass(frozen=True)
class Share:
    """Which part of every global batch a process reads. ValueError for a rank that there is not."""

    rank: int = 0
    world_size: int = 1
    accumulation_steps: int = 1
    """Micro-batches per optimizer step and rank."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or self.accumulation_steps < 1:
            raise ValueError(f"{self}: the rank must be in [0, world_size), accumulation_steps at least 1")


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

    def advanced(self, samples_done: int) -> "Cursor":
        """After the optimizer step that used the samples before `samples_done` (which its batches say)."""
        return replace(self, samples_done=samples_done)

    def next_epoch(self) -> "Cursor":
        return replace(self, epoch=self.epoch + 1, samples_done=0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Cursor":
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

    shards: Ints  # int64, indices into the manifest
    layout: Layout


@dataclass(frozen=True)
class Slots:
    """What one micro-batch consists of: `rows` of them, of which `filled` get the samples of the three arrays."""

    rows: int
    filled: Ints  # int64 [n], rows of the batch
    source: Ints  # int64 [n]
    shard: Ints  # int64 [n], index into the source's manifest
    sample: Ints  # int64 [n], within the shard
    epoch: int
    step: int
    samples_done: int


class Frame(NamedTuple):
    """Where a micro-batch stands: its global batch holds samples [begin, end) of the epoch, it those at `places`."""

    epoch: int
    step: int
    begin: int
    end: int
    places: Ints  # int64 [rows], within the global batch; -1 is a padding row


@dataclass(frozen=True)
class TrainingPlan:
    """Micro-batches of one rank, from the cursor to the end of its epoch and through further epochs.

    `slots` is a pure function of the indices. An epoch never shares a batch with the next.
    """

    order: EpochOrder
    """Of the cursor's epoch."""
    chosen: Sequence[Chosen]
    start: int
    """Samples of the cursor's epoch that are used already."""
    epochs: int
    global_batch: int
    share: Share

    def __len__(self) -> int:
        return self._micro_batches(self.start) + (self.epochs - 1) * self._micro_batches(0)

    @property
    def rows(self) -> int:
        """Rows of the largest micro-batch."""
        return -(-min(self.global_batch, self.order.samples) // (self.share.world_size * self.share.accumulation_steps))

    def slots(self, indices: Sequence[int]) -> list[Slots]:
        """What these micro-batches consist of; ascending, and asked for together because each call costs 0.1 ms."""
        frames = [self._frame(index) for index in indices]
        planned = []
        for epoch, grouped in itertools.groupby(frames, key=lambda frame: frame.epoch):
            group = list(grouped)
            filled = [np.flatnonzero(frame.places >= 0) for frame in group]
            positions = np.concatenate([frame.begin + frame.places[f] for frame, f in zip(group, filled, strict=True)])
            source, shard, sample = replace(self.order, epoch=epoch).locate(positions)
            for i, chosen in enumerate(self.chosen):
                shard[source == i] = chosen.shards[shard[source == i]]
            cuts = np.cumsum([f.size for f in filled])[:-1]
            parts = zip(*(np.split(column, cuts) for column in (source, shard, sample)), strict=True)
            for frame, f, (sources, shards, samples) in zip(group, filled, parts, strict=True):
                rows = frame.places.size
                planned.append(Slots(rows, f, sources, shards, samples, epoch, frame.step, frame.end))
        return planned

    def _frame(self, index: int) -> "Frame":
        epoch, start, first = self.order.epoch, self.start, self._micro_batches(self.start)
        if index >= first:
            later, index = divmod(index - first, self._micro_batches(0))
            epoch, start = epoch + 1 + later, 0
        batch, micro = divmod(index, self.share.accumulation_steps)
        begin = start + batch * self.global_batch
        end = min(begin + self.global_batch, self.order.samples)
        share = self.share
        places = micro_batch_rows(end - begin, share.rank, share.world_size, share.accumulation_steps, micro)
        return Frame(epoch, -(-start // self.global_batch) + batch, begin, end, places)

    def _micro_batches(self, start: int) -> int:
        return -(-(self.order.samples - start) // self.global_batch) * self.share.accumulation_steps


@dataclass(frozen=True)
class EvaluationPlan:
    """One rank's share of a split, in the shards' order; contiguous, so that every rank reads sequentially."""

    chosen: Chosen
    begin: int
    end: int
    batch_size: int

    def __len__(self) -> int:
        return -(-(self.end - self.begin) // self.batch_size)

    @property
    def rows(self) -> int:
        """Rows of the largest batch."""
        return min(self.batch_size, self.end - self.begin)

    def slots(self, indices: Sequence[int]) -> list[Slots]:
        """What these batches consist of."""
        return [self._slots(self.begin + index * self.batch_size, index) for index in indices]

    def _slots(self, begin: int, index: int) -> Slots:
        place = np.arange(begin, min(begin + self.batch_size, self.end))
        shard = np.searchsorted(self.chosen.layout.ends, place, side="right")
        sample = place - np.where(shard > 0, self.chosen.layout.ends[shard - 1], 0)
        rows, source = np.arange(place.size), np.zeros_like(place)
        return Slots(rows.size, rows, source, self.chosen.shards[shard], sample, epoch=0, step=index, samples_done=0)


def plan_training(
    sources: Sources,
    splits: Sequence[str],
    cursor: Cursor,
    epochs: int,
    global_batch: int,
    share: Share,
    run_length: int,
    window: int = 0,
) -> TrainingPlan:
    """What each micro-batch of this share consists of, from the cursor to the end of `epochs`; reads no shard.

    The cursor's epoch counts as one of them; `window` as in `Layout`. ValueError where there is
    nothing to plan or the cursor does not fit.
    """
    if global_batch < 1 or epochs < 1:
        raise ValueError(f"global_batch {global_batch} and epochs {epochs} must be at least 1")
    chosen = [
        choose_shards(manifest, splits, run_length, main=i == 0, window=window)
        for i, (manifest, _) in enumerate(sources)
    ]
    digests, weights = zip(*((manifest.digest, weight) for manifest, weight in sources), strict=True)
    order = epoch_order([each.layout for each in chosen], digests, weights, cursor.seed, cursor.epoch)
    if not 0 <= cursor.samples_done <= order.samples:
        raise ValueError(f"the cursor stands at sample {cursor.samples_done} of an epoch of {order.samples}")
    return TrainingPlan(order, chosen, cursor.samples_done, epochs, global_batch, share)


def choose_shards(manifest: Manifest, splits: Sequence[str], run_length: int, main: bool, window: int = 0) -> Chosen:
    """The shards of these splits. The main source must have every split, a further one at least one of them."""
    ranges = [manifest.shards.of_split(split) for split in sorted(set(splits))]
    if not any(ranges) or (main and not all(ranges)):
        raise ValueError(f"{manifest.root}: no samples of split {list(splits)}; it has {manifest.splits}")
    shards = np.concatenate([np.arange(each.start, each.stop, dtype=np.int64) for each in ranges])
    return Chosen(shards, make_layout(manifest.shards.samples[shards], run_length, window))
