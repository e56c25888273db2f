"""The launcher configurations say how many processes and which engine, no more; a launch without a group is refused.

Each that computes on processors is launched: training, evaluation and export come out the same under all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sat.engine.launcher import launch as launch_ours
from tests.helpers_engines import launch, small_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))

ON_CPUS = [path.stem for path in CONFIGS if yaml.safe_load(path.read_text())["use_cpu"]]
ON_GPUS = [path for path in CONFIGS if path.stem not in ON_CPUS]

MACHINERY = {
    "compute_environment",
    "distributed_type",
    "use_cpu",
    "gpu_ids",
    "num_machines",
    "num_processes",
    "machine_rank",
    "main_process_port",
    "rdzv_backend",
    "same_network",
    "mixed_precision",
    "deepspeed_config",
}
ENGINE = {
    "zero_stage",
    "zero3_init_flag",
    "offload_optimizer_device",
    "offload_param_device",
    "deepspeed_multinode_launcher",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_launcher_configuration_sets_nothing_that_shapes_the_result(path):
    config = yaml.safe_load(path.read_text())
    assert set(config) <= MACHINERY
    assert config["mixed_precision"] == "no"  # train.precision decides
    assert set(config.get("deepspeed_config", ())) <= ENGINE


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_key(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        (["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"], {}),
        ([], {"WORLD_SIZE": "2", "RANK": "0"}),
    ],
    ids=["one_process_for_two", "announced_but_alone"],
)
def test_ranks_that_would_train_apart_are_refused_with_the_right_command(tmp_path, launcher, variables):
    program = tmp_path / "program.py"
    program.write_text("from sat.engine.start import start\nstart('fp32', 60)\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, *launcher, str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "accelerate launch --config_file launch/cpu.yaml" in done.stderr


# ------------------------------------------------------------------ launched


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return small_config(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def trained(config):
    """Run folder of an epoch on two ranks, by a launcher configuration; evaluation and export are at its end."""
    known = {}

    def under(launcher: str) -> Path:
        if launcher not in known:
            known[launcher] = config.parent / launcher
            places = [f"train.run_dir={known[launcher]}", "tracking.mlflow_uri=none", "train.epochs=1"]
            launch(["-m", "sat.train", str(config), *places], 2, launcher)
        return known[launcher]

    return under


@pytest.mark.parametrize("launcher", ON_CPUS)
def test_training_evaluation_and_export_are_the_same_under_every_configuration_for_processors(trained, launcher):
    ours, plain = trained(launcher), trained("cpu")
    assert json.loads((ours / "status.json").read_text())["state"] == "finished"
    assert {path.name for path in (ours / "best").iterdir()} == {path.name for path in (plain / "best").iterdir()}
    for name in ("captions/step-00000004.json", "best/tokenizer.json"):
        assert (ours / name).read_bytes() == (plain / name).read_bytes()
    assert scores(ours) == scores(plain)
    weights, theirs = (load_file(run / "best/model.safetensors") for run in (ours, plain))
    assert weights.keys() == theirs.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("launcher", [None, "deepspeed_zero3_cpu"])
def test_a_trained_model_is_scored_as_at_its_trainings_end(trained, launcher):
    run = trained("cpu")
    launch(["-m", "sat.evaluate", str(run), "--split", "val"], 2 if launcher else 1, launcher)
    known = json.loads((run / "captions/step-00000004.json").read_text())
    assert json.loads((run / "captions-val.json").read_text()) == known


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_a_configuration_for_gpus_is_refused_where_there_are_none(monkeypatch, path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"{path.name} is for GPUs, one per process: \d+ on this machine .*cpu.yaml"):
        launch_ours(path, "sat.train", ["configs/demo.yaml"])


def scores(run: Path) -> dict[str, float]:
    """Of the only evaluation of a training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "val/CIDEr" in line]
    return {name: value for name, value in line.items() if name in ("val/CIDEr", "val/BLEU-4", "best/step")}
