"""Which kernels serve: native on CPUs, Triton's on GPUs, where they can be built; else, or on request, PyTorch's."""

import functools

import torch
from torch import Tensor

from sat.model.kernels import native, torch_kernels, triton_kernels
from sat.model.kernels.interface import BeamKernels, Kernels
from sat.model.kernels.measured import packs
from sat.model.kernels.products import Bounded, Packed, Plain, Prepare, prepares_for_sizes
from sat.model.recording import Record, record_on_gpu


def choose_kernels(kernels: str, like: Tensor) -> Kernels:
    """Kernels for tensors such as `like`.

    `kernels`: `auto`, `torch` (no compiler is called) or `native` (ValueError where the kernels cannot be built).
    """
    if _native_serves(kernels, like):
        return native
    return triton_kernels if _triton_serves(kernels, like) else torch_kernels


def choose_beam_kernels(kernels: str, like: Tensor) -> BeamKernels | None:
    """The same for decoding; None where PyTorch's own operations serve."""
    if _native_serves(kernels, like):
        return native
    return triton_kernels if _triton_serves(kernels, like) else None


def choose_products(kernels: str, like: Tensor) -> Prepare:
    """What a matrix goes through before many batches of rows such as `like` are multiplied by it.

    `kernels`: with `torch` it is PyTorch's own product; else what is the quickest on this machine.
    """
    if packs(kernels, like):
        return Packed.of
    if not prepares_for_sizes(like):
        return Plain
    return functools.partial(Bounded, few=native.few_rows) if _native_serves(kernels, like) else Bounded


def choose_recorder(kernels: str, like: Tensor) -> Record | None:
    """What records a step whose kernels are those for tensors such as `like`.

    None where they are not Triton's: nothing is recorded on a CPU, and the launches of PyTorch's depend on numbers.
    """
    return _recorder(torch.cuda.current_device()) if choose_kernels(kernels, like) is triton_kernels else None


@functools.cache
def _recorder(device: int) -> Record:
    """Of the current `device`; its memory is shared by all models of a process."""
    del device
    return record_on_gpu()


def _native_serves(kernels: str, like: Tensor) -> bool:
    if kernels == "torch" or like.device.type != "cpu" or like.dtype == torch.float16:
        return False
    library, explanation = native.library()
    if library is None and kernels == "native":
        raise ValueError(f"train.kernels is native, but there are no native kernels: {explanation}; use auto or torch")
    return library is not None


def _triton_serves(kernels: str, like: Tensor) -> bool:
    """Programs run on the current device; a tensor of another one would be out of their reach."""
    if kernels != "auto" or like.device.type != "cuda" or like.dtype not in triton_kernels.TYPES:
        return False
    index = torch.cuda.current_device()
    return like.device.index == index and not triton_kernels.usable(index)
