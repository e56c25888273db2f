"""What a run learns from, opened and checked before anything expensive starts."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sat import config as settings
from sat.data.loader import steps_per_epoch
from sat.data.manifest import Manifest, load_manifest
from sat.export import refuse_other_features
from sat.text import CaptionTokenizer


@dataclass(frozen=True)
class TrainingData:
    sources: list[tuple[Manifest, float]]
    """The main data set first, then those mixed in, each with its weight."""
    tokenizer: CaptionTokenizer
    steps_per_epoch: int
    total_steps: int
    eval_every: int
    """Steps between evaluations."""
    save_every: int
    """Steps between checkpoints."""
    decode: Callable[[bytes], Tensor] | None
    """Picture file -> what the encoder sees, uint8 [3, S, S]; None for precomputed features."""

    @property
    def main(self) -> Manifest:
        return self.sources[0][0]


def open_data(config: settings.Config) -> TrainingData:
    """Open manifests and tokenizer. Raises ValueError naming the data set, split or setting that does not fit."""
    main = load_manifest(config.data.features)
    wanted = "images" if config.encoder.train else "features"
    if main.kind != wanted:
        raise ValueError(f"data.features {main.root} holds {main.kind}; with encoder.train={config.encoder.train} it must hold {wanted}")
    for split in [*config.data.train_splits, config.data.eval_split]:
        if not main.splits.get(split):
            raise ValueError(f"{main.root} has no split {split!r}; it has {main.splits}")
    sources = [(main, 1.0)]
    for extra in config.data.extra:
        manifest = load_manifest(extra.features)
        refuse_other_features(main.fingerprint, manifest)
        sources.append((manifest, extra.weight))
    per_epoch = steps_per_epoch(sources, config.data.train_splits, config.train.global_batch)
    total_steps = per_epoch * config.train.epochs
    if config.train.warmup_steps >= total_steps:
        raise ValueError(f"train.warmup_steps {config.train.warmup_steps} must be below the {total_steps} steps of this training")
    eval_every = config.train.eval_every or per_epoch
    return TrainingData(
        sources=sources,
        tokenizer=CaptionTokenizer.load(config.data.tokenizer),
        steps_per_epoch=per_epoch,
        total_steps=total_steps,
        eval_every=eval_every,
        save_every=config.train.save_every or eval_every,
        decode=None,
    )
