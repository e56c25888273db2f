"""Rows of the plan -> one CaptionBatch: grids, and captions as token ids.

The surprising decision: a grid is copied once, from the page cache into the batch. The batch lies in memory that the
processes share and use again (`buffers`), and what a worker hands over is the number of its slot.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sat.data.buffers import Ring, attach
from sat.data.captions import CaptionOptions, captions_of, references_of
from sat.data.plan import Slots
from sat.data.reader import BadSample, SampleReader
from sat.data.rows import Rows
from sat.shards.features import FeatureSpec


@dataclass(frozen=True)
class CaptionBatch:
    """B images and their captions. A padding or quarantined row has a zero grid, lengths 0 and weighs nothing."""

    grid: Tensor
    """[B, L, D] in the stored dtype (bfloat16, float16, float32, int8); from image shards uint8 [B, 3, S, S]. Of region
    features L is that of the image that has most, and the others end in zeros."""
    captions: Tensor
    """int64 [B, K, T], T >= 2: <start> w1 .. wn <end> <pad> ...; all <pad> where there is no caption."""
    lengths: Tensor
    """int64 [B, K]: n + 1 predicted tokens (the words and <end>); 0 where there is no caption."""
    keys: Tensor
    """int64 [B, K]: what the random numbers of each caption are drawn by, whichever rank meets it (see `captions`);
    anything where there is no caption."""
    image_ids: list[str]
    """Empty strings in padding rows."""
    sample_keys: list[str]
    """Of the samples in their shards; empty strings in padding rows."""
    epoch: int
    step: int
    """Number of the global batch within the epoch."""
    samples_done: int
    """Samples of the epoch that are used up once this global batch is: the cursor's next value."""
    problems: list[str]
    """What was wrong with each quarantined sample."""
    retries: int
    """I/O errors that another attempt overcame while this batch was read."""
    regions: Tensor | None = None
    """int64 [B]: regions of each image, 0 in padding rows; None where every image has the same grid."""
    boxes: Tensor | None = None
    """float32 [B, L, 4]: x0 y0 x1 y1 of the regions in 0..1, zeros behind them; None where there are none. Stays on the
    CPU."""
    references: list[list[str]] | None = None
    """All captions of each image as they were given, [] in padding rows; None where they are not asked for."""

    @property
    def bad(self) -> int:
        """Quarantined rows."""
        return len(self.problems)

    @property
    def tokens(self) -> Tensor:
        """Predicted tokens, an int64 scalar."""
        return self.lengths.sum()

    @property
    def caption_count(self) -> Tensor:
        """Captions, an int64 scalar."""
        return (self.lengths > 0).sum()

    def boxes_of(self, row: int) -> npt.NDArray[np.float32] | None:
        """float32 [L_i, 4]: the boxes of the regions of one image; None where there are none."""
        if self.boxes is None or self.regions is None:
            return None
        return self.boxes[row, : int(self.regions[row])].numpy()

    def to(self, device: torch.device | str) -> "CaptionBatch":
        """What the model computes with on `device`; the others stay on the host, where a step is planned.

        Nobody waits for the copy, and a GPU copies beside what it still computes of the last step.
        """
        if torch.device(device).type == "cuda":
            return self._beside(_copying(torch.device(device)))
        return self._inputs(lambda tensor: tensor.to(device))

    def _beside(self, copying: "_Copying") -> "CaptionBatch":
        """Copied by a stream of its own, for which the computing one waits."""
        here, computing = self._inputs(_locked), torch.cuda.current_stream(copying.stream.device)
        with torch.cuda.stream(copying.stream):
            there = here._inputs(lambda tensor: tensor.to(copying.stream.device, non_blocking=True))
        copying.keep(here.grid)
        computing.wait_stream(copying.stream)
        there = there._inputs(lambda tensor: _keep_for(computing, tensor))
        return replace(there, grid=there.grid[:, : self.grid.shape[1]])

    def _inputs(self, function: Callable[[Tensor], Tensor]) -> "CaptionBatch":
        """With what `function` makes of the inputs, which are the grid and the regions."""
        return replace(self, grid=function(self.grid), regions=None if self.regions is None else function(self.regions))


