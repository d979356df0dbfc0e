#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from nothing to the results: creates the TPU VMs, copies the checkout's commit, installs
# what it needs, runs one command on every host, follows the log, and says how it ended.
#
#   launch/tpu_pod.sh [SUBCOMMAND] --name=NAME [OPTIONS] [-- COMMAND ...]
#   launch/tpu_pod.sh --name=cooper --zone=us-west4-a --type=v5litepod-16 --queued --spot --restart=20 --down \
#       -- python launch/train.py --config=configs/tiny.py --config.run_dir=gs://BUCKET/tiny
#
#   all      (no subcommand) up, then run
#   up       creates the slice and waits until it is there; one that is there is used as it is
#   run      copies the commit, installs, starts COMMAND on every host, follows it; its exit code is COMMAND's
#   logs     follows a run again (of --worker=N, default 0) and gives its exit code
#   status   the slice's state and each host's
#   stop     asks the run to save a checkpoint and stop (SIGTERM), and waits for it
#   fetch    copies --from (default: COMMAND's run_dir) to the directory --to, from a bucket or from worker 0's disk
#   down     deletes the slice; until then it is billed, whether it works or not
#
#   --name=NAME       of the TPU VM (and of its queued resource)
#   --zone=ZONE       --project=PROJECT (default: gcloud's)
#   --type=TYPE       accelerator type: v5litepod-16, v6e-16, v5p-32, v4-32 ...
#   --version=VERSION software of the TPU VM (default: by the type)
#   --spot            cheaper, may be taken away at any time
#   --queued          wait in the queue for the slice instead of failing where none is free
#   --slices=N        N slices joined by the data-centre network (needs --queued)
#   --restart=N       start again, up to N times, after exit codes 75 and 69, on a new slice where the old one is gone
#   --down            delete the slice when the run has ended, however it ended (needs a run_dir in a bucket)
#   --env=NAME        forward this environment variable too (HF_TOKEN and OPENAI_API_KEY are where set); repeatable
#   --create-arg=ARG  for gcloud's create, as --create-arg=--network=NET; --ssh-arg=ARG for its ssh and scp; repeatable
#   --grace=SECONDS   how long `stop` waits, and stragglers may take once worker 0 has ended (default 600)
#   --poll=SECONDS    between two looks at what is waited for (default 30)
#   --dry-run         print the commands, run none
#
# Options of `up` are remembered under ~/.local/state/cooper/NAME: later subcommands need --name alone.  Values of
# forwarded variables travel in a file of mode 0600 that is deleted at both ends once read, never on a command line.

set -euo pipefail

say() { printf 'tpu_pod: %s\n' "$*" >&2; }
note() { [ -n "$dry" ] || say "$@"; } # what a dry run does not do, it does not report
usage_error() { say "$* (--help lists the options)"; exit 2; }
failed() { say "$1 failed with exit code $2"; exit 1; }

