"""The one table of encoders: architecture -> builder, and a weights file -> frozen encoder.

The file says which architecture it is of and what it expects of a picture; without metadata it is a ResNet-50 of
torchvision's. Nothing is downloaded here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sat.model.encoders import resnet, timm_network
from sat.model.encoders.encoder import GridEncoder, refuse_unfit
from sat.model.encoders.weights import RESNETS, TIMM, AboutWeights, Pixels, read_about, refuse_unknown


def build_encoder(
    architecture: str, stage: int = 0, pixels: Pixels | None = None
) -> resnet.ResNet | timm_network.TimmNetwork:
    """An encoder with random weights, open for training; `pixels` None: what the architecture's own weights expect.

    ValueError for an architecture or a stage that does not exist.
    """
    refuse_unknown(architecture)
    if architecture in RESNETS:
        return resnet.ResNet(architecture, stage, pixels)
    return timm_network.TimmNetwork(architecture, stage, pixels)


def blueprint(path: str | Path, stage: int, size: int) -> GridEncoder:
    """The encoder of a weights file without its weights, for what it gives and expects of pictures of this size.

    ValueError for a file, stage or size that does not fit.
    """
    about = read_about(path)
    with torch.device("meta"):
        encoder = build_encoder(about.architecture, stage, about.pixels)
    if encoder.fixed_size and size != encoder.pixels.size:
        raise ValueError(
            f"{about.architecture} takes pictures of {encoder.pixels.size} x {encoder.pixels.size} pixels alone, "
            f"not {size}; choose size {encoder.pixels.size}"
        )
    _place(encoder, about)
    encoder.spec.cells(size)
    return encoder


def load_encoder(path: str | Path, architecture: str = "", stage: int = 0) -> resnet.ResNet | timm_network.TimmNetwork:
    """A frozen encoder in eval mode from a weights file; `architecture` empty: the one that the file names.

    The classifier and the stages above `stage` may be there or not; all else has to fit exactly. ValueError naming the
    file, for one that is missing or damaged with what to do, else with the keys that do not fit.
    """
    about = read_about(path)
    architecture = architecture or about.architecture
    try:
        with _Unfilled():  # type: ignore[no-untyped-call]  # torch has no types here
            encoder = build_encoder(architecture, stage, about.pixels)
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    expected = parameters_of(encoder)
    refuse_unfit(path, weights, expected, _kind(architecture), _whole_names(architecture))
    kept = {name: tensor for name, tensor in weights.items() if name in expected}
    _named_module(encoder).load_state_dict(kept, strict=False)  # only num_batches_tracked may be absent
    _place(encoder, about)
    return encoder.requires_grad_(False).eval()


class _Unfilled(TorchDispatchMode):
    """Leaves out the random first weights, which a file's take the place of: most of the time that building takes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0]
        return func(*args, **(kwargs or {}))


def _place(encoder: resnet.ResNet | timm_network.TimmNetwork, about: AboutWeights) -> None:
    """Have the encoder say where these weights look, if they say it."""
    if encoder.stage in about.centres and encoder.architecture == about.architecture:
        encoder.spec = replace(encoder.spec, first_centre=about.centres[encoder.stage])


def parameters_of(encoder: resnet.ResNet | timm_network.TimmNetwork) -> dict[str, Tensor]:
    """The encoder's tensors under the names that a weights file has: torchvision's or timm's."""
    tensors: dict[str, Tensor] = _named_module(encoder).state_dict()
    return tensors


def _named_module(encoder: resnet.ResNet | timm_network.TimmNetwork) -> nn.Module:
    network: nn.Module = encoder.network if isinstance(encoder, timm_network.TimmNetwork) else encoder
    return network


def _kind(architecture: str) -> str:
    if architecture in RESNETS:
        return f"a ResNet-{architecture.removeprefix('resnet')} with torchvision's names"
    return f"a {architecture.removeprefix(TIMM)} with timm's names"


def _whole_names(architecture: str) -> frozenset[str]:
    names = resnet.whole_names if architecture in RESNETS else timm_network.whole_names
    return names(architecture)
