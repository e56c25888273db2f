"""What is left of an evaluation: captions in COCO's format, the scores of the model and of what it is held against."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sat import files
from sat.evaluation.intervals import Interval, bootstrap_all
from sat.evaluation.metrics import Scores


@dataclass(frozen=True)
class Report:
    """The content of evaluation-SPLIT.json."""

    split: str
    images: int
    unfinished: int
    """Captions cut at the greatest length."""
    beam_size: int
    step: int
    """Of the training, when the model was exported."""
    scores: Mapping[str, Scores]
    """Of `model` and of each baseline."""
    attention: Mapping[str, float] = field(default_factory=dict)
    """How widely the model's attention is spread, see `sat.meter.AttentionUse`; empty without attention."""
    intervals: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    """95 % bootstrap intervals over the images, by the names of `scores` and metric."""
    search: Mapping[str, object] = field(default_factory=dict)
    """How the captions were searched for, and in which precision."""

    def to_document(self) -> dict[str, Any]:
        """The report as JSON; what could not be computed is null and has its reason under `missing`."""
        intervals = {
            name: {metric: [each.low, each.high] for metric, each in found.items()}
            for name, found in self.intervals.items()
        }
        return {
            "split": self.split,
            "images": self.images,
            "unfinished": self.unfinished,
            "beam_size": self.beam_size,
            "search": dict(self.search),
            "step": self.step,
            "scores": {name: each.values for name, each in self.scores.items()},
            "intervals": intervals,
            "signature": dict(self.scores["model"].signature) if "model" in self.scores else {},
            "missing": {name: each.reasons for name, each in self.scores.items() if each.reasons},
            "attention": dict(self.attention),
        }


def intervals_of(scores: Mapping[str, Scores]) -> dict[str, dict[str, Interval]]:
    """Intervals of all that was scored; none where there are fewer than two images, or no scores of each."""
    return {name: bootstrap_all(each) for name, each in scores.items() if each.per_image and len(each.image_ids) > 1}


def captions_file(run: Path, split: str, name: str = "model") -> Path:
    """Where the captions of a split lie, those of the model or of a baseline."""
    return run / f"captions-{split}{'' if name == 'model' else f'-{name}'}.json"


def write_captions(path: Path, captions: Mapping[str, str], number_ids: Collection[str]) -> None:
    """Write captions by image as COCO's evaluation takes them: a list of {image_id, caption}.

    The ids among `number_ids` are written as whole numbers: as the annotations have them, or `pycocotools` finds none.
    """
    rows = [
        {"image_id": int(image_id) if image_id in number_ids else image_id, "caption": caption}
        for image_id, caption in captions.items()
    ]
    files.write_json(path, rows)