quote() { # one word for any shell, on one line wherever that can be
    local rest=$1 out='' plain='^[A-Za-z0-9_./:=,@%+-]+$'
    if [[ $rest =~ $plain ]]; then
        printf '%s' "$rest"
        return
    fi
    while [[ $rest == *\'* ]]; do # by hand: replacements with quotes differ between versions of bash
        out+="${rest%%\'*}'\\''"
        rest=${rest#*\'}
    done
    printf "'%s'" "$out$rest"
}

quote_all() { # words, as one string
    local word gap=''
    for word in "$@"; do
        printf '%s%s' "$gap" "$(quote "$word")"
        gap=' '
    done
}

# ---------------------------------------------------------------------------------------------------------------------
# On the hosts: `tpu_pod.sh worker ...` in the copy that lies there.  The checkout is ~/cooper, its environment
# ~/cooper-venv, and ~/cooper-run holds the run's log, process id, exit code and whether it was told to stop.

on_worker() {
    local what=$1 run=$HOME/cooper-run code seconds
    shift
    running() { [ -f "$run/pid" ] && [ ! -f "$run/exit" ] && kill -0 "$(cat "$run/pid")" 2>/dev/null; }
    case $what in
    idle) # nothing may be replaced under a run
        if running; then
            say "$(hostname): a run is on; stop it first"
            return 1
        fi
        ;;
    install)
        # The images' own Python is older than what the program needs; uv brings one where none fits.
        cd "$HOME/cooper"
        PATH=$HOME/.local/bin:$PATH
        command -v uv >/dev/null || python3 -m pip install --quiet --user uv ||
            python3 -m pip install --quiet --user --break-system-packages uv
        [ -x "$HOME/cooper-venv/bin/python" ] || uv venv --quiet --python '>=3.11,<3.13' "$HOME/cooper-venv"
        uv pip install --quiet --python "$HOME/cooper-venv/bin/python" -r requirements-tpu.txt
        ;;
    start)
        on_worker idle || return 1
        rm -rf "$run"
        mkdir -m 700 "$run"
        [ ! -f "$HOME/cooper.env" ] || mv "$HOME/cooper.env" "$run/env"
        # A session of its own: a lost connection does not end it.
        setsid bash "$HOME/cooper/launch/tpu_pod.sh" worker supervise "$@" >"$run/log" 2>&1 </dev/null &
        echo $! >"$run/pid"
        echo "started on $(hostname)"
        ;;
    supervise)
        if [ -f "$run/env" ]; then
            set -a
            # shellcheck source=/dev/null
            . "$run/env"
            set +a
            rm -f "$run/env"
        fi
        export PATH="$HOME/cooper-venv/bin:$PATH" PYTHONUNBUFFERED=1
        cd "$HOME/cooper"
        trap : TERM # a VM that shuts down signals every process: the shell outlives COMMAND, to note how it ended
        code=0
        "$@" || code=$?
        echo "$code" >"$run/exit.new"
        mv "$run/exit.new" "$run/exit"
        ;;
    follow) # from byte $1 on, until the run ends
        [ -f "$run/pid" ] || return 3
        while running; do sleep 0.2; done >/dev/null 2>&1 &
        tail -c "+$(($1 + 1))" --pid=$! -s 0.2 -f "$run/log"
        ;;
    stop)
        : >"$run/stopped"
        if running; then pkill -TERM -P "$(cat "$run/pid")" || true; fi
        ;;
    collect) # waits $1 seconds at most; who is not done by then hangs, and would hold the TPU
        [ -f "$run/pid" ] || return 3
        seconds=0
        while running && [ "$seconds" -lt "$1" ]; do
            sleep 1
            seconds=$((seconds + 1))
        done
        if running; then
            kill -KILL -- "-$(cat "$run/pid")" 2>/dev/null || true
            echo 137 >"$run/exit"
        fi
        code=lost # no exit code and no process: the host restarted
        [ ! -f "$run/exit" ] || code=$(cat "$run/exit")
        if [ -f "$run/stopped" ]; then code="$code stopped"; fi
        echo "cooper-exit $(hostname) $code"
        ;;
    status)
        if running; then
            echo "$(hostname): running"
        elif [ -f "$run/exit" ]; then
            echo "$(hostname): ended with exit code $(cat "$run/exit")"
        elif [ -f "$run/pid" ]; then
            echo "$(hostname): lost (the host restarted)"
        else
            echo "$(hostname): no run yet"
        fi
        ;;
    *) usage_error "unknown worker command $what" ;;
    esac
}

if [ "${1:-}" = worker ]; then
    shift
    on_worker "$@"
    exit
fi

# ---------------------------------------------------------------------------------------------------------------------
# Options.

ROOT=$(cd "$(dirname "$0")/.." && pwd)
subcommand=all
name='' worker=0 down='' dry='' from='' to='' forward='HF_TOKEN OPENAI_API_KEY'
zone='' project='' type='' version='' spot='' queued='' slices='' restart=0 grace=600 poll=30 run_dir=''
create_args=() ssh_args=() command=()

case ${1:-} in
all | up | run | logs | status | stop | fetch | down)
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

for argument in "$@"; do # the name first: what was remembered under it comes before the other options
    case $argument in
    --name=*) name=${argument#*=} ;;
    --) break ;;
    esac
