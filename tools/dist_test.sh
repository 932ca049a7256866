#!/usr/bin/env bash
# Evaluate a checkpoint with several processes on this machine, or on each of several.
#
# tools/dist_test.sh CONFIG CHECKPOINT GPUS [ARGS...]
#
# Arguments and variables are those of dist_train.sh. The figures also go to evaluation.json in the tool's output folder.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/shell/common.sh
source "$tools/shell/common.sh"
usage "$0" 3 $#
config=$1 checkpoint=$2 count=$3
shift 3

words=() torchrun=()
fill_words test "$config" "$checkpoint" "$@"
fill_torchrun "$count"
exec "${torchrun[@]}" "${words[@]}"
