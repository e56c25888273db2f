"""What is left of an evaluation: the captions in COCO's format, and the scores of the model and its baselines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sat import files
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

    def to_document(self) -> dict[str, Any]:
        """The report as JSON; what could not be computed is null and has its reason under `missing`."""
        return {
            "split": self.split,
            "images": self.images,
            "unfinished": self.unfinished,
            "beam_size": self.beam_size,
            "step": self.step,
            "scores": {name: each.values for name, each in self.scores.items()},
            "missing": {name: each.reasons for name, each in self.scores.items() if each.reasons},
            "attention": dict(self.attention),
        }


def captions_file(run: Path, split: str, name: str = "model") -> Path:
    """Where the captions of a split lie, those of the model or of a baseline."""
    return run / f"captions-{split}{'' if name == 'model' else f'-{name}'}.json"


def write_captions(path: Path, captions: Mapping[str, str]) -> None:
    """Write captions by image as COCO's evaluation takes them: a list of {image_id, caption}."""
    files.write_json(path, [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()])
