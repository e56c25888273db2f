#!/usr/bin/env bash
#SBATCH --job-name=sat-train
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# Train on all nodes of the allocation; submit from the repository's root:
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 slurm/train.sh configs/coco_paper.yaml train.global_batch=512
#
# The settings of slurm/on_all_nodes.sh (LAUNCH_CONFIG, PROCESSES_PER_NODE) apply. The same command continues a stopped run.
exec bash slurm/on_all_nodes.sh sat.train "$@"
