#!/usr/bin/env bash
# Trains on a Google Kubernetes Engine cluster that has JobSet installed, on a TPU slice or on GPU nodes.
#
#   launch/gke.sh [up | logs | status | down] --name=NAME [OPTIONS] [-- COMMAND ...]
#   launch/gke.sh --name=cooper --image=IMAGE --machine=ct5lp-hightpu-4t --topology=4x4 --spot \
#       -- python launch/train.py --config=configs/tiny.py --config.run_dir=gs://BUCKET/tiny
#   launch/gke.sh --name=cooper --image=IMAGE --gpu=nvidia-h100-80gb --gpus=8 --nodes=2 -- python launch/train.py ...
#
#   up (no subcommand)  creates the JobSet        logs    follows the log of process 0 (or of --worker=N)
#   status              the JobSet and its pods   down    deletes it; a node pool that does not shrink stays billed
#
#   --image=IMAGE             what Containerfile builds, in a registry that the cluster reads
#   --machine=TYPE            of a TPU node: ct5lp-hightpu-4t, ct6e-standard-4t, ct5p-hightpu-4t, ct4p-hightpu-4t
#   --topology=AxB[xC]        of a TPU slice, in chips
#   --slices=N                TPU slices joined by the data-centre network (default 1)
#   --gpu=TYPE --gpus=N       GPU nodes instead: their cloud.google.com/gke-accelerator, GPUs a node (default 8)
#   --nodes=N                 GPU nodes (default 1)
#   --spot                    on spot nodes
#   --restarts=N              start again at most N times, after exit codes 75 and 69 and killed pods (default 20)
#   --grace=SECONDS           between SIGTERM and SIGKILL (default 300; a spot node that goes away gives less)
#   --service-account=NAME    the Kubernetes account that may read and write the bucket (default: default)
#   --env=NAME                forward this environment variable too (HF_TOKEN and OPENAI_API_KEY are where set)
#   --namespace=NAME  --context=NAME   as kubectl takes them
#   --dry-run                 print the commands and manifests, run none
#
# Values of forwarded variables go into the Kubernetes secret NAME-env, over kubectl's standard input.

set -euo pipefail

usage_error() {
    printf 'gke: %s (--help lists the options)\n' "$*" >&2
    exit 2
}

# shellcheck source=/dev/null
source "$(dirname "$0")/quote.bash"

yaml_string() { # one word, double-quoted; Kubernetes would expand $(NAME) in it, and reads $$ as $
    local rest=$1 out='' i character
    for ((i = 0; i < ${#rest}; i++)); do
        character=${rest:i:1}
        case $character in
        \\ | \") out+="\\$character" ;;
        \$) out+='$$' ;;
        $'\n') out+='\n' ;;
        $'\t') out+='\t' ;;
        *) out+=$character ;;
        esac
    done
    printf '"%s"' "$out"
}

fill() { # the template on standard input, @KEY@ by its value for each pair of arguments; lines left empty go
    local text out
    text=$(cat)
    while [ $# -gt 0 ]; do
        out=''
        while [[ $text == *"@$1@"* ]]; do # by hand: a value may hold what a replacement takes for a pattern
            out+=${text%%"@$1@"*}$2
            text=${text#*"@$1@"}
        done
        text=$out$text
        shift 2
    done
    printf '%s\n' "$text" | sed '/^ *$/d'
}

ROOT=$(cd "$(dirname "$0")/.." && pwd)
subcommand=up
name='' image='' machine='' topology='' slices=1 gpu='' gpus=8 nodes=1 spot='' restarts=20 grace=300 dry='' worker=0
service_account=default forward='HF_TOKEN OPENAI_API_KEY' kubectl=(kubectl) command=()

case ${1:-} in
up | logs | status | down)
    subcommand=$1
    shift
    ;;
-h | --help | help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit
    ;;
-*) ;;
*) usage_error "${1:-no subcommand and no option}: not a subcommand" ;;
esac

