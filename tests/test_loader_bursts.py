"""Without workers small batches are read several in one go, of which the training sees nothing."""

from itertools import chain, repeat

import pytest
from helpers_shards import flip_bit, loader_arguments, make_feature_dataset, self_describing_captions

from sat.data import loader
from sat.data.batch import BatchReader
from sat.data.plan import Cursor
from sat.data.reader import BadSample
from sat.text import build_tokenizer

SAMPLES = 20


@pytest.fixture
def batches_of(tmp_path):
    """The batches of one sample each of a fresh set."""
    manifest = make_feature_dataset(tmp_path, {"train": SAMPLES})
    tokenizer = build_tokenizer([text for i in range(SAMPLES) for text in self_describing_captions("train", i)], 1)
    sources = [(manifest, 1.0)]

    def begin(**settings):
        settings = {"splits": ["train"], "global_batch": 1, "cursor": Cursor.start(sources, 4)} | settings
        return loader.training_batches(sources, tokenizer, **loader_arguments(settings))

    return begin


@pytest.mark.parametrize(("fitting", "burst"), [(100, 8), (3, 3), (1, 1), (0.5, 1)])
def test_small_batches_are_read_in_bursts_and_large_ones_one_by_one(batches_of, monkeypatch, fitting, burst):
    reads, read, row_bytes = [], BatchReader.read, 4 * 8 * 2
    monkeypatch.setattr(BatchReader, "read", lambda *arguments: reads.append(1) or read(*arguments))
    monkeypatch.setattr(loader, "BURST_BYTES", int(fitting * row_bytes))
    ahead = [len(reads) for _ in batches_of()]
    expected = chain.from_iterable(repeat(end, burst) for end in range(burst, SAMPLES + burst, burst))
    assert ahead == [min(end, SAMPLES) for end, _ in zip(expected, range(SAMPLES), strict=False)]


def test_memory_for_bursts_is_used_again(batches_of):
    assert len({batch.grid.data_ptr() for batch in batches_of(epochs=5)}) == loader.BURST + 1


def test_a_damaged_sample_ends_the_training_after_the_batches_before_it_with_and_without_workers(tmp_path, batches_of):
    flip_bit(tmp_path / "train-000000.tar", 8 * 2000)
    seen = []
    for workers in (0, 2):
        seen.append([])
        with pytest.raises(BadSample, match="checksum"):
            for batch in batches_of(num_workers=workers):
                seen[-1].append(batch.samples_done)
    assert seen[0] == seen[1] == list(range(1, len(seen[0]) + 1)) and len(seen[0]) % loader.BURST
