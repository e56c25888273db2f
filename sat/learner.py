"""Model, optimizer and weight average of a run: built once, moved step by step, saved and loaded as tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sat import checkpoint
from sat.config import Config, refuse_ranks
from sat.data.batch import CaptionBatch
from sat.data.loader import evaluation_batches
from sat.engine.engine import Engine, Stepper, StepResult
from sat.engine.processes import Processes
from sat.engine.state import host_copies, part
from sat.model.captioner import Captioner
from sat.model.encoders.end_to_end import EndToEnd, feature_statistics
from sat.model.encoders.table import load_encoder
from sat.model.loss import total_loss
from sat.model.objectives.objective import Objective
from sat.model.objectives.self_critical import SelfCritical
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import Sizes
from sat.optim import WeightAverage, build_optimizer, learning_rate
from sat.reward import build_reward
from sat.shards.features import FeatureSpec
from sat.shards.manifest import load_statistics
from sat.training_data import TrainingData
from sat.warm_start import start_from
from sat.word_vectors import load_word_vectors

AVERAGE = "average"


@dataclass(frozen=True)
class Learner:
    """What learns."""

    stepper: Stepper
    """The objective under its engine."""
    objective: Objective
    """What is minimised, unwrapped."""
    model: Captioner | EndToEnd
    """What the objective trains, whose tensors are saved and exported."""
    average: WeightAverage | None
    """Exponential moving average of the weights, or None."""
    config: Config
    total_steps: int
    """Of the schedules."""
    statistics: tuple[Tensor, ...] = ()
    """Of BatchNorms that are trained: a forward pass moves them, before it is known whether the step counts."""
    before: list[Tensor] = field(default_factory=list)
    """What they were before the step."""

    @property
    def evaluated(self) -> Captioner | EndToEnd:
        """The weights that are scored and exported."""
        model = self.model if self.average is None else self.average.module
        assert isinstance(model, Captioner | EndToEnd)
        return model

    def set_learning_rate(self, step: int) -> float:
        """Set the rate of every group for `step`; returns the captioner's. A pure function of the step."""
        factor = learning_rate(
            step, peak=1.0, warmup_steps=self.config.train.warmup_steps, total_steps=self.total_steps
        )
        for group in self.stepper.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.config.train.learning_rate * factor

    def sampling_probability(self, step: int) -> float:
        """Scheduled sampling (Bengio et al. 2015) grows linearly to its setting."""
        return self.config.model.scheduled_sampling * step / self.total_steps

    def learn(
        self, batch: CaptionBatch, step: int, tokens: float, captions: float, *, last: bool, processes: Processes
    ) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch of a global batch of so many `tokens` and `captions`; its counts."""
        batch = batch.to(processes.device)
        self.before[:] = [each.clone() for each in self.statistics]  # one micro-batch is the whole batch then
        with self.stepper.micro_batch(last):
            with processes.autocast():
                probability = self.sampling_probability(step)
                words = batch.captions, batch.lengths
                sums = self.stepper(batch.grid, *words, probability, batch.regions, batch.keys, batch.references)
            self.stepper.backward(total_loss(sums, tokens, captions))
        return sums.counts

    def after_step(self, result: StepResult, counts: list[dict[str, Tensor]], processes: Processes) -> None:
        """Let average and objective follow a step that was not skipped; where they do, it waits for the device."""
        if self.statistics and bool(result.skipped):
            for buffer, value in zip(self.statistics, self.before, strict=True):
                buffer.copy_(value)
        follows = self.objective.follows
        if not (self.average or follows) or bool(result.skipped):
            return
        if self.average is not None:
            with self.stepper.whole():
                self.average.update(self.model)
        if follows:
            local = [float(sum(part[name].float() for part in counts)) for name in follows]
            self.objective.after_step(dict(zip(follows, processes.sum_over_ranks(local), strict=True)))

    def state(self, processes: Processes) -> dict[str, Tensor]:
        """Weights, optimizer (see `sat.engine.state`) and `average/NAME`, copied to rank 0's host. All ranks enter."""
        found = self.stepper.state()
        if self.average is not None and processes.is_main:
            found |= host_copies({f"{AVERAGE}/{name}": value for name, value in self.average.state_dict().items()})
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; every rank has all the tensors. All ranks enter."""
        self.stepper.load_state(tensors)
        if self.average is not None:
            self.average.load_state_dict(part(tensors, AVERAGE))


def build_learner(config: Config, data: TrainingData, engine: Engine) -> Learner:
    """A fresh learner; the weights are a function of the seed alone. All ranks enter.

    Raises ValueError for settings that so many ranks cannot train with.
    """
    processes, train = engine.processes, config.train
    refuse_ranks(config, processes.world_size)
    torch.manual_seed(train.seed)
    model = build_model(config, data, processes).to(processes.device)
    objective = build_objective(config, data, model).train()  # an encoder is loaded in eval mode
    optimizer = build_optimizer(
        model,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        encoder_learning_rate=config.encoder.learning_rate,
    )
    average = WeightAverage(model, train.ema) if train.ema else None  # before any engine splits the weights
    stepper = engine.wrap(
        objective,
        optimizer,
        micro_batch=-(-train.global_batch // (processes.world_size * train.accumulation_steps)),
        accumulation_steps=train.accumulation_steps,
        clip_norm=train.clip_norm,
    )
    return Learner(stepper, objective, model, average, config, data.total_steps, moving_statistics(model))


def moving_statistics(model: nn.Module) -> tuple[Tensor, ...]:
    """The buffers of BatchNorms that are not frozen."""
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d) and each.training]
    return tuple(buffer for norm in norms for buffer in norm.buffers())


def build_objective(config: Config, data: TrainingData, model: Captioner | EndToEnd) -> TeacherForcing | SelfCritical:
    """What `train.objective` says, of `model`."""
    if config.train.objective == "teacher_forcing":
        return TeacherForcing(model)
    options = config.self_critical
    return SelfCritical(model, build_reward(data, config.data.train_splits, options), options)


def build_model(config: Config, data: TrainingData, processes: Processes) -> Captioner | EndToEnd:
    """The captioner with the statistics of its features; with `encoder.train`, behind the encoder."""
    encoder = None
    if config.encoder.train:
        encoder = load_encoder(config.encoder.weights, stage=config.encoder.stage)
        statistics = feature_statistics(encoder, _some_pictures(config, data))
        encoder.open_for_training(
            config.encoder.open_stages, config.encoder.freeze_batchnorm, config.encoder.checkpointing
        )
    else:
        statistics = {name: torch.as_tensor(value) for name, value in load_statistics(data.main).items()}
    features = FeatureSpec.from_fingerprint(data.features)
    sizes = Sizes(data.tokenizer.vocab_size, features.locations, features.dim)
    captioner = Captioner(config.model, sizes, config.train.kernels)
    with torch.no_grad():
        for name, buffer in (
            ("mean", captioner.feature_mean),
            ("std", captioner.feature_std),
            ("scale", captioner.feature_scale),
        ):
            buffer.copy_(statistics[name])
    if config.model.word_vectors:
        vectors = config.model.word_vectors
        coverage = load_word_vectors(vectors, data.tokenizer, captioner.embedding, config.model.tune_word_vectors)
        if processes.is_main:
            print(f"{vectors}: {coverage}", flush=True)
    model = EndToEnd(encoder, captioner) if encoder is not None else captioner
    begins = processes.run_on_main(lambda: not checkpoint.begun(Path(config.train.run_dir) / "checkpoints"))
    if config.train.start_from and begins:
        spec = FeatureSpec.from_fingerprint(data.features)
        carried = start_from(config.train.start_from, model, config, data.tokenizer, spec)
        if processes.is_main:
            print(f"{config.train.start_from}: {carried}", flush=True)
    return model


def _some_pictures(config: Config, data: TrainingData) -> Tensor:
    """The first 256 training pictures in shard order, uint8 [n, 3, S, S]; the same on every rank."""
    split = config.data.train_splits[0]
    here = replace(data.reading, options=replace(data.reading.options, num_workers=0))
    return next(evaluation_batches(data.main, split, here, batch_size=256)).grid