number() { [[ ${1#*=} =~ ^[0-9]{1,5}$ ]] || usage_error "${1%%=*} takes a whole number, not '${1#*=}'"; }
plain() { [[ ${1#*=} =~ ^[A-Za-z0-9._/:@-]+$ ]] || usage_error "${1%%=*}: '${1#*=}' holds characters that no such name has"; }

while [ $# -gt 0 ]; do
    case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) plain "$1" && image=${1#*=} ;;
    --machine=*) plain "$1" && machine=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --slices=*) number "$1" && slices=${1#*=} ;;
    --gpu=*) plain "$1" && gpu=${1#*=} ;;
    --gpus=*) number "$1" && gpus=${1#*=} ;;
    --nodes=*) number "$1" && nodes=${1#*=} ;;
    --spot) spot=yes ;;
    --restarts=*) number "$1" && restarts=${1#*=} ;;
    --grace=*) number "$1" && grace=${1#*=} ;;
    --worker=*) number "$1" && worker=${1#*=} ;;
    --service-account=*) plain "$1" && service_account=${1#*=} ;;
    --env=*)
        [[ ${1#*=} =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || usage_error "--env takes a variable's name, and no value"
        forward="$forward ${1#*=}"
        ;;
    --namespace=* | --context=*) kubectl+=("$1") ;;
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
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    usage_error "--name=NAME is needed: at most 40 small letters, digits and hyphens, not '$name'"
if [ "$subcommand" = up ]; then
    [ ${#command[@]} -gt 0 ] || usage_error "the command is missing: -- python launch/train.py ..."
    [ -n "$image" ] || usage_error "--image=IMAGE is needed"
    [ -n "$machine$gpu" ] || usage_error "--machine=TYPE with --topology=AxB (TPU), or --gpu=TYPE, is needed"
    [ -z "$machine" ] || [ -z "$gpu" ] || usage_error "--machine (TPU) and --gpu exclude each other"
elif [ ${#command[@]} -gt 0 ]; then
    usage_error "$subcommand takes no command"
fi
[ -n "$dry" ] || command -v kubectl >/dev/null || usage_error "kubectl is not on PATH"

call() { # what it is, the command; its standard input is the function's
    local what=$1 code=0 text
    shift
    if [ -n "$dry" ]; then
        quote_all "$@"
        if [ "${*: -1}" = - ]; then
            text=$(cat)
            printf " <<'COOPER'\n%s\nCOOPER" "$text"
        fi
        echo
        return
    fi
    "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        echo "gke: $what failed with exit code $code" >&2
        exit 1
    fi
}

if [ -n "$gpu" ]; then
    template=gpu accelerator=$gpu hosts=$nodes chips=$gpus
elif [ "$subcommand" = up ]; then
    template=tpu
    case $machine in
    ct4p-*) accelerator=tpu-v4-podslice ;;
    ct5lp-*) accelerator=tpu-v5-lite-podslice ;;
    ct5p-*) accelerator=tpu-v5p-slice ;;
    ct6e-*) accelerator=tpu-v6e-slice ;;
    *) usage_error "--machine=$machine: not a TPU machine that this knows (ct4p-, ct5lp-, ct5p-, ct6e-)" ;;
    esac
    [[ $machine =~ -([1-9])t$ ]] || usage_error "--machine=$machine does not end in its number of chips, as -4t"
    chips=${BASH_REMATCH[1]}
    [[ $topology =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] ||
        usage_error "--topology=AxB or AxBxC is needed, not '$topology'"
    total=$((${topology//x/*}))
    [ $((total % chips)) -eq 0 ] || usage_error "--topology=$topology has $total chips, not a multiple of $machine's $chips"
    hosts=$((total / chips))
fi

secret() { # the manifest of the forwarded variables; in a dry run without their values
    local key
    printf 'apiVersion: v1\nkind: Secret\nmetadata:\n  name: "%s-env"\n' "$name"
    if [ -n "$dry" ]; then echo 'stringData:'; else echo 'data:'; fi
    for key in $found; do
        if [ -n "$dry" ]; then
            printf "  %s: '***'\n" "$key"
        else
            printf '  %s: "%s"\n' "$key" "$(printf '%s' "${!key}" | base64 | tr -d '\n')"
        fi
    done
}

selector="jobset.sigs.k8s.io/jobset-name=$name"
case $subcommand in
up)
    found=''
    for key in $forward; do
        if [ -n "${!key:-}" ]; then found="$found $key"; fi
    done
    if [ -n "$found" ]; then # server-side: no copy of the values in an annotation
        secret | call "creating the secret" "${kubectl[@]}" apply --server-side --force-conflicts -f -
    fi
    words=''
    for word in "${command[@]}"; do words="$words${words:+, }$(yaml_string "$word")"; done
    fill NAME "$name" IMAGE "$image" RESTARTS "$restarts" SLICES "$slices" HOSTS "$hosts" CHIPS "$chips" \
        GRACE "$grace" ACCELERATOR "$accelerator" TOPOLOGY "$topology" SERVICE_ACCOUNT "$service_account" \
        SPOT_SELECTOR "${spot:+cloud.google.com/gke-spot: \"true\"}" \
        SPOT_TOLERATION "${spot:+- {key: cloud.google.com/gke-spot, operator: Equal, value: \"true\", effect: NoSchedule\}}" \
        COMMAND "[$words]" <"$ROOT/launch/gke/$template.yaml" |
        call "creating the JobSet" "${kubectl[@]}" create -f -
    [ -n "$dry" ] || echo "gke: follow it with: launch/gke.sh logs --name=$name; delete it with: launch/gke.sh down --name=$name" >&2
    ;;
logs)
    call "following the log" "${kubectl[@]}" logs --follow --tail=-1 \
        "--selector=$selector,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=$worker"
    ;;
status)
    call "asking for the JobSet" "${kubectl[@]}" get jobset "$name" -o wide
    call "asking for the pods" "${kubectl[@]}" get pods "--selector=$selector" \
        "-o=custom-columns=POD:.metadata.name,NODE:.spec.nodeName,PHASE:.status.phase,EXIT:.status.containerStatuses[*].state.terminated.exitCode"
    ;;
down)
    call "deleting the JobSet" "${kubectl[@]}" delete jobset "$name" --ignore-not-found
    call "deleting the secret" "${kubectl[@]}" delete secret "$name-env" --ignore-not-found
    ;;
esac
