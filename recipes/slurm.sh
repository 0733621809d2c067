#!/usr/bin/env bash
# A Slurm job that is requeued until the run is finished. Set the resources below, then:
#   sbatch recipes/slurm.sh RECIPE.json --dataset_name my_coco --output_dir runs/first
# Two minutes before the time limit and on preemption, Slurm signals the tasks (one per GPU). The run then saves a
# checkpoint and exits with status 75, and the job is requeued. Each start resumes the newest complete checkpoint.
#SBATCH --job-name=m2f
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=m2f-%j.log
set -euo pipefail

if [ "$#" -lt 1 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "usage: sbatch $0 RECIPE.json [--field value ...]" >&2
    exit 2
fi

nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${nodes%%$'\n'*}"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF

# Without torchrun, so that signals and exit status 75 pass directly between Slurm and the processes.
status=0
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec python -m m2f_trainer train "$@" --resume_from_checkpoint auto
' m2f "$@" || status=$?

if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
