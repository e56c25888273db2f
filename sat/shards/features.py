"""What a feature is: the one table of storage types, the one npy header, the one view of a fingerprint.

A FeatureSpec is a typed view of a data set's fingerprint, the document on disk. bfloat16 has no npy type: it is stored
as its uint16 bit pattern, and the fingerprint's `dtype` says so.
"""

import io
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Part = TypeVar("Part", "EncoderSpec", "Transform")

NPY_HEADER = 128
"""Bytes of the npy header before every grid."""
KINDS = ("grid", "regions")
"""What a picture's features are: a `grid` has the same cells for every picture, `regions` are as many as were found."""


@dataclass(frozen=True)
class StorageType:
    """A type on disk: what numpy calls it, and what torch calls the numbers that the bits mean."""

    numpy: np.dtype[Any]
    torch: str


STORAGE = {
    "bf16": StorageType(np.dtype("<u2"), "bfloat16"),
    "fp16": StorageType(np.dtype("<f2"), "float16"),
    "fp32": StorageType(np.dtype("<f4"), "float32"),
    "int8": StorageType(np.dtype("|i1"), "int8"),
}
"""Storage types by the fingerprint's name."""


def storage_type(dtype: str) -> StorageType:
    """The storage type of this name. ValueError, listing the choices, for one that does not exist."""
    if dtype not in STORAGE:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(STORAGE)}")
    return STORAGE[dtype]


@dataclass(frozen=True)
class EncoderSpec:
    """The network in front of the features, the stage of it that they are taken from, and where its cells look.

    Written down as a whole, so that reading a data set needs no network; `sat.model.encoders` fills it.
    """

    architecture: str
    """`resnet50`, `resnet101`, `resnet152` or `timm/NAME`."""
    stage: int
    """0: the network's last features, else its n-th stage, counted from 1."""
    dim: int
    """Width D of a cell's features."""
    stride: float
    """Pixels of the encoder's input between two neighbouring cells, down and across."""
    first_centre: float
    """Pixel (0 is the middle of the first one) at the centre of the first cell's receptive field, down and across."""
    weights_sha256: str = ""
    """SHA-256 of the frozen weights' file."""
    trained_from: str = ""
    """Instead of it, for an encoder that is trained with the captioner: SHA-256 of the weights it began from."""

    def cells(self, size: int) -> tuple[int, int]:
        """Cells (rows, columns) of a picture of `size` x `size` pixels. ValueError unless they cover it exactly."""
        if size < self.stride or size % self.stride:
            near = [round(max(1, round(wanted / self.stride)) * self.stride) for wanted in (224, 448)]
            raise ValueError(
                f"size {size} is not a multiple of {self.stride:g}, the stride of {self.architecture}'s stage "
                f"{self.stage}; use e.g. {' or '.join(map(str, near))}"
            )
        side = round(size / self.stride)
        return side, side


@dataclass(frozen=True)
class Transform:
    """What a picture goes through before the encoder."""

    size: int
    """Pixels per side of what the encoder sees."""
    geometry: str
    """`squash` or `center_crop`, see `pictures.fit`."""
    resize: str = ""
    """How `pictures.fit` computes."""
    interpolation: str = ""
    """`bicubic` or `bilinear`, see `pictures.fit`."""
    mean: tuple[float, ...] = ()
    """Of the pixels in 0..1 per RGB channel: subtracted from them,"""
    std: tuple[float, ...] = ()
    """and what they are divided by then."""


