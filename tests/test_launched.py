"""What the launcher, the shell or accelerate's own configuration may not do to a training, and what they may."""

import os
import subprocess
import sys

import pytest

from sat.engine.launched import refuse_a_lonely_process, refuse_what_shapes_the_result, zero_settings
from sat.engine.start import start
from sat.engine.zero import ZeroSettings


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No variable of any launcher."""
    for name in [*os.environ]:
        if name.startswith("ACCELERATE_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "asks for torch.compile"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "a DeepSpeed configuration of its own"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "set train.accumulation_steps instead"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "set train.clip_norm instead"),
    ],
)
def test_a_variable_that_would_shape_the_result_is_refused_by_name(monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value}.*{says}"):
        refuse_what_shapes_the_result()


def test_what_our_launcher_files_set_is_not_refused(monkeypatch):
    for name, value in {
        "ACCELERATE_DYNAMO_BACKEND": "no",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "none",
        "ACCELERATE_USE_CPU": "True",
    }.items():
        monkeypatch.setenv(name, value)
    refuse_what_shapes_the_result()
    assert zero_settings() is None


@pytest.mark.parametrize(
    ("stage", "optimizer", "weights", "expected"),
    [
        ("1", "none", "none", ZeroSettings(1)),
        ("2", "cpu", "none", ZeroSettings(2, True)),
        ("3", "cpu", "cpu", ZeroSettings(3, True, True)),
        ("0", "none", "none", "zero_stage 0 .* splits nothing"),
        ("3", "nvme", "none", "offload_optimizer_device nvme .* use cpu or none"),
        ("2", "cpu", "cpu", "offload_param_device cpu .* needs zero_stage 3, not 2"),
    ],
)
def test_deepspeed_does_what_the_launchers_file_says_or_names_what_it_does_not_do(
    monkeypatch, stage, optimizer, weights, expected
):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", optimizer)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", weights)
    if isinstance(expected, ZeroSettings):
        assert zero_settings() == expected
    else:
        with pytest.raises(ValueError, match=expected):
            zero_settings()


LONELY = "from sat.engine.launched import refuse_a_lonely_process as f; f()"
PARENT = "import os, subprocess, sys; os.environ.update({0!r}); sys.exit(subprocess.run({1!r}).returncode)"


@pytest.mark.parametrize(("by_the_shell", "code"), [(True, 0), (False, 1)])
def test_an_address_in_the_shell_is_no_announcement_and_one_from_the_launcher_is(by_the_shell, code):
    address = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    parent = PARENT.format({"ACCELERATE_MIXED_PRECISION": "no"} | address, [sys.executable, "-c", LONELY])
    before = os.environ | (address if by_the_shell else {})
    done = subprocess.run([sys.executable, "-c", parent], env=before, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert ("several processes were announced" in done.stderr) == (not by_the_shell)


@pytest.mark.parametrize(("name", "who"), [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")])
def test_copies_that_would_each_train_on_their_own_are_refused_with_the_right_command(monkeypatch, name, who):
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=f"{who}.* has started 2 copies .*launch/cpu.yaml.*unset {name}"):
        refuse_a_lonely_process()
    monkeypatch.setenv(name, "1")  # as slurm/on_all_nodes.sh starts a launcher
    refuse_a_lonely_process()


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "0"), ("ACCELERATE_USE_CPU", "False")])
def test_a_launch_for_gpus_does_not_train_on_processors_in_silence(monkeypatch, name, value):
    """Of several processes, and of one, as launch/gpu.yaml starts it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ValueError, match=r"is for GPUs, and PyTorch finds none on .*launch/deepspeed_\*_cpu.yaml"):
        start("fp32", 60)


def test_ranks_that_were_announced_to_a_process_alone_are_refused(monkeypatch):
    refuse_a_lonely_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="accelerate launch --config_file launch/cpu.yaml"):
        refuse_a_lonely_process()
    monkeypatch.setenv("LOCAL_RANK", "1")
    refuse_a_lonely_process()
