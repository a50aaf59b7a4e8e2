# shellcheck shell=bash
# Everything that differs between one Slurm site and another, in one file.
#
# The job scripts source this file; nothing else needs editing. Every value is a default that the environment
# overrides (`: "${NAME:=value}"` assigns only when NAME is unset or empty), so these are the same:
#     edit MLCD_NODES below, or    MLCD_NODES=4 bash slurm/pipeline.sh
# Keep your own copy beside this one and select it with MLCD_SITE=path/to/site_mine.sh.

# --- Where things are -------------------------------------------------------------------------------------------
# The checkout. Jobs start here, so that `python -m mlcd_ds STAGE` finds the package and relative paths mean the same in
# every job. Default: the folder that sbatch was called in.
: "${MLCD_HOME:=${SLURM_SUBMIT_DIR:-$PWD}}"
# A folder that ALL nodes see (Lustre, GPFS, NFS ...): every stage writes below it, and the next one reads it there.
: "${MLCD_WORK:=$MLCD_HOME/work}"
: "${MLCD_TRAIN_SHARDS:=$MLCD_HOME/data/train/*.tar}"   # WebDataset tar files; a glob, expanded by the index stage
: "${MLCD_TEST_SHARDS:=$MLCD_HOME/data/test/*.tar}"     # labelled images for the evaluation stage
: "${MLCD_INDEX:=$MLCD_WORK/index/train}"
: "${MLCD_TEST_INDEX:=$MLCD_WORK/index/test}"
: "${MLCD_EMBEDDINGS:=$MLCD_WORK/embeddings}"
: "${MLCD_CLUSTERS:=$MLCD_WORK/clusters}"
: "${MLCD_LABELS:=$MLCD_WORK/labels}"
: "${MLCD_RUN:=$MLCD_WORK/run}"                         # checkpoints, logs; submitting again with it continues the run
: "${MLCD_EXPORT:=$MLCD_WORK/export}"
: "${MLCD_EVALUATION:=$MLCD_WORK/evaluation}"
: "${MLCD_LOGS:=$MLCD_WORK/logs}"                       # the jobs' output when submitted by pipeline.sh

# --- What is computed -------------------------------------------------------------------------------------------
# The teacher whose image embeddings are clustered: the folder of a Hugging Face model, or a name of mlcd_ds/encoders/registry.py.
: "${MLCD_ENCODER:=$MLCD_HOME/models/clip-vit-large-patch14}"
: "${MLCD_NUM_CENTERS:=1000000}"                        # k of k-means; the paper's is a million
: "${MLCD_NUM_LABELS:=8}"                               # nearest centers an image is labelled with
: "${MLCD_RECIPE:=vit_l_14}"                            # mlcd_ds/recipes/NAME.yaml
: "${MLCD_DS_CONFIG:=ds_configs/zero1_bf16.json}"

# --- The allocation ---------------------------------------------------------------------------------------------
# The paper's job: 80 GPUs = 10 nodes x 8. pipeline.sh turns these into sbatch options. A plain
# `sbatch slurm/train_vit_l.sh` takes its sizes from the #SBATCH lines of that script instead, because sbatch reads
# those before any shell runs: give other sizes as sbatch options there.
: "${MLCD_ACCOUNT:=}"                                   # empty: the option is left out
: "${MLCD_PARTITION:=}"
: "${MLCD_NODES:=10}"
: "${MLCD_GPUS_PER_NODE:=8}"                            # 0 on a site without GPUs
: "${MLCD_TASKS_PER_NODE:=8}"                           # one task per GPU: each task is one rank
: "${MLCD_CPUS_PER_TASK:=12}"                           # image decoding and the data loader run on these
: "${MLCD_TIME:=24:00:00}"                              # limit of the training job; a requeue starts a new one
: "${MLCD_STAGE_TIME:=12:00:00}"                        # limit of every other stage
: "${MLCD_SBATCH_EXTRA:=}"                              # more sbatch options, split at blanks: --qos=high --exclusive

# --- The software environment of a job ----------------------------------------------------------------------------
: "${MLCD_MODULES:=}"                                   # environment modules, for example "cuda/12.4 gcc/12"
: "${MLCD_VENV:=}"                                      # folder of a virtual environment; empty: `python` from PATH
: "${MLCD_ACTIVATE:=}"                                  # or any command, for example "conda activate mlcd"
: "${MLCD_OMP_NUM_THREADS:=4}"                          # per rank; unset, every rank would take all cores of the node

# --- The network --------------------------------------------------------------------------------------------------
# Rank 0's address. Empty: the first host of the allocation, which is right wherever node names resolve.
: "${MLCD_MASTER_ADDR:=}"
# The interface that gloo and NCCL open their sockets on (`ip -brief address` on a node lists them). Empty: they
# choose, and on nodes with several networks sometimes choose the management one, or differently on two nodes.
: "${MLCD_SOCKET_IFNAME:=}"                             # for example ib0, bond0
: "${MLCD_NCCL_IB_HCA:=}"                               # InfiniBand adapters for NCCL, for example mlx5_0,mlx5_1
: "${MLCD_NCCL_DEBUG:=WARN}"                            # INFO shows which network NCCL took: look once per site

# --- Time limits, preemption and requeueing -------------------------------------------------------------------------
# Slurm sends USR1 to every rank this many seconds before the time limit. The program then saves a checkpoint and
# leaves with the status below, which means "not done, requeue me"; the job script does so. Slurm sends TERM instead
# when the job is preempted. Make it longer than one step plus one checkpoint, and than
# one iteration of the clustering.
# (train_vit_l.sh says the same in its line `#SBATCH --signal`; Slurm rounds to the minute.)
: "${MLCD_GRACE_S:=120}"
: "${MLCD_REQUEUE_STATUS:=85}"
: "${MLCD_MAX_REQUEUES:=50}"                            # a job that was requeued so often stops, as FAILED
# How long ranks may run on after the first one left: time to write a last file, and the longest that a crash of one
# rank can leave the others waiting.
: "${MLCD_STRAGGLER_S:=600}"
