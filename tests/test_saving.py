"""What a training does about a disk that is full, a model that cannot be exported, a metric that is missing, a STOP."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from sat import checkpoint, scoring, train
from sat.config import load_config
from sat.run_folder import Run, forget_stop, read_status
from sat.stopping import StartAgain
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> list[str]:
    """Settings of a training from 18 images' grids: three steps an epoch."""
    root = tmp_path_factory.mktemp("features")
    make_feature_dataset(root / "data", {"train": 18, "val": 4})
    return [*SMALL, *with_tokenizer(root), "train.learning_rate=0.01", "train.patience=0"]


def run(given: list[str], folder: Path, alone, *more: str):
    return train.train(load_config(None, [*given, f"train.run_dir={folder}", *more]), alone)


def full(*_):
    raise OSError(28, "No space left on device")


def fails(monkeypatch, which: range) -> None:
    """The disk is full at these saves (from 0)."""
    plain, calls = checkpoint._save, itertools.count()
    monkeypatch.setattr(checkpoint, "_save", lambda *given: (full if next(calls) in which else plain)(*given))


def test_three_saves_that_fail_in_a_row_end_the_run_and_two_do_not(features, alone, tmp_path, monkeypatch, capsys):
    more = ("train.epochs=3", "train.save_every=1")
    with monkeypatch.context() as patch:
        fails(patch, range(1, 100))
        with pytest.raises(
            ValueError, match=r"^\d saves in a row have failed, .*No space left on device; make room, and"
        ):
            run(features, tmp_path / "ends", alone, *more)
    status, said = read_status(tmp_path / "ends"), capsys.readouterr().err
    assert (status.state, status.saved_step) == ("failed", 1) and "saves in a row have failed" in status.error
    assert "warning: the checkpoint of step 2 was NOT saved: OSError" in said and "the older ones stay" in said
    assert checkpoint.latest(tmp_path / "ends/checkpoints").name == "step-00000001"

    fails(monkeypatch, range(1, 3))
    assert run(features, tmp_path / "goes_on", alone, *more).step == 9
    assert read_status(tmp_path / "goes_on").state == "finished" and not read_status(tmp_path / "goes_on").error


def test_a_last_save_is_tried_twice_and_a_training_without_it_is_not_finished(features, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fails(patch, range(100))
        with pytest.raises(
            ValueError, match="has taken all its steps, but the checkpoint of step 3 was NOT saved: OSE"
        ):
            run(features, tmp_path / "none", alone)
    assert read_status(tmp_path / "none").state == "failed" and read_status(tmp_path / "none").saved_step == 0
    with monkeypatch.context() as patch:
        fails(patch, range(1))
        run(features, tmp_path / "second", alone)
    assert (read_status(tmp_path / "second").state, read_status(tmp_path / "second").saved_step) == ("finished", 3)


def test_a_stop_that_saved_nothing_is_not_called_stopped(features, alone, tmp_path, monkeypatch):
    asked = itertools.chain([False], itertools.repeat(True))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_wanted", lambda run: next(asked))
        fails(patch, range(100))
        with pytest.raises(
            StartAgain, match="stopped, but the checkpoint of step 1 was NOT saved: OSE.*start it again"
        ):
            run(features, tmp_path / "run", alone)
    assert read_status(tmp_path / "run").state == "failed"
    assert run(features, tmp_path / "run", alone).step == 3  # the same command is what helps


def test_a_model_that_cannot_be_exported_is_a_warning_and_the_save_comes_first(
    features, alone, tmp_path, monkeypatch, capsys
):
    def fails_to_export(folder, *_):
        assert checkpoint.latest(folder.parent / "checkpoints").name == "step-00000003"
        full()

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "save_model", fails_to_export)
        patch.setattr(scoring, "write_captions", full)
        progress = run(features, tmp_path / "run", alone)
    said = capsys.readouterr().err
    assert "warning: the model of step 3, the best yet could not be written (OSError" in said
    assert "warning: the captions of step 3 could not be written (OSError" in said
    assert (progress.best_step, read_status(tmp_path / "run").state) == (0, "finished")
    assert run(features, tmp_path / "run", alone, "train.epochs=2").best_step == 6  # it is no best that is not there


def test_a_metric_that_is_missing_leaves_its_reason_in_the_log_and_null_in_the_journal(
    features, alone, tmp_path, monkeypatch, capsys
):
    plain = scoring.score

    def without_meteor(*given):
        scores = plain(*given)
        reasons = dict(scores.reasons) | {"METEOR": "no Java"}
        return dataclasses.replace(scores, values=scores.values | {"METEOR": None}, reasons=reasons)

    monkeypatch.setattr(scoring, "score", without_meteor)
    run(features, tmp_path / "run", alone)
    assert "warning: step 3 has no METEOR: no Java" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["val/METEOR"] for line in lines if "val/METEOR" in line] == [None]


def test_a_stop_placed_while_a_training_starts_up_is_heard_and_an_older_one_forgotten(features, alone, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/STOP").touch()
    with pytest.raises(StartAgain, match="stopped before the first step"):
        run(features, tmp_path / "run", alone)  # the program forgets older ones at its very beginning
    assert (tmp_path / "run/STOP").exists()
    forget_stop(tmp_path / "run")
    assert run(features, tmp_path / "run", alone).step == 3


def test_progress_in_a_file_is_a_line_each_ten_seconds_and_scoring_is_no_step(alone, capsys):
    with train.progress_bar(
        type("Data", (), {"total_steps": 9}), train.Progress(None), Run(Path("."), alone.processes, None)
    ) as bar:
        assert bar.mininterval == 10.0
        began = bar.start_t
        with train.bar_paused(bar):
            pass
        assert began < bar.start_t < began + 5
