#!/usr/bin/env bash
# Train ViT-L/14 on 80 GPUs, from the folder of the checkout:
#     sbatch slurm/train_vit_l.sh [key=value ...]
# Options of sbatch win over the lines below, so that other sizes need no edit:
#     sbatch --partition=gpu --nodes=2 --time=02:00:00 slurm/train_vit_l.sh train.steps=1000
# Paths, environment and network come from slurm/site.sh. The folder MLCD_RUN holds the run: submitting again continues
# it, also with another --nodes (GPUs must divide the recipe's data.num_streams). Before the time limit, and
# on preemption, the program saves and the job requeues itself.
#SBATCH --job-name=mlcd-train
#SBATCH --nodes=10
#SBATCH --ntasks-per-node=8
# All GPUs of a node are visible to all its ranks, which NCCL needs for copies between them: not --gpus-per-task.
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# USR1 to the ranks (not to this script) 120 s before the end.
#SBATCH --signal=USR1@120
#SBATCH --requeue
# The output of a requeued job continues the file.
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${MLCD_HOME:-${SLURM_SUBMIT_DIR:?submit with sbatch: it is a job script}}"
if [[ ! -r slurm/launch.sh ]]; then
    echo "slurm/launch.sh is not in $PWD: call sbatch in the folder of the checkout, or set MLCD_HOME to it" >&2
    exit 2
fi
# shellcheck source=slurm/launch.sh
source slurm/launch.sh
prepare_job
run_ranks python -m mlcd_ds train --deepspeed_config "$MLCD_DS_CONFIG" --recipe "$MLCD_RECIPE" \
    train.out="$MLCD_RUN" data.index="$MLCD_INDEX" data.labels="$MLCD_LABELS" data.clusters="$MLCD_CLUSTERS" "$@"
