"""Join the processes that the launcher started: the only place that looks up ranks and chooses an engine."""

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sat.engine.ddp import Ddp
from sat.engine.engine import Engine
from sat.engine.network import choose_interface
from sat.engine.processes import Processes
from sat.engine.zero import Zero

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A rank that hears nothing for so long gives up; scoring on rank 0 must fit in it."""
_DRIVER = Path("/proc/driver/nvidia/gpus")
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def start(precision: str = "fp32") -> Engine:
    """Join the process group that the launcher set up (or run alone) at `precision` fp32|bf16|fp16.

    Raises ValueError for what cannot be computed here, and when the group that forms is not the one the launcher
    announced: two trainings that both think they are rank 0 would overwrite each other.
    """
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    on_cpu = not torch.cuda.is_available()
    if precision == "fp16" and on_cpu:
        raise ValueError("train.precision is fp16, which a CPU computes 15 times slower than bf16; use bf16 or fp32")
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    _refuse_a_lonely_process(announced)
    _refuse_broken_gpus(on_cpu)
    choose_interface()
    accelerator = _join(with_deepspeed, on_cpu)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if not announced == world_size == accelerator.num_processes:
        raise ValueError(
            f"the launcher announced WORLD_SIZE={announced}, the process group has {world_size} ranks and accelerate "
            f"counts {accelerator.num_processes}: ranks would train apart and overwrite each other; start with "
            "`accelerate launch --config_file launch/cpu.yaml -m sat.train CONFIG` (or launch/multi_gpu.yaml)"
        )
    processes = Processes(
        rank=dist.get_rank() if world_size > 1 else 0,
        world_size=world_size,
        device=accelerator.device,
        autocast_type=_AUTOCAST[precision],
        host_group=dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if world_size > 1 else None,
    )
    return Zero(processes, accelerator) if with_deepspeed else Ddp(processes)


def is_first_announced() -> bool:
    """Whether this is rank 0 of the launch, asked before the process group forms."""
    return os.environ.get("RANK", "0") == "0"


def _join(with_deepspeed: bool, on_cpu: bool) -> Any:
    """Accelerate's view of this process, after the group has formed."""
    if with_deepspeed and on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it at its first import
        import deepspeed.ops

        # Its shared-memory all-reduce wants a compiler and a minute, and aborts some processes at exit; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    backend = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=COLLECTIVE_TIMEOUT)
    return Accelerator(
        cpu=on_cpu and not with_deepspeed,
        mixed_precision="no",  # autocast is entered around the forward pass, whatever the engine
        kwargs_handlers=[backend] if "LOCAL_RANK" in os.environ else [],
        step_scheduler_with_optimizer=False,
    )


def _refuse_a_lonely_process(announced: int) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process that nothing else tells from a plain one."""
    several = announced > 1 or {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if several and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "several processes were announced, but this one was started alone (as `accelerate launch --cpu "
            "--num_processes 2` does); start with "
            "`accelerate launch --config_file launch/cpu.yaml -m sat.train CONFIG`"
        )


def _refuse_broken_gpus(on_cpu: bool) -> None:
    """A machine whose GPUs PyTorch cannot use would train on its CPU, and nobody would be told for days."""
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ  # by whoever asks for the CPU, as launch/cpu.yaml does
    if on_cpu and not hidden and _DRIVER.is_dir() and any(_DRIVER.iterdir()):
        raise ValueError(
            f"{socket.gethostname()} has GPUs ({_DRIVER}), but PyTorch cannot use them: see what nvidia-smi and "
            "`python -c 'import torch; torch.cuda.init()'` say; to compute on the CPU all the same, set "
            "CUDA_VISIBLE_DEVICES=-1 or use launch/cpu.yaml"
        )
