"""One rank of `sat bench train`: usage: python -m sat.bench.train_ranks CONFIG STEPS ROUNDS

Takes turns of STEPS steps: in the loop of `sat.train`, bare, and in the loop until a checkpoint is written. What each
part of a step takes is timed where the loop calls it; a GPU is waited for at the ends of a turn alone, so its parts are
what the host takes to ask for them. Exchange is what a rank waits for the others: the sums of counts, and in a CPU's
backward pass what comes after its own last gradient (the exchange that is hidden behind the pass costs nothing but
computing power).
"""

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sat import files
from sat.bench.train import ROUNDS_FILE
from sat.checkpoint import Saver, SaveResult
from sat.config import Config, load_config
from sat.data.batch import CaptionBatch
from sat.data.plan import Cursor
from sat.engine.ddp import Ddp
from sat.engine.engine import Stepper, StepResult
from sat.engine.processes import Processes
from sat.engine.start import start
from sat.learner import Learner, build_learner
from sat.machine import speed_up
from sat.meter import Meter
from sat.model.loss import LossSums
from sat.run_folder import Run
from sat.train import fresh_state, steps_from, take_step
from sat.train_state import TrainState
from sat.training_data import open_data

T = TypeVar("T")
Batches = Generator[list[CaptionBatch], None, None]


@dataclass
class Clock:
    """Seconds of this rank."""

    device: torch.device
    compute: float = 0.0
    exchange: float = 0.0
    ready: float = 0.0
    """When this rank's last gradient was there."""

    def now(self) -> float:
        """After all that the device was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def computed(self, function: Callable[[], T]) -> T:
        """The result of `function()`, its time booked as computing."""
        began = time.perf_counter()
        result = function()
        self.compute += time.perf_counter() - began
        return result

    def watch(self, model: nn.Module) -> None:
        """Note when gradients arrive."""

        def arrived(_: Tensor) -> None:
            self.ready = time.perf_counter()

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(arrived)


@dataclass(frozen=True)
class TimedProcesses(Processes):
    """The ranks, and how long they wait for one another's counts."""

    clock: Clock = field(default_factory=lambda: Clock(torch.device("cpu")))

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """See `Processes`."""
        began = time.perf_counter()
        sums = super().sum_over_ranks(values)
        self.clock.exchange += time.perf_counter() - began
        return sums


@dataclass(frozen=True)
class TimedStepper:
    """A stepper whose parts are timed; the rest is the plain one's."""

    plain: Stepper
    clock: Clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __call__(self, *batch: Any) -> LossSums:
        return self.clock.computed(lambda: self.plain(*batch))

    def backward(self, loss: Tensor) -> None:
        """On a CPU time after the last gradient of its own is the exchange's."""
        began = time.perf_counter()
        self.plain.backward(loss)
        end = time.perf_counter()
        ready = self.clock.ready if self.clock.device.type == "cpu" else end
        self.clock.compute += ready - began
        self.clock.exchange += end - ready

    def step(self) -> StepResult:
        return self.clock.computed(self.plain.step)


