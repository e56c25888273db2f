"""Process-wide switches, thrown by programs alone: how many cores, how malloc keeps memory, who computes fp32 products.

Surprising: on AMD CPUs PyTorch's default fp32 products (MKL) run at 60-85 % of the speed of oneDNN's. The switch to
oneDNN is called "bf16" because it permits lower precision; on CPUs without AMX oneDNN computes in full fp32 all the
same. So it is set by kind of CPU, and only after a product in fp32 was seen to be as exact as before.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8
"""Parameters of glibc's mallopt (malloc.h)."""
EXACT = 4e-6
"""Relative error allowed to an fp32 product of inner length 2048; bf16 rounding would give 2e-3."""


def available_cores() -> int:
    """Cores this process may run on: fewer than the machine's in a container or under a scheduler."""
    return len(os.sched_getaffinity(0))


def best_precision() -> str:
    """`bf16` where the GPU or CPU computes in it natively, else `fp32`; imports torch.

    A CPU without AVX-512 or AMX emulates bf16, many times slower than it computes in fp32.
    """
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if native else "fp32"


def speed_up(kernels: str, device: object) -> str:
    """Build the kernels, route matrix products and tune malloc before the first step; returns one line for the log.

    `kernels` is the setting `train.kernels`, `device` a torch.device or its name.
    """
    import torch

    from sat.model.kernels import native
    from sat.model.kernels.choose import choose_kernels

    if torch.device(str(device)).type != "cpu":
        return _on_gpu(kernels)
    _keep_freed_memory()
    if kernels == "torch":
        loop = "PyTorch kernels (train.kernels=torch)"
    elif choose_kernels(kernels, torch.empty(0)) is native:
        loop = f"native kernels from {native.library()[1]}"
    else:
        loop = f"PyTorch kernels ({native.library()[1]})"
    products = _route_fp32_products()
    return f"soft attention in {loop}; fp32 products by {products}" + ("" if kernels == "torch" else _packed())


def _packed() -> str:
    import torch

    from sat.model.kernels.measured import gain

    found, gains = "", {"fp32": gain(torch.float32)}
    if best_precision() == "bf16":
        gains["bf16"] = gain(torch.bfloat16)
    for precision, each in gains.items():
        how = "packed once a step by oneDNN" if each.packs else "not packed"
        said = f"{each.ratio} times as fast" if each.ratio else "this machine has none, or they round"
        found += f"; {precision} weights of the time loop {how} ({said}; measured in {each.kept})"
    return found


def _on_gpu(kernels: str) -> str:
    import torch

    from sat.model.kernels import triton_kernels

    index = torch.cuda.current_device()
    reason = triton_kernels.usable(index) if kernels == "auto" else f"train.kernels={kernels}"
    loop = f"PyTorch kernels ({reason})" if reason else "Triton kernels, replayed as CUDA graphs,"
    return f"soft attention in {loop} on {torch.cuda.get_device_name(index)}"


def _keep_freed_memory() -> None:
    """Have glibc reuse freed blocks of up to 32 MB; giving them back and faulting them in costs 10 % of a step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


def keep_all_freed_memory() -> None:
    """Have glibc reuse freed blocks of any size: a network's maps of 100 MB, faulted in anew, cost it half its time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library
    mallopt(M_ARENA_MAX, 1)  # the arenas of threads hold no block above 64 MB; those there already stay in use:
    mallopt(M_TOP_PAD, 64 << 20)  # an arena gives back no part smaller than this, and its parts are of 64 MB
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _route_fp32_products() -> str:
    import torch

    backend: Any = torch.backends.mkldnn  # its types do not know `matmul`
    flags = _cpu_flags()
    if "AuthenticAMD" not in flags or "avx512f" not in flags or any("amx" in flag for flag in flags):
        return "torch's default library"
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "bf16"
    if (error := _product_error()) < EXACT:
        return f"oneDNN (full precision: relative error {error:.0e})"
    backend.matmul.fp32_precision = before
    return f"torch's default library (oneDNN would round: relative error {error:.0e})"


def _product_error() -> float:
    """Largest relative error of fp32 products in the shapes and layouts of a training step."""
    import torch

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
