#!/usr/bin/env bash
# The batch script of slurm_train.sh and slurm_test.sh: one step of srun, which is requeued when its time is nearly up.
# sbatch slurm_job.sh TOOLS OUT_DIR "SEEDS" ARGS_OF_COMMAND_PY...
set -euo pipefail
tools=$1 out=$2
read -r -a seeds <<< "$3"
shift 3
# shellcheck source=tools/shell/common.sh
source "$tools/shell/common.sh"

words=() options=()
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    seed=${seeds[SLURM_ARRAY_TASK_ID]}
    out=$out/seed_$seed
    options=(--seed "$seed")
fi
fill_words --out "$out" ${options[@]+"${options[@]}"} "$@"
step=(srun --kill-on-bad-exit=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")
if [[ -n ${SRUN_ARGS:-} ]]; then
    read -r -a extra <<< "$SRUN_ARGS"
    step+=("${extra[@]}")
fi
step+=("${PYTHON:-python}" "${words[@]}")

# Slurm sends USR1 before the time limit. Requeueing ends the step; the next start goes on from the last checkpoint.
requeue() {
    if (( ${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100} )); then
        echo "time is nearly up, and the job has been requeued $SLURM_RESTART_COUNT times: it is left to end"
        return
    fi
    echo "time is nearly up: requeueing job $SLURM_JOB_ID, which goes on from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1

printf '$'
printf ' %q' "${step[@]}"
printf '\n'
"${step[@]}" &
running=$!
# A signal ends `wait` early.
while true; do
    if wait "$running"; then code=0; else code=$?; fi
    kill -0 "$running" 2> /dev/null || break
done
exit "$code"
