#!/bin/sh
# The attack on the small model, on what is done against memorization, and on the fine-tuning that
# answers it: tables, curves and pictures in results/attacks. The edits
# are those of tiny_edits.sh. Some two hours on two idle cores (not measured yet); running it again
# goes on. $1: the Python to use. Smaller: ROWS=0-3 BUDGETS=0,50.
set -eu
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false
PYTHON=${1:-python}
ROWS=${ROWS:-0-7}
BUDGETS=${BUDGETS:-0,10,50,100,200}
NEURONS=${NEURONS:-tiny_model/planted_neurons.csv}
OUT=results/attacks
MEMORIZED=prompts/tiny_memorized_prompts.csv
ORIGINALS=tiny_model/training_images
[ -d "$OUT/never_trained" ] ||
    "$PYTHON" tiny_model/draw_never_trained.py -p "$MEMORIZED" -o "$OUT/never_trained"

# name, pictures that are aimed at, then what is attacked
attack() {
    name=$1 aim=$2
    shift 2
    "$PYTHON" metrics/attack.py --rows="$ROWS" --budgets="$BUDGETS" -n=2 -r="$aim" \
        --sscd_weights=tiny_model/evaluators/copy_detector.pt -o="$OUT/$name.csv" --continue_run "$@"
}

# Controls: the first must succeed, the second must fail at 50 steps.
attack unedited "$ORIGINALS" --version=tiny --original_images --starts=prompt,gaussian,unrelated
attack never_trained "$OUT/never_trained" --version=tiny --original_images

# Edits: hooks for each prompt's own neurons, and models of their own for the union.
attack own_neurons "$ORIGINALS" --version=tiny --refined_neurons -f="$NEURONS"
for mode in zero mean camouflage adversarial; do
    more=
    [ "$mode" = adversarial ] && more="--reference=$ORIGINALS"
    # shellcheck disable=SC2086
    "$PYTHON" 5_edit_model.py --version=tiny -f="$NEURONS" --mode="$mode" $more \
        -o="edited_models/tiny_$mode" --continue_run
    attack "$mode" "$ORIGINALS" --version="edited_models/tiny_$mode" --original_images \
        -d="$MEMORIZED" --unrelated_prompts=prompts/tiny_unmemorized_prompts.csv \
        --starts=prompt,unrelated
done

# Mitigations of others.
for name in wanda attention_scaling embedding_adjustment guidance_static; do
    attack "$name" "$ORIGINALS" --version=tiny --mitigation="$name" -d="$MEMORIZED"
done

rm -f "$OUT/table.csv" "$OUT/table.md" "$OUT/table.png"
"$PYTHON" metrics/attack_table.py "$OUT/unedited.csv" "$OUT/never_trained.csv" "$OUT/own_neurons.csv" \
    "$OUT/zero.csv" "$OUT/mean.csv" "$OUT/camouflage.csv" "$OUT/adversarial.csv" "$OUT/wanda.csv" \
    "$OUT/attention_scaling.csv" "$OUT/embedding_adjustment.csv" "$OUT/guidance_static.csv" \
    -o="$OUT/table.csv"
