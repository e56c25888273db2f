"""A training step on a GPU: the host plans it and waits for nothing."""

import pytest
import torch
from helpers_shards import make_feature_dataset, self_describing_captions

from sat.data.batch import CaptionBatch
from sat.data.buffers import Ring
from sat.data.loader import Reading, training_batches
from sat.data.options import LoaderOptions
from sat.data.plan import Cursor
from sat.engine.ddp import Ddp
from sat.engine.processes import Processes
from sat.model.captioner import Captioner
from sat.model.loss import total_loss
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.model.packing import pack
from sat.model.spec import CaptionerSpec, Sizes
from sat.optim import build_optimizer
from sat.text import build_tokenizer
from tests.helpers_captioner import all_attentions

pytestmark = pytest.mark.gpu


def host_batch(seed: int):
    """Captions and lengths of 6 images, on the host, and keys."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (6, 5), generator=generator)
    captions = torch.randint(4, 97, (6, 5, 12), generator=generator)
    captions[:, :, 0] = 1
    return captions, lengths, torch.randint(1 << 62, (6, 5), generator=generator)


def caption_batch(grid, seed: int, regions=None):
    nothing = {"image_ids": [], "sample_keys": [], "problems": []}
    numbers = dict.fromkeys(("epoch", "step", "samples_done", "retries"), 0)
    return CaptionBatch(grid, *host_batch(seed), **nothing, **numbers, regions=regions)


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
        sums = stepper(grid, captions, lengths, 0.0, None, keys)
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
        grid = torch.full((64, 49, 256), float(number)).pin_memory()
        batch = caption_batch(grid, number)
        busy = (busy @ busy).clamp(-1, 1)
        there = batch.to("cuda")
        assert there.grid.device.type == "cuda"
        assert all(getattr(there, name) is getattr(batch, name) for name in ("captions", "lengths", "keys"))
        sums.append(torch.stack([there.grid.amin(), there.grid.amax()]))
        expected.append([number, number])
        del batch, there, grid
    assert torch.stack(sums).tolist() == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loaders_batches_arrive_whole_though_their_memory_is_filled_again_at_once(tmp_path, num_workers):
    manifest = make_feature_dataset(tmp_path, {"train": 23, "val": 1})
    sources, tokenizer = [(manifest, 1.0)], build_tokenizer(self_describing_captions("train", 0), 1)
    settings = {"splits": ["train"], "cursor": Cursor.start(sources, 7), "global_batch": 4, "epochs": 20}
    here, there = [], []
    busy = torch.randn(2048, 2048, device="cuda")
    for found, pinned in ((here, False), (there, True)):
        reading = Reading(LoaderOptions(num_workers=num_workers), pin_memory=pinned)
        for batch in training_batches(sources, tokenizer, reading, **settings):
            assert batch.grid.is_pinned() == pinned
            busy = (busy @ busy).clamp(-1, 1)
            grid = batch.to("cuda").grid if pinned else batch.grid
            found.append(grid.float().flatten(1).sum(1))
    assert len(here) == 120 and torch.allclose(torch.cat(here), torch.cat(there).cpu(), rtol=1e-5)


def test_memory_that_cannot_be_locked_serves_all_the_same(caplog):
    ring = Ring(1, 2, 1 << 20, shared=True)
    ring.lock()
    ring.lock()
    assert "cannot be locked" in caplog.text
    torch.ones(1, device="cuda").sum().item()  # is told of no error


def test_regions_arrive_with_rows_that_are_cut_off():
    whole = torch.randn(5, 7, 3).pin_memory()
    regions = torch.tensor([1, 4, 2, 3, 4])
    there = caption_batch(whole[:, :4], 0, regions).to("cuda")
    assert torch.equal(there.grid.cpu(), whole[:, :4]) and torch.equal(there.regions.cpu(), regions)
