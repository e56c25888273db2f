"""Starts programs on forked processes, so that many launches cost one import of PyTorch and of DeepSpeed.

    python -m tests.warm_launcher MODULE...

The modules are imported once for all. Each line on standard input is a JSON object {"python": [WORDS], "accelerate":
[OPTIONS] or null, "out": FOLDER, "seconds": S}: what `python` is given, the options of `accelerate launch` before it,
where `stdout` and `stderr` go. The answer is {"code": EXIT_CODE, "orphans": [PID]}, those that had to be killed.
accelerate reads its options and sets the environment as ever; only torch's launcher, which would start interpreters, is
replaced by `fork`.
"""

import ctypes
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def execute(script: str, arguments: list[str], module: bool) -> None:
    """As `python [-m] SCRIPT ARGUMENTS` does."""
    sys.argv = [script, *arguments]
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # says it was imported before
    if module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")


def fork(body, *arguments) -> int:
    """The process id of one that runs `body` and leaves as an interpreter does."""
    if pid := os.fork():
        return pid
    code = 0
    try:
        body(*arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rank(number: int, given: Namespace, folder: str) -> None:
    """One of the processes that torch's launcher would start, with the environment that it gives."""
    of_all = {"WORLD_SIZE": given.nproc_per_node, "LOCAL_WORLD_SIZE": given.nproc_per_node, "GROUP_RANK": "0"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(given.master_port)}
    report = Path(folder, str(number), "error.json")
    report.parent.mkdir()
    own = {"RANK": str(number), "LOCAL_RANK": str(number), "TORCHELASTIC_ERROR_FILE": str(report)}
    os.environ.update(of_all | address | own)
    execute(given.training_script, given.training_script_args, given.module)


def run(given: Namespace) -> None:
    """Instead of torch's: the first rank that fails ends the others."""
    with tempfile.TemporaryDirectory() as folder:
        left = {fork(rank, number, given, folder) for number in range(int(given.nproc_per_node))}
        failed = 0
        while left:
            pid, status = os.wait()
            left.discard(pid)
            if status and not failed:
                failed = 1
                for other in left:
                    os.kill(other, signal.SIGTERM)
    sys.exit(failed)


def launcher(order: dict) -> None:
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(order["out"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    words = order["python"]
    if order["accelerate"] is None:
        module = words[0] == "-m"
        execute(words[module], words[module + 1 :], module)
        return
    import torch.distributed.run
    from accelerate.commands.launch import launch_command, launch_command_parser

    torch.distributed.run.run = run
    launch_command(launch_command_parser().parse_args([*order["accelerate"], *words]))


def start(order: dict) -> dict:
    """Run it, and wait for whatever it leaves behind."""
    first, code, orphans, until = fork(launcher, order), None, [], time.monotonic() + order["seconds"]
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return {"code": code, "orphans": orphans}
        if pid == first:
            code = os.waitstatus_to_exitcode(status)
            until = min(until, time.monotonic() + 30)
        elif not pid and time.monotonic() > until:
            for child in map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
                orphans.append(child)
                os.kill(child, signal.SIGKILL)
            until += 5
        elif not pid:
            time.sleep(0.01)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(start(json.loads(line))), file=answers, flush=True)
