#!/usr/bin/env bash
# Trains on the GPU nodes of a SLURM cluster: writes a batch script, submits it, and lets it requeue itself.
#
#   launch/slurm.sh --nodes=2 --gpus=8 --time=24:00:00 --partition=gpu \
#       -- python launch/train.py --config=configs/tiny.py --config.run_dir=/shared/tiny
#
#   --nodes=N          nodes (default 1)        --gpus=N    GPUs a node (default 8)
#   --time=LIMIT       as sbatch takes it       --partition=PARTITION
#   --name=NAME        of the job (default cooper)
#   --cpus=N           CPUs a task; there is a task a GPU (default: the site's)
#   --warn=SECONDS     SIGTERM comes this long before the time limit (default 300): time to end a step and save
#   --restarts=N       requeue at most N times after exit codes 75 (saved and stopped) and 69 (a node was lost); default 20
#   --venv=DIR         the environment with requirements-cuda.txt (default: the checkout's .venv where there is one)
#   --logs=DIR         slurm-JOB.log goes there (default runs/slurm); on a disk that all nodes share
#   --sbatch-arg=ARG   anything else for sbatch, as --sbatch-arg=--account=LAB; repeatable
#   --dry-run          print the command and the batch script, submit nothing
#
# The checkout and the environment lie on a disk that all nodes share.  HF_TOKEN, OPENAI_API_KEY and the rest of the
# environment go with the job (--export=ALL), on no command line.

set -euo pipefail

usage_error() {
    printf 'slurm: %s (--help lists the options)\n' "$*" >&2
    exit 2
}

# shellcheck source=/dev/null
source "$(dirname "$0")/quote.bash"

ROOT=$(cd "$(dirname "$0")/.." && pwd)
nodes=1 gpus=8 time='' partition='' name=cooper cpus='' warn=300 restarts=20 venv='' logs=$ROOT/runs/slurm dry=''
extra=() command=()

number() { [[ ${1#*=} =~ ^[1-9][0-9]{0,5}$ ]] || usage_error "${1%%=*} takes a whole number from 1 on, not '${1#*=}'"; }

while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit
        ;;
    --nodes=*) number "$1" && nodes=${1#*=} ;;
    --gpus=*) number "$1" && gpus=${1#*=} ;;
    --cpus=*) number "$1" && cpus=${1#*=} ;;
    --warn=*) number "$1" && warn=${1#*=} ;;
    --restarts=*)
        [[ ${1#*=} =~ ^[0-9]{1,4}$ ]] || usage_error "--restarts takes a whole number, not '${1#*=}'"
        restarts=${1#*=}
        ;;
    --time=*) time=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --venv=*) venv=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --sbatch-arg=*) extra+=("${1#*=}") ;;
    --dry-run) dry=yes ;;
    --)
        shift
        command=("$@")
        break
        ;;
    *) usage_error "unknown option ${1%%=*}" ;;
    esac
    shift
done
[ ${#command[@]} -gt 0 ] || usage_error "the command is missing: -- python launch/train.py ..."
[[ $name =~ ^[A-Za-z0-9_.-]+$ ]] || usage_error "--name=NAME: letters, digits, dots, hyphens and underscores"
[ "$warn" -le 65535 ] || usage_error "--warn is at most 65535"
if [ -n "$venv" ]; then
    [ -x "$venv/bin/python" ] || usage_error "--venv=$venv holds no bin/python"
elif [ -x "$ROOT/.venv/bin/python" ]; then
    venv=$ROOT/.venv
fi
[[ $logs == /* ]] || logs=$PWD/$logs
[ -z "$venv" ] || [[ $venv == /* ]] || venv=$PWD/$venv

# A task a GPU, not a task a node: under SLURM, JAX gives a process the one GPU whose number is SLURM_LOCALID, and one
# process a node would leave the others idle.  For the same reason every task sees all of its node's GPUs
# (--gpu-bind=none; --gpus-per-task would show each task one GPU, of number 0).
submit=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks=$((nodes * gpus))" "--ntasks-per-node=$gpus")
submit+=("--gres=gpu:$gpus")
[ -z "$cpus" ] || submit+=("--cpus-per-task=$cpus")
[ -z "$time" ] || submit+=("--time=$time")
[ -z "$partition" ] || submit+=("--partition=$partition")
# Without "B:" the warning goes to the tasks.  The batch shell could only pass it on to srun, and srun answers SIGTERM
# by killing its tasks at once.
submit+=("--signal=TERM@$warn" --requeue --export=ALL --open-mode=append "--output=$logs/slurm-%j.log")
submit+=(${extra[@]+"${extra[@]}"})

step=(srun --export=ALL --gpu-bind=none --kill-on-bad-exit=0 --wait=600)
[ -z "$cpus" ] || step+=("--cpus-per-task=$cpus") # srun does not take it from sbatch

batch_script() {
    cat <<BATCH
#!/bin/bash
# Written by launch/slurm.sh.
set -u
cd $(quote "$ROOT") || exit 1
export PYTHONUNBUFFERED=1${venv:+ PATH=$(quote "$venv/bin"):\$PATH}
codes=$(quote "$logs")/slurm-\$SLURM_JOB_ID.codes
rm -rf "\$codes"
mkdir -p "\$codes" || exit 1

# Every task notes its own exit code: srun's is the greatest of all, which hides a setup error (2) behind the lost
# peers (69) that it leaves.  The shell outlives SIGTERM to do so.
$(quote_all "${step[@]}") bash -c '
    trap : TERM
    codes=\$1
    shift
    "\$@"
    code=\$?
    echo "\$code" >"\$codes/\$SLURM_PROCID"
    exit "\$code"
' task "\$codes" $(quote_all "${command[@]}")
code=\$?

restart=no failed=
for file in "\$codes"/*; do
    [ -f "\$file" ] || continue
    read -r one <"\$file"
    case \$one in
    0) ;;
    69 | 75 | 134) restart=yes ;; # 134: JAX aborts where the first task is lost
    *)
        echo "slurm: task \${file##*/} ended with exit code \$one"
        failed=\$one
        ;;
    esac
done
rm -rf "\$codes"
[ -z "\$failed" ] || code=\$failed restart=no
[ "\$code" != 2 ] || echo "slurm: a setup error: fix what the message above names, then submit again"
if [ "\$restart" = yes ]; then
    if [ "\${SLURM_RESTART_COUNT:-0}" -lt $restarts ]; then
        echo "slurm: exit code \$code: back into the queue, to go on from the last checkpoint"
        scontrol requeue "\$SLURM_JOB_ID" || echo "slurm: not requeued (exit code \$?)"
    else
        echo "slurm: exit code \$code after $restarts restarts: no more of them"
    fi
fi
exit "\$code"
BATCH
}

if [ -n "$dry" ]; then
    quote_all mkdir -p "$logs"
    printf '\n%s <<'\''COOPER'\''\n%s\nCOOPER\n' "$(quote_all "${submit[@]}")" "$(batch_script)"
    exit
fi
command -v sbatch >/dev/null || usage_error "sbatch is not on PATH: this runs on a SLURM login node"
mkdir -p "$logs"
code=0
batch_script | "${submit[@]}" || code=$?
if [ "$code" -ne 0 ]; then
    echo "slurm: submitting the job failed with exit code $code" >&2
    exit 1
fi
echo "slurm: follow it with: tail -F $(quote "$logs")/slurm-JOB.log" >&2
