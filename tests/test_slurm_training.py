"""slurm/train.sh and slurm/evaluate.sh on a real Slurm of two nodes: preempted, cancelled, timed out, and what is left.

The surprise: all this costs three trainings, as every end that a life can have is one of a job's.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from sat.checkpoint import latest
from tests.helpers_commands import ROOT
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer
from tests.slurm_cluster import Cluster, poll

pytestmark = pytest.mark.slurm
ON_CPUS = ["--launch", "launch/cpu.yaml"]
STEPS = 480


@dataclass(frozen=True)
class Training:
    """A run folder, and the command that works on it."""

    slurm: Cluster
    run: Path
    settings: list[str]

    def submit(self, *options: str) -> str:
        """The job's id."""
        output = f"--output={self.run.parent}/{self.run.name}-%j.out"
        command = ["sbatch", "--parsable", "--nodes=2", output, *options, "slurm/train.sh", *ON_CPUS, *self.settings]
        return self.slurm.run(*command, cwd=ROOT)

    def has_stepped(self, least: int) -> None:
        poll(lambda: self.step() >= least, 120, f"step {least}", self.said)

    def step(self) -> int:
        journal = self.run / "metrics.jsonl"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def status(self) -> dict[str, object]:
        return dict(json.loads((self.run / "status.json").read_text()))

    def stopped_whole(self, least: int) -> int:
        """The step at which it was stopped, which is what its newest checkpoint holds."""
        status, newest = self.status(), latest(self.run / "checkpoints")
        step = int(str(status["step"]))
        assert status["state"] == "stopped" and step >= least, self.said()
        assert newest is not None and newest.name.endswith(f"{step:08d}")
        return step

    def is_queued_again(self, job: str, times: int) -> None:
        poll(lambda: self.slurm.job(job)["Restarts"] == str(times), 150, f"life {times + 1}", self.said)

    def lives(self) -> list[str]:
        """How each ended: `` for one that began."""
        path = self.run / "lives.jsonl"
        return [json.loads(line)["end"] for line in path.read_text().splitlines()] if path.exists() else []

    def said(self) -> str:
        logs = sorted(self.run.parent.glob(f"{self.run.name}-*.out"))
        return "\n".join(path.read_text() for path in logs) + self.slurm.logs()

    def tensors(self) -> dict[str, bytes]:
        """Of the newest checkpoint."""
        path = latest(self.run / "checkpoints")
        assert path is not None
        return {each.name: each.read_bytes() for each in sorted(path.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("slurm_training")
    make_feature_dataset(folder / "data", splits={"train": 40, "val": 3})
    with_tokenizer(folder)
    (folder / "config.yaml").write_text("{}\n")
    return folder


@pytest.fixture
def training(slurm, data, tmp_path) -> Training:
    return of(slurm, data, tmp_path / "run")


def of(slurm: Cluster, data: Path, run: Path, *settings: str) -> Training:
    long = ["train.epochs=48", "train.global_batch=4", "train.eval_every=1000", "train.save_every=50"]
    places = [f"data.features={data}/data", f"data.tokenizer={data}/tokenizer.json", f"train.run_dir={run}"]
    return Training(slurm, run, [f"{data}/config.yaml", *SMALL, *long, *places, *settings])


def test_a_preempted_job_is_queued_again_and_ends_as_an_undisturbed_one(slurm, training, data, tmp_path):
    job = training.submit()
    training.has_stepped(20)
    urgent = slurm.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true")
    slurm.wait_for(urgent, "COMPLETED", timeout=90)
    first = training.status()
    assert first["state"] == "stopped" and 20 <= first["step"] < STEPS
    assert slurm.wait_for(job, "COMPLETED", timeout=180)["Restarts"] == "1", training.said()
    assert training.status()["state"] == "finished" and training.step() == STEPS
    assert f"at step {first['step']} of {STEPS}" in training.said()
    assert (training.run / f"job-{job}.out").read_text() in training.said()
    assert training.lives() == ["", "stopped", "", "finished"]

    undisturbed = of(slurm, data, tmp_path / "undisturbed")
    slurm.wait_for(undisturbed.submit(), "COMPLETED", timeout=180)
    assert training.tensors() == undisturbed.tensors()

    command = ["sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/evaluate.out", "slurm/evaluate.sh", *ON_CPUS]
    slurm.wait_for(slurm.run(*command, str(training.run), "--split", "val", cwd=ROOT), "COMPLETED", timeout=120)
    assert json.loads((training.run / "evaluation-val.json").read_text())["images"] == 3


def test_a_job_that_is_cancelled_at_its_time_limit_or_told_by_scancel_leaves_a_whole_checkpoint(slurm, data, tmp_path):
    """Slurm tells the batch script alone of a time limit, five minutes before; a new limit of five brings it about."""
    training = of(slurm, data, tmp_path / "run", "train.epochs=5000")
    job = training.submit()
    training.has_stepped(10)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    training.is_queued_again(job, 1)
    step = training.stopped_whole(10)
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED", timeout=60)

    job, lives = training.submit(), len(training.lives())
    poll(lambda: len(training.lives()) > lives, 60, "the batch script to begin", training.said)
    slurm.run("scancel", "--signal=USR1", "--batch", job)  # while the ranks start up
    training.is_queued_again(job, 1)
    step = training.stopped_whole(step)
    training.has_stepped(step + 10)
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    training.is_queued_again(job, 2)
    step = training.stopped_whole(step + 10)
    training.has_stepped(step + 10)
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED", timeout=60)
    poll(lambda: not slurm.run("squeue", "-h"), 60, "the job to leave", training.said)
    training.stopped_whole(step + 10)
    assert slurm.job(job)["JobState"] == "CANCELLED"  # and not queued again


def test_a_job_that_dies_twice_without_a_newer_checkpoint_is_not_queued_again(slurm, training, tmp_path):
    """What stands for the container runs the programs beside the training, and kills that as a lack of memory does."""
    (tmp_path / "container").write_text('[[ "$*" == *sat.lives* ]] && exec "$@"\necho begins\nkill -9 $$\n')
    output, container = f"--output={tmp_path}/run-%j.out", f"--export=ALL,CONTAINER=bash {tmp_path}/container"
    command = ["sbatch", "--parsable", "--nodes=1", output, container, "slurm/train.sh", *ON_CPUS, *training.settings]
    job = slurm.run(*command, cwd=ROOT)
    fields = slurm.wait_for(job, "FAILED", timeout=150)
    assert (fields["Restarts"], fields["ExitCode"]) == ("1", "137:0"), training.said()
    assert training.said().count("begins\n") == 2
    assert training.said().count("goes on in its next life, from step 0") == 1
    assert f"job {job} has died 2 times in a row without a checkpoint newer than step 0: it is not" in training.said()
    assert not slurm.run("squeue", "-h")


def test_a_job_without_gpus_does_not_train_on_a_processor_in_silence(slurm, training):
    """Nor is an error a reason to try again."""
    output = f"--output={training.run.parent}/run-%j.out"
    command = ["sbatch", "--parsable", "--nodes=2", output, "slurm/train.sh", *training.settings]
    job = slurm.run(*command, cwd=ROOT)
    assert slurm.wait_for(job, "FAILED", timeout=60)["Restarts"] == "0"
    assert "launch/multi_node.yaml is for GPUs, and job" in training.said()


@pytest.mark.parametrize("script", ["train", "evaluate"])
@pytest.mark.parametrize("arguments", [[], ["--launch", "launch/cpu.yaml"], ["--help"]])
def test_without_arguments_the_scripts_say_how_they_are_called(script, arguments):
    command = ["bash", f"slurm/{script}.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and f"slurm/{script}.sh" in done.stderr and len(done.stderr.splitlines()) == 2
