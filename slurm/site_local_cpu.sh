# shellcheck shell=bash
# An example of a site file of one's own: the demo on two nodes without GPUs (two virtual nodes of one machine will
# do, as the tests bring them up). It sets what differs and takes the rest from site.sh.
#     MLCD_SITE=slurm/site_local_cpu.sh bash slurm/pipeline.sh
: "${MLCD_HOME:=${SLURM_SUBMIT_DIR:-$PWD}}"
: "${MLCD_TRAIN_SHARDS:=$MLCD_HOME/demo/shards/train/*.tar}"
: "${MLCD_TEST_SHARDS:=$MLCD_HOME/demo/shards/test/*.tar}"
: "${MLCD_ENCODER:=efficientnet-lite0}"
: "${MLCD_NUM_CENTERS:=256}"
: "${MLCD_RECIPE:=demo}"
: "${MLCD_DS_CONFIG:=ds_configs/zero1_fp32_cpu.json}"
: "${MLCD_NODES:=2}"
: "${MLCD_GPUS_PER_NODE:=0}"
: "${MLCD_TASKS_PER_NODE:=1}"
: "${MLCD_CPUS_PER_TASK:=1}"
: "${MLCD_OMP_NUM_THREADS:=1}"
: "${MLCD_TIME:=00:30:00}"
: "${MLCD_STAGE_TIME:=00:30:00}"
# Both nodes are this machine, and their names resolve nowhere.
: "${MLCD_MASTER_ADDR:=127.0.0.1}"
: "${MLCD_SOCKET_IFNAME:=lo}"
# shellcheck source=slurm/site.sh
source "$MLCD_HOME/slurm/site.sh"
