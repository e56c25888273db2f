"""The benchmarks of plan, loader, training and features give the rows they promise, here on data that takes seconds."""

import json
import math

import pytest

from preprocessing import bench_features
from sat.bench import loader, plan, reads, train
from sat.shards.manifest import load_manifest


def test_the_plan_of_a_billion_samples_is_quick_small_and_balanced(tmp_path):
    (row,) = plan.run(json_file=tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == [row]
    assert (row["samples"], row["shards"], row["ranks"], row["workers"]) == (10**9, 10**6, 1024, 8)
    assert row["peak_mb"] < 200
    assert row["rows_apart"] <= 1
    # Of the process itself, imports included: the machine may be busy with other tests.
    assert row["cpu_seconds"] < 2


def test_the_plan_does_not_cost_more_memory_than_a_few_numbers_per_shard(tmp_path):
    peaks = []
    for shards in (100, 10**6):
        plan.write_manifest(tmp_path, 1000 * shards, shards)
        peaks.append(plan.plan_in_new_process(tmp_path, 1024, 0, 0, 0, 65535)["peak_mb"])
    assert peaks[1] - peaks[0] < 100


def test_the_data_set_of_the_plans_benchmark_opens_as_any_does(tmp_path):
    plan.write_manifest(tmp_path, 10_000, 7)
    manifest = load_manifest(tmp_path)
    assert manifest.splits == {"train": sum(shard.samples for shard in manifest.shards)}
    assert [shard.name for shard in manifest.shards] == [f"train-{number:06d}.tar" for number in range(7)]
    assert set(manifest.files) == {"samples.parquet", "shards.parquet"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loader_benchmark_compares_three_readers_of_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "GRIDS", {"1x1": (1, 512)})
    rows = loader.run(folder=tmp_path, rounds=1, json_file=tmp_path / "loader.json")
    assert json.loads((tmp_path / "loader.json").read_text()) == rows
    assert [(row["grid"], row["workers"], row["cache"]) for row in rows] == [
        ("1x1", workers, cache) for workers in (0, 2) for cache in ("warm", "dropped")
    ]
    for row in rows:
        assert min(row[f"{name}samples_per_s"] for name in ("", "raw_", "webdataset_")) > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "loader.json"], "the shards are removed"


def test_the_benchmark_of_reads_counts_what_each_rank_and_the_server_saw(tmp_path):
    rows = reads.run(samples=512, ranks="2", folder=tmp_path, json_file=tmp_path / "reads.json")
    assert json.loads((tmp_path / "reads.json").read_text()) == rows
    assert [(row["case"], row["ranks"]) for row in rows] == [(case.name, 2) for case in reads.CASES]
    for row in rows:
        assert 4 <= row["samples_per_run"] < 6 and abs(row["storage_correlation"]) < 0.8
        assert min(row["cpu_us_per_sample"], row["samples_per_s"]) > 0
    disk, few_rows, whole, half, windows = rows
    assert 0.99 < disk["last_epoch_of_set"] < 1 < disk["first_epoch_of_set"] < 1.3, "tables once, tars but their ends"
    assert disk["shards_per_batch"] == few_rows["shards_per_batch"] == 2 and windows["shards_per_batch"] == 1
    assert whole["last_epoch_of_set"] == 0, "the cache holds the set"
    assert 0.2 < half["last_epoch_of_set"] < half["first_epoch_of_set"] < 2, "and here half of it"
    assert list(tmp_path.iterdir()) == [tmp_path / "reads.json"], "the set is removed"


@pytest.mark.parametrize("ranks", ["", "1,two", "0", "1,,2"])
def test_the_benchmark_of_reads_refuses_ranks_that_are_none(ranks):
    with pytest.raises(ValueError, match="must be whole numbers from 1 on, separated by commas"):
        reads.run(samples=512, ranks=ranks)


def test_the_training_benchmark_splits_the_time_of_the_real_loop_on_one_process_and_on_two(tmp_path, monkeypatch):
    sizes = ("model.embedding_dim=6", "model.lstm_dim=8", "model.attention_dim=5", "model.attention=soft")
    tiny = train.Shape(2, 8, 30, 64, (*sizes, "train.global_batch=9", "data.num_workers=1"))
    monkeypatch.setattr(train, "SHAPES", {"tiny": tiny})
    out = tmp_path / "rows.json"
    hard = "model.attention=hard,model.hard_exact=0.4"
    rows = train.run(out, "tiny", processes="1,2", precision="fp32", steps=2, rounds=1, folder=tmp_path, settings=hard)
    assert json.loads(out.read_text()) == rows
    assert [(row["shape"], row["processes"]) for row in rows] == [("tiny", 1), ("tiny", 2)]
    for row in rows:
        shares = [row[f"{name}_share"] for name in ("wait", "compute", "exchange", "rest")]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0 and row["compute_share"] > 0.2
        assert row["of_bare"] == pytest.approx(row["captions_per_s"] / row["bare_captions_per_s"])
        assert row["captions_per_s"] * row["processes"] * row["seconds_per_step"] == pytest.approx(9 * 5, rel=0.01)
        assert row["captions_per_cpu_s"] > 0 and row["of_bare_cpu"] > 0
        assert row["save_takes_s"] > row["save_stops_s"] > 0 and math.isfinite(row["save_costs_steps"])
    assert rows[1]["exchange_share"] > rows[0]["exchange_share"]
    assert list(tmp_path.iterdir()) == [out], "the shards are removed"


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"shapes": "coco,9x9"}, "9x9, coco is unknown; choose from demonstration, coco-7x7, coco-14x14"),
        ({"processes": "1,two"}, "processes '1,two', steps 8 and rounds 3 must be whole numbers from 1 on"),
        ({"steps": 0}, "steps 0 and rounds 3 must be"),
        ({"shapes": "demonstration", "settings": "model.atention=hard"}, "atention"),
    ],
)
def test_the_training_benchmark_refuses_what_it_cannot_measure(wrong, said):
    with pytest.raises(ValueError, match=said):
        train.run(**{"shapes": "demonstration", "processes": "1", "precision": "fp32", "steps": 8, "rounds": 3} | wrong)


def test_the_features_benchmark_compares_the_job_with_network_and_naive_loop(tmp_path):
    (row,) = bench_features.main(images=8, size=64, batch_size=4, rounds=1, json_file=tmp_path / "features.json")
    assert json.loads((tmp_path / "features.json").read_text()) == [row]
    rates = [row[f"{name}_images_per_s"] for name in ("job", "bare", "naive")]
    assert min(rates) > 0
    assert [row["job_of_bare"], row["job_of_naive"]] == pytest.approx([rates[0] / rates[1], rates[0] / rates[2]])
