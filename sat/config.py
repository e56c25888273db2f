"""Every setting of a run, typed; `load_config(path, overrides)` merges them and refuses what cannot work.

Values come from the defaults below <- the preset <- the YAML file <- `a.b=c` arguments. The preset sits under the file,
so a file that names one and changes one line of it says exactly what it changes. A section that configures one part is
that part's own dataclass and is handed to it as it is.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sat import files
from sat.credentials import shown
from sat.data.options import LoaderOptions
from sat.evaluation.options import EvaluationOptions
from sat.model.objectives.options import SelfCriticalOptions
from sat.model.spec import PRESETS, CaptionerSpec
from sat.settings import check, rule_of, setting, walk


@dataclass(frozen=True)
class ExtraSource:
    """A further data set mixed into training."""

    features: str = ""
    """Its feature folder or URL."""
    weight: float = setting(1.0, above=0)
    """Samples drawn from it per sample of `data.features`."""


@dataclass(frozen=True)
class DataConfig(LoaderOptions):
    """What is learnt from and scored on, beside how it is read."""

    features: str = setting("data/demo/features", may_change=True)
    """Folder or fsspec URL of the feature shards and their manifest (or of image shards, with `encoder.train`)."""
    tokenizer: str = setting("data/demo/tokenizer.json", may_change=True)
    """Vocabulary file made by `preprocessing.build_vocab`."""
    train_splits: list[str] = setting(["train"])
    """Splits to learn from; Karpathy's COCO convention is [train, restval]."""
    eval_split: str = setting("val", may_change=True)
    """Split scored during training."""
    extra: list[ExtraSource] = field(default_factory=list)
    """Further data sets mixed into training, by weight."""


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder in training; without `train` it never runs there."""

    train: bool = setting(False)
    """Train the encoder from image shards; otherwise it never runs during training."""
    weights: str = setting("")
    """Encoder weights (safetensors), which say of what architecture they are; needed with `train`."""
    stage: int = setting(0, at_least=0)
    """Stage of the encoder whose output is the grid; 0: its last features."""
    image_size: int = setting(224, above=0)
    """Pixels per side of what the encoder sees, with `train`; 224 gives most encoders a 7x7 grid."""
    open_stages: list[int] = setting([])
    """Stages that are tuned, counted from 1; none named: all but the first."""
    learning_rate: float = setting(1e-5, above=0)
    """Peak rate of the encoder's parameters."""
    freeze_batchnorm: bool = setting(True)
    """Keep BatchNorm's statistics and affine parameters fixed; `false` trains on one process, without accumulation."""
    checkpointing: bool = setting(False)
    """Recompute activations in the backward pass to save memory."""