done
[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    usage_error "--name=NAME is needed: small letters, digits and hyphens, not '$name'"
state=${XDG_STATE_HOME:-$HOME/.local/state}/cooper/$name
log=$state/log # what has been seen of worker 0's
case $subcommand in
all | up) ;; # these say anew what is wanted
*)
    # shellcheck source=/dev/null
    [ ! -f "$state/options" ] || . "$state/options"
    ;;
esac

number() { [[ ${1#*=} =~ ^[0-9]{1,6}$ ]] || usage_error "${1%%=*} takes a whole number, not '${1#*=}'"; }

while [ $# -gt 0 ]; do
    case $1 in
    --name=*) ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=yes ;;
    --queued) queued=yes ;;
    --slices=*) number "$1" && slices=${1#*=} ;;
    --restart=*) number "$1" && restart=${1#*=} ;;
    --grace=*) number "$1" && grace=${1#*=} ;;
    --poll=*) number "$1" && poll=${1#*=} ;;
    --worker=*) number "$1" && worker=${1#*=} ;;
    --down) down=yes ;;
    --env=*)
        [[ ${1#*=} =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || usage_error "--env takes a variable's name, and no value"
        forward="$forward ${1#*=}"
        ;;
    --create-arg=*) create_args+=("${1#*=}") ;;
    --ssh-arg=*) ssh_args+=("${1#*=}") ;;
    --from=*) from=${1#*=} ;;
    --to=*) to=${1#*=} ;;
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

[ -n "$zone" ] || usage_error "--zone=ZONE is needed"
case $subcommand in
all | up) [ -n "$type" ] || usage_error "--type=TYPE is needed, as --type=v5litepod-16" ;;
esac
case $subcommand in
all | run) [ ${#command[@]} -gt 0 ] || usage_error "the command is missing: -- python launch/train.py ..." ;;
*) [ ${#command[@]} -eq 0 ] || usage_error "$subcommand takes no command" ;;
esac
if [ "$restart" -gt 0 ] && [ -z "$type" ]; then usage_error "--restart may create the slice anew: --type=TYPE is needed"; fi
if [ "${slices:-1}" -gt 1 ] && [ -z "$queued" ]; then usage_error "--slices needs --queued"; fi
if [ -z "$version" ]; then
    case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    *) version='tpu-ubuntu2204-base' ;;
    esac
fi
if [ ${#command[@]} -gt 0 ]; then
    run_dir=''
    for argument in "${command[@]}"; do
        case $argument in --config.run_dir=*) run_dir=${argument#*=} ;; esac
    done
    if [ -n "$down" ] && [[ $run_dir != gs://* ]]; then
        usage_error "--down deletes the hosts' disks: it needs --config.run_dir=gs://BUCKET/..."
    fi
fi

[ -n "$dry" ] || command -v gcloud >/dev/null || usage_error "gcloud is not on PATH"

# ---------------------------------------------------------------------------------------------------------------------
# Commands.  A dry run prints what a real one runs, from the same words.

exec 3>&1
show() {
    local word plain=yes
    for word in "$@"; do
        if [[ $word == *[[:cntrl:]]* ]]; then plain=''; fi
    done
    # Bash's own quoting keeps even a line break on one line.
    if [ -n "$plain" ]; then quote_all "$@" >&3; else printf '%q ' "$@" >&3; fi
    echo >&3
}
call() { # what it is, the command
    local what=$1 code=0
    shift
    if [ -n "$dry" ]; then
        show "$@"
        return
    fi
    "$@" || code=$?
    [ "$code" -eq 0 ] || failed "$what" "$code"
}

where=("--zone=$zone" --quiet)
[ -z "$project" ] || where=("--project=$project" "${where[@]}")
tpu=(gcloud compute tpus)
ssh_where=("${where[@]}" ${ssh_args[@]+"${ssh_args[@]}"})
if [ "${slices:-1}" -gt 1 ]; then # one queued resource reaches the hosts of all its slices
    reach=queued-resources all=(--node=all --worker=all) one=(--node=0 "--worker=$worker") first=(--node=0 --worker=0)
else
    reach=tpu-vm all=(--worker=all) one=("--worker=$worker") first=(--worker=0)
fi
on_all() { # what it is, the hosts' command
    call "$1" "${tpu[@]}" "$reach" ssh "$name" "${all[@]}" "${ssh_where[@]}" "--command=$2"
}
to_all() { # what it is, a file here, its name there
    call "$1" "${tpu[@]}" "$reach" scp "$2" "$name:$3" "${all[@]}" "${ssh_where[@]}"
}
worker_command() { quote_all bash cooper/launch/tpu_pod.sh worker "$@"; }

describe() { # kind, assumed answer of a dry run: prints the state; "absent" where there is none
    local kind=$1 answer code=0 key=state
    [ "$kind" = tpu-vm ] || key=state.state
    set -- "$2" "${tpu[@]}" "$kind" describe "$name" "${where[@]}" "--format=value($key)"
    if [ -n "$dry" ]; then
        show "${@:2}"
        echo "$1"
        return
    fi
    answer=$("${@:2}" 2>"$state/describe.err") || code=$?
    if [ "$code" -eq 0 ]; then
        echo "$answer"
    elif grep -qi 'not.found' "$state/describe.err"; then
        echo absent
    else
        cat "$state/describe.err" >&2
        return "$code"
    fi
}

alive() { # whether the hosts are there; where that cannot be asked now, they are taken to be
    local now
    [ -z "$dry" ] || return 0
    if [ "$reach" = tpu-vm ]; then
        now=$(describe tpu-vm READY) || return 0
        [ "$now" = READY ]
    else
        now=$(describe queued-resources ACTIVE) || return 0
        [ "$now" = ACTIVE ]
    fi
}

kind=tpu-vm ready=READY
[ -z "$queued" ] || kind=queued-resources ready=ACTIVE
up='' # whether there is something to warn about when this ends

remember() {
    [ -n "$dry" ] || {
        mkdir -p "$state"
        chmod 700 "$state"
        {
            for key in zone project type version spot queued slices run_dir; do printf '%s=%q\n' "$key" "${!key}"; done
            printf 'create_args=(%s)\n' "$(quote_all ${create_args[@]+"${create_args[@]}"})"
            printf 'ssh_args=(%s)\n' "$(quote_all ${ssh_args[@]+"${ssh_args[@]}"})"
        } >"$state/options"
    }
}

create() {
    local words=("${tpu[@]}" "$kind" create "$name" "${where[@]}" "--accelerator-type=$type")
    if [ -z "$queued" ]; then
        words+=("--version=$version")
    elif [ "${slices:-1}" -gt 1 ]; then
        words+=("--runtime-version=$version" "--node-count=$slices" "--node-prefix=$name")
    else
        words+=("--runtime-version=$version" "--node-id=$name")
    fi
    [ -z "$spot" ] || words+=(--spot)
    note "creating $name (${slices:+$slices x }$type${spot:+, spot}${queued:+, queued})"
    up=yes
    call "creating the slice" "${words[@]}" ${create_args[@]+"${create_args[@]}"}
}

delete() { # what is not there any more is deleted
    local code=0 words=("${tpu[@]}" "$kind" delete "$name" "${where[@]}")
    [ -z "$queued" ] || words+=(--force) # its TPU VMs with it
    note "deleting $name"
    if [ -n "$dry" ]; then
        show "${words[@]}"
    else
        "${words[@]}" 2>"$state/delete.err" || code=$?
        if [ "$code" -ne 0 ] && ! grep -qi 'not.found' "$state/delete.err"; then
            cat "$state/delete.err" >&2
            say "$name MAY STILL BE BILLED: look at it in the console"
            failed "deleting the slice" "$code"
        fi
    fi
    up=''
}

ensure_up() {
    local now last='' expected=absent
    while :; do
        now=$(describe "$kind" "$expected") || failed "asking for the slice's state" $?
        case $now in
        "$ready")
            up=yes
            return
            ;;
        absent)
            create
            expected=$ready
            continue
            ;;
        SUSPENDED | PREEMPTED | TERMINATED)
            say "$name is $now"
            delete
            continue
            ;;
        STOPPED) call "starting the stopped slice" "${tpu[@]}" tpu-vm start "$name" "${where[@]}" ;;
        FAILED) # waiting longer brings nothing
            say "the request for $name failed; \`gcloud compute tpus queued-resources describe $name\` says why"
            exit 1
            ;;
        CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES | SUSPENDING | DELETING | STARTING | STOPPING | \
            RESTARTING | REPAIRING | REIMAGING) ;;
        *)
            say "$name is in state '$now', which this does not know"
            exit 1
            ;;
        esac
        up=yes
        [ "$now" = "$last" ] || say "$name is $now; waiting"
        last=$now
        sleep "$poll"
    done
}

