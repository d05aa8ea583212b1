# shellcheck shell=sh
# What the scripts of this folder share: options, quoting, and what they ask of a slice.  Sourced, never run.

PROJECT=${PROJECT-} ZONE=${ZONE-} NAME=${NAME-}
DRY_RUN='' REST=''

# One line on stderr, and the end; 2 is a wrong command line.
fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit "${2-1}"
}

# Its words as a shell reads them again, on one line if they are.
quote() {
    between=''
    for word; do
        case $word in
        '' | *[!A-Za-z0-9_./:=,@%+-]*)
            word=$(printf '%s.' "$word" | sed "s/'/'\\\\''/g") # the dot keeps newlines at the end
            word="'${word%.}'"
            ;;
        esac
        printf '%s%s' "$between" "$word"
        between=' '
    done
}

# A command, or under --dry-run its words.
run() {
    if [ -n "$DRY_RUN" ]; then
        quote "$@"
        echo
    else
        "$@"
    fi
}

# The options that every script takes.  The script's own function `option` knows the others, and takes `--` if words may
# follow it; those stay in REST, quoted.
parse() {
    while [ $# -gt 0 ]; do
        case $1 in
        --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        --dry-run) DRY_RUN=--dry-run ;;
        --project=*) PROJECT=${1#*=} ;;
        --zone=*) ZONE=${1#*=} ;;
        --name=*) NAME=${1#*=} ;;
        *)
            option "$1" || fail "unknown option $1; --help lists them" 2
            if [ "$1" = -- ]; then
                shift
                REST=$(quote "$@")
                break
            fi
            ;;
        esac
        shift
    done
    need --project "$PROJECT" 'PROJECT or --project=my-project'
    need --zone "$ZONE" 'ZONE or --zone=us-central1-a'
    need --name "$NAME" 'NAME or --name=exprl'
}

# Args: an option, its value, how to give it.
need() {
    [ -n "$2" ] || fail "$1 is missing; give $3" 2
}

need_absolute() {
    case $2 in
    *://*) fail "$1=$2: expected a folder that all workers share, got a URL; mount it with setup.sh" 2 ;;
    /*) ;;
    *) fail "$1=$2: expected an absolute path on the workers, for instance /mnt/exprl/runs/outcome" 2 ;;
    esac
}

# --nfs and --bucket.  An empty one comes of a variable that is not set, and is not the wish to mount nothing.
mount_option() {
    case $1 in
    --nfs=?*:/?*) NFS=${1#*=} ;;
    --nfs=*) fail "$1: expected ADDRESS:/SHARE, for instance --nfs=10.0.0.2:/share" 2 ;;
    --bucket=?*) BUCKET=${1#*=} ;;
    --bucket=*) fail "$1: expected a bucket's name, for instance --bucket=my-bucket" 2 ;;
    *) return 1 ;;
    esac
    [ -z "$NFS" ] || [ -z "$BUCKET" ] || fail "--nfs and --bucket are two ways to the same; give one" 2
}

# Args: worker (a number or `all`), what its shell is to do.
on_workers() {
    run gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker="$1" --command="$2"
}

queued_resources() {
    run gcloud compute tpus queued-resources list --project="$PROJECT" --zone="$ZONE" \
        --format='value(name.basename(),state.state)'
}

nodes() {
    run gcloud compute tpus tpu-vm list --project="$PROJECT" --zone="$ZONE" --format='value(name.basename(),state)'
}

# The state of this name in a list of names and states.
state_in() {
    printf '%s\n' "$1" | WANTED=$NAME awk -F '\t' '$1 == ENVIRON["WANTED"] { print $2 }'
}

# ABSENT, the queued resource's state, LOST if its node is gone, or the node's state if it is not READY; not zero if
# gcloud cannot say.  A preempted node can be seen before its queued resource is SUSPENDED.
slice_state() {
    found=$(queued_resources) || return
    state=$(state_in "$found")
    if [ "$state" = ACTIVE ]; then
        found=$(nodes) || return
        state=$(state_in "$found")
        case $state in
        READY) state=ACTIVE ;;
        PREEMPTED | TERMINATED | STOPPED | '') state=LOST ;;
        esac
    fi
    echo "${state:-ABSENT}"
}

# A worker keeps what belongs to a run, its log and how it ended, under this folder.  Args: workdir.
records_of() {
    # shellcheck disable=SC2016 # for the worker's shell
    printf '"$HOME"/runs%s' "$(quote "$1")"
}

# A slice has one run at a time, whatever its workdir: the shell that waits for the program holds this file of each
# worker, and the program's words are in it.
# shellcheck disable=SC2016,SC2034 # for the worker's shell; in the other scripts
LOCK='"$HOME"/exprl_jax_lock'

# A folder of this process for as long as the script runs.  Args: where.
make_scratch() {
    SCRATCH=$1/exprl_jax.$$
    run mkdir -m 700 "$SCRATCH"
    [ -n "$DRY_RUN" ] || trap 'rm -rf "$SCRATCH"' EXIT
}

# What runs on every worker, as shell text: compiled programs outlive the slice beside the workdir.  Args: workdir,
# config.
program() {
    # shellcheck disable=SC2016 # for the worker's shell
    printf 'JAX_COMPILATION_CACHE_DIR=%s "$HOME"/exprl_jax_env/bin/python -m exprl_jax.main %s --distributed=auto%s' \
        "$(quote "$(dirname "$1")/compiled")" "$(quote "--config=$2" "--workdir=$1")" "${REST:+ $REST}"
}
