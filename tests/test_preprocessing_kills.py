"""Preprocessing that is killed at random, races with itself or fills the disk ends with the bytes of a quiet run."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from preprocessing.sharding import jobs
from tests.helpers_shards import REPOSITORY, make_coco, run_program, snapshot
from tests.slurm_cluster import poll
from tests.test_extract_features import OPTIONS, make_images, random_weights

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    make_coco(root / "coco")
    make_images(root / "coco", root / "images", shard_size=2)
    random_weights(root / "weights.safetensors")
    return root


def test_killed_at_random_moments_in_every_part_of_it_preprocessing_ends_with_the_bytes_of_an_undisturbed_run(tmp_path):
    command = [sys.executable, "-m", "tests.preprocessing_chaos", "--kills", "8", "--folder", str(tmp_path)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # faster for pictures so small, and the same bytes everywhere
    done = subprocess.run(command, cwd=REPOSITORY, env=one_thread, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "every folder as the undisturbed one" in done.stdout


def never_ending(path: Path) -> None:
    """Put a pipe in the place of a file: who reads it waits until it is killed."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("kind", ["images", "features"])
def test_worker_processes_do_not_outlive_their_killed_parent(tmp_path, kind):
    coco = tmp_path / "coco"
    make_coco(coco, {"train": 4})
    options = [f"--annotations=train={coco}/annotations/captions_train.json", f"--images={coco}/images"]
    program, options = "shard_images", [*options, "--shard-size=2", "--num-workers=2"]
    files = (coco / "images").rglob("*.jpg")
    if kind == "features":
        make_images(coco, tmp_path / "images", shard_size=2)
        weights = random_weights(tmp_path / "weights.safetensors")
        program, options = "extract_features", [f"--images={tmp_path}/images", f"--weights={weights}", *OPTIONS]
        options, files = [*options, "--num-workers=2"], (tmp_path / "images").glob("*.tar")
    options.append(f"--out={tmp_path}/out")
    run_program(program, *options, "--step=plan")
    for path in list(files):
        never_ending(path)
    command = [sys.executable, "-m", f"preprocessing.{program}", *map(str, options), "--step=shards"]
    parent = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    children = []
    try:
        poll(lambda: len(list((tmp_path / "out" / "work").glob("*.claim"))) == 2, 60, "two shards under way")
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 2
    finally:
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        for child in alive:
            child.kill()
    assert not alive


def extraction(made: Path, out: Path) -> list[str]:
    options = [f"--images={made}/images", f"--weights={made}/weights.safetensors", *map(str, OPTIONS), f"--out={out}"]
    return [sys.executable, "-m", "preprocessing.extract_features", *options]


def test_extractions_at_once_and_on_a_full_disk_end_as_an_undisturbed_one(made, tmp_path):
    environment = {"cwd": REPOSITORY, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    assert subprocess.run(extraction(made, tmp_path / "once"), **environment, timeout=120).returncode == 0

    def limit():
        return resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    out = tmp_path / "out"
    done = subprocess.run(extraction(made, out), **environment, stderr=subprocess.PIPE, preexec_fn=limit, timeout=120)
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert not list(out.glob("*.tar")) and not [p for p in (out / "work").iterdir() if p.suffix in (".claim", ".tmp")]
    runs = [subprocess.Popen(extraction(made, out), **environment) for _ in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert snapshot(out) == snapshot(tmp_path / "once")


def test_a_dead_process_that_nobody_has_collected_holds_no_claim():
    child = subprocess.Popen([sys.executable, "-c", ""])
    poll(lambda: jobs._start(child.pid) is None, 20, "the end of a process")
    assert Path(f"/proc/{child.pid}").exists()
    child.wait()
