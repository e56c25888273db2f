"""Whether matrices are packed before the time loop: measured once on each kind of machine, in half a second.

What was found is kept in the user's cache: a run that is resumed must go on with the products that it began with, to
the last bit. Of processes that measure at the same time the first one decides for all.
"""

import contextlib
import functools
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sat import files
from sat.model.kernels.build import cpu_kind
from sat.model.kernels.products import Packed, Plain, Prepare

TYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""What is packed, and the relative error that such a product of inner length 512 may have."""
ROWS, INNER, OUTER = (5, 40, 160), 512, 2048
"""Few, as where one picture is captioned or captions end, and those of a training step."""
TURNS, PRODUCTS = 7, 4
"""Turns of both, and products of each number of rows for each time that is packed."""
WORTH = 1.1
"""Less is what the next measurement may say otherwise."""
RATIO = "packed_is_so_many_times_as_fast"


class Gain(NamedTuple):
    """Of packed products over PyTorch's own."""

    ratio: float
    """How many times as fast; 0: this machine has none, or they round."""
    kept: str
    """The file that says so, or why there is none."""

    @property
    def packs(self) -> bool:
        """Whether they serve."""
        return self.ratio >= WORTH


def packs(kernels: str, like: Tensor) -> bool:
    """Whether rows such as `like` meet packed matrices; never where `kernels` is `torch`."""
    return kernels != "torch" and like.device.type == "cpu" and like.dtype in TYPES and gain(like.dtype).packs


def gain(dtype: torch.dtype) -> Gain:
    """On this machine for one of TYPES, with PyTorch's threads and its settings of today."""
    backend: Any = torch.backends.mkldnn  # its types do not know `matmul`
    return _gain(dtype, torch.get_num_threads(), backend.matmul.fp32_precision)


@functools.cache
def _gain(dtype: torch.dtype, threads: int, route: str) -> Gain:
    what = "\n".join([cpu_kind(), torch.__version__, str(dtype), str(threads), route])
    try:
        path = files.cache_folder(private=True) / f"products-{files.sha256_of(what)[:24]}.json"
    except OSError as error:  # nothing can be written anywhere
        return Gain(_measure(dtype), f"this process alone: {error}")
    ratio = _kept(path)
    if ratio is None:
        ratio = _measure(dtype)
        with contextlib.suppress(OSError):
            if not files.create(path, json.dumps({RATIO: ratio}).encode()) and _kept(path) is None:
                files.write_json(path, {RATIO: ratio})  # damaged
        first = _kept(path)
        ratio = ratio if first is None else first
    return Gain(ratio, str(path))


def _kept(path: Path) -> float | None:
    ratio = files.read_json(path).get(RATIO)
    return ratio if isinstance(ratio, float) and 0 <= ratio < math.inf else None


def _measure(dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    every = [torch.randn(n, INNER, generator=generator).to(dtype) for n in ROWS]
    matrix = torch.randn(INNER, OUTER, generator=generator).to(dtype)
    exact = every[-1].double() @ matrix.double()
    seconds: dict[Prepare, list[float]] = {Plain: [], Packed.of: []}
    try:
        if not (Packed.of(matrix).times(every[-1]) - exact).norm() <= TYPES[dtype] * exact.norm():
            return 0.0
    except (AttributeError, RuntimeError):
        return 0.0
    for _ in range(TURNS):
        for prepare, turns in seconds.items():
            begin = time.perf_counter()
            factor = prepare(matrix)
            for rows in every * PRODUCTS:
                factor.times(rows)
            turns.append(time.perf_counter() - begin)
    plain, packed = map(min, seconds.values())  # of what others on the machine disturbed least
    return round(plain / packed, 2)
