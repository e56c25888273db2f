"""Rates and sums between two log lines, and the watch over steps that were skipped.

The surprise: what comes from the device stays there until a line is due, so that measuring never makes the host wait
for a GPU.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import Tensor

from sat.engine.engine import StepResult
from sat.engine.processes import Processes
from sat.train_state import LineSums

T = TypeVar("T")
OVERFLOWS_ALLOWED = 40
"""Steps in a row that fp16 may take to find its loss scale, beside those that may be skipped: 2^40 is none."""


@dataclass(frozen=True)
class AttentionUse:
    """How widely attention is spread, as sums over words."""

    words: float = 0.0
    entropy: float = 0.0
    """Of alpha, in nats."""
    top: float = 0.0
    """The greatest weight of alpha."""

    def __add__(self, other: "AttentionUse") -> "AttentionUse":
        return AttentionUse(self.words + other.words, self.entropy + other.entropy, self.top + other.top)

    @property
    def effective_cells(self) -> float:
        """Exp of the mean entropy: L where alpha is even, 1 where it is one cell; NaN where there were no words."""
        return math.exp(self.entropy / self.words) if self.words else math.nan

    def values(self) -> dict[str, float]:
        """By name, as the journal holds them, the second is the mean weight of the first cell; none without words."""
        if not self.words:
            return {}
        return {"effective_cells": self.effective_cells, "top_cell": self.top / self.words}


@dataclass(frozen=True)
class Sampling:
    """Of self-critical training: what its samples brought, and where the time went."""

    reward: float
    """Mean of the samples."""
    baseline: float
    """Mean of what their rewards are compared with."""
    sampling_share: float
    """Share of the time in which captions are drawn, encoding included."""
    reward_share: float
    """And rewarded; the gradient takes the rest, but for waiting for data."""

    @classmethod
    def of(cls, sums: LineSums, ranks: int) -> "Sampling | None":
        """None where nothing was sampled."""
        total, captions, seconds = sums.totals, max(sums.captions, 1), sums.seconds * ranks
        if "reward" not in total:
            return None
        shares = (total[f"{name}_seconds"] / seconds for name in ("sampling", "reward"))
        return cls(total["reward"] / captions, total["baseline"] / captions, *shares)


@dataclass(frozen=True)
class JournalLine:
    """What a line of `metrics.jsonl` says of the steps since the last one, over all ranks."""

    nll_per_token: float
    """Nats; of the steps that were not skipped. NaN where all were."""
    penalty_per_caption: float
    accuracy: float
    """Share of the tokens whose most probable prediction is right."""
    learning_rate: float
    """Of the last step."""
    gradient_norm: float
    """Of the last step, before clipping."""
    captions_per_s: float
    data_wait_share: float
    """Share of the time that a rank waited for data."""
    seconds_per_step: float
    bad_samples: int = 0
    """Left out while reading."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    overflowed_steps: int = 0
    """Steps that only set fp16's loss scale right."""
    attention: "AttentionUse | None" = None
    """Of the steps that were not skipped; None without attention."""
    sampling: "Sampling | None" = None
    """The same; its words are then those that are counted above. None where human captions are learnt."""

    def values(self) -> dict[str, float]:
        """By name, as the journal holds them: what is rare only where it is not zero."""
        rare = ("bad_samples", "skipped_steps", "overflowed_steps")
        parts = ("attention", "sampling")
        numbers = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in parts}
        numbers = {name: value for name, value in numbers.items() if value or name not in rare}
        spread = self.attention.values() if self.attention else {}
        sampled = vars(self.sampling) if self.sampling else {}
        return numbers | sampled | {f"attention/{name}": value for name, value in spread.items()}


@dataclass(frozen=True)
class Step:
    """What the meter is told of one optimizer step."""

    counts: list[dict[str, Tensor]]
    """`LossSums.counts` of this rank's micro-batches."""
    captions: float
    """Of the global batch."""
    rate: float
    bad_samples: int
    result: StepResult


