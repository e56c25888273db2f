"""Captions of the images of a batch: which an epoch shows, as token ids, and the keys of their random numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from sat.data.order import Ints, choose_captions, derive_key, derive_keys
from sat.data.rows import Rows
from sat.text import END, PAD, START, CaptionTokenizer

Encoded = tuple[npt.NDArray[np.int32], int]
"""int32 [k, 1 + T], for each caption its length and its padded ids; and how many ids the longest has."""


@dataclass(frozen=True)
class CaptionOptions:
    """How captions become tokens; what an image shows in an epoch is a pure function of (seed, epoch, image_id)."""

    tokenizer: CaptionTokenizer
    per_image: int
    max_words: int
    seed: int
    keep_references: bool = False
    """Batches hold all captions of their images as they were given, too."""


class _Shown(NamedTuple):
    """The captions of an image that a batch holds."""

    ids: npt.NDArray[np.int32]
    """As in `Encoded`."""
    width: int
    """Ids of the longest."""
    numbers: Sequence[int]
    """Of each among all captions of the image."""


NOTHING = _Shown(np.zeros((0, 1), dtype=np.int32), 0, ())
"""Of a row without an image."""


def captions_of(
    found: Sequence[tuple[Rows | None, int]], options: CaptionOptions | None, epoch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """captions int64 [B, K, T], lengths and keys int64 [B, K] of these samples; K = 0 where captions are left out."""
    if options is None:
        nothing = torch.zeros((len(found), 0), dtype=torch.int64)
        return torch.zeros((len(found), 0, 0), dtype=torch.int64), nothing, nothing
    shown = [_shown(rows, sample, epoch, options) if rows else NOTHING for rows, sample in found]
    # At least <start> and one prediction, so that a batch without captions is a step like any other.
    longest = max(2, *(each.width for each in shown))
    captions = np.full((len(shown), options.per_image, longest), PAD, dtype=np.int64)
    lengths, which = (np.zeros(captions.shape[:2], dtype=np.int64) for _ in range(2))
    for row, (ids, width, numbers) in enumerate(shown):
        captions[row, : len(ids), :width] = ids[:, 1 : 1 + width]
        lengths[row, : len(ids)] = ids[:, 0]
        which[row, : len(ids)] = numbers
    keys = caption_keys(found, which, options.seed, epoch)
    return torch.from_numpy(captions), torch.from_numpy(lengths), torch.from_numpy(keys)


def references_of(found: Sequence[tuple[Rows | None, int]], options: CaptionOptions | None) -> list[list[str]] | None:
    """All captions of these samples as they were given, where `options` ask for them."""
    if options is None or not options.keep_references:
        return None
    return [rows.texts(sample) if rows else [] for rows, sample in found]


def caption_keys(found: Sequence[tuple[Rows | None, int]], which: Ints, seed: int, epoch: int) -> Ints:
    """int64 [B, K]: the key of caption `which` [B, K] of each image in `epoch` of a training with this `seed`.

    A pure function of both, of the data set's digest, of the image's id and of the caption's number among those of its
    image that have a word. Of a row without an image any number.
    """
    images = np.zeros((2, len(found), 1), dtype=np.uint64)
    for row, (rows, sample) in enumerate(found):
        if rows:
            images[:, row, 0] = rows.data_set, _hash(rows.image_ids[sample])
    begin = np.full_like(images[0], derive_key(seed, epoch))
    return derive_keys(begin, *images, which.astype(np.uint64)).view(np.int64)


def _hash(image_id: str) -> int:
    return xxhash.xxh3_64_intdigest(image_id.encode())


def _shown(rows: Rows, sample: int, epoch: int, options: CaptionOptions) -> _Shown:
    """The captions of an image that this epoch shows."""
    found = rows.encoded.get(sample)
    if found is None:
        texts = rows.texts(sample)
        found = rows.encoded[sample] = _encode(texts, options.tokenizer, options.max_words)
    ids, width = found
    if len(ids) <= options.per_image:
        return _Shown(ids, width, range(len(ids)))
    numbers = choose_captions(len(ids), options.per_image, _hash(rows.image_ids[sample]), options.seed, epoch)
    return _Shown(ids[numbers], int(ids[numbers, 0].max()) + 1, numbers)


def _encode(texts: Sequence[str], tokenizer: CaptionTokenizer, max_words: int) -> Encoded:
    """All captions of an image; those without a single word are dropped."""
    ids = [words for text in texts if (words := tokenizer.encode(text, max_words))]
    longest = max(map(len, ids), default=-2) + 2
    rows = [[len(words) + 1, START, *words, END] + [PAD] * (longest - 2 - len(words)) for words in ids]
    return np.array(rows, dtype=np.int32).reshape(len(ids), 1 + longest), longest
