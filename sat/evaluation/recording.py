"""An evaluation as a record of its own: a journal in RUN/evaluations/NAME, and a nested run in MLflow.

The training's own journal, status and MLflow run are left alone, so a model may be scored while it is being trained.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sat import files
from sat.config import load_config
from sat.evaluation.report import Report
from sat.run_folder import CONFIG_FILE
from sat.tracking.journal import Tracker, read_journal
from sat.tracking.mlflow import EVALUATIONS
from sat.tracking.record import RECORD, DataInput


@dataclass(frozen=True)
class Extra:
    """What else belongs to an evaluation."""

    artifacts: tuple[Path, ...] = ()
    """Files that MLflow gets copies of."""
    ensemble: tuple[Path, ...] = ()
    """The other run folders whose models took part."""


def record_evaluation(out: Path, run: Path, report: Report, data: DataInput, extra: Extra | None = None) -> None:
    """Journal the scores of a report in OUT/evaluations and bring them to MLflow, nested in the run of `run`.

    Rank 0 only. Does nothing for a model that is in no run folder, which nobody tracks.

    The same evaluation again, of the same model on the same data by the same search, is the same record as long as its
    scores are the same.
    """
    if not (run / CONFIG_FILE).is_file():
        return
    extra = extra or Extra()
    params: dict[str, object] = {f"eval.{name}": value for name, value in sorted(report.search.items())}
    params |= {"split": report.split, "model_step": report.step, "data.digest": data.digest}
    if extra.ensemble:
        params["ensemble"] = [str(folder) for folder in extra.ensemble]
    folder = out / EVALUATIONS / name_of(report, params)
    values = dict(values_of(report))
    known = (folder / RECORD).exists() and _last_values(folder) == {k: v for k, v in values.items() if v is not None}
    tracker = Tracker(
        folder, load_config(run / CONFIG_FILE).tracking, params, sys.maxsize if known else 0, "", [data], run
    )
    try:
        if not known:
            tracker.log(report.step, values)
            for path in extra.artifacts:
                tracker.artifact(path)
    finally:
        tracker.close()


def name_of(report: Report, params: Mapping[str, object]) -> str:
    """What an evaluation is called: readable, and another one for whatever would change the captions."""
    method = str(report.search.get("method", "beam"))
    width = f"beam{report.beam_size}" if method == "beam" else method
    split = re.sub(r"[^\w.-]+", "_", report.split)
    return f"{split}-{width}-step{report.step}-{files.sha256_of(repr(sorted(params.items())))[:8]}"


def values_of(report: Report) -> Iterator[tuple[str, float | None]]:
    """(`test/CIDEr`, value) of the model, and (`test_blind/CIDEr`, value) of each baseline."""
    for name, scores in report.scores.items():
        label = report.split if name == "model" else f"{report.split}_{name}"
        spread = report.attention if name == "model" else {}
        yield from ((f"{label}/{metric}", value) for metric, value in {**scores.values, **spread}.items())
    yield f"{report.split}/unfinished", float(report.unfinished)


def _last_values(folder: Path) -> dict[str, float]:
    lines = read_journal(folder) if (folder / "metrics.jsonl").exists() else []
    return {
        name: value
        for name, value in (lines[-1] if lines else {}).items()
        if name not in ("step", "time") and value is not None
    }