@dataclass
class Meter:
    """Filled by each step, emptied by `line`."""

    before: LineSums = field(default_factory=LineSums)
    """Of the steps of an earlier life since the last line."""
    steps: list[Step] = field(default_factory=list)
    waited: float = 0.0
    """Seconds this rank waited for data."""
    began: float = field(default_factory=time.perf_counter)

    def wait_for(self, fetch: Callable[[], T]) -> T:
        """The result of `fetch()`, its time booked as waiting for data."""
        began = time.perf_counter()
        result = fetch()
        self.waited += time.perf_counter() - began
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside (an evaluation, say) out of the rates."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def sums(self, processes: Processes) -> LineSums:
        """Since the last line. All ranks enter."""
        steps, seconds = self.steps, time.perf_counter() - self.began
        if not steps:
            return self.before
        skipped = [bool(each) for each in torch.stack([step.result.skipped for step in steps]).tolist()]
        taken = [step for step, left_out in zip(steps, skipped, strict=True) if not left_out]
        names, sums = _sums([each for step in taken for each in step.counts])
        *sums, waited, bad = processes.sum_over_ranks([*sums, self.waited, sum(step.bad_samples for step in steps)])
        totals = dict(zip(names, sums, strict=True))
        return self.before + LineSums(
            steps=len(steps),
            skipped=sum(skipped),
            overflowed=int(torch.stack([step.result.overflowed for step in steps]).sum()),
            tokens=totals.get("tokens", 0.0),
            captions=sum(step.captions for step in taken),
            all_captions=sum(step.captions for step in steps),
            bad_samples=bad,
            waited=waited / processes.world_size,
            seconds=seconds,
            totals=totals,
        )

    def line(self, processes: Processes) -> JournalLine:
        """Sums and averages since the last line, with at least one step of ours; the meter starts again.

        All ranks enter.
        """
        sums, last = self.sums(processes), self.steps[-1]
        self.before, self.steps, self.waited, self.began = LineSums(), [], 0.0, time.perf_counter()
        total, nothing = sums.totals, 0.0 if sums.steps > sums.skipped else math.nan
        tokens, captions = max(sums.tokens, 1), max(sums.captions, 1)
        use = AttentionUse(sums.tokens, total["entropy"], total["top"]) if "entropy" in total else None
        return JournalLine(
            nll_per_token=total.get("nll", nothing) / tokens,
            penalty_per_caption=total.get("penalty", nothing) / captions,
            accuracy=total.get("correct", nothing) / tokens,
            learning_rate=last.rate,
            gradient_norm=float(last.result.gradient_norm),
            captions_per_s=sums.all_captions / sums.seconds,
            data_wait_share=sums.waited / sums.seconds,
            seconds_per_step=sums.seconds / sums.steps,
            bad_samples=int(sums.bad_samples),
            skipped_steps=sums.skipped - sums.overflowed,
            overflowed_steps=sums.overflowed,
            attention=use,
            sampling=Sampling.of(sums, processes.world_size),
        )


def _sums(parts: list[dict[str, Tensor]]) -> tuple[list[str], list[float]]:
    """Names and float64 sums of the counts of these micro-batches; waits for the device."""
    names = sorted(parts[0]) if parts else []
    rows = [torch.stack([part[name].float() for name in names]) for part in parts]
    return names, torch.stack(rows).double().sum(0).tolist() if rows else []


@dataclass
class Watch:
    """Notices a training that does not get on any more: too many steps in a row that were skipped."""

    allowed: int
    unread: deque[StepResult] = field(default_factory=deque)
    skipped: int = 0
    """In a row, up to now."""
    overflowed: int = 0

    def see(self, result: StepResult) -> bool:
        """Whether there have been too many. On a GPU it looks at the step before, as the last one is still at work."""
        self.unread.append(result)
        if len(self.unread) > (result.skipped.device.type == "cuda"):
            self._count(self.unread.popleft())
        return self.skipped > self.allowed or self.skipped + self.overflowed > self.allowed + OVERFLOWS_ALLOWED

    def _count(self, result: StepResult) -> None:
        if not result.skipped:
            self.skipped = self.overflowed = 0
        elif result.overflowed:
            self.overflowed += 1
        else:
            self.skipped += 1
