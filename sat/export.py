"""The trained model as three files: `model.safetensors`, `config.json`, `tokenizer.json`.

The surprise: the folder says which features it was trained on (fingerprint), and everything that feeds it others is
refused; scores on the wrong grid look plausible and mean nothing.
"""

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sat.config import Config, config_from_dict, config_to_dict
from sat.model.captioner import Captioner
from sat.model.encoders.end_to_end import EndToEnd
from sat.model.encoders.resnet import Encoder
from sat.model.spec import Sizes
from sat.text import CaptionTokenizer

FILES = ("model.safetensors", "config.json", "tokenizer.json")


@dataclass(frozen=True)
class TrainedModel:
    model: Captioner | EndToEnd
    """EndToEnd, which takes pictures, when the encoder was trained with it."""
    tokenizer: CaptionTokenizer
    config: Config
    features: dict
    """Fingerprint of the features it was trained on; after end-to-end training what its pictures go through."""
    step: int


def save_model(
    folder: Path,
    state: dict[str, torch.Tensor],
    tokenizer: CaptionTokenizer,
    config: Config,
    features: dict,
    step: int,
) -> None:
    """Write the three files into a new folder and swap it with `folder`, so that a reader never sees a mix."""
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    weights = {
        name: (value.float() if value.is_floating_point() else value).contiguous().cpu().clone()
        for name, value in state.items()
    }
    save_file(weights, temporary / FILES[0])
    about = {"format": 1, "step": step, "features": features, "config": config_to_dict(config)}
    (temporary / FILES[1]).write_text(json.dumps(about, indent=1) + "\n")
    tokenizer.save(temporary / FILES[2])
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old-{uuid.uuid4().hex[:8]}")
        os.rename(folder, old)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)


def load_model(folder: Path, device: torch.device | str = "cpu") -> TrainedModel:
    """Read what `save_model` wrote, in eval mode. Raises ValueError naming the missing or unfit file."""
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} is not a trained model: {name} is missing; train one, or give the run's `best` folder"
            )
    about = json.loads((folder / FILES[1]).read_text())
    config = config_from_dict(about["config"])
    tokenizer = CaptionTokenizer.load(folder / FILES[2])
    features = about["features"]
    sizes = Sizes(tokenizer.vocab_size, features["grid"][0] * features["grid"][1], features["dim"])
    captioner = Captioner(config.model, sizes, config.train.kernels)
    model = EndToEnd(Encoder(), captioner) if config.encoder.train else captioner
    try:
        model.load_state_dict(load_file(folder / FILES[0]))
    except RuntimeError as error:
        raise ValueError(f"{folder / FILES[0]} does not fit its config.json: {error}") from None
    return TrainedModel(model.to(device).eval(), tokenizer, config, features, about["step"])
