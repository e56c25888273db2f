"""What a weights file says of itself: architecture, and the pixels it expects; read without torch.

Everything that was fetched or converted carries this as metadata of its safetensors file, so the file alone is enough
wherever an encoder is needed. A file without metadata is taken for a ResNet-50 of torchvision's.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

CONTENT_KEY = "content_sha256"
"""Metadata entry with `content_digest` of the file."""
CENTRES_KEY = "first_centres"
RESNETS = ("resnet50", "resnet101", "resnet152")
"""Architectures of torchvision's; all others are TIMM + NAME."""
LAST_RESNET_STAGE = 4
TIMM = "timm/"
"""Before timm's own name in an architecture's."""
LITES = {name: f"{TIMM}tf_efficientnet_{name}" for name in ("lite0", "lite2")}
"""What a user calls them -> architectures whose weights are in the package registry."""
INTERPOLATIONS = ("bicubic", "bilinear")
"""Ways to resize a picture that an encoder may ask for."""


@dataclass(frozen=True)
class Pixels:
    """What an encoder expects of a picture. The defaults are those of ImageNet's ResNets."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of the pixels in 0..1 per RGB channel: subtracted from them,"""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """and what they are divided by then."""
    interpolation: str = "bicubic"
    """How pictures are resized, one of INTERPOLATIONS."""
    size: int = 224
    """Pixels per side it was trained with."""

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown; choose one of {INTERPOLATIONS}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must be three numbers each, std above 0")


@dataclass(frozen=True)
class AboutWeights:
    """The metadata of a weights file."""

    architecture: str = RESNETS[0]
    pixels: Pixels | None = None
    """None where the file does not say: the architecture's own."""
    source: str = ""
    """Where the weights come from, in words."""
    centres: Mapping[int, float] = field(default_factory=dict)
    """First centre of the cells by stage, where these weights look elsewhere than their convolutions say."""

    def to_metadata(self) -> dict[str, str]:
        """The entries of a safetensors file, which are strings."""
        pixels = {} if self.pixels is None else {name: json.dumps(value) for name, value in vars(self.pixels).items()}
        centres = {CENTRES_KEY: json.dumps(dict(self.centres))} if self.centres else {}
        return {"architecture": self.architecture, "source": self.source} | pixels | centres


def read_about(path: str | Path) -> AboutWeights:
    """What the file says of itself. ValueError, naming it, for one that is missing, none, or says what cannot be."""
    if not Path(path).is_file():
        raise ValueError(f"encoder weights {path} do not exist; make them with `{fetch_command(path)}`")
    metadata = read_header(Path(path))[0].get("__metadata__") or {}
    names = [name for name in ("mean", "std", "interpolation", "size") if name in metadata]
    try:
        values = {name: json.loads(metadata[name]) for name in names}
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        pixels = replace(Pixels(), **given)
        centres = {int(n): float(v) for n, v in json.loads(metadata.get(CENTRES_KEY, "{}")).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"encoder weights {path}: its metadata cannot be read: {error}") from None
    own = metadata.get("architecture", RESNETS[0])
    return AboutWeights(own, pixels if names else None, metadata.get("source", ""), centres)


def refuse_unknown(architecture: str) -> None:
    """Raise ValueError, with the choices, for a name that is neither of torchvision's nor marked as one of timm's."""
    if architecture not in RESNETS and not architecture.startswith(TIMM):
        raise ValueError(
            f"encoder architecture {architecture!r} is unknown; choose one of {', '.join(RESNETS)} or {TIMM}NAME, "
            "any backbone of the timm library"
        )


def named_stage(architecture: str, stage: int) -> int:
    """The one name of a stage: the last features of torchvision's ResNets are those of their fourth."""
    return LAST_RESNET_STAGE if stage == 0 and architecture in RESNETS else stage


def fetch_command(path: str | Path) -> str:
    """What to type where these weights are missing."""
    name = next((LITES[lite] for lite in LITES if lite in Path(path).name), RESNETS[0])
    return f"python -m preprocessing.fetch_weights {name} --out {path}"


def content_digest(path: Path) -> str:
    """sha256 of a safetensors file but for its metadata: names, types and places of the tensors, their bytes; hex."""
    header, offset = read_header(path)
    header.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    with open(path, "rb") as file:
        file.seek(offset)
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(header, offset of the tensors) of a safetensors file; ValueError when it is none."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(100 << 20, path.stat().st_size):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        return header, 8 + length
    except ValueError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
