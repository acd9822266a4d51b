#!/bin/sh
# Every table and figure of the paper, from prompts to one folder, for SD v1-4 on a GPU.
#
#   sh runs/paper.sh                                       one GPU
#   LAUNCH='accelerate launch --multi_gpu --num_processes=8' sh runs/paper.sh   eight
#   VERSION=v2-1 sh runs/paper.sh                          another model: its name, hub id or folder
#   VERSION=/path MEMORIZED=my.csv HOLDOUT=hold_out.csv STATISTICS_PROMPTS=hold_out.csv \
#     ORIGINALS=my_images DOWNLOAD=sscd sh runs/paper.sh   one that was trained on something else.
#     With fewer prompts also HOLDOUT_ROWS and TOKEN_ROWS (below), with fewer neurons TOP.
#   PLAN=1 sh runs/paper.sh                                only print the commands
#
# A stage that is done is skipped, one that was interrupted goes on: run it again. All output goes to
# one log, a line a command to the screen. It ends with $FOLDER: tables, figures, log, plan, exact
# versions, and the record of every run.
#
# Times are for SD v1-4 in half precision on one A100. "published" are the paper's. "estimate" is
# work by speed: 803 GFLOP a U-Net row, 120 TFLOP/s sustained; nobody has measured it. One run of
# pictures is 500 prompts x 10 samples x 50 steps x 2 halves of guidance: 0.9 h by estimate, so the
# 42 runs below take about 38 h. Nine searches come on top: 6.4 h each at the most with the authors'
# code (twice that with guidance), less with ours, whose evaluations are cheaper. Together 40 to 100 h
# on one A100, a share of that on several.
# shellcheck disable=SC2086  # options that may be several, or none, are split on purpose
set -eu
cd "$(dirname "$0")/.."

# What another model, or a smaller run, sets differently (runs/tiny.sh does).
VERSION=${VERSION:-v1-4}
PYTHON=${PYTHON:-python}
LAUNCH=${LAUNCH:-}                      # how what shares its work is started
MEMORIZED=${MEMORIZED:-prompts/memorized_laion_prompts.csv}
HOLDOUT=${HOLDOUT:-prompts/unmemorized_laion_prompts.csv}
STATISTICS_PROMPTS=${STATISTICS_PROMPTS:-} # ordinary captions, where not those of the version
ORIGINALS=${ORIGINALS:-original_images} # training images
DOWNLOAD=${DOWNLOAD-prompts sscd training_images} # what prompts/download.py fetches first
SSCD=${SSCD:-}                          # --sscd_weights=FILE, where not the published network
CLIP=${CLIP:-}                          # --clip_model=DIR, likewise
SAMPLES=${SAMPLES:-10}                  # pictures of each prompt
BATCH=${BATCH:-10}                      # pictures per pass
REPETITIONS=${REPETITIONS:-0 1 2 3 4}   # seeds of the random neurons
TOP=${TOP:-1 5 10 25 50}                # the k most frequent neurons
PRUNING=${PRUNING:-0.001 0.1}           # shares of weights, beside the usual 0.01
# Rows, where not all: of the memorized prompts in the ablations, of the hold-out prompts as
# pictures, in the baselines' detection, and for the ablations' thresholds.
ABLATION_ROWS=${ABLATION_ROWS:-}
HOLDOUT_ROWS=${HOLDOUT_ROWS:-0-99}
DETECTOR_ROWS=${DETECTOR_ROWS:-}
THRESHOLD_ROWS=${THRESHOLD_ROWS:-}
TOKEN_ROWS=${TOKEN_ROWS:-0-99}          # of the memorized prompts whose tokens are looked at

# As utils/versions.py has it.
named=$VERSION
[ ! -d "$VERSION" ] || named=$(cd "$VERSION" && pwd)
tag=$(printf %s "$(basename "$named")" | tr -cs '0-9A-Za-z' '_' | sed 's/^_*//;s/_*$//')
FOLDER=${FOLDER:-results/paper_$tag}
model=--version=$VERSION
scores=results/metrics_$tag
found=results/neurons_$tag
main=results/memorization_statistics_$tag.csv
threshold=statistics/pairwise_ssim_$tag.pt
some=${ABLATION_ROWS:+--rows=$ABLATION_ROWS}
log=$FOLDER/log.txt
gaps=0

