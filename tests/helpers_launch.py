"""Programs in processes of their own without the price of an interpreter each, and METEOR without its 61 MB."""

import atexit
import functools
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARAPHRASE = "0.02\nin front of\nbefore\n"
PRELOADED = (
    "sat.train",
    "sat.evaluate",
    "accelerate.commands.launch",
    "torch.distributed.run",
    "torch._dynamo",
    "pandas",
)
ENCODERS = ("timm",)
DEEPSPEED = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")
"""The second is what its set-up imports, and torch's whole compiler with it."""


@functools.cache
def quick_meteor() -> Path:
    """A folder for PYTHONPATH whose METEOR knows one paraphrase: it starts in a twelfth of the time.

    For tests that score and do not ask what METEOR's value is; all else is the package's own.
    """
    folder = Path(tempfile.mkdtemp(prefix="sat-quick-meteor-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    theirs = Path(next(iter(find_spec("pycocoevalcap").submodule_search_locations)))
    leave_out = shutil.ignore_patterns("__pycache__", "spice", "example", "paraphrase-en.gz", "meteor-1.5.jar")
    shutil.copytree(theirs, folder / "pycocoevalcap", copy_function=os.symlink, ignore=leave_out)
    meteor = folder / "pycocoevalcap/meteor"
    shutil.copy(theirs / "meteor/meteor-1.5.jar", meteor)  # it looks for its data beside itself
    with gzip.open(meteor / "data/paraphrase-en.gz", "wt") as file:
        file.write(PARAPHRASE)
    return folder


def environment_of_programs() -> dict[str, str]:
    """That of this process, with our root, one thread and the quick METEOR."""
    path = os.pathsep.join(map(str, (quick_meteor(), ROOT)))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@functools.cache
def _server(modules: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.warm_launcher", *PRELOADED, *modules]
    environment = environment_of_programs() | {"CUDA_VISIBLE_DEVICES": "-1", "DS_ACCELERATOR": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def close() -> None:
        server.stdin.close()
        server.wait(60)

    atexit.register(close)
    return server


def start(
    python: list[object], accelerate: list[object] | None = None, warm: tuple[str, ...] = ENCODERS
) -> tuple[int, str]:
    """Exit status and output of `python WORDS` on CPUs, under `accelerate launch OPTIONS` where there are any.

    `warm`: what is imported once for all that ask for it, beside `PRELOADED`. Fails where a process is left behind.
    """
    server = _server(warm)
    options = None if accelerate is None else [*map(str, accelerate)]
    with tempfile.TemporaryDirectory() as out:
        order = {"python": [*map(str, python)], "accelerate": options, "out": out, "seconds": 600}
        print(json.dumps(order), file=server.stdin, flush=True)
        ended = json.loads(server.stdout.readline())
        said = "".join(Path(out, name).read_text() for name in ("stdout", "stderr"))
    assert not ended["orphans"], f"{python} left {ended['orphans']}\n{said}"
    return ended["code"], said


def start_cold(python: list[object], accelerate: list[object]) -> tuple[int, str]:
    """As `start`, in interpreters of their own: a GPU does not survive a fork. For programs that score nothing: a
    machine with a GPU that is lent for minutes has no METEOR.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, accelerate), *map(str, python)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr
