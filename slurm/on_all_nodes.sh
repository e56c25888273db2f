#!/usr/bin/env bash
# Run a module of the project in one process group over all nodes of this Slurm allocation:
#
#   bash slurm/on_all_nodes.sh MODULE ARGUMENTS...
#
#   LAUNCH_CONFIG        accelerate configuration; by default launch/multi_node.yaml with GPUs, launch/cpu.yaml without
#   PROCESSES_PER_NODE   by default the GPUs allocated on a node, or 1
#
# srun starts one accelerate launcher per node. SLURM_NODEID is always 0 in a batch script, so it is expanded on each node.
set -euo pipefail
module=$1
shift
export PATH="${SAT_VENV:-$PWD/.venv}/bin:$PATH"

nodes=$SLURM_JOB_NUM_NODES
per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then default=launch/multi_node.yaml; else default=launch/cpu.yaml; fi
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first_node" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
threads=$((SLURM_CPUS_ON_NODE / per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

launcher=(accelerate launch --config_file "${LAUNCH_CONFIG:-$default}"
  --num_machines "$nodes" --num_processes $((nodes * per_node))
  --main_process_ip "$address" --main_process_port $((10000 + SLURM_JOB_ID % 20000)))
exec srun --nodes="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c 'exec "$@" --machine_rank "$SLURM_NODEID" '"-m $module $(printf '%q ' "$@")" bash "${launcher[@]}"
