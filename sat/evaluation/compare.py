"""Whether one model is better than another on the same pictures: paired bootstrap and paired permutation.

A side is one run, or several that differ in their seed alone. Its score is the mean of its runs' corpus scores.

    interval    of the difference, by the percentile bootstrap. A resample draws pictures with replacement, the same for
                all runs, so that what is hard for both cancels out; and of a side with S > 1 runs it draws S - 1 runs
                with replacement, which gives the mean over runs its unbiased variance (Rao and Wu 1988). So with
                several runs the interval speaks of new pictures and new seeds, with one of new pictures alone. Of two
                or three runs nobody can know the scatter well: look at p_runs too
    p_pictures  by permutation: were the two sides alike, at each picture the captions of all runs could be dealt anew
                among them (Noreen 1989, approximate randomisation). The share of deals that are at least as far apart;
                it speaks of these very runs
    p_runs      by permutation of whole runs among the sides, of all of them where they are few: the test whose unit is
                the seed. With S against T runs it is at least 1 in (S + T choose S), where S = T twice that: 0.1 for 3
                against 3, 0.008 for 5 against 5. None unless both sides have at least 2 runs

All p-values are two-sided, and each is that of its own metric: nothing is corrected for looking at several.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np

from sat.evaluation.intervals import CHUNK, Floats, Metrics, check, metrics_of, percentiles, resamples_of
from sat.evaluation.score_table import ScoreTable

SPLITS_TRIED = 10_000
"""Assignments of runs to sides that are all tried; of more a random part is."""
CLOSE = 1e-12
"""Differences this close are equal: sums are rounded in another order."""


@dataclass(frozen=True)
class Side:
    """What is compared: runs that count as one."""

    name: str
    runs: Mapping[str, ScoreTable]
    """By folder."""


@dataclass(frozen=True)
class Difference:
    """Of one metric, side B less side A."""

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p_pictures: float
    p_runs: float | None


@dataclass(frozen=True)
class PictureDifference:
    """A picture on which the sides differ much."""

    image_id: str
    a: float
    b: float
    """Its score, in the mean over the side's runs."""
    captions_a: tuple[str, ...]
    captions_b: tuple[str, ...]
    """Of each run."""


@dataclass(frozen=True)
class Comparison:
    """Two sides on the pictures of a split."""

    a: Side
    b: Side
    images: int
    level: float
    resamples: int
    differences: tuple[Difference, ...]
    metric: str
    """By which pictures are ranked."""
    better: tuple[PictureDifference, ...]
    """Where B is better, the greatest difference first."""
    worse: tuple[PictureDifference, ...]


def compare(
    a: Side, b: Side, *, resamples: int = 1000, level: float = 0.95, seed: int = 0, pictures: int = 5
) -> Comparison:
    """Compare two sides. The same seed gives the same figures.

    Raises ValueError where they were not scored on the same pictures and references, or not in the same way.
    """
    metrics = common_metrics(a, b)
    first = next(iter(a.runs.values()))
    images = len(first.image_ids)
    check(images, resamples, level)
    how = Metrics(metrics, images)
    tables = [*a.runs.values(), *b.runs.values()]
    numbers = np.stack([how.numbers(each) for each in tables], 1)  # [images, runs, M]
    offsets = np.stack([how.offsets(each) for each in tables])  # [runs, metrics]
    sizes, rng = (len(a.runs), len(b.runs)), np.random.default_rng(seed)
    values = how.values(numbers.sum(0))  # [runs, metrics]
    scores = values + offsets
    resampled = np.concatenate(list(_resampled(numbers, offsets, how, sizes, resamples, rng)))
    p_pictures = _p_of_pictures(numbers, values, how, sizes, resamples, rng)
    means = [scores[: sizes[0]].mean(0), scores[sizes[0] :].mean(0)]
    differences = []
    for column, metric in enumerate(metrics):
        interval = percentiles(resampled[:, column], level)
        at, to = (float(mean[column]) for mean in means)
        p_runs = _p_of_runs(scores[:, column], sizes, rng)
        p = float(p_pictures[column])
        differences.append(Difference(metric, at, to, to - at, interval.low, interval.high, p, p_runs))
    by = "CIDEr" if "CIDEr" in metrics else metrics[0]
    better, worse = _pictures_apart(a, b, by, pictures)
    return Comparison(a, b, images, level, resamples, tuple(differences), by, better, worse)


def common_metrics(a: Side, b: Side) -> tuple[str, ...]:
    """The metrics that all runs have. ValueError where there are none, or runs are not to be compared."""
    (where, first), *others = [*a.runs.items(), *b.runs.items()]
    if len({*a.runs, *b.runs}) < len(a.runs) + len(b.runs):
        raise ValueError(f"{a.name} and {b.name} share runs; compare a run with others")
    for name, table in others:
        refuse_other_references(where, first, name, table)
    metrics = tuple(m for m in metrics_of(first) if all(m in metrics_of(table) for _, table in others))
    for name, table in others:
        for metric in sorted(first.signature.keys() & table.signature.keys()):
            if table.signature[metric] != first.signature[metric]:
                raise ValueError(
                    f"{metric} was computed in another way for {name} ({table.signature[metric]}) than for {where} "
                    f"({first.signature[metric]}); run sat evaluate on both again"
                )
    if not metrics:
        raise ValueError(f"{a.name} and {b.name} have no metric in common; run sat evaluate on both again")
    return metrics


