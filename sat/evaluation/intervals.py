"""How sure a score is: bootstrap intervals over the pictures of a split (Efron 1979; Koehn 2004 for BLEU).

A metric is a function of sums over pictures: CIDEr, CIDEr-D, METEOR and ROUGE-L of the sum of each picture's score,
corpus BLEU of the sums of its counts. So a resample of the pictures is one row of weights (how often each was drawn),
and all resamples of all metrics are one matrix product. CIDEr's document frequencies stay those of the whole split.

The surprising decision: METEOR's corpus score is not the mean of its pictures' scores (it weighs long captions more),
so its resampled means are moved by that difference.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
NO_PENALTY = tuple(f"{name}-no-BP" for name in BLEU)
"""BLEU without brevity penalty."""
CHUNK = 1 << 22
"""Weights held at once."""
TINY, SMALL = 1e-15, 1e-9
"""pycocoevalcap's, against divisions by zero."""


class Scored(Protocol):
    """What intervals need of `Scores` or of a `ScoreTable`."""

    @property
    def per_image(self) -> Mapping[str, Floats]: ...

    @property
    def bleu_counts(self) -> npt.NDArray[np.int64]: ...

    @property
    def values(self) -> Mapping[str, float | None]: ...


@dataclass(frozen=True)
class Interval:
    """Where a score lies with the confidence that was asked for."""

    low: float
    high: float


@dataclass(frozen=True)
class Metrics:
    """How metrics come from sums over pictures of M numbers: one per metric (BLEU: zero), then the counts of BLEU."""

    names: tuple[str, ...]
    images: int

    def numbers(self, scored: Scored) -> Floats:
        """[images, M] whose sums are to be given to `values`."""
        nothing = np.zeros(self.images)
        means = [nothing if name in (*BLEU, *NO_PENALTY) else scored.per_image[name] for name in self.names]
        return np.column_stack([*means, scored.bleu_counts]).astype(np.float64)

    def values(self, sums: Floats) -> Floats:
        """Sums [..., M] over as many pictures as there are -> metrics [..., names]."""
        found = sums[..., : len(self.names)] / self.images
        for names, brevity_penalty in ((BLEU, True), (NO_PENALTY, False)):
            if set(names) & set(self.names):
                corpus = corpus_bleu(sums[..., len(self.names) :], brevity_penalty)
                for column, name in enumerate(self.names):
                    if name in names:
                        found[..., column] = corpus[..., names.index(name)]
        return found

    def offsets(self, scored: Scored) -> Floats:
        """[names] what is to be added for the corpus score: zero for all but METEOR."""
        found = self.values(self.numbers(scored).sum(0))
        known = [scored.values.get(name) for name in self.names]
        shifts = [
            (value if value is not None else mean) - mean if name == "METEOR" else 0.0
            for name, value, mean in zip(self.names, known, found.tolist(), strict=True)
        ]
        return np.array(shifts)


def metrics_of(scored: Scored) -> tuple[str, ...]:
    """The metrics that sums over pictures give: those with a score per picture, and BLEU without brevity penalty."""
    from_counts = (name for name in NO_PENALTY if scored.values.get(name) is not None)
    return (*scored.per_image, *from_counts)


def corpus_bleu(counts: Floats, brevity_penalty: bool = True) -> Floats:
    """BLEU-1..4 [..., 4] of summed counts [..., 10] (Papineni et al. 2002), as pycocoevalcap computes it.

    The counts: clipped matches of 1 to 4 words, their totals, words of the hypotheses and of the nearest references.
    """
    precisions = (counts[..., :4] + TINY) / (counts[..., 4:8] + SMALL)
    ratio = (counts[..., 8] + TINY) / (counts[..., 9] + SMALL)
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    bleu: Floats = np.cumprod(precisions, -1) ** (1 / np.arange(1, 5))
    return bleu * brevity[..., None] if brevity_penalty else bleu


def resamples_of(images: int, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Weights [r, images] in chunks, `resamples` rows in all: how often a draw with replacement took each picture."""
    size = max(1, CHUNK // max(images, 1))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = rng.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)


def bootstrap_all(
    scored: Scored, metrics: Sequence[str] = (), resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """The percentile interval of each of the metrics, by default of all of `metrics_of`.

    All share their resamples. Raises ValueError for fewer than two pictures, a level outside 0 to 1, or no resamples.
    """
    wanted = list(metrics or metrics_of(scored))
    images = len(scored.bleu_counts)
    check(images, resamples, level)
    how = Metrics(tuple(wanted), images)
    numbers, rng = how.numbers(scored), np.random.default_rng(seed)
    found = np.concatenate([how.values(weights @ numbers) for weights in resamples_of(images, resamples, rng)])
    return {
        name: percentiles(found[:, column] + offset, level)
        for column, (name, offset) in enumerate(zip(wanted, how.offsets(scored).tolist(), strict=True))
    }


def bootstrap(scored: Scored, metric: str, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """The percentile interval of one metric. Raises ValueError as `bootstrap_all`, and for a metric not scored."""
    if metric not in metrics_of(scored):
        raise ValueError(f"{metric} has no score per picture; there are {', '.join(metrics_of(scored)) or 'none'}")
    return bootstrap_all(scored, [metric], resamples, level, seed)[metric]


def check(images: int, resamples: int, level: float) -> None:
    """Raise ValueError for what allows no interval."""
    if images < 2:
        raise ValueError(f"an interval needs at least 2 pictures, there are {images}")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be above 0 and below 1, e.g. 0.95")


def percentiles(values: Floats, level: float) -> Interval:
    """The middle `level` of the values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
