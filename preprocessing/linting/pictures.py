"""The same picture under two names: found by its pixels, though it was compressed again, resized or brightened.

Two looks. A perceptual hash (the signs of the 63 lowest frequencies of a cosine transform of the grey picture, Zauner
2010) finds who may be alike; thumbnails in colour, 16 x 16, say who is: they correlate, and no cell is far from what
the other's would be at this brightness. The bounds were set on photographs of Flickr8k and COCO and on drawn scenes,
where two that differ in one small shape are two: copies at JPEG quality 30 and 60, of half the size, or 10 % brighter
are found in 93 of 100 cases at least, and no two different pictures were taken for one. A cut, turned, mirrored or grey
copy is not found.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
import numpy.typing as npt
from PIL import Image

from sat.shards.location import open_file
from sat.shards.manifest import Manifest
from sat.shards.pictures import BadPicture, decode
from sat.shards.schema import SampleRow, sample_rows
from sat.shards.tar import read_members

SIDE, FREQUENCIES = 16, 8
BITS = FREQUENCIES**2 - 1
MOST_BITS = 8
"""That two pictures may differ in and still be looked at closely."""
ALIKE = 0.98
"""Correlation of the thumbnails of one picture, at least."""
FAR = 36.0
"""Grey levels that a cell of the one may be off, when brightness and contrast are fitted to the other's."""
FLAT = 1.0
"""Standard deviation, in grey levels, below which a picture is one colour; those are the same if their colours are."""
COMPARED_TOGETHER = 512
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_COSINES = np.cos(np.pi * (2 * np.arange(SIDE) + 1) * np.arange(FREQUENCIES)[:, None] / (2 * SIDE)).astype(np.float32)
Thumbnails = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Named:
    """A picture of a split."""

    split: str
    image_id: str
    file_name: str


@dataclass(frozen=True)
class Pair:
    """The same picture in two splits."""

    first: Named
    second: Named


@dataclass(frozen=True)
class Looks:
    """What pictures look like."""

    names: tuple[Named, ...]
    thumbnails: Thumbnails
    """[N, 16, 16, 3] RGB."""


def look(manifest: Manifest, threads: int, progress: Callable[[int], None] = lambda count: None) -> Looks:
    """Thumbnails of all pictures of a set of image shards; one that cannot be read is passed over (`verify` names it).

    `progress` is told how many pictures were looked at. Raises OSError for a shard that cannot be read.
    """
    names: list[Named] = []
    found: list[Thumbnails] = []
    with ThreadPoolExecutor(threads) as pool:
        for index in range(len(manifest.shards)):
            samples = _samples(manifest, index)
            while some := list(islice(samples, 32 * threads)):
                for row, thumbnail in pool.map(lambda each: (each[0], _thumbnail(*each)), some):
                    if thumbnail is not None:
                        names.append(Named(row.split, row.image_id, row.file_name))
                        found.append(thumbnail)
                progress(len(some))
    return Looks(tuple(names), np.array(found, np.uint8).reshape(-1, SIDE, SIDE, 3))


def _samples(manifest: Manifest, shard: int) -> Iterator[tuple[SampleRow, bytes]]:
    with open_file(manifest.root, manifest.shards[shard].name) as file:
        for row in sample_rows(manifest.rows(shard)):
            file.seek(row.offset)
            yield row, file.read(row.nbytes)


def _thumbnail(row: SampleRow, blob: bytes) -> Thumbnails | None:
    try:
        members = read_members(blob, row.key)
        return thumbnail_of(decode(next(data for name, data in members.items() if name != "json")))
    except (BadPicture, ValueError, StopIteration):
        return None


def thumbnail_of(picture: Image.Image) -> Thumbnails:
    """RGB picture -> uint8 [16, 16, 3], each the mean of its part."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=4.0))


def hashes_of(thumbnails: Thumbnails) -> npt.NDArray[np.float32]:
    """Thumbnails [N, 16, 16, 3] -> perceptual hashes [N, 63] of -1 and 1, so that a product counts equal bits."""
    grey = thumbnails @ _GREY  # [N, 16, 16]
    frequencies = np.einsum("fi,nij,gj->nfg", _COSINES, grey, _COSINES, optimize=True).reshape(-1, BITS + 1)[:, 1:]
    return np.where(frequencies > np.median(frequencies, axis=1, keepdims=True), 1, -1).astype(np.float32)


def same_pictures(looks: Looks) -> Iterator[Pair]:
    """Every pair of pictures of two splits that look the same."""
    splits = np.array([name.split for name in looks.names])
    hashes = hashes_of(looks.thumbnails)
    for first, second in combinations(sorted(set(splits.tolist())), 2):
        rows, others = np.flatnonzero(splits == first), np.flatnonzero(splits == second)
        for start in range(0, len(rows), COMPARED_TOGETHER):
            some = rows[start : start + COMPARED_TOGETHER]
            near = BITS - hashes[some] @ hashes[others].T <= 2 * MOST_BITS
            for one, other in zip(*np.nonzero(near), strict=True):
                a, b = int(some[one]), int(others[other])
                if are_alike(looks.thumbnails[a], looks.thumbnails[b]):
                    yield Pair(looks.names[a], looks.names[b])


def are_alike(one: Thumbnails, other: Thumbnails) -> bool:
    """Whether two thumbnails are of the same picture."""
    a, b = (each.astype(np.float64).ravel() for each in (one, other))
    spread = a.std(), b.std()
    if min(spread) < FLAT:
        return bool(max(spread) < FLAT and abs(a - b).mean() < FLAT)
    a, b = a - a.mean(), b - b.mean()
    together = np.mean(a * b)
    off = abs(b - a * together / spread[0] ** 2).max()
    return bool(together >= ALIKE * spread[0] * spread[1] and off <= FAR)
