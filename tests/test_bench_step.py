"""`sat bench step` compares like with like: its per-caption loop computes the very loss and gradients of our step."""

import json
import re
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from sat.bench import limit, step
from sat.bench.captions import CAPTIONS, caption_batches
from sat.bench.harness import InOwnProcess
from sat.bench.phases import gpu_seconds, phase_seconds
from sat.bench.popular import PerCaptionLoop, popular_step
from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.spec import CaptionerSpec, Sizes

OURS = {
    "embedding": "embedding",
    "project": "attention.project",
    "query": "attention.query",
    "score": "attention.score",
    "init_h": "init_h",
    "init_c": "init_c",
    "gate": "gate",
    "vocabulary": "vocabulary",
}


def test_the_loop_computes_our_loss_and_gradients():
    torch.manual_seed(0)
    spec = CaptionerSpec.of_preset("tutorial", embedding_dim=6, lstm_dim=6, attention_dim=6, dropout=0.0)
    model = Captioner(spec, Sizes(23, 5, 7)).double()
    loop = PerCaptionLoop(23, 6, 7).double().eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in loop.named_parameters():
            layer, _, kind = name.rpartition(".")
            if layer == "cell":
                parameter.copy_(_cell(parameters, kind))
            elif (ours := parameters.get(f"{OURS[layer]}.{kind}")) is not None:
                parameter.copy_(ours)
            else:
                parameter.zero_()  # biases that ours leaves out, as they change nothing
    grid = torch.rand(3, 5, 7).double()
    captions, lengths = torch.randint(4, 23, (3, 2, 6)), torch.tensor([[5, 2], [1, 4], [3, 3]])
    sums = TeacherForcing(model)(grid, captions, lengths)
    ours = total_loss(sums, sums.counts["tokens"], sums.counts["captions"])
    theirs = loop(grid.repeat_interleave(2, 0), captions.flatten(0, 1), lengths.flatten())
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-9)
    ours.backward()
    theirs.backward()
    for name in ("project.weight", "query.weight", "gate.weight", "vocabulary.weight", "embedding.weight"):
        layer, _, kind = name.rpartition(".")
        expected = parameters[f"{OURS[layer]}.{kind}"].grad
        assert torch.allclose(dict(loop.named_parameters())[name].grad, expected, rtol=1e-9, atol=1e-12), name


def test_the_loop_steps_through_fresh_batches_in_bf16_too():
    batches, _ = caption_batches(3, 8)
    model, grid = PerCaptionLoop(10_000, 6, 7), torch.rand(8, 5, 7)
    take = popular_step(model, grid, batches, torch.bfloat16, "cpu")
    before = model.vocabulary.weight.clone()
    for _ in batches:
        take()
    assert model.vocabulary.weight.isfinite().all() and not torch.equal(model.vocabulary.weight, before)
    with pytest.raises(StopIteration):
        take()


def _cell(parameters: dict, kind: str) -> torch.Tensor:
    """Ours keeps the gates' shares of word, context and state apart; order of gates is the same."""
    if kind == "weight_ih":
        return torch.cat([parameters["word_gates.weight"], parameters["context_gates.weight"]], 1)
    return {
        "weight_hh": parameters["state_gates.weight"],
        "bias_ih": parameters["word_gates.bias"],
        "bias_hh": torch.zeros_like(parameters["word_gates.bias"]),
    }[kind]


def test_the_rows_hold_both_speeds_and_their_ratio(tmp_path, capsys):
    rows = step.run(tmp_path / "rows.json", grids="7x7", precisions="fp32", rounds=1, images=8, phases=True)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    (row,) = rows
    assert (row["grid"], row["precision"]) == ("7x7", "fp32")
    assert row["ratio"] == pytest.approx(row["captions_per_s"] / row["baseline_captions_per_s"])
    assert row["ratio"] == row["ratio_same_precision"] > 1
    assert row["gflops_per_s"] > 0 and row["peak_gflops_per_s"] > 0 and row["peak_memory_mb"] > 100
    assert row["limit_ms"] == pytest.approx(sum(row["phases"].values()), rel=1e-2)
    assert row["gflop"] / row["step_ms"] * 1e3 == pytest.approx(row["gflops_per_s"])
    assert row["of_limit"] == pytest.approx(row["limit_ms"] / row["step_ms"]) and row["of_limit"] > 0
    takes = row["measured_phases"]
    assert takes.keys() == {*row["phases"], "rest"} and min(takes.values()) > 0
    assert takes["rest"] < 0.2 * sum(takes.values()) and takes["recurrence"] > takes["words"]
    assert re.search(r"phase +at least +takes\n.*\n +words +\S+ +\S+\n", capsys.readouterr().out)


