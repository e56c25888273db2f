"""Ranks whose variables contradict each other are told so at once, all that have come; real processes."""

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from sat import cli
from sat.cli import run_program
from sat.engine.meeting import meet
from tests.slurm_cluster import free_ports


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Starts processes with these variables, waits for all; (exit status, what it said) of each, and the seconds."""
    for name in [*os.environ]:
        if name.startswith(("TORCHELASTIC_", "ACCELERATE_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cli, "OTHER_MACHINE_WAITS_S", 0.0)
    (port,) = free_ports(1)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}

    def run(timeout: float, *variables: Mapping[str, str]) -> tuple[list[tuple[int, str]], float]:
        began, started = time.monotonic(), []
        for each in variables:
            log = tmp_path / f"{len(started)}.log"
            started.append((fork(log, common | each, timeout), log))
        ended = [(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text()) for pid, log in started]
        return ended, time.monotonic() - began

    return run


def fork(log: Path, variables: Mapping[str, str], timeout: float) -> int:
    if pid := os.fork():
        return pid
    try:
        with open(log, "w", buffering=1) as said:
            sys.stdout = sys.stderr = said
            os.environ.update(variables)
            run_program(lambda: come(timeout), [], "sat train")
            os._exit(0)
    finally:
        os._exit(99)


def come(timeout: float) -> None:
    """Meet, and stay until all have met, as ranks do that form a group."""
    store, rank, world = meet(timeout)
    print(rank, world)
    store.add("met", 1)
    while rank == 0 and store.add("met", 0) < world:
        time.sleep(0.01)


def of(rank: int, world: int = 3) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world)}


def test_ranks_that_agree_meet(ranks):
    ended, _ = ranks(60, *(of(rank) for rank in (2, 0, 1)))
    assert ended == [(0, "2 3\n"), (0, "0 3\n"), (0, "1 3\n")]


def test_two_that_take_themselves_for_one_rank_end_all_at_once(ranks):
    ended, seconds = ranks(600, of(0), of(1), of(1))
    assert [code for code, _ in ended] == [1, 1, 1] and seconds < 60
    assert all("error: two processes take themselves for rank 1 of 3" in said for _, said in ended)
    assert ended[0][1].count("\n") == 1


def test_of_two_that_take_themselves_for_the_first_both_are_told_at_once(ranks):
    ended, seconds = ranks(600, of(0), of(0))
    assert [code for code, _ in ended] == [1, 1] and seconds < 60
    second, first = sorted(said for _, said in ended)
    assert "cannot serve at 127.0.0.1:" in second and "takes itself for rank 0" in second
    assert "two processes take themselves for rank 0 of 3" in first


def test_an_address_at_which_something_else_serves_is_one_sentence(ranks):
    """Something that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        (((code, said),), seconds) = ranks(600, of(0) | {"MASTER_PORT": port})
    assert code == 1 and seconds < 60 and said.count("\n") == 1 and f"cannot serve at 127.0.0.1:{port}" in said


def test_another_number_of_ranks_than_the_others_have_ends_all_at_once(ranks):
    ended, seconds = ranks(600, of(0), of(1, world=2))
    assert [code for code, _ in ended] == [1, 1] and seconds < 60
    assert all("WORLD_SIZE is " in said and "it must be the same for all" in said for _, said in ended)


@pytest.mark.parametrize(
    "variables", [{"RANK": "3", "WORLD_SIZE": "3"}, {"RANK": "-1", "WORLD_SIZE": "3"}, {"RANK": "first"}, {}]
)
def test_variables_that_name_no_rank_are_one_sentence(ranks, variables):
    (((code, said),), _) = ranks(60, variables)
    assert code == 1 and said.count("\n") == 1
    assert f"RANK={variables.get('RANK', '')} " in said and "name no rank of a launch" in said
