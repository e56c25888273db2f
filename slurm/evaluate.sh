#!/usr/bin/env bash
#SBATCH --job-name=sat-evaluate
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Score a trained model on all nodes of the allocation; submit from the repository's root:
#
#   sbatch --nodes=1 --gpus-per-node=8 --cpus-per-task=64 slurm/evaluate.sh runs/coco_paper --split test --baselines
#   sbatch --nodes=1 slurm/evaluate.sh --launch launch/cpu.yaml --processes 2 runs/demo --split test
#
# Before the run folder stand the options of slurm/on_all_nodes.sh: --launch FILE, and --processes N on each node. Account, partition,
# time and the like are sbatch's own, options or variables. A job that Slurm preempts is queued again and begins anew.
usage() { sed -n '/^#   /s/^#   //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
last=(0 "$@")
if (($# == 0)) || [[ $1 == --help || ${last[-2]} == --launch || ${last[-2]} == --processes ]]; then usage; fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then echo "error: this is a batch script: sbatch slurm/evaluate.sh $*" >&2; exit 2; fi
exec bash slurm/on_all_nodes.sh evaluate "$@"
