"""What a training does about steps that are not finite, a longer schedule, other settings and its own end."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sat import train
from sat.checkpoint import damage, read
from sat.config import config_from_dict, config_to_dict, load_config, save_config
from sat.engine.ddp import Ddp
from sat.engine.engine import StepResult
from sat.engine.processes import Processes
from sat.meter import OVERFLOWS_ALLOWED, Watch
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.run_folder import read_status
from sat.text import build_tokenizer
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer

STEPS_PER_EPOCH = 3


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> list[str]:
    """Settings of a training from 18 images' grids: three steps an epoch, saved and scored once per epoch."""
    root = tmp_path_factory.mktemp("features")
    make_feature_dataset(root / "data", {"train": 18, "val": 4})
    return [*SMALL, *with_tokenizer(root), "train.learning_rate=0.01", "train.patience=0"]


def run(given: list[str], folder: Path, alone, *more: str):
    return train.train(load_config(None, [*given, f"train.run_dir={folder}", *more]), alone)


def journal(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "nll_per_token" in line]


def spoil(monkeypatch, steps: range) -> None:
    """The losses of these steps (from 0) are NaN."""
    plain, calls = TeacherForcing.forward, iter(range(10**6))

    def forward(objective, *arguments):
        sums = plain(objective, *arguments)
        counts = {name: count * torch.nan if name == "nll" else count for name, count in sums.counts.items()}
        return sums._replace(per_token=sums.per_token * torch.nan, counts=counts) if next(calls) in steps else sums

    monkeypatch.setattr(TeacherForcing, "forward", forward)


def test_skipped_steps_are_counted_and_the_sums_are_those_of_the_others(features, alone, tmp_path, monkeypatch):
    spoil(monkeypatch, range(1, 2))
    progress = run(features, tmp_path / "run", alone, "train.log_every=3")
    assert progress.step == 3 and progress.cursor.samples_done == 18
    (line,) = journal(tmp_path / "run")
    assert line["skipped_steps"] == 1 and 0 < line["nll_per_token"] < 10 and "overflowed_steps" not in line


def test_too_many_in_a_row_end_the_run_with_the_last_checkpoint_and_a_way_out_that_works(
    features,
    alone,
    tmp_path,
    monkeypatch,
    capsys,
):
    more = ("train.epochs=3", "train.max_skipped_steps=2")
    with monkeypatch.context() as patch:
        spoil(patch, range(4, 10**6))
        with pytest.raises(ValueError) as caught:
            run(features, tmp_path / "run", alone, *more)
    said, checkpoints = str(caught.value), sorted((tmp_path / "run/checkpoints").iterdir())
    assert said.startswith("step 7: ") and "of 3 steps in a row" in said and str(checkpoints[-1]) in said
    assert [path.name for path in checkpoints] == ["step-00000003"]  # that of step 6 was put off: 5 and 6 were bad
    assert all(damage(path) is None for path in checkpoints)
    for path in checkpoints:
        assert all(value.isfinite().all() for value in read(path).values())
    status = read_status(tmp_path / "run")
    assert (status.state, status.saved_step, status.error) == ("failed", 3, said)
    assert [line.get("skipped_steps", 0) for line in journal(tmp_path / "run")] == [0, 0, 0, 0, 1, 1, 1]
    way_out = [word.strip(",;") for word in said.split() if word.startswith("train.")]
    assert way_out[1:] == [
        "train.learning_rate=0.005",
        f"train.start_from={tmp_path}/run",
        f"train.run_dir={tmp_path}/run-2",
    ]
    assert run(features, tmp_path / "run", alone, *more, *way_out[2:]).step == 9
    assert run(features, tmp_path / "run", alone, *more, way_out[1]).step == 9  # it goes on where it was
    assert [line["step"] for line in journal(tmp_path / "run")] == list(range(1, 10))
    assert "train.learning_rate is now 0.005 instead of 0.01" in capsys.readouterr().out


def test_steps_between_two_good_ones_end_nothing(features, alone, tmp_path, monkeypatch):
    spoil(monkeypatch, range(1, 3))
    assert run(features, tmp_path / "run", alone, "train.epochs=2", "train.max_skipped_steps=2").step == 6


