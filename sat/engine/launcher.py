"""Start the ranks of a program as `accelerate launch` does, and show what a user needs to see of their end.

Whenever a rank does not leave with exit status 0, `accelerate launch` ends with some forty lines of its own, and it
passes on some signals and not others. Here only the ranks speak, their exit status is ours, and SIGTERM, SIGINT, SIGHUP
and SIGUSR1 reach every rank; nobody is killed for taking its time to save.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def launch(config: Path, module: str, arguments: Sequence[str], processes: int = 0) -> int:
    """Run `python -m MODULE ARGUMENTS` on the processes that an accelerate configuration describes; their exit status.

    `processes`: how many, instead of the configuration's number. Waits for them. A rank that was killed is said here,
    as it cannot say so itself: 128 + its signal is then the status.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # after the import, which sets it
    number = ["--num_processes", str(processes)] if processes else []
    given = launch_command_parser().parse_args(["--config_file", str(config), *number, "-m", module, *arguments])
    given.signals_to_handle = "SIGUSR2"  # torch's handler would end the ranks: all others are ours
    for each in PASSED_ON:
        signal.signal(each, _pass_on)
    try:
        launch_command(given)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _status(failure.exitcode, f"rank {rank}")
    except subprocess.CalledProcessError as error:
        return _status(error.returncode, "the process")
    return 0


def _pass_on(number: int, _: FrameType | None) -> None:
    """Send a signal to the processes that we have started."""
    for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        try:
            os.kill(int(pid), number)
        except ProcessLookupError:
            continue


def _status(code: int, who: str) -> int:
    if code >= 0:
        return code
    print(f"error: {who} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
    return 128 - code
