"""Which (caption, word) pairs exist, and in which order the time loop meets them. Indices only: no weights.

Captions are ragged, so `[B, K, T]` is mostly padding. Rows (captions) are sorted by length, longest first: the rows
still running at step t are then a prefix, and all valid words form one packed time-major list without padding.
Surprising: images are re-ordered too, so that those still running (and the caption slots of each) are prefixes as well.
Everything is planned on the host, where lengths and captions lie, and reaches a GPU in one copy: a step that asks the
device for a number waits for all it has to do.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """N rows (captions that exist), M packed words (sum of their lengths), T steps. All indices are int64.

    A plan with room has more of all, and more images (`Room`).
    """

    images: Tensor
    """[B'] positions in the batch of the images that have a caption, by their longest caption."""
    row_image: Tensor
    """[N] image of each row, as a position in `images`."""
    row_slot: Tensor
    """[N] rank of each row among the captions of its image, longest first."""
    row_caption: Tensor
    """[N] position of each row's caption in the batch, among those of its image."""
    row_lengths: Tensor
    """[N] predicted tokens of each row, descending."""
    rows: tuple[int, ...]
    """Rows running at each step t: rows[t] captions have more than t tokens."""
    images_running: tuple[int, ...]
    """Images with a running row at each step: a prefix of `images`."""
    slots_running: tuple[int, ...]
    """Most running rows of any image at each step."""
    inputs: Tensor
    """[M] token fed at each packed position (`<start>`, then the words)."""
    targets: Tensor
    """[M] token to be predicted at each packed position (the words, then `<end>`)."""
    word_row: Tensor
    """[M] row of each packed position."""
    word_step: Tensor
    """[M] step of each packed position."""
    previous: Tensor
    """[M] where each word's row stood one step before: its row before the first step, else N + packed position."""
    distinct: Tensor
    """[U] the different tokens among `inputs`, ascending; of a plan with room, `inputs` themselves."""
    input_place: Tensor
    """[M] where each of `inputs` stands among them."""
    real: Tensor
    """[M] 1 for words that exist, 0 for those that only a plan with room goes through."""
    row_ends: Tensor
    """[B' + 1] begin and end of each image in `image_rows`."""
    image_rows: Tensor
    """[N] rows, image by image; those of an image ascend."""
    word_ends: Tensor
    """[B' + 1] begin and end of each image in `image_words`."""
    image_words: Tensor
    """[M] packed words, image by image; those of an image ascend."""
    step_begins: Tensor
    """[T] packed position of each step's first word."""
    words_per_image: tuple[int, ...]
    """How many each image has; of a plan with room, whose numbers are those of other batches too, none."""
    extent: tuple[int, int]
    """Images and captions of an image in the batch, up to the last that exists."""
    roomy: bool = False
    """Whether it goes through words that do not exist: `Room`."""

    @property
    def rows_by_image(self) -> tuple[Tensor, Tensor]:
        """`row_ends` and `image_rows`."""
        return self.row_ends, self.image_rows

    @property
    def words_by_image(self) -> tuple[Tensor, Tensor]:
        """`word_ends` and `image_words`."""
        return self.word_ends, self.image_words

    @property
    def indices(self) -> dict[str, Tensor]:
        """All of them, by name."""
        here = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in here.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Self:
        """The same plan with its indices on `device`, all in one copy, for which nobody waits."""
        indices = self.indices
        there = side_by_side(list(indices.values()), device).to(device, non_blocking=True)
        return replace(self, **dict(zip(indices, there.split([len(each) for each in indices.values()]), strict=True)))

    def slots(self, t: int) -> "Slots":
        """How the rows running at step t lie in the rectangle [B_t, K_t] of images and caption slots."""
        n, B, K = self.rows[t], self.images_running[t], self.slots_running[t]
        return Slots(self.row_image[:n] * K + self.row_slot[:n], (B, K))

    @cached_property
    def steps(self) -> list[slice]:
        """Packed positions of each step."""
        ends = list(itertools.accumulate(self.rows))
        return [slice(end - n, end) for n, end in zip(self.rows, ends, strict=True)]


@dataclass(frozen=True)
class Slots:
    """Rows of one image side by side, so that one batched product serves all of them."""

    position: Tensor
    """[n] of each row in the flattened rectangle."""
    shape: tuple[int, int]
    """(B_t, K_t)"""

    def spread(self, rows: Tensor) -> Tensor:
        """[n, ...] -> [B_t, K_t, ...], zeros where there is no row."""
        B, K = self.shape
        flat = rows.new_zeros(B * K, *rows.shape[1:]).index_copy(0, self.position, rows)
        return flat.view(B, K, *rows.shape[1:])

    def collect(self, rectangle: Tensor) -> Tensor:
        """[B_t, K_t, ...] -> [n, ...]"""
        return rectangle.flatten(0, 1)[self.position]


def side_by_side(indices: list[Tensor], device: torch.device) -> Tensor:
    """One int64 tensor of them all, on the host, from where they may be copied to `device` without being waited for."""
    pinned = torch.empty(sum(len(each) for each in indices), dtype=torch.int64, pin_memory=device.type == "cuda")
    torch.cat(indices, out=pinned)
    return pinned


class Room(NamedTuple):
    """What a plan goes through where its sizes must be those of other batches: more than what exists.

    A row goes on beyond its caption's end, and rows of no caption look at images too. Whatever is computed for words
    that do not exist must count for nothing: `Packing.real`, and `row_lengths` are those of the captions.
    """

    images: int
    rows: tuple[int, ...]
    """Rows that run at each step, never more than at the step before."""


def pack(
    captions: Tensor,
    lengths: Tensor,
    device: torch.device | None = None,
    enough: Callable[[Room], Room | None] | None = None,
) -> Packing:
    """Plan the time loop over `captions` int64 [B, K, T + 1] (`<start>` first) of `lengths` int64 [B, K], 0 for none.

    The indices go to `device`, by default that of the captions. Captions and lengths on a GPU are waited for. `enough`
    is told what there is and says how much the plan is to go through, at least that; None: no more.
    Raises ValueError where a length does not fit the captions.
    """
    device = captions.device if device is None else device
    captions, lengths = captions.cpu(), lengths.cpu()
    if captions.dim() != 3 or lengths.shape != captions.shape[:2]:
        shapes = f"{list(captions.shape)} and {list(lengths.shape)}"
        raise ValueError(f"captions [B, K, T] and lengths [B, K] expected, got {shapes}")
    if lengths.numel() and (lengths.max() >= captions.shape[2] or lengths.min() < 0):
        raise ValueError(f"lengths must be 0 .. {captions.shape[2] - 1} for captions of width {captions.shape[2]}")
    plan = _plan(captions, lengths, enough)
    return plan if device.type == "cpu" else plan.to(device)


class _Rows(NamedTuple):
    """Captions in the order in which the time loop meets them; the names are those of `Packing`."""

    images: Indices
    row_image: Indices
    row_slot: Indices
    row_caption: Indices
    row_lengths: Indices
    rows: Indices
    """[T]"""
    images_running: Indices
    """[T]"""
    slots_running: Indices
    """[T]"""

    @classmethod
    def of(cls, lengths: Indices) -> Self:
        """Of `lengths` [B, K]."""
        images = _longest_first(lengths.max(1, initial=0))
        caption = np.argsort(-lengths[images], axis=1, kind="stable")
        by_slot = np.take_along_axis(lengths[images], caption, 1)  # [B', K]
        row = _longest_first(by_slot.ravel())
        row_lengths, (row_image, row_slot) = by_slot.ravel()[row], np.divmod(row, lengths.shape[1])
        steps = np.arange(row_lengths[0] if len(row) else 0)
        longest = by_slot[:, :1].ravel(), by_slot.max(0, initial=0)  # caption of each image, and of each slot
        at_each_step = ((each > steps[:, None]).sum(1) for each in (row_lengths, *longest))
        return cls(images, row_image, row_slot, caption.ravel()[row], row_lengths, *at_each_step)

    def with_room(self, room: "Room") -> Self:
        """The same with so many images and rows; what is more has no caption and is spread over the images."""
        B, rows, T = room.images, np.array(room.rows), len(room.rows)
        more = rows[0] - len(self.row_image)
        none, row_image = np.zeros(more, np.int64), np.append(self.row_image, np.arange(more) % B)
        return self._replace(
            images=np.append(self.images, np.repeat(self.images[:1], B - len(self.images))),
            row_image=row_image,
            row_slot=_ranks(row_image, B),
            row_caption=np.append(self.row_caption, none),
            row_lengths=np.append(self.row_lengths, none),
            rows=rows,
            images_running=np.minimum(rows, B),  # those of the rows that run are the first ones
            slots_running=np.full(T, rows[0]),
        )


def _plan(captions: Tensor, lengths: Tensor, enough: Callable[[Room], Room | None] | None) -> Packing:
    """In NumPy, whose small operations cost a third of torch's: a GPU's step is over in a few milliseconds."""
    tokens, (_, K, width) = captions.numpy().ravel(), captions.shape
    found = _Rows.of(lengths.numpy())
    room = enough(Room(len(found.images), tuple(found.rows.tolist()))) if enough else None
    images, row_image, row_slot, row_caption, row_lengths, rows, *running = found.with_room(room) if room else found
    word_step, begins = np.arange(len(rows)).repeat(rows), rows.cumsum() - rows
    word_row = np.arange(len(word_step)) - begins[word_step]  # row-major: time first
    real = word_step < row_lengths[word_row]
    place = np.where(real, ((images[row_image] * K + row_caption) * width)[word_row] + word_step, 0)
    inputs = tokens[place] * real
    distinct, input_place = (inputs, np.arange(len(inputs))) if room else _numbered(inputs)
    word_ends, image_words = _group(row_image[word_row], len(images))
    row_ends, image_rows = _group(row_image, len(images))
    before = np.append(0, begins[:-1] + rows[:1])[: len(rows)]  # where the words before begin, behind the N rows
    indices = {
        "images": images,
        "row_image": row_image,
        "row_slot": row_slot,
        "row_caption": row_caption,
        "row_lengths": row_lengths,
        "inputs": inputs,
        "targets": tokens[place + 1] * real,
        "word_row": word_row,
        "word_step": word_step,
        "previous": word_row + before[word_step],
        "distinct": distinct,
        "input_place": input_place,
        "real": real,
        "row_ends": row_ends,
        "image_rows": image_rows,
        "word_ends": word_ends,
        "image_words": image_words,
        "step_begins": begins,
    }
    at_each_step = [tuple(each.tolist()) for each in (rows, *running)]
    return Packing(
        **{name: torch.from_numpy(np.ascontiguousarray(each, np.int64)) for name, each in indices.items()},
        rows=at_each_step[0],
        images_running=at_each_step[1],
        slots_running=at_each_step[2],
        words_per_image=() if room else tuple(np.diff(word_ends).tolist()),
        extent=(int(images.max()) + 1, int(row_caption.max()) + 1) if len(row_image) else (0, 0),
        roomy=room is not None,
    )


def _longest_first(lengths: Indices) -> Indices:
    """Places of what is longer than 0; of equals the first one first."""
    places = np.argsort(-lengths, kind="stable")
    return places[: np.count_nonzero(lengths)]


def _numbered(tokens: Indices) -> tuple[Indices, Indices]:
    """The different ones, ascending, and where each of `tokens` stands among them."""
    known = np.zeros(int(tokens.max(initial=0)) + 1, bool)
    known[tokens] = True
    return np.flatnonzero(known), (known.cumsum() - 1)[tokens]


def _ranks(image: Indices, images: int) -> Indices:
    """Of each row among those of its image."""
    ends, order = _group(image, images)
    ranks = np.empty_like(image)
    ranks[order] = np.arange(len(image)) - ends[image[order]]
    return ranks


def _group(image: Indices, images: int) -> tuple[Indices, Indices]:
    numbers = image.astype(np.uint16) if images < 1 << 16 else image  # which NumPy sorts several times as fast
    return np.append(0, np.bincount(image, minlength=images).cumsum()), np.argsort(numbers, kind="stable")
