"""What a checkpoint knows beside its tensors: where training stands, and which training it is.

The surprise: the length of a training is not part of what it is. With more `train.epochs` a finished run goes on, under
the longer schedule from there.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sat import files
from sat.config import Config, fixed_settings
from sat.data.plan import Cursor

FILE = "state.json"
FORMAT = 2
"""Of a checkpoint's files: tensors by name, for every engine."""


@dataclass(frozen=True)
class Progress:
    """Where training stands."""

    cursor: Cursor
    step: int = 0
    """Optimizer steps taken, those that were skipped included."""
    best_cider: float = -1.0
    best_step: int = 0
    evaluations_without_gain: int = 0
    evaluated_step: int = 0
    """Of the last evaluation that has its scores; a checkpoint comes before the evaluation of its step."""


@dataclass(frozen=True)
class Identity:
    """What makes a training this one. Workers, ranks, lengths and evaluation may change between its lives."""

    settings: dict[str, object]
    """Those that may not change (`sat.config.fixed_settings`)."""
    features: list[list[str | float]]
    """Digest and weight of each data set."""
    tokenizer: str
    """Digest."""

    def refuse(self, current: "Identity") -> None:
        """Raise ValueError, naming both values of each difference, unless `current` is the same training."""
        refuse_other_settings(self._flat(), current._flat())

    def _flat(self) -> dict[str, object]:
        others = dataclasses.asdict(self)
        settings: dict[str, object] = others.pop("settings")
        return settings | others


@dataclass(frozen=True)
class LineSums:
    """What a line of the journal is made of, over all ranks; a checkpoint between two lines takes it to the next life.

    Of the steps that were not skipped, but for those numbers that say otherwise.
    """

    steps: int = 0
    """All."""
    skipped: int = 0
    overflowed: int = 0
    tokens: float = 0.0
    captions: float = 0.0
    all_captions: float = 0.0
    bad_samples: float = 0.0
    """Of all steps."""
    waited: float = 0.0
    """Seconds for data, mean over the ranks."""
    seconds: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of `LossSums.counts`."""

    def __add__(self, other: "LineSums") -> "LineSums":
        names = sorted(self.totals | other.totals)
        totals = {name: self.totals.get(name, 0.0) + other.totals.get(name, 0.0) for name in names}
        numbers = [each.name for each in dataclasses.fields(self) if each.name != "totals"]
        return LineSums(totals=totals, **{name: getattr(self, name) + getattr(other, name) for name in numbers})


JournalValues = dict[str, float | None]
"""Of a line, by name."""


@dataclass(frozen=True)
class Unscored:
    """An evaluation of which the captions are there and the scores are not yet; a checkpoint takes it along."""

    step: int
    split: str
    captions: dict[str, str]
    """image_id -> caption."""
    values: JournalValues
    """What the journal is to hold beside the scores, without the split's name."""
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Those that captioned, on rank 0's host; in a checkpoint they are with the other tensors."""
    lines: tuple[tuple[int, JournalValues], ...] = ()
    """(step, values) of the journal since, which come after the scores; on rank 0."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the weights."""
        lines = [[step, {name: _finite(value) for name, value in values.items()}] for step, values in self.lines]
        known = {name: getattr(self, name) for name in ("step", "split", "captions", "values")}
        return known | {"lines": lines}

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> "Unscored":
        """Inverse of `to_dict`."""
        lines = tuple(
            (step, {name: _number(value) for name, value in values.items()}) for step, values in known["lines"]
        )
        return cls(**known | {"lines": lines})


def _finite(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinities."""
    return value if value is None or math.isfinite(value) else str(value)


def _number(value: float | str | None) -> float | None:
    return float(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class TrainState:
    """Of one checkpoint."""

    progress: Progress
    identity: Identity
    total_steps: int
    """Length of the schedule it was written under."""
    written_by: str
    """Engine and number of ranks, which the next life may change."""
    learning_rate: float = 0.0
    """Peak of the schedule it was written under, which the next life may change."""
    unlogged: LineSums = field(default_factory=LineSums)
    unscored: Unscored | None = None

    def write(self, folder: Path) -> None:
        """Write it below the checkpoint `folder`."""
        identity = self.identity._flat()
        progress = dataclasses.asdict(self.progress)
        about: dict[str, object] = {"total_steps": self.total_steps, "written_by": self.written_by, "format": FORMAT}
        about |= {"learning_rate": self.learning_rate, "unlogged": dataclasses.asdict(self.unlogged)}
        about |= {"unscored": self.unscored.to_dict()} if self.unscored else {}
        files.write_json(folder / FILE, {"progress": progress, "identity": identity, **about})

    @classmethod
    def read(cls, folder: Path) -> "TrainState":
        """Inverse of `write`. Raises ValueError for a checkpoint of another version of this program."""
        saved: dict[str, Any] = json.loads((folder / FILE).read_text())
        if (found := saved.get("format", 1)) != FORMAT:
            raise ValueError(
                f"{folder} has format {found}, this version continues format {FORMAT}: continue it with the version "
                "that wrote it, or begin a new train.run_dir with train.start_from, which takes a run's best model"
            )
        settings = dict(saved["identity"])
        others = {name: settings.pop(name) for name in ("features", "tokenizer")}
        progress = Progress(**saved["progress"] | {"cursor": Cursor.from_dict(saved["progress"]["cursor"])})
        about = {name: saved[name] for name in ("total_steps", "written_by", "learning_rate")}
        about["unscored"] = Unscored.from_dict(saved["unscored"]) if "unscored" in saved else None
        return cls(progress, Identity(settings, **others), unlogged=LineSums(**saved["unlogged"]), **about)


def refuse_other_settings(before: dict[str, object], now: dict[str, object]) -> None:
    """Raise ValueError, with both values of each, for settings that would make a started training another one."""
    before = fixed_settings(Config()) | before  # a setting that is newer than the run had its default's effect
    differing = [
        f"{name}: the run has {before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"the run folder's checkpoint belongs to another training ({'; '.join(differing)}); "
            "set these back, or give another train.run_dir"
        )


def finished_before(config: Config, saved: Config) -> bool:
    """Whether a run that has finished with the settings `saved` has nothing left to do under `config`.

    Raises ValueError where `config` is another training.
    """
    refuse_other_settings(fixed_settings(saved), fixed_settings(config))
    longer = config.train.epochs > saved.train.epochs
    return not longer and config.train.patience == saved.train.patience
