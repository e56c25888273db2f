"""Which (caption, word) pairs exist, and in which order the time loop meets them. Indices only: no weights, no features.

Captions are ragged, so `[B, K, T]` is mostly padding. Rows (captions) are sorted by length, longest first: the rows still
running at step t are then a prefix, and all valid words form one packed time-major list without padding. The surprising part:
images are re-ordered too, so that the images (and the caption slots of an image) still running are prefixes as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """N rows (captions that exist), M packed words (sum of their lengths), T steps. All indices are int64."""

    images: Tensor
    """[B'] positions in the batch of the images that have a caption, by their longest caption."""
    row_image: Tensor
    """[N] image of each row, as a position in `images`."""
    row_slot: Tensor
    """[N] rank of each row among the captions of its image, longest first."""
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

    @property
    def starts(self) -> list[int]:
        """First packed position of each step, and M at the end."""
        total, result = 0, [0]
        for count in self.rows:
            total += count
            result.append(total)
        return result


def pack(captions: Tensor, lengths: Tensor) -> Packing:
    """Plan the time loop over `captions` int64 [B, K, T + 1] (`<start>` first) with `lengths` int64 [B, K], 0 where there is none.

    Raises ValueError where a length does not fit the captions. The lengths are read on the CPU: one synchronisation per step.
    """
    device = captions.device
    lengths = lengths.cpu()
    if captions.dim() != 3 or lengths.shape != captions.shape[:2]:
        raise ValueError(f"captions [B, K, T] and lengths [B, K] expected, got {list(captions.shape)} and {list(lengths.shape)}")
    if lengths.numel() and (lengths.max() >= captions.shape[2] or lengths.min() < 0):
        raise ValueError(f"lengths must be 0 .. {captions.shape[2] - 1} for captions of width {captions.shape[2]}")

    images = lengths.amax(1).argsort(descending=True, stable=True)
    images = images[lengths.amax(1)[images] > 0]
    by_slot, caption = lengths[images].sort(dim=1, descending=True, stable=True)  # [B', K]
    row_lengths, row = by_slot.flatten().sort(descending=True, stable=True)
    row = row[row_lengths > 0]
    row_lengths = row_lengths[row_lengths > 0]
    row_image, row_slot = row // lengths.shape[1], row % lengths.shape[1]
    steps = torch.arange(int(row_lengths[0]) if len(row) else 0)
    step, word_row = (row_lengths > steps[:, None]).nonzero(as_tuple=True)  # row-major: time first

    running = by_slot > steps[:, None, None]  # [T, B', K]
    flat = (images[row_image] * captions.shape[1] + caption.flatten()[row])[word_row] * captions.shape[2] + step
    tokens = captions.flatten()
    flat = flat.to(device)
    return Packing(
        images=images.to(device),
        row_image=row_image.to(device),
        row_slot=row_slot.to(device),
        row_lengths=row_lengths.to(device),
        rows=tuple(running.sum((1, 2)).tolist()),
        images_running=tuple(running.any(2).sum(1).tolist()),
        slots_running=tuple(running.any(1).sum(1).tolist()),
        inputs=tokens[flat],
        targets=tokens[flat + 1],
        word_row=word_row.to(device),
    )
