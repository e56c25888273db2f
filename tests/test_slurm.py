"""The Slurm scripts on a real Slurm of two nodes: preprocessing loses tasks, training and scoring run on both."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from sat.data.loader import read_references
from sat.shards.manifest import load_manifest
from sat.text import build_tokenizer
from tests.helpers_shards import make_coco, make_feature_dataset, run_program, snapshot
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


@pytest.fixture
def experiment(tmp_path):
    """A configuration file for 20 tiny feature grids and a tiny model."""
    manifest = make_feature_dataset(tmp_path / "features", splits={"train": 20, "val": 5})
    captions = [caption for captions in read_references(manifest, "train").values() for caption in captions]
    build_tokenizer(captions, 1).save(tmp_path / "tokenizer.json")
    path = tmp_path / "config.yaml"
    path.write_text(
        f"data: {{features: {tmp_path}/features, tokenizer: {tmp_path}/tokenizer.json, num_workers: 0}}\n"
        "model: {embedding_dim: 12, lstm_dim: 10, attention_dim: 8, dropout: 0.0, weight_init: uniform}\n"
        f"train: {{run_dir: {tmp_path}/run, global_batch: 6, epochs: 2, warmup_steps: 2, precision: fp32, "
        "log_every: 1}\n"
        "eval: {metrics: [CIDEr, BLEU], beam_size: 2, max_length: 8}\n"
        "tracking: {mlflow_uri: none}\n"
    )
    return path


def test_two_nodes_train_and_evaluate_as_one_process_does(slurm, experiment, tmp_path):
    def submit(script: str, *arguments: str) -> None:
        command = ["sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/job.out", f"slurm/{script}", *arguments]
        job = slurm.run(*command, cwd=ROOT)
        slurm.wait_for(job, "COMPLETED", timeout=180)

    run = tmp_path / "run"
    submit("train.sh", str(experiment))
    submit("evaluate.sh", str(run), "--split", "val")
    alone = subprocess.run(
        [sys.executable, "-m", "sat.train", str(experiment), f"train.run_dir={tmp_path}/alone"],
        cwd=ROOT,
        env=slurm.env,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert alone.returncode == 0, alone.stderr
    ours, theirs = (journal(folder, "nll_per_token") for folder in (run, tmp_path / "alone"))
    assert len(ours) == 8
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert json.loads((run / "evaluation-val.json").read_text())["images"] == 5


def journal(run: Path, name: str) -> list[float]:
    """All values of one name in metrics.jsonl, in the order of the steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]