# How a command runs.

# In one process: python and its arguments.
run() {
    step "$PYTHON" "$@" --continue_run
}

# By as many processes as LAUNCH starts. A launcher ends with 1 whatever went wrong: then one process
# does what is left, or says why it cannot be done.
launch() {
    if [ -z "$LAUNCH" ]; then
        run "$@"
        return
    fi
    before=$gaps
    gaps=0
    step $LAUNCH "$@" --continue_run
    if [ "$gaps" = 1 ]; then
        gaps=0
        run "$@"
    fi
    [ "$before" = 0 ] || gaps=1
}

# A command as it can be typed.
typed() {
    line=
    for word; do
        case $word in *[!A-Za-z0-9_=.,:/@%+-]*) word="'$word'" ;; esac
        line="$line${line:+ }$word"
    done
    echo "$line"
}

# Prints a command with the seconds it took. Exit code 1 means that something is missing from its
# result (the log names it): the run goes on, and ends with that code.
step() {
    if [ -n "${PLAN:-}" ]; then
        typed "$@"
        return
    fi
    began=$(date +%s)
    code=0
    echo "\$ $(typed "$@")" >>"$log"
    "$@" >>"$log" 2>&1 || code=$?
    echo "$(($(date +%s) - began)) s: $(typed "$@")" | tee -a "$log"
    case $code in
        0) ;;
        1) gaps=1 ;;
        *)
            tail -n 3 "$log" >&2
            echo "stopped with code $code; see $log, then run the same again" >&2
            exit "$code"
            ;;
    esac
}

# Pictures of a run: its name, then script 4's mode and options.
pictures() {
    name=$1
    shift
    launch 4_generate_images.py "$model" "$@" -n="$SAMPLES" -b="$BATCH" \
        -o="generated_images/${tag}_$name"
}

# The paper's four metrics of a run's pictures: its name, then options for all four.
measure() {
    name=$1
    shift
    against "$name" unblocked "$MEMORIZED" "$@"
    run metrics/compute_sscd_orig.py -p="$MEMORIZED" -f="generated_images/${tag}_$name" \
        -r="$ORIGINALS" $SSCD "$@" -o="$scores/sscd_orig_$name.csv"
}

# Three of them, which need no training images: the run, the unblocked run, the prompt file, options.
against() {
    name=$1
    unblocked=$2
    prompts=$3
    shift 3
    folder=generated_images/${tag}_$name
    run metrics/compute_sscd_gen.py -p="$prompts" -f="$folder" \
        -r="generated_images/${tag}_$unblocked" $SSCD "$@" -o="$scores/sscd_gen_$name.csv"
    run metrics/compute_diversity.py -p="$prompts" -f="$folder" $SSCD "$@" \
        -o="$scores/diversity_$name.csv"
    run metrics/compute_prompt_alignment.py -p="$prompts" -f="$folder" $CLIP "$@" \
        -o="$scores/alignment_$name.csv"
}

# Neurons found in another way: the run's name, then script 3's options.
find_neurons() {
    name=$1
    shift
    launch 3_detect_memorized_neurons.py "$model" -d="$MEMORIZED" $some "$@" -o="$found/$name.csv"
}

# A run of an ablation that found neurons of its own, on some prompts: its name, script 4's options.
ablation() {
    name=$1
    shift
    pictures "$name" --refined_neurons -f="$found/$name.csv" $some "$@"
    measure "$name" $some
}

if [ "$VERSION" = v1-4 ] && [ -n "$STATISTICS_PROMPTS" ]; then
    echo "STATISTICS_PROMPTS: the statistics of v1-4 are the published ones; leave it out" >&2
    exit 2
fi
[ -n "${PLAN:-}" ] || mkdir -p "$FOLDER"
# One training image more, and the scores that are there would be of other ones than those to come.
if [ -z "${PLAN:-}" ] && [ -e "$scores/sscd_orig_unblocked.csv" ]; then
    DOWNLOAD=$(printf '%s\n' "$DOWNLOAD" | sed 's/training_images//')
fi

# 1. Prompts, SSCD and training images (minutes, and as long as the training images take), and what
#    ordinary text does to every neuron: published for v1-4, else 50,000 captions through the text
#    encoder (estimate: 20 min).
if [ "$VERSION" = v1-4 ]; then
    step "$PYTHON" prompts/download.py $DOWNLOAD statistics
