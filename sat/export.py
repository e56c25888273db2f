"""The trained model as three files: `model.safetensors`, `config.json`, `tokenizer.json`.

The folder says which features it was trained on, and everything that feeds it others is refused; scores on the wrong
grid look plausible and mean nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sat import files
from sat.config import Config, config_from_dict, config_to_dict
from sat.credentials import masked
from sat.model.captioner import Captioner
from sat.model.encoders.encoder import GridEncoder
from sat.model.encoders.end_to_end import EndToEnd
from sat.model.encoders.table import build_encoder
from sat.model.encoders.weights import Pixels
from sat.model.spec import Sizes
from sat.shards.features import FeatureSpec
from sat.shards.manifest import Manifest
from sat.text import CaptionTokenizer

FILES = ("model.safetensors", "config.json", "tokenizer.json")


@dataclass(frozen=True)
class TrainedModel:
    """What `load_model` reads."""

    model: Captioner | EndToEnd
    """EndToEnd, which takes pictures, when the encoder was trained with it."""
    tokenizer: CaptionTokenizer
    config: Config
    features: FeatureSpec
    """The features it was trained on; after end-to-end training what its pictures go through."""
    step: int
    """Of the training, when it was exported."""

    @property
    def attends(self) -> bool:
        """Whether it looks at the picture before every word."""
        return self.config.model.attention != "none"

    def refuse_unfit(self, manifest: Manifest) -> None:
        """Raise ValueError, naming what differs, unless the model reads what `manifest` holds."""
        if not self.config.encoder.train:
            self.features.refuse(manifest.spec, manifest.root)
        elif manifest.kind != "images":
            raise ValueError(
                f"the model has its own encoder and reads image shards; {manifest.root} holds {manifest.kind}"
            )


def save_model(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    tokenizer: CaptionTokenizer,
    config: Config,
    features: Mapping[str, Any],
    step: int,
) -> None:
    """Give `folder` a trained model in place of what it holds. At every moment it is whole, the old one or the new.

    `features` is the document that `FeatureSpec.from_fingerprint` reads. What killed exports have left is removed.
    """
    weights = {
        name: (value.float() if value.is_floating_point() else value).contiguous().cpu().clone()
        for name, value in state.items()
    }
    about = {"format": 1, "step": step, "features": dict(features), "config": masked(config_to_dict(config))}
    files.sweep(folder.parent, folder.name)
    with files.replacing_folder(folder) as temporary:
        with files.replacing(temporary / FILES[0]) as file:  # readable by the umask, which save_file does not ask
            save_file(weights, file)
        files.write_json(temporary / FILES[1], about)
        tokenizer.save(temporary / FILES[2])


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> TrainedModel:
    """Read what `save_model` wrote, in eval mode. Raises ValueError naming the missing, damaged or unfit file."""
    folder = Path(folder)
    files.recover_folder(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} is not a trained model: {name} is missing; train one, or give the run's `best` folder"
            )
    try:
        about = json.loads((folder / FILES[1]).read_text())
        document, step = about["features"], about["step"]
        config, features = config_from_dict(about["config"]), FeatureSpec.from_fingerprint(document)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILES[1]} does not describe a trained model: {error}") from None
    tokenizer = CaptionTokenizer.load(folder / FILES[2])
    captioner = Captioner(
        config.model, Sizes(tokenizer.vocab_size, features.locations, features.dim), config.train.kernels
    )
    model = EndToEnd(_encoder_of(features), captioner) if config.encoder.train else captioner
    try:
        model.load_state_dict(load_file(folder / FILES[0]))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / FILES[0]} does not fit its config.json: {error}") from None
    return TrainedModel(model.to(device).eval(), tokenizer, config, features, step)


def _encoder_of(features: FeatureSpec) -> GridEncoder:
    """The encoder, still without its weights, that these features come from."""
    encoder, transform = features.encoder, features.transform
    assert encoder is not None and transform is not None, "features of a trained encoder name both"
    pixels = Pixels(transform.mean, transform.std, transform.interpolation, transform.size)
    return build_encoder(encoder.architecture, encoder.stage, pixels)


def best_folder(run: str | Path) -> Path:
    """The folder of the trained model: `run` itself or its `best`."""
    run = Path(run)
    return run if (run / FILES[0]).is_file() else run / "best"
