"""The loss, its gradient and the scores do not depend on the number of ranks. Real processes, ragged captions."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sat import checkpoint
from tests.helpers_engines import STEPS, launch_variants, small_config
from tests.helpers_engines import launch as launch_any

LAUNCHERS = {"ddp": "cpu", "zero2": "deepspeed_zero2_cpu"}


def launch(arguments: list[str], ranks: int, engine: str = "ddp", expect: int = 0) -> str:
    """As `helpers_engines.launch`; one rank of DDP is a bare process."""
    return launch_any(arguments, ranks, LAUNCHERS[engine] if ranks > 1 or engine != "ddp" else None, expect)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(tmp_path_factory.mktemp("two_process"))


EMPTY = "train.global_batch=7"
"""22 images: the fourth and last batch holds one, so all ranks but one, and all micro-batches but one, are empty."""
SPOILT = ("infinite=1", "nan=2", "train.ema=0.5")
DRAWING = [
    ("model.dropout=0.5", *more, *(f"train.accumulation_steps={n}" for n in accumulation))
    for more in (
        (),
        ("model.attention=hard", "model.scheduled_sampling=0.9"),
        ("model.attention=none", "model.scheduled_sampling=0.9"),
    )
    for accumulation in ((), (2,))
]
"""All that draws random numbers: dropout, scheduled sampling, hard attention; in one micro-batch and in two."""
VARIANTS: dict[tuple[str, int], list[tuple[str, ...]]] = {
    ("ddp", 1): [
        (),
        ("train.accumulation_steps=2",),
        ("model.preset=tutorial",),
        (EMPTY,),
        (EMPTY, "train.accumulation_steps=2"),
        SPOILT,
        *DRAWING,
    ],
    ("ddp", 2): [
        (),
        ("train.accumulation_steps=3",),
        ("model.preset=tutorial", "train.accumulation_steps=3"),
        ("model.attention=hard", "train.accumulation_steps=2"),
        ("model.attention=hard", "infinite=1", "nan=2"),
        (EMPTY,),
        (EMPTY, "train.accumulation_steps=2"),
        SPOILT,
        *DRAWING,
    ],
    ("ddp", 3): [(), (EMPTY,), (EMPTY, "train.accumulation_steps=2"), *DRAWING],
}
"""What each launch takes `STEPS` steps of, one after the other: starting processes is what costs."""


@pytest.fixture(scope="module")
def steps(config):
    """(engine, ranks, *settings) -> what these steps did."""
    known: dict[tuple[str, int], dict[tuple[str, ...], dict[str, torch.Tensor]]] = {}

    def taken(engine: str, ranks: int, *settings: str) -> dict[str, torch.Tensor]:
        if (engine, ranks) not in known:
            launcher = LAUNCHERS[engine] if ranks > 1 else None
            known[engine, ranks] = launch_variants(config, launcher, ranks, VARIANTS[engine, ranks])
        return known[engine, ranks][settings]

    return taken


@pytest.mark.parametrize(
    ("preset", "ranks", "accumulation"),
    [("paper", 1, 2), ("paper", 2, 1), ("paper", 2, 3), ("paper", 3, 1), ("tutorial", 2, 3)],
)
def test_any_split_of_the_global_batch_has_the_same_loss_and_gradient(steps, preset, ranks, accumulation):
    settings = () if preset == "paper" else (f"model.preset={preset}",)
    alone = steps("ddp", 1, *settings)
    split = steps("ddp", ranks, *settings, *([f"train.accumulation_steps={accumulation}"] if accumulation > 1 else []))
    torch.testing.assert_close(split["lines"], alone["lines"], rtol=1e-6, atol=1e-7)
    scale = alone["gradients"].abs().amax(1, keepdim=True)
    torch.testing.assert_close(split["gradients"] / scale, alone["gradients"] / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", DRAWING, ids=lambda settings: "-".join(s.split(".")[1] for s in settings))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_random_numbers_are_the_same_on_any_ranks_and_in_any_micro_batches(steps, ranks, settings):
    alone = steps("ddp", 1, *(each for each in settings if "accumulation" not in each))
    split = steps("ddp", ranks, *settings)
    torch.testing.assert_close(split["lines"], alone["lines"], rtol=1e-6, atol=1e-7)
    scale = alone["gradients"].abs().amax(1, keepdim=True)
    torch.testing.assert_close(split["gradients"] / scale, alone["gradients"] / scale, rtol=0, atol=2e-6)
    without = steps("ddp", 1)["lines"]
    assert ((alone["lines"][:, 0] - without[:, 0]).abs() > 1e-4).all()  # they do draw


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_micro_batches_without_samples_change_nothing(steps, ranks, accumulation):
    alone = steps("ddp", 1, EMPTY)
    split = steps("ddp", ranks, EMPTY, *([f"train.accumulation_steps={accumulation}"] if accumulation > 1 else []))
    torch.testing.assert_close(split["lines"], alone["lines"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split["weights"], alone["weights"], rtol=0, atol=1e-5)
    assert (alone["weights"][-1] - alone["weights"][-2]).abs().max() > 1e-3  # the step that leaves ranks empty moves


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_not_finite_on_any_rank_reaches_neither_weights_nor_optimizer_nor_average(steps, ranks):
    found = steps("ddp", ranks, *SPOILT)
    assert found["lines"][:, 3].tolist() == [0, 1, 1, 0]
    assert not found["lines"][1:3, 2].isfinite().any() and found["lines"][[0, 3], :3].isfinite().all()
    for name in ("weights", "averages"):
        first, *after = found[name]
        assert torch.equal(after[0], first) and torch.equal(after[1], first) and not torch.equal(after[2], first)
    alone = steps("ddp", 1, *SPOILT)
    torch.testing.assert_close(found["weights"], alone["weights"], rtol=0, atol=1e-5)
    # Adam's second step after a first one: with moments that had seen anything else it would be another
    torch.testing.assert_close(found["averages"], alone["averages"], rtol=0, atol=1e-5)


def test_a_step_that_is_not_finite_does_not_move_hard_attentions_baseline(steps):
    baselines = steps("ddp", 2, "model.attention=hard", "infinite=1", "nan=2")["baselines"]
    assert torch.equal(baselines[0], baselines[1]) and torch.equal(baselines[1], baselines[2])
    assert not torch.equal(baselines[2], baselines[3])


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_training_that_diverges_on_one_rank_ends_with_one_sentence_and_good_checkpoints(config, engine):
    run = config.parent / f"diverged-{engine}"
    overrides = [f"train.run_dir={run}", "train.max_skipped_steps=1", "train.save_every=2", "train.eval_every=2"]
    worker = ["tests/diverging_worker.py", "3", str(config), "tracking.mlflow_uri=none", *overrides]
    said = launch(worker, 2, engine, expect=1)
    sentence = "error: step 5: the loss or the gradient of 2 steps in a row was not finite"
    assert said.count(sentence) == 1 and f"{run}/checkpoints/step-00000002, is good" in said
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and status["error"].startswith("step 5: ")
    newest = run / "checkpoints/step-00000002"  # the fourth step, which is owed one, is the first of the bad ones
    assert checkpoint.latest(run / "checkpoints") == newest
    assert all(value.isfinite().all() for value in checkpoint.read(newest).values())


def moving_average(values: torch.Tensor) -> torch.Tensor:
    """0.9 b + 0.1 v over `values` [steps], from zero."""
    averages = [0.0]
    for value in values.tolist():
        averages.append(0.9 * averages[-1] + 0.1 * value)
    return torch.tensor(averages[1:]).double()


def test_hard_attentions_baseline_follows_the_global_loss_on_every_rank(steps):
    found = steps("ddp", 2, "model.attention=hard", "train.accumulation_steps=2")
    expected = moving_average(found["lines"][:, 0])
    torch.testing.assert_close(found["baselines"], expected[:, None].expand(-1, 2), rtol=1e-5, atol=0)
    parts = found["micro_batches"]  # [steps, 2 ranks x 2]
    assert parts.shape == (STEPS, 4)
    for other in (*parts.t(), parts[:, :2].mean(1), parts[:, 2:].mean(1), parts.mean(1)):
        assert (moving_average(other) / expected - 1).abs().max() > 1e-4  # none of these would have passed


SAMPLING = ("model.attention=hard", "model.hard_inference=sample")
"""The evaluation itself draws, by the images' names."""