else
    [ -z "${DOWNLOAD# }" ] || step "$PYTHON" prompts/download.py $DOWNLOAD
    run 1_compute_activations_statistics.py "$model" \
        ${STATISTICS_PROMPTS:+"--prompts=$STATISTICS_PROMPTS"}
fi

# 2. The threshold, mean + 1 standard deviation over hold-out prompts (estimate: 2 min).
launch 2_compute_pairwise_ssim.py "$model" --prompts="$HOLDOUT"

# 3. Which prompts are memorized, and by which neurons (published, for the authors' code on an A100:
#    15.7 s per VM and 45.9 s per TM prompt, so 6.4 h at the most; scoring alone, estimate: 2 min).
launch 3_detect_memorized_neurons.py "$model" -d="$MEMORIZED" --detect_only
launch 3_detect_memorized_neurons.py "$model" -d="$MEMORIZED"

# 4. Pictures with all neurons on, with the located ones off, and with as many random ones off
#    (table 1; estimate: 0.9 h a run, 2 min for its metrics).
pictures unblocked --original_images -d="$MEMORIZED"
measure unblocked
pictures blocked --refined_neurons
measure blocked
for seed in $REPETITIONS; do
    pictures "random_$seed" --block_random_neurons --random_seed="$seed"
    measure "random_$seed"
done

# 5. Other methods against memorization, the same prompts and seeds (table 1; estimate: 0.9 h a run;
#    embedding adjustment 1.2 h).
other_method() {
    name=$1
    shift
    pictures "$name" -d="$MEMORIZED" "$@"
    measure "$name"
}
other_method embedding_adjustment --mitigation=embedding_adjustment
other_method attention_scaling --mitigation=attention_scaling
for count in 1 4 10; do
    other_method "random_tokens_$count" --mitigation=random_tokens \
        --mitigation_options="count=$count"
done
other_method random_numbers --mitigation=random_numbers
other_method repeated_words --mitigation=repeated_words
other_method embedding_noise --mitigation=embedding_noise
other_method guidance_static --mitigation=guidance_static
other_method guidance_dynamic --mitigation=guidance_dynamic
other_method guidance_opposite --mitigation=guidance_opposite
other_method wanda --mitigation=wanda
for share in $PRUNING; do
    other_method "wanda_$share" --mitigation=wanda --mitigation_options="share=$share"
done

# 6. Ablations of the search (table 4): each finds its neurons (as stage 3) and makes its pictures.
#    With guidance the threshold is measured anew (estimate: 4 min).
subset=${THRESHOLD_ROWS:+--rows=$THRESHOLD_ROWS}
launch 2_compute_pairwise_ssim.py "$model" --prompts="$HOLDOUT" $subset --guidance_scale=7 \
    -o="statistics/pairwise_ssim_${tag}_guidance.pt"
find_neurons guidance --guidance_scale=7 \
    --threshold_file="statistics/pairwise_ssim_${tag}_guidance.pt"
ablation guidance
find_neurons tau_minus_1_std --threshold_stds=-1
ablation tau_minus_1_std
find_neurons tau_mean --threshold_stds=0
ablation tau_mean
find_neurons tau_plus_2_std --threshold_stds=2
ablation tau_plus_2_std
find_neurons no_top_k --no_top_k
ablation no_top_k

# 7. The other protocol, of the same prompts as the first: threshold (estimate: 2 min), search (as
#    stage 3), pictures (estimate: 0.9 h).
some=
launch 2_compute_pairwise_ssim.py "$model" --prompts="$HOLDOUT" --protocol=paper \
    -o="statistics/pairwise_ssim_${tag}_paper.pt"
find_neurons paper_protocol --protocol=paper \
    --threshold_file="statistics/pairwise_ssim_${tag}_paper.pt"
ablation paper_protocol --protocol=paper
some=${ABLATION_ROWS:+--rows=$ABLATION_ROWS}

# 8. Ablations of blocking: the initial sets, and other factors than 0 (table 4; 0.9 h a run).
pictures no_refinement --initial_neurons $some
measure no_refinement $some
for factor in 0.75 0.5 0.25 -0.25 -0.5 -0.75 -1; do
    pictures "factor_$factor" --refined_neurons --scaling_factor="$factor" $some
    measure "factor_$factor" $some
