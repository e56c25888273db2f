"""Batches for a GPU lie in memory that is locked; here with a stand-in for CUDA (on one: `test_gpu_steps`)."""

import itertools
import pickle
from contextlib import closing

import psutil
import pytest
import torch
from helpers_shards import make_feature_dataset, read_batches, self_describing_captions

from sat.data.batch import CaptionBatch, InTransit, _whole
from sat.data.buffers import Ring
from sat.data.loader import Reading, training_batches
from sat.data.options import LoaderOptions
from sat.data.plan import Cursor, Share
from sat.text import build_tokenizer


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_feature_dataset(tmp_path_factory.mktemp("features"), {"train": 23, "val": 1})


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(self_describing_captions("train", 0), 1)


class Runtime:
    """Stands in for CUDA's."""

    def __init__(self, error=0):
        self.error, self.locked, self.unlocked = error, [], []

    class cudaError:
        success = 0

    def cudaHostRegister(self, address, size, flags):
        self.locked.append(range(address, address + size))
        return self.error

    def cudaHostUnregister(self, address):
        self.unlocked.append(address)

    def cudaGetErrorString(self, error):
        return f"error {error}"


def locked_batches(manifest, tokenizer, num_workers=0, **more):
    sources, reading = [(manifest, 1.0)], Reading(LoaderOptions(num_workers=num_workers), pin_memory=True)
    cursor = Cursor.start(sources, 7)
    return training_batches(sources, tokenizer, reading, splits=["train"], cursor=cursor, global_batch=8, **more)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_for_a_gpu_lie_in_memory_that_is_locked_until_the_last_of_them_is_gone(
    manifest, tokenizer, num_workers, monkeypatch
):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    batches = locked_batches(manifest, tokenizer, num_workers)
    for batch, expected in zip(batches, read_batches([(manifest, 1.0)], tokenizer), strict=True):
        assert torch.equal(batch.grid, expected.grid)
        assert batch.grid.data_ptr() in runtime.locked[0]
        assert batch.grid.data_ptr() + batch.grid.nbytes - 1 in runtime.locked[0]
    view = batch.grid[-1:, :1]
    del batches, batch
    assert len(runtime.locked) == 1 and not runtime.unlocked
    del view
    assert runtime.unlocked == [runtime.locked[0].start]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_so_do_all_micro_batches_of_a_step_and_of_the_one_before(manifest, tokenizer, num_workers, monkeypatch):
    runtime, steps, before = Runtime(), 0, []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with closing(locked_batches(manifest, tokenizer, num_workers, share=Share(0, 1, 8), epochs=3)) as batches:
        while of_step := list(itertools.islice(batches, 8)):
            assert all(batch.grid.data_ptr() in runtime.locked[0] for batch in of_step)
            steps, before = steps + 1, of_step
    assert steps == 9 and before


def test_memory_that_cannot_be_locked_serves_all_the_same_and_is_said(manifest, tokenizer, caplog, monkeypatch):
    runtime, asked = Runtime(error=2), []

    def refuse(*size, device):
        asked.append(device)
        raise RuntimeError("what came before: error 2")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    batches = locked_batches(manifest, tokenizer)
    monkeypatch.setattr(torch, "zeros", refuse)
    assert len(list(batches)) == 3 and asked == ["cuda"]
    assert "cannot be locked, so each is copied once more: error 2" in caplog.text and not runtime.unlocked


def test_an_error_while_memory_is_locked_leaves_no_worker_behind(manifest, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: 1 / 0)
    before = set(psutil.Process().children())
    with closing(locked_batches(manifest, tokenizer, num_workers=2)) as batches:
        with pytest.raises(ZeroDivisionError) as raised:
            next(batches)
        left = set(psutil.Process().children()) - before
    del raised  # with which they would end in any case, if late
    assert not left


def test_what_is_cut_off_from_whole_rows_is_copied_with_them():
    tensor = torch.arange(4 * 6 * 5).view(4, 6, 5)
    for cut in (tensor[:, :2], tensor[1:3, :1], tensor[:, :, 0][:, :2]):
        assert torch.equal(_whole(cut)[:, : cut.shape[1]], cut)
    assert _whole(tensor[1:, :2]).is_contiguous()
    slot = Ring(1, 2, 1 << 10, shared=True).tensor(1, (4, 6, 5), torch.bfloat16)
    found = _whole(slot[:, :2])  # up to the end of its memory
    assert found.shape == slot.shape and found.data_ptr() == slot.data_ptr()
    others = (tensor[:, 1:3], tensor[:, :, :2], tensor.transpose(0, 1), tensor[:1].expand(4, -1, -1)[:, :2])
    memory = torch.from_numpy(tensor.numpy()[:, :2]), torch.zeros(4, 10).as_strided((4, 1, 5), (10, 0, 1))
    for other in (tensor, tensor[0, 0], tensor[:0, :2], tensor[:, :0], *others, *memory):
        assert torch.equal(_whole(other)[:, : other.shape[1]] if other.dim() > 1 else _whole(other), other)


@pytest.mark.parametrize("most", [255, 65_535, 65_536, 1 << 40])
def test_words_of_any_vocabulary_cross_processes(most):
    ring = Ring(1, 1, 1 << 10, shared=True)
    slot = ring.take(0, 24)
    assert slot is not None
    captions, numbers = torch.tensor([[[1, most, 0]]]), dict.fromkeys(("epoch", "step", "samples_done", "retries"), 0)
    grid = ring.tensor(slot, (1, 2, 3), torch.float32, release=False).fill_(1.5)
    lists = {"image_ids": ["a"], "sample_keys": ["b"], "problems": []}
    sent = CaptionBatch(grid, captions, torch.tensor([[2]]), torch.tensor([[-(1 << 63)]]), **lists, **numbers)
    found = pickle.loads(pickle.dumps(InTransit(sent, ring.number, slot, (1, 2, 3))))
    for name in ("grid", "captions", "lengths", "keys"):
        assert torch.equal(getattr(found, name), getattr(sent, name)), name
        assert getattr(found, name).dtype == getattr(sent, name).dtype
