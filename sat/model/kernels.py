"""Which code does the numeric work on this machine: kernels of the time loop, and fp32 matrix products on CPUs.

Surprising: PyTorch's default fp32 products (MKL) run at 60-85 % of the speed of oneDNN's on AMD CPUs. The switch to oneDNN is
called "bf16" because it permits lower precision; on CPUs without AMX oneDNN computes in full fp32 all the same. So it is set
by kind of CPU and only after a product in fp32 was seen to be as exact as before.
"""

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sat.model import native, torch_kernels

EXACT = 4e-6
"""Relative error allowed to an fp32 product of inner length 2048; bf16 rounding would give 2e-3."""


def choose_kernels(compile: str, like: Tensor) -> ModuleType:
    """Kernels of the time loop for tensors such as `like`: `native` on CPUs, `torch_kernels` elsewhere or where it must.

    `compile`: `auto`, `never` (no compiler is called) or `always` (ValueError where the kernels cannot be built).
    """
    if compile == "never" or like.device.type != "cpu" or like.dtype == torch.float16:
        return torch_kernels
    library, explanation = native.library()
    if library is None and compile == "always":
        raise ValueError(f"train.compile is always, but the native kernels are not there: {explanation}; use auto or never")
    return torch_kernels if library is None else native


def speed_up(compile: str, device: torch.device | str) -> str:
    """Build the kernels and route matrix products before the first step; returns one line for the log."""
    if torch.device(device).type != "cpu":
        return "time loop in PyTorch kernels"
    if compile == "never":
        loop = "PyTorch kernels (train.compile=never)"
    elif choose_kernels(compile, torch.empty(0)) is native:
        loop = f"native kernels from {native.library()[1]}"
    else:
        loop = f"PyTorch kernels ({native.library()[1]})"
    return f"time loop in {loop}; fp32 products by {_route_fp32_products()}"


def _route_fp32_products() -> str:
    flags = _cpu_flags()
    if "AuthenticAMD" not in flags or "avx512f" not in flags or any("amx" in flag for flag in flags):
        return "torch's default library"
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if (error := _product_error()) < EXACT:
        return f"oneDNN (full precision: relative error {error:.0e})"
    torch.backends.mkldnn.matmul.fp32_precision = before
    return f"torch's default library (oneDNN would round: relative error {error:.0e})"


def _product_error() -> float:
    """Largest relative error of fp32 products in the shapes and layouts of a training step."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for rows in (1, 5, 160):
        a = torch.randn(rows, 2048, generator=generator)
        b = torch.randn(2048, 256, generator=generator)
        exact = a.double() @ b.double()
        for product in (a @ b, a @ b.t().contiguous().t(), a.t().contiguous().t() @ b):
            errors.append(float((product - exact).norm() / exact.norm()))
    return max(errors)


def _cpu_flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text().split("\n\n")[0].split())
    except OSError:
        return set()
