"""A shard costs the same in a set of a few as in one of a hundred thousand; `sat bench plan --records` measures it."""

import pickle
from concurrent.futures import Future

from preprocessing import bench_scale
from preprocessing.shard_images import plan_images
from preprocessing.sharding import jobs
from preprocessing.sharding import plan as planning
from preprocessing.sharding.jobs import run_shards
from sat.shards.manifest import load_manifest
from sat.shards.schema import Sidecar


class Looked:
    """An executor that works at once, and remembers how many bytes a process would be sent for each task."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def submit(self, function, *arguments):
        self.sizes.append(len(pickle.dumps((function, arguments))))
        future = Future()
        future.set_result(function(*arguments))
        return future


def test_what_a_shard_costs_does_not_grow_with_the_number_of_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SHARDS_PER_TABLE", 3)
    monkeypatch.setattr(
        jobs, "_work", lambda shard, steal: jobs.Result(Sidecar(shard.name, "", "", 1, 1, "", (), ()), True)
    )
    sizes, read = [], []
    footer = planning.pq.read_metadata
    monkeypatch.setattr(planning.pq, "read_metadata", lambda path: read.append(footer(path)) or read[-1])
    for count in (4, 40):
        records = bench_scale.records_of(count)
        plan = plan_images(records, tmp_path, tmp_path / str(count), shard_size=1, seed=1, max_bad_fraction=0)
        looked = Looked()
        run_shards(plan, jobs.in_process, looked, slots=2)
        sizes.append(max(looked.sizes))
        planned = [record for shard in plan.shards for record in plan.records(shard)]
        assert sorted(planned, key=lambda record: record.key) == list(records.images)
        assert [plan.index(shard) for shard in plan.shards] == list(range(count))
        assert planning.table_fault(plan) is None
    assert sizes[0] == sizes[1] < 1000
    assert max(footer.num_row_groups for footer in read) == 3
    damaged = planning.table_paths(plan)[2]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert planning.table_fault(plan)[0] == damaged.name
    again = plan_images(records, tmp_path, tmp_path / "40", shard_size=1, seed=1, max_bad_fraction=0)
    assert planning.table_fault(again) is None


def test_the_benchmark_of_preprocessing_takes_the_steps_of_a_real_data_set(tmp_path):
    rows = [bench_scale.measure(step, tmp_path, records=40, shards=8) for step in bench_scale.STEPS]
    assert [row["step"] for row in rows] == ["plan", "shards", "finalize", "verify"]
    assert all(row["peak_mb"] > 0 and row["cpu_seconds"] > 0 for row in rows)
    assert [shard.samples for shard in load_manifest(tmp_path / "set").shards] == [5] * 8