archive() {
    if [ -n "$(git -C "$ROOT" status --porcelain --untracked-files=no)" ]; then
        note "uncommitted changes are not copied: what runs is the commit $(git -C "$ROOT" rev-parse --short HEAD)"
    fi
    call "packing the checkout" git -C "$ROOT" archive --format=tar.gz "--output=$state/source.tar.gz" HEAD
}

install() { # runs/ on the hosts outlives a new copy
    note "copying the checkout and installing its requirements on every host"
    to_all "copying the checkout" "$state/source.tar.gz" cooper.tar.gz
    on_all "installing the requirements" "{ [ ! -f cooper/launch/tpu_pod.sh ] || $(worker_command idle); } && \
mkdir -p cooper && find cooper -mindepth 1 -maxdepth 1 ! -name runs -exec rm -rf {} + && \
tar -xzf cooper.tar.gz -C cooper && $(worker_command install)"
}

send_environment() {
    local key found=''
    for key in $forward; do
        if [ -n "${!key:-}" ]; then found="$found $key"; fi
    done
    [ -n "$found" ] || return 0
    if [ -n "$dry" ]; then
        for key in $found; do echo "# $key=*** goes into $state/env, mode 0600" >&3; done
    else
        rm -f "$state/env"
        (
            umask 077
            for key in $found; do printf '%s=%s\n' "$key" "$(quote "${!key}")"; done >"$state/env"
        )
    fi
    to_all "sending the environment" "$state/env" cooper.env
    rm -f "$state/env"
}

size() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

follow() { # to the end of the run; 1 where the hosts went away
    local seen=0 before base code failures=0
    if [ -n "$dry" ]; then
        show "${tpu[@]}" "$reach" ssh "$name" "${one[@]}" "${ssh_where[@]}" "--command=$(worker_command follow 0)"
        return
    fi
    base=$(size "$log")
    while :; do
        code=0
        "${tpu[@]}" "$reach" ssh "$name" "${one[@]}" "${ssh_where[@]}" "--command=$(worker_command follow "$seen")" |
            tee -a "$log" || code=$?
        [ "$code" -ne 0 ] || return 0
        case $code in # no run there, or not even the checkout
        3 | 127)
            [ "$subcommand" != logs ] || { say "there is no run on $name"; exit 1; }
            return 1
            ;;
        esac
        alive || return 1
        before=$seen
        seen=$(($(size "$log") - base))
        failures=$((failures + 1))
        [ "$seen" -eq "$before" ] || failures=0
        [ "$failures" -lt 30 ] || failed "following the log (the run goes on; \`logs\` follows it again)" "$code"
        say "the connection to the log was lost (exit code $code); the run goes on; connecting again"
        sleep "$poll"
    done
}

exit_code='' stopped=''
collect() { # the run's exit code from those of its hosts: an error of its own, then 75, then 69, then 0
    local line code=0 hosts='' worst=0 value mark
    set -- "${tpu[@]}" "$reach" ssh "$name" "${all[@]}" "${ssh_where[@]}" "--command=$(worker_command collect "$grace")"
    if [ -n "$dry" ]; then
        show "$@"
        exit_code=0
        return
    fi
    hosts=$("$@") || code=$?
    [ "$code" -eq 0 ] || hosts="$hosts
cooper-exit unreachable lost"
    if [ "$code" -ne 0 ] && [[ $hosts != cooper-exit*cooper-exit* ]] && alive; then
        failed "collecting the hosts' exit codes" "$code"
    fi
    while read -r line; do
        read -r _ line value mark <<<"$line"
        [ "$value" != lost ] || value=69
        [ "$mark" != stopped ] || stopped=yes
        case $value in
        0) ;;
        69 | 134) [ "$worst" -ne 0 ] || worst=69 ;; # 134: JAX aborts where the first host is lost
        75) case $worst in 0 | 69) worst=75 ;; esac ;;
        *)
            say "host $line ended with exit code $value"
            case $worst in 0 | 69 | 75) worst=$value ;; esac
            ;;
        esac
    done < <(grep '^cooper-exit ' <<<"$hosts")
    exit_code=$worst
}

