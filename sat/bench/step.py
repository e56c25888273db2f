"""Training step of this project against the popular re-implementation's loop (`popular`), on this machine.

The loop runs with PyTorch's default settings, in a process of its own. Surprising: `ratio` is against the loop in fp32
in every row, so bf16 counts as a gain; `ratio_same_precision` is against the loop under autocast to the row's
precision. Both train the same model on the same captions, and every step is over captions that were not met before: a
step over lengths that a library has prepared for is quicker than training ever is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from sat.bench import limit
from sat.bench.captions import CAPTIONS, VOCABULARY, caption_batches
from sat.bench.harness import Ceilings, InOwnProcess, alternated_medians, peak_memory_mb, report, table, traffic
from sat.bench.phases import label, labelled, measure_phases
from sat.bench.popular import PerCaptionLoop, popular_step
from sat.machine import speed_up
from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import CaptionerSpec, Sizes
from sat.optim import build_optimizer, clip_gradients

WIDTH, FEATURES = 512, 2048
GRIDS = {"7x7": 49, "14x14": 196}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BEFORE = {"cpu": 5, "cuda": 40}
"""Steps that are taken before the turns: for memory, launches, and to warm up; a GPU's recordings are made then."""
PROFILED = 2
"""Steps whose phases are measured."""
Batches = list[tuple[Tensor, Tensor]]


def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    grids: Annotated[str, typer.Option(help="Grids, comma-separated: 7x7, 14x14.")] = "7x7,14x14",
    precisions: Annotated[str, typer.Option(help="Precisions, comma-separated: fp32, bf16.")] = "fp32,bf16",
    rounds: Annotated[int, typer.Option(help="Turns of both contenders, each on other batches; medians count.")] = 3,
    images: Annotated[int, typer.Option(help="Images of a step, five captions each.")] = 32,
    steps: Annotated[int, typer.Option(help="Our steps of a turn; 0: one on a CPU, ten on a GPU.")] = 0,
    kernels: Annotated[str, typer.Option(help="auto, or torch: without those written for this machine.")] = "auto",
    phases: Annotated[bool, typer.Option(help="Measure each phase of a step too.")] = False,
) -> list[dict[str, object]]:
    """Measure both in turn, on a GPU where there is one; one row per precision and grid."""
    chosen = grids.split(","), precisions.split(",")
    for names, known in zip(chosen, (list(GRIDS), list(PRECISIONS)), strict=True):
        if unknown := set(names) - set(known):
            raise ValueError(f"{', '.join(sorted(unknown))} is unknown; choose from {', '.join(known)}")
    if kernels not in ("auto", "torch"):
        raise ValueError(f"kernels {kernels!r} is unknown; choose auto or torch")
    if min(rounds, images) < 1 or steps < 0:
        raise ValueError(f"rounds {rounds} and images {images} must be at least 1, steps {steps} at least 0")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = steps or (10 if device == "cuda" else 1)
    profiled = PROFILED if phases else 0
    batches, source = caption_batches(BEFORE[device] + (rounds + 1) * steps + profiled, images)
    print(f"{images} images x {CAPTIONS} captions a step, {source}; {speed_up(kernels, device)}", flush=True)
    rows = []
    for precision in chosen[1]:
        for grid in chosen[0]:
            rows.append(measure(grid, precision, batches, steps, device, kernels, profiled))
            if phases:
                print(f"{grid} {precision}, ms of each phase:\n{phase_table(rows[-1])}", flush=True)
    report(rows, json_file)
    return rows


def phase_table(row: dict[str, Any]) -> str:
    """What each phase costs at least, and takes where that was measured."""
    takes = row.get("measured_phases", {})
    names = [*row["phases"], *(name for name in takes if name not in row["phases"])]
    measured = [{"takes": takes[name]} if takes else {} for name in names]
    least = [{"phase": name, "at least": row["phases"].get(name, 0.0)} for name in names]
    return table([each | more for each, more in zip(least, measured, strict=True)])


