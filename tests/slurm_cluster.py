"""A real Slurm of two nodes on this host: munged, slurmctld and two `slurmd -N`, started for tests and torn down fully.

The surprise: nothing of the system's own Slurm is touched. Configuration, munge key, sockets, spool and ports are
private, every daemon stays in the foreground as a child of the test process, and dies with it.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.helpers_launch import environment_of_programs

NODES = ("node1", "node2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "setpriv")
SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
"""A requeued job waits until the credentials of its first life have expired: 15 s here, two minutes by default.
A job in `urgent` preempts those in `main`, which are told by SIGTERM to their steps and have 30 seconds."""


def missing() -> str:
    """Why no Slurm can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH_PATH)]
    return f"not installed: {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)" if absent else ""


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Commands and their jobs see it, and the project, through the environment `env`."""

    folder: Path
    env: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 60) -> str:
        """The standard output of a Slurm command (stripped); AssertionError with all it said if it fails."""
        done = subprocess.run(command, env=self.env, cwd=cwd, timeout=timeout, capture_output=True, text=True)
        assert done.returncode == 0, (
            f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}{self.logs()}"
        )
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """The fields that `scontrol` shows of a job, such as JobState, Restarts, ExitCode."""
        text = self.run("scontrol", "--oneliner", "show", "job", job_id).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, job_id: str, *states: str, timeout: float) -> dict[str, str]:
        """Poll until the job is in one of `states`; AssertionError if it ends in another or time runs out."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

        def settled() -> dict[str, str] | None:
            fields = self.job(job_id)
            return fields if fields["JobState"] in final | set(states) else None

        fields = poll(settled, timeout, f"job {job_id} to be {' or '.join(states)}", self.logs)
        assert fields["JobState"] in states, f"job {job_id} is {fields['JobState']}, not {states}: {fields}"
        return fields

    def start_now(self, job_id: str) -> None:
        """Let a re-queued job start at once, when its first life is over; Slurm holds it back for two minutes."""
        number = self.job(job_id)["JobId"]
        poll(lambda: not stepd_of(number), 60, f"the first life of job {job_id} to end", self.logs)
        time.sleep(2)  # slurmd refuses a start in the very second in which it revoked the first life's credential
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def logs(self, lines: int = 15) -> str:
        """The last lines of every daemon's log."""
        tails = (
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for path in sorted(self.folder.glob("*.log"))
        )
        return "\n" + "\n".join(tails)


def stepd_of(number: str) -> list[psutil.Process]:
    """The daemons that watch over the steps of a job; they name themselves `slurmstepd: [NUMBER.STEP]`."""
    words = ((each, " ".join(each.info["cmdline"] or ())) for each in psutil.process_iter(["cmdline"]))
    return [each for each, line in words if line.startswith(f"slurmstepd: [{number}.")]


def poll(probe: Callable[[], Any], timeout: float, what: str, context: Callable[[], str] = str) -> Any:
    """The first true value of `probe`, asked five times a second; after `timeout` s AssertionError names `what`."""
    deadline = time.monotonic() + timeout
    while not (value := probe()):
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain for {what}{context()}"
        time.sleep(0.2)
    return value


@contextlib.contextmanager
def start_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons with everything they own in `folder`; yields when both nodes are idle."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    controller_port, *node_ports = free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000 State=UNKNOWN"
        for name, port in zip(NODES, node_ports, strict=True)
    )
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, controller_port=controller_port, nodes=nodes))
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={cgroup_plugin()}\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    env = environment_of_programs() | {"SAT_VENV": sys.prefix, "SLURM_CONF": str(config), "PATH": SEARCH_PATH}
    cluster = Cluster(folder, env)
    with contextlib.ExitStack() as daemons:
        munge_files = {
            "key-file": key,
            "socket": folder / "munge.socket",
            "pid-file": folder / "munged.pid",
            "seed-file": folder / "munge.seed",
            "log-file": folder / "munged-own.log",
        }
        daemons.enter_context(
            daemon(
                cluster, "munged", "munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in munge_files.items())
            )
        )
        poll((folder / "munge.socket").exists, 20, "munged's socket", cluster.logs)
        daemons.enter_context(daemon(cluster, "slurmctld", "slurmctld", "-D", "-f", str(config)))
        for name in NODES:
            daemons.enter_context(daemon(cluster, f"slurmd-{name}", "slurmd", "-D", "-N", name, "-f", str(config)))
        poll(lambda: idle_nodes(cluster) == set(NODES), 60, "both nodes to be idle", cluster.logs)
        try:
            yield cluster
        finally:
            end_all_jobs(cluster)


def cgroup_plugin() -> str:
    """No control groups are used here; before Slurm 23.02 the one that touches nothing until used stands for none."""
    version = subprocess.run(
        ["slurmd", "-V"], env=os.environ | {"PATH": SEARCH_PATH}, capture_output=True, text=True
    ).stdout
    major, minor = version.split()[1].split(".")[:2]
    return "disabled" if (int(major), int(minor)) >= (23, 2) else "cgroup/v1"


def idle_nodes(cluster: Cluster) -> set[str]:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], env=cluster.env, capture_output=True, text=True
    )
    return set(done.stdout.split())


def end_all_jobs(cluster: Cluster) -> None:
    """Cancel what still runs and wait for it, so that no process of a job outlives the daemons."""
    cluster.run("scancel", "--user=root")
    poll(lambda: not cluster.run("squeue", "-h"), 60, "cancelled jobs to end", cluster.logs)


@contextlib.contextmanager
def daemon(cluster: Cluster, name: str, *command: str) -> Iterator[None]:
    """A foreground daemon that logs to NAME.log and is ended at exit (and by the kernel if the tests are killed)."""
    with (cluster.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            env=cluster.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
