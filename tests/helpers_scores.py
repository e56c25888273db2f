"""Tables of scores for tests, of random numbers that hang together as real ones do."""

from dataclasses import replace

import numpy as np

from sat.evaluation.intervals import corpus_bleu
from sat.evaluation.score_table import ScoreTable

METRICS = ("CIDEr", "METEOR", "BLEU-1", "BLEU-4")


def random_counts(images: int, rng: np.random.Generator, quality: float = 0.5) -> np.ndarray:
    """[images, 10] counts of BLEU: matches of n words are no more than those of n - 1."""
    words = rng.integers(5, 15, images)
    totals = np.maximum(words[:, None] - np.arange(4), 0)
    matches = rng.binomial(totals, quality ** np.arange(1, 5))
    return np.column_stack([matches, totals, words, rng.integers(5, 15, images)])


def random_table(images: int = 40, seed: int = 0, gain: float = 0.0, noise: np.ndarray | None = None) -> ScoreTable:
    """A table whose pictures have difficulties that depend on nothing but their number; `gain` makes it better."""
    rng, difficulty = np.random.default_rng(seed), np.random.default_rng(images).random(images)
    noise = rng.normal(0, 0.1, images) if noise is None else noise
    counts = random_counts(images, rng)
    per_image = {name: np.round(difficulty + noise + gain, 6) for name in METRICS}
    values = {name: float(per_image[name].mean()) for name in METRICS} | {"METEOR": 0.25 + gain}
    values |= dict(zip(("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"), corpus_bleu(counts.sum(0)).tolist()))
    return ScoreTable(
        image_ids=tuple(f"{number:06d}" for number in range(images)),
        captions=tuple(f"caption {number} of {seed}" for number in range(images)),
        log_probabilities=rng.normal(-8, 2, images),
        finished=np.ones(images, dtype=bool),
        per_image=per_image,
        bleu_counts=counts,
        values={name: values[name] for name in METRICS},
        references_digest="d" * 64,
        signature=dict.fromkeys(METRICS, "some|refs:5"),
    )


def without(table: ScoreTable, *metrics: str) -> ScoreTable:
    """The same table of fewer metrics."""
    per_image = {name: each for name, each in table.per_image.items() if name not in metrics}
    values = dict(table.values) | dict.fromkeys(metrics)
    return replace(table, per_image=per_image, values=values)