class _Copying:
    """The copies to a GPU. What is copied stays, as its memory is the loader's and would be filled again."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._done, self._kept = torch.cuda.Event(), torch.empty(0)

    def keep(self, tensor: Tensor) -> None:
        """What is being copied now; of the one before, which is long done, the host makes sure."""
        self._done.synchronize()
        self._kept = tensor
        self._done.record(self.stream)


@functools.cache
def _copying(device: torch.device) -> _Copying:
    return _Copying(device)


def _locked(tensor: Tensor) -> Tensor:
    """Itself in its whole rows, or a copy in locked memory."""
    tensor = _whole(tensor)
    if tensor.is_contiguous() and tensor.is_pinned():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def _whole(tensor: Tensor) -> Tensor:
    """What [:, :n] was taken of, as only what lies together is copied at once; others as they are."""
    if tensor.dim() < 2 or tensor.is_contiguous() or not tensor[0].is_contiguous():
        return tensor
    (apart, size, *_), begin = tensor.stride(), tensor.storage_offset()
    behind = (begin + len(tensor) * apart) * tensor.itemsize > tensor.untyped_storage().nbytes()
    if not (apart and size) or apart % size or begin % apart or behind:
        return tensor
    return tensor.as_strided((len(tensor), apart // size, *tensor.shape[2:]), tensor.stride())


def _keep_for(stream: torch.cuda.Stream, tensor: Tensor) -> Tensor:
    """Its memory is not used again before `stream` is done with it."""
    tensor.record_stream(stream)
    return tensor


@dataclass(frozen=True)
class InTransit:
    """What a worker returns: it pickles as the batch, without its grid's bytes."""

    batch: CaptionBatch
    ring: int
    slot: int
    shape: tuple[int, ...]
    """Of what lies in the slot; the grid is its beginning along the locations."""

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {field.name: getattr(self.batch, field.name) for field in fields(self.batch)}
        grid = rest.pop("grid")
        # Small tensors as plain arrays: torch would open a file in shared memory for each.
        arrays = {name: rest.pop(name).numpy() for name in SMALL if rest[name] is not None}
        arrays |= {name: _narrow(arrays[name]) for name in WORDS}
        return _arrive, (rest, arrays, self.ring, self.slot, self.shape, grid.shape[1], grid.dtype)


SMALL = ("captions", "lengths", "keys", "regions", "boxes")
"""Tensors of a batch beside its grid."""
WORDS = ("captions", "lengths")
"""Of them whole numbers from 0 on. A quarter as large they fit a pipe, and nobody waits until it is emptied."""


def _arrive(
    rest: dict[str, Any],
    arrays: dict[str, npt.NDArray[Any]],
    ring: int,
    slot: int,
    shape: tuple[int, ...],
    locations: int,
    dtype: torch.dtype,
) -> CaptionBatch:
    arrays |= {name: arrays[name].astype(np.int64) for name in WORDS}
    rest |= {name: torch.from_numpy(array) for name, array in arrays.items()}
    return CaptionBatch(grid=attach(ring, slot, shape, dtype)[:, :locations], **rest)


