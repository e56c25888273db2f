"""Which pictures a report shows: the best, the worst, the most confidently wrong, and some at random."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sat.report.reading import Claim, RunReport

WRONG_SHARE = 0.25
"""Where the truth is not known, this share of the pictures, those of the lowest scores, count as wrong."""


@dataclass(frozen=True)
class Section:
    """Pictures for one reason."""

    title: str
    why: str
    image_ids: tuple[str, ...]


def ranking_metric(runs: Sequence[RunReport]) -> str:
    """CIDEr, or the first metric that all runs have of each picture; empty where there is none."""
    common = [name for name in runs[0].table.per_image if all(name in run.table.per_image for run in runs)]
    return "CIDEr" if "CIDEr" in common else next(iter(common), "")


def choose(runs: Sequence[RunReport], count: int, every: bool, seed: int = 0) -> list[Section]:
    """Sections of at most `count` pictures each, by the first run; `every`: all pictures in place of random ones.

    With several runs also the pictures on which these differ most.
    """
    ids = tuple(runs[0].captions)
    drawn = np.random.default_rng(seed).permutation(len(ids))
    sections = [*_by_score(runs, count), *_wrong(runs, count)]
    if every:
        return [*sections, Section("All pictures", f"{len(ids):,}, by name.", ids)]
    chosen = np.sort(drawn[:count])
    return [*sections, Section("At random", f"{len(chosen)} of {len(ids):,}.", _named(ids, chosen))]


def is_wholly_true(claims: Sequence[Claim]) -> bool:
    """Whether something is claimed and all of it holds."""
    return bool(claims) and all(each.holds for each in claims)


def per_word(log_probability: float, caption: str) -> float:
    """Mean log-probability of a caption's words, its end counted."""
    return log_probability / (len(caption.split()) + 1)


def _by_score(runs: Sequence[RunReport], count: int) -> list[Section]:
    table, metric = runs[0].table, ranking_metric(runs)
    if not metric:
        return []
    order, ids = np.argsort(-table.per_image[metric], kind="stable"), table.image_ids
    sections = []
    if len(runs) > 1:
        spread = np.ptp([run.table.per_image[metric] for run in runs], axis=0)
        apart = np.argsort(-spread, kind="stable")[:count]
        why = f"Where the runs' {metric} is furthest apart."
        sections.append(Section("Where they differ most", why, _named(ids, apart[spread[apart] > 0])))
    best = Section("Best", f"The highest {metric}{_whose(runs)}.", _named(ids, order[:count]))
    worst = Section("Worst", f"The lowest {metric}{_whose(runs)}.", _named(ids, order[::-1][:count]))
    return [*sections, best, worst]


def _wrong(runs: Sequence[RunReport], count: int) -> list[Section]:
    """Of the captions that are wrong the surest; none where neither truth nor scores tell which these are."""
    table, claims, metric = runs[0].table, runs[0].claims, ranking_metric(runs)
    false = np.zeros(len(table.image_ids), dtype=bool)
    if claims:
        false[:] = [not is_wholly_true(claims.get(image, ())) for image in table.image_ids]
        what = "Captions with a false claim, or none"
    elif metric:
        lowest = max(1, round(WRONG_SHARE * len(false)))
        false[np.argsort(table.per_image[metric], kind="stable")[:lowest]] = True
        what = f"Captions in the lowest {WRONG_SHARE:.0%} of the scores"
    else:
        return []
    sure = [per_word(*each) for each in zip(table.log_probabilities, table.captions, strict=True)]
    order = np.argsort(-np.array(sure), kind="stable")
    why = f"{what}{_whose(runs)}, the most probable per word first."
    return [Section("Most confidently wrong", why, _named(table.image_ids, order[false[order]][:count]))]


def _whose(runs: Sequence[RunReport]) -> str:
    return f" of {runs[0].name}" if len(runs) > 1 else ""


def _named(ids: Sequence[str], rows: np.ndarray) -> tuple[str, ...]:
    return tuple(ids[row] for row in rows.tolist())
