"""Begin a training with the weights of another run's best model, for fine-tuning on other data: `train.start_from`.

Words that both vocabularies have keep their rows of the embedding and of the output layer; new words begin as in any
training. Surprising: the features' mean and deviation stay those of the other run, because its weights were learnt on
features standardised by them; so before the first step the model captions as the other one does.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sat.config import Config
from sat.export import TrainedModel, best_folder, load_model
from sat.model.captioner import Captioner
from sat.model.encoders.end_to_end import EndToEnd
from sat.model.spec import CaptionerSpec
from sat.shards.features import FeatureSpec
from sat.text import CaptionTokenizer

WORD_ROWS = ("embedding.weight", "vocabulary.weight", "vocabulary.bias")
"""Parameters with a row for each word."""
OWN_BUFFERS = ("feature_scale",)
"""What stays the new training's: the scales that its stored features are multiplied by."""
MEANING = (*("embedding_dim", "lstm_dim", "attention_dim", "state_init", "score", "gate", "output", "first_input"),)
"""Settings of the model that say what its weights are; the others may differ."""


@dataclass(frozen=True)
class Carried:
    """How many words of a vocabulary begin with rows of another model."""

    shared: int
    words: int
    new: tuple[str, ...]

    def __str__(self) -> str:
        some = f"; new: {', '.join(self.new[:8])}{' ...' if len(self.new) > 8 else ''}" if self.new else ""
        share = self.shared / max(self.words, 1)
        return f"{self.shared} of {self.words} words ({share:.1%}) keep their rows{some}"


def start_from(
    run: str | Path, model: Captioner | EndToEnd, config: Config, tokenizer: CaptionTokenizer, features: FeatureSpec
) -> Carried:
    """Give `model`, freshly built by `config`, the weights of the best model of `run`; its encoder's too, if trained.

    `features` is what the new training sees. Raises ValueError, naming both values, for a model of other shapes or
    another meaning, or of other features.
    """
    trained = load_model(best_folder(run))
    where = f"train.start_from {run}"
    refuse_other_model(where, trained.config.model, config.model)
    refuse_other_features(where, trained, config, features)
    old = trained.model
    if isinstance(old, EndToEnd) and isinstance(model, EndToEnd):
        assert isinstance(model.encoder, nn.Module)
        model.encoder.load_state_dict(old.encoder.state_dict())
    return carry(old.captioner, trained.tokenizer, model.captioner, tokenizer)


@torch.no_grad()
def carry(old: Captioner, old_words: CaptionTokenizer, new: Captioner, new_words: CaptionTokenizer) -> Carried:
    """Copy all that `old` knows into `new`, rows of words by the words."""
    place = {word: index for index, word in enumerate(old_words.words)}
    pairs = [(place[word], index) for index, word in enumerate(new_words.words) if word in place]
    source, target = (torch.tensor(column, dtype=torch.int64) for column in zip(*pairs, strict=True))
    known = old.state_dict()
    for name, value in new.state_dict().items():
        if name in WORD_ROWS:
            value[target.to(value.device)] = known[name][source].to(value)
        elif name in known and name not in OWN_BUFFERS:
            value.copy_(known[name])
    ordinary = [word for word in new_words.words if not (word.startswith("<") and word.endswith(">"))]
    missing = tuple(word for word in ordinary if word not in place)
    return Carried(len(ordinary) - len(missing), len(ordinary), missing)


def refuse_other_model(where: str, old: CaptionerSpec, new: CaptionerSpec) -> None:
    """Raise ValueError, naming the settings with both values, where the weights of `old` mean nothing in `new`."""
    names = [name for name in MEANING if getattr(old, name) != getattr(new, name)]
    if (old.attention == "none") != (new.attention == "none"):
        names.insert(0, "attention")
    if names:
        said = "; ".join(f"model.{name} is {getattr(old, name)!r} there, {getattr(new, name)!r} here" for name in names)
        raise ValueError(f"{where}: its model is another one ({said}); set these as they are there")


def refuse_other_features(where: str, trained: TrainedModel, config: Config, features: FeatureSpec) -> None:
    """Raise ValueError, naming both values, unless `trained` knows what the new training sees."""
    tuned = trained.config.encoder.train
    if tuned and not config.encoder.train:
        raise ValueError(
            f"{where}: its encoder was trained with it, so no extracted features are its own; set encoder.train=true"
        )
    old, new = (_comparable(spec, tuned) for spec in (trained.features, features))
    old.refuse(new, f"{where}: data.features {config.data.features}")


def _comparable(spec: FeatureSpec, tuned: bool) -> FeatureSpec:
    """Without what may differ: int8's scales, and the weights an encoder began from that was trained since."""
    encoder = spec.encoder
    if encoder is not None:
        origin = "" if tuned else encoder.weights_sha256 or encoder.trained_from
        encoder = dataclasses.replace(encoder, weights_sha256=origin, trained_from="")
    return dataclasses.replace(spec, scale_sha256="", encoder=encoder)
