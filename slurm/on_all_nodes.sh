#!/usr/bin/env bash
# Run `sat train` or `sat evaluate` in one process group over all nodes of this Slurm allocation:
#
#   bash slurm/on_all_nodes.sh COMMAND ARGUMENTS...
#
# Before the arguments may stand --launch FILE, an accelerate configuration (by default launch/multi_node.yaml: all GPUs of each node;
# launch/cpu.yaml is for CPUs), and --processes N on each node (by default the GPUs that are allocated there, or 1).
# CONTAINER="apptainer exec --nv sat.sif" in the environment runs Python in a container, see launch/Dockerfile.
#
# srun starts one launcher per node. SLURM_NODEID is always 0 in a batch script, so it is expanded on each node. A launcher that has
# failed keeps its end back for some seconds, as srun then kills those of the other nodes, which may still have something to say.
set -euo pipefail
command=$1
shift
launch=launch/multi_node.yaml
per_node=
while [[ ${1:-} == --launch || ${1:-} == --processes ]]; do
  if [[ $1 == --launch ]]; then launch=${2:?--launch needs a file}; else per_node=${2:?--processes needs a number}; fi
  shift 2
done
fail() { echo "error: $*" >&2; exit 1; }
if [[ ! -f $launch ]]; then fail "there is no launcher configuration $launch in $PWD; submit from the repository's root"; fi
export PATH="${SAT_VENV:-$PWD/.venv}/bin:$PATH"

nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}
if ! grep -q '^use_cpu: true' "$launch" && ((gpus == 0)); then
  fail "$launch is for GPUs, and job $SLURM_JOB_ID has none: give sbatch --gpus-per-node=N, or this script --launch launch/cpu.yaml"
fi
per_node=${per_node:-$((gpus > 0 ? gpus : 1))}
if [[ ! $per_node =~ ^[1-9][0-9]*$ ]]; then fail "--processes is $per_node; it must be a whole number from 1"; fi
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first_node" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
port=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000)) # another one for each life
threads=$((SLURM_CPUS_ON_NODE / per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

exec srun --nodes="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c 'trap : TERM INT HUP USR1; "$@" --machine "$SLURM_NODEID"; code=$?; ((code == 0)) || sleep 10; exit $code' bash \
  ${CONTAINER:-} python -m sat.cli "$command" --launch "$launch" --processes $((nodes * per_node)) --machines "$nodes" --address "$address:$port" "$@"
