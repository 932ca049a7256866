#!/usr/bin/env bash
# Submit an evaluation to Slurm.
#
# tools/slurm_test.sh CONFIG CHECKPOINT OUT_DIR [ARGS...]
#
# Arguments and variables are those of slurm_train.sh, but for SEEDS, GRACE and MAX_REQUEUES. The figures go to
# OUT_DIR/evaluation.json.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/shell/common.sh
source "$tools/shell/common.sh"
usage "$0" 3 $#
config=$1 checkpoint=$2 out=$3
shift 3

sbatch=()
fill_words --out "$out" test "$config" "$checkpoint" "$@"  # a mistake shows now, not when the job starts
fill_sbatch "$out" "$(basename "${config%.*}")_test"
sbatch+=("--output=$out/slurm-%j.out")
exec "${sbatch[@]}" "$tools/shell/slurm_job.sh" "$tools" "$out" "" test "$config" "$checkpoint" "$@"
