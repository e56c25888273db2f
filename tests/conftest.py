"""What the whole suite shares: an environment for scripts, the two-node Slurm, how tests that need a GPU skip."""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers_commands import ROOT
from tests.slurm_cluster import Cluster, missing, start_cluster

if not Path("/dev/nvidiactl").exists():  # no GPU: Triton interprets its programs, as it decides when it is loaded
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest tests first, so that no process of the test run is left alone with them in the end."""
    longest = {item.path for item in items if any(item.get_closest_marker(mark) for mark in ("end_to_end", "slurm"))}
    items.sort(key=lambda item: item.path not in longest)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def no_store_of_anybody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the shell's MLflow server nor what MLflow itself has left in the environment in an earlier test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def alone() -> Iterator[object]:
    """The engine of a training in this process, the only rank."""
    from tests.helpers_training import engine_alone

    with engine_alone() as engine:
        yield engine


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of two nodes on this host, started once for all tests that ask for it."""
    if reason := missing():
        pytest.skip(f"no Slurm: {reason}")
    with start_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """This test run's environment as launch/setup.sh leaves one for this checkout, so that it has nothing to do."""
    from tests.helpers_launch import environment_of_programs

    venv = tmp_path_factory.mktemp("venv")
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith("setup-"):
            (venv / entry.name).symlink_to(entry)
    shaping = [ROOT / "launch/constraints.txt", ROOT / "pyproject.toml", ROOT / "launch/setup.sh"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in shaping) + f"{ROOT}\n".encode())
    (venv / "setup-stamp").write_text(f"{digest.hexdigest()}  -\n")
    return environment_of_programs() | {"SAT_VENV": str(venv)}
