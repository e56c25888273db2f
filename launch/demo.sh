#!/usr/bin/env bash
# The whole pipeline on rendered scenes, from an empty machine to a table of scores and a page of captioned pictures.
#
#   bash launch/demo.sh                        with EfficientNet-Lite0, whose ImageNet weights set-up brings
#   WEIGHTS=imagenet bash launch/demo.sh       with ImageNet weights (python -m preprocessing.fetch_weights), or WEIGHTS=FILE
#   SCENES=24 EPOCHS=1 bash launch/demo.sh     as small as it gets: training scenes, epochs
#
# Each such choice has folders of its own under data/ and runs/; OUT=FOLDER puts data, runs and weights there.
# Each command is printed before it runs; they are the programs that COCO would run through. What is whole is reused, so an
# interrupted demonstration goes on where it was. Its minutes count from the first start to the first table, pauses left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/functions.sh

extraction=(--size 160 --stage 4) # 10x10 cells, from where shapes and colours still stand in the features
if [[ -n ${WEIGHTS:-} ]]; then extraction=(--size 224); fi

out=${OUT:+$OUT/}
name=demo${SCENES:+-scenes$SCENES}
data=${out}data/$name
name+=${WEIGHTS:+-$(basename "${WEIGHTS%.*}")}
weights=${WEIGHTS:-lite0}
case $weights in imagenet) encoder=weights ;; lite0) encoder=${out}weights ;; *) encoder=$weights ;; esac # found there by its digest
folder=${out}weights
if [[ $weights == imagenet ]]; then folder=weights; fi
features=${out}data/$name/features
tokenizer=${out}data/$name/tokenizer.json
run=${out}runs/$name${EPOCHS:+-epochs$EPOCHS}

mkdir -p "$run"
spent=$(cat "$run/seconds" 2>/dev/null || echo 0)
keep_time() { if [[ ! -f $run/summary.json ]]; then echo $((spent + SECONDS)) >"$run/seconds"; fi; }
trap keep_time EXIT

run bash launch/setup.sh
export PATH="${SAT_VENV:-$PWD/.venv}/bin:$PATH"
export PYTHONDONTWRITEBYTECODE= # the first import of a module compiles it for all later ones

processes_here

scenes=()
if [[ -n ${SCENES:-} ]]; then scenes=(--train "$SCENES" --val $((SCENES / 26 + 3)) --test $((SCENES * 3 / 26 + 6))); fi
run python -m preprocessing.synthetic --out "$data/scenes" "${scenes[@]}"
annotations=()
for split in train val test; do annotations+=(--annotations "$split=$data/scenes/annotations/captions_$split.json"); done
run python -m preprocessing.shard_images "${annotations[@]}" --images "$data/scenes/images" --out "$data/images"
run python -m preprocessing.extract_features --images "$data/images" --weights "$weights" --weights-dir "$folder" \
  "${extraction[@]}" --out "$features"
run python -m preprocessing.build_vocab --features "$features" --out "$tokenizer"

run sat train "${processes[@]}" configs/demo.yaml \
  "data.features=$features" "data.tokenizer=$tokenizer" "train.run_dir=$run" \
  ${EPOCHS:+"train.epochs=$EPOCHS"} ${SCENES:+train.warmup_steps=0}
run_unless_newer "$run/attention-test.npz" sat evaluate "${processes[@]}" "$run" \
  --split test --baselines --attention
run python -m preprocessing.check_scenes "$run" --scenes "$data/scenes" --split test
run_unless_newer "$run/pictures/captions.json" \
  python -m sat.caption "$data/scenes/images/test" --limit 8 --model "$run" --weights "$encoder" --out "$run/pictures"
run_unless_newer "$run/report-test.html" sat report "$run" --split test --all --pictures "$data/images"

keep_time
minutes=$(awk '{ printf "%.2f", $1 / 60 }' "$run/seconds")
run python -m sat.summary "$run" --split test --minutes "$minutes"
echo
run=$(realpath "$run")
echo "all test scenes on one page       $run/report-test.html"
echo "captions and attention pictures   $run/pictures"
echo "run folder                        $run"
echo "checkpoints                       $run/checkpoints (the best model: $run/best)"
echo "compare runs                      $(command -v mlflow) ui --backend-store-uri sqlite:///$(dirname "$run")/mlflow.db"
