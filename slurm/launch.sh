# shellcheck shell=bash
# What the job scripts share: the environment of a job, and one srun whose exit status decides about a requeue.
# Sourced inside a job, from the folder of the checkout.

say() { printf '[%s] job %s: %s\n' "$(date +%H:%M:%S)" "${SLURM_JOB_ID:-?}" "$*" >&2; }

# Read the site's settings and prepare the environment that srun hands to every rank.
prepare_job() {
    export MLCD_HOME=$PWD
    # shellcheck source=slurm/site.sh
    source "${MLCD_SITE:-slurm/site.sh}"
    if [[ -n $MLCD_MODULES ]]; then
        # shellcheck disable=SC2086  # a list of modules, split on purpose
        module load $MLCD_MODULES
    fi
    set +u   # scripts that activate environments often read unset variables
    if [[ -n $MLCD_VENV ]]; then
        # shellcheck source=/dev/null
        source "$MLCD_VENV/bin/activate"
    fi
    eval "$MLCD_ACTIVATE"
    set -u

    # Where the ranks meet. The port follows from the job, so that two jobs on one node do not collide; it stays below
    # 32768, where Linux begins to hand out ports of its own accord. The ranks themselves read SLURM_PROCID and so on.
    MASTER_ADDR=$MLCD_MASTER_ADDR
    if [[ -z $MASTER_ADDR ]]; then
        local hosts
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        MASTER_ADDR=${hosts%%$'\n'*}
    fi
    MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
    OMP_NUM_THREADS=$MLCD_OMP_NUM_THREADS
    NCCL_DEBUG=$MLCD_NCCL_DEBUG
    export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS NCCL_DEBUG
    if [[ -n $MLCD_SOCKET_IFNAME ]]; then
        export NCCL_SOCKET_IFNAME=$MLCD_SOCKET_IFNAME GLOO_SOCKET_IFNAME=$MLCD_SOCKET_IFNAME
    fi
    if [[ -n $MLCD_NCCL_IB_HCA ]]; then
        export NCCL_IB_HCA=$MLCD_NCCL_IB_HCA
    fi
    export PYTHONUNBUFFERED=1   # the log is complete up to the moment of a kill

    say "$SLURM_NTASKS ranks on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)," \
        "rendezvous at $MASTER_ADDR:$MASTER_PORT, requeued ${SLURM_RESTART_COUNT:-0} times so far"
}

# The job's state as the controller has it: RUNNING, or COMPLETING once Slurm itself is ending the job.
job_state() { scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p'; }

# run_ranks COMMAND...: one task per rank. Ends the script with the status of the command, or requeues the job.
run_ranks() {
    local status is_signalled
    # A signal to the batch script must not end it before the ranks have written their checkpoint. (A handler, not
    # `trap ''`: ignored signals stay ignored in children.)
    trap 'is_signalled=true; say "Slurm is ending the job; waiting for the ranks to save and leave"' TERM USR1
    # --cpus-per-task again: srun does not take it over from sbatch since Slurm 22.05.
    # --kill-on-bad-exit=0 whatever the site's default: ranks leave with a status that is not 0 to ask for a requeue,
    #   and the first to leave must not have the others killed while they write. --wait bounds a crash instead.
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait="$MLCD_STRAGGLER_S" "$@" &
    local srun_pid=$!
    # A trap makes `wait` return early with a status of its own: ask again, bash remembers the real one.
    while
        is_signalled=false
        status=0
        wait "$srun_pid" || status=$?
        $is_signalled
    do :; done
    if ((status == 0)); then
        say "done"
        exit 0
    fi
    if ((status != MLCD_REQUEUE_STATUS)); then
        say "FAILED with status $status, which asks for no requeue"
        exit "$status"
    fi
    requeue_job
}

# The program saved its state and asked for more time: queue this job again, within limits.
requeue_job() {
    local state restarts=${SLURM_RESTART_COUNT:-0}
    state=$(job_state)
    if [[ $state != RUNNING ]]; then
        # Cancelled by somebody (stay cancelled), preempted (Slurm requeues by itself), or over its time limit.
        say "saved its state, and Slurm is already ending the job ($state): no requeue from here." \
            "After a time limit, make MLCD_GRACE_S longer, and submit again to continue"
        exit "$MLCD_REQUEUE_STATUS"
    fi
    if ((restarts >= MLCD_MAX_REQUEUES)); then
        say "FAILED: asked for a requeue after MLCD_MAX_REQUEUES=$MLCD_MAX_REQUEUES of them." \
            "Does it make progress between two? Submit again to continue"
        exit "$MLCD_REQUEUE_STATUS"
    fi
    say "saved its state and asks to go on (status $MLCD_REQUEUE_STATUS): requeue $((restarts + 1)) of at most $MLCD_MAX_REQUEUES"
    trap '' TERM   # the requeue ends this very script; the message below must still be able to appear
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "FAILED: scontrol requeue was refused. Was the job submitted with --requeue? Submit again to continue"
        exit "$MLCD_REQUEUE_STATUS"
    fi
    exit 0
}
