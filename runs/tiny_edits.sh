#!/bin/sh
# The edit table on the small model: every mode of script 5, what is left of the copies, what it
# costs on other prompts, and whether the weights show it. Running it again goes on, and takes into
# the table what tiny_attacks.sh has measured. $1: the Python to use. Smaller: PICTURES=0-24
# STEPS=20, or fewer MODES (adversarial trains the whole U-Net). EDITS_ONLY=1 writes the edited
# models alone.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python}
# Which neurons: those that were planted; a result file of script 3 does as well.
NEURONS=${NEURONS:-tiny_model/planted_neurons.csv}
MODES=${MODES:-zero mean camouflage camouflage_hidden adversarial}
SAMPLES=${SAMPLES:-2}
# Hold-out prompts for the quality of other pictures, and pictures of each. All prompts share their
# noises, and one noise makes all its pictures alike: several are needed before sets can be compared.
PICTURES=${PICTURES:-0-49}
NOISES=${NOISES:-4}
STEPS=${STEPS:-50}
ATTACK_STEPS=${ATTACK_STEPS:-200} # of tiny_attacks.sh
export TOKENIZERS_PARALLELISM=false
memorized=prompts/tiny_memorized_prompts.csv
others=prompts/tiny_unmemorized_prompts.csv
originals=tiny_model/training_images
sscd=--sscd_weights=tiny_model/evaluators/copy_detector.pt
clip=--clip_model=tiny_model/evaluators/image_text
scores=results/metrics_tiny

model_of() { # $1: name of the run
    [ "$1" = unedited ] && echo tiny || echo "edited_models/tiny_$1"
}

# $1: name of the run; $2: of the edited model; then more options
edit() {
    run=$1 edited=$2
    shift 2
    case $run in
        # The most hidden camouflage: rows that only look usual, whatever they did before.
        camouflage_hidden) set -- --mode=camouflage --ridge=10 "$@" ;;
        adversarial)
            set -- --mode=adversarial --reference="$originals" --batch_size=16 "$@"
            ;;
        *) set -- --mode="$run" "$@" ;;
    esac
    "$python" 5_edit_model.py --version=tiny -f="$NEURONS" "$@" -o="edited_models/tiny_$edited" \
        --continue_run
}

# $1: model; $2: name of the table; then which rows are to be found
detect() {
    version=$1 name=$2
    shift 2
    "$python" metrics/detect_edited_rows.py --version="$version" "$@" -o="$scores/$name.csv" \
        --continue_run
}

# The edits.
for run in $MODES; do
    edit "$run" "$run"
done
[ -z "${EDITS_ONLY:-}" ] || exit 0

# What their weights show, to who has nothing else.
detect tiny edited_rows_edit_unedited -f="$NEURONS"
for run in $MODES; do
    detect "$(model_of "$run")" edited_rows_edit_"$run" --neurons="$(model_of "$run").json"
done

# The planted neurons stand out before any edit. What an edit itself shows: as many ordinary rows of
# the same layers, edited alike. (After adversarial training no row is as it was.)
detect tiny edited_rows_ordinary_edit_unedited -f="$NEURONS" --random_neurons=0
for run in $MODES; do
    [ "$run" != adversarial ] || continue
    edit "$run" ordinary_"$run" --random_neurons=0
    detect edited_models/tiny_ordinary_"$run" edited_rows_ordinary_edit_"$run" \
        --neurons=edited_models/tiny_ordinary_"$run".json
done

# What is left of the copies.
for run in unedited $MODES; do
    images=generated_images/tiny_edit_$run
    "$python" 4_generate_images.py --version="$(model_of "$run")" --original_images -d=$memorized \
        --steps="$STEPS" -n="$SAMPLES" -b=24 -o="$images" --continue_run
    "$python" metrics/compute_sscd_orig.py -p=$memorized -f="$images" -r=$originals $sscd \
        -o=$scores/sscd_orig_edit_"$run".csv --continue_run
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
"$python" metrics/make_edit_table.py --runs unedited $MODES --attack_steps="$ATTACK_STEPS" \
    --card=edited_models/tiny_ -o=results/tables/edits_tiny.csv
