"""Processes and devices: the only importer of accelerate.

The surprise: counts and flags travel over a gloo group on the host, so that learning the global token count never waits
for a GPU; only gradients use the fast interconnect.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A rank that hears nothing for so long gives up; scoring on rank 0 must fit in it."""


@dataclass(frozen=True)
class Runtime:
    """This process among the others. `rank` and `world_size` are looked up here and nowhere else."""

    accelerator: Any
    rank: int
    world_size: int
    device: torch.device
    host_group: Any
    deepspeed: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # --- collectives on the host: all ranks enter ---------------------------------------------------------------------
    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.host_group)

    def run_on_main(self, action) -> Any:
        """Rank 0 runs `action()`, all ranks get its result; if it raises, all ranks raise, so nobody waits for ever."""
        outcome = None
        if self.is_main:
            try:
                outcome = (action(), None)
            except Exception as error:
                outcome = (None, error)
        result, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return result

    # --- the optimizer step, alike for DDP and DeepSpeed --------------------------------------------------------------
    def prepare(self, model: nn.Module, optimizer, *, micro_batch: int, accumulation_steps: int, clip_norm: float):
        """Wrap model and optimizer for DDP or DeepSpeed. The loader is never prepared: it splits by rank itself."""
        if self.deepspeed:
            engine_config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            engine_config["train_micro_batch_size_per_gpu"] = micro_batch
            engine_config["gradient_accumulation_steps"] = accumulation_steps
            engine_config["gradient_clipping"] = clip_norm
            self.accelerator.gradient_accumulation_steps = accumulation_steps
        return self.accelerator.prepare(model, optimizer)

    def forward_context(self, model: nn.Module, last: bool):
        """Context of one micro-batch's forward and backward: gradients are exchanged in the `last` one only."""
        self.accelerator.sync_gradients = last
        if last or self.deepspeed or self.world_size == 1:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def backward(self, loss: Tensor, accumulation_steps: int) -> None:
        """Back-propagate this rank's share of a loss already divided by global counts.

        DDP and DeepSpeed average over ranks, DeepSpeed over accumulation steps too: both are undone here.
        """
        scale = self.world_size * (accumulation_steps if self.deepspeed else 1)
        self.accelerator.backward(loss * scale)

    def step(self, model: nn.Module, optimizer, clip_norm: float) -> Tensor | float:
        """Clip, update, zero. Returns the gradient norm before clipping. DeepSpeed has done all three in backward."""
        if self.deepspeed:
            return self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm() or 0.0
        norm = self.accelerator.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model)

    def autocast(self):
        return self.accelerator.autocast()

    def leave(self) -> None:
        """End this process after all work is done, with exit code 0.

        With several ranks the interpreter's own shutdown is skipped: a gloo thread that still drops a tensor then aborts the
        process now and then, after a complete training.
        """
        self.accelerator.end_training()
        if self.world_size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def start(precision: str = "fp32") -> Runtime:
    """Join the process group that the launcher set up (or run alone) at `precision` fp32|bf16|fp16.

    Raises RuntimeError when the group that forms is not the one the launcher announced: two trainings that both think
    they are rank 0 would overwrite each other.
    """
    use_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    on_cpu = not torch.cuda.is_available()
    if use_deepspeed and on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it at its first import
        import deepspeed.ops

        # Its shared-memory all-reduce wants a compiler and a minute, and aborts some processes at exit; gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if precision == "fp16" and on_cpu:
        raise ValueError("train.precision is fp16, which a CPU computes 15 times slower than bf16; use bf16 or fp32")
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    _refuse_a_lonely_process(announced)
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if "LOCAL_RANK" in os.environ:
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=COLLECTIVE_TIMEOUT))
    accelerator = Accelerator(
        cpu=on_cpu and not use_deepspeed,
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=handlers,
        step_scheduler_with_optimizer=False,
    )
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if not announced == world_size == accelerator.num_processes:
        raise RuntimeError(
            f"the launcher announced WORLD_SIZE={announced}, the process group has {world_size} ranks and accelerate counts "
            f"{accelerator.num_processes}: ranks would train apart and overwrite each other; start with "
            "`accelerate launch --config_file launch/cpu.yaml -m sat.train CONFIG` (or launch/multi_gpu.yaml)"
        )
    rank = dist.get_rank() if world_size > 1 else 0
    return Runtime(
        accelerator=accelerator,
        rank=rank,
        world_size=world_size,
        device=accelerator.device,
        host_group=dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if world_size > 1 else None,
        deepspeed=use_deepspeed,
    )


def _refuse_a_lonely_process(announced: int) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process that nothing else tells from a plain one."""
    several = announced > 1 or {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if several and "LOCAL_RANK" not in os.environ:
        raise RuntimeError(
            "several processes were announced, but this one was started alone (as `accelerate launch --cpu --num_processes 2` "
            "does); start with `accelerate launch --config_file launch/cpu.yaml -m sat.train CONFIG`"
        )
