"""Kills, races and full disks while shards are written: the data set at the end is that of an undisturbed run."""

import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from preprocessing.shard_images import build_image_shard, main
from preprocessing.sharding import finalize as finalizing
from preprocessing.sharding import jobs
from preprocessing.sharding import plan as planning
from preprocessing.sharding import write as writing
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.jobs import run_shards
from preprocessing.sharding.ownership import publish_plan
from preprocessing.sharding.plan import FeatureSettings, ImageRecord, Plan, PlannedShard, load_plan
from preprocessing.sharding.verify import verify
from preprocessing.sharding.write import Sample, read_sidecar, write_shard
from sat import files
from sat.shards.manifest import load_manifest
from sat.shards.tar import read_members
from tests.helpers_shards import REPOSITORY, make_coco, run_program, snapshot

pytestmark = pytest.mark.faults

CRASH_POINTS = sorted(
    name
    for path in (REPOSITORY / "preprocessing").rglob("*.py")
    for name in re.findall(r'crash_point\("([a-z-]+)"\)', path.read_text())
)


NOT_ON_THE_WAY = {"set-deleted", "sidecars-taken", "manifest-withdrawn"}
"""Places of an overwrite and of a repair: see test_kill_places.py."""


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    make_coco(root)
    return root


def arguments(coco, out):
    annotations = [
        x for split in ("train", "val") for x in ("--annotations", f"{split}={coco}/annotations/captions_{split}.json")
    ]
    return [*annotations, "--images", coco / "images", "--out", out, "--shard-size", 4, "--num-workers", 1]


def finish(coco, out, **options) -> None:
    """Run the whole program in this process."""
    files = [f"{split}={coco}/annotations/captions_{split}.json" for split in ("train", "val")]
    main(out, files, coco / "images", **{"shard_size": 4, "num_workers": 1} | options)