def _narrow(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """In the smallest type that holds them."""
    return numbers.astype(np.min_scalar_type(numbers.max(initial=0)))


class Stretch(NamedTuple):
    """Consecutive samples of one shard, and the rows of the batch that they fill."""

    source: int
    shard: int
    first: int
    rows: list[int]


def stretches_of(slots: Slots) -> list[Stretch]:
    """The samples of the slots in the order of the shards, as few stretches as there are."""
    order = np.lexsort((slots.sample, slots.shard, slots.source))
    columns = (slots.source, slots.shard, slots.sample, slots.filled)
    found: list[Stretch] = []
    expected = None
    for source, shard, sample, row in zip(*(column[order].tolist() for column in columns), strict=True):
        if (source, shard, sample) == expected:
            found[-1].rows.append(row)
        else:
            found.append(Stretch(source, shard, sample, [row]))
        expected = (source, shard, sample + 1)
    return found


@dataclass(frozen=True)
class GridRow:
    """One row of a batch's grid: an image's features, or its pixels."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    regions: bool = False
    """The shape is that of the image that has most."""
    boxes: bool = False
    """Each region has its box."""

    @classmethod
    def of_features(cls, spec: FeatureSpec) -> "GridRow":
        """[L, D], as they are stored."""
        return cls(spec.shape, getattr(torch, spec.torch), spec.kind == "regions", spec.boxes)

    @classmethod
    def of_pictures(cls, size: int) -> "GridRow":
        """uint8 [3, S, S]."""
        return cls((3, size, size), torch.uint8)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Target:
    """What a batch's samples are read into."""

    grid: Tensor
    raw: memoryview
    """The grid's bytes."""
    size: int
    """Bytes of a row."""
    regions: npt.NDArray[np.int64]
    """[B], zeros but where images have regions."""
    boxes: npt.NDArray[np.float32] | None
    """[B, L, 4]"""
    has_regions: bool

    @classmethod
    def of(cls, grid: Tensor, row: GridRow) -> "_Target":
        raw, rows = grid.view(torch.uint8).numpy().reshape(-1).data, len(grid)
        boxes = np.zeros((rows, row.shape[0], 4), np.float32) if row.boxes else None
        return cls(grid, raw, len(raw) // max(rows, 1), np.zeros(rows, np.int64), boxes, row.regions)

    def row(self, row: int) -> memoryview:
        return self.raw[row * self.size : (row + 1) * self.size]

    def clear(self, rows: list[int]) -> None:
        """Zeros for rows without a sample."""
        self.grid[rows], self.regions[rows] = 0, 0
        if self.boxes is not None:
            self.boxes[rows] = 0

    def finished(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Grid, regions and boxes of the batch, no longer than the image with most regions."""
        if not self.has_regions:
            return self.grid, None, None
        longest = max(1, int(self.regions.max(initial=0)))
        boxes = None if self.boxes is None else torch.from_numpy(np.ascontiguousarray(self.boxes[:, :longest]))
        return self.grid[:, :longest], torch.from_numpy(self.regions), boxes


@dataclass(frozen=True)
class BatchReader:
    """Reads the slots of a plan; one per process."""

    readers: Sequence[SampleReader]
    captions: CaptionOptions | None
    """None: captions are left out (evaluation)."""
    row: GridRow
    """What each sample becomes."""
    decode: Callable[[bytes], Tensor] | None
    """Picture file -> a row; for image shards. Raises ValueError or OSError for what is no picture."""
    quarantine: bool
    ring: Ring
    """Memory for the grids."""

    def read(self, slots: Slots, stretches: Sequence[Stretch]) -> CaptionBatch | InTransit:
        """The batch of these slots; in a worker, ready to be sent.

        Raises BadSample, unless bad samples are quarantined, and OSError.
        """
        retries = sum(reader.retries for reader in self.readers)
        whole, slot = self._allocate(slots.rows)
        target = _Target.of(whole, self.row)
        found, problems = self._fill(target, stretches)
        grid, regions, boxes = target.finished()
        captions, lengths, keys = captions_of(found, self.captions, slots.epoch)
        batch = CaptionBatch(
            grid=grid,
            captions=captions,
            lengths=lengths,
            keys=keys,
            image_ids=[rows.image_ids[sample] if rows else "" for rows, sample in found],
            sample_keys=[rows.keys[sample] if rows else "" for rows, sample in found],
            epoch=slots.epoch,
            step=slots.step,
            samples_done=slots.samples_done,
            problems=problems,
            retries=sum(reader.retries for reader in self.readers) - retries,
            regions=regions,
            boxes=boxes,
            references=references_of(found, self.captions),
        )
        if slot is None or torch.utils.data.get_worker_info() is None:
            return batch
        return InTransit(batch, self.ring.number, slot, tuple(whole.shape))

    def expect(self, stretches: Sequence[Stretch]) -> None:
        """Say that these samples are needed soon."""
        for stretch in stretches:
            last = stretch.first + len(stretch.rows) - 1
            self.readers[stretch.source].expect(stretch.shard, stretch.first, last)

    def _allocate(self, rows: int) -> tuple[Tensor, int | None]:
        """An uninitialised grid, in a slot of the ring where one is free."""
        shape, dtype = (rows, *self.row.shape), self.row.dtype
        worker = torch.utils.data.get_worker_info()
        slot = self.ring.take(worker.id if worker else 0, rows * self.row.nbytes)
        if slot is None:
            return torch.empty(shape, dtype=dtype), None
        # A slot that is sent is released by the process that receives it.
        return self.ring.tensor(slot, shape, dtype, release=worker is None), slot

    def _fill(self, target: "_Target", stretches: Sequence[Stretch]) -> tuple[list[tuple[Rows | None, int]], list[str]]:
        """Read every sample into its row of the target; zeros where there is none.

        Returns the manifest's rows and the sample's place in them for each row, and what was wrong with those left out.
        """
        of_features = self._store_regions if self.row.regions else self._store_features
        store = of_features if self.decode is None else self._store_picture
        found: list[tuple[Rows | None, int]] = [(None, 0)] * len(target.grid)
        problems: list[str] = []
        for source, shard, first, places in stretches:
            for sample, row in enumerate(places, first):
                try:
                    found[row] = store(self.readers[source], shard, sample, target, row), sample
                except BadSample as error:
                    if not self.quarantine:
                        raise
                    problems.append(str(error))
        empty = [row for row, (rows, _) in enumerate(found) if rows is None]
        if empty:
            target.clear(empty)
        return found, problems

    def _store_features(self, reader: SampleReader, shard: int, sample: int, target: "_Target", row: int) -> Rows:
        return reader.read_grid(shard, sample, target.row(row))

    def _store_regions(self, reader: SampleReader, shard: int, sample: int, target: "_Target", row: int) -> Rows:
        boxes = None if target.boxes is None else target.boxes[row]
        rows, target.regions[row] = reader.read_regions(shard, sample, target.row(row), boxes)
        return rows

    def _store_picture(self, reader: SampleReader, shard: int, sample: int, target: "_Target", row: int) -> Rows:
        assert self.decode is not None
        rows, blob = reader.read_picture(shard, sample)
        try:
            picture = self.decode(blob)
        except (ValueError, OSError) as error:
            raise reader.bad(rows, sample, f"its picture cannot be decoded: {error}") from error
        target.row(row)[:] = picture.numpy().reshape(-1).data
        return rows