@dataclass(frozen=True)
class Ranks:
    """What takes the steps."""

    config: Config
    learner: Learner
    run: Run
    meter: Meter
    clock: Clock

    def loop(self, batches: Batches, first: int, steps: int) -> dict[str, float]:
        """One turn of the real loop, from step `first` on."""
        self.run.processes.barrier()
        self.clock.compute = self.clock.exchange = self.meter.waited = 0.0
        began, cpu = self.clock.now(), time.process_time()
        for step in range(first, first + steps):
            take_step(self.config, self.learner, next(batches), step, self.run, self.meter)
        waited = self.meter.waited
        captions = sum(step.captions for step in self.meter.steps)
        self.meter.line(self.run.processes)
        seconds, cpu = self.clock.now() - began, time.process_time() - cpu
        known = {"wait": waited, "compute": self.clock.compute, "exchange": self.clock.exchange}
        shares = {f"{name}_share": each / seconds for name, each in known.items()}
        shares["rest_share"] = 1 - sum(shares.values())
        mine = captions / self.run.processes.world_size
        rates = {"captions_per_s": mine / seconds, "captions_per_cpu_s": mine / cpu}
        return shares | rates | {"seconds_per_step": seconds / steps}

    def saving(self, batches: Batches, first: int, steps: int, state: TrainState) -> dict[str, float]:
        """Turns of the real loop while a checkpoint is written, and as many again without: what it has cost."""
        saver = Saver(self.run.checkpoints, self.run.processes, keep=2)
        self.run.processes.barrier()
        began, turns, written = self.clock.now(), 0, list[SaveResult]()
        saver.begin(first, self.learner.state(self.run.processes), state)
        stopped = self.clock.now() - began
        while not written:
            self.loop(batches, first, steps)
            turns, written = turns + 1, self.run.processes.broadcast(saver.poll())
        seconds = self.clock.now() - began
        if written[0].error:
            raise ValueError(f"the checkpoint could not be written: {written[0].error}")
        of_step = sum(self.loop(batches, first, steps)["seconds_per_step"] for _ in range(turns)) / turns
        costs = seconds / of_step - turns * steps
        return {"save_stops_s": stopped, "save_takes_s": seconds, "save_costs_steps": costs}

    def bare(self, batches: Batches, first: int, steps: int) -> dict[str, float]:
        """One turn of bare steps, over batches that are fetched beforehand."""
        plain = replace(self.learner, stepper=self.learner.stepper.plain)  # type: ignore[attr-defined]  # it is timed
        kept = [[_locked(batch, self.clock.device) for batch in next(batches)] for _ in range(steps)]
        self.run.processes.barrier()
        began, cpu, captions = self.clock.now(), time.process_time(), 0.0
        for step, (batch,) in enumerate(kept, first):
            tokens, of_batch = float(batch.tokens), float(batch.caption_count)
            plain.learn(batch, step, tokens, of_batch, last=False, processes=self.run.processes)
            plain.stepper.step()
            captions += of_batch
        seconds, cpu = self.clock.now() - began, time.process_time() - cpu
        return {"bare_captions_per_s": captions / seconds, "bare_captions_per_cpu_s": captions / cpu}


def _locked(batch: CaptionBatch, device: torch.device) -> CaptionBatch:
    """For a GPU in locked memory, as the loop's are: of so many batches most have found no place in the loader's."""
    return batch if device.type == "cpu" else replace(batch, grid=batch.grid.pin_memory())


def measure(config: Config, steps: int, rounds: int) -> None:
    """Write down of each round the mean over the ranks. All ranks enter."""
    plain = start(config.train.precision, config.train.timeout).processes
    speed_up(config.train.kernels, plain.device)
    clock = Clock(plain.device)
    processes = TimedProcesses(**vars(plain), clock=clock)
    data = open_data(config)
    engine = Ddp(processes)
    learner, state = build_learner(config, data, engine), fresh_state(config, data, engine)
    clock.watch(learner.model)
    timed = replace(learner, stepper=TimedStepper(learner.stepper, clock))
    ranks = Ranks(config, timed, Run(Path(config.train.run_dir), processes, None), Meter(), clock)
    found: list[dict[str, float]] = []
    cursor = Cursor.start(data.sources, config.train.seed)
    with closing(steps_from(config, data, cursor, processes, ranks.meter)) as batches:
        for turn in range(rounds + 1):  # the first only warms up
            for _ in range(2 * config.data.num_workers):
                next(batches)  # what the workers had ready
            first, second, third = (number * steps for number in range(3 * turn, 3 * turn + 3))
            one = ranks.loop(batches, first, steps) | ranks.bare(batches, second, steps)
            one |= ranks.saving(batches, third, steps, state)
            everybody = processes.gather(one)
            found.append({name: sum(each[name] for each in everybody) / len(everybody) for name in one})
    if processes.is_main:
        table = {name: [each[name] for each in found[1:]] for name in found[0]}
        files.write_json(Path(config.train.run_dir).parent / ROUNDS_FILE, table)
    processes.leave()


if __name__ == "__main__":
    measure(load_config(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
