"""What each phase of a step takes: a profile of steps, whose operations are told apart by who called them.

The phases are those of `sat.bench.limit`. What undoes an operation in the backward pass belongs to its phase, by
autograd's sequence numbers. What is no matrix product of PyTorch's in the time loop counts as attention: the LSTM's
cell too, and the products of few rows in native kernels.
On a GPU the times are those of the programs that an operation has launched there; what the host takes is not in them.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from sat.model.captioner import Captioner

PREFIX = "phase: "
LOOP = ("_Recurrence", "_RecurrenceBackward")
CALLERS = {
    "_LinearCrossEntropy": "vocabulary",
    "_LinearCrossEntropyBackward": "vocabulary",
    "aten::embedding": "words",
    "aten::embedding_dense_backward": "words",
}
PRODUCTS = ("aten::mm", "mkldnn::_linear_pointwise", "mkldnn::_reorder_linear_weight")
"""In the time loop."""
REST = "rest"
PRODUCT = re.compile("gemm|nvjet|cutlass|splitk|xmma", re.IGNORECASE)
"""Programs of cuBLAS."""


def label(model: Captioner) -> None:
    """Give a name to what `model` does outside the time loop and the vocabulary."""
    assert model.word_gates is not None
    parts: list[tuple[nn.Module, str, str]] = [(model, "encode", "grid"), (model, "init_state", "grid")]
    for owner, function, phase in (*parts, (model, "embed", "words"), (model.word_gates, "forward", "words")):
        setattr(owner, function, _labelled(getattr(owner, function), phase))


def labelled(phase: str) -> record_function:
    """A context whose operations are those of `phase`."""
    return record_function(PREFIX + phase)


def measure_phases(step: Callable[[], object], steps: int, device: str) -> dict[str, float]:
    """Seconds of each phase of one step, and of the rest; means over so many steps of a labelled model."""
    on_gpu = [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu], acc_events=True) as found:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    return (gpu_seconds if on_gpu else phase_seconds)(found.events() or (), steps)


def phase_seconds(events: Any, steps: int) -> dict[str, float]:
    """From a profile of so many steps."""
    undone, seconds = _undone(events), defaultdict[str, float](float)
    for event in events:
        seconds[_phase_of(event, undone)] += event.self_cpu_time_total / 1e6 / steps
    return dict(seconds)


def _undone(events: Any) -> dict[int, str]:
    """The phases of operations by their sequence numbers."""
    return {
        event.sequence_nr: phase
        for event in events
        if event.sequence_nr >= 0 and not _is_backward(event) and (phase := _phase_of(event, {})) != REST
    }


def gpu_seconds(events: Any, steps: int) -> dict[str, float]:
    """The same of what a GPU has run."""
    undone, seconds = _undone(events), defaultdict[str, float](float)
    for event in events:
        for program in event.kernels:
            phase = _phase_of(event, undone)
            if _in_loop(event):
                phase = "recurrence" if PRODUCT.search(program.name) else "attention"
            seconds[phase] += program.duration / 1e6 / steps
    return dict(seconds)


def _in_loop(event: Any) -> bool:
    while event is not None and event.name not in LOOP:
        event = event.cpu_parent
    return event is not None


def _phase_of(event: Any, undone: dict[int, str]) -> str:
    """By the nearest caller that says it, the event itself among them."""
    caller = event
    while caller is not None:
        if caller.name.startswith(PREFIX):
            return str(caller.name.removeprefix(PREFIX))
        if caller.name in CALLERS:
            return CALLERS[caller.name]
        if caller.name in LOOP:
            return "recurrence" if event.name in PRODUCTS else "attention"
        if _is_backward(caller) and caller.sequence_nr in undone:
            return undone[caller.sequence_nr]
        caller = caller.cpu_parent
    return REST


def _is_backward(event: Any) -> bool:
    return bool(event.scope == 1 or event.name.startswith("autograd::engine"))


def _labelled(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with labelled(phase):
            return function(*arguments, **named)

    return call
