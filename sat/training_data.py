"""What a run learns from, opened and checked before anything expensive starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from sat import files
from sat.config import Config, EncoderConfig
from sat.credentials import shown
from sat.data.loader import Pictures, Reading, steps_per_epoch
from sat.model.encoders.encoder import opened_stages
from sat.model.encoders.table import blueprint
from sat.shards.features import FeatureSpec, Transform
from sat.shards.location import is_url
from sat.shards.manifest import Manifest, load_manifest
from sat.shards.pictures import RESIZE, decode, fit
from sat.shards.store import make_store
from sat.text import CaptionTokenizer
from sat.tracking.record import About, DataInput


@dataclass(frozen=True)
class TrainingData:
    """The data sets of a run, and how long it is."""

    sources: list[tuple[Manifest, float]]
    """The main data set first, then those mixed in, each with its weight."""
    tokenizer: CaptionTokenizer
    steps_per_epoch: int
    total_steps: int
    eval_every: int
    """Steps between evaluations."""
    save_every: int
    """Steps between checkpoints."""
    features: dict[str, Any]
    """Fingerprint of what the captioner sees."""
    reading: Reading
    """How samples are read."""

    @property
    def main(self) -> Manifest:
        return self.sources[0][0]

    def about(self, config: Config) -> About:
        """What MLflow is told of the data sets, the encoder and the vocabulary."""
        learnt = [input_of(manifest, config.data.train_splits, "training") for manifest, _ in self.sources]
        scored, encoder = input_of(self.main, [config.data.eval_split], "evaluation"), self.features.get("encoder")
        digests = {"data.digest": self.main.digest, "data.tokenizer_sha256": self.tokenizer.digest}
        if encoder:
            digests["features.encoder"] = encoder["architecture"]
            digests["features.encoder_sha256"] = encoder.get("weights_sha256") or encoder["trained_from"]
        return About((*learnt, scored), digests)


def input_of(manifest: Manifest, splits: Sequence[str], context: str) -> DataInput:
    """A data set as MLflow is told of it: named by its folder and the splits that are used."""
    root = manifest.root if is_url(manifest.root) else os.path.abspath(manifest.root)
    name = "/".join([*PurePath(root).parts[-2:], "+".join(splits)])
    images = {split: manifest.splits[split] for split in splits if split in manifest.splits}
    return DataInput(name, manifest.digest, shown(root), context, images)


def open_data(config: Config) -> TrainingData:
    """Open manifests and tokenizer. Raises ValueError naming the data set, split or setting that does not fit."""
    main = load_manifest(config.data.features)
    wanted = "images" if config.encoder.train else "features"
    if main.kind != wanted:
        raise ValueError(
            f"data.features {main.root} holds {main.kind}; "
            f"with encoder.train={config.encoder.train} it must hold {wanted}"
        )
    for split in [*config.data.train_splits, config.data.eval_split]:
        if not main.splits.get(split):
            raise ValueError(f"{main.root} has no split {split!r}; it has {main.splits}")
        _refuse_without_captions(main, split, config)
    sources = [(main, 1.0)]
    for extra in config.data.extra:
        manifest = load_manifest(extra.features)
        if main.spec is not None:
            main.spec.refuse(manifest.spec, manifest.root)
        sources.append((manifest, extra.weight))
    per_epoch = steps_per_epoch(sources, config.data.train_splits, config.train.global_batch)
    total_steps = per_epoch * config.train.epochs
    if config.train.warmup_steps >= total_steps:
        raise ValueError(
            f"train.warmup_steps {config.train.warmup_steps} must be below the {total_steps} steps of this training"
        )
    eval_every = config.train.eval_every or per_epoch
    features = _features(config, main)
    return TrainingData(
        sources=sources,
        tokenizer=CaptionTokenizer.load(config.data.tokenizer),
        steps_per_epoch=per_epoch,
        total_steps=total_steps,
        eval_every=eval_every,
        save_every=config.train.save_every or eval_every,
        features=features,
        reading=replace(
            reading_options(config, FeatureSpec.from_fingerprint(features)),
            keep_references=config.train.objective == "self_critical",
        ),
    )


def _refuse_without_captions(manifest: Manifest, split: str, config: Config) -> None:
    """ValueError where the first shard of a split has no caption: such pictures can be captioned, not learnt from."""
    first = manifest.shards.of_split(split)[0]
    store = make_store(manifest.root, config.data.cache_dir, config.data.cache_gb)
    if not any(store.rows(manifest, first)["captions"].to_pylist()):
        raise ValueError(
            f"the pictures of the split {split!r} of {manifest.root} have no captions: they can be captioned by a "
            "trained model, not learnt from or scored on"
        )


def reading_options(config: Config, features: FeatureSpec) -> Reading:
    """How samples are read: with `encoder.train` from picture files, as `features`, the captioner's, say."""
    if not config.encoder.train:
        return Reading(config.data, None)
    assert features.transform is not None, "an encoder that is trained sees pictures"
    size = config.encoder.image_size
    decoded = partial(decode_picture, size=size, interpolation=features.transform.interpolation)
    return Reading(config.data, Pictures(decoded, size))


def decode_picture(data: bytes, size: int, interpolation: str) -> Tensor:
    """Picture file -> uint8 [3, size, size]. Raises BadPicture."""
    return torch.from_numpy(fit(decode(data), size, interpolation=interpolation)).permute(2, 0, 1)


def _features(config: Config, main: Manifest) -> dict[str, Any]:
    if not config.encoder.train:
        return main.fingerprint
    return end_to_end_features(config.encoder).to_fingerprint()


def end_to_end_features(encoder: EncoderConfig) -> FeatureSpec:
    """What a captioner sees whose encoder is trained too, on squashed pictures.

    ValueError for weights, a stage or a size that do not fit each other.
    """
    size = encoder.image_size
    try:
        plan = blueprint(encoder.weights, encoder.stage, size)
        opened_stages(plan, encoder.open_stages)
    except ValueError as error:
        raise ValueError(f"the settings of the encoder do not fit: {error}") from None
    spec, pixels = replace(plan.spec, trained_from=files.sha256(Path(encoder.weights))), plan.pixels
    transform = Transform(size, "squash", RESIZE, pixels.interpolation, pixels.mean, pixels.std)
    return FeatureSpec("grid", spec.cells(size), spec.dim, "", spec, transform)
