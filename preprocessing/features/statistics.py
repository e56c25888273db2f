"""The values of grids on disk: how they are rounded, and the statistics that standardise them.

The surprising decision: statistics are those of the values a reader gets back, after rounding, not of what the network
put out.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from preprocessing.sharding.plan import FeatureSettings, ImportSettings, Plan
from sat import files
from sat.shards.features import storage_type
from sat.shards.manifest import load_manifest, load_statistics
from sat.shards.schema import Sidecar

Floats = npt.NDArray[np.float32]
MIN_STD = 1e-6
"""Floor of the standard deviation, so that a channel that never fires stays finite when it is divided by it."""
CALIBRATION_IMAGES = 256
"""Pictures from which the int8 scales are taken."""
MOST_CLIPPED = 0.05
"""Share of a shard's values that int8 may cut off; scales of 256 pictures of the same kind cut off about 0.01 %."""
CLIPPED = "values beyond the int8 scale"
"""What is noted of pictures that have some."""


def store(values: Floats, dtype: str, scale: Floats) -> npt.NDArray[Any]:
    """float32 [..., D] -> the stored type, rounded to nearest even; int8 divides by `scale` [D] and clips to +-127."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        values = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    elif dtype == "int8":
        values = np.clip(np.rint(values / scale), -127, 127)
    with np.errstate(over="ignore"):  # what fp16 cannot hold becomes infinite, which the extractor refuses by key
        stored: npt.NDArray[Any] = values.astype(storage_type(dtype).numpy)
    return stored


def restore(stored: npt.NDArray[Any], dtype: str, scale: Floats | None = None) -> Floats:
    """The stored type [..., D] -> float32 values, as a reader gets them."""
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    values: Floats = stored.astype(np.float32)
    if dtype != "int8":
        return values
    assert scale is not None, "int8 has a scale"
    return values * scale


def calibrate(grids: Iterable[Floats]) -> Floats:
    """Scale per channel, float32 [D]: the largest magnitude over the sample grids (float32 [..., D]) becomes 127."""
    largest = np.max([np.abs(grid).reshape(-1, grid.shape[-1]).max(axis=0) for grid in grids], axis=0)
    scale: Floats = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return scale


def scale_from(folder: str, dim: int) -> Floats:
    """Scale per channel, float32 [D], of a finished int8 data set, for another that is to be mixed with it.

    ValueError where it holds no int8 features, or those of another width.
    """
    manifest = load_manifest(folder)
    spec = manifest.spec
    if spec is None or (spec.dtype, spec.dim) != ("int8", dim):
        found = manifest.kind if spec is None else f"{spec.dtype} features of width {spec.dim}"
        raise ValueError(f"--scale-from {folder}: it holds {found}, expected int8 features of width {dim}")
    return load_statistics(manifest)["scale"]


def packed(scale: Floats) -> tuple[str, str]:
    """A scale, float32 [D], as a plan's settings hold it (little-endian, in base64), and the SHA-256 of its bytes."""
    blob = scale.astype("<f4").tobytes()
    return base64.b64encode(blob).decode(), files.sha256_of(blob)


def scale_of(plan: Plan) -> Floats:
    """Scale per channel of a plan of features, float32 [D]: the plan's for int8, else ones."""
    assert isinstance(plan.settings, FeatureSettings | ImportSettings), "pictures have no channels of features"
    if not plan.settings.scale:
        return np.ones(plan.fingerprint["dim"], np.float32)
    return np.frombuffer(base64.b64decode(plan.settings.scale), "<f4").copy()


class ChannelSums:
    """Count, sum and sum of squares per channel, in float64."""

    def __init__(self, dim: int):
        self.count, self.sum, self.squares = 0, np.zeros(dim), np.zeros(dim)
        self.clipped, self.clipped_pictures = 0, 0

    def add(self, values: Floats) -> None:
        """Count float32 values [..., L, D]; the L cells of a grid are summed in float32, grids in float64."""
        self.count += values.size // values.shape[-1]
        self.sum += values.sum(axis=-2).reshape(-1, len(self.sum)).sum(axis=0, dtype=np.float64)
        squares = np.einsum("...ld,...ld->...d", values, values)
        self.squares += squares.reshape(-1, len(self.sum)).sum(axis=0, dtype=np.float64)

    @property
    def finite(self) -> bool:
        """False from the first value on that is NaN or infinite, as both stay in a sum, or so large that a sum is."""
        return bool(np.isfinite(self.squares).all())

    def add_clipped(self, values: Floats, scale: Floats) -> None:
        """Count what int8 cuts off of float32 values [B, L, D], before they are stored."""
        beyond = np.count_nonzero(np.abs(values) >= 127.5 * scale, axis=(1, 2))
        self.clipped += int(beyond.sum())
        self.clipped_pictures += int(np.count_nonzero(beyond))

    def extra(self, shard: str) -> dict[str, Any]:
        """`to_json`, and a note of clipped pictures. ValueError where more than MOST_CLIPPED of the values were."""
        if self.clipped > MOST_CLIPPED * self.count * len(self.sum):
            share = self.clipped / (self.count * len(self.sum))
            raise ValueError(
                f"{shard}: int8 would cut off {share:.2%} of the values, {MOST_CLIPPED:.0%} may be; "
                "take these features' own scales (plan without --scale-from), or --dtype bf16"
            )
        return self.to_json() | ({"notes": {CLIPPED: self.clipped_pictures}} if self.clipped else {})

    def to_json(self) -> dict[str, Any]:
        """For the sidecar: exact (float64 bytes in base64)."""
        return {"count": self.count, "sum": _to_base64(self.sum), "squares": _to_base64(self.squares)}

    def add_json(self, document: Mapping[str, Any]) -> None:
        """Count what `to_json` gave of others."""
        self.count += document["count"]
        self.sum += _from_base64(document["sum"])
        self.squares += _from_base64(document["squares"])


def _to_base64(array: npt.NDArray[np.float64]) -> str:
    return base64.b64encode(array.astype("<f8").tobytes()).decode()


def _from_base64(text: str) -> npt.NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), "<f8")


def merge_statistics(sidecars: Iterable[Sidecar], splits: Sequence[str], dim: int, scale: Floats) -> bytes:
    """Bytes of statistics.safetensors: mean, std and scale per channel, over the shards of `splits` in their order.

    Without a shard of those splits (a data set only for evaluation) all shards count.
    """
    from safetensors.numpy import save

    named, everything = ChannelSums(dim), ChannelSums(dim)
    for sidecar in sidecars:
        for sums in (everything, named) if sidecar.split in splits else (everything,):
            sums.add_json(sidecar.extra)
    sums = named if named.count else everything
    mean = sums.sum / max(sums.count, 1)
    std = np.sqrt(np.maximum(sums.squares / max(sums.count, 1) - mean**2, 0))
    arrays = {"mean": mean, "std": np.maximum(std, MIN_STD), "scale": scale}
    blob: bytes = save({name: array.astype(np.float32) for name, array in arrays.items()})
    return blob
