# shellcheck shell=bash
# Quoting for gke.sh and slurm.sh, which read this file; tpu_pod.sh runs on hosts too and stands alone.

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
