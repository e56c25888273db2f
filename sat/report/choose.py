"""Which pictures a report shows: the best, the worst, the most confidently wrong, and some at random."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sat.evaluation.score_table import Floats, ScoreTable
from sat.report.reading import Claim, RunReport

WRONG_SHARE = 0.25
"""Where the truth is not known, this share of the pictures, those of the lowest scores, count as wrong."""


@dataclass(frozen=True)
class Section:
    """Pictures for one reason."""

    title: str
    why: str
    image_ids: tuple[str, ...]


def ranking_metric(table: ScoreTable) -> str:
    """CIDEr, or the first metric there is. Raises ValueError where there is none."""
    if not table.per_image:
        raise ValueError("no picture has a score of its own; run sat evaluate again")
    return "CIDEr" if "CIDEr" in table.per_image else next(iter(table.per_image))


def choose(runs: Sequence[RunReport], count: int, every: bool, seed: int = 0) -> list[Section]:
    """Sections of at most `count` pictures each, by the first run; `every`: all pictures in place of random ones.

    With several runs also the pictures on which these differ most.
    """
    table, claims = runs[0].table, runs[0].claims
    metric = ranking_metric(table)
    scores, ids = table.per_image[metric], table.image_ids
    order = np.argsort(-scores, kind="stable")
    whose = f" of {runs[0].name}" if len(runs) > 1 else ""
    wrong, what = _wrong(table, scores, claims)
    sections = []
    if len(runs) > 1:
        spread = np.ptp([run.table.per_image[metric] for run in runs], axis=0)
        apart = np.argsort(-spread, kind="stable")[:count]
        why = f"Where the runs' {metric} is furthest apart."
        sections.append(Section("Where they differ most", why, _named(ids, apart[spread[apart] > 0])))
    sections += [
        Section("Best", f"The highest {metric}{whose}.", _named(ids, order[:count])),
        Section("Worst", f"The lowest {metric}{whose}.", _named(ids, order[::-1][:count])),
        Section(
            "Most confidently wrong", f"{what}{whose}, the most probable per word first.", _named(ids, wrong[:count])
        ),
    ]
    if every:
        return [*sections, Section("All pictures", f"{len(ids):,}, by name.", ids)]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(ids))[:count])
    return [*sections, Section("At random", f"{len(drawn)} of {len(ids):,}.", _named(ids, drawn))]


def is_wholly_true(claims: Sequence[Claim]) -> bool:
    """Whether something is claimed and all of it holds."""
    return bool(claims) and all(each.holds for each in claims)


def confidence(table: ScoreTable) -> Floats:
    """[images] Mean log-probability of a caption's words, its end counted."""
    lengths = [len(caption.split()) + 1 for caption in table.captions]
    confident: Floats = table.log_probabilities / lengths
    return confident


def _wrong(table: ScoreTable, scores: Floats, claims: Mapping[str, Sequence[Claim]]) -> tuple[np.ndarray, str]:
    """Rows of the captions that are wrong, the surest first, and what makes them so."""
    if claims:
        false = np.array([not is_wholly_true(claims.get(image, ())) for image in table.image_ids], dtype=bool)
        what = "Captions with a false claim, or none"
    else:
        false = np.zeros(len(scores), dtype=bool)
        false[np.argsort(scores, kind="stable")[: max(1, round(WRONG_SHARE * len(scores)))]] = True
        what = f"Captions in the lowest {WRONG_SHARE:.0%} of the scores"
    order = np.argsort(-confidence(table), kind="stable")
    return order[false[order]], what


def _named(ids: Sequence[str], rows: np.ndarray) -> tuple[str, ...]:
    return tuple(ids[row] for row in rows.tolist())
