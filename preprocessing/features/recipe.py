"""What shapes the bytes of a feature data set, as values: the typed view of the fingerprint of its plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preprocessing.sharding.plan import WRITER
from sat.settings import check, setting
from sat.shards.features import STORAGE, EncoderSpec, FeatureSpec, Transform
from sat.shards.pictures import GEOMETRIES


@dataclass(frozen=True)
class FeatureOptions:
    """What a user may choose about features. Raises ValueError, naming the choices, for what does not exist."""

    size: int = setting(224, at_least=1)
    """Side of the encoder's input in pixels: with a stride of 32, 224 gives 7x7 cells, 448 gives 14x14."""
    stage: int = setting(0, at_least=0)
    """Stage of the encoder whose output is kept; 0: its last features."""
    dtype: str = setting("bf16", choices=tuple(STORAGE))
    """Format on disk."""
    geometry: str = setting("squash", choices=GEOMETRIES)
    """What becomes of the parts of a picture that do not fit into a square."""
    compute: str = setting("auto", choices=("auto", "bf16", "fp32"))
    """Arithmetic of the network; auto: what this machine is best at, or what the plan that stands says."""
    batch_size: int = setting(32, at_least=1)
    """Pictures per pass through the network, of which the last bits of a product may depend."""
    statistics_splits: tuple[str, ...] = ()
    """Splits the statistics are taken from; none named: train, or all of a data set without it."""
    scale_from: str = ""
    """int8 only: folder of a finished int8 data set whose scales are taken, so that both can be mixed."""

    def __post_init__(self) -> None:
        check(self)
        if self.scale_from and self.dtype != "int8":
            raise ValueError(f"--scale-from is for --dtype int8; {self.dtype} has no scales")


@dataclass(frozen=True)
class FeatureRecipe:
    """Everything that shapes the bytes of a feature data set."""

    source: str
    """Digest of the image data set."""
    spec: FeatureSpec
    compute: str
    """Arithmetic of the network: bf16 or fp32."""
    batch_size: int
    """Pictures per pass through the network; a library may add up in another order for another number."""
    statistics_splits: tuple[str, ...]
    writer: int = WRITER

    @property
    def encoder(self) -> EncoderSpec:
        """The network."""
        assert self.spec.encoder is not None, "features are extracted by an encoder"
        return self.spec.encoder

    @property
    def transform(self) -> Transform:
        """What a picture goes through before it."""
        assert self.spec.transform is not None, "features are extracted from pictures"
        return self.spec.transform

    def reads(self, weights_sha256: str, stage: int, size: int) -> bool:
        """Whether these are features of that stage of that encoder, of pictures of that size."""
        wanted = (weights_sha256, stage, size)
        return wanted == (self.encoder.weights_sha256, self.encoder.stage, self.transform.size)

    def to_fingerprint(self) -> dict[str, Any]:
        """The document on disk."""
        document = {"writer": self.writer, "source": self.source, "compute": self.compute}
        document["batch_size"] = self.batch_size
        return document | {"statistics_splits": list(self.statistics_splits)} | self.spec.to_fingerprint()

    @classmethod
    def from_fingerprint(cls, fingerprint: Mapping[str, Any]) -> "FeatureRecipe":
        """Inverse of `to_fingerprint`. ValueError as `FeatureSpec.from_fingerprint`, KeyError where an entry lacks."""
        return cls(
            source=fingerprint["source"],
            spec=FeatureSpec.from_fingerprint(fingerprint),
            compute=fingerprint["compute"],
            batch_size=fingerprint["batch_size"],
            statistics_splits=tuple(fingerprint["statistics_splits"]),
            writer=fingerprint["writer"],
        )
