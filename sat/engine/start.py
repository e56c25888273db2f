"""Join the processes that the launcher started: the only place that looks up ranks and chooses an engine."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sat.engine.ddp import Ddp
from sat.engine.engine import Engine
from sat.engine.launched import refuse_a_lonely_process, refuse_what_shapes_the_result, zero_settings
from sat.engine.meeting import meet
from sat.engine.network import choose_interface
from sat.engine.processes import Processes
from sat.engine.zero import Zero

_DRIVER = Path("/proc/driver/nvidia/gpus")
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def start(precision: str, timeout: float) -> Engine:
    """Join the process group that the launcher set up (or run alone) at `precision` fp32|bf16|fp16.

    A rank waits `timeout` seconds for the others, here and in every exchange afterwards. Raises ValueError for what
    cannot be computed here, and where the launcher's variables do not make one group: two trainings that both think
    they are rank 0 would overwrite each other. Raises StartAgain where a rank does not come.
    """
    on_cpu = not torch.cuda.is_available()
    if precision == "fp16" and on_cpu:
        raise ValueError("train.precision is fp16, which a CPU computes 15 times slower than bf16; use bf16 or fp32")
    refuse_a_lonely_process()
    refuse_what_shapes_the_result()
    _refuse_broken_gpus(on_cpu)
    choose_interface()
    zero = zero_settings()
    device = _join(zero is not None, on_cpu, timedelta(seconds=timeout))
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    processes = Processes(
        rank=dist.get_rank() if world_size > 1 else 0,
        world_size=world_size,
        device=device,
        autocast_type=_AUTOCAST[precision],
        host_group=dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if world_size > 1 else None,
    )
    return Zero(processes, zero) if zero else Ddp(processes)


def _join(with_deepspeed: bool, on_cpu: bool, timeout: timedelta) -> torch.device:
    """This rank's device, after the group has formed; a process alone forms none."""
    if with_deepspeed and "LOCAL_RANK" not in os.environ:
        raise ValueError("DeepSpeed needs a launcher: `sat train --launch launch/deepspeed_zero2.yaml CONFIG`")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not on_cpu:
        if local >= (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"rank {local} of this machine has no GPU of its own, there are {gpus}; start with --processes {gpus}"
            )
        torch.cuda.set_device(local)
    backend = "gloo" if on_cpu else "nccl"
    if "LOCAL_RANK" in os.environ:
        store, rank, world = meet(timeout.total_seconds())
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    if with_deepspeed:
        _join_deepspeed(backend, on_cpu, timeout)
    return torch.device("cpu") if on_cpu else torch.device("cuda", local)


def _join_deepspeed(backend: str, on_cpu: bool, timeout: timedelta) -> None:
    """Over the group that there is."""
    os.environ["DS_ACCELERATOR"] = "cpu" if on_cpu else "cuda"  # read at DeepSpeed's first import
    import deepspeed
    import deepspeed.ops

    if on_cpu:
        # Its shared-memory all-reduce wants a compiler and a minute, and aborts some processes at exit; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)


def _refuse_broken_gpus(on_cpu: bool) -> None:
    """A machine whose GPUs PyTorch cannot use would train on its CPU, and nobody would be told for days."""
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ  # by whoever asks for the CPU, as launch/cpu.yaml does
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    one_process_on_a_gpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "false"  # said where there is no rank
    if on_cpu and not hidden and by_accelerate and ("LOCAL_RANK" in os.environ or one_process_on_a_gpu):
        raise ValueError(
            f"the launcher's configuration is for GPUs, and PyTorch finds none on {socket.gethostname()}: take "
            "launch/cpu.yaml or launch/deepspeed_*_cpu.yaml to compute on CPUs, or set CUDA_VISIBLE_DEVICES=-1"
        )
    if on_cpu and not hidden and _DRIVER.is_dir() and any(_DRIVER.iterdir()):
        raise ValueError(
            f"{socket.gethostname()} has GPUs ({_DRIVER}), but PyTorch cannot use them: see what nvidia-smi and "
            "`python -c 'import torch; torch.cuda.init()'` say; to compute on the CPU all the same, set "
            "CUDA_VISIBLE_DEVICES=-1 or use launch/cpu.yaml"
        )
