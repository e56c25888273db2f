"""fp32 products go another way only where it was seen to be as exact; cores are counted as they may be used.

Freed memory is kept.
"""

import os
import platform
import subprocess
import sys

import pytest
import torch

from sat import machine
from sat.model.kernels import measured

OLD_AMD, NEW_AMD = {"AuthenticAMD", "avx2"}, {"AuthenticAMD", "avx2", "avx512f"}


@pytest.fixture(autouse=True)
def the_route_of_fp32_products_is_restored():
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def test_fp32_products_stay_exact_whatever_route_was_chosen():
    machine.speed_up("torch", "cpu")
    a, b = torch.randn(33, 2048), torch.randn(2048, 65)
    assert ((a @ b) - a.double() @ b.double()).norm() < 4e-6 * (a.double() @ b.double()).norm()


@pytest.mark.parametrize(
    "flags",
    [NEW_AMD | {"amx_tile", "amx_bf16"}, OLD_AMD, {"GenuineIntel", "avx512f"}, set()],
    ids=["AMX", "no AVX-512", "Intel", "unknown"],
)
def test_fp32_products_keep_their_route_on_cpus_that_might_round_or_gain_nothing(flags, monkeypatch):
    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(machine, "_product_error", lambda: pytest.fail("tried the other route"))
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert machine.speed_up("torch", "cpu").endswith("; fp32 products by torch's default library")
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("before", ["none", "ieee"])
@pytest.mark.parametrize(
    "error, after, line",
    [
        (3e-7, "bf16", "oneDNN (full precision: relative error 3e-07)"),
        (2e-3, None, "torch's default library (oneDNN would round: relative error 2e-03)"),
        (float("nan"), None, "torch's default library (oneDNN would round: relative error nan)"),
    ],
)
def test_fp32_products_go_to_onednn_only_where_it_was_seen_to_be_exact(before, error, after, line, monkeypatch):
    routes = []

    def product_error():
        routes.append(torch.backends.mkldnn.matmul.fp32_precision)
        return error

    monkeypatch.setattr(machine, "_cpu_flags", lambda: NEW_AMD)
    monkeypatch.setattr(machine, "_product_error", product_error)
    torch.backends.mkldnn.matmul.fp32_precision = before
    assert machine.speed_up("torch", "cpu").endswith(f"; fp32 products by {line}")
    assert routes == ["bf16"]  # it was measured on the route it judges
    assert torch.backends.mkldnn.matmul.fp32_precision == (after or before)


def test_the_error_of_products_tells_bf16_rounding_from_fp32(monkeypatch):
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert machine._product_error() < machine.EXACT

    def rounded(a, b):
        return torch.mm(a.bfloat16().float(), b.bfloat16().float()) if a.dtype == torch.float32 else torch.mm(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert machine._product_error() > 100 * machine.EXACT


FAULTS = """
import resource, sys, threading
from sat.machine import keep_all_freed_memory

def touch():  # blocks of which two fill one of the 64 MB that glibc gives a thread
    return [b"x" * (25 << 20) for _ in range(5)]

def count():
    touch()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(3):
        touch()
    counts.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

counts, ended = [], threading.Event()
early = threading.Thread(target=ended.wait)  # has a place of its own to take memory from, which others then share
early.start()
if sys.argv[1] == "keep":
    keep_all_freed_memory()
for _ in range(3):
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
ended.set()
print(max(counts))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_in_every_thread_whatever_was_begun_before():
    def faults(mode):
        return int(subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True).stdout)

    assert faults("keep") < 1000 < 20_000 < faults("give back")


def test_the_cores_are_those_this_process_may_use():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:1])
    try:
        assert machine.available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    "ratio, said",
    [
        (1.3, "packed once a step by oneDNN (1.3 times as fast; measured in here)"),
        (0.9, "not packed (0.9 times as fast; measured in here)"),
        (0.0, "not packed (this machine has none, or they round; measured in here)"),
    ],
)
@pytest.mark.parametrize("precision, types", [("fp32", ["fp32"]), ("bf16", ["fp32", "bf16"])])
def test_the_log_says_whether_the_weights_of_the_time_loop_are_packed(ratio, said, precision, types, monkeypatch):
    monkeypatch.setattr(machine, "_cpu_flags", lambda: OLD_AMD)
    monkeypatch.setattr(machine, "best_precision", lambda: precision)
    monkeypatch.setattr(measured, "gain", lambda dtype: measured.Gain(ratio, "here"))
    line = machine.speed_up("auto", "cpu")
    assert line.endswith("".join(f"; {each} weights of the time loop {said}" for each in types))
    assert line.count("weights") == len(types) and "weights" not in machine.speed_up("torch", "cpu")
