"""What a run's folder says of one evaluation, for a page: scores, captions, attention, truth, journal and settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sat import files
from sat.config import flatten, load_config
from sat.evaluation.attention_file import KeptAttention, read_attention
from sat.evaluation.compare import refuse_other_references
from sat.evaluation.prediction import Prediction
from sat.evaluation.report import captions_file
from sat.evaluation.score_table import ScoreTable, read_table, table_file
from sat.export import best_folder
from sat.run_folder import CONFIG_FILE, Status, read_status
from sat.shards.features import FeatureSpec
from sat.summary import read_truth
from sat.tracking.journal import JOURNAL, Entry, read_journal


@dataclass(frozen=True)
class Claim:
    """Something a caption says, and whether it is true."""

    words: tuple[str, ...]
    holds: bool
    wrong: tuple[int, ...] = ()
    """Places of the words that are false, where not all are."""


@dataclass(frozen=True)
class RunReport:
    """A run, evaluated on a split."""

    name: str
    folder: Path
    evaluation: Mapping[str, Any]
    """The document of evaluation-SPLIT.json, see `sat.evaluation.report.Report`."""
    captions: Mapping[str, str]
    """Of every image of the split, by its id."""
    table: ScoreTable
    """Of the images that could be scored."""
    attention: KeptAttention | None
    """None where it was not kept."""
    truth: Mapping[str, Any]
    """Shares that are true, see `sat.summary.read_truth`; empty where nobody knows."""
    claims: Mapping[str, Sequence[Claim]]
    """By image; empty where nobody knows the truth."""
    journal: Sequence[Entry]
    settings: Mapping[str, object]
    """By dotted name, those of the training where the folder has them, and of the evaluation's search."""
    status: Status | None
    features: FeatureSpec | None
    """What the model looks at; None where the folder has no model."""
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    """Those of `attention` by image."""

    @property
    def data(self) -> str:
        """Folder of the shards it was trained on; empty where not known."""
        return str(self.settings.get("data.features", ""))


def read_runs(folders: Sequence[Path], split: str) -> list[RunReport]:
    """All runs, each with a name of its own. Raises ValueError unless they were scored against the same references."""
    names = _names(folders)
    runs = [read_run(folder, split, name) for folder, name in zip(folders, names, strict=True)]
    for other in runs[1:]:
        refuse_other_references(runs[0].name, runs[0].table, other.name, other.table)
    return runs


def read_run(folder: Path, split: str, name: str) -> RunReport:
    """What the folder says. Raises ValueError, saying what to run, for what is missing or belongs to other captions."""
    again = f"run `sat evaluate {folder} --split {split} --baselines --attention`"
    path = folder / f"evaluation-{split}.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; {again} first")
    evaluation = files.read_json(path)
    if not {"scores", "images", "beam_size", "step"} <= evaluation.keys():
        raise ValueError(f"{path} is no report of an evaluation; {again} again")
    table = read_table(table_file(folder, split))
    kept = folder / f"attention-{split}.npz"
    attention = read_attention(kept) if kept.is_file() else None
    predictions = {each.image_id: each for each in attention.predictions} if attention else {}
    captions = _captions(captions_file(folder, split), again)
    if attention and {image: each.caption for image, each in predictions.items()} != captions:
        raise ValueError(f"{kept} is of another evaluation than {captions_file(folder, split)}; {again} again")
    if any(captions.get(image) != said for image, said in zip(table.image_ids, table.captions, strict=True)):
        raise ValueError(
            f"{table_file(folder, split)} is of another evaluation than {captions_file(folder, split)}; {again} again"
        )
    known = (folder / CONFIG_FILE).is_file()
    return RunReport(
        name=name,
        folder=folder,
        evaluation=evaluation,
        captions=captions,
        table=table,
        attention=attention,
        truth=read_truth(folder, split),
        claims=_claims(folder / f"truth-{split}.json"),
        journal=read_journal(folder) if (folder / JOURNAL).is_file() else [],
        settings=(flatten(load_config(folder / CONFIG_FILE)) if known else {}) | _search(evaluation),
        status=read_status(folder),
        features=_features(best_folder(folder) / "config.json"),
        predictions=predictions,
    )


def differing_settings(runs: Sequence[RunReport]) -> dict[str, list[str]]:
    """Name -> the value in each run, of the settings in which they differ; where a run lies is none."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    found = {name: [str(run.settings.get(name, "-")) for run in runs] for name in names}
    return {
        name: values
        for name, values in found.items()
        if len(set(values)) > 1 and name not in ("train.run_dir", "tracking.run_name")
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or where these are not unique the whole paths."""
    short = [folder.resolve().name for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is named twice; name each once")
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _captions(path: Path, again: str) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; {again} first")
    try:
        rows = {str(row["image_id"]): str(row["caption"]) for row in json.loads(path.read_text())}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of image_id and caption: {error!r}") from None
    return dict(sorted(rows.items()))


def _claims(path: Path) -> dict[str, tuple[Claim, ...]]:
    """As `preprocessing.check_scenes` writes them."""
    claims = files.read_json(path).get("claims", {}) if path.is_file() else {}
    return {
        image: tuple(Claim(tuple(each["words"]), each["holds"], tuple(each["wrong"])) for each in rows)
        for image, rows in claims.items()
    }


def _search(evaluation: Mapping[str, Any]) -> dict[str, object]:
    """How the captions were searched for, named apart from how training does."""
    return {f"{evaluation.get('split', '')}.{name}": value for name, value in evaluation.get("search", {}).items()}


def _features(path: Path) -> FeatureSpec | None:
    if not path.is_file():
        return None
    try:
        return FeatureSpec.from_fingerprint(json.loads(path.read_text())["features"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a trained model: {error}") from None
