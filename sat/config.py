"""Every setting of a run, typed; `load(path, overrides)` merges them and refuses what cannot work.

Values come from the defaults below <- the preset <- the YAML file <- `a.b=c` arguments. The preset sits under the file,
so a file that names one and changes one line of it says exactly what it changes.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

PRESETS = {
    "paper": dict(
        state_init="mlp",
        score="tanh",
        gate="scalar",
        output="deep",
        first_input="zero",
        penalty="sum",
        penalty_weight=1.0,
        weight_init="normal",
    ),
    "tutorial": dict(
        state_init="linear",
        score="relu",
        gate="vector",
        output="linear",
        first_input="start",
        penalty="mean",
        penalty_weight=1.0,
        weight_init="uniform",
    ),
}
"""The columns of the table of differences between the paper and the popular re-implementation."""

CHOICES = {
    "model.preset": tuple(PRESETS),
    "model.attention": ("soft", "hard", "none"),
    "model.state_init": ("mlp", "linear"),
    "model.score": ("tanh", "relu"),
    "model.gate": ("scalar", "vector", "none"),
    "model.output": ("deep", "linear"),
    "model.first_input": ("zero", "start"),
    "model.penalty": ("sum", "mean"),
    "model.weight_init": ("normal", "uniform"),
    "model.hard_inference": ("expectation", "sample", "argmax"),
    "data.on_bad_sample": ("fail", "quarantine"),
    "train.precision": ("fp32", "bf16", "fp16"),
    "train.compile": ("auto", "always", "never"),
}


@dataclass
class ExtraSource:
    """A further data set mixed into training."""

    features: str = ""
    """Its feature folder or URL."""
    weight: float = 1.0
    """Samples drawn from it per sample of `data.features`."""


@dataclass
class DataConfig:
    features: str = "data/demo/features"
    """Folder or fsspec URL of the feature shards and their manifest (or of image shards, with `encoder.train`)."""
    tokenizer: str = "data/demo/tokenizer.json"
    """Vocabulary file made by `preprocessing.build_vocab`."""
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    """Splits to learn from; Karpathy's COCO convention is [train, restval]."""
    eval_split: str = "val"
    """Split scored during training."""
    extra: list[ExtraSource] = field(default_factory=list)
    """Further data sets mixed into training, by weight."""
    captions_per_image: int = 5
    """Captions used of each image and step; an image with more shows others in other epochs."""
    max_caption_length: int = 50
    """Words kept of a caption."""
    run_length: int = 4
    """Consecutive samples read together; shards are already in random order."""
    num_workers: int = 2
    """Reader processes per rank; the order of samples does not depend on it."""
    on_bad_sample: str = "fail"
    """`fail`, or `quarantine`: a damaged sample becomes a counted zero-weight slot."""
    max_bad_samples: int = 100
    """With `quarantine`: stop after this many per rank."""
    cache_dir: str = ""
    """Where remote shards are kept; empty: a folder under the user's cache."""
    cache_gb: float = 50.0
    """Upper bound of that cache, in GB."""


@dataclass
class ModelConfig:
    preset: str = "paper"
    """`paper` or `tutorial`; the settings below default to the preset's."""
    attention: str = "soft"
    """`soft`, `hard` (REINFORCE) or `none` (Show and Tell)."""
    embedding_dim: int = 512
    """Width E of the word vectors."""
    lstm_dim: int = 512
    """Width H of the LSTM."""
    attention_dim: int = 512
    """Width A of the attention's hidden layer."""
    dropout: float = 0.5
    """Dropout probability."""
    state_init: str = "mlp"
    """h0 and c0 from the mean grid: `mlp` (tanh at the end) or `linear`."""
    score: str = "tanh"
    """Non-linearity of the attention score."""
    gate: str = "scalar"
    """Gate on the context vector: `scalar`, `vector` (D sigmoids) or `none`."""
    output: str = "deep"
    """Output layer: `deep` (embedding, state and context) or `linear` (state)."""
    first_input: str = "zero"
    """LSTM input before the first word: `zero` or the learned `start` vector."""
    penalty: str = "sum"
    """Regulariser of a caption: `sum` over the grid beside the summed NLL (paper), or its `mean` beside the mean NLL."""
    penalty_weight: float = 1.0
    """Lambda; its meaning does not depend on batch size or number of ranks."""
    weight_init: str = "normal"
    """`normal`: N(0, 0.01), orthogonal recurrent (authors); `uniform`: U(-0.1, 0.1) embeddings, torch's defaults elsewhere."""
    hard_inference: str = "expectation"
    """Hard attention at inference: `expectation`, `sample` or `argmax`."""
    word_vectors: str = ""
    """Text file of word vectors (GloVe) for the embedding; empty: learned from scratch."""
    tune_word_vectors: bool = True
    """Train the loaded word vectors."""
    label_smoothing: float = 0.0
    """Probability spread over the vocabulary."""
    scheduled_sampling: float = 0.0
    """Probability of feeding the model's own word at the end of training (grows linearly)."""


