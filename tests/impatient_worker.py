"""One rank of a training that waits ten seconds for the others, not half an hour; or the launcher of such ranks.

usage: impatient_worker.py CONFIG [key=value ...]              a rank
       impatient_worker.py launch MACHINE HOST:PORT CONFIG [key=value ...]      the launcher of machine 0 or 1 of two
"""

import sys
from datetime import timedelta
from pathlib import Path

from sat import train
from sat.cli import run_program
from sat.engine import start
from sat.engine.launcher import Machines, launch


def main() -> None:
    if sys.argv[1:2] != ["launch"]:
        start.COLLECTIVE_TIMEOUT = timedelta(seconds=10)
        run_program(train.main)
        return
    machine, address, *arguments = sys.argv[2:]
    host, _, port = address.rpartition(":")
    machines = Machines(2, int(machine), host, int(port))
    sys.exit(launch(Path("launch/cpu.yaml"), "tests.impatient_worker", arguments, 2, machines))


if __name__ == "__main__":
    main()
