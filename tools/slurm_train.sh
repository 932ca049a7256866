#!/usr/bin/env bash
# Submit a training to Slurm.
#
# tools/slurm_train.sh CONFIG OUT_DIR [ARGS...]
#
# CONFIG is a file or the name of one of this project's configurations, of either toolkit; ARGS go to its tool.
# A job that is requeued (its time is up, another was preferred, a machine failed) or submitted again goes on from the
# last checkpoint in OUT_DIR. The batch is held to the recipe's, as in every training.
#
# Variables: PARTITION; NODES (1); GPUS_PER_NODE (8; 0 for processes on the CPU); TASKS_PER_NODE (one a GPU);
#   CPUS_PER_TASK (5); TIME (of Slurm); GRACE (120 seconds before it the job is requeued); MAX_REQUEUES (100);
#   JOB_NAME; SEEDS, such as "0 1 2": an array of one job a seed, in OUT_DIR/seed_0 ...; SBATCH_ARGS, SRUN_ARGS: further
#   options; PYTHON.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/shell/common.sh
source "$tools/shell/common.sh"
usage "$0" 2 $#
config=$1 out=$2
shift 2

sbatch=() seeds=()
fill_seeds "${SEEDS:-}"
check_number GRACE "${GRACE:-120}" 1
check_number MAX_REQUEUES "${MAX_REQUEUES:-100}" 0
fill_words --out "$out" train "$config" "$@"  # a mistake shows now, not when the job starts
fill_sbatch "$out" "$(basename "${config%.*}")"
sbatch+=("--signal=B:USR1@${GRACE:-120}")
if (( ${#seeds[@]} > 0 )); then
    sbatch+=("--array=0-$(( ${#seeds[@]} - 1 ))" "--output=$out/slurm-%A_%a.out")
else
    sbatch+=("--output=$out/slurm-%j.out")
fi
exec "${sbatch[@]}" "$tools/shell/slurm_job.sh" "$tools" "$out" "${seeds[*]-}" --resume train "$config" "$@"
