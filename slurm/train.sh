#!/usr/bin/env bash
#SBATCH --job-name=sat-train
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# Train on all nodes of the allocation, through preemptions and time limits; submit from the repository's root:
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 slurm/train.sh configs/coco_paper.yaml train.global_batch=512
#   sbatch --nodes=2 slurm/train.sh --launch launch/cpu.yaml --processes 2 configs/demo.yaml
#
# Before CONFIG stand the options of slurm/on_all_nodes.sh: --launch FILE, and --processes N on each node. Account, partition, time
# and the like are sbatch's own: options, or SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT. The log is sat-train-JOB.out where
# sbatch was called, and job-JOB.out in the run folder leads to it.
#
# Five minutes before the time limit, when Slurm preempts the job, or by `scancel --signal=USR1 --batch JOB`, all ranks save the same
# step, and the job is queued again: it goes on in the same run folder and MLflow run. So it is when it was killed; after an error it is
# not, nor after two deaths without a new checkpoint between them, nor more than MAX_RESTARTS times (default 100). A file STOP in the run
# folder, or scancel, stops it for good, with a checkpoint: the same sbatch command goes on.
asked=0
trap 'asked=1' USR1 TERM
usage() { sed -n '/^#   /s/^#   //p' "${BASH_SOURCE[0]}" >&2; exit 2; }

options=()
while [[ ${1:-} == --launch || ${1:-} == --processes ]] && (($# > 1)); do
  options+=("$1" "$2")
  shift 2
done
if (($# == 0)) || [[ $1 == -* ]]; then usage; fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then echo "error: this is a batch script: sbatch slurm/train.sh $*" >&2; exit 2; fi
export PATH="${SAT_VENV:-$PWD/.venv}/bin:$PATH"

run=$(${CONTAINER:-} python -m sat.lives begin "$@") || exit
field() { scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o " $1=[^ ]*" | cut -d= -f2-; }
ln -sfn "$(field StdOut)" "$run/job-$SLURM_JOB_ID.out"

bash slurm/on_all_nodes.sh train "${options[@]}" "$@" &
work=$!
while kill -0 "$work" 2>/dev/null; do
  if ((asked)); then
    (set -o noclobber; echo "$SLURM_JOB_ID" >"$run/STOP") 2>/dev/null # again and again: a run that starts up takes it for an old one
    sleep 1
  else
    wait "$work"
  fi
done
wait "$work"
status=$?

${CONTAINER:-} python -m sat.lives end "$run" "$status" "$asked"
verdict=$?
if [[ -f $run/STOP && $(<"$run/STOP") == "$SLURM_JOB_ID" ]]; then rm "$run/STOP"; fi
if ((verdict != 75)) || [[ $(field JobState) != RUNNING ]]; then exit "$verdict"; fi # a job that was cancelled stays so
if ! scontrol requeue "$SLURM_JOB_ID"; then
  echo "error: Slurm does not queue this job again; submit it once more, it goes on" >&2
  exit 75
fi
trap - USR1 TERM
exec sleep 120 # Slurm ends this life meanwhile
