"""The sample order against slow, independent statements of its rules."""

import hashlib
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.data.order import (
    choose_captions,
    derive_key,
    epoch_order,
    interleave,
    locate,
    make_layout,
    micro_batch_rows,
    mix64,
    mix64_array,
    permute,
    source_order,
)

DIGEST = "0123456789abcdef" * 4
SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
KEYS = st.integers(0, 2**64 - 1)


@pytest.fixture(autouse=True)
def _overflow_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def listed(order, start, stop):
    source, shard, sample = order.locate(np.arange(start, stop, dtype=np.int64))
    return list(zip(source.tolist(), shard.tolist(), sample.tolist()))


def test_mix64_is_splitmix64_for_ints_and_arrays():
    # First outputs of the reference generator seeded with 1234567.
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(1, 4)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix64(s) for s in states] == expected
    assert mix64_array(np.array(states, dtype=np.uint64)).tolist() == expected


@given(size=st.integers(1, 3000), key=KEYS)
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(size, key):
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


@given(size=st.integers(2**33, 2**50), key=KEYS, start=st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_permute_of_a_huge_domain_stays_inside_and_never_repeats(size, key, start):
    first = int(start * (size - 5000))
    image = permute(np.arange(first, first + 5000), size, key)
    assert image.min() >= 0 and image.max() < size
    assert np.unique(image).size == 5000


def test_permute_gives_every_arrangement_of_a_small_domain_about_equally_often():
    seen = Counter(tuple(permute(np.arange(4), 4, derive_key(seed))) for seed in range(4800))
    assert len(seen) == 24
    assert min(seen.values()) > 130 and max(seen.values()) < 280  # 200 expected, sigma 14


def test_permute_sends_neighbours_far_apart():
    size = 100_000
    image = permute(np.arange(size), size, derive_key(7))
    # Of neighbouring places a uniform permutation puts 2 x 50 / size = 0.1 % within 50 of each other.
    assert np.mean(np.abs(np.diff(image)) <= 50) < 0.002
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.02


@given(shards=SHARDS, run_length=st.integers(1, 9))
@settings(deadline=None)
def test_locate_names_each_sample_once_and_full_runs_are_consecutive(shards, run_length):
    layout = make_layout(shards, run_length)
    assert layout.samples == sum(shards)
    if not sum(shards):
        return
    shard, sample = locate(layout, np.arange(sum(shards)))
    pairs = list(zip(shard.tolist(), sample.tolist()))
    assert sorted(pairs) == [(s, i) for s, count in enumerate(shards) for i in range(count)]
    runs = sum(count // run_length for count in shards)
    for run in range(runs):
        first_shard, first = pairs[run * run_length]
        assert first % run_length == 0
        assert pairs[run * run_length : (run + 1) * run_length] == [(first_shard, first + i) for i in range(run_length)]


@given(shards=SHARDS.filter(any), run_length=st.integers(1, 9), key=KEYS)
@settings(deadline=None)
def test_source_order_holds_each_sample_exactly_once_in_whole_runs(shards, run_length, key):
    layout = make_layout(shards, run_length)
    shard, sample = source_order(layout, key, np.arange(layout.samples))
    pairs = list(zip(shard.tolist(), sample.tolist()))
    assert sorted(pairs) == [(s, i) for s, count in enumerate(shards) for i in range(count)]
    place = {pair: i for i, pair in enumerate(pairs)}
    for s, count in enumerate(shards):
        for first in range(0, count - run_length + 1, run_length):
            start = place[s, first]
            assert pairs[start : start + run_length] == [(s, first + i) for i in range(run_length)]


@given(shards=SHARDS.filter(any), run_length=st.integers(1, 9), window=st.integers(1, 14), key=KEYS)
@settings(deadline=None)
def test_windows_hold_each_sample_once_and_no_more_shards_than_they_may(shards, run_length, window, key):
    layout = make_layout(shards, run_length, window)
    shard, sample = source_order(layout, key, np.arange(layout.samples))
    pairs = list(zip(shard.tolist(), sample.tolist()))
    assert sorted(pairs) == [(s, i) for s, count in enumerate(shards) for i in range(count)]
    one_by_one = [source_order(make_layout(shards, run_length, window), key, np.array([p])) for p in range(len(pairs))]
    assert [(int(s[0]), int(i[0])) for s, i in one_by_one] == pairs, "any place can be asked for by itself"
    first, last = {s: pairs.index((s, int(sample[shard == s][0]))) for s in set(shard.tolist())}, {}
    for place, (s, _) in enumerate(pairs):
        last[s] = place
    live = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(pairs))]
    assert max(live) <= window