@pytest.fixture(scope="module")
def undisturbed(coco, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "images"
    finish(coco, out)
    return out


@pytest.fixture
def planned(coco, tmp_path) -> Plan:
    """A plan of five image shards, none of them written."""
    finish(coco, tmp_path / "images", step="plan")
    return load_plan(tmp_path / "images")


def test_there_are_kill_places_in_every_step():
    written = ["plan-table-written", "sample-written", "sidecar-linked", "tar-created", "tar-linked", "tar-written"]
    assert sorted([*written, "manifest-written", "tables-written", *NOT_ON_THE_WAY]) == CRASH_POINTS


@pytest.mark.parametrize("place", sorted(set(CRASH_POINTS) - NOT_ON_THE_WAY))
def test_killed_at_any_named_place_and_run_again_the_bytes_are_those_of_an_undisturbed_run(
    coco, undisturbed, tmp_path, place
):
    out = tmp_path / "images"
    run_program("shard_images", *arguments(coco, out), code=-signal.SIGKILL, SAT_CRASH_POINT=place)
    if place != "manifest-written":
        with pytest.raises(ValueError, match="not a finished data set"):
            load_manifest(out)
    finish(coco, out)
    assert snapshot(out) == snapshot(undisturbed)


def test_an_orphan_tar_is_reported_and_never_part_of_a_data_set(coco, tmp_path):
    out = tmp_path / "images"
    run_program("shard_images", *arguments(coco, out), code=-signal.SIGKILL, SAT_CRASH_POINT="tar-linked")
    assert [path.name for path in out.glob("*.tar")] == ["train-000000.tar"]
    report = verify(out)
    assert "train-000000.tar" in report.foreign
    assert "work/train-000000.json: missing: this shard was not finished" in map(str, report.faults)


def test_two_runs_at_once_share_the_work_and_both_end_well(coco, undisturbed, tmp_path):
    out = tmp_path / "images"
    command = [sys.executable, "-m", "preprocessing.shard_images", *map(str, arguments(coco, out))]
    runs = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert snapshot(out) == snapshot(undisturbed)


def sample(key: str, data: bytes) -> Sample:
    return Sample(ImageRecord(key, f"{key}.jpg", "train", ("a dog",), key), data, "jpg", 1, 1)


@pytest.fixture
def digest(tmp_path) -> str:
    """Of the plan of a folder in which any shard may be written."""
    return publish_plan(features_plan(tmp_path)).digest


@contextmanager
def no_locks(path: Path, wait: bool = True):
    """For `files.locked`: everybody gets every lock."""
    yield True


@pytest.mark.parametrize("place", ["tar-created", "tar-written", "tar-linked", "sidecar-linked"])
def test_of_two_workers_with_different_bytes_one_wins_and_no_pair_is_mixed(tmp_path, digest, monkeypatch, place):
    shard = PlannedShard("train-000000.tar", "train", 1, "")
    if place.endswith("-linked"):  # with locks they cannot meet there
        monkeypatch.setattr(files, "locked", no_locks)
    overtaken, standing = [], []

    def overtake(name: str) -> None:
        if name == place and not overtaken:
            overtaken.append(name)
            standing.append(write_shard(tmp_path, shard, digest, [sample("k", b"the other machine's bytes")]))

    monkeypatch.setattr(files, "crash_point", overtake)
    standing.append(write_shard(tmp_path, shard, digest, [sample("k", b"our bytes")]))
    sidecar = read_sidecar(tmp_path, shard)
    assert overtaken and sidecar.sha256 == files.sha256(tmp_path / shard.name)
    assert standing[-1] == sidecar, "the late worker was told of a shard that does not stand"
    assert left_in(tmp_path) == ["train-000000.json"]


@pytest.mark.parametrize("place", ["tar-created", "sample-written", "tar-written", "tar-linked"])
def test_a_worker_that_is_overtaken_by_the_published_data_set_takes_what_stands(tmp_path, digest, monkeypatch, place):
    """Finalizing sweeps temporary files away, also those of a worker that is still at it."""
    if place == "tar-linked":
        monkeypatch.setattr(files, "locked", no_locks)
    shard = PlannedShard("train-000000.tar", "train", 1, "")
    standing = []

    def overtake(name: str) -> None:
        if name == place and not standing:
            standing.append({})  # the other worker passes here as well
            standing[0] = write_shard(tmp_path, shard, digest, [sample("k", b"the other machine's bytes")])
            finalizing._sweep(tmp_path)

    monkeypatch.setattr(files, "crash_point", overtake)
    ours = write_shard(tmp_path, shard, digest, [sample("k", b"our bytes")])
    assert ours == read_sidecar(tmp_path, shard) and ours.sha256 == files.sha256(tmp_path / shard.name)
    assert left_in(tmp_path) == ["train-000000.json"]


def left_in(root: Path) -> list[str]:
    """What lies in `work/` beside the plan."""
    names = {path.name for path in (root / "work").iterdir()} - {"plan.json", "lock"}
    return sorted(name for name in names if not name.startswith("plan-"))


def test_a_late_result_is_thrown_away(tmp_path, digest):
    shard = PlannedShard("train-000000.tar", "train", 1, "")
    first = write_shard(tmp_path, shard, digest, [sample("k", b"first")])
    before = snapshot(tmp_path)
    assert write_shard(tmp_path, shard, digest, [sample("k", b"late")]) == first
    assert snapshot(tmp_path) == before


def claim(plan: Plan, number: int, **holder: object) -> Path:
    path = plan.root / "work" / f"{plan.shards[number].stem}.claim"
    path.write_text(
        json.dumps({"machine": jobs._machine(), "pid": os.getpid(), "start": jobs._start(os.getpid())} | holder)
    )
    return path


def build_all(plan: Plan, **options) -> jobs.Summary:
    with ThreadPoolExecutor(1) as pool:
        return run_shards(plan, partial(jobs.work_on, plan, build_image_shard), pool, **options)


@pytest.mark.parametrize("skew", [-(10**8), 10**8])
def test_a_dead_workers_claim_is_taken_over_at_once_whatever_the_file_times_say(planned, undisturbed, skew):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    path = claim(planned, 0, pid=child.pid, start="1")
    os.utime(path, (time.time() + skew,) * 2)
    begin = time.monotonic()
    assert build_all(planned).built == len(planned.shards)
    assert time.monotonic() - begin < 30 and not path.exists()
    finalize(planned)
    assert snapshot(planned.root) == snapshot(undisturbed)


def test_another_machines_claim_is_taken_over_only_after_we_have_watched_it(planned):
    path = claim(planned, 0, machine="elsewhere")
    os.utime(path, (0, 0))
    begin = time.monotonic()
    assert build_all(planned, claim_timeout=1.5).built == len(planned.shards)
    assert time.monotonic() - begin > 1.5


def test_a_live_workers_shard_is_left_to_it(planned):
    path = claim(planned, 0)
    reference = planned.shards[0]

    def finish() -> None:
        time.sleep(1)
        build_image_shard(planned, reference)
        path.unlink()

    owner = threading.Thread(target=finish)
    owner.start()
    summary = build_all(planned)
    owner.join()
    assert (summary.built, summary.reused) == (len(planned.shards) - 1, 1)


def test_finalize_names_missing_shards_and_mixed_fingerprints_and_publishes_nothing(planned, monkeypatch):
    for shard in planned.shards[1:]:
        build_image_shard(planned, shard)
    last_step = ("shard_images", "--out", planned.root, "--step", "finalize")
    assert f"{planned.shards[0].name} is missing" in run_program(*last_step, code=1).stderr
    with monkeypatch.context() as patched:  # as a worker of another plan on a file system without locks might
        patched.setattr(writing, "check_stands", lambda root, digest: None)
        write_shard(planned.root, planned.shards[0], "0" * 64, [sample("k", b"x")])
    mixed = f"{planned.shards[0].name} has fingerprint 000000000000, the plan has"
    assert mixed in run_program(*last_step, code=1).stderr
    assert not (planned.root / "manifest.json").exists()
    build_all(planned)
    assert finalize(planned).splits == {"train": 12, "val": 5}


def test_of_several_finalizing_at_once_one_publishes_and_the_data_set_is_never_taken_away(planned, monkeypatch):
    build_all(planned)
    pool, others, passed = ThreadPoolExecutor(3), [], []

    def overtake(name: str) -> None:
        passed.append(name)
        if name == "tables-written" and not others:
            others.extend(pool.submit(finalize, planned) for _ in range(3))
            time.sleep(0.3)  # each would find no manifest now, and write everything anew after we have published

    monkeypatch.setattr(files, "crash_point", overtake)
    manifest = finalize(planned)
    published = (planned.root / "manifest.json").stat()
    assert [other.result().digest for other in others] == [manifest.digest] * 3
    assert passed == ["tables-written", "manifest-written"]
    assert (planned.root / "manifest.json").stat().st_ino == published.st_ino


def test_planning_again_writes_nothing_while_workers_and_finalize_are_busy(coco, undisturbed, tmp_path):
    work = shutil.copytree(undisturbed, tmp_path / "images") / "work"
    before = {path.name: path.stat().st_ino for path in work.iterdir()}
    finish(coco, tmp_path / "images", step="plan")
    assert {path.name: path.stat().st_ino for path in work.iterdir()} == before
    (table,) = work.glob("plan-*.parquet")
    table.write_bytes(table.read_bytes()[:-9])
    finish(coco, tmp_path / "images", step="plan")
    assert snapshot(tmp_path / "images") == snapshot(undisturbed)


def features_plan(root: Path, value: int = 1, weights: str = "1") -> Plan:
    return Plan(root, {"a": value}, FeatureSettings("", weights), ())


def test_a_plan_published_by_another_run_meanwhile_is_kept(tmp_path, monkeypatch):
    ours, theirs = (features_plan(tmp_path, weights=file) for file in "12")
    path, published = tmp_path / "work" / "plan.json", []

    def publish_theirs(*_: object) -> None:
        if not published:
            files.create(path, planning.plan_bytes(theirs))
            published.append(files.sha256(path))

    monkeypatch.setattr(files, "crash_point", publish_theirs)
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **options: assert_not(self == path) or unlink(self, **options))
    publish_plan(ours)
    assert published and load_plan(tmp_path) == ours, "the same data set, with the later settings"


