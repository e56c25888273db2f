"""The fast time loop on a GPU, recorded as CUDA graphs and replayed: one launch from Python for a whole direction.

A word costs some fourteen launches, each dearer for Python than its work is for the GPU. A graph repeats them at the
same addresses with the same sizes, so the loop is recorded for shapes that cover many batches: rows in multiples of
`ROWS`, steps in multiples of `STEPS`. Surprising: only here are there words that do not exist. Real words are copied to
their places and back; the others look nowhere and nothing is asked of them, so their gradients are zeros. One pass is
on its way at a time: a forward pass before the last one's backward pass is not replayed, with the same outcome.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, zip_longest
from typing import NamedTuple, Self
from weakref import ref

import torch
from torch import Tensor

from sat.model.kernels.interface import Kernels, Seen
from sat.model.packing import Packing
from sat.model.passage import Asked, Gradients, Inputs, Passage, Weights, Words, grad_of_grid

ROWS, STEPS = 32, 4
SPARE = 1.15
"""A recording serves whatever needs no less than its words divided by this."""
LIMIT = 48
"""Recordings of one memory; beyond them whatever covers serves, and what nothing covers is not replayed."""
Play = Callable[[], object]
Record = Callable[[Callable[[], None]], Play]
"""Runs a function, and returns what repeats its work at the same addresses."""


class Shape(NamedTuple):
    """Sizes of a recording."""

    images: int
    rows: tuple[int, ...]
    """Rows that run at each step, never more than at the step before."""

    @classmethod
    def of(cls, packing: Packing) -> Self:
        """The least that covers it: a row runs on to the end of the `STEPS` steps in which its caption ends."""
        begins = range(0, len(packing.rows), STEPS)
        return cls(len(packing.images), tuple(_up(packing.rows[begin]) for begin in begins for _ in range(STEPS)))

    @property
    def words(self) -> int:
        """How many it goes through."""
        return sum(self.rows)

    def covers(self, other: "Shape") -> bool:
        """Whether each step of `other` finds its rows and images here."""
        enough = all(mine >= needed for mine, needed in zip_longest(self.rows, other.rows, fillvalue=0))
        return enough and self.images >= other.images

    def with_room_for(self, other: "Shape") -> "Shape":
        """The least that covers both, and longer captions too."""
        rows = [max(each) for each in zip_longest(self.rows, other.rows, fillvalue=0)]
        return Shape(max(self.images, other.images), (*rows, *[ROWS] * (2 * STEPS)))


def _up(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


class Widths(NamedTuple):
    """What must be alike for two passes to go through the same memory."""

    sizes: tuple[tuple[int, ...], ...]
    types: tuple[torch.dtype, ...]
    how: tuple[object, ...]

    @classmethod
    def of(cls, kernels: Kernels, seen: Seen, inputs: Inputs, weights: Weights) -> Self:
        """Of a pass."""
        sizes = (seen.grid.shape[1:], seen.projection.shape[1:], *(each.shape for each in weights))
        types = (seen.grid.dtype, inputs.c.dtype)
        return cls(tuple(tuple(size) for size in sizes), types, (kernels, seen.tanh, seen.regions is not None))


@dataclass(frozen=True)
class Recording:
    """The passage of a shape, through memory that stays where it is."""

    shape: Shape
    passage: Passage
    word_gates: Tensor
    asked: Asked
    grads: Gradients
    begins: Tensor
    """int64 [T] where the words of each step begin."""
    forward: list[Play] = field(default_factory=list)
    """What repeats the forward direction, once it is recorded."""
    backward: dict[tuple[bool, bool], Play] = field(default_factory=dict)
    """Likewise, by whether hidden states and gated contexts are asked for."""

    @classmethod
    def of(cls, shape: Shape, kernels: Kernels, seen: Seen, inputs: Inputs, weights: Weights) -> "Recording":
        """Of nothing yet, in new memory; zeros, as what no batch fills must be finite."""
        B, N, M = shape.images, shape.rows[0], shape.words

        def room(like: Tensor, leading: int) -> Tensor:
            return like.new_zeros(leading, *like.shape[1:])

        def places(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=seen.grid.device)

        own = Weights(*(torch.zeros_like(each, memory_format=torch.contiguous_format) for each in weights))
        packing = replace(
            seen.packing,
            row_ends=places(B + 1),
            image_rows=places(N),
            word_ends=places(B + 1),
            image_words=places(M),
        )
        regions = None if seen.regions is None else places(B) + 1
        there = Seen(packing, room(seen.grid, B), room(seen.projection, B), own.score, seen.tanh, regions)
        fed = Inputs(there.grid, there.projection, room(inputs.word_gates, M), room(inputs.h, N), room(inputs.c, N))
        words = Words.empty(fed, own)
        for each in words:
            each.zero_()
        asked = Asked(torch.zeros_like(words.hidden), torch.zeros_like(words.gated), room(words.alphas, N))
        passage = Passage(kernels, there, fed.h, fed.c, own, words)
        return cls(shape, passage, fed.word_gates, asked, Gradients.empty(words, fed.c), places(0)).cut(shape)

    def cut(self, shape: Shape) -> "Recording":
        """One of a `shape` that this one covers, in the same memory."""
        (B, rows), M = shape, shape.words
        kernels, seen, h, c, weights, words, *_ = self.passage
        ends = [0, *accumulate(rows)]
        before = [torch.arange(n) + (rows[0] + ends[t - 1] if t else 0) for t, n in enumerate(rows)]
        whole, N = seen.packing, rows[0]
        packing = replace(
            whole,
            rows=rows,
            images_running=tuple(min(B, n) for n in rows),  # so few rows are of no more images, and of the first ones
            row_ends=whole.row_ends[: B + 1],
            image_rows=whole.image_rows[:N],
            word_ends=whole.word_ends[: B + 1],
            image_words=whole.image_words[:M],
            previous=torch.cat(before).to(seen.grid.device),
        )
        regions = None if seen.regions is None else seen.regions[:B]
        seen = seen._replace(packing=packing, grid=seen.grid[:B], projection=seen.projection[:B], regions=regions)
        hidden, gated, alpha_sum, _ = self.asked
        assert hidden is not None and gated is not None
        states, scores, contexts, grad_h, grad_c = self.grads
        return Recording(
            shape,
            Passage(kernels, seen, h[:N], c[:N], weights, Words(*(each[:M] for each in words))),
            self.word_gates[:M],
            Asked(hidden[:M], gated[:M], alpha_sum[:N]),
            Gradients(states[:M], scores[:M], contexts[:M], grad_h[:N], grad_c[:N]),
            torch.tensor(ends[:-1], device=seen.grid.device),
        )

    def fill(self, seen: Seen, inputs: Inputs, weights: Weights, place: Tensor) -> None:
        """Bring in a batch whose words belong at `place` int64 [M]."""
        packing, there = seen.packing, self.passage.seen.packing
        (B, N), (M,) = (len(seen.grid), len(inputs.h)), place.shape
        _, own, h, c, still, *_ = self.passage
        given = [seen.grid, seen.projection, inputs.h, inputs.c, *weights]
        kept = [own.grid[:B], own.projection[:B], h[:N], c[:N], *still]
        if own.regions is not None and seen.regions is not None:
            given, kept = [*given, seen.regions], [*kept, own.regions[:B]]
        for mine, theirs in zip(kept, given, strict=True):
            mine.copy_(theirs)
        for each in (h[N:], c[N:], self.word_gates):
            each.zero_()
        self.word_gates.index_copy_(0, place, inputs.word_gates)
        # Rows that do not exist are shared out, for them to be somebody's: none of the images may take much longer.
        spare = torch.arange(self.shape.rows[0] - N, device=place.device) % B
        image, there.image_rows[:] = torch.cat([packing.row_image, spare]).sort(stable=True)
        there.row_ends[:B] = torch.searchsorted(image, torch.arange(B, device=place.device))
        there.row_ends[B:].fill_(self.shape.rows[0])
        there.word_ends[: B + 1].copy_(packing.word_ends)
        there.word_ends[B:].fill_(M)
        torch.index_select(place, 0, packing.image_words, out=there.image_words[:M])

    def ask(self, asked: Asked, place: Tensor) -> None:
        """Bring in the gradients that reach the loop."""
        for mine, theirs in zip(self.asked[:2], asked[:2], strict=True):
            if mine is not None and theirs is not None:
                mine.zero_().index_copy_(0, place, theirs)
        self.asked.alpha_sum[: len(asked.alpha_sum)].copy_(asked.alpha_sum)
        self.asked.alpha_sum[len(asked.alpha_sum) :].zero_()


class Played:
    """One pass of a batch through a recording: forward done, backward to come."""

    def __init__(self, player: "Player", recording: Recording, packing: Packing, place: Tensor) -> None:
        self._player, self._recording, self._packing, self._place = player, recording, packing, place
        self.on_its_way = True
        """Whether the recording's memory is its own: from the forward pass to the end of the backward pass."""

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [M, H], gated contexts [M, D] and alpha [M, L] of the words that exist, copied."""
        words, place = self._recording.passage.words, self._place
        alphas = words.alphas[place]
        words.alphas.zero_().index_copy_(0, place, alphas)
        return words.hidden[place], words.gated[place], alphas

    def gradients(
        self, hidden: Tensor | None, gated: Tensor | None, alpha_sum: Tensor | None, of_grid: bool
    ) -> tuple[Tensor | None, ...]:
        """Those of all of `Inputs` (the grid's only if it is wanted) and `Weights`."""
        if not self.on_its_way:
            raise RuntimeError("a second backward pass through one forward pass of the time loop; take another of that")
        recording, place = self._recording, self._place
        passage, grads = recording.passage, recording.grads
        images, rows = len(self._packing.images), self._packing.rows[0]
        recording.ask(Asked.of(hidden, gated, alpha_sum, None, passage.words, rows), place)
        self._player.backward(recording, hidden is not None, gated is not None)
        grad_projection, of_weights = passage.shared(grads)
        grad_grid = None
        if of_grid:
            grad_grid = grad_of_grid(self._packing, passage.words.alphas[place], grads.contexts[place])
        of_words = grads.states[place, : recording.word_gates.shape[1]]
        self.on_its_way = False
        grad_h, grad_c = grads.h[:rows].to(passage.h.dtype, copy=True), grads.c[:rows].clone()
        return grad_grid, grad_projection[:images], of_words, grad_h, grad_c, *of_weights


class Player:
    """Records the loop for the shapes that it meets, and replays it."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._widths: Widths | None = None
        self._memory: Recording | None = None
        self._recordings: list[Recording] = []
        self._last: ref[Played] | None = None

    def play(self, kernels: Kernels, seen: Seen, inputs: Inputs, weights: Weights) -> Played | None:
        """The forward direction of a batch; None where it cannot be replayed."""
        last = self._last() if self._last else None
        if last and last.on_its_way:
            return None
        recording = self._recording_of(kernels, seen, inputs, weights)
        if recording is None:
            return None
        packing, passage = seen.packing, recording.passage
        place = recording.begins[packing.word_step] + packing.word_row
        recording.fill(seen, inputs, weights, place)
        if recording.forward:
            recording.forward[0]()
        else:
            recording.forward.append(self._record(lambda: passage.forward(recording.word_gates)))
        played = Played(self, recording, packing, place)
        self._last = ref(played)
        return played

    def backward(self, recording: Recording, hidden: bool, gated: bool) -> None:
        """The backward direction of the batch in a recording, whose hidden states, gated contexts are asked for."""
        if play := recording.backward.get((hidden, gated)):
            play()
            return
        of_hidden, of_gated, of_alpha_sum, _ = recording.asked
        asked = Asked(of_hidden if hidden else None, of_gated if gated else None, of_alpha_sum)
        recording.backward[hidden, gated] = self._record(lambda: recording.passage.backward(asked, recording.grads))

    def _recording_of(self, kernels: Kernels, seen: Seen, inputs: Inputs, weights: Weights) -> Recording | None:
        needed, widths = Shape.of(seen.packing), Widths.of(kernels, seen, inputs, weights)
        if widths != self._widths:
            self._widths, self._memory, self._recordings = widths, None, []
        fitting = [each for each in self._recordings if each.shape.covers(needed)]
        nearest = min(fitting, key=lambda each: each.shape.words, default=None)
        if nearest and (nearest.shape.words <= SPARE * needed.words or len(self._recordings) >= LIMIT):
            return nearest
        if len(self._recordings) >= LIMIT:
            return None
        if self._memory is None or not self._memory.shape.covers(needed):
            known = self._memory.shape if self._memory else needed
            self._memory, self._recordings = None, []  # before there is new memory
            self._memory = Recording.of(known.with_room_for(needed), kernels, seen, inputs, weights)
        self._recordings.append(self._memory.cut(needed))
        return self._recordings[-1]


def record_on_gpu() -> Record:
    """Records CUDA graphs whose passing memory is shared, on the current device."""
    side, one = torch.cuda.Stream(), torch.ones(1, device="cuda")
    with torch.cuda.stream(side):
        keeper = _captured(one.clone, None)  # shared memory goes with its last graph and is not to be had again

    def record(work: Callable[[], None]) -> Play:
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            work()  # programs are compiled and libraries loaded, which a recording does not allow
            graph = _captured(work, keeper)
        current.wait_stream(side)
        return graph.replay

    return record


def _captured(work: Callable[[], object], beside: torch.cuda.CUDAGraph | None) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Other threads pin batches meanwhile, which is none of this one's business.
    graph.capture_begin(pool=beside.pool() if beside else None, capture_error_mode="thread_local")
    try:
        work()
    finally:
        graph.capture_end()
    return graph
