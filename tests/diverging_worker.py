"""One rank of a training whose loss is NaN from a step on, on the last rank only: the others must learn of it.

usage: diverging_worker.py STEP CONFIG [key=value ...]
"""

import os
import sys

import torch

from sat import train
from sat.cli import run_program
from sat.model.objectives.teacher_forcing import TeacherForcing


def main() -> None:
    good, calls, forward = int(sys.argv[1]), 0, TeacherForcing.forward

    def spoilt(objective, *arguments):
        nonlocal calls
        calls += 1
        sums = forward(objective, *arguments)
        last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        return sums._replace(per_token=sums.per_token * torch.nan) if last and calls > good else sums

    TeacherForcing.forward = spoilt
    run_program(train.main, sys.argv[2:])


if __name__ == "__main__":
    main()
