#!/usr/bin/env bash
# Preprocess on a cluster: plan here and now, then an array job with one task per stripe, then finalize as a dependent job.
#
#   bash slurm/preprocess.sh STRIPES PROGRAM OPTIONS...            (on the login node, with the project's environment set up)
#   bash slurm/preprocess.sh 16 shard_images --annotations train=captions_train2017.json --images coco --out data/coco/images
#   TASK_OPTIONS="--gres=gpu:1 --cpus-per-task=8" bash slurm/preprocess.sh 8 extract_features --images data/coco/images --weights imagenet --compute bf16 --out data/coco/features
#
# TASK_OPTIONS are sbatch's for the tasks of the array; its own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, ...) hold for all jobs. A task
# that is killed re-queues itself twice; one that names an error does not. finalize starts when all tasks have ended and names the
# shards that are still missing, if any: then give the same command again; what is whole is reused.
set -euo pipefail
if (($# < 2)); then
  sed -n '4,6s/^# *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
stripes=$1
program=$2
shift 2
most=$(scontrol show config | sed -n 's/^MaxArraySize *= *//p')
if [[ ! $stripes =~ ^[1-9][0-9]*$ ]] || ((stripes > ${most:-1001})); then
  echo "error: $stripes stripes: expected a number from 1 to ${most:-1001}, the longest array of this cluster" >&2
  exit 2
fi
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="${SAT_VENV:-$repository/.venv}/bin:$PATH"

python -m "preprocessing.$program" "$@" --step plan # wrong options and missing files show at once

command=$(printf '%q ' python -m "preprocessing.$program" "$@")
submit() { sbatch --parsable --job-name="$program" --requeue --open-mode=append "$@"; }
# shellcheck disable=SC2086 # TASK_OPTIONS are several words
tasks=$(submit ${TASK_OPTIONS:-} --array="0-$((stripes - 1))" --output="$program-%A-%a.out" <<JOB
#!/usr/bin/env bash
export PATH=$(printf %q "$PATH") # sites may start jobs without the environment they were submitted from
$command --step shards --stripe \$SLURM_ARRAY_TASK_ID/$stripes
status=\$?
if ((status > 128 && \${SLURM_RESTART_COUNT:-0} < 2)); then
  scontrol requeue \${SLURM_ARRAY_JOB_ID}_\$SLURM_ARRAY_TASK_ID && sleep 60 # Slurm ends this life meanwhile
fi
exit \$status
JOB
)
tasks=${tasks%%;*} # a federation appends the cluster's name
finalize=$(submit --dependency="afterany:$tasks" --output="$program-%j.out" <<JOB
#!/usr/bin/env bash
export PATH=$(printf %q "$PATH")
$command --step finalize
JOB
)
echo "array job $tasks of $stripes tasks, finalize job $finalize; logs: $PWD/$program-*.out"
