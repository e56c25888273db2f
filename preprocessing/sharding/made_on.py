"""On what a shard of features was computed. The same network gives other last bits elsewhere.

Libraries choose how they add up by the instructions that a processor has, by its caches and by the number of cores;
all that is recorded in each shard's sidecar, in words. Nothing is computed from it: it explains bytes that differ.
"""

import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from sat.machine import available_cores
from sat.shards.schema import Sidecar

MADE_ON = "made_on"
"""The entry of a sidecar's `extra`."""
INSTRUCTIONS = (
    *(("amx_bf16", "AMX"), ("avx512_fp16", "AVX512_FP16"), ("avx512_bf16", "AVX512_BF16"), ("avx512f", "AVX512")),
    *(("avx2", "AVX2"), ("avx", "AVX"), ("sve", "SVE"), ("asimd", "NEON")),
)
"""Flag of a processor (/proc/cpuinfo) and what it is called, the most able first."""
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR", "OMP_NUM_THREADS")
"""Environment variables by which the libraries use less than there is."""


def made_on(device: str) -> str:
    """The processor with its instructions, cores and limits, or the GPU; then the version of torch (imported)."""
    import torch

    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    limits = "".join(f", {name}={os.environ[name]}" for name in LIMITS if name in os.environ)
    name, instructions = processor()
    return f"{name}, {instructions}{limits}, {available_cores()} cores, torch {torch.__version__}"


def processor(about: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """What this processor is called, and the most able of its instruction sets."""
    try:
        text = about.read_text()
    except OSError:
        text = ""
    lines = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    entries = {name.strip(): value.strip() for name, value in lines.items()}
    flags = set(entries.get("flags", entries.get("Features", "")).split())
    instructions = next((called for flag, called in INSTRUCTIONS if flag in flags), "no vector instructions known")
    return entries.get("model name", platform.machine()), instructions


class Machines:
    """Counts the shards of each machine while their sidecars pass by."""

    def __init__(self) -> None:
        self.shards: Counter[str] = Counter()

    def add(self, sidecar: Sidecar) -> None:
        """Count a shard, unless nothing was computed for it."""
        if sidecar.samples and MADE_ON in sidecar.extra:
            self.shards[sidecar.extra[MADE_ON]] += 1

    def counted(self, sidecars: Iterable[Sidecar]) -> Iterator[Sidecar]:
        """The same sidecars."""
        for sidecar in sidecars:
            self.add(sidecar)
            yield sidecar

    @property
    def differ(self) -> bool:
        """Whether there are several."""
        return len(self.shards) > 1

    def lines(self) -> list[str]:
        """The machine, or a line for each where they differ; none where nothing was computed."""
        if not self.differ:
            return [f"its shards were computed on {machine}" for machine in self.shards]
        head = "its shards were computed on machines that differ, and each may give other last bits:"
        return [head, *(f"  {count} shards: {machine}" for machine, count in self.shards.most_common())]
