"""Which kernels serve: native on CPUs where they can be built, those in PyTorch elsewhere or on request."""

import torch
from torch import Tensor

from sat.model.kernels import native, torch_kernels
from sat.model.kernels.interface import BeamKernels, Kernels


def choose_kernels(kernels: str, like: Tensor) -> Kernels:
    """Kernels for tensors such as `like`.

    `kernels`: `auto`, `torch` (no compiler is called) or `native` (ValueError where the kernels cannot be built).
    """
    return native if _native_serves(kernels, like) else torch_kernels


def choose_beam_kernels(kernels: str, like: Tensor) -> BeamKernels | None:
    """The same for decoding; None where PyTorch's own operations serve."""
    return native if _native_serves(kernels, like) else None


def _native_serves(kernels: str, like: Tensor) -> bool:
    if kernels == "torch" or like.device.type != "cpu" or like.dtype == torch.float16:
        return False
    library, explanation = native.library()
    if library is None and kernels == "native":
        raise ValueError(f"train.kernels is native, but there are no native kernels: {explanation}; use auto or torch")
    return library is not None
