"""An objective's sums on a GPU, recorded and replayed: a launch from Python for each direction of a whole micro-batch.

At usual batches Python is what a step waits for: it launches some three hundred programs word by word, each over in
microseconds. A recording (`sat.model.recording`) has fixed sizes, so it is made for a `Room` that covers many batches,
rows in multiples of `ROWS` and steps in multiples of `STEPS`; what it computes for words that do not exist counts for
nothing. Recordings share the memory of what leads from one direction to the other, those of all
objectives: one pass is on its way at a time. A forward pass before the last one's backward pass is not replayed, with
the same outcome.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple, Self
from weakref import ref

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sat.model.captioner import Captioner, Memory
from sat.model.draws import Draws
from sat.model.kernels.choose import choose_recorder
from sat.model.loss import LossSums
from sat.model.packing import Packing, Room, pack, side_by_side
from sat.model.recording import Play, Record

ROWS, STEPS = 16, 2
SLACK, LONGER = 1.15, 2
"""A new room has so many times its batch's rows, and room for captions so many words longer."""
STEP = 200
"""Words that take as long as what a step takes by itself: a dozen programs one behind the other, 60 us on an H200."""
SPARE = 1.1
"""A recording serves where a new one would take no less than its time divided by this."""
LIMIT = 48
"""Recordings of one objective; beyond them whatever covers serves, and what nothing covers is not replayed."""
Compute = Callable[[Memory, Draws, Tensor | None], LossSums]
"""The sums of images in the order of the packing that `Draws` are of, and the gains [N] of its rows, if it has any."""
HOST = torch.device("cpu")


class MicroBatch(NamedTuple):
    """What an objective is given; but for grid and regions on the host."""

    grid: Tensor
    """[B, L, D]"""
    captions: Tensor
    """int64 [B, K, T + 1]"""
    lengths: Tensor
    """int64 [B, K]"""
    regions: Tensor | None
    """int64 [B]"""
    keys: Tensor | None
    """int64 [B, K]"""
    gains: Tensor | None = None
    """float64 [B, K] that captions are weighed by; none where that is the objective's own matter."""


