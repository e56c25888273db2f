"""One rank of a training that is asked to stop at a given step of its life.

usage: stop_after_worker.py STEP CONFIG [key=value ...]
"""

import os
import signal
import sys

from sat import train
from sat.cli import run_program


def main() -> None:
    stop_after, steps_taken, take_step = int(sys.argv[1]), 0, train.take_step

    def counted(*arguments):
        nonlocal steps_taken
        steps_taken += 1
        if steps_taken == stop_after and os.environ.get("RANK", "0") == "1":
            os.kill(os.getpid(), signal.SIGTERM)  # one rank only: the others must learn of it
        return take_step(*arguments)

    train.take_step = counted
    run_program(train.main, sys.argv[2:])


if __name__ == "__main__":
    main()
