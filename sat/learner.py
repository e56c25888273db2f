"""Model, optimizer and weight average of a run: built once, saved and loaded as tensors.

The surprise: an optimizer that DeepSpeed shards is saved by DeepSpeed into its own sub-folder; everything else about a
checkpoint is the same file for one process and for a thousand.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sat.config import Config
from sat.data.loader import evaluation_batches
from sat.engine.processes import Runtime
from sat.model.captioner import Captioner
from sat.model.encoders.end_to_end import EndToEnd, feature_statistics
from sat.model.encoders.resnet import load_encoder
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import Sizes
from sat.optim import WeightAverage, build_optimizer, learning_rate
from sat.shards.manifest import load_statistics
from sat.training_data import TrainingData
from sat.word_vectors import load_word_vectors

MODEL, OPTIMIZER, AVERAGE, ENGINE = "model.safetensors", "optimizer.pt", "average.safetensors", "deepspeed"


@dataclass(frozen=True)
class Learner:
    model: nn.Module
    """The objective, wrapped for the exchange of gradients: what is called for the loss."""
    objective: TeacherForcing
    """The same, unwrapped."""
    module: nn.Module
    """The model that it trains, whose tensors are saved and exported."""
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    """Exponential moving average of the weights, or None."""
    config: Config
    total_steps: int

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are scored and exported."""
        return self.average.module if self.average is not None else self.module

    def set_learning_rate(self, step: int) -> float:
        """Set the rate of every group for `step`; returns the captioner's. A pure function of the step."""
        factor = learning_rate(
            step, peak=1.0, warmup_steps=self.config.train.warmup_steps, total_steps=self.total_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.config.train.learning_rate * factor

    def sampling_probability(self, step: int) -> float:
        """Scheduled sampling (Bengio et al. 2015) grows linearly to its setting."""
        return self.config.model.scheduled_sampling * step / self.total_steps

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update(self.module)


def build_learner(config: Config, data: TrainingData, runtime: Runtime) -> Learner:
    """A fresh learner; the weights are a function of the seed alone. All ranks enter."""
    if runtime.deepspeed and config.encoder.train and config.train.precision != "fp32":
        raise ValueError(
            f"encoder.train under DeepSpeed in {config.train.precision} would round the encoder's BatchNorms; "
            "use train.precision=fp32, or launch without DeepSpeed"
        )
    torch.manual_seed(config.train.seed)
    module = build_model(config, data, runtime).to(runtime.device)
    optimizer = build_optimizer(
        module,
        learning_rate=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
        encoder_learning_rate=config.encoder.learning_rate,
    )
    per_pass = -(-config.train.global_batch // (runtime.world_size * config.train.accumulation_steps))
    model, wrapped = runtime.prepare(
        TeacherForcing(module),
        optimizer,
        micro_batch=per_pass,
        accumulation_steps=config.train.accumulation_steps,
        clip_norm=config.train.clip_norm,
    )
    objective = runtime.unwrap(model)
    module = objective.model
    average = WeightAverage(module, config.train.ema) if config.train.ema else None
    return Learner(model, objective, module, wrapped, average, config, data.total_steps)


def build_model(config: Config, data: TrainingData, runtime: Runtime) -> nn.Module:
    """The captioner with the statistics of its features; with `encoder.train`, behind the ResNet-50."""
    encoder = None
    if config.encoder.train:
        encoder = load_encoder(config.encoder.weights)
        statistics = feature_statistics(encoder, _some_pictures(config, data))
        encoder.open_for_training(
            config.encoder.open_stages, config.encoder.freeze_batchnorm, config.encoder.checkpointing
        )
    else:
        statistics = load_statistics(data.main)
    cells = data.features["grid"][0] * data.features["grid"][1]
    sizes = Sizes(data.tokenizer.vocab_size, cells, data.features["dim"])
    captioner = Captioner(config.model, sizes, config.train.kernels)
    with torch.no_grad():
        for name, buffer in (
            ("mean", captioner.feature_mean),
            ("std", captioner.feature_std),
            ("scale", captioner.feature_scale),
        ):
            buffer.copy_(torch.as_tensor(statistics[name]))
    if config.model.word_vectors:
        vectors = config.model.word_vectors
        coverage = load_word_vectors(vectors, data.tokenizer, captioner.embedding, config.model.tune_word_vectors)
        if runtime.is_main:
            print(f"{vectors}: {coverage}", flush=True)
    return EndToEnd(encoder, captioner) if encoder is not None else captioner


def _some_pictures(config: Config, data: TrainingData) -> Tensor:
    """The first 256 training pictures in shard order, uint8 [n, 3, S, S]; the same on every rank."""
    split = config.data.train_splits[0]
    here = replace(data.reading, options=replace(data.reading.options, num_workers=0))
    return next(evaluation_batches(data.main, split, here, batch_size=256)).grid


def save_tensors(learner: Learner, runtime: Runtime, folder: Path) -> None:
    """Write weights, optimizer and average below `folder`. All ranks enter; DeepSpeed's ranks each write their part."""
    if runtime.deepspeed:
        learner.model.save_checkpoint(str(folder / ENGINE), tag="engine")
    if runtime.is_main:
        if not runtime.deepspeed:
            save_file(_tensors(learner.module), folder / MODEL)
            torch.save(learner.optimizer.state_dict(), folder / OPTIMIZER)
        if learner.average is not None:
            save_file(_tensors(learner.average), folder / AVERAGE)


def load_tensors(learner: Learner, runtime: Runtime, folder: Path) -> None:
    """Inverse of `save_tensors`; the files' digests have been checked. All ranks enter."""
    if runtime.deepspeed:
        learner.model.load_checkpoint(str(folder / ENGINE), tag="engine")
    else:
        learner.module.load_state_dict(load_file(folder / MODEL))
        learner.optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
    if learner.average is not None:
        learner.average.load_state_dict(load_file(folder / AVERAGE))


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().contiguous().cpu().clone() for name, value in module.state_dict().items()}


def check_resumable(saved: dict, current: dict) -> None:
    """Refuse to continue a checkpoint under settings that would make it another training. Both are flat.

    Raises ValueError with both values of each such setting.
    """
    differing = [
        f"{k}: the checkpoint has {saved.get(k)!r}, now {current[k]!r}" for k in current if saved.get(k) != current[k]
    ]
    if differing:
        raise ValueError(
            "the run folder's checkpoint belongs to another training (" + "; ".join(differing) + "); "
            "set these back, or give another train.run_dir"
        )
