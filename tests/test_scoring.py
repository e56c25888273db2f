"""Scores are computed beside the training, which ends as if it had waited for each: weights, best model, journal."""

import json
import threading
from math import inf, nan
from pathlib import Path

import pytest

from sat import checkpoint, files, scoring, train
from sat.config import load_config
from sat.evaluation.metrics import Scores
from sat.run_folder import Run, read_status
from sat.train_state import TrainState, Unscored
from tests.chaos import result_of
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer

CIDER = {3: 0.1, 6: 0.3, 9: 0.2, 12: 0.25}
"""By step."""


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> list[str]:
    """Settings of a training of four epochs of three steps, each of which is saved; scored after each epoch."""
    root = tmp_path_factory.mktemp("features")
    make_feature_dataset(root / "data", {"train": 18, "val": 4})
    given = [*SMALL, *with_tokenizer(root), "train.learning_rate=0.01", "train.patience=0"]
    return [*given, "train.epochs=4", "train.save_every=1", "train.keep_checkpoints=30"]


class Scorer:
    """Stands for the metrics: the scores of CIDER, each only after `later` more steps have been taken."""

    def __init__(self, monkeypatch, later: int) -> None:
        self.later, self.taken, self.told, self.told_at = later, 0, threading.Condition(), {}
        self.left = False
        plain_begin, plain_step = scoring.Evaluations.begin, train.take_step

        def begin(evaluations, progress):
            self.step = progress.step
            return plain_begin(evaluations, progress)

        def take_step(config, learner, batches, step, *more):
            found = plain_step(config, learner, batches, step, *more)
            with self.told:
                self.taken = step + 1
                self.told.notify_all()
            return found

        monkeypatch.setattr(scoring.Evaluations, "begin", begin)
        monkeypatch.setattr(train, "take_step", take_step)
        monkeypatch.setattr(scoring, "score", self.score)

    def score(self, references, captions, metrics) -> Scores:
        assert references.keys() == captions.keys() and metrics == ("CIDEr",)
        step = self.step
        with self.told:
            assert self.told.wait_for(lambda: self.left or self.taken >= min(step + self.later, 12), 60)
        self.told_at[step] = self.taken
        return Scores({"CIDEr": CIDER[step]}, {}, len(captions))

    def leave(self) -> None:
        """Let a score go that nobody waits for any more."""
        with self.told:
            self.left = True
            self.told.notify_all()


def run(given: list[str], folder: Path, alone, *more: str):
    return train.train(load_config(None, [*given, f"train.run_dir={folder}", *more]), alone)


@pytest.fixture(scope="module")
def waited(features, alone, tmp_path_factory) -> Path:
    """The run whose every score is waited for."""
    folder = tmp_path_factory.mktemp("waited") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring.Evaluations, "must_be_waited_for", lambda evaluations, _: bool(evaluations.waiting))
        scorer = Scorer(patch, 0)
        progress = run(features, folder, alone)
    assert scorer.told_at == {step: step for step in CIDER} and (progress.best_step, progress.step) == (6, 12)
    return folder


def same(folder: Path, other: Path) -> None:
    assert result_of(folder) == result_of(other)
    captions = [{path.name: path.read_bytes() for path in (each / "captions").iterdir()} for each in (folder, other)]
    assert captions[0] == captions[1] and len(captions[0]) == 4


@pytest.mark.parametrize("later", [1, 3])
def test_steps_are_taken_while_scores_are_computed_and_nothing_else_changes(
    features, alone, tmp_path, waited, monkeypatch, later
):
    """A scorer that is slower than the steps to the next evaluation is waited for there."""
    scorer = Scorer(monkeypatch, later)
    progress = run(features, tmp_path / "run", alone)
    assert all(min(step + later, 12) <= at <= min(step + 3, 12) for step, at in scorer.told_at.items())
    assert scorer.told_at.keys() == CIDER.keys()
    assert (progress.best_step, progress.best_cider, progress.evaluated_step) == (6, 0.3, 12)
    same(tmp_path / "run", waited)


def test_a_stop_before_the_scores_is_saved_with_all_they_need_and_goes_on_alike(
    features, alone, tmp_path, waited, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        scorer = Scorer(patch, 100)  # they would come at the end of all steps
        patch.setattr(Run, "stop_wanted", lambda run: scorer.taken >= 4)
        assert run(features, folder, alone).step == 5
        scorer.leave()
    status, path = read_status(folder), checkpoint.latest(folder / "checkpoints")
    assert (status.state, status.step) == ("stopped", status.saved_step)
    state = TrainState.read(path)
    assert state.unscored.step == 3 and [step for step, _ in state.unscored.lines] == [4, 5]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5] and not (folder / "best").exists()
    assert (path / "candidate.safetensors").is_file()

    scorer = Scorer(monkeypatch, 1)
    scorer.step, scorer.taken = 3, 5
    run(features, folder, alone)
    same(folder, waited)
    assert not (checkpoint.latest(folder / "checkpoints") / "candidate.safetensors").exists()


def test_scores_that_came_after_the_last_checkpoint_are_computed_again(features, alone, tmp_path, waited, monkeypatch):
    folder, plain = tmp_path / "run", scoring.Evaluations._keep

    def keeps_and_dies(*given):
        assert plain(*given)
        raise OSError("killed")

    with monkeypatch.context() as patch:
        Scorer(patch, 2)
        patch.setattr(scoring.Evaluations, "_keep", keeps_and_dies)
        with pytest.raises(OSError, match="killed"):
            run(features, folder, alone)
    assert TrainState.read(checkpoint.latest(folder / "checkpoints")).unscored.step == 3
    assert '"val/CIDEr": 0.1' in (folder / "metrics.jsonl").read_text()
    scorer = Scorer(monkeypatch, 1)
    scorer.step, scorer.taken = 3, 5
    run(features, folder, alone)
    same(folder, waited)


@pytest.mark.parametrize(("patience", "steps"), [(1, 9), (2, 12)])
def test_scores_that_could_end_the_training_are_waited_for(features, alone, tmp_path, monkeypatch, patience, steps):
    scorer = Scorer(monkeypatch, 0)
    progress = run(features, tmp_path / "run", alone, f"train.patience={patience}")
    assert (progress.step, progress.best_step) == (steps, 6)
    assert read_status(tmp_path / "run").state == "finished" and scorer.taken == steps


def test_what_is_unscored_reads_as_it_was_written(tmp_path):
    lines = ((4, {"nll": nan, "rate": 0.1}), (5, {"nll": -inf, "METEOR": None}))
    unscored = Unscored(3, "val", {"7": "a dog"}, {"unfinished": 1}, lines=lines)
    files.write_json(tmp_path / "it.json", unscored.to_dict())
    assert str(Unscored.from_dict(files.read_json(tmp_path / "it.json"))) == str(unscored)
