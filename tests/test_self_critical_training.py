"""A training that goes on for the reward: it gets better at it, stops and goes on exactly, and says what it did."""

import itertools
import json
from contextlib import closing
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sat import train
from sat.config import load_config
from sat.data.plan import Cursor
from sat.export import save_model
from sat.learner import build_learner
from sat.meter import Meter
from sat.run_folder import Run
from sat.train_state import refuse_other_settings
from sat.training_data import open_data
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer


@pytest.fixture(scope="module")
def given(tmp_path_factory, alone) -> list[str]:
    """Settings of a training from 18 images that begins with a model that has learnt nothing but to end."""
    root = tmp_path_factory.mktemp("self_critical")
    make_feature_dataset(root / "data", {"train": 18, "val": 4})
    settings = [*SMALL, *with_tokenizer(root), "model.weight_init=uniform", "model.dropout=0.2"]
    config = load_config(None, settings)
    data = open_data(config)
    model = build_learner(config, data, alone).model
    save_model(root / "run/best", model.state_dict(), data.tokenizer, config, data.features, 1)
    return [
        *settings,
        "train.objective=self_critical",
        f"train.start_from={root}/run",
        "self_critical.samples=4",
        "self_critical.max_length=6",
        "train.learning_rate=0.01",
    ]


def journal(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "reward" in line]


@pytest.mark.parametrize("baseline", ["others", "greedy"])
def test_samples_come_to_be_worth_more(given, alone, tmp_path, baseline):
    more = ["train.epochs=16", "train.learning_rate=0.05", "self_critical.samples=12"]
    more += [f"train.run_dir={tmp_path}/run", f"self_critical.baseline={baseline}"]
    config = load_config(None, [*given, *more])
    data = open_data(config)
    learner = build_learner(config, data, alone)
    run, meter, lines = Run(tmp_path / "run", alone.processes, None), Meter(), []
    steps = train.steps_from(config, data, Cursor.start(data.sources, 1), alone.processes, meter)
    with closing(steps):
        for step, batches in enumerate(steps):
            train.take_step(config, learner, batches, step, run, meter)
            lines.append(meter.line(alone.processes))
    rewards = [line.sampling.reward for line in lines]
    assert len(rewards) == 48 and sum(rewards[-12:]) > 1.4 * sum(rewards[:12]) > 0
    compared = [line.sampling.baseline for line in lines]
    assert (compared == pytest.approx(rewards)) == (baseline == "others")
    for line in lines:
        shares = line.sampling.sampling_share, line.sampling.reward_share
        assert min(shares) > 0 and sum(shares) + line.data_wait_share < 1
        assert line.penalty_per_caption == 0 and line.nll_per_token > 0 and 0 <= line.accuracy <= 1


def test_a_stopped_training_goes_on_exactly_and_its_journal_holds_the_rewards(given, alone, tmp_path, capsys):
    def trained(folder: Path, *more: str) -> None:
        train.train(load_config(None, [*given, "train.ema=0.5", f"train.run_dir={folder}", *more]), alone)

    trained(tmp_path / "whole")
    asked = itertools.chain([False], itertools.repeat(True))  # before the first step, then in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "stop_wanted", lambda run: next(asked))
        trained(tmp_path / "halves")
    with pytest.raises(ValueError, match=r"self_critical\.samples: the run has 4, now 3"):
        trained(tmp_path / "halves", "self_critical.samples=3")
    with pytest.raises(ValueError, match=r"train\.objective: the run has 'self_critical', now 'teacher_forcing'"):
        trained(tmp_path / "halves", "train.objective=teacher_forcing")
    trained(tmp_path / "halves")
    for name in ("model", "average"):
        whole, halves = (
            load_file(tmp_path / folder / f"checkpoints/step-00000003/{name}.safetensors")
            for folder in ("whole", "halves")
        )
        assert {key: value.tolist() for key, value in whole.items()} == {
            key: value.tolist() for key, value in halves.items()
        }
    lines = journal(tmp_path / "whole")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["reward"] for line in lines] == [line["reward"] for line in journal(tmp_path / "halves")]
    assert all(line.keys() >= {"baseline", "sampling_share", "reward_share", "nll_per_token"} for line in lines)
    assert "attention is flat" not in capsys.readouterr().out


def test_a_run_that_is_older_than_a_setting_has_its_default():
    refuse_other_settings({"train.seed": 1}, {"train.seed": 1, "train.objective": "teacher_forcing"})
    with pytest.raises(ValueError, match=r"train\.objective: the run has 'teacher_forcing', now 'self_critical'"):
        refuse_other_settings({"train.seed": 1}, {"train.seed": 1, "train.objective": "self_critical"})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("train.start_from=", "needs train.start_from, the run folder of a trained model"),
        ("model.attention=hard", "set model.attention=soft"),
        ("model.label_smoothing=0.1", "model.label_smoothing has no effect on train.objective=self_critical"),
        ("model.scheduled_sampling=0.1", "model.scheduled_sampling has no effect"),
        ("self_critical.samples=1", "leaves a sample no others"),
        ("self_critical.bleu4=1", "nearest valid one is 'self_critical.bleu_4'"),
        ("train.objective=reward", "choose one of teacher_forcing, self_critical"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(given, more, said):
    with pytest.raises(ValueError, match=r"[a-z]") as refusal:
        load_config(None, [*given, more])
    assert said in str(refusal.value)