def new_room(needed: Room) -> Room:
    """Of a recording that is made for a batch: a row runs on to the end of the `STEPS` steps in which it ends.

    There are no more rows than the batch needs at first: captions are as many in most batches.
    """
    wanted = [-(-math.ceil(SLACK * needed.rows[begin]) // ROWS) * ROWS for begin in range(0, len(needed.rows), STEPS)]
    most = -(-needed.rows[0] // ROWS) * ROWS
    return Room(needed.images, (*(min(rows, most) for rows in wanted for _ in range(STEPS)), *[ROWS] * LONGER))


def time_of(room: Room) -> int:
    """What a recording of it takes, in words."""
    return sum(room.rows) + STEP * len(room.rows)


def covers(room: Room, other: Room) -> bool:
    """Whether each step of `other` finds its rows and images in `room`."""
    enough = all(mine >= needed for mine, needed in zip_longest(room.rows, other.rows, fillvalue=0))
    return enough and room.images >= other.images


class _Setting(NamedTuple):
    """What a recording holds for: everything that it has not in memory of its own."""

    dtype: torch.dtype
    regions: bool
    autocast: torch.dtype | None
    training: bool
    weights: tuple[tuple[int, bool], ...]
    """Where each is, and whether it learns; buffers among them."""

    @classmethod
    def of(cls, model: Captioner, parameters: list[nn.Parameter], grid: Tensor, regions: Tensor | None) -> Self:
        kind = grid.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        weights = tuple((each.data_ptr(), each.requires_grad) for each in (*parameters, *model.buffers()))
        return cls(grid.dtype, regions is not None, autocast, model.training, weights)


class _Computing(nn.Module):
    """What is recorded, as a module: so that it can be called with other weights."""

    def __init__(self, model: Captioner, compute: Compute) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, grid: Tensor, draws: Draws, regions: Tensor | None, gains: Tensor | None) -> LossSums:
        return self.compute(self.model.encode(grid, None, regions), draws, gains)


class _Inputs(NamedTuple):
    """Memory that batches are brought into."""

    grid: Tensor
    regions: Tensor | None
    gains: Tensor | None


class _Recording:
    """Both directions of the sums over a room, through memory that stays where it is.

    They are of aliases of the weights: what accumulates a weight's own gradient belongs to the stream on which it was
    made, and an engine may hold it.
    """

    def __init__(self, model: Captioner, plan: Packing, memory: _Inputs, kept: dict[str, Tensor]) -> None:
        """`kept` is what recordings of the same sizes leave their results in."""
        self.grid, self.regions, self.gains = memory
        learning = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        learning.sort(key=lambda item: item[1].numel(), reverse=True)  # the large gradients lie aligned
        self.weights = [each for _, each in learning]
        self._aliases = {f"model.{name}": each.detach().requires_grad_() for name, each in learning}
        sizes = [len(each) for each in (*plan.indices.values(), plan.images, plan.row_image)]
        self._indices = torch.zeros(sum(sizes), dtype=torch.int64, device=self.grid.device)
        *parts, of_images, of_captions = self._indices.split(sizes)
        self.draws = Draws(replace(plan, **dict(zip(plan.indices, parts, strict=True))), of_images, of_captions)
        self.counted: dict[str, tuple[torch.dtype, int]] = {}
        """Where each count is: its place among those of its type."""
        self.plays: list[Play] = []
        """Of the forward and the backward direction."""
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._kept = kept

    def fill(self, plan: Packing, batch: MicroBatch) -> None:
        """Bring in a batch and its plan."""
        draws = Draws.of(batch.keys, plan)
        indices = side_by_side([*plan.indices.values(), draws.images, draws.captions], self.grid.device)
        self._indices.copy_(indices, non_blocking=True)
        images = self.draws.packing.images
        torch.index_select(batch.grid, 0, images, out=self.grid[:, : batch.grid.shape[1]])  # none looks behind
        if self.regions is not None and batch.regions is not None:
            torch.index_select(batch.regions, 0, images, out=self.regions)
        if self.gains is not None and batch.gains is not None:
            self.gains.copy_(batch.gains[plan.images[plan.row_image], plan.row_caption])

    def record(self, record: Record, computing: _Computing) -> None:
        """Both directions, with the batch that was brought in."""
        try:
            forward = record(lambda: self._forward(computing))
            forward()
            self._keep("asked", self["losses"])
            self.plays = [forward, record(self._backward)]
        finally:
            self._outputs = None  # what leads from one to the other: its memory is for the next recording to use

    def _forward(self, computing: _Computing) -> None:
        """Leave `losses` [2] and the counts of each type."""
        kind = self.grid.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.autocast(kind, dtype, enabled, cache_enabled=False):  # a cast that is kept is not in the recording
            sums = functional_call(computing, self._aliases, (self.grid, self.draws, self.regions, self.gains))
        self._outputs = sums.per_token, sums.per_caption
        self._keep("losses", torch.stack(self._outputs).detach())
        counts: dict[torch.dtype, list[Tensor]] = {}
        for name, each in sums.counts.items():
            alike = counts.setdefault(each.dtype, [])
            self.counted[name] = each.dtype, len(alike)
            alike.append(each)
        for dtype, alike in counts.items():
            self._keep(str(dtype), torch.stack(alike))

    def _backward(self) -> None:
        """Leave the `gradient` [P] of all weights, one behind the other, of `asked` [2] times the losses."""
        assert self._outputs
        asks = [(loss, of) for loss, of in zip(self._outputs, self["asked"], strict=True) if loss.requires_grad]
        losses, asked = zip(*asks, strict=True)
        aliases = list(self._aliases.values())
        found = torch.autograd.grad(losses, aliases, asked, retain_graph=True, materialize_grads=True)
        parts = [each.reshape(-1) for each in found]
        if "gradient" not in self._kept:
            self._kept["gradient"] = parts[0].new_empty(sum(each.numel() for each in parts))
        torch.cat(parts, out=self._kept["gradient"])  # large: it is not to be copied once more

    def __getitem__(self, name: str) -> Tensor:
        """`losses`, `asked`, `gradient`, or the counts by the name of their type."""
        return self._kept[name]

    def _keep(self, name: str, value: Tensor) -> None:
        """At one address from the first time on, when nothing is being recorded yet."""
        if name in self._kept:
            self._kept[name].copy_(value)
        else:
            self._kept[name] = value.clone()


class _Pass:
    """One pass of a micro-batch through a recording."""

    def __init__(self, recording: _Recording) -> None:
        self.recording = recording
        self.on_its_way = True
        """Whether the recording's memory is its own: from the forward pass to the end of the backward pass."""


class Replay:
    """Records an objective's sums for the rooms that it meets, and replays them. A copy has recorded nothing."""

    _last: ClassVar[ref[_Pass] | None] = None
    """Of all objectives, as memory is shared by them."""

    def __init__(self, model: Captioner) -> None:
        self._model = model
        self._setting: _Setting | None = None
        self._memory: tuple[Tensor, Tensor | None] | None = None
        self._recordings: dict[Room, _Recording] = {}
        self._kept: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[Self], tuple[Captioner]]:
        return type(self), (self._model,)

    def sums(self, batch: MicroBatch, compute: Compute) -> LossSums | None:
        """None where it cannot be replayed. `compute`, always the same, uses no other weights than the model's.

        It is no field, as it holds the objective, which holds this: they would outlive their last user.
        """
        last = Replay._last() if Replay._last else None
        parameters = list(self._model.parameters())  # a walk that a short step notices
        record = None if last and last.on_its_way else _recorder_for(self._model, parameters, batch.grid)
        if record is None:
            return None
        self._model.refuse(batch.grid, batch.regions)
        setting = _Setting.of(self._model, parameters, batch.grid, batch.regions)
        if setting != self._setting:
            self._setting, self._memory, self._recordings, self._kept = setting, None, {}, {}
        plan = pack(batch.captions, batch.lengths, HOST, self._room_for)
        if not plan.roomy:
            return None
        recording = self._recording_of(plan, batch)
        recording.fill(plan, batch)
        if not recording.plays:
            recording.record(record, _Computing(self._model, compute))
        recording.plays[0]()
        passing = _Pass(recording)
        Replay._last = ref(passing)
        per_token, per_caption = _Replayed.apply(passing, *recording.weights).unbind()
        types = {dtype for dtype, _ in recording.counted.values()}
        counts = {dtype: recording[str(dtype)].clone().unbind() for dtype in types}
        return LossSums(
            per_token, per_caption, {name: counts[dtype][place] for name, (dtype, place) in recording.counted.items()}
        )

    def _room_for(self, needed: Room) -> Room | None:
        """That of the nearest recording, or a new one."""
        if not needed.rows:
            return None
        fitting = [room for room in self._recordings if covers(room, needed)]
        nearest, new = min(fitting, key=time_of, default=None), new_room(needed)
        full = len(self._recordings) >= LIMIT
        if nearest and (full or time_of(nearest) <= SPARE * time_of(new)):
            return nearest
        return None if full else new

    def _recording_of(self, plan: Packing, batch: MicroBatch) -> _Recording:
        room = Room(len(plan.images), plan.rows)
        if room in self._recordings:
            return self._recordings[room]
        if self._memory is None or len(self._memory[0]) < room.images:
            self._memory, self._recordings = None, {}  # before there is new memory
            sizes, regions = self._model.sizes, batch.regions  # grids of regions are as long as their longest image's
            grid = batch.grid.new_empty(room.images, sizes.grid_size, sizes.feature_dim)
            self._memory = grid, None if regions is None else regions.new_ones(room.images)
        grid, regions = self._memory
        gains = None if batch.gains is None else grid.new_zeros(room.rows[0], dtype=torch.float64)
        own = _Inputs(grid[: room.images], None if regions is None else regions[: room.images], gains)
        self._recordings[room] = _Recording(self._model, plan, own, self._kept)
        return self._recordings[room]


def _recorder_for(model: Captioner, parameters: list[nn.Parameter], grid: Tensor) -> Record | None:
    """What records; None where that does not serve.

    Weights that move cannot be read by a recording: DeepSpeed's ZeRO 3 moves them, and marks them.
    """
    learning = [each for each in parameters if each.requires_grad]
    alike = len({each.dtype for each in learning}) == 1 and not any(hasattr(each, "ds_id") for each in learning)
    served = alike and torch.is_grad_enabled() and not grid.requires_grad
    return choose_recorder(model.kernels, model.vocabulary.weight) if served else None


class _Replayed(torch.autograd.Function):
    """From weights to losses [2]; both directions are a recording's."""

    @staticmethod
    def forward(ctx: Any, passing: _Pass, *weights: Tensor) -> Tensor:
        ctx.passing = passing
        ctx.save_for_backward(*weights)
        return passing.recording["losses"].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        passing = ctx.passing
        if not passing.on_its_way:
            raise RuntimeError("a second backward pass through one forward pass of an objective; take another of that")
        assert ctx.saved_tensors  # raises where weights have changed since, as autograd does without a recording
        recording = passing.recording
        recording["asked"].copy_(grads[0])
        recording.plays[1]()
        passing.on_its_way = False
        gradient = recording["gradient"].clone().split([each.numel() for each in recording.weights])
        return None, *(part.view_as(each) for part, each in zip(gradient, recording.weights, strict=True))