def assert_not(wrong: bool) -> None:
    assert not wrong


def test_a_plan_that_is_replaced_is_synced_first(tmp_path, monkeypatch):
    publish_plan(features_plan(tmp_path, weights="1"))
    synced, replaced, replace = [], [], os.replace
    monkeypatch.setattr(files, "sync", synced.append)
    monkeypatch.setattr(os, "replace", lambda old, new: (replaced.append(old), replace(old, new)))
    publish_plan(features_plan(tmp_path, weights="2"))
    assert load_plan(tmp_path).settings.weights == "2" and len(replaced) == 1 and replaced[0] in synced


def test_a_full_disk_ends_the_job_cleanly_and_a_later_run_goes_on(coco, undisturbed, tmp_path):
    out = tmp_path / "images"
    command = [sys.executable, "-m", "preprocessing.shard_images", *map(str, arguments(coco, out))]

    def limit():
        return resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))

    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert done.returncode == 1 and f"File too large: '{out}/" in done.stderr and "Traceback" not in done.stderr
    assert not list(out.glob("*.tar")) and not left_in(out)
    finish(coco, out)
    assert snapshot(out) == snapshot(undisturbed)


def test_a_disk_that_returns_other_bytes_is_an_error(tmp_path, digest, monkeypatch):
    shard = PlannedShard("train-000000.tar", "train", 1, "")
    monkeypatch.setattr(files, "sync_open", lambda file: (file.seek(700), file.write(b"!"), file.flush()))
    with pytest.raises(OSError, match="train-000000.tar: reading it back gives other bytes"):
        write_shard(tmp_path, shard, digest, [sample("k", b"data")])
    assert not list(tmp_path.glob("*.tar")) and not left_in(tmp_path)