class Event(NamedTuple):
    """Of a profile."""

    name: str
    self_cpu_time_total: float
    cpu_parent: "Event | None" = None
    sequence_nr: int = -1
    scope: int = 0
    kernels: tuple = ()


def test_what_is_undone_backwards_belongs_to_the_phase_that_did_it():
    grid, loop = Event("phase: grid", 1e6), Event("_Recurrence", 2e6)
    back, other = (Event("autograd::engine::evaluate_function: X", 0, None, number, 1) for number in (7, 9))
    events = [
        *(grid, loop, back, other, Event("aten::addmm", 4e6, grid, 7), Event("aten::cat", 8e6, None, 9)),
        *(Event("aten::mm", 16e6, back), Event("aten::slice", 32e6, other), Event("aten::mm", 64e6, loop)),
        *(Event("aten::mul", 128e6, loop), Event("aten::mm", 256e6, Event("_LinearCrossEntropy", 0))),
    ]
    expected = {"grid": 21, "attention": 130, "recurrence": 64, "vocabulary": 256, "rest": 40}
    assert phase_seconds(events, 2) == {name: seconds / 2 for name, seconds in expected.items()}


def test_on_a_gpu_a_phase_takes_what_its_programs_take():
    def ran(**seconds):
        return tuple(SimpleNamespace(name=name, duration=1e6 * each) for name, each in seconds.items())

    grid, loop = Event("phase: grid", 1e6, kernels=ran(copy=1)), Event("_Recurrence", 1e6)
    replay = Event("cudaGraphLaunch", 1e6, loop, kernels=ran(look=2, nvjet_sm90_tst=4, cell=8, gemmSplitK=16))
    back = Event("autograd::engine::evaluate_function: X", 0, None, 7, 1)
    events = [
        *(grid, loop, replay, back, Event("aten::addmm", 9e6, grid, 7, kernels=ran(nvjet=32))),
        *(Event("aten::mm", 9e6, back, kernels=ran(cutlass=64)), Event("aten::cat", 9e6, kernels=ran(cat=128))),
    ]
    expected = {"grid": 97, "attention": 10, "recurrence": 20, "rest": 128}
    assert gpu_seconds(events, 2) == {name: seconds / 2 for name, seconds in expected.items()}


def test_every_step_is_over_captions_that_were_not_met_before():
    batches, _ = caption_batches(6, 4)
    assert len({str(captions.tolist()) for captions, _ in batches}) == 6
    for captions, lengths in batches:
        assert captions.shape[:2] == lengths.shape == (4, CAPTIONS)
        words = torch.arange(captions.shape[2]) <= lengths[..., None]
        assert ((captions != 0) == words).all() and (captions[:, :, 0] == 1).all()
        assert (captions.gather(2, lengths[..., None]) == 2).all()


def test_the_limit_counts_each_operation_once_and_goes_with_what_is_scarce():
    captions, lengths = caption_batches(1, 4)[0][0]
    found = {
        each.name: each for each in limit.phases(limit.Sizes(49, 2048, 512, 10_000), captions, lengths, torch.bfloat16)
    }
    tokens, distinct = int(lengths.sum()), len(captions.unique())
    per_token = 5 * 512 * (512 + 2048) + 512 * 10_000 + 49 * (2048 + 512)
    per_image = 49 * 2048 * 512 + 2 * 2048 * 512
    whole = 6 * (tokens * per_token + distinct * 4 * 512 * 512) + 4 * 4 * per_image
    assert sum(each.gflop for each in found.values()) == pytest.approx(whole / 1e9, rel=1e-12)
    assert found["optimizer"].seconds(1, 1) == found["optimizer"].gigabytes
    assert found["vocabulary"].seconds(1e-3, 1e9) == pytest.approx(1e3 * found["vocabulary"].gflop)


def test_a_function_in_its_own_process_sees_none_of_our_settings_and_ends_with_us():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        threads = InOwnProcess(make_counter, 41)
        assert [threads(), threads()] == [(42, before), (43, before)]
    finally:
        torch.set_num_threads(before)
        threads.close()


def make_counter(count: int):
    def next_count():
        nonlocal count
        count += 1
        return count, torch.get_num_threads()

    return next_count


def test_unknown_grids_and_precisions_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="9x9 is unknown; choose from 7x7, 14x14"):
        step.run(grids="7x7,9x9")
    with pytest.raises(ValueError, match="fp8 is unknown; choose from fp32, bf16"):
        step.run(precisions="fp8")
    with pytest.raises(ValueError, match="rounds 0 and images 32 must be at least 1"):
        step.run(rounds=0)
