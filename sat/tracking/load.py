"""The machine's load, as MLflow's own monitors see it, in a journal of its own: `tracking.system_metrics=true`.

It is the uploader that looks, so a training pays nothing for it; of several machines it is that of rank 0.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from sat.tracking.journal import SYSTEM, entries

EVERY_S = 10.0
PREFIX = "system/"
"""Under this MLflow's page has a tab of its own."""


class Sampler:
    """Adds a line to the journal of the load now and then; the steps go on where an earlier life ended."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SYSTEM
        self._monitors: list[Any] | None = None
        self._due = time.monotonic()
        self._step = 0

    def look(self) -> None:
        """Add a line if one is due. A full disk costs the line."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY_S
        if self._monitors is None:
            self._monitors = _monitors()
            self._step = self._last_step()
        values: dict[str, float] = {}
        for monitor in list(self._monitors):
            try:
                monitor.collect_metrics()
                values |= {f"{PREFIX}{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            except Exception:  # a GPU that is lost, say: each driver has its own
                self._monitors.remove(monitor)
        self._step += 1
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        line = json.dumps({"step": self._step, "time": round(time.time(), 3), **finite})
        try:
            with open(self._path, "a") as file:
                file.write(line + "\n")
        except OSError:
            return

    def _last_step(self) -> int:
        if not self._path.exists():
            return 0
        with open(self._path, "rb") as file:
            return max((int(entry["step"]) for entry, _ in entries(file)), default=0)


def _monitors() -> list[Any]:
    """MLflow's, of the processor, the disk, the network, and the GPUs where there are any."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except Exception:  # each driver has its own for a machine without a GPU
        return monitors
    return monitors
