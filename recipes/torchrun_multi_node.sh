#!/usr/bin/env bash
# Several machines. Run the same command on each of them; the dataset, recipe and output_dir must be on shared storage:
#   NODES=2 GPUS=8 HEAD=10.0.0.1:29500 bash recipes/torchrun_multi_node.sh RECIPE.json [--field value ...]
# HEAD is one of the machines, by an address that the others can reach. Under Slurm:
#   srun --nodes 2 --ntasks-per-node 1 --export ALL,NODES=2,GPUS=8,HEAD=node1:29500 bash recipes/torchrun_multi_node.sh ...
set -euo pipefail

if [ "$#" -lt 1 ] || [ -z "${NODES:-}" ] || [ -z "${GPUS:-}" ] || [ -z "${HEAD:-}" ]; then
    echo "usage: NODES=n GPUS=n HEAD=host:port bash $0 RECIPE.json [--field value ...]" >&2
    exit 2
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
exec torchrun \
    --nnodes "$NODES" \
    --nproc_per_node "$GPUS" \
    --max-restarts "${RESTARTS:-3}" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$HEAD" \
    --rdzv_id "${RUN_ID:-m2f}" \
    -m m2f_trainer train "$@"
