"""slurm/preprocess.sh on a real Slurm of two nodes: tasks are lost, the data set is the same."""

import os
import re
import subprocess
from functools import partial
from pathlib import Path

import psutil
import pytest

from sat.shards.manifest import load_manifest
from tests.helpers_shards import make_coco, run_program, snapshot
from tests.slurm_cluster import poll

ROOT = Path(__file__).parents[1]
STRIPES = 4

pytestmark = pytest.mark.slurm


def test_two_nodes_answer(slurm):
    answers = slurm.run(
        "srun", "--nodes=2", "bash", "-c", "echo $SLURM_NODEID of $SLURM_JOB_NUM_NODES on $SLURMD_NODENAME"
    )
    assert sorted(answers.splitlines()) == ["0 of 2 on node1", "1 of 2 on node2"]


@pytest.fixture
def coco(tmp_path):
    """Arguments of shard_images for 16 pictures in 8 shards, less --out."""
    files = make_coco(tmp_path, {"train": 12, "val": 4})
    annotations = [f"--annotations={split}={file}" for split, file in files.items()]
    return [*annotations, f"--images={tmp_path}/images", "--shard-size=2", "--num-workers=1"]


def never_ending(path: Path) -> None:
    """Put a pipe in the place of a picture: the task that reads it waits until it is killed."""
    path.rename(path.with_suffix(".real"))
    os.mkfifo(path)


def mend(path: Path) -> None:
    path.with_suffix(".real").replace(path)


def process_of(out: Path, stripe: int) -> psutil.Process | None:
    """The process that works on a stripe, once it has claimed the stripe's first shard."""
    words = {f"--out={out}", f"{stripe}/{STRIPES}"}
    found = [each for each in psutil.process_iter(["cmdline"]) if words <= set(each.info["cmdline"] or [])]
    return found[0] if found and (out / "work" / f"train-{stripe:06d}.claim").exists() else None


def test_killed_and_requeued_tasks_end_in_the_same_data_set(slurm, coco, tmp_path):
    """A task whose process is killed queues itself again; so does, by Slurm's doing, one whose node is lost. finalize
    waits for both, and the bytes are those of one undisturbed process."""
    run_program("shard_images", *coco, "--out", tmp_path / "undisturbed")
    undisturbed = load_manifest(str(tmp_path / "undisturbed"))
    first_pictures = [tmp_path / "images" / undisturbed.rows(shard)["file_name"][0].as_py() for shard in (0, 1)]
    out = tmp_path / "shards"

    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # nothing starts before the pipes are in place
    command = ["bash", str(ROOT / "slurm/preprocess.sh"), str(STRIPES), "shard_images", *coco, f"--out={out}"]
    said = slurm.run(*command, cwd=tmp_path)
    array, finalize = re.search(r"array job (\d+) of 4 tasks, finalize job (\d+)", said).groups()
    for path in first_pictures:
        never_ending(path)
    slurm.run("scontrol", "update", "PartitionName=main", "State=UP")

    processes = [poll(partial(process_of, out, stripe), 60, f"task {stripe} to read", slurm.logs) for stripe in (0, 1)]
    processes[0].kill()
    slurm.run("scontrol", "requeue", f"{array}_1")
    tasks = [f"{array}_0", f"{array}_1"]
    for task in tasks:
        slurm.wait_for(task, "PENDING", timeout=60)
    for task, path in zip(tasks, first_pictures, strict=True):
        mend(path)
        slurm.start_now(task)
    for task in tasks:
        assert slurm.wait_for(task, "COMPLETED", timeout=60)["Restarts"] == "1"
    slurm.wait_for(finalize, "COMPLETED", timeout=60)
    assert snapshot(out) == snapshot(tmp_path / "undisturbed")


def test_a_task_that_names_an_error_is_not_queued_again(slurm, coco, tmp_path):
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    command = ["bash", str(ROOT / "slurm/preprocess.sh"), "1", "shard_images", *coco, f"--out={tmp_path}/shards"]
    said = slurm.run(*command, cwd=tmp_path)
    (array,) = re.search(r"array job (\d+) of 1 tasks", said).groups()
    (tmp_path / "images").rename(tmp_path / "moved")
    slurm.run("scontrol", "update", "PartitionName=main", "State=UP")
    assert slurm.wait_for(f"{array}_0", "FAILED", timeout=60)["Restarts"] == "0"
    (log,) = tmp_path.glob(f"shard_images-{array}-0.out")
    assert log.read_text().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("stripes", ["0", "100000", "many"])
def test_impossible_numbers_of_stripes_are_refused_before_planning(slurm, tmp_path, stripes):
    command = ["bash", str(ROOT / "slurm/preprocess.sh"), stripes, "shard_images", f"--out={tmp_path}/shards"]
    result = subprocess.run(command, env=slurm.env, capture_output=True, text=True)
    assert result.returncode == 2 and "expected a number from 1 to 1001" in result.stderr
    assert not (tmp_path / "shards").exists()