def measure(
    grid: str, precision: str, batches: Batches, steps: int, device: str, kernels: str, profiled: int = 0
) -> dict[str, object]:
    """One row of the table: both contenders on the same batches, a turn of ours `steps` of them and of the loop one.

    The last `profiled` batches are for the phases' times alone.
    """
    torch.manual_seed(0)
    dtype, before, images = PRECISIONS[precision], BEFORE[device], len(batches[0][1])
    rounds = (len(batches) - before - profiled) // steps - 1
    features = torch.randn(images, GRIDS[grid], FEATURES).relu().bfloat16()
    ours = our_step(features.to(device), batches, dtype, kernels)
    memory = peak_memory_mb(lambda: [ours() for _ in range(before - 3)], device)
    asked = traffic(ours, device)  # once recordings are made
    for _ in range(0 if asked else 3):
        ours()
    ceilings = Ceilings.of(dtype, device)
    loops = {}
    for name in {"fp32", precision}:
        model, turns = PerCaptionLoop(VOCABULARY, WIDTH, FEATURES), batches[before::steps]
        loops[name] = InOwnProcess(popular_step, model, features, turns, PRECISIONS[name], device, device=device)
    contenders: dict[str, Callable[[], object]] = {"ours": lambda: [ours() for _ in range(steps)], **loops}
    contenders |= {"product": ceilings.product, "copy": ceilings.copy}
    seconds = alternated_medians(contenders, rounds=rounds, device=device)
    for loop in loops.values():
        loop.close()
    sizes = limit.Sizes(GRIDS[grid], FEATURES, WIDTH, VOCABULARY)
    timed = [limit.phases(sizes, *batch, dtype) for batch in batches[before + steps : len(batches) - profiled]]
    per_step = {name: value / steps if name == "ours" else value for name, value in seconds.items()}
    row: dict[str, object] = {"grid": grid, "precision": precision}
    row |= _speeds(per_step, images * CAPTIONS, precision) | _limits(per_step["ours"], timed, seconds, ceilings)
    if profiled:
        told = our_step(features.to(device), [*batches[:2], *batches[-profiled:]], dtype, kernels, replays=False)
        for _ in range(2):
            told()
        row["measured_phases"] = {name: 1e3 * each for name, each in measure_phases(told, profiled, device).items()}
    row["peak_memory_mb"] = memory
    if asked:
        row |= {"launches": asked.launches, "synchronisations": asked.synchronisations, "busy_ms": 1e3 * asked.busy_s}
    return row


def _speeds(seconds: dict[str, float], captions: int, precision: str) -> dict[str, object]:
    """Of both contenders, from their seconds for so many captions."""
    ours = seconds["ours"]
    return {
        "captions_per_s": captions / ours,
        "baseline_captions_per_s": captions / seconds["fp32"],
        "ratio": seconds["fp32"] / ours,
        "ratio_same_precision": seconds[precision] / ours,
        "step_ms": 1e3 * ours,
    }


def _limits(
    ours: float, steps: list[list[limit.Phase]], seconds: dict[str, float], ceilings: Ceilings
) -> dict[str, object]:
    """What a step costs at least on this machine, the mean of these steps, and how near `ours` comes."""
    peak, bandwidth = ceilings.gflop / seconds["product"], ceilings.gigabytes / seconds["copy"]
    least = {
        each[0].name: sum(phase.seconds(peak, bandwidth) for phase in each) / len(steps)
        for each in zip(*steps, strict=True)
    }
    gflop = sum(phase.gflop for phases in steps for phase in phases) / len(steps)
    return {
        "limit_ms": 1e3 * sum(least.values()),
        "of_limit": sum(least.values()) / ours,
        "gflop": gflop,
        "gflops_per_s": gflop / ours,
        "peak_gflops_per_s": peak,
        "share_of_peak": gflop / ours / peak,
        "memory_gb_per_s": bandwidth,
        "phases": {name: round(1e3 * value, 3) for name, value in least.items()},
    }


def our_step(
    features: Tensor, batches: Batches, dtype: torch.dtype, kernels: str, replays: bool = True
) -> Callable[[], None]:
    """A function that takes one optimizer step over the whole of the next of `batches`, which stay on the host."""
    device = features.device
    spec = CaptionerSpec.of_preset("tutorial", embedding_dim=WIDTH, lstm_dim=WIDTH, attention_dim=WIDTH)
    model = Captioner(spec, Sizes(VOCABULARY, features.shape[1], FEATURES), kernels).to(device)
    label(model)
    objective = TeacherForcing(model, replays)
    optimizer = build_optimizer(model, learning_rate=4e-4, weight_decay=0.0, encoder_learning_rate=0.0)
    upcoming = iter(batches)

    def step() -> None:
        captions, lengths = next(upcoming)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            sums = objective(features, captions, lengths)
        optimizer.zero_grad()
        total_loss(sums, float(lengths.sum()), float((lengths > 0).sum())).backward()
        with labelled("optimizer"):
            clip_gradients(model.parameters(), 5.0)
            optimizer.step()

    return step
