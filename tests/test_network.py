"""Two hosts of our own, network namespaces with a cable between them: ranks find each other, and end when it is cut."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from sat.engine import network, start
from sat.engine.network import GLOO, NCCL, choose_interface
from tests.helpers_commands import ROOT
from tests.helpers_engines import launch, small_config
from tests.helpers_shards import make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer
from tests.slurm_cluster import poll

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29400
SEVERAL = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def can_make_namespaces() -> bool:
    try:
        return subprocess.run(["unshare", "--net", "--mount", "ip", "link"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------ the choice


def test_nothing_is_chosen_on_one_machine():
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    before = dict(variables)
    assert choose_interface(variables) == "" and variables == before
    assert choose_interface({}) == ""


def test_what_the_user_names_wins_and_holds_for_both():
    variables = SEVERAL | {"MASTER_ADDR": "nowhere.invalid", GLOO: "ib0"}
    assert choose_interface(variables) == "ib0" and variables[NCCL] == "=ib0"
    variables = SEVERAL | {"MASTER_ADDR": "nowhere.invalid", GLOO: "eth1", NCCL: "ib"}
    assert choose_interface(variables) == "eth1" and variables[NCCL] == "ib"


def test_a_first_machine_that_cannot_be_found_is_one_sentence():
    with pytest.raises(ValueError, match=r"does not reach the first machine, nowhere\.invalid: .*GLOO_SOCKET_IFNAME"):
        choose_interface(SEVERAL | {"MASTER_ADDR": "nowhere.invalid"})


@pytest.mark.parametrize(
    ("interfaces", "default", "chosen"),
    [
        ({"lo": "127.0.0.1", "eth0": "10.0.0.5"}, "", "eth0"),
        ({"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": "10.1.0.5"}, "ib0", "ib0"),
        ({"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": "10.1.0.5"}, "", None),
        ({"lo": "127.0.0.1"}, "", None),
    ],
)
def test_a_first_machine_whose_own_name_is_loopback_takes_the_only_way_out(monkeypatch, interfaces, default, chosen):
    monkeypatch.setattr(network, "addresses", lambda: iter(interfaces.items()))
    monkeypatch.setattr(network, "default_route", lambda: default)
    variables = SEVERAL | {"MASTER_ADDR": "127.0.0.1"}
    if chosen:
        assert choose_interface(variables) == chosen == variables[GLOO]
    else:
        with pytest.raises(ValueError, match="means loopback on"):
            choose_interface(variables)


def test_gpus_that_do_not_work_are_not_replaced_by_the_processor_in_silence(monkeypatch, tmp_path):
    (tmp_path / "0000:17:00.0").mkdir()
    monkeypatch.setattr(start, "_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="has GPUs .* but PyTorch cannot use them"):
        start.start("fp32", 60)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert start.start("fp32", 60).processes.device.type == "cpu"


# ------------------------------------------------------------------ two hosts and a cable


@dataclass(frozen=True)
class Host:
    """A network namespace whose host name resolves to loopback there, as Debian sets a machine up."""

    holder: subprocess.Popen[bytes]
    """Keeps the namespaces; it is the process that ends last."""

    def command(self, *words: str) -> list[str]:
        return ["nsenter", f"--target={self.holder.pid}", "--net", "--mount", "--uts", f"--wd={ROOT}", *words]

    def run(self, *words: str) -> None:
        subprocess.run(self.command(*words), check=True)


@pytest.fixture
def hosts(tmp_path) -> Iterator[list[Host]]:
    """Two hosts, `eth0` of each at an end of one cable."""
    with ExitStack() as stack:
        found = []
        for index in range(2):
            holder = subprocess.Popen(["unshare", "--net", "--mount", "--uts", "sleep", "600"])
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            host = Host(holder)
            poll(lambda pid=holder.pid: os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net"), 20, "")
            poll(lambda pid=holder.pid: os.readlink(f"/proc/{pid}/ns/uts") != os.readlink("/proc/self/ns/uts"), 20, "")
            poll(lambda pid=holder.pid: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", 20, "the namespaces")
            names = tmp_path / f"hosts{index}"
            names.write_text(f"127.0.0.1 localhost\n127.0.1.1 host{index}\n")
            host.run("hostname", f"host{index}")
            host.run("mount", "--bind", str(names), "/etc/hosts")
            host.run("ip", "link", "set", "lo", "up")
            found.append(host)
        ends = [f"cut{os.getpid() % 100000}{index}" for index in range(2)]
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for host, end, address in zip(found, ends, ADDRESSES, strict=True):
            subprocess.run(["ip", "link", "set", end, "netns", str(host.holder.pid)], check=True)
            host.run("ip", "link", "set", end, "name", "eth0")
            host.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        yield found


@pytest.mark.skipif(not can_make_namespaces(), reason="making network namespaces needs root and iproute2")
def test_a_cable_cut_in_mid_epoch_ends_both_sides_and_the_next_start_goes_on(hosts, tmp_path):
    make_feature_dataset(tmp_path / "data", splits={"train": 40, "val": 3})
    config = tmp_path / "config.yaml"
    config.write_text("{}\n")
    long = ["train.epochs=12", "train.global_batch=4", "train.eval_every=1000", "train.save_every=20"]
    settings = [*SMALL, *with_tokenizer(tmp_path), *long, "train.timeout=20"]

    both = partial(train_on_both, hosts, tmp_path, [str(config), *settings])
    journal = tmp_path / "run/metrics.jsonl"
    with both("run") as processes:
        poll(lambda: count_lines(journal) > 25 or ended(processes), 120, "step 25")
        hosts[1].run("ip", "link", "set", "eth0", "down")
        said = wait_for(processes, tmp_path, 60)
    assert [each.returncode for each in processes] == [75, 75], said
    assert 25 < count_lines(journal) < 120, said

    hosts[1].run("ip", "link", "set", "eth0", "up")
    with both("run") as processes:
        said = wait_for(processes, tmp_path, 180)
    assert [each.returncode for each in processes] == [0, 0], said
    assert "continuing" in said

    with both("undisturbed") as processes:
        said = wait_for(processes, tmp_path, 180)
    assert [each.returncode for each in processes] == [0, 0], said
    assert last_checkpoint(tmp_path / "run", 120) == last_checkpoint(tmp_path / "undisturbed", 120)


@pytest.mark.skipif(not can_make_namespaces(), reason="making network namespaces needs root and iproute2")
def test_deepspeed_on_two_hosts_trains_as_on_one(hosts, tmp_path):
    config, launcher = small_config(tmp_path), "deepspeed_zero3_cpu"
    settings = ["train.epochs=1", "train.timeout=120", "train.eval_every=0", "tracking.mlflow_uri=none"]
    with train_on_both(hosts, tmp_path, [str(config), *settings], "run", f"launch/{launcher}.yaml") as processes:
        said = wait_for(processes, tmp_path, 300)
    assert [each.returncode for each in processes] == [0, 0], said
    launch(["-m", "sat.train", str(config), *settings, f"train.run_dir={tmp_path}/on_one"], 2, launcher)
    assert last_checkpoint(tmp_path / "run", 4) == last_checkpoint(tmp_path / "on_one", 4)
    assert "ZeRO 3" in (tmp_path / "run/checkpoints/step-00000004/state.json").read_text()


@contextmanager
def train_on_both(
    hosts: list[Host], folder: Path, arguments: list[str], run: str, launcher: str = "launch/cpu.yaml"
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A launcher with one rank on each host, that train in `folder/run`; none of them outlives the block."""
    processes = []
    try:
        for index, host in enumerate(hosts):
            machine = ["--machines", "2", "--machine", str(index), "--address", f"{ADDRESSES[0]}:{PORT}"]
            command = ["sat.cli", "train", "--launch", launcher, "--processes", "2", *machine]
            worker = [sys.executable, "-m", *command]
            with open(folder / f"host{index}.log", "wb") as log:
                environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                words = host.command(*worker, *arguments, f"train.run_dir={folder / run}")
                processes.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log))
        yield processes
    finally:
        for each in processes:
            each.kill()  # ranks do not outlive their launcher
            each.wait()


def ended(processes: list[subprocess.Popen[bytes]]) -> bool:
    return any(each.poll() is not None for each in processes)


def wait_for(processes: list[subprocess.Popen[bytes]], folder: Path, within: float) -> str:
    """What all of them said, when they have ended."""

    def said() -> str:
        return "\n".join(path.read_text() for path in sorted(folder.glob("host*.log")))

    poll(lambda: all(each.poll() is not None for each in processes), within, "both launchers to end", said)
    return said()


def count_lines(journal: Path) -> int:
    return journal.read_text().count("\n") if journal.exists() else 0


def last_checkpoint(run: Path, step: int) -> dict[str, bytes]:
    """The tensor files of the newest checkpoint, that of the last step."""
    folder = max((run / "checkpoints").glob("step-*"))
    assert folder.name == f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