def test_a_killed_worker_process_is_told_with_the_way_on(coco, tmp_path):
    options = [*arguments(coco, tmp_path / "images")[:-1], 2]
    failed = run_program("shard_images", *options, code=1, SAT_CRASH_POINT="sample-written")
    assert "a worker process died" in failed.stderr and "run the same command again" in failed.stderr


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def member(
    name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, size: int | None = None, link: str = ""
) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data) if size is None else size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    "blob",
    [
        member("k.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd", data=b""),
        member("k.jpg", kind=tarfile.LNKTYPE, link="../other", data=b""),
        member("k.jpg", size=10 << 30),
        member("k.jpg", kind=tarfile.CHRTYPE, data=b""),
        b"\xff" * 512,
        member("k.jpg")[:600],
    ],
    ids=["symlink", "hardlink", "10 GB", "device", "noise", "cut"],
)
def test_hostile_members_are_refused_by_name(blob):
    with pytest.raises(ValueError, match="shard.tar: key k"):
        read_members(blob, "shard.tar: key k")


def test_nothing_in_a_sample_is_executed_or_written(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    blob = member("../../escape.pickle", pickle.dumps(Malicious(tmp_path / "executed")))
    assert list(read_members(blob, "shard.tar")) == ["./../escape.pickle"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b"]


def test_plans_published_at_once_agree(tmp_path):
    plans = [features_plan(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert {plan.digest for plan in pool.map(publish_plan, plans)} == {plans[0].digest}
    with pytest.raises(ValueError, match=r"other inputs or settings \(a\)"):
        publish_plan(features_plan(tmp_path, value=2))
    assert hashlib.sha256((tmp_path / "work" / "plan.json").read_bytes()).digest()
