"""Where a run comes from, as tags of its MLflow run: commit, versions, host, launcher."""

import getpass
import os
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from sat.stopping import LAUNCHER

PACKAGES = ("show-attend-and-tell", "torch", "accelerate", "deepspeed", "numpy", "mlflow", "pycocoevalcap")
"""Their versions are told, where they are installed."""
GIT_TIMEOUT_S = 5.0
"""A checkout on a file system that hangs must not hold up a training."""


def provenance() -> dict[str, str]:
    """Tags by name, those that MLflow has names for by these. Never raises; what cannot be found out has no tag."""
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:1000],
        "mlflow.source.type": "JOB" if "SLURM_JOB_ID" in os.environ else "LOCAL",
        "host": socket.gethostname(),
        "launcher": launcher(),
        "slurm.job_id": os.environ.get("SLURM_JOB_ID", ""),
        "version.python": platform.python_version(),
    }
    tags |= {f"version.{name}": _version(name) for name in PACKAGES}
    return {name: value for name, value in (tags | git_tags(Path(__file__).parents[2])).items() if value}


def git_tags(root: Path) -> dict[str, str]:
    """Commit, branch, address and dirtiness of the checkout whose top is `root`; {} where there is none."""
    if Path(_git(root, "rev-parse", "--show-toplevel") or "/nowhere").resolve() != root.resolve():
        return {}
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    url = _git(root, "config", "--get", "remote.origin.url") or ""
    return {
        "mlflow.source.git.commit": _git(root, "rev-parse", "HEAD") or "",
        "mlflow.source.git.branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD") or "",
        "mlflow.source.git.repoURL": re.sub("//[^/@]*@", "//", url),  # a token in it is nobody's business
        "mlflow.source.git.dirty": "" if changed is None else str(bool(changed)).lower(),
    }


def launcher() -> str:
    """What started this process, as far as the environment tells: `slurm: torchrun`, say."""
    if LAUNCHER in os.environ:
        inner = "sat --launch"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        inner = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "torchrun"
    else:
        inner = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    return f"slurm: {inner}" if "SLURM_JOB_ID" in os.environ else inner


def _git(root: Path, *arguments: str) -> str | None:
    """What git says, stripped; None where it fails."""
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # it must not be in the way of the user's own git
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