@dataclass(frozen=True)
class TrainConfig:
    """The training: length, optimizer, precision, and how often it is logged, scored and saved."""

    run_dir: str = setting("runs/run", may_change=True)
    """Folder of this run: config, metrics, checkpoints, best model."""
    seed: int = setting(1)
    """Seeds the weights, the sample order and dropout."""
    objective: str = setting("teacher_forcing", choices=("teacher_forcing", "self_critical"))
    """What is learnt: the next word of human captions, or captions that score well (`self_critical`), which goes on
    from a trained model."""
    start_from: str = setting("")
    """Run folder whose best model's weights this training begins with, its vocabulary may be another; empty: anew."""
    epochs: int = setting(20, above=0, may_change=True)
    """Passes over the training images; a finished run goes on when it is given more."""
    global_batch: int = setting(64, above=0)
    """Images per optimizer step, over all ranks and accumulation steps."""
    accumulation_steps: int = setting(1, above=0, may_change=True)
    """Forward and backward passes per optimizer step and rank."""
    learning_rate: float = setting(4e-4, above=0, may_change=True)
    """Peak learning rate (Adam); a run that diverged goes on with a lower one."""
    warmup_steps: int = setting(100)
    """Steps of linear warm-up; a cosine to zero follows."""
    weight_decay: float = setting(0.0)
    """AdamW decay of the weight matrices; never of biases and embeddings."""
    clip_norm: float = setting(5.0, above=0)
    """Global gradient norm is clipped to this."""
    max_skipped_steps: int = setting(10, may_change=True)
    """Steps in a row that may be skipped because loss or gradient is not finite; one more ends the run."""
    ema: float = setting(0.0, below=1)
    """Decay of the exponential moving average of the weights that is evaluated and exported; 0: off."""
    precision: str = setting("auto", choices=("auto", "fp32", "bf16", "fp16"))
    """`fp32`, or mixed precision `bf16` or `fp16`; auto: bf16 where the machine computes in it natively, else fp32."""
    kernels: str = setting("auto", choices=("auto", "native", "torch"), may_change=True)
    """Kernels of the time loop: `native` (C++, built on first use), `torch`, or `auto`: native where they can be.

    On a GPU `auto` takes Triton's and replays them as CUDA graphs.
    """
    eval_every: int = setting(0, may_change=True)
    """Steps between evaluations; 0: once per epoch."""
    save_every: int = setting(0, may_change=True)
    """Steps between checkpoints; 0: at every evaluation."""
    keep_checkpoints: int = setting(2, above=0, may_change=True)
    """Newest checkpoints kept."""
    patience: int = setting(6, may_change=True)
    """Stop after this many evaluations without a better CIDEr; 0: never."""
    log_every: int = setting(10, above=0, may_change=True)
    """Steps between lines of `metrics.jsonl`."""
    timeout: float = setting(600.0, above=0, may_change=True)
    """Seconds in which a training that hangs has ended; no step, batch or save takes so long, scoring may."""


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow beside the journal."""

    mlflow_uri: str = setting("", may_change=True)
    """MLflow server or `sqlite:////absolute/path.db`, or `none`; empty: as MLFLOW_TRACKING_URI in the environment says,
    without it `mlflow.db` beside the run folder."""
    experiment: str = setting("show-attend-and-tell", may_change=True)
    """MLflow experiment."""
    run_name: str = setting("", may_change=True)
    """MLflow run name; empty: the run folder's name."""
    log_model: bool = setting(True, may_change=True)
    """Log the best model at the end as an MLflow model that captions pictures, its encoder included."""
    encoder_weights: str = setting("weights", may_change=True)
    """The file of the encoder that made the features, or a folder that holds it; goes into the logged model."""
    register: str = setting("", may_change=True)
    """Name in MLflow's registry that the logged model becomes a version of; empty: none."""
    system_metrics: bool = setting(False, may_change=True)
    """Log the load of rank 0's machine every ten seconds, as MLflow's system metrics."""

    def __post_init__(self) -> None:
        if self.mlflow_uri:
            refuse_store(self.mlflow_uri, "tracking.mlflow_uri")


def refuse_store(uri: str, name: str) -> None:
    """Raise ValueError, naming where it was given, for what is no MLflow store that we write to, and not `none`."""
    if uri != "none" and ("://" not in uri or uri.startswith("file:")):
        raise ValueError(f"{name}={uri!r}: give http(s)://SERVER, sqlite:////absolute/path.db or `none`")


@dataclass(frozen=True)
class Config:
    """All sections. Made by `load_config` or `config_from_dict`, checked once; change it by `dataclasses.replace`."""

    data: DataConfig = field(default_factory=DataConfig)
    model: CaptionerSpec = field(default_factory=CaptionerSpec)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    self_critical: SelfCriticalOptions = field(default_factory=SelfCriticalOptions)
    eval: EvaluationOptions = field(default_factory=EvaluationOptions)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


RESUME_ONLY = ("data", "model", "encoder", "train", "self_critical")
"""Sections that make a training what it is; a model may be scored and tracked otherwise at any time."""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Merge defaults, preset, the YAML file `path` and `overrides` ("a.b=c") into one checked Config.

    Raises ValueError naming the setting: an unknown key (with the nearest valid one), a wrong type, a value out of
    range, or settings that cannot work together.
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
    assert isinstance(given, DictConfig)
    _refuse_unknown(given)
    preset = OmegaConf.select(given, "model.preset", default=CaptionerSpec.preset)
    by_preset = {"model": PRESETS[preset]} if preset in PRESETS else {}  # another one is refused with all the rest
    return _build(OmegaConf.merge(by_preset, given))


