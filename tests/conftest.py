"""What the whole suite shares: the two-node Slurm, and the rule by which tests that need a GPU skip."""

from collections.abc import Iterator

import pytest

from tests.slurm_cluster import Cluster, missing, start_cluster


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of two nodes on this host, started once for all tests that ask for it."""
    if reason := missing():
        pytest.skip(f"no Slurm: {reason}")
    with start_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
