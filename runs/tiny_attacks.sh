#!/bin/sh
# The attack on the small model: its two controls, every edit of tiny_edits.sh, located and random
# neurons switched off, and every mitigation that can be attacked, all with the same budgets. Tables
# and curves are in results/tables, the runs in results/metrics_tiny, where the edit table and
# report.py find them. Running it again goes on. $1: the Python to use. Bigger: ROWS=0-23
# STARTS=prompt,gaussian,unrelated BUDGETS=0,5,10,20,50,100,200,500. Two processes:
# LAUNCH='accelerate launch --multi_gpu --num_processes=2'. A table of a start wants its controls, so
# CONTROL_STARTS has at least the same ones.
set -eu
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false
python=${1:-python}
LAUNCH=${LAUNCH:-$python}     # what starts an attack
ROWS=${ROWS:-0,1,16,17}       # three VM prompts and a TM one
BUDGETS=${BUDGETS:-0,50,200}
COMPARED=${COMPARED:-50 200}  # steps, each with tables of its own
STARTS=${STARTS:-prompt}
# Whether it is an attack at all is seen from other starts than the prompt, on the unedited model.
case $STARTS in
    prompt | gaussian) CONTROL_STARTS=${CONTROL_STARTS:-prompt,gaussian} ;;
    *) CONTROL_STARTS=${CONTROL_STARTS:-$STARTS} ;;
esac
BATCH=${BATCH:-2}             # prompts that are attacked at once
NEURONS=${NEURONS:-tiny_model/planted_neurons.csv}
MODES=${MODES:-zero mean camouflage camouflage_hidden adversarial}
MITIGATIONS=${MITIGATIONS:-wanda attention_scaling embedding_adjustment embedding_noise \
    guidance_static guidance_dynamic guidance_opposite}
memorized=prompts/tiny_memorized_prompts.csv
originals=tiny_model/training_images
never_trained=results/never_trained
scores=results/metrics_tiny

# name, pictures that are aimed at, then what is attacked
attack() {
    name=$1 aim=$2
    shift 2
    # shellcheck disable=SC2086  # a launcher and its options
    $LAUNCH metrics/attack.py --rows="$ROWS" --budgets="$BUDGETS" -n=2 --batch_size="$BATCH" \
        -r="$aim" --sscd_weights=tiny_model/evaluators/copy_detector.pt \
        -o="$scores/attack_edit_$name.csv" --continue_run "$@"
}

# Controls: the first must succeed, the second must fail.
[ -d $never_trained ] ||
    "$python" tiny_model/draw_never_trained.py -p $memorized -o $never_trained
attack unedited $originals --version=tiny --original_images -d=$memorized \
    --starts="$CONTROL_STARTS"
attack never_trained $never_trained --version=tiny --original_images -d=$memorized \
    --starts="$CONTROL_STARTS"

# Each prompt's own neurons off, and as many random ones.
attack own_neurons $originals --version=tiny --refined_neurons -f="$NEURONS" --starts="$STARTS"
attack random_neurons $originals --version=tiny --block_random_neurons -f="$NEURONS" \
    --starts="$STARTS"

# Edited models, without the neurons of all prompts.
NEURONS=$NEURONS MODES=$MODES EDITS_ONLY=1 sh runs/tiny_edits.sh "$python"
case $STARTS in
    *unrelated*) unrelated=--unrelated_prompts=prompts/tiny_unmemorized_prompts.csv ;;
    *) unrelated= ;;
esac
for run in $MODES; do
    # shellcheck disable=SC2086  # no option where there is none
    attack "$run" $originals --version=edited_models/tiny_"$run" --original_images -d=$memorized \
        --starts="$STARTS" $unrelated
done

# Mitigations of others.
for run in $MITIGATIONS; do
    attack "$run" $originals --version=tiny --mitigation="$run" -d=$memorized \
        --starts="$STARTS"
done

# The tables. The edit table takes in what was attacked.
set --
for run in own_neurons random_neurons $MODES $MITIGATIONS; do
    set -- "$@" "$scores/attack_edit_$run.csv"
done
for start in $(echo "$STARTS" | tr , ' '); do
    for steps in $COMPARED; do
        "$python" metrics/attack_table.py "$@" --start="$start" --steps="$steps" \
            --control=$scores/attack_edit_unedited.csv \
            --never_trained=$scores/attack_edit_never_trained.csv \
            -o="results/tables/attacks_tiny_${start}_$steps.csv"
    done
done
# shellcheck disable=SC2086  # a list
"$python" metrics/make_edit_table.py --runs unedited $MODES --attack_steps="${COMPARED##* }" \
    --card=edited_models/tiny_ -o=results/tables/edits_tiny.csv
