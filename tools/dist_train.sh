#!/usr/bin/env bash
# Train with several processes on this machine, or on each of several.
#
# tools/dist_train.sh CONFIG GPUS [ARGS...]
#
# CONFIG is a file or the name of one of this project's configurations, of either toolkit; GPUS counts the processes
# (on the CPU without GPUs); ARGS go to the tool: OUTPUT_DIR DIR (detectron2), --work-dir DIR (mmengine), --resume, ...
# Variables: NNODES, NODE_RANK, MASTER_ADDR, PORT for several machines (start the script on each); PYTHON.
# One machine takes a free port by itself.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/shell/common.sh
source "$tools/shell/common.sh"
usage "$0" 2 $#
config=$1 count=$2
shift 2

words=() torchrun=()
fill_words train "$config" "$@"
fill_torchrun "$count"
exec "${torchrun[@]}" "${words[@]}"
