"""Start the ranks of a program as `accelerate launch` does, and show what a user needs to see of their end.

Whenever a rank does not leave with exit status 0, `accelerate launch` ends with some forty lines of its own, and it
passes on some signals and not others. Here only the ranks speak, their exit status is ours, and SIGTERM, SIGINT, SIGHUP
and SIGUSR1 reach every rank; nobody is killed for taking its time to save. Ranks do not outlive us (`sat.stopping`).
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from sat.cli import START_AGAIN
from sat.stopping import LAUNCHER, heard


def launch(config: Path, module: str, arguments: Sequence[str], processes: int = 0) -> int:
    """Run `python -m MODULE ARGUMENTS` on the processes that an accelerate configuration describes; their exit status.

    `processes`: how many, instead of the configuration's number. Waits for them. A rank that was killed is said here,
    as it cannot say so itself: 75 is then the status, as the same command goes on; 128 + its signal where it crashed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # after the import, which sets it
    number = ["--num_processes", str(processes)] if processes else []
    given = launch_command_parser().parse_args(["--config_file", str(config), *number, "-m", module, *arguments])
    given.signals_to_handle = "SIGUSR2"  # torch's handler would end the ranks: all others are ours
    os.environ[LAUNCHER] = str(os.getpid())
    for each in heard():
        signal.signal(each, _pass_on)
    try:
        launch_command(given)
    except ChildFailedError as error:
        return _status({f"rank {rank}": failure.exitcode for rank, failure in error.failures.items()})
    except subprocess.CalledProcessError as error:
        return _status({"the process": error.returncode})
    return 0


def _pass_on(number: int, _: FrameType | None) -> None:
    """Send a signal to the processes that we have started."""
    for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        try:
            os.kill(int(pid), number)
        except ProcessLookupError:
            continue


def _status(codes: Mapping[str, int]) -> int:
    """One for the failures of a launch: a killed rank explains what the others then met, as does another's error."""
    killed = {who: signal.Signals(-code) for who, code in codes.items() if code < 0}
    for who, number in killed.items():
        print(f"error: {who} was ended by {number.name}", file=sys.stderr, flush=True)
    crashes = [128 + number for number in killed.values() if number not in (signal.SIGKILL, *heard())]
    errors = [code for code in codes.values() if code > 0 and code != START_AGAIN]
    return (crashes or (errors if not killed else []) or [START_AGAIN])[0]
