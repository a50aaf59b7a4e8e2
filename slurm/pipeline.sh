#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash slurm/pipeline.sh [--dry-run] [--stages "NAME ..."] [-- key=value ...]

Submit the stages as Slurm jobs, each to start when those it reads from have ended well:

    index ------> embed -> cluster -> assign -> train -> export -> evaluate
    index-test -------------------------------------------------/

Run it in the folder of the checkout. Settings come from slurm/site.sh, or from the file that MLCD_SITE names; the
environment overrides each (MLCD_NODES=4 bash slurm/pipeline.sh). It is no job itself: it submits, prints the job ids,
and ends. If a stage fails, Slurm removes those behind it from the queue; submit again, and finished stages end at once.

    --dry-run           print the sbatch lines, submit nothing; <NAME> stands for the id of that job
    --stages "NAME ..." only these, in this order of the chain: index index-test embed cluster assign train export
                        evaluate; inputs from stages left out must be there already
    -- key=value ...    overrides for the training recipe, for example -- train.steps=1000
    --help              this text
USAGE
}

fail() { printf 'pipeline.sh: %s\n' "$*" >&2; exit 2; }

is_dry_run=false
all_stages="index index-test embed cluster assign train export evaluate"
stages=$all_stages
while (($# > 0)); do
    case $1 in
        --dry-run) is_dry_run=true ;;
        --stages) stages=${2:?--stages needs a value}; shift ;;
        --help | -h) usage; exit 0 ;;
        --) shift; break ;;
        *) usage >&2; fail "unknown argument $1" ;;
    esac
    shift
done
train_overrides=("$@")
for stage in $stages; do
    [[ " $all_stages " == *" $stage "* ]] || fail "unknown stage $stage; there are: $all_stages"
done

cd "${MLCD_HOME:-$PWD}"
[[ -r slurm/stage.sh ]] || fail "slurm/stage.sh is not in $PWD: run this in the folder of the checkout, or set MLCD_HOME to it"
export MLCD_HOME=$PWD
# shellcheck source=slurm/site.sh
source "${MLCD_SITE:-slurm/site.sh}"

declare -A job_ids=()      # stage -> job id
submitted=()               # stages in the order of submission

cancel_submitted() {
    ((${#submitted[@]} == 0)) || $is_dry_run && return
    printf 'pipeline.sh: stopped halfway; cancelling what was submitted\n' >&2
    scancel "${job_ids[@]}"
}
trap cancel_submitted ERR

# submit STAGE SHAPE TIME "STAGE ..." SCRIPT ARGUMENTS...
# SHAPE: `all` is every rank of the site's allocation, `one` a single rank. The fourth names the stages to wait for.
submit() {
    local stage=$1 shape=$2 time=$3 needs=$4 need ids=""
    shift 4
    [[ " $stages " == *" $stage "* ]] || return 0
    local nodes=$MLCD_NODES tasks=$MLCD_TASKS_PER_NODE gpus=$MLCD_GPUS_PER_NODE
    if [[ $shape == one ]]; then
        nodes=1 tasks=1 gpus=$((MLCD_GPUS_PER_NODE > 0 ? 1 : 0))
    fi
    local line=(
        sbatch --parsable --job-name="mlcd-$stage" --output="$MLCD_LOGS/%x-%j.out"
        --nodes="$nodes" --ntasks-per-node="$tasks" --cpus-per-task="$MLCD_CPUS_PER_TASK" --gpus-per-node="$gpus"
        --time="$time"
    )
    # Training and clustering answer USR1: they save, and are queued again. It would end another stage.
    [[ $stage != train && $stage != cluster ]] || line+=(--signal="USR1@$MLCD_GRACE_S")
    [[ -z $MLCD_ACCOUNT ]] || line+=(--account="$MLCD_ACCOUNT")
    [[ -z $MLCD_PARTITION ]] || line+=(--partition="$MLCD_PARTITION")
    # shellcheck disable=SC2206  # options, split at blanks on purpose
    line+=($MLCD_SBATCH_EXTRA)
    for need in $needs; do
        [[ -z ${job_ids[$need]:-} ]] || ids+=":${job_ids[$need]}"
    done
    # Without --kill-on-invalid-dep, jobs behind a failed one would stay in the queue for ever.
    [[ -z $ids ]] || line+=(--dependency="afterok$ids" --kill-on-invalid-dep=yes)
    line+=("$@")
    if $is_dry_run; then
        job_ids[$stage]="<$stage>"
        printf '%s' "${line[0]}"
        local word
        for word in "${line[@]:1}"; do
            if [[ $word == --dependency=* ]]; then printf ' %s' "$word"; else printf ' %q' "$word"; fi
        done
        printf '\n'
    else
        local answer
        answer=$("${line[@]}")
        job_ids[$stage]=${answer%%;*}   # on a federation: id;cluster
    fi
    submitted+=("$stage")
}

$is_dry_run || mkdir -p "$MLCD_LOGS"
submit index all "$MLCD_STAGE_TIME" "" slurm/stage.sh \
    index --shards "$MLCD_TRAIN_SHARDS" --num-threads "$MLCD_CPUS_PER_TASK" --out "$MLCD_INDEX"
submit index-test all "$MLCD_STAGE_TIME" "" slurm/stage.sh \
    index --shards "$MLCD_TEST_SHARDS" --num-threads "$MLCD_CPUS_PER_TASK" --out "$MLCD_TEST_INDEX"
submit embed all "$MLCD_STAGE_TIME" "index" slurm/stage.sh \
    embed --index "$MLCD_INDEX" --encoder "$MLCD_ENCODER" --num-threads "$MLCD_CPUS_PER_TASK" --out "$MLCD_EMBEDDINGS"
submit cluster all "$MLCD_STAGE_TIME" "embed" slurm/stage.sh \
    cluster --embeddings "$MLCD_EMBEDDINGS" --num-centers "$MLCD_NUM_CENTERS" --out "$MLCD_CLUSTERS"
submit assign all "$MLCD_STAGE_TIME" "cluster" slurm/stage.sh \
    assign --embeddings "$MLCD_EMBEDDINGS" --clusters "$MLCD_CLUSTERS" --num-labels "$MLCD_NUM_LABELS" --out "$MLCD_LABELS"
submit train all "$MLCD_TIME" "assign" slurm/train_vit_l.sh "${train_overrides[@]}"
submit export one "$MLCD_STAGE_TIME" "train" slurm/stage.sh \
    export --run "$MLCD_RUN" --out "$MLCD_EXPORT"
submit evaluate one "$MLCD_STAGE_TIME" "export index-test" slurm/stage.sh \
    evaluate --model "$MLCD_EXPORT" --train-index "$MLCD_INDEX" --test-index "$MLCD_TEST_INDEX" --out "$MLCD_EVALUATION"
trap - ERR

$is_dry_run && exit 0
printf '%-12s %s\n' STAGE JOB
for stage in "${submitted[@]}"; do
    printf '%-12s %s\n' "$stage" "${job_ids[$stage]}"
done
printf 'Logs: %s\nQueue: squeue --me    Stop all: scancel %s\n' "$MLCD_LOGS" "${job_ids[*]}"