done

# 9. Value layers of the up blocks (appendix C.8): searched with the others, and alone. Twice
#    statistics (estimate: 20 min), search (as stage 3) and pictures (estimate: 0.9 h).
for blocks in down,mid,up up; do
    name=blocks_$(echo "$blocks" | tr , _)
    run 1_compute_activations_statistics.py "$model" --blocks="$blocks" \
        ${STATISTICS_PROMPTS:+"--prompts=$STATISTICS_PROMPTS"} \
        -o="statistics/statistics_${tag}_$name.pt"
    find_neurons "$name" --blocks="$blocks" --statistics="statistics/statistics_${tag}_$name.pt"
    ablation "$name" --blocks="$blocks"
done

# 10. One set for all prompts, the neurons located most often: what it does to memorized prompts and
#    to hold-out prompts, which have no neurons of their own (0.9 h a run, less for some rows).
pictures holdout_unblocked --original_images --unmemorized_prompts="$HOLDOUT" \
    --rows="$HOLDOUT_ROWS"
against holdout_unblocked holdout_unblocked "$HOLDOUT" --rows="$HOLDOUT_ROWS"
for k in $TOP; do
    pictures "top_$k" --block_top_k_neurons="$k" $some
    measure "top_$k" $some
    pictures "holdout_top_$k" --block_top_k_neurons="$k" --unmemorized_prompts="$HOLDOUT" \
        --rows="$HOLDOUT_ROWS"
    against "holdout_top_$k" holdout_unblocked "$HOLDOUT" --rows="$HOLDOUT_ROWS"
done

# 11. Detection (B.4): our score and two others with two readings each, memorized against hold-out
#     prompts (estimate: 0.7 h for the text-conditional noise, 0.2 h for attention entropy).
detection() {
    name=$1 with=$2 without=$3
    shift 3
    run metrics/compute_detection.py --memorized="$with" --unmemorized="$without" -p="$MEMORIZED" \
        "$@" -o="$scores/detection_$name.csv"
}
detection pairwise_ssim "results/memorization_scores_$tag.csv" "$threshold"
subset=${DETECTOR_ROWS:+--rows=$DETECTOR_ROWS}
for detector in text_conditional_noise attention_entropy; do
    name=results/detectors/${detector}_$tag
    launch metrics/compute_detector_scores.py --detector="$detector" "$model" \
        --prompts="$MEMORIZED" -o="${name}_memorized.csv"
    launch metrics/compute_detector_scores.py --detector="$detector" "$model" \
        --prompts="$HOLDOUT" $subset -o="${name}_unmemorized.csv"
    set -- "${name}_memorized.csv" "${name}_unmemorized.csv"
    detection "$detector" "$@"
    case $detector in
        text_conditional_noise)
            detection "${detector}_first_step" "$@" --score_column='Score First Step'
            ;;
        *) detection "${detector}_e" "$@" --score_column='Score E' ;;
    esac
done
#     The tokens of a prompt that make it memorized, by gradient (Wen et al.), as coloured words
#     (estimate: 15 min for 100 prompts).
launch metrics/attribute_tokens.py "$model" --prompts="$MEMORIZED" --rows="$TOKEN_ROWS" \
    -o="results/attribution/${tag}.csv"

# 12. Disentanglement (table 3): random neurons, and the located ones (estimate: 5 min).
launch metrics/compute_disentanglement.py "$model" -p="$MEMORIZED" $some \
    -o="$scores/disentanglement_random.csv"
launch metrics/compute_disentanglement.py "$model" -p="$MEMORIZED" $some -k=1 -f="$main" \
    -o="$scores/disentanglement_located.csv"

# 13. Tables, figures (two of them make a few U-Net passes), and all of it in one folder (minutes).
step "$PYTHON" metrics/make_tables.py "$model" -p="$MEMORIZED" --holdout="$HOLDOUT" \
    -o="$FOLDER/tables"
step "$PYTHON" metrics/make_figures.py "$model" -p="$MEMORIZED" --holdout="$HOLDOUT" \
    --originals="$ORIGINALS" -o="$FOLDER/figures"
step "$PYTHON" runs/collect.py "$model" -o="$FOLDER"
exit "$gaps"
