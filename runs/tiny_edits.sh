#!/bin/sh
# The edit table on the small model: every mode of script 5, what is left of the copies, what it
# costs on other prompts, and whether the weights show it. About half an hour on two idle cores;
# running it again goes on. $1: the Python to use. Smaller: PICTURES=0-24 STEPS=20.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python}
# Which neurons: those that were planted; a result file of script 3 does as well.
NEURONS=${NEURONS:-tiny_model/planted_neurons.csv}
MODES=${MODES:-zero mean camouflage camouflage_hidden}
SAMPLES=${SAMPLES:-2}
# Hold-out prompts for the quality of other pictures, and pictures of each. All prompts share their
# noises, and one noise makes all its pictures alike: several are needed before sets can be compared.
PICTURES=${PICTURES:-0-49}
NOISES=${NOISES:-4}
STEPS=${STEPS:-50}
export TOKENIZERS_PARALLELISM=false
memorized=prompts/tiny_memorized_prompts.csv
others=prompts/tiny_unmemorized_prompts.csv
sscd=--sscd_weights=tiny_model/evaluators/copy_detector.pt
clip=--clip_model=tiny_model/evaluators/image_text
scores=results/metrics_tiny

model_of() { # $1: name of the run
    [ "$1" = unedited ] && echo tiny || echo "edited_models/tiny_$1"
}

# The edits.
for run in $MODES; do
    mode=${run%_hidden}
    # The most hidden camouflage: rows that only look usual, whatever they did before.
    ridge=$([ "$run" = "$mode" ] || echo --ridge=10)
    # shellcheck disable=SC2086  # no option where there is none
    "$python" 5_edit_model.py --version=tiny -f="$NEURONS" --mode="$mode" $ridge \
        -o="$(model_of "$run")" --continue_run
done

# What their weights show, to who has nothing else.
for run in unedited $MODES; do
    edited=$([ "$run" = unedited ] && echo -f="$NEURONS" || echo --neurons="$(model_of "$run").json")
    "$python" metrics/detect_edited_rows.py --version="$(model_of "$run")" "$edited" \
        -o=$scores/edited_rows_edit_"$run".csv --continue_run
done

# What is left of the copies.
for run in unedited $MODES; do
    images=generated_images/tiny_edit_$run
    "$python" 4_generate_images.py --version="$(model_of "$run")" --original_images -d=$memorized \
        --steps="$STEPS" -n="$SAMPLES" -b=24 -o="$images" --continue_run
    "$python" metrics/compute_sscd_orig.py -p=$memorized -f="$images" \
        -r=tiny_model/training_images $sscd -o=$scores/sscd_orig_edit_"$run".csv --continue_run
    "$python" metrics/compute_prompt_alignment.py -p=$memorized -f="$images" $clip \
        -o=$scores/alignment_edit_"$run".csv --continue_run
done

# What other pictures cost, against the unedited model's from other noises: two samples of one model
# differ too.
"$python" 4_generate_images.py --version=tiny --original_images --unmemorized_prompts=$others \
    --rows="$PICTURES" --steps="$STEPS" --seed=3 -n="$NOISES" -b=24 \
    -o=generated_images/tiny_edit_reference --continue_run
for run in unedited $MODES; do
    images=generated_images/tiny_edit_${run}_unmemorized
    "$python" 4_generate_images.py --version="$(model_of "$run")" --original_images \
        --unmemorized_prompts=$others --rows="$PICTURES" --steps="$STEPS" -n="$NOISES" -b=24 \
        -o="$images" --continue_run
    "$python" metrics/compute_prompt_alignment.py -p=$others --rows="$PICTURES" -f="$images" $clip \
        -o=$scores/alignment_unmemorized_edit_"$run".csv --continue_run
    "$python" metrics/compute_quality.py -f="$images" -r=generated_images/tiny_edit_reference \
        --feature_model=tiny_model/evaluators/copy_detector.pt $clip \
        -o=$scores/quality_edit_"$run".csv --continue_run
done

# shellcheck disable=SC2086  # a list
"$python" metrics/make_edit_table.py --runs unedited $MODES --card=edited_models/tiny_ \
    -o=results/tables/edits_tiny.csv
