#!/usr/bin/env bash
# Preprocess on a cluster: plan here and now, then an array job with one task per stripe, then finalize as a dependent job.
#
#   bash slurm/preprocess.sh STRIPES PROGRAM OPTIONS...            (on the login node, with the project's environment set up)
#   bash slurm/preprocess.sh 16 shard_images --annotations train=captions_train2017.json --images coco --out data/coco/images
#   SBATCH_GRES=gpu:1 bash slurm/preprocess.sh 8 extract_features --images data/coco/images --weights imagenet --out data/coco/features
#
# sbatch's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_GRES, ...) choose the resources of the jobs. A task that fails or is
# killed re-queues itself twice. finalize starts when all tasks have ended and names the shards that are still missing, if any: then
# give the same command again; what is whole is reused.
set -euo pipefail
if (($# < 2)); then
  sed -n '4,6s/^# *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
stripes=$1
program=$2
shift 2
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="${SAT_VENV:-$repository/.venv}/bin:$PATH" # jobs inherit it

python -m "preprocessing.$program" "$@" --step plan # wrong options and missing files show at once

command=$(printf '%q ' python -m "preprocessing.$program" "$@")
submit() { sbatch --parsable --job-name="$program" --requeue --open-mode=append "$@"; }
tasks=$(submit --array="0-$((stripes - 1))" --output="$program-%A-%a.out" <<JOB
#!/usr/bin/env bash
$command --step shards --stripe \$SLURM_ARRAY_TASK_ID/$stripes && exit
if ((\${SLURM_RESTART_COUNT:-0} < 2)); then scontrol requeue \${SLURM_ARRAY_JOB_ID}_\$SLURM_ARRAY_TASK_ID; fi
exit 1
JOB
)
finalize=$(submit --dependency="afterany:$tasks" --output="$program-%j.out" <<JOB
#!/usr/bin/env bash
$command --step finalize
JOB
)
echo "array job $tasks of $stripes tasks, finalize job $finalize; logs: $PWD/$program-*.out"