@dataclass(frozen=True)
class FeatureSpec:
    """What the features of every picture of a data set are, or what a model was trained on."""

    kind: str
    """Name in KINDS."""
    cells: tuple[int, int]
    """Rows and columns of the grid; (0, 0) for regions."""
    dim: int
    """Width D of a cell's features."""
    dtype: str
    """Name in STORAGE; empty for features that are computed while training and never stored."""
    encoder: EncoderSpec | None
    transform: Transform | None
    """Both None where the features were not made from pictures."""
    scale_sha256: str = ""
    """int8 only: SHA-256 of the scales per channel."""
    max_regions: int = 0
    """Regions only: the most that a picture has."""
    boxes: bool = False
    """Regions only: whether each has its box, float32 [L_i, 4] x0 y0 x1 y1 in 0..1."""
    made_by: str = ""
    """What made features from elsewhere, as the user calls it: nothing else tells two such sets of one shape apart."""

    @property
    def locations(self) -> int:
        """L: the cells of a grid, or the most regions of a picture."""
        return self.cells[0] * self.cells[1] if self.kind == "grid" else self.max_regions

    def centres(self) -> npt.NDArray[np.float64]:
        """float64 [L, 2]: (x, y) of each cell's receptive field's centre in pixels of the encoder's input.

        0 is the middle of the first pixel. ValueError for features without cells or of an unknown encoder.
        """
        if self.kind != "grid" or self.encoder is None:
            raise ValueError(
                f"where these features ({self.kind}) look is not known; only a grid made by an encoder says it"
            )
        rows, columns = (self.encoder.first_centre + self.encoder.stride * np.arange(count) for count in self.cells)
        y, x = np.meshgrid(rows, columns, indexing="ij")
        return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float64)

    @property
    def shape(self) -> tuple[int, int]:
        """[L, D] of one picture's features; of regions the largest."""
        return self.locations, self.dim

    @property
    def stored(self) -> np.dtype[Any]:
        """numpy type of the array on disk. ValueError for features that are never stored."""
        return storage_type(self.dtype).numpy

    @property
    def torch(self) -> str:
        """Name of the torch type whose bits are stored, an attribute of the module. ValueError as `stored`."""
        return storage_type(self.dtype).torch

    @property
    def npy_header(self) -> bytes:
        """The NPY_HEADER bytes before the data of every array on disk; of regions those of the largest."""
        return npy_header(self.stored, self.shape)

    def npy_bytes(self, stored: npt.NDArray[Any]) -> bytes:
        """One picture's features [L, D] (regions: [L_i, D]) in the stored type as an npy file, version 1."""
        fits = stored.shape == self.shape or (
            self.kind == "regions" and stored.shape[1:] == (self.dim,) and 0 < len(stored) <= self.max_regions
        )
        assert fits and stored.dtype == self.stored, f"{stored.dtype} array {stored.shape}"
        return npy_header(self.stored, stored.shape) + np.ascontiguousarray(stored).tobytes()

    @property
    def about_values(self) -> dict[str, str]:
        """What a sample's .json says of the numbers in its array: `dtype`, and of int8 the digest of the scales."""
        return {"dtype": self.dtype} | ({"scale_sha256": self.scale_sha256} if self.scale_sha256 else {})

    @staticmethod
    def boxes_bytes(boxes: npt.NDArray[np.float32]) -> bytes:
        """The boxes of one picture's regions, float32 [L_i, 4], as an npy file, version 1."""
        assert boxes.dtype == np.float32 and boxes.shape[1:] == (4,), f"{boxes.dtype} array {boxes.shape}"
        return npy_header(np.dtype("<f4"), boxes.shape) + np.ascontiguousarray(boxes, "<f4").tobytes()

    @classmethod
    def from_fingerprint(cls, fingerprint: Mapping[str, Any]) -> "FeatureSpec":
        """The view of a data set's or trained model's document.

        ValueError for a document of no features, or one that says what this program does not know.
        """
        kind = fingerprint.get("kind", "grid")
        if kind not in KINDS:
            raise ValueError(f"features of kind {kind!r} are unknown to this program; it reads {', '.join(KINDS)}")
        missing = [name for name in ("grid" if kind == "grid" else "max_regions", "dim") if name not in fingerprint]
        if missing:
            raise ValueError(f"the fingerprint does not say {' and '.join(missing)}; it is not one of features")
        height, width = fingerprint.get("grid", (0, 0))
        return cls(
            kind=kind,
            cells=(height, width),
            dim=fingerprint["dim"],
            dtype=fingerprint.get("dtype", ""),
            encoder=_part(EncoderSpec, "encoder", fingerprint.get("encoder")),
            transform=_part(Transform, "transform", fingerprint.get("transform")),
            scale_sha256=fingerprint.get("scale_sha256", ""),
            max_regions=fingerprint.get("max_regions", 0),
            boxes=fingerprint.get("boxes", False),
            made_by=fingerprint.get("made_by", ""),
        )

    def to_fingerprint(self) -> dict[str, Any]:
        """The entries of the document that this is a view of; what is empty has no entry."""
        document: dict[str, Any] = {"encoder": _document(self.encoder), "transform": _document(self.transform)}
        if self.kind == "grid":
            document |= {"grid": list(self.cells)}
        else:
            document |= {"kind": self.kind, "max_regions": self.max_regions, "boxes": self.boxes}
        document |= {"dim": self.dim, "dtype": self.dtype, "scale_sha256": self.scale_sha256, "made_by": self.made_by}
        return {name: value for name, value in document.items() if value != ""}

    def refuse(self, other: "FeatureSpec | None", where: str) -> None:
        """ValueError, naming `where` and both values, unless `other` is made as this one is."""
        if other is None:
            raise ValueError(f"{where}: it holds pictures, but features are needed; extract them first")
        ours, theirs = (
            {"kind": each.kind, "dtype": "", "made_by": ""} | each.to_fingerprint() for each in (self, other)
        )
        for name in sorted(ours.keys() | theirs.keys(), key=lambda name: (name != "encoder", name)):  # the cause first
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"{where}: its {name} is {theirs.get(name)!r}, but {ours.get(name)!r} is needed; "
                    "extract the features again with the same encoder and settings"
                )


def npy_header(stored: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The NPY_HEADER bytes before an array of this type and shape in an npy file, version 1."""
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    assert buffer.tell() == NPY_HEADER, f"npy header of {buffer.tell()} bytes for shape {shape}"
    return buffer.getvalue()


def _part(made_of: type[Part], name: str, document: Mapping[str, Any] | None) -> Part | None:
    if document is None:
        return None
    known = {field.name: field.default is MISSING for field in fields(made_of)}
    unknown = sorted(document.keys() - known.keys())
    if unknown:
        raise ValueError(f"the fingerprint's {name} says {', '.join(unknown)}, which this program does not know")
    missing = [field for field, required in known.items() if required and field not in document]
    if missing:
        raise ValueError(f"the fingerprint's {name} does not say {', '.join(missing)}; extract the features again")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
    return made_of(**values)


def _document(part: EncoderSpec | Transform | None) -> dict[str, Any] | None:
    if part is None:
        return None
    entries = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(part).items()}
    return {name: value for name, value in entries.items() if value not in ("", [])}
