#!/usr/bin/env bash
# Run one stage as a job, from the folder of the checkout. pipeline.sh submits it; by hand:
#     sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/stage.sh embed --index DIR --encoder NAME --out DIR
# A stage whose folder is finished does nothing, and an interrupted one goes on where it was: submit it again.
#SBATCH --job-name=mlcd-stage
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${MLCD_HOME:-${SLURM_SUBMIT_DIR:?submit with sbatch: it is a job script}}"
if (($# == 0)) || [[ ! -r slurm/launch.sh ]]; then
    echo "usage: sbatch [options] slurm/stage.sh STAGE ARGUMENTS..., in the folder of the checkout (this is $PWD)" >&2
    exit 2
fi
# shellcheck source=slurm/launch.sh
source slurm/launch.sh
prepare_job
stage=$1
shift
run_ranks python -m mlcd_ds "$stage" "$@"
