"""What the launcher says of this process in its environment, and what of that is refused.

`accelerate launch`, `torchrun` and a bare `python` are understood alike: WORLD_SIZE, RANK and LOCAL_RANK. Settings that
shape the result live in configs/ alone, so a variable that asks for another engine or other numbers is refused instead
of being followed or passed over in silence.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from sat.engine.zero import ZeroSettings

RIGHT = "`accelerate launch --config_file launch/cpu.yaml -m sat.train CONFIG` (or launch/multi_gpu.yaml)"
"""The command that starts several ranks."""
OF_COPIES = {
    "SLURM_STEP_NUM_TASKS": "srun --ntasks",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
"""Variable with a number of processes -> who starts them, without saying who is which rank."""
OFF = ("", "false", "no", "none", "0")
OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "other kinds of parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile",
    "ACCELERATE_FP8_BACKEND": "fp8",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "a DeepSpeed configuration of its own",
}
"""Variable of accelerate -> what it asks for."""


def announced() -> int:
    """The number of ranks, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_announced() -> bool:
    """Whether this is rank 0 of the launch, asked before the process group forms."""
    return os.environ.get("RANK", "0") == "0"


def refuse_what_shapes_the_result() -> None:
    """Raise ValueError where the launcher asks for what only the settings may decide, or what is not done here."""
    for name, what in OTHER_ENGINES.items():
        if (value := os.environ.get(name, "")).lower() not in OFF:
            raise ValueError(
                f"{name}={value} asks for {what}, which training does not do; it comes from the shell or from "
                "accelerate's own default configuration: unset it, or give one of launch/*.yaml by --config_file"
            )
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if asked not in ("1", "auto"):
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={asked}: set train.accumulation_steps instead, and unset it"
        )
    clip = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none").lower()
    if clip not in (*OFF, "auto"):
        raise ValueError(f"ACCELERATE_GRADIENT_CLIPPING={clip}: set train.clip_norm instead, and unset it")


def zero_settings() -> ZeroSettings | None:
    """Of DeepSpeed, where the launcher's file asks for it. Raises ValueError for what is not done here."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2", "3"):
        raise ValueError(
            f"zero_stage {stage} of the launcher's file splits nothing; use launch/multi_gpu.yaml, or 1 to 3"
        )
    optimizer, weights = (
        os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none").lower() for what in ("OPTIMIZER", "PARAM")
    )
    for what, device in (("optimizer", optimizer), ("param", weights)):
        if device not in ("none", "cpu"):
            raise ValueError(f"offload_{what}_device {device} of the launcher's file: use cpu or none")
    if weights == "cpu" and stage != "3":
        raise ValueError(f"offload_param_device cpu of the launcher's file needs zero_stage 3, not {stage}")
    return ZeroSettings(int(stage), optimizer == "cpu", weights == "cpu")


def refuse_a_lonely_process() -> None:
    """Raise ValueError where several ranks were meant, and this process was started alone.

    `accelerate launch --cpu --num_processes 2` starts one process; only the address of its first rank tells it from a
    plain one, and that may as well have been in the shell before. `srun` and `mpirun` start copies.
    """
    if "LOCAL_RANK" in os.environ:
        return
    for name, who in OF_COPIES.items():
        if (copies := os.environ.get(name, "1")) not in ("0", "1"):
            raise ValueError(
                f"{name}={copies}: {who} has started {copies} copies of this program, which would each train on their "
                f"own; start one, {RIGHT}, or slurm/train.sh (by intent one alone: unset {name})"
            )
    addressed = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if announced() > 1 or (addressed and not _was_there_before(("MASTER_ADDR", "MASTER_PORT"))):
        raise ValueError(
            "several processes were announced, but this one was started alone (as `accelerate launch --cpu "
            f"--num_processes 2` does); start with {RIGHT}"
        )


def _was_there_before(names: tuple[str, ...]) -> bool:
    """Whether the launcher, our parent, was itself started with our values of these variables."""
    before = _environment(os.getppid())
    return all(before.get(name) == os.environ.get(name) for name in names)


def _environment(pid: int) -> Mapping[str, str]:
    """That a process was started with; {} where it cannot be read."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)
