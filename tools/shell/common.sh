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

# refuse SENTENCE: end the script.
refuse() {
    echo "error: $1" >&2
    exit 1
}

# check_number NAME VALUE LEAST: end with a sentence unless VALUE is a whole number, LEAST or more.
check_number() {
    if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (( $2 < $3 )); then
        refuse "$1 is '$2': give a whole number, $3 or more"
    fi
}

# fill_seeds TEXT: the array `seeds` becomes the numbers of TEXT, each of which is a job's.
fill_seeds() {
    local seed seen=" "
    read -r -d '' -a seeds <<< "$1" || true  # to the end of the text, which `read` calls a failure
    for seed in ${seeds[@]+"${seeds[@]}"}; do
        if [[ ! $seed =~ ^(0|[1-9][0-9]{0,8})$ ]]; then
            refuse "SEEDS holds '$seed': give whole numbers with blanks between them, such as SEEDS=\"0 1 2\""
        elif [[ $seen == *" $seed "* ]]; then
            refuse "SEEDS holds $seed twice, and two jobs cannot share a folder: give each seed once"
        fi
        seen+="$seed "
    done
}

# fill_words ARGS...: the array `words` becomes the Python command that tools/command.py names.
fill_words() {
    local quoted
    quoted=$("$python" "${tools:?}/command.py" "$@")
    eval "words=($quoted)"  # each word is quoted
}

# fill_torchrun COUNT: the array `torchrun` becomes the command that starts COUNT processes on this machine.
fill_torchrun() {
    check_number GPUS "$1" 1
    check_number NNODES "${NNODES:-1}" 1
    check_number NODE_RANK "${NODE_RANK:-0}" 0
    check_number PORT "${PORT:-29500}" 1
    torchrun=("$python" -m torch.distributed.run "--nproc-per-node=$1")
    if (( ${NNODES:-1} > 1 )); then
        if [[ -z ${MASTER_ADDR:-} ]]; then
            refuse "NNODES=$NNODES needs MASTER_ADDR, the address of the machine with NODE_RANK=0"
        elif (( ${NODE_RANK:-0} >= NNODES )); then
            refuse "NODE_RANK=$NODE_RANK of NNODES=$NNODES: machines are numbered from 0"
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
    check_number NODES "${NODES:-1}" 1
    check_number GPUS_PER_NODE "$gpus" 0
    check_number TASKS_PER_NODE "${TASKS_PER_NODE:-1}" 1
    check_number CPUS_PER_TASK "${CPUS_PER_TASK:-5}" 1
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
