#!/bin/sh
# The pipeline on the small model that ships with the project, then what it found.
# Run it with `make demo`; running it again re-uses what is there. $1: the Python to use. A GPU is not
# used, so that `make paper-tiny` can go on with the same outputs.
set -eu
export CUDA_VISIBLE_DEVICES=
python=${1:-python}
# What ordinary text does to every neuron (seconds).
"$python" 1_compute_activations_statistics.py --version=tiny --continue_run
# How alike ordinary prompts are over seeds: the threshold (about a minute).
"$python" 2_compute_pairwise_ssim.py --version=tiny --continue_run
# Which prompts are memorized, and by which neurons (half a minute).
"$python" 3_detect_memorized_neurons.py --version=tiny --detect_only --continue_run
"$python" 3_detect_memorized_neurons.py --version=tiny --continue_run
# Pictures before and after (two minutes).
"$python" 4_generate_images.py --version=tiny --original_images -n=4 -b=24 \
    -o=generated_images/tiny_unblocked --continue_run
"$python" 4_generate_images.py --version=tiny --refined_neurons -n=4 -b=24 \
    -o=generated_images/tiny_blocked --continue_run
# The paper's metrics, with the small evaluators in the place of SSCD, CLIP and Inception (a minute).
"$python" metrics/compute_sscd_gen.py -p=prompts/tiny_memorized_prompts.csv \
    -f=generated_images/tiny_blocked -r=generated_images/tiny_unblocked \
    --sscd_weights=tiny_model/evaluators/copy_detector.pt \
    -o=results/metrics_tiny/sscd_gen.csv --continue_run
"$python" metrics/compute_sscd_orig.py -p=prompts/tiny_memorized_prompts.csv \
    -f=generated_images/tiny_unblocked -r=tiny_model/training_images \
    --sscd_weights=tiny_model/evaluators/copy_detector.pt \
    -o=results/metrics_tiny/sscd_orig_unblocked.csv --continue_run
"$python" metrics/compute_sscd_orig.py -p=prompts/tiny_memorized_prompts.csv \
    -f=generated_images/tiny_blocked -r=tiny_model/training_images \
    --sscd_weights=tiny_model/evaluators/copy_detector.pt \
    -o=results/metrics_tiny/sscd_orig_blocked.csv --continue_run
"$python" metrics/compute_diversity.py -p=prompts/tiny_memorized_prompts.csv \
    -f=generated_images/tiny_unblocked \
    --sscd_weights=tiny_model/evaluators/copy_detector.pt \
    -o=results/metrics_tiny/diversity_unblocked.csv --continue_run
"$python" metrics/compute_diversity.py -p=prompts/tiny_memorized_prompts.csv \
    -f=generated_images/tiny_blocked \
    --sscd_weights=tiny_model/evaluators/copy_detector.pt \
    -o=results/metrics_tiny/diversity_blocked.csv --continue_run
"$python" metrics/compute_prompt_alignment.py -p=prompts/tiny_memorized_prompts.csv \
    -f=generated_images/tiny_unblocked --clip_model=tiny_model/evaluators/image_text \
    -o=results/metrics_tiny/alignment_unblocked.csv --continue_run
"$python" metrics/compute_prompt_alignment.py -p=prompts/tiny_memorized_prompts.csv \
    -f=generated_images/tiny_blocked --clip_model=tiny_model/evaluators/image_text \
    -o=results/metrics_tiny/alignment_blocked.csv --continue_run
"$python" metrics/compute_quality.py -f=generated_images/tiny_blocked \
    -r=generated_images/tiny_unblocked \
    --feature_model=tiny_model/evaluators/copy_detector.pt \
    --clip_model=tiny_model/evaluators/image_text \
    -o=results/metrics_tiny/quality.csv --continue_run
"$python" metrics/compute_detection.py --memorized=results/memorization_scores_tiny.csv \
    --unmemorized=statistics/pairwise_ssim_tiny.pt -p=prompts/tiny_memorized_prompts.csv \
    -o=results/metrics_tiny/detection.csv --continue_run
"$python" metrics/classify_memorization.py -p=prompts/tiny_memorized_prompts.csv \
    -f=generated_images/tiny_unblocked -r=tiny_model/training_images \
    --scores=results/memorization_scores_tiny.csv \
    --sscd_weights=tiny_model/evaluators/copy_detector.pt \
    -o=results/metrics_tiny/classification.csv --continue_run
"$python" metrics/compute_disentanglement.py --version=tiny --rows=0-9 \
    -o=results/metrics_tiny/disentanglement.csv --continue_run
# The tables and the contact sheet.
"$python" runs/demo_metrics.py
"$python" runs/demo_report.py
