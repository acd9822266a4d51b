#!/bin/sh
# The pipeline on the small model that ships with the project, then what it found.
# Run it with `make demo`; running it again re-uses what is there. $1: the Python to use.
set -eu
python=${1:-python}
# What ordinary text does to every neuron (seconds).
"$python" 1_compute_activations_statistics.py --version=tiny --continue_run
# How alike ordinary prompts are over seeds: the threshold (about a minute).
"$python" 2_compute_pairwise_ssim.py --version=tiny --continue_run
# Which prompts are memorized, and by which neurons (minutes).
"$python" 3_detect_memorized_neurons.py --version=tiny --detect_only --continue_run
"$python" 3_detect_memorized_neurons.py --version=tiny --continue_run
# Pictures before and after (minutes).
"$python" 4_generate_images.py --version=tiny --original_images -n=4 -b=24 \
    -o=generated_images/tiny_unblocked --continue_run
"$python" 4_generate_images.py --version=tiny --refined_neurons -n=4 -b=24 \
    -o=generated_images/tiny_blocked --continue_run
# The table and the contact sheet.
"$python" runs/demo_report.py