report() {
    [ -z "$dry" ] || return 0
    case $exit_code in
    0) say "the run is done" ;;
    2) say "a setup error (exit code 2): the log says what to fix" ;;
    69) say "a host was lost (exit code 69): run the same command again to resume from the last checkpoint" ;;
    75) say "stopped after saving a checkpoint (exit code 75): run the same command again to resume from it" ;;
    *) say "the run failed with exit code $exit_code; \`logs --worker=N\` shows the log of host N" ;;
    esac
}

watch() {
    if follow; then
        collect
    else
        exit_code=69
    fi
    report
}

run() {
    local tries=0
    archive
    while :; do
        install
        send_environment
        note "starting on every host: $(quote_all "${command[@]}")"
        [ -n "$dry" ] || : >"$log"
        on_all "starting the run" "$(worker_command start "${command[@]}")"
        watch
        case $exit_code in
        69 | 75) ;;
        *) break ;;
        esac
        if [ -n "$stopped" ] || [ "$tries" -ge "$restart" ]; then break; fi
        tries=$((tries + 1))
        say "starting again ($tries of $restart)"
        alive || delete
        ensure_up
    done
}

warn() {
    local code=$?
    rm -f "$state/env" "$state/log.$$"
    if [ -n "$up" ] && [ -z "$dry" ]; then say "$name is billed until: launch/tpu_pod.sh down --name=$name"; fi
    exit "$code"
}
trap warn EXIT
trap 'say "the run, if it has started, goes on: launch/tpu_pod.sh logs --name=$name"; exit 130' INT

[ -n "$dry" ] || mkdir -p "$state"
case $subcommand in
all | up)
    remember
    ensure_up
    if [ "$subcommand" = all ]; then
        run
        [ -z "$down" ] || delete
        exit "${exit_code:-0}"
    fi
    ;;
run)
    remember
    up=yes
    run
    [ -z "$down" ] || delete
    exit "${exit_code:-0}"
    ;;
logs)
    up=yes
    log=$state/log.$$ # beside that of a `run` that still follows
    watch
    exit "${exit_code:-0}"
    ;;
status)
    call "describing the slice" "${tpu[@]}" "$kind" describe "$name" "${where[@]}"
    on_all "asking the hosts" "$(worker_command status)"
    ;;
stop)
    up=yes
    on_all "stopping the run" "$(worker_command stop)"
    collect
    report
    ;;
fetch)
    from=${from:-$run_dir}
    [ -n "$from" ] || usage_error "--from is needed: gs://BUCKET/run, or a path in the checkout on worker 0"
    to=${to:-runs/$name}
    call "making $to" mkdir -p "$to"
    if [[ $from == gs://* ]]; then
        call "copying from the bucket" gcloud storage rsync --recursive "$from" "$to"
    else
        [[ $from == /* ]] || from=cooper/$from
        call "copying from worker 0" "${tpu[@]}" "$reach" scp --recurse "$name:$from" "$to" "${first[@]}" "${ssh_where[@]}"
    fi
    ;;
down)
    delete
    [ -n "$dry" ] || rm -f "$state/options"
    ;;
esac