def test_windows_mix_as_well_as_the_whole_but_for_the_number_of_shards_in_a_batch():
    shards, batch = [100] * 64, 64
    for window, shards_of_batch in ((0, 14.3), (16, 10.3), (4, 4.0)):
        order = epoch_order([make_layout(shards, 4, window)], [DIGEST], [1.0], 1, 0)
        _, shard, sample = order.locate(np.arange(order.samples))
        stored = shard * 100 + sample
        assert abs(np.corrcoef(stored, np.arange(stored.size))[0, 1]) < (0.3 if window else 0.05)
        assert abs(np.corrcoef(sample, np.arange(stored.size))[0, 1]) < 0.05, "no shard is read from its beginning"
        found = np.mean([np.unique(shard[i : i + batch]).size for i in range(0, stored.size, batch)])
        assert found == pytest.approx(shards_of_batch, rel=0.1)  # 16 runs: n (1 - (1 - 1/n)^16) of n shards


@given(
    shards=SHARDS.filter(any),
    runs=st.tuples(st.integers(1, 6), st.sampled_from([0, 0, 1, 3])),
    seed=st.integers(-5, 2**40),
    world=st.integers(1, 6),
    workers=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    global_batch=st.integers(1, 50),
    done=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_global_batches_do_not_depend_on_ranks_workers_or_accumulation(
    shards, runs, seed, world, workers, accumulation, global_batch, done
):
    order = epoch_order([make_layout(shards, *runs)], [DIGEST], [1.0], seed, 3)
    start = done % order.samples
    stop = min(start + global_batch, order.samples)
    expected = listed(order, start, stop)
    rows = [
        [micro_batch_rows(stop - start, rank, world, accumulation, micro) for micro in range(accumulation)]
        for rank in range(world)
    ]
    assert len({part.size for mine in rows for part in mine}) == 1, "every micro-batch of a step has the same rows"
    owned = [np.concatenate(mine) for mine in rows]
    real = [mine[mine >= 0] for mine in owned]
    assert max(map(len, real)) - min(map(len, real)) <= 1, "ranks are balanced to one row"
    found = [one for mine in real for one in zip(*(part.tolist() for part in order.locate(start + mine)))]
    assert found == expected, "each rank has one block, and the ranks' blocks stand in the order of the batch"


@pytest.mark.parametrize("world", [1, 2, 4, 8, 64, 1024])
def test_runs_are_read_whole_by_any_number_of_ranks(world):
    batch, run_length = 64 * world, 4
    order = epoch_order([make_layout([1000] * 200, run_length)], [DIGEST], [1.0], 1, 0)
    reads = 0
    for rank in {0, world // 2, world - 1}:
        _, shard, sample = order.locate(micro_batch_rows(batch, rank, world, 1, 0))
        after = (shard[1:] == shard[:-1]) & (sample[1:] == sample[:-1] + 1)
        reads = max(reads, 64 - int(after.sum()))
    assert reads == 64 // run_length


GLOBAL_BATCHES = "82c752d28e118596"
"""Of the epoch below, as it was when rank r still took the places r::world."""


def test_the_global_batches_of_an_epoch_are_those_they_have_always_been():
    layouts = [make_layout([1000, 77, 0, 431, 5], 4), make_layout([90, 33], 4)]
    order, digest = epoch_order(layouts, [DIGEST, DIGEST[::-1]], [1.0, 0.25], 11, 2), hashlib.sha256()
    for start in range(0, order.samples, 128):
        digest.update(repr(sorted(listed(order, start, min(start + 128, order.samples)))).encode())
    assert digest.hexdigest().startswith(GLOBAL_BATCHES)


@given(shards=SHARDS.filter(any), run_length=st.integers(1, 6), cut=st.floats(0, 1))
@settings(deadline=None)
def test_resume_after_any_sample_yields_the_rest_of_the_epoch(shards, run_length, cut):
    order = epoch_order([make_layout(shards, run_length)], [DIGEST], [1.0], 1, 0)
    done = int(cut * order.samples)
    assert listed(order, 0, done) + listed(order, done, order.samples) == listed(order, 0, order.samples)


def test_epochs_seeds_and_digests_each_give_another_order():
    layout = make_layout([100] * 5, 4)
    orders = [
        tuple(listed(epoch_order([layout], [digest], [1.0], seed, epoch), 0, 500))
        for digest in (DIGEST, DIGEST[::-1])
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 8


def test_the_short_run_is_not_always_last():
    layout = make_layout([41], 4)
    last = {listed(epoch_order([layout], [DIGEST], [1.0], 1, epoch), 40, 41)[0] for epoch in range(20)}
    assert last != {(0, 0, 40)}


@given(counts=st.lists(st.integers(1, 300), min_size=1, max_size=5))
@settings(deadline=None)
def test_interleave_gives_every_source_its_samples_in_order_and_evenly(counts):
    total = sum(counts)
    source, within = interleave(counts, np.arange(total))
    for i, count in enumerate(counts):
        assert within[source == i].tolist() == list(range(count))
        so_far = np.cumsum(source == i)
        fair = np.arange(1, total + 1) * count / total
        assert np.abs(so_far - fair).max() <= len(counts)


@given(counts=st.lists(st.integers(1, 10**13), min_size=2, max_size=4), at=st.floats(0, 1))
@settings(deadline=None)
def test_interleave_is_exact_for_huge_counts(counts, at):
    start = int(at * (sum(counts) - 200))
    if start < 0:
        return
    source, within = interleave(counts, np.arange(start, start + 200))
    one_by_one = [interleave(counts, np.array([p])) for p in range(start, start + 200)]
    assert source.tolist() == [int(s[0]) for s, _ in one_by_one]
    assert within.tolist() == [int(w[0]) for _, w in one_by_one]


@given(
    main=SHARDS.filter(any),
    extra=SHARDS.filter(any),
    weight=st.sampled_from([0.1, 0.5, 1.0, 2.5]),
)
@settings(deadline=None)
def test_a_mixture_holds_the_main_source_once_per_epoch_and_extras_by_weight(main, extra, weight):
    layouts = [make_layout(main, 4), make_layout(extra, 4)]
    if not round(weight * sum(main)):
        with pytest.raises(ValueError, match="source 1 gives no sample"):
            epoch_order(layouts, [DIGEST, DIGEST], [1.0, weight], 5, 0)
        return
    drawn = Counter()
    for epoch in range(4):
        order = epoch_order(layouts, [DIGEST, DIGEST], [1.0, weight], 5, epoch)
        rows = listed(order, 0, order.samples)
        mine = [row[1:] for row in rows if row[0] == 0]
        assert sorted(mine) == [(s, i) for s, count in enumerate(main) for i in range(count)]
        assert len(rows) - len(mine) == round(weight * sum(main))
        drawn.update(row[1:] for row in rows if row[0] == 1)
    times = [drawn[s, i] for s, count in enumerate(extra) for i in range(count)]
    assert max(times) - min(times) <= 1, "over the epochs each extra sample is drawn equally often"


def test_a_billion_samples_cost_no_more_per_batch_than_a_few():
    order = epoch_order([make_layout(np.full(10**6, 1000), 4)], [DIGEST], [1.0], 1, 0)
    for start in (0, 10**9 // 3, 10**9 - 4096):
        rows = listed(order, start, start + 4096)
        assert len(set(rows)) == 4096
        assert all(0 <= shard < 10**6 and 0 <= sample < 1000 for _, shard, sample in rows)


@pytest.mark.parametrize("weights, shards", [([1.0], [[]]), ([1.0], [[0, 0]]), ([1.0, 1.0], [[5], [0]])])
def test_a_source_without_samples_is_refused_by_number(weights, shards):
    layouts = [make_layout(one, 4) for one in shards]
    with pytest.raises(ValueError, match=f"source {len(weights) - 1} gives no sample"):
        epoch_order(layouts, [DIGEST] * len(weights), weights, 1, 0)


def test_run_length_zero_is_refused():
    with pytest.raises(ValueError, match="run_length is 0"):
        make_layout([1], 0)


@given(count=st.integers(0, 12), limit=st.integers(1, 6), image=KEYS, epoch=st.integers(0, 5))
@settings(deadline=None)
def test_chosen_captions_are_distinct_ascending_and_at_most_k(count, limit, image, epoch):
    chosen = choose_captions(count, limit, image, 1, epoch)
    assert chosen == sorted(set(chosen)) and all(0 <= i < count for i in chosen)
    assert len(chosen) == min(count, limit)
    assert chosen == choose_captions(count, limit, image, 1, epoch)


def test_every_caption_of_an_image_is_shown_about_equally_often():
    seen = Counter(i for epoch in range(700) for i in choose_captions(7, 5, 42, 1, epoch))
    assert all(430 < seen[i] < 570 for i in range(7))  # 500 expected, sigma 12


@pytest.mark.faults
def test_the_order_does_not_depend_on_hash_seed_locale_folder_or_time_zone(tmp_path):
    code = (
        "import numpy as np; from sat.data.order import *;"
        f"o = epoch_order([make_layout([7, 9, 30], 4)], ['{DIGEST}'], [1.0], 5, 2);"
        "print([a.tolist() for a in o.locate(np.arange(46))], choose_captions(9, 5, 77, 1, 2))"
    )
    root = str(__import__("pathlib").Path(__file__).parents[1])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": root, **env}, capture_output=True, check=True
        ).stdout
        for folder, env in [
            (root, {"PYTHONHASHSEED": "0"}),
            (tmp_path, {"PYTHONHASHSEED": "4242", "LC_ALL": "de_DE.UTF-8", "TZ": "Asia/Kathmandu"}),
        ]
    }
    assert len(outputs) == 1
