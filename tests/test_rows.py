"""Sets larger than the rows that are kept: read as small ones are, each table of rows once, at one pace."""

import os
from collections import Counter

import numpy as np
import pytest
import torch
from helpers_shards import flip_bit, make_feature_dataset, read_batches, self_describing_captions
from test_loader_pictures import decode_crop, make_image_dataset

from sat.data import reader as reader_module
from sat.data.batch import CaptionBatch
from sat.data.loader import Pictures
from sat.data.reader import BadSample, SampleReader
from sat.data.rows import RECORD, Places, Rows
from sat.shards.store import FolderStore, make_store
from sat.text import build_tokenizer
from tests.helpers_import import make_region_dataset

SAMPLES = 23


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([text for index in range(SAMPLES) for text in self_describing_captions("train", index)], 1)


@pytest.fixture
def few_kept(monkeypatch):
    """Of all sets of this test only the rows of one shard are kept."""
    monkeypatch.setattr(reader_module, "CACHED_ROWS", 1)


def make_set(kind, root):
    if kind == "regions":
        return make_region_dataset(root, {"train": SAMPLES})
    return make_image_dataset(root, 9) if kind == "pictures" else make_feature_dataset(root, {"train": SAMPLES})


def everything_in(batch):
    kept = ("epoch", "step", "samples_done", "image_ids", "sample_keys", "references", "problems")
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert {*kept, *tensors, "retries"} == set(CaptionBatch.__dataclass_fields__) - {
        name for name in ("regions", "boxes") if getattr(batch, name) is None
    }
    return [getattr(batch, name) for name in kept], {name: value.tolist() for name, value in tensors.items()}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["grids", "regions", "pictures"])
def test_batches_do_not_depend_on_how_many_rows_are_kept(tmp_path, tokenizer, monkeypatch, kind, num_workers):
    sources = [(make_set(kind, tmp_path), 1.0)]
    settings = {"global_batch": 4, "epochs": 3, "num_workers": num_workers}
    settings |= {"pictures": Pictures(decode_crop, 32)} if kind == "pictures" else {}
    expected = list(map(everything_in, read_batches(sources, tokenizer, **settings)))
    monkeypatch.setattr(reader_module, "CACHED_ROWS", 1)
    assert list(map(everything_in, read_batches(sources, tokenizer, **settings))) == expected


def test_the_rows_of_a_shard_are_read_once_however_many_epochs_and_samples(tmp_path, tokenizer, few_kept, monkeypatch):
    manifest, loads = make_feature_dataset(tmp_path, {"train": SAMPLES}, shard_size=4), Counter()
    genuine = FolderStore.rows

    def counted(store, manifest, shard):
        loads[shard] += 1
        return genuine(store, manifest, shard)

    monkeypatch.setattr(FolderStore, "rows", counted)
    read_batches([(manifest, 1.0)], tokenizer, epochs=4, run_length=1)
    assert loads == dict.fromkeys(range(len(manifest.shards)), 1)


def reader_of(manifest):
    """A reader that has met all samples of two shards and keeps the rows of the second."""
    reader = SampleReader(manifest, make_store(manifest.root))
    for shard in (0, 1):
        reader.rows(shard)
    return reader


def test_damage_of_a_sample_whose_rows_are_not_kept_is_named_by_shard_and_key(tmp_path, few_kept):
    manifest = make_feature_dataset(tmp_path, {"train": 14})
    rows, out = manifest.rows(0).to_pylist(), memoryview(bytearray(64))
    for row in rows:
        flip_bit(tmp_path / "train-000000.tar", 8 * (row["offset"] + row["nbytes"] // 2))
    for sample, row in enumerate(rows):
        with pytest.raises(BadSample, match=rf"train-000000.tar: key {row['key']}: .*checksum"):
            reader_of(manifest).read_grid(0, sample, out)


def test_a_description_that_is_none_is_refused(tmp_path, few_kept, monkeypatch):
    reader, out = reader_of(make_feature_dataset(tmp_path, {"train": 14})), memoryview(bytearray(64))
    assert reader.read_grid(0, 3, out).texts(3) == reader.manifest.rows(0)["captions"][3].as_py()
    for wrong in (b"", b"{}", b'{"image_id": "1"}', b"[]", b"\xff"):
        monkeypatch.setattr(reader_module, "content_of", lambda member, wrong=wrong: wrong)
        with pytest.raises(BadSample, match=r"train-000000.tar: key train-\d+: its .json does not say what it is"):
            reader.read_grid(0, 3, out)
        reader.rows(1)


def places_of(counts):
    """Places and what they hold: random ones of all shards but the last."""
    draw, places, expected = np.random.default_rng(1), Places(np.array(counts)), {}
    for shard, count in enumerate(counts[:-1]):
        columns = [draw.integers(0, 2**63, count, dtype=np.uint64).tolist() for _ in range(3)]
        places.keep(shard, Rows(shard, 0, [""] * count, [], *columns, captions={}))
        expected |= {(shard, sample): values for sample, values in enumerate(zip(*columns))}
    return places, expected


def test_places_are_found_by_number_and_what_was_not_met_is_not_found():
    places, expected = places_of([3, 1, 5, 4])
    assert {place: places.find(*place) for place in expected} == expected
    assert not any(places.find(3, sample) for sample in range(4))


def test_half_a_record_is_none():
    places, expected = places_of([3, 1, 5, 4])
    descriptor = places._file.fileno()
    for number, place in enumerate(expected):
        record = os.pread(descriptor, RECORD.size, number * RECORD.size)
        for cut in range(0, RECORD.size, 8):
            os.pwrite(descriptor, record[:cut] + bytes(RECORD.size - cut), number * RECORD.size)
            assert places.find(*place) is None
        os.pwrite(descriptor, record, number * RECORD.size)
    assert {place: places.find(*place) for place in expected} == expected


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["no room", "no folder"])
def test_without_room_for_places_samples_are_read_all_the_same(tmp_path, tokenizer, few_kept, monkeypatch, fault):
    manifest = make_feature_dataset(tmp_path, {"train": SAMPLES}, shard_size=4)
    expected = list(map(everything_in, read_batches([(manifest, 1.0)], tokenizer, epochs=2)))

    def refuse(*arguments, **options):
        raise OSError(28, "No space left on device")

    if fault == "no room":
        monkeypatch.setattr("sat.data.rows.os.pwrite", refuse)
    else:
        monkeypatch.setattr("sat.data.rows.tempfile.TemporaryFile", refuse)
    assert list(map(everything_in, read_batches([(manifest, 1.0)], tokenizer, epochs=2))) == expected
