# shellcheck shell=bash
# What the launch scripts share. Each sets `tools`, the folder of the tools, before it reads this file, and uses the
# arrays that the functions fill.
# shellcheck disable=SC2034

python=${PYTHON:-python}

# usage FILE COUNT GIVEN: end with FILE's leading comment unless at least COUNT arguments were GIVEN.
usage() {
    if (( $3 < $2 )); then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1" >&2
        exit 2
    fi
}

# fill_words ARGS...: the array `words` becomes the Python command that tools/command.py names.
fill_words() {
    local quoted
    quoted=$("$python" "${tools:?}/command.py" "$@")
    eval "words=($quoted)"  # each word is quoted
}

# fill_torchrun COUNT: the array `torchrun` becomes the command that starts COUNT processes on this machine.
fill_torchrun() {
    torchrun=("$python" -m torch.distributed.run "--nproc-per-node=$1")
    if (( ${NNODES:-1} > 1 )); then
        if [[ -z ${MASTER_ADDR:-} ]]; then
            echo "error: NNODES=$NNODES needs MASTER_ADDR, the address of the machine with NODE_RANK=0" >&2
            exit 1
        fi
        torchrun+=("--nnodes=$NNODES" "--node-rank=${NODE_RANK:-0}")
        torchrun+=("--master-addr=$MASTER_ADDR" "--master-port=${PORT:-29500}")
    elif [[ -n ${PORT:-} ]]; then
        torchrun+=("--master-addr=${MASTER_ADDR:-127.0.0.1}" "--master-port=$PORT")
    else
        torchrun+=(--standalone)  # a free port
    fi
}

# fill_sbatch OUT_DIR NAME: the array `sbatch` becomes sbatch with the options that the variables ask for.
fill_sbatch() {
    local gpus=${GPUS_PER_NODE:-8} tasks extra=()
    tasks=${TASKS_PER_NODE:-$(( gpus > 0 ? gpus : 1 ))}
    sbatch=(sbatch "--job-name=${JOB_NAME:-$2}" "--nodes=${NODES:-1}" "--ntasks-per-node=$tasks")
    sbatch+=("--cpus-per-task=${CPUS_PER_TASK:-5}" --requeue --open-mode=append)
    if (( gpus > 0 )); then
        sbatch+=("--gpus-per-node=$gpus")
    fi
    if [[ -n ${PARTITION:-} ]]; then
        sbatch+=("--partition=$PARTITION")
    fi
    if [[ -n ${TIME:-} ]]; then
        sbatch+=("--time=$TIME")
    fi
    if [[ -n ${SBATCH_ARGS:-} ]]; then
        read -r -a extra <<< "$SBATCH_ARGS"
        sbatch+=("${extra[@]}")
    fi
    mkdir -p "$1"
}
