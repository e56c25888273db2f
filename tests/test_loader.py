"""The loader's promises over real tiny shards: equal global batches in any world, resume anywhere, evaluation once."""

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import psutil
import pytest
import torch
from helpers_shards import (
    flip_bit,
    grid_of,
    loader_arguments,
    make_feature_dataset,
    read_batches,
    self_describing_captions,
)

from preprocessing.features.statistics import restore, store
from sat.data import reader as reader_module
from sat.data.loader import (
    Pictures,
    Reading,
    evaluation_batches,
    read_references,
    steps_per_epoch,
    training_batches,
)
from sat.data.options import LoaderOptions
from sat.data.plan import Cursor, Share
from sat.text import END, PAD, START, build_tokenizer

SAMPLES = 23
IN_PROCESS = Reading(LoaderOptions(num_workers=0))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_feature_dataset(tmp_path_factory.mktemp("features"), {"train": SAMPLES, "val": 6, "restval": 5})


@pytest.fixture(scope="module")
def extra(tmp_path_factory):
    """A second source, some of whose images have the names of the first one's."""
    return make_feature_dataset(tmp_path_factory.mktemp("extra"), {"train": 4, "test": 2}, name="extra")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([c for i in range(SAMPLES) for c in self_describing_captions("train", i)], 1)


@pytest.fixture
def batches_of(manifest, tokenizer):
    """training_batches over the tiny set, with its usual settings unless told otherwise."""
    return partial(read_batches, [(manifest, 1.0)], tokenizer)


def global_batches(batches_of, world_size, **settings):
    """{step: sorted image ids} over all ranks."""
    found: dict[int, list[str]] = {}
    for rank in range(world_size):
        for batch in batches_of(rank=rank, world_size=world_size, **settings):
            found.setdefault(batch.step, []).extend(filter(None, batch.image_ids))
    return {step: sorted(ids) for step, ids in found.items()}


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grid.view(torch.uint8), b.grid.view(torch.uint8))
        assert torch.equal(a.captions, b.captions) and torch.equal(a.lengths, b.lengths)
        assert torch.equal(a.keys, b.keys) and (a.image_ids, a.sample_keys) == (b.image_ids, b.sample_keys)
        assert (a.step, a.samples_done) == (b.step, b.samples_done)


@pytest.mark.faults
@pytest.mark.parametrize("global_batch", [1, 8, 10])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_global_batches_are_the_same_for_any_ranks_and_accumulation(batches_of, world_size, global_batch):
    expected = global_batches(batches_of, 1, global_batch=global_batch)
    assert Counter(i for ids in expected.values() for i in ids) == Counter(f"train-{i}" for i in range(SAMPLES))
    assert [len(ids) for ids in expected.values()][:-1] == [global_batch] * (len(expected) - 1)
    for accumulation in (1, 3):
        settings = {"global_batch": global_batch, "accumulation_steps": accumulation}
        assert global_batches(batches_of, world_size, **settings) == expected


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("global_batch", [1, 8, 10])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_the_number_of_workers_changes_nothing(batches_of, world_size, global_batch):
    for rank in range(world_size):
        accumulation = 1 + rank % 3
        settings = {"world_size": world_size, "accumulation_steps": accumulation, "global_batch": global_batch}
        expected = batches_of(rank=rank, **settings)
        for workers in (1, 2, 3):
            assert_equal(batches_of(rank=rank, num_workers=workers, **settings), expected)


@pytest.mark.faults
@pytest.mark.parametrize("global_batch", [5, 8])
@pytest.mark.parametrize("mixed", [False, True])
def test_resume_after_any_step_with_another_world_yields_the_remaining_batches(
    manifest, extra, tokenizer, mixed, global_batch
):
    sources = [(manifest, 1.0), (extra, 0.5)] if mixed else [(manifest, 1.0)]
    batches_of = partial(read_batches, sources, tokenizer, epoch=3, global_batch=global_batch)
    whole, samples = global_batches(batches_of, 1), SAMPLES + (round(0.5 * SAMPLES) if mixed else 0)
    assert sum(map(len, whole.values())) == samples
    for step in range(len(whole) + 1):
        done = min(step * global_batch, samples)
        for world_size, accumulation, workers in ((1, 1, 0), (2, 1, 1), (3, 2, 0), (5, 3, 0), (1, 2, 2)):
            settings = {"done": done, "accumulation_steps": accumulation, "num_workers": workers}
            assert global_batches(batches_of, world_size, **settings) == {s: i for s, i in whole.items() if s >= step}


def test_the_cursor_value_of_each_batch_resumes_behind_it(batches_of):
    for batch in batches_of(accumulation_steps=2, world_size=2):
        rest = batches_of(done=batch.samples_done)
        assert not {i for b in rest for i in b.image_ids} & set(filter(None, batch.image_ids))
        assert sum(len(b.image_ids) for b in rest) == SAMPLES - batch.samples_done


