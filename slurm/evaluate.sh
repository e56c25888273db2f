#!/usr/bin/env bash
#SBATCH --job-name=sat-evaluate
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# Score a trained model on all nodes of the allocation; submit from the repository's root:
#
#   sbatch --nodes=1 --gpus-per-node=8 --cpus-per-task=64 slurm/evaluate.sh runs/coco --split test --baselines
#
# The settings of slurm/on_all_nodes.sh (LAUNCH_CONFIG, PROCESSES_PER_NODE) apply.
exec bash slurm/on_all_nodes.sh sat.evaluate "$@"
