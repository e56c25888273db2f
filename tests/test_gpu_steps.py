"""A training step on a GPU: the host plans it and waits for nothing."""

import pytest
import torch

from sat.data.batch import CaptionBatch
from sat.engine.ddp import Ddp
from sat.engine.processes import Processes
from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.packing import pack
from sat.model.spec import CaptionerSpec, Sizes
from sat.optim import build_optimizer
from tests.helpers_captioner import all_attentions

pytestmark = pytest.mark.gpu


def host_batch(seed: int):
    """Captions and lengths of 6 images, on the host, and keys."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (6, 5), generator=generator)
    captions = torch.randint(4, 97, (6, 5, 12), generator=generator)
    captions[:, :, 0] = 1
    return captions, lengths, torch.randint(1 << 62, (6, 5), generator=generator)


def make_stepper(attention: str, autocast_type=None):
    torch.manual_seed(0)
    widths = {"embedding_dim": 40, "lstm_dim": 48, "attention_dim": 32}
    model = Captioner(CaptionerSpec.of_preset("paper", attention=attention, **widths), Sizes(97, 9, 64)).cuda()
    optimizer = build_optimizer(model, learning_rate=1e-2, weight_decay=0.1, encoder_learning_rate=0.0)
    processes = Processes(device=torch.device("cuda"), autocast_type=autocast_type)
    return Ddp(processes).wrap(
        TeacherForcing(model), optimizer, micro_batch=6, accumulation_steps=1, clip_norm=5.0
    ), processes


def take_step(stepper, processes, grid, seed: int):
    captions, lengths, keys = host_batch(seed)
    with processes.autocast():
        sums = stepper(grid, captions, lengths, 0.0, None, keys.pin_memory())
    stepper.backward(total_loss(sums, float(lengths.sum()), float((lengths > 0).sum())))
    return sums, stepper.step()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@all_attentions
def test_a_step_waits_for_nothing_and_learns(attention, dtype):
    stepper, processes = make_stepper(attention, dtype)
    grid = torch.randn(6, 9, 64).cuda()
    losses = [take_step(stepper, processes, grid, seed)[0].counts["nll"] for seed in range(2)]  # libraries load
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in (2, 3, 0, 1) * 10:
            sums, result = take_step(stepper, processes, grid, seed)
            losses.append(sums.counts["nll"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = torch.stack(losses)
    assert found.isfinite().all() and found[-4:].sum() < found[2:6].sum()
    assert result.gradient_norm.isfinite()


def test_a_plan_reaches_a_gpu_as_it_is_on_the_host():
    captions, lengths, _ = host_batch(0)
    here, there = pack(captions, lengths), pack(captions, lengths, torch.device("cuda"))
    assert here.rows == there.rows and here.words_per_image == there.words_per_image
    for name, value in vars(here).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(there, name).cpu(), value), name
            assert getattr(there, name).device.type == "cuda"


def test_batches_are_copied_beside_the_computing_and_arrive_whole():
    """Many of them, whose memory is used again and again, while the GPU is busy."""
    busy = torch.randn(2048, 2048, device="cuda")
    sums, expected = [], []
    for number in range(60):
        captions, lengths, keys = host_batch(number)
        grid = torch.full((64, 49, 256), float(number)).pin_memory()
        nothing = {"image_ids": [], "sample_keys": [], "problems": []} | dict.fromkeys(
            ("epoch", "step", "samples_done", "retries"), 0
        )
        batch = CaptionBatch(grid, captions, lengths, keys.pin_memory(), **nothing)
        busy = (busy @ busy).clamp(-1, 1)
        there = batch.to("cuda")
        assert there.grid.device.type == "cuda"
        assert there.captions is captions and there.lengths is lengths and there.keys is batch.keys
        sums.append(torch.stack([there.grid.amin(), there.grid.amax()]))
        expected.append([number, number])
        del batch, there, grid
    assert torch.stack(sums).tolist() == expected
