#!/usr/bin/env bash
# Sourced by demo.sh and flickr8k.sh.

run() { # COMMAND...: show it, run it
  printf '\n$ %s\n' "$*"
  "$@"
}
run_unless_newer() { # FILE COMMAND...: skip the command when FILE is newer than the model of the run folder $run
  local result=$1
  shift
  if [[ $result -nt $run/best/model.safetensors ]]; then printf '\n# %s is up to date\n' "$result"; else run "$@"; fi
}
processes_here() { # sets `processes`, the options of `sat` that start what this machine has
  local gpus
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  case $gpus in
    0) processes=(--launch launch/cpu.yaml) ;;
    1) processes=(--launch launch/gpu.yaml) ;;
    *) processes=(--launch launch/multi_gpu.yaml --processes "$gpus") ;;
  esac
}
