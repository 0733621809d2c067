#!/usr/bin/env bash
# One machine, several GPUs.
#   bash recipes/torchrun_single_node.sh GPUS RECIPE.json [--field value ...]
#   bash recipes/torchrun_single_node.sh 4 recipes/dinov3_vitl16_1024.json --dataset_name my_coco
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: bash $0 GPUS RECIPE.json [--field value ...]" >&2
    exit 2
fi
gpus=$1
shift

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
exec torchrun --standalone --max-restarts "${RESTARTS:-3}" --nproc_per_node "$gpus" -m m2f_trainer train "$@"
