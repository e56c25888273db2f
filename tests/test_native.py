"""Native kernels are built once, by whatever compiler PATH has, and their absence is said and bridged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sat import machine
from sat.model.kernels import native, torch_kernels
from sat.model.kernels.choose import choose_beam_kernels, choose_kernels
from tests.helpers_kernels import needs_compiler


@pytest.fixture(autouse=True)
def the_route_of_fp32_products_is_restored():
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def test_without_a_compiler_the_pytorch_kernels_serve_and_always_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    native.library.cache_clear()
    try:
        assert choose_kernels("auto", torch.empty(0)) is torch_kernels
        assert choose_beam_kernels("auto", torch.empty(0)) is None
        assert "there is no C++ compiler" in machine.speed_up("auto", "cpu")
        with pytest.raises(ValueError, match="train.kernels is native, but .* there is no C\\+\\+ compiler; use auto"):
            choose_kernels("native", torch.empty(0))
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_is_named_with_its_message(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho out of registers >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        library, explanation = native.library()
        assert library is None and "out of registers" in explanation
    finally:
        native.library.cache_clear()


@needs_compiler
def test_two_processes_build_at_once_and_leave_one_library(tmp_path):
    program = "from sat.model.kernels import native; assert native.library()[0]"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len(list((tmp_path / "show-attend-and-tell").iterdir())) == 1


def test_never_calls_no_compiler(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: pytest.fail("built"))
    assert choose_kernels("torch", torch.empty(0)) is torch_kernels
    assert "train.kernels=torch" in machine.speed_up("torch", "cpu")


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_built_anew(monkeypatch, tmp_path):
    whole = native.library()[1].partition(", built in ")[0]
    compiler = tmp_path / "c++"  # it only copies: `-o FILE` comes last
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || cp "{whole}" "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        path = Path(native.library()[1].partition(", built in ")[0])
    finally:
        native.library.cache_clear()
    assert path.is_relative_to(tmp_path)
    path.unlink()  # a file in use must not be written to
    path.write_text("<html>not a library</html>")
    program = "from sat.model.kernels import native; print(native.library())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "<CDLL" in done.stdout and f"{path}, built in " in done.stdout
    assert path.read_bytes() == Path(whole).read_bytes()
