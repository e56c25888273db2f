"""Which samples make global batch b, and which of them are this rank's. Pure: no files, no torch, no clock.

The order is never stored or sorted: position -> sample is computed by a keyed permutation (a generalised Feistel
network with cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), so any step of an epoch
of 1e9 samples costs the same microseconds, and memory is two integers per shard. The integer mix is our own because
the streams of numpy's and torch's generators change between their versions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = 3
"""Luby and Rackoff ("How to Construct Pseudorandom Permutations", 1988) need two of ours, of two half-rounds each."""


def mix64(x: int) -> int:
    """The finaliser of splitmix64 (Steele et al., 2014), a bijection of 64-bit integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def mix64_array(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`mix64` of each element of a uint64 array, whose products wrap by themselves."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """A 64-bit key that depends on every part (taken modulo 2**64) and on their order."""
    key = 0
    for part in parts:
        key = mix64((key + GOLDEN & MASK) ^ mix64(part & MASK))
    return key


def derive_keys(keys: npt.NDArray[np.uint64], *parts: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`derive_key` goes on from each of `keys` with the parts: from derive_key(a) by b to derive_key(a, b)."""
    for part in parts:
        keys = mix64_array((keys + np.uint64(GOLDEN)) ^ mix64_array(part))
    return keys


def permute(index: Ints, size: int, key: int) -> Ints:
    """Image of each `index` (int64, in [0, size)) under the key's pseudo-random bijection of range(size).

    The domain is a grid of about sqrt(size) x sqrt(size) cells, so about one index in sqrt(size) at most walks on.
    """
    if size < 2:
        return index.copy()
    width = math.isqrt(size)
    height = -(-size // width)
    out = _feistel(index.astype(np.uint64), height, width, key)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        walked = _feistel(out[outside], height, width, key)
        out[outside] = walked
        outside = outside[walked >= size]
    return out.astype(np.int64)


def _feistel(x: npt.NDArray[np.uint64], height: int, width: int, key: int) -> npt.NDArray[np.uint64]:
    rows, columns = np.uint64(height), np.uint64(width)
    row, column = x // columns, x % columns
    for i in range(0, 2 * ROUNDS, 2):
        row = (row + mix64_array(column + np.uint64(mix64(key + i & MASK))) % rows) % rows
        column = (column + mix64_array(row + np.uint64(mix64(key + i + 1 & MASK))) % columns) % columns
    return row * columns + column


@dataclass(frozen=True)
class Layout:
    """Where the samples of one source lie: two cumulative counts per shard."""

    run_length: int
    ends: Ints
    """Cumulative samples that belong to full runs of `run_length`, int64 [shards]."""
    rest_ends: Ints
    """Cumulative samples that are left over at the shards' ends, int64 [shards]."""

    window: int = 0
    """Shards whose samples are shuffled among one another; 0: all."""
    windows: "dict[int, Windows]" = field(default_factory=dict, repr=False, compare=False)
    """The last ones, by the key of their epoch."""

    @property
    def samples(self) -> int:
        return int(self.ends[-1] + self.rest_ends[-1]) if self.ends.size else 0


def make_layout(shard_samples: Sequence[int] | Ints, run_length: int, window: int = 0) -> Layout:
    """The layout of shards with these sample counts, to be read in runs of `run_length` consecutive samples.

    window: as in `Layout`.
    """
    if run_length < 1:
        raise ValueError(f"run_length is {run_length}; it must be at least 1")
    counts = np.asarray(shard_samples, dtype=np.int64)
    rest = counts % run_length
    whole = counts - rest
    return Layout(run_length, np.cumsum(whole, out=whole), np.cumsum(rest, out=rest), window)


def locate(layout: Layout, index: Ints) -> tuple[Ints, Ints]:
    """(shard, sample within the shard) of each index in [0, samples), both int64.

    Indices count the samples of all full runs first, shard after shard, and then the left-over samples of the shards'
    ends: so every run but the very last has the same length, and position -> run needs no table.
    """
    full = layout.ends[-1]
    whole = index < full
    shard = np.empty_like(index)
    shard[whole] = np.searchsorted(layout.ends, index[whole], side="right")
    shard[~whole] = np.searchsorted(layout.rest_ends, index[~whole] - full, side="right")

    begin = np.where(shard > 0, layout.ends[shard - 1], 0)
    rest_begin = np.where(shard > 0, layout.rest_ends[shard - 1], 0)
    in_rest = layout.ends[shard] - begin + index - full - rest_begin
    return shard, np.where(whole, index - begin, in_rest)


def source_order(layout: Layout, key: int, positions: Ints) -> tuple[Ints, Ints]:
    """(shard, sample within the shard) at these positions (int64, in [0, samples)) of the order that `key` names.

    The one run that may be short is put at a place of its own, so that it is not the end of every epoch.
    """
    if layout.window:
        return _windowed_order(layout, key, positions)
    length = layout.run_length
    full_runs, short = divmod(layout.samples, length)
    hole = derive_key(key, 1) % (full_runs + 1) * length
    in_hole = (positions >= hole) & (positions < hole + short)
    run, within = np.divmod(np.where(positions < hole, positions, positions - short), length)
    index = np.where(in_hole, full_runs * length + positions - hole, 0)
    index[~in_hole] = permute(run[~in_hole], full_runs, key) * length + within[~in_hole]
    return locate(layout, index)


@dataclass(frozen=True)
class Windows:
    """The shards of a source in the order of one epoch, which its windows take one after the other."""

    shards: Ints
    """Permuted, int64 [shards]."""
    counts: Ints
    """Samples of each of them, int64 [shards]."""
    ends: Ints
    """Cumulative samples of the windows, int64 [windows]."""


def _windowed_order(layout: Layout, key: int, positions: Ints) -> tuple[Ints, Ints]:
    """`source_order` by windows: shards in random order, and of each window of them the runs in random order."""
    windows = _windows(layout, key)
    window = np.searchsorted(windows.ends, positions, side="right")
    shard, sample = np.empty_like(positions), np.empty_like(positions)
    for one in range(int(window.min()), int(window.max()) + 1) if positions.size else ():
        mine = np.flatnonzero(window == one)
        if not mine.size:
            continue
        inside = slice(one * layout.window, (one + 1) * layout.window)
        begin = int(windows.ends[one - 1]) if one else 0
        within = make_layout(windows.counts[inside], layout.run_length)
        place, sample[mine] = source_order(within, derive_key(key, 2, one), positions[mine] - begin)
        shard[mine] = windows.shards[inside][place]
    return shard, sample


def _windows(layout: Layout, key: int) -> Windows:
    """Those of the epoch that `key` names; kept with the layout, for a loader asks for them through a whole epoch."""
    if key not in layout.windows:
        counts = np.diff(layout.ends, prepend=0) + np.diff(layout.rest_ends, prepend=0)
        shards = permute(np.arange(counts.size), counts.size, derive_key(key, 3))
        counts = counts[shards]
        ends = np.add.reduceat(counts, np.arange(0, counts.size, layout.window)).cumsum()
        if len(layout.windows) > 1:
            layout.windows.clear()
        layout.windows[key] = Windows(shards, counts, ends)
    return layout.windows[key]


def interleave(counts: Sequence[int], positions: Ints) -> tuple[Ints, Ints]:
    """(source, position within that source) when sources of these counts are spread evenly over sum(counts) positions.

    Every stretch of the result holds each source in its share, up to one sample per source. `positions`: int64.
    """
    source = np.zeros_like(positions)
    within = positions.copy()
    remaining = np.arange(positions.size)
    for i in range(len(counts) - 1):
        # Sources i+1.. together take `others` of these positions: of the first p, exactly p * others // total.
        others, total = sum(counts[i + 1 :]), sum(counts[i:])
        p = within[remaining]
        taken = _scaled_floor(p, others, total)
        theirs = _scaled_floor(p + 1, others, total) > taken
        within[remaining] = np.where(theirs, taken, p - taken)
        source[remaining[theirs]] = i + 1
        remaining = remaining[theirs]
    return source, within


def _scaled_floor(p: Ints, numerator: int, denominator: int) -> Ints:
    """p * numerator // denominator without overflow for the near-by positions of one batch."""
    if not p.size:
        return p
    base = int(p[0])
    whole, part = divmod(base * numerator, denominator)
    return whole + (part + (p - base) * numerator) // denominator


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch over one or more sources; `locate` is the whole of it."""

    layouts: tuple[Layout, ...]
    counts: tuple[int, ...]
    """Samples each source gives to the epoch; the first gives each of its samples once."""
    keys: tuple[int, ...]
    """One per source: names the source and the seed."""
    epoch: int

    @property
    def samples(self) -> int:
        return sum(self.counts)

    def locate(self, positions: Ints) -> tuple[Ints, Ints, Ints]:
        """(source, shard, sample within the shard) of these positions of the epoch; all int64."""
        source, within = interleave(self.counts, positions)
        shard, sample = np.empty_like(positions), np.empty_like(positions)
        for i, layout in enumerate(self.layouts):
            mine = np.flatnonzero(source == i)
            # A source drawn by weight goes on where the last epoch stopped: its own passes, each in a new order.
            passes, place = np.divmod(within[mine] + self.epoch * self.counts[i], layout.samples)
            for one in range(int(passes.min()), int(passes.max()) + 1) if passes.size else ():
                chosen = passes == one
                rows = mine[chosen]
                shard[rows], sample[rows] = source_order(layout, derive_key(self.keys[i], int(one)), place[chosen])
        return source, shard, sample


def epoch_order(
    layouts: Sequence[Layout], digests: Sequence[str], weights: Sequence[float], seed: int, epoch: int
) -> EpochOrder:
    """The order of `epoch`: a pure function of the sources' digests (hex), layouts and weights, the seed and the epoch.

    weights[i] is the number of samples of source i per sample of source 0 (weights[0] is not used).
    Raises ValueError where there is nothing to read.
    """
    main = layouts[0].samples
    counts = [main] + [round(weight * main) for weight in weights[1:]]
    for i, (layout, count) in enumerate(zip(layouts, counts, strict=True)):
        if not layout.samples or not count:
            raise ValueError(f"source {i} gives no sample: it has {layout.samples}, {count} are asked for per epoch")
    keys = [derive_key(int(digest[:16], 16), seed, i) for i, digest in enumerate(digests)]
    return EpochOrder(tuple(layouts), tuple(counts), tuple(keys), epoch)


def micro_batch_rows(samples: int, rank: int, world_size: int, accumulation_steps: int, micro: int) -> Ints:
    """Places (int64) within a global batch of `samples` that micro-batch `micro` of `rank` holds; -1 is a padding row.

    Each rank owns one contiguous block, so that runs are read whole in any world; the first ranks have one sample more
    where they do not divide. Every rank and micro-batch of a step has the same number of rows.
    """
    rows = -(-samples // (world_size * accumulation_steps))
    share, longer = divmod(samples, world_size)
    begin, count = rank * share + min(rank, longer), share + (rank < longer)
    within = np.arange(micro * rows, (micro + 1) * rows, dtype=np.int64)
    return np.where(within < count, begin + within, -1)


def choose_captions(count: int, limit: int, image: int, seed: int, epoch: int) -> list[int]:
    """Which `limit` of an image's `count` captions this epoch shows, ascending; `image` is a stable hash of its id."""
    if count <= limit:
        return list(range(count))
    key = derive_key(image, seed, epoch)
    return sorted(sorted(range(count), key=lambda i: (mix64(key + i & MASK), i))[:limit])