@dataclass
class EncoderConfig:
    train: bool = False
    """Train the ResNet-50 from image shards; otherwise it never runs during training."""
    weights: str = ""
    """Encoder weights (safetensors); needed with `train`."""
    image_size: int = 224
    """Pixels per side of what the encoder sees, with `train`; 224 gives a 7x7 grid."""
    open_stages: list[int] = field(default_factory=lambda: [2, 3, 4])
    """ResNet stages (1-4) that are tuned."""
    learning_rate: float = 1e-5
    """Peak rate of the encoder's parameters."""
    freeze_batchnorm: bool = True
    """Keep BatchNorm's statistics and affine parameters fixed."""
    checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""


@dataclass
class TrainConfig:
    run_dir: str = "runs/run"
    """Folder of this run: config, metrics, checkpoints, best model."""
    seed: int = 1
    """Seeds the weights, the sample order and dropout."""
    epochs: int = 20
    """Passes over the training images."""
    global_batch: int = 64
    """Images per optimizer step, over all ranks and accumulation steps."""
    accumulation_steps: int = 1
    """Forward and backward passes per optimizer step and rank."""
    learning_rate: float = 4e-4
    """Peak learning rate (Adam)."""
    warmup_steps: int = 100
    """Steps of linear warm-up; a cosine to zero follows."""
    weight_decay: float = 0.0
    """AdamW decay of the weight matrices; never of biases and embeddings."""
    clip_norm: float = 5.0
    """Global gradient norm is clipped to this."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights that is evaluated and exported; 0: off."""
    precision: str = "bf16"
    """`fp32`, or mixed precision `bf16` or `fp16`."""
    compile: str = "auto"
    """Compiled or native kernels for the time step: `auto`, `always` or `never`."""
    eval_every: int = 0
    """Steps between evaluations; 0: once per epoch."""
    save_every: int = 0
    """Steps between checkpoints; 0: at every evaluation."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    patience: int = 6
    """Stop after this many evaluations without a better CIDEr; 0: never."""
    log_every: int = 10
    """Steps between lines of `metrics.jsonl`."""


@dataclass
class EvalConfig:
    beam_size: int = 3
    """Beams kept per image; 1 is greedy."""
    max_length: int = 20
    """Words decoded at most."""
    batch_size: int = 64
    """Images decoded at once per rank."""
    length_penalty: float = 0.0
    """Score is log-probability / length ** this."""
    metrics: list[str] = field(default_factory=lambda: ["BLEU", "METEOR", "ROUGE-L", "CIDEr"])
    """Metrics computed."""


@dataclass
class TrackingConfig:
    mlflow_uri: str = ""
    """MLflow server or `sqlite:////absolute/path.db`; empty: `mlflow.db` beside the run folder; `none`: no MLflow."""
    experiment: str = "show-attend-and-tell"
    """MLflow experiment."""
    run_name: str = ""
    """MLflow run name; empty: the run folder's name."""


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


POSITIVE = {
    "data.captions_per_image",
    "data.max_caption_length",
    "data.run_length",
    "data.cache_gb",
    "model.embedding_dim",
    "model.lstm_dim",
    "model.attention_dim",
    "encoder.learning_rate",
    "train.epochs",
    "train.global_batch",
    "train.accumulation_steps",
    "train.learning_rate",
    "train.clip_norm",
    "train.keep_checkpoints",
    "train.log_every",
    "eval.beam_size",
    "eval.max_length",
    "eval.batch_size",
}
BELOW_ONE = {"model.dropout", "model.label_smoothing", "train.ema"}


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Merge defaults, preset, the YAML file `path` and `overrides` ("a.b=c") into one checked Config.

    Raises ValueError naming the setting: an unknown key (with the nearest valid one), a wrong type, a value out of range,
    or settings that cannot work together.
    """
    layers = [OmegaConf.create()]
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"no config file {path}; the shipped ones are in configs/")
        layers.append(_read_yaml(path))
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key=value, e.g. train.epochs=3")
        layers.append(OmegaConf.from_dotlist([override + "''" if override.endswith("=") else override]))
    try:
        given = OmegaConf.merge(*layers)
    except OmegaConfBaseException as error:
        raise ValueError(f"settings cannot be merged: {_first_line(error)}") from None
    _refuse_unknown(given)
    preset = OmegaConf.select(given, "model.preset", default=ModelConfig.preset)
    _choose("model.preset", preset)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), {"model": PRESETS[preset]}, given)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"setting {error.full_key}: {_first_line(error)}") from None
    _check(config)
    return config


def flatten(config: Config) -> dict[str, object]:
    """All settings as {"train.epochs": 20, ...}, in the order of declaration; lists stay lists."""
    return {
        f"{section.name}.{setting.name}": getattr(getattr(config, section.name), setting.name)
        for section in dataclasses.fields(config)
        for setting in dataclasses.fields(section.type)
    }


def save(config: Config, path: Path) -> None:
    """Write the resolved settings as YAML that `load` reads back to an equal Config."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def to_dict(config: Config) -> dict:
    """Plain nested dictionary, for a checkpoint's or model's JSON; `from_dict` is the inverse."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> Config:
    """A Config from `to_dict`'s output, checked like a file. Raises ValueError."""
    given = OmegaConf.create(values)
    _refuse_unknown(given)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))
    _check(config)
    return config