def test_every_rank_makes_the_same_micro_batches_and_short_ranks_get_empty_rows(batches_of):
    ranks = [batches_of(rank=rank, world_size=5, accumulation_steps=2, global_batch=8) for rank in range(5)]
    assert len({tuple((b.step, len(b.sample_keys)) for b in batches) for batches in ranks}) == 1
    padding = 0
    for batch in (b for batches in ranks for b in batches):
        assert batch.grid.shape == (len(batch.sample_keys), 4, 8)
        for row, key in enumerate(batch.sample_keys):
            if not key:
                padding += 1
                assert not batch.grid[row].any() and not batch.lengths[row].any() and (batch.captions[row] == PAD).all()
            else:
                assert batch.lengths[row].all()
    assert padding == sum(len(b.sample_keys) for batches in ranks for b in batches) - SAMPLES


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "int8"])
def test_rows_hold_the_grid_and_the_captions_of_their_image(tmp_path, tokenizer, dtype):
    manifest = make_feature_dataset(tmp_path, {"train": 9}, dtype=dtype)
    scale = np.full(8, 4 / 127, np.float32) if dtype == "int8" else None
    for batch in read_batches([(manifest, 1.0)], tokenizer, global_batch=4):
        names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
        assert batch.grid.dtype == names[dtype]
        for row, image_id in enumerate(batch.image_ids):
            index = int(image_id.split("-")[1])
            expected = restore(store(grid_of("train", index, 4, 8), dtype, scale), dtype, scale)
            got = batch.grid[row].float().numpy() * (scale if dtype == "int8" else 1)
            assert np.array_equal(got, expected)
            for k, text in enumerate(self_describing_captions("train", index)):
                ids, length = batch.captions[row, k].tolist(), int(batch.lengths[row, k])
                assert ids[0] == START and ids[length] == END and set(ids[length + 1 :]) <= {PAD}
                assert tokenizer.decode(ids) == text and length == len(text.split()) + 1
        assert batch.captions.shape[2] == int(batch.lengths.max()) + 1
        assert int(batch.tokens) == int(batch.lengths.sum()) and int(batch.caption_count) == 5 * len(batch.sample_keys)


def test_long_captions_are_cut_and_wordless_ones_dropped(tmp_path):
    texts = {0: ["one two three four", "..."], 1: [], 2: ["!", "two"]}
    manifest = make_feature_dataset(tmp_path, {"train": 3}, captions=lambda split, index: texts[index])
    tokenizer = build_tokenizer(["one two three four"], 1)
    (batch,) = read_batches([(manifest, 1.0)], tokenizer, max_caption_length=3, captions_per_image=2)
    rows = {i: row for row, i in enumerate(batch.image_ids)}
    assert batch.lengths[rows["train-0"]].tolist() == [4, 0]
    assert tokenizer.decode(batch.captions[rows["train-0"], 0]) == "one two three"
    assert batch.lengths[rows["train-1"]].tolist() == [0, 0]
    assert batch.lengths[rows["train-2"]].tolist() == [2, 0]
    assert tokenizer.decode(batch.captions[rows["train-2"], 0]) == "two"


def test_the_captions_chosen_depend_on_seed_epoch_and_image_only(batches_of):
    def shown(**settings):  # the five captions of an image differ in length
        world = settings.get("world_size", 1)
        batches = [b for rank in range(world) for b in batches_of(rank=rank, captions_per_image=2, **settings)]
        return {i: b.lengths[row].tolist() for b in batches for row, i in enumerate(b.image_ids) if i}

    first = shown(epoch=0)
    assert shown(epoch=0, world_size=3, accumulation_steps=2, run_length=1) == first
    assert shown(epoch=1) != first


