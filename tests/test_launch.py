"""The launcher configurations say how many processes and which engine, no more; a launch without a group is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))

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