@pytest.fixture(scope="module")
def trained(config):
    launch(["-m", "sat.train", str(config), "tracking.mlflow_uri=none", *SAMPLING], 2)
    return config.parent / "run"


def test_evaluation_counts_each_of_an_odd_number_of_images_once_on_any_ranks(trained):
    reports, spreads = [], []
    for ranks in (1, 2, 3):
        launch(["-m", "sat.evaluate", str(trained), "--split", "val", "--baselines"], ranks)
        captions = json.loads((trained / "captions-val.json").read_text())
        assert [each["image_id"] for each in captions] == [f"val-{i}" for i in range(7)]
        report = json.loads((trained / "evaluation-val.json").read_text())
        spreads.append(report.pop("attention"))
        reports.append((captions, report))
    assert reports[0] == reports[1] == reports[2]
    assert reports[0][1]["images"] == 7
    for spread in spreads[1:]:  # a product's last bit may go with its number of rows
        assert spread == pytest.approx(spreads[0], rel=1e-6)


def test_a_stopped_training_goes_on_exactly_where_it_was(config, trained):
    """Killed by a stop file at an arbitrary step; the same weights, bit by bit, as the undisturbed run."""
    other = config.parent / "resumed"
    overrides = [f"train.run_dir={other}", "tracking.mlflow_uri=none", "train.log_every=1", *SAMPLING]
    for stop_after in (1, 4):
        worker = ["tests/stop_after_worker.py", str(stop_after), str(config), *overrides]
        launch(worker, 2)
        assert json.loads((other / "status.json").read_text())["state"] == "stopped"
    launch(["-m", "sat.train", str(config), *overrides], 2)
    assert json.loads((other / "status.json").read_text())["state"] == "finished"
    final = sorted((trained / "checkpoints").iterdir())[-1].name
    ours, theirs = (load_file(run / "checkpoints" / final / "model.safetensors") for run in (other, trained))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps_logged = [
        json.loads(line)["step"] for line in (other / "metrics.jsonl").read_text().splitlines() if "nll" in line
    ]
    assert steps_logged == sorted(set(steps_logged)) == list(range(1, 9))
