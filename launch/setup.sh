#!/usr/bin/env bash
# Make the Python environment ready: `.venv`, or the folder named by SAT_VENV, with the tested versions of everything.
#
#   bash launch/setup.sh
#
# A stamp in the environment holds the digest of all that shaped it, so a second call costs milliseconds. No stamp means that
# a call was interrupted: what pip had finished is kept, what it left half-written is told by its missing RECORD (the last
# file that pip writes) and made anew. Needs no root, no GPU, no Java and no compiler.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SAT_VENV:-$root/.venv}
constraints=$root/launch/constraints.txt

# The checkout's path belongs to the stamp: the project is installed as a link to it.
wanted=$({ cat "$constraints" "$root/pyproject.toml" "${BASH_SOURCE[0]}"; echo "$root"; } | sha256sum)
if [[ -f $venv/setup-stamp && $(<"$venv/setup-stamp") == "$wanted" ]]; then exit 0; fi

find_python() {
  local name
  for name in python3.12 python3.11 python3.13 python3; do
    if "$name" -c 'import sys, venv, ensurepip; assert (3, 11) <= sys.version_info' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "error: found no Python 3.11 or newer that has the modules venv and ensurepip (tried python3.12, python3.11, python3.13, python3);" \
    "install one, on Debian or Ubuntu with: apt-get install python3-venv" >&2
  return 1
}

mkdir -p "$venv"
exec 9>"$venv/setup-lock"
flock 9 # a second set-up of the same environment waits here

for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
  if [[ -d $info && ! -f $info/RECORD ]]; then rm -r "$info"; fi
done
if ! compgen -G "$venv/lib/python3*/site-packages/pip-*.dist-info" >/dev/null; then
  base=$(find_python)
  echo "making $venv with $("$base" --version)"
  "$base" -m venv "$venv"
fi

# Modules are compiled when first imported, which is a small part of them. Without build isolation the two source packages
# (DeepSpeed and the project) are built by the pinned setuptools, at once.
install=("$venv/bin/python" -m pip install --no-compile --no-build-isolation --constraint "$constraints")
"${install[@]}" --quiet setuptools
# Unpacking is what takes time, so two installers bring half of the pinned files each. Whatever they fail to bring, the last
# one brings or reports: it alone resolves the requirements.
echo "installing the packages of launch/constraints.txt, about 6 GB"
torch_stack='^(torch|torchvision|triton|nvidia-.*|cuda-.*)=='
"${install[@]}" --quiet --no-deps --requirement <(grep -E "$torch_stack" "$constraints") &
"${install[@]}" --quiet --no-deps --requirement <(grep -vE "$torch_stack|^deepspeed==" "$constraints") || true
wait
"${install[@]}" --quiet --editable "$root[deepspeed,test,dev]"
echo "trying the environment"
PYTHONDONTWRITEBYTECODE='' "$venv/bin/python" -c 'import torch, torchvision, timm, accelerate, deepspeed, mlflow, pyarrow, matplotlib.pyplot, webdataset'

echo "$wanted" >"$venv/setup-stamp"
echo "environment ready in $SECONDS s: $venv"