def test_epochs_differ_in_order_and_agree_in_content(batches_of):
    orders = [[i for b in batches_of(epoch=epoch) for i in b.image_ids] for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_a_bounded_cache_of_rows_changes_nothing(batches_of, monkeypatch):
    expected = batches_of()
    monkeypatch.setattr(reader_module, "CACHED_ROWS", 1)
    assert_equal(batches_of(), expected)


def test_several_splits_are_one_training_set(batches_of):
    ids = [i for b in batches_of(splits=["restval", "train"]) for i in b.image_ids]
    assert sorted(ids) == sorted([f"train-{i}" for i in range(SAMPLES)] + [f"restval-{i}" for i in range(5)])


def test_a_mixture_gives_main_samples_once_and_extras_by_weight_for_any_world(manifest, extra, tokenizer):
    sources = [(manifest, 1.0), (extra, 0.5)]
    expected = global_batches(partial(read_batches, sources, tokenizer), 1)
    counts = Counter(i for ids in expected.values() for i in ids)
    # Both sets name their images alike: train-0 .. train-3 are in both.
    assert sum(counts.values()) == SAMPLES + round(0.5 * SAMPLES)
    assert all(counts[f"train-{i}"] == 1 for i in range(4, SAMPLES))
    assert {counts[f"train-{i}"] for i in range(4)} == {1 + 3}
    assert global_batches(partial(read_batches, sources, tokenizer), 3, accumulation_steps=2) == expected
    assert steps_per_epoch(sources, ["train"], 8) == len(expected)


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_evaluation_reads_each_image_exactly_once_and_balanced(manifest, world_size):
    shares = []
    for rank in range(world_size):
        batches = list(evaluation_batches(manifest, "val", IN_PROCESS, batch_size=2, share=Share(rank, world_size)))
        shares.append([i for b in batches for i in b.image_ids])
        assert all(b.grid.shape == (len(b.sample_keys), 4, 8) and b.captions.shape[1] == 0 for b in batches)
    assert Counter(i for share in shares for i in share) == Counter(f"val-{i}" for i in range(6))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_evaluation_pairs_each_image_with_its_own_grid(manifest):
    for batch in evaluation_batches(manifest, "train", Reading(LoaderOptions(num_workers=2)), batch_size=5):
        for row, image_id in enumerate(batch.image_ids):
            expected = grid_of("train", int(image_id.split("-")[1]), 4, 8).astype(np.float16)
            assert np.array_equal(batch.grid[row].numpy(), expected)


def test_references_are_the_captions_as_given(manifest):
    assert read_references(manifest, "val") == {f"val-{i}": self_describing_captions("val", i) for i in range(6)}


@pytest.mark.faults
def test_more_ranks_than_samples_still_make_equal_steps(batches_of):
    ranks = [batches_of(rank=rank, world_size=40, global_batch=64) for rank in range(40)]
    assert {len(batches) for batches in ranks} == {1}
    assert sum(bool(key) for batches in ranks for key in batches[0].sample_keys) == SAMPLES
    assert int(ranks[-1][0].tokens) == 0


@pytest.mark.faults
def test_an_empty_or_unknown_split_is_refused_with_those_there_are(manifest, tokenizer):
    for call in (
        lambda: read_batches([(manifest, 1.0)], tokenizer, splits=["train", "trian"]),
        lambda: evaluation_batches(manifest, "trian"),
        lambda: read_references(manifest, "trian"),
        lambda: steps_per_epoch([(manifest, 1.0)], ["trian"], 8),
    ):
        with pytest.raises(ValueError, match=r"trian.*'restval': 5, 'train': 23, 'val': 6"):
            call()


def test_settings_and_sources_that_do_not_fit_are_refused_at_once(manifest, tokenizer, tmp_path):
    sources = [(manifest, 1.0)]
    start = partial(training_batches, sources, tokenizer, IN_PROCESS, splits=["train"], global_batch=8)
    with pytest.raises(ValueError, match="cursor belongs to data set"):
        start(cursor=replace(Cursor.start(sources, 1), manifest="f" * 64))
    with pytest.raises(ValueError, match="sample 24 of an epoch of 23"):
        start(cursor=replace(Cursor.start(sources, 1), samples_done=24))
    for settings in ({"global_batch": 0}, {"epochs": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            start(cursor=Cursor.start(sources, 1), **settings)
    for share in ((1, 1), (-1, 2), (0, 1, 0)):
        with pytest.raises(ValueError, match=r"the rank must be in \[0, world_size\), accumulation_steps at least 1"):
            Share(*share)
    with pytest.raises(ValueError, match="holds features; images, and only they, need"):
        pictures = Pictures(torch.frombuffer, 8)
        training_batches(
            sources,
            tokenizer,
            Reading(pictures=pictures),
            splits=["train"],
            cursor=Cursor.start(sources, 1),
            global_batch=8,
        )
    other = make_feature_dataset(tmp_path, {"train": 4}, dim=16)
    mixed = [(manifest, 1.0), (other, 1.0)]
    with pytest.raises(ValueError, match="to be mixed with .*: its dim is 16, but 8 is needed"):
        training_batches(mixed, tokenizer, IN_PROCESS, splits=["train"], cursor=Cursor.start(mixed, 1), global_batch=8)


def test_cursor_survives_json_and_refuses_another_version(manifest):
    cursor = Cursor.start([(manifest, 1.0)], 5).advanced(16)
    assert Cursor.from_dict(cursor.to_dict()) == cursor
    assert (cursor.next_epoch().epoch, cursor.next_epoch().samples_done) == (1, 0)
    with pytest.raises(ValueError, match="cursor of version 99"):
        Cursor.from_dict(cursor.to_dict() | {"version": 99})


def test_batches_move_between_devices_and_leave_on_the_host_what_a_step_is_planned_by(batches_of):
    batch = batches_of()[0].to("meta")
    assert batch.grid.device.type == "meta"
    assert {each.device.type for each in (batch.captions, batch.lengths, batch.keys)} == {"cpu"}
    assert len(batch.sample_keys) == 8


LEFT_OPEN = """
import sys, psutil
from sat.data.loader import Reading, training_batches
from sat.data.options import LoaderOptions
from sat.data.plan import Cursor
from sat.shards.manifest import load_manifest
from sat.text import build_tokenizer
sources = [(load_manifest(sys.argv[1]), 1.0)]
how = {"splits": ["train"], "cursor": Cursor.start(sources, 7), "global_batch": 2, "epochs": 9}
batches = training_batches(sources, build_tokenizer(["a"], 1), Reading(LoaderOptions(num_workers=2)), **how)
next(batches)
print(*[child.pid for child in psutil.Process().children()])
"""


def test_a_process_that_leaves_a_loader_open_ends_with_its_workers(manifest):
    command = [sys.executable, "-c", LEFT_OPEN, str(manifest.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2 and not any(map(psutil.pid_exists, workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_is_used_again_only_when_nobody_holds_a_batch_or_a_view_of_it(manifest, tokenizer, num_workers):
    sources = [(manifest, 1.0)]
    settings = {"splits": ["train"], "cursor": Cursor.start(sources, 7), "global_batch": 2, "epochs": 3}
    reading = Reading(LoaderOptions(num_workers=num_workers))
    kept = list(training_batches(sources, tokenizer, reading, **settings))
    addresses, views = set(), []
    for batch, expected in zip(training_batches(sources, tokenizer, reading, **settings), kept, strict=True):
        addresses.add(batch.grid.data_ptr())
        assert_equal([batch], [expected])
        if batch.step % 5 == 0:
            views.append((batch.grid[:1], expected.grid[:1]))
    assert all(torch.equal(ours, theirs) for ours, theirs in views)
    assert len(addresses) < len(kept) and len({b.grid.data_ptr() for b in kept}) == len(kept)


def test_several_epochs_in_one_go_are_the_epochs_one_by_one(batches_of):
    one_by_one = batches_of(epoch=1, done=8) + batches_of(epoch=2) + batches_of(epoch=3)
    for workers in (0, 2):
        in_one = batches_of(epoch=1, done=8, epochs=3, num_workers=workers)
        assert_equal(in_one, one_by_one)
        assert [b.epoch for b in in_one] == [b.epoch for b in one_by_one]


def test_a_damaged_sample_counts_once_per_epoch_against_the_bound(tmp_path, tokenizer):
    manifest = make_feature_dataset(tmp_path, {"train": 5})
    flip_bit(tmp_path / "train-000000.tar", 8 * 2000)
    settings = {"on_bad_sample": "quarantine", "max_bad_samples": 1, "epochs": 3}
    assert sum(batch.bad for batch in read_batches([(manifest, 1.0)], tokenizer, **settings)) == 3


@pytest.mark.parametrize("end", ["close", "drop", "error"])
def test_workers_end_with_an_iterator_that_is_not_read_to_its_end(manifest, tokenizer, end):
    before = {child.pid for child in psutil.Process().children()}

    def ours():
        return [child for child in psutil.Process().children() if child.pid not in before]

    sources = [(manifest, 1.0)]
    settings = loader_arguments({"num_workers": 2, "epochs": 99, "splits": ["train"], "global_batch": 2})
    batches = training_batches(sources, tokenizer, cursor=Cursor.start(sources, 7), **settings)
    next(batches)
    assert len(ours()) == 2
    began = time.monotonic()
    if end == "close":
        batches.close()
    elif end == "drop":
        del batches
    else:
        with pytest.raises(RuntimeError, match="of the reader's"):
            batches.throw(RuntimeError("of the reader's"))
    assert not ours() and time.monotonic() - began < 4


def test_workers_and_encoded_captions_serve_all_epochs(manifest, tokenizer, tmp_path):
    class Counting:
        """A tokenizer that writes down who encoded."""

        def encode(self, text, max_words):
            with open(tmp_path / "encoded", "a") as file:
                file.write(f"{os.getpid()}\n")
            return tokenizer.encode(text, max_words)

    for workers in (0, 2):
        found = read_batches([(manifest, 1.0)], Counting(), num_workers=workers, done=8, epochs=4)
        assert [batch.epoch for batch in found] == [0] * 2 + [1] * 3 + [2] * 3 + [3] * 3
        encoders = Counter((tmp_path / "encoded").read_text().split())
        assert len(encoders) == max(workers, 1)
        assert max(encoders.values()) <= 5 * SAMPLES, "a process encoded the captions of an image twice"
        (tmp_path / "encoded").unlink()
