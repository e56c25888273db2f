#!/usr/bin/env bash
# Flickr8k from its folder to scores, attention pictures and an MLflow run.
#
#   bash launch/flickr8k.sh FOLDER             FOLDER holds the pictures, Flickr8k.token.txt and the lists of its official splits, in any sub-folders
#   bash launch/flickr8k.sh FOLDER train.seed=2 train.run_dir=runs/flickr8k-seed2      settings over those of configs/flickr8k.yaml
#   SIZE=224 bash launch/flickr8k.sh FOLDER    another side of the encoder's input: 224 gives 7x7 cells, 288 (the default) 9x9
#   WEIGHTS=imagenet bash launch/flickr8k.sh FOLDER    ResNet-50 (python -m preprocessing.fetch_weights) instead of EfficientNet-Lite2; WEIGHTS=lite0, or WEIGHTS=FILE
#
# Data, run and weights go to data/flickr8k, runs/flickr8k and weights, or to those below OUT=FOLDER.
# Every second picture of the dev list chooses the checkpoint (split `val`), the others are reported (split `held_out`); where the official test split
# is there, it is reported too. Each command is printed before it runs; what is whole is reused, so a second call goes on where the first ended.
set -euo pipefail
folder=${1:?usage: bash launch/flickr8k.sh FOLDER [KEY=VALUE ...]}
if [[ ! -d $folder ]]; then echo "error: there is no folder $folder" >&2; exit 1; fi
folder=$(realpath "$folder")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/functions.sh

size=${SIZE:-288}
weights=${WEIGHTS:-lite2}
out=${OUT:+$OUT/}
data=${out}data/flickr8k
features=$data/features-$(basename "${weights%.*}")-$size
run=$(printf '%s\n' "train.run_dir=${out}runs/flickr8k" "$@" | sed -n 's/^train\.run_dir=//p' | tail -1)

find_one() { # NAME: where it lies below FOLDER
  local found
  found=$(find -L "$folder" -name "$1" -print -quit)
  if [[ -z $found ]]; then echo "error: $folder holds no $1, which belongs to Flickr8k" >&2; return 1; fi
  echo "$found"
}
captions=$(find_one Flickr8k.token.txt)
train=$(find_one Flickr_8k.trainImages.txt)
dev=$(find_one Flickr_8k.devImages.txt)
images=$(dirname "$(find_one "$(head -1 "$train" | tr -d '\r')")")

run bash launch/setup.sh
export PATH="${SAT_VENV:-$PWD/.venv}/bin:$PATH"
processes_here
mkdir -p "$data"
awk 'NR % 2 == 1' "$dev" >"$data/val.txt"
awk 'NR % 2 == 0' "$dev" >"$data/held_out.txt"
splits=(--split "train=$train" --split "val=$data/val.txt" --split "held_out=$data/held_out.txt")
reported=(held_out)
if test=$(find_one Flickr_8k.testImages.txt 2>/dev/null) && [[ -f $images/$(head -1 "$test" | tr -d '\r') ]]; then
  splits+=(--split "test=$test")
  reported+=(test)
fi

run python -m preprocessing.shard_images --annotations "$captions" "${splits[@]}" --images "$images" --out "$data/images"
run python -m preprocessing.extract_features --images "$data/images" --weights "$weights" --weights-dir "${out}weights" --size "$size" \
  --out "$features"
run python -m preprocessing.build_vocab --features "$features" --out "$data/tokenizer.json"
run sat train "${processes[@]}" configs/flickr8k.yaml \
  "data.features=$features" "data.tokenizer=$data/tokenizer.json" "train.run_dir=$run" "$@"
for split in "${reported[@]}"; do
  run_unless_newer "$run/evaluation-$split.json" sat evaluate "${processes[@]}" "$run" --split "$split" --baselines
done
mapfile -t shown < <(head -8 "$data/held_out.txt" | tr -d '\r' | sed "s#^#$images/#")
run_unless_newer "$run/pictures/captions.json" sat caption "${shown[@]}" --model "$run" --weights "${out}weights" --out "$run/pictures"
run sat summary "$run" --split held_out
echo
echo "attention pictures  $run/pictures"
echo "compare runs        mlflow ui --backend-store-uri sqlite:///$(realpath "$(dirname "$run")")/mlflow.db"
