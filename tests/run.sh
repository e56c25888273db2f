#!/usr/bin/env bash
# Set up what is missing and run the tests; arguments go to pytest:
#   bash tests/run.sh                       bash tests/run.sh -m "not slurm" tests/test_order.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export PATH="${SAT_VENV:-$PWD/.venv}/bin:$PATH"
export PYTHONDONTWRITEBYTECODE= # the first import of a module compiles it for all later ones
exec python -m pytest "$@"
