#!/usr/bin/env bash
# Set up what is missing and run the checks or the tests; other arguments go to pytest:
#   bash tests/run.sh                       bash tests/run.sh -m "not slurm" tests/test_order.py
#   bash tests/run.sh --checks              format, lint and types, without a test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export PATH="${SAT_VENV:-$PWD/.venv}/bin:$PATH"
export PYTHONDONTWRITEBYTECODE= # the first import of a module compiles it for all later ones
export OMP_NUM_THREADS=1 # threads that wait for one another on a core that another process has cost ten times what they give
if [[ ${1:-} == --checks ]]; then
  failed=0 # each check says all it has to say
  ruff format --check --quiet . || { failed=1; echo "error: not formatted; run: ruff format ." >&2; }
  ruff check --quiet --output-format concise . || failed=1
  mypy --no-error-summary || failed=1
  exit $failed
fi
side_by_side=(--numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder) # a file of tests stays in one process
exec python -m pytest "${side_by_side[@]}" "$@"
