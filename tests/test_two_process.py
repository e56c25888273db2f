"""The loss, its gradient and the scores do not depend on the number of ranks. Real processes, ragged captions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sat.data.loader import read_references
from sat.text import build_tokenizer
from tests.helpers_shards import make_feature_dataset

ROOT = Path(__file__).parents[1]
STEPS = 4
LAUNCHERS = {"ddp": "launch/cpu.yaml", "zero2": "launch/deepspeed_zero2_cpu.yaml"}


def launch(arguments: list[str], ranks: int, engine: str = "ddp") -> str:
    """Run a program on `ranks` real processes and return what it printed; a failure shows it."""
    command = [sys.executable]
    if ranks > 1 or engine != "ddp":
        command += [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            LAUNCHERS[engine],
            "--num_processes",
            str(ranks),
        ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{' '.join(arguments)} on {ranks} ranks:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """22 images of 3 to 7 words, 3 captions used of 5: batches of 6 leave a last batch of 4, uneven on any ranks."""
    root = tmp_path_factory.mktemp("two_process")
    manifest = make_feature_dataset(root / "features", splits={"train": 22, "val": 7})
    captions = [caption for captions in read_references(manifest, "train").values() for caption in captions]
    build_tokenizer(captions, 1).save(root / "tokenizer.json")
    path = root / "config.yaml"
    path.write_text(
        f"data: {{features: {root}/features, tokenizer: {root}/tokenizer.json, "
        "captions_per_image: 3, num_workers: 0}\n"
        "model: {embedding_dim: 12, lstm_dim: 10, attention_dim: 8, dropout: 0.0, weight_init: uniform}\n"
        f"train: {{run_dir: {root}/run, global_batch: 6, epochs: 2, warmup_steps: 2, "
        "precision: fp32, learning_rate: 0.01}\n"
        "eval: {metrics: [CIDEr, BLEU], beam_size: 2, max_length: 8}\n"
    )
    return path


def steps(config: Path, ranks: int, engine: str = "ddp", *overrides: str) -> dict[str, torch.Tensor]:
    out = config.parent / "-".join([engine, str(ranks), *overrides, "out.safetensors"]).replace("/", "_")
    launch(["tests/two_process_worker.py", str(config), str(STEPS), str(out), *overrides], ranks, engine)
    return load_file(out)


@pytest.fixture(scope="module")
def alone(config):
    return steps(config, 1)


@pytest.mark.parametrize(
    ("preset", "ranks", "accumulation"),
    [("paper", 1, 2), ("paper", 2, 1), ("paper", 2, 3), ("paper", 3, 1), ("tutorial", 2, 3)],
)
def test_any_split_of_the_global_batch_has_the_same_loss_and_gradient(config, alone, preset, ranks, accumulation):
    alone = alone if preset == "paper" else steps(config, 1, "ddp", f"model.preset={preset}")
    split = steps(config, ranks, "ddp", f"model.preset={preset}", f"train.accumulation_steps={accumulation}")
    torch.testing.assert_close(split["lines"], alone["lines"], rtol=1e-6, atol=1e-7)
    scale = alone["gradients"].abs().amax(1, keepdim=True)
    torch.testing.assert_close(split["gradients"] / scale, alone["gradients"] / scale, rtol=0, atol=2e-6)


def test_deepspeed_takes_the_same_steps(config, alone):
    split = steps(config, 2, "zero2", "train.accumulation_steps=2")
    torch.testing.assert_close(split["lines"], alone["lines"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split["weights"], alone["weights"], rtol=0, atol=2e-5)


def moving_average(values: torch.Tensor) -> torch.Tensor:
    """0.9 b + 0.1 v over `values` [steps], from zero."""
    averages = [0.0]
    for value in values.tolist():
        averages.append(0.9 * averages[-1] + 0.1 * value)
    return torch.tensor(averages[1:]).double()


def test_hard_attentions_baseline_follows_the_global_loss_on_every_rank(config):
    found = steps(config, 2, "ddp", "model.attention=hard", "train.accumulation_steps=2")
    expected = moving_average(found["lines"][:, 0])
    torch.testing.assert_close(found["baselines"], expected[:, None].expand(-1, 2), rtol=1e-5, atol=0)
    parts = found["micro_batches"]  # [steps, 2 ranks x 2]
    assert parts.shape == (STEPS, 4)
    for other in (*parts.t(), parts[:, :2].mean(1), parts[:, 2:].mean(1), parts.mean(1)):
        assert (moving_average(other) / expected - 1).abs().max() > 1e-4  # none of these would have passed


@pytest.fixture(scope="module")
def trained(config):
    launch(["-m", "sat.train", str(config), "tracking.mlflow_uri=none"], 2)
    return config.parent / "run"


def test_evaluation_counts_each_of_an_odd_number_of_images_once_on_any_ranks(trained):
    reports = []
    for ranks in (1, 2, 3):
        launch(["-m", "sat.evaluate", str(trained), "--split", "val", "--baselines"], ranks)
        captions = json.loads((trained / "captions-val.json").read_text())
        assert [each["image_id"] for each in captions] == [f"val-{i}" for i in range(7)]
        reports.append((captions, json.loads((trained / "evaluation-val.json").read_text())))
    assert reports[0] == reports[1] == reports[2]
    assert reports[0][1]["images"] == 7


def test_a_stopped_training_goes_on_exactly_where_it_was(config, trained):
    """Killed by a stop file at an arbitrary step; the same weights, bit by bit, as the undisturbed run."""
    other = config.parent / "resumed"
    overrides = [f"train.run_dir={other}", "tracking.mlflow_uri=none", "train.log_every=1"]
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