def result(skipped: bool, overflowed: bool = False) -> StepResult:
    return StepResult(torch.tensor(1.0), torch.tensor(skipped), torch.tensor(overflowed))


def test_overflows_of_fp16_are_no_divergence_until_there_are_too_many_in_a_row():
    watch = Watch(allowed=2)
    assert not any(watch.see(result(True, overflowed=True)) for _ in range(OVERFLOWS_ALLOWED + 2))
    assert watch.see(result(True, overflowed=True))
    assert not watch.see(result(False))
    assert [watch.see(result(True)) for _ in range(3)] == [False, False, True]


class Weighted(nn.Module):
    """An objective of one matrix."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 1, bias=False)


def test_fp16_halves_its_scale_at_an_overflow_and_a_step_that_fails_without_scale_is_skipped():
    objective = Weighted()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.1, fused=True)
    processes = Processes(autocast_type=torch.float16)
    stepper = Ddp(processes).wrap(objective, optimizer, micro_batch=1, accumulation_steps=1, clip_norm=1.0)
    before = objective.model.weight.detach().clone()

    def step(factor: float) -> StepResult:
        stepper.backward(objective.model.weight.half().sum().float() * factor)
        return stepper.step()

    outcomes = [step(100.0) for _ in range(40)]  # a gradient of 100 times 2^16 is no float16
    overflowed = [bool(each.overflowed) for each in outcomes]
    assert overflowed == [bool(each.skipped) for each in outcomes]
    assert overflowed[0] and not overflowed[-1] and sorted(overflowed, reverse=True) == overflowed
    assert not torch.equal(objective.model.weight, before)
    weight = objective.model.weight.detach().clone()
    outcomes = [step(float("inf")) for _ in range(40)]
    assert all(each.skipped for each in outcomes) and torch.equal(objective.model.weight, weight)
    assert outcomes[0].overflowed and not outcomes[-1].overflowed  # nothing is left to halve: that is divergence


# ------------------------------------------------------------------ longer, and other settings


def test_a_finished_run_goes_on_with_more_epochs_and_says_the_new_schedule(features, alone, tmp_path, capsys):
    run(features, tmp_path / "run", alone, "train.epochs=2")
    assert read_status(tmp_path / "run").state == "finished"
    progress = run(features, tmp_path / "run", alone, "train.epochs=3")
    assert (progress.step, progress.cursor.epoch) == (9, 2)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train.epochs is now")]
    assert said == [
        "train.epochs is now 3: 9 steps instead of 6, and the learning rate goes on at 0.00309 instead of 0"
    ]
    lines = journal(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert lines[6]["learning_rate"] == pytest.approx(0.00309, rel=1e-2)


def test_a_run_that_was_lengthened_reads_the_epochs_of_one_that_was_long_from_the_start(
    features,
    alone,
    tmp_path,
    monkeypatch,
):
    seen, plain = [], train.take_step

    def take_step(config, learner, batches, *arguments):
        seen.append(batches[0].grid.clone())
        return plain(config, learner, batches, *arguments)

    monkeypatch.setattr(train, "take_step", take_step)
    run(features, tmp_path / "long", alone, "train.epochs=3")
    whole, seen[:] = list(seen), []
    run(features, tmp_path / "run", alone, "train.epochs=1")
    run(features, tmp_path / "run", alone, "train.epochs=3")
    assert len(seen) == len(whole) == 9 and all(torch.equal(a, b) for a, b in zip(seen, whole))


def finished_message(given: list[str], folder: Path, *more: str) -> str:
    return train.already_finished(load_config(None, [*given, f"train.run_dir={folder}", *more]))


@pytest.mark.parametrize(("rank", "words"), [("0", "the run is finished\n"), ("1", "")])
def test_that_a_run_is_finished_is_said_by_one_rank(tmp_path, monkeypatch, capsys, rank, words):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(train, "already_finished", lambda config: "the run is finished")
    (tmp_path / "config.yaml").write_text("train: {epochs: 1}\n")
    train.main(tmp_path / "config.yaml")
    assert capsys.readouterr().out == words


def test_a_finished_run_says_so_unless_there_is_more_to_do_or_it_is_another_training(features, alone, tmp_path):
    folder = tmp_path / "run"
    assert finished_message(features, folder, "train.epochs=2") == ""
    run(features, folder, alone, "train.epochs=2")
    assert "is finished: best CIDEr" in finished_message(features, folder, "train.epochs=2")
    assert "is finished" in finished_message(features, folder, "train.epochs=1")
    assert finished_message(features, folder, "train.epochs=3") == ""
    for more in (("train.epochs=2",), ("train.epochs=3",)):
        with pytest.raises(ValueError, match=r"model\.lstm_dim: the run has 8, now 9.*another train\.run_dir"):
            finished_message(features, folder, *more, "model.lstm_dim=9")


def test_an_unfinished_run_names_each_setting_that_differs_with_both_values(features, alone, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        asked = iter((False, True))
        patch.setattr(train.Run, "stop_wanted", lambda run: next(asked))
        run(features, tmp_path / "run", alone)
    assert read_status(tmp_path / "run").state == "stopped"
    with pytest.raises(ValueError) as caught:
        run(features, tmp_path / "run", alone, "train.global_batch=9", "train.seed=4")
    assert "train.global_batch: the run has 6, now 9" in str(caught.value) and "total" not in str(caught.value)
    assert "train.seed: the run has 1, now 4" in str(caught.value)
    make_feature_dataset(tmp_path / "data", {"train": 20, "val": 4})
    with_tokenizer(tmp_path)
    build_tokenizer(["a red dog"], 1).save(tmp_path / "few.json")
    for more, says in (
        (f"data.features={tmp_path}/data", r"features: the run has \[\['\w{64}', 1.0\]\], now \[\['\w{64}', 1.0\]\]"),
        (f"data.tokenizer={tmp_path}/few.json", r"tokenizer: the run has '\w+', now '\w+'"),
        ("train.precision=bf16", "train.precision: the run has 'fp32', now 'bf16'"),
        ("model.attention_dim=7", "model.attention_dim: the run has 5, now 7"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another training .*{says}.*or give another train.run_dir"):
            run(features, tmp_path / "run", alone, more)


def test_fewer_epochs_than_were_done_are_finished(features, alone, tmp_path, capsys):
    run(features, tmp_path / "run", alone, "train.epochs=2")
    (tmp_path / "run/status.json").unlink()
    assert run(features, tmp_path / "run", alone, "train.epochs=1").step == 6
    assert "is finished" in capsys.readouterr().out


def test_the_loader_is_opened_once_and_closed_at_the_end(features, alone, tmp_path, monkeypatch):
    opened, closed, plain = [], [], train.training_batches

    def batches(*arguments, **named):
        opened.append(named["epochs"])

        def generator():
            try:
                yield from plain(*arguments, **named)
            finally:
                closed.append(True)

        return generator()

    monkeypatch.setattr(train, "training_batches", batches)
    run(features, tmp_path / "run", alone, "train.epochs=3")
    assert opened == [3] and closed == [True]


def test_an_error_is_what_status_says(features, alone, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(train, "take_step", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        run(features, tmp_path / "run", alone)
    assert read_status(tmp_path / "run").state == "failed"
    assert read_status(tmp_path / "run").error == "the disk is gone"


def test_an_automatic_precision_is_the_machines_best_and_stays_what_the_run_began_with(tmp_path, monkeypatch):
    given = load_config(None, [f"train.run_dir={tmp_path / 'run'}"])
    for best, other in (("bf16", "fp32"), ("fp32", "bf16")):
        monkeypatch.setattr(train, "best_precision", lambda best=best: best)
        assert train.with_precision(given).train.precision == best
        (tmp_path / "run").mkdir(exist_ok=True)
        save_config(
            config_from_dict(config_to_dict(given) | {"train": vars(given.train) | {"precision": other}}),
            tmp_path / "run/config.yaml",
        )
        assert train.with_precision(given).train.precision == other
        (tmp_path / "run/config.yaml").unlink()
    fixed = load_config(None, ["train.precision=fp16", f"train.run_dir={tmp_path / 'run'}"])
    assert train.with_precision(fixed) == fixed
