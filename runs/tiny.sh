#!/bin/sh
# Every table and figure of the paper on the small model that ships with the project, from nothing to
# one folder, results/paper_tiny: runs/paper.sh with fewer pictures and rows. At most an hour on two
# cores without a GPU. Run it with `make paper-tiny`; running it again goes on. $1: the Python to use.
set -eu
export TOKENIZERS_PARALLELISM=false
export TQDM_MININTERVAL=20 # the log is no screen
evaluators=tiny_model/evaluators
VERSION=tiny
DOWNLOAD= # all of it ships
PYTHON=${1:-python}
# Two processes of one thread do more than one process of two; LAUNCH= turns it off. The plan names the
# scripts alone. A GPU is not used.
[ -n "${PLAN:-}" ] ||
    LAUNCH=${LAUNCH-"$PYTHON -m torch.distributed.run --standalone --nproc_per_node=2"}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES=
MEMORIZED=prompts/tiny_memorized_prompts.csv
HOLDOUT=prompts/tiny_unmemorized_prompts.csv
ORIGINALS=tiny_model/training_images
# The small evaluators in the place of SSCD and CLIP.
SSCD=--sscd_weights=$evaluators/copy_detector.pt
CLIP=--clip_model=$evaluators/image_text
SAMPLES=${SAMPLES:-4}
BATCH=${BATCH:-24}
REPETITIONS=${REPETITIONS:-0 1}
TOP=${TOP:-1 5 10}
# A smaller share leaves no weight: rows have 128 and 256.
PRUNING=${PRUNING:-0.005 0.1}
# 8 of the 16 VM and 4 of the 8 TM prompts in the ablations; the tables say so.
ABLATION_ROWS=${ABLATION_ROWS:-0-11}
HOLDOUT_ROWS=${HOLDOUT_ROWS:-0-11}
DETECTOR_ROWS=${DETECTOR_ROWS:-0-49}
THRESHOLD_ROWS=${THRESHOLD_ROWS:-0-199}
TOKEN_ROWS=${TOKEN_ROWS:-0-3}
. "$(dirname "$0")/paper.sh"