def refuse_other_references(name: str, table: ScoreTable, other: str, theirs: ScoreTable) -> None:
    """Raise ValueError, naming both, unless two tables are of the same pictures and references."""
    if table.image_ids != theirs.image_ids:
        apart = sorted(set(table.image_ids) ^ set(theirs.image_ids))
        raise ValueError(
            f"{name} and {other} were scored on other pictures ({len(table.image_ids)} and {len(theirs.image_ids)}; "
            f"only one has {', '.join(apart[:3])}); evaluate both on the same split and features"
        )
    if table.references_digest != theirs.references_digest:
        raise ValueError(
            f"{name} and {other} were scored against other references ({table.references_digest[:12]} and "
            f"{theirs.references_digest[:12]}); evaluate both on the same split and features"
        )


def _resampled(
    numbers: Floats, offsets: Floats, how: Metrics, sizes: tuple[int, int], resamples: int, rng: np.random.Generator
) -> Iterator[Floats]:
    """Differences [r, metrics] of resampled pictures and runs."""
    images, runs, width = numbers.shape
    for weights in resamples_of(images, resamples, rng):
        sums = (weights @ numbers.reshape(images, -1)).reshape(-1, runs, width)
        scores = how.values(sums) + offsets  # [r, runs, metrics]
        of_a, of_b = (_run_weights(len(weights), size, rng) for size in sizes)
        signed = np.concatenate([-of_a, of_b], 1)  # [r, runs]
        yield np.einsum("rs,rsm->rm", signed, scores)


def _run_weights(rows: int, runs: int, rng: np.random.Generator) -> Floats:
    """[rows, runs] with which a side's runs count in each resample; they sum to 1."""
    if runs == 1:
        return np.ones((rows, 1))
    return np.stack([np.bincount(drawn, minlength=runs) for drawn in rng.integers(runs, size=(rows, runs - 1))]) / (
        runs - 1
    )


def _p_of_pictures(
    numbers: Floats, values: Floats, how: Metrics, sizes: tuple[int, int], deals: int, rng: np.random.Generator
) -> Floats:
    """[metrics] share of the deals, the real one among them, that set the sides at least as far apart."""
    images, runs, width = numbers.shape
    flat, columns = numbers.reshape(images * runs, width), np.arange(runs)
    signs = np.array([-1 / sizes[0]] * sizes[0] + [1 / sizes[1]] * sizes[1])
    real = np.abs(signs @ values)
    as_far, size = np.ones(len(how.names)), max(1, CHUNK // (images * runs))
    for start in range(0, deals, size):
        dealt = rng.random((min(size, deals - start), images, runs)).argsort(-1)  # the run whose caption each one gets
        scores = np.stack(
            [
                how.values((dealt[..., slot, None] == columns).reshape(len(dealt), -1).astype(np.float64) @ flat)
                for slot in columns
            ],
            1,
        )
        as_far += (np.abs(np.einsum("s,rsm->rm", signs, scores)) >= real - CLOSE).sum(0)
    share: Floats = as_far / (deals + 1)
    return share


def _p_of_runs(scores: Floats, sizes: tuple[int, int], rng: np.random.Generator) -> float | None:
    """Share of the ways to choose side A's runs among all that set the sides at least as far apart as they are."""
    if min(sizes) < 2:
        return None
    runs, total = sum(sizes), scores.sum()
    ways = math.comb(runs, sizes[0])
    if ways <= SPLITS_TRIED:
        chosen = np.array(list(combinations(range(runs), sizes[0])))
    else:
        dealt = rng.random((SPLITS_TRIED, runs)).argsort(-1)[:, : sizes[0]]
        chosen = np.concatenate([np.arange(sizes[0])[None], dealt])  # the real one among them
    sums = scores[chosen].sum(1)
    apart = np.abs((total - sums) / sizes[1] - sums / sizes[0])
    real = abs(scores[sizes[0] :].mean() - scores[: sizes[0]].mean())
    return float((apart >= real - CLOSE).mean())


def _pictures_apart(
    a: Side, b: Side, metric: str, count: int
) -> tuple[tuple[PictureDifference, ...], tuple[PictureDifference, ...]]:
    """The pictures where B is furthest above A, and those where it is furthest below."""
    of_a, of_b = (np.mean([each.per_image[metric] for each in side.runs.values()], 0) for side in (a, b))
    tables, ids = (list(a.runs.values()), list(b.runs.values())), next(iter(a.runs.values())).image_ids

    def picture(row: int) -> PictureDifference:
        captions = [tuple(each.captions[row] for each in side) for side in tables]
        return PictureDifference(ids[row], float(of_a[row]), float(of_b[row]), *captions)

    order = np.argsort(of_a - of_b, kind="stable")
    better = islice((row for row in order if of_b[row] > of_a[row]), count)
    worse = islice((row for row in order[::-1] if of_b[row] < of_a[row]), count)
    return tuple(map(picture, better)), tuple(map(picture, worse))