def _read_yaml(path: str | Path):
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # the YAML library's own exceptions share no useful base class
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not OmegaConf.is_dict(layer):
        raise ValueError(f"{path} must hold sections such as `train:`, not a list or a single value")
    _refuse_unknown(layer, f"{path}: ")
    return layer


def _refuse_unknown(given, where: str = "") -> None:
    sections = {section.name: section.type for section in dataclasses.fields(Config)}
    valid = list(flatten(Config()))
    for section, settings in given.items():
        if section not in sections:
            raise ValueError(f"{where}unknown section {section!r}; {_nearest(str(section), list(sections))}")
        if not OmegaConf.is_dict(settings):
            raise ValueError(f"{where}section {section!r} must hold settings, e.g. {valid[0]}, not {settings!r}")
        for name in settings:
            key = f"{section}.{name}"
            if key not in valid:
                raise ValueError(f"{where}unknown setting {key!r}; {_nearest(key, valid)}")


def _nearest(key: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"the nearest valid one is {close[0]!r}" if close else f"valid: {', '.join(valid)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _choose(key: str, value: object) -> None:
    if value not in CHOICES[key]:
        raise ValueError(f"{key} is {value!r}; choose one of {', '.join(CHOICES[key])}")


def _check(config: Config) -> None:
    """All settings together, once, before any work."""
    values = flatten(config)
    for key, value in values.items():
        if key in CHOICES:
            _choose(key, value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not 0 <= value < float("inf") or (key in POSITIVE and value == 0):
            raise ValueError(f"{key} is {value}; it must be {'above' if key in POSITIVE else 'at least'} 0 and finite")
        if key in BELOW_ONE and value >= 1:
            raise ValueError(f"{key} is {value}; it must be below 1")
    if not 0 <= config.model.scheduled_sampling <= 1:
        raise ValueError(
            f"model.scheduled_sampling is {config.model.scheduled_sampling}; it is a probability, at most 1"
        )
    if config.encoder.train and not config.encoder.weights:
        raise ValueError(
            "encoder.train needs encoder.weights, a ResNet-50 safetensors file (preprocessing.fetch_weights)"
        )
    if config.encoder.image_size % 32 or not config.encoder.image_size:
        raise ValueError(
            f"encoder.image_size is {config.encoder.image_size}; it must be a multiple of 32, e.g. 224 or 448"
        )
    if bad := [stage for stage in config.encoder.open_stages if stage not in (1, 2, 3, 4)]:
        raise ValueError(f"encoder.open_stages holds {bad}; a ResNet-50 has the stages 1, 2, 3, 4")
    if not config.data.train_splits:
        raise ValueError("data.train_splits is empty; name at least one split, e.g. [train]")
    if overlap := [split for split in config.data.train_splits if split == config.data.eval_split]:
        raise ValueError(
            f"data.eval_split {overlap[0]!r} is also in data.train_splits; score on a split that is not learnt"
        )
    if any(not source.features or source.weight <= 0 for source in config.data.extra):
        raise ValueError("each entry of data.extra needs `features` (a folder) and a `weight` above 0")
    per_pass = config.train.global_batch // config.train.accumulation_steps
    if per_pass == 0:
        raise ValueError(
            f"train.accumulation_steps {config.train.accumulation_steps} exceeds train.global_batch "
            f"{config.train.global_batch}: some passes would hold no image; lower it"
        )
    known = {"BLEU", "METEOR", "ROUGE-L", "CIDEr"}
    if "CIDEr" not in config.eval.metrics or not set(config.eval.metrics) <= known:
        raise ValueError(
            f"eval.metrics is {config.eval.metrics}; use CIDEr (it picks the best model) and any of {sorted(known)}"
        )
