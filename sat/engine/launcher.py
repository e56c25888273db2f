"""Start the ranks of a program as `accelerate launch` does, and show what a user needs to see of their end.

Whenever a rank does not leave with exit status 0, `accelerate launch` ends with some forty lines of its own, and it
passes on some signals and not others. Here only the ranks speak, their exit status is ours, and SIGTERM, SIGINT, SIGHUP
and SIGUSR1 reach every rank; nobody is killed for taking its time to save. Ranks do not outlive us (`sat.stopping`).
"""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sat.stopping import LAUNCHER, START_AGAIN, StartAgain, heard

MACHINES_COME_WITHIN_S = 600
"""Launchers of several machines wait so long for one another; the ranks then wait for train.timeout."""


@dataclass(frozen=True)
class Machines:
    """This machine among those of a launch; each has a launcher of its own."""

    count: int
    rank: int
    address: str
    """Of the machine with rank 0, as the others reach it."""
    port: int = 29500

    def options(self) -> list[str]:
        """For accelerate."""
        return [
            *("--num_machines", str(self.count), "--machine_rank", str(self.rank)),
            *("--main_process_ip", self.address, "--main_process_port", str(self.port)),
        ]


def launch(
    config: Path, module: str, arguments: Sequence[str], processes: int = 0, machines: Machines | None = None
) -> int:
    """Run `python -m MODULE ARGUMENTS` on the processes that an accelerate configuration describes; their exit status.

    `processes`: how many over all machines, and `machines`: which, instead of what the configuration says. Waits for
    them. A rank that was killed is said here, as it cannot say so itself: 75 is then the status, as the same command
    goes on; 128 + its signal where it crashed. Raises ValueError where the configuration is for GPUs and this machine
    has too few, and StartAgain where another machine does not come.
    """
    import torch.distributed as dist
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # after the import, which sets it
    number = ["--num_processes", str(processes)] if processes else []
    where = machines.options() if machines else []
    options = ["--config_file", str(config), *number, *where, "-m", module, *arguments]
    given = launch_command_parser().parse_args(options)
    _refuse_missing_gpus(config, given.num_processes, given.num_machines)
    given.signals_to_handle = "SIGUSR2"  # torch's handler would end the ranks: all others are ours
    given.rdzv_conf = given.rdzv_conf or f"timeout={MACHINES_COME_WITHIN_S}"
    os.environ[LAUNCHER] = str(os.getpid())
    for each in heard():
        signal.signal(each, _pass_on)
    try:
        launch_command(given)
    except ChildFailedError as error:
        return _status({f"rank {rank}": failure.exitcode for rank, failure in error.failures.items()})
    except subprocess.CalledProcessError as error:
        return _status({"the process": error.returncode})
    except dist.DistError as error:
        raise StartAgain(_machines_apart(error, given.main_process_ip, given.main_process_port)) from error
    return 0


def _machines_apart(error: Exception, host: str | None, port: int | None) -> str:
    """What to say where the launchers have not found one another."""
    me, where = socket.gethostname(), f"{host or '127.0.0.1'}:{port or 29500}"
    if joined := re.search(r"(\d+)/(\d+) clients joined", str(error)):
        return (
            f"{joined[1]} of {joined[2]} machines have come to {me}, {where}, within {MACHINES_COME_WITHIN_S:g} s: "
            "start the same command on the others, each with its own --machine"
        )
    return (
        f"{me} and the launcher of machine 0 at {where} have not found or have lost one another "
        f"({str(error).partition(chr(10))[0][:200]}); see what machine 0 says, then start it again"
    )


def _refuse_missing_gpus(config: Path, processes: int | None, machines: int | None) -> None:
    """Ranks without a GPU of their own would compute on the CPU, or share one, and nobody would be told."""
    import torch
    from accelerate.commands.config.config_args import load_config_from_file

    asked = load_config_from_file(str(config))
    here = (processes or asked.num_processes) // (machines or asked.num_machines)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not asked.use_cpu and found < here:
        none = "none (nvidia-smi shows whether the driver does)"
        raise ValueError(
            f"{config} is for GPUs, one per process: {here} on this machine ({socket.gethostname()}), where PyTorch "
            f"finds {found or none}; give as many --processes as there are GPUs, or launch/cpu.yaml to compute on CPUs"
        )


def _pass_on(number: int, _: FrameType | None) -> None:
    """Send a signal to the processes that we have started."""
    for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        try:
            os.kill(int(pid), number)
        except ProcessLookupError:
            continue


def _status(codes: Mapping[str, int]) -> int:
    """One for the failures of a launch: a killed rank explains what the others then met, as does another's error."""
    ended = {who: signal.Signals(-code) for who, code in codes.items() if code < 0}
    errors = [code for code in codes.values() if code > 0 and code != START_AGAIN]
    # torch ends the others by SIGTERM, which is no news where anything else explains it
    killed = {who: number for who, number in ended.items() if number not in heard()} or ({} if errors else ended)
    for who, number in killed.items():
        print(f"error: {who} was ended by {number.name}", file=sys.stderr, flush=True)
    crashes = [128 + number for number in killed.values() if number not in (signal.SIGKILL, *heard())]
    return (crashes or (errors if not killed else []) or [START_AGAIN])[0]