def config_from_dict(values: dict[str, Any]) -> Config:
    """A Config from `config_to_dict`'s output, checked like a file. Raises ValueError."""
    given = OmegaConf.create(values)
    _refuse_unknown(given)
    return _build(given)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionary, for a checkpoint's or model's JSON; `config_from_dict` is the inverse."""
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, object]:
    """All settings as {"train.epochs": 20, ...}, in the order of declaration; lists stay lists."""
    return {name: value for name, _, value in walk(config)}


def fixed_settings(config: Config) -> dict[str, object]:
    """The settings that make a training what it is, flat: those that a resumed run may not change."""
    kept = ((name, rule_of(one), value) for name, one, value in walk(config) if name.split(".")[0] in RESUME_ONLY)
    return {name: value for name, rule, value in kept if not rule.may_change and name != "data.extra"}


def save_config(config: Config, path: Path) -> None:
    """Write the resolved settings as YAML that `load_config` reads back to an equal Config.

    Where a URL holds what may be a credential, nobody else may read the file.
    """
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    files.write_text(path, text)
    if shown(text) != text:
        path.chmod(0o600)


def refuse_ranks(config: Config, ranks: int) -> None:
    """Raise ValueError for settings that would not train the same model on so many ranks as on one."""
    shares = ranks * config.train.accumulation_steps
    if config.encoder.train and not config.encoder.freeze_batchnorm and shares > 1:
        raise ValueError(
            f"encoder.freeze_batchnorm=false normalises by the statistics of the whole batch, but {ranks} ranks x "
            f"train.accumulation_steps {config.train.accumulation_steps} see a share of it each and train another "
            "model; train on one process with train.accumulation_steps=1, or leave encoder.freeze_batchnorm true"
        )


def _build(given: Any) -> Config:
    """The checked Config of these values over the defaults."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))
    except OmegaConfBaseException as error:
        raise ValueError(f"setting {error.full_key}: {_first_line(error)}") from None
    assert isinstance(config, Config)
    _check(config)
    return config


def _read_yaml(path: str | Path) -> DictConfig:
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # the YAML library's own exceptions share no useful base class
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(layer, DictConfig):
        raise ValueError(f"{path} must hold sections such as `train:`, not a list or a single value")
    _refuse_unknown(layer, f"{path}: ")
    return layer


def _refuse_unknown(given: DictConfig, where: str = "") -> None:
    sections = [section.name for section in dataclasses.fields(Config)]
    valid = list(flatten(Config()))
    for section, settings in given.items():
        if section not in sections:
            raise ValueError(f"{where}unknown section {section!r}; {_nearest(str(section), sections)}")
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


def _check(config: Config) -> None:
    """Each setting by its rule, then those that only fail together; once, before any work."""
    for section in dataclasses.fields(config):
        check(getattr(config, section.name), section.name)
    data, encoder, train = config.data, config.encoder, config.train
    if encoder.train and not encoder.weights:
        raise ValueError("encoder.train needs encoder.weights, a safetensors file (preprocessing.fetch_weights)")
    if not data.train_splits:
        raise ValueError("data.train_splits is empty; name at least one split, e.g. [train]")
    if data.eval_split in data.train_splits:
        raise ValueError(
            f"data.eval_split {data.eval_split!r} is also in data.train_splits; score on a split that is not learnt"
        )
    for extra in data.extra:
        check(extra, "data.extra")
        if not extra.features:
            raise ValueError("each entry of data.extra needs `features`, a folder or URL")
    if train.start_from and Path(train.start_from).resolve() == Path(train.run_dir).resolve():
        raise ValueError(
            f"train.start_from is train.run_dir {train.run_dir}: a run goes on by itself; name another train.run_dir"
        )
    if train.accumulation_steps > train.global_batch:
        raise ValueError(
            f"train.accumulation_steps {train.accumulation_steps} exceeds train.global_batch {train.global_batch}: "
            "some passes would hold no image; lower it"
        )
    if train.objective == "self_critical":
        _check_self_critical(config)
    if "CIDEr" not in config.eval.metrics:
        raise ValueError(f"eval.metrics is {config.eval.metrics}; CIDEr must be in it: it picks the best model")


def _check_self_critical(config: Config) -> None:
    """What samples need, and what they would leave without effect."""
    model, objective = config.model, "train.objective=self_critical"
    if not config.train.start_from:
        raise ValueError(
            f"{objective} needs train.start_from, the run folder of a trained model: captions drawn from an untrained "
            "one are never rewarded"
        )
    if model.attention == "hard":
        raise ValueError(
            f"{objective} knows no model.attention=hard; set model.attention=soft, which takes the same weights and "
            "captions as hard attention does by its expectation"
        )
    for name in ("label_smoothing", "scheduled_sampling"):
        if getattr(model, name):
            raise ValueError(f"model.{name} has no effect on {objective}; set model.{name}=0")
