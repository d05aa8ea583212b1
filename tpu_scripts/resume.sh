#!/bin/sh
# Keeps a run going until it has ended: asks for the slice, sets it up, launches, watches, and again after a preemption.
#
#     tpu_scripts/resume.sh --project=P --zone=Z --name=N --topology=v5e:4x4 --spot --nfs=10.0.0.2:/share \
#         --config=configs/stage1.py --workdir=/mnt/exprl/runs/outcome [-- --config.KEY=VALUE ...]
#
# --project, --zone, --name   as in create.sh (or PROJECT, ZONE, NAME)
# --topology, --spot          as in create.sh
# --nfs, --bucket             as in setup.sh
# --config, --workdir, --     as in launch.sh
# --restarts                  how often a program that was killed on a slice that is still there is started again, or a
#                             request that has FAILED is made again, 5; preemptions do not count
# --poll                      seconds between two looks, 60
# --dry-run                   print the commands of one round, run nothing
#
# Start it in any state: it finds out where things stand, so it may itself be stopped and started again.  It ends with 0
# when the program has ended so on every worker, and otherwise when the program refuses to go on (status 1 or 2), when
# the slice is busy with another run (another workdir, config or option), when the restarts are used up, or when ten
# things in a row have failed.  It never deletes a slice that is well.

set -eu
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

TOPOLOGY='' SPOT='' NFS='' BUCKET='' CONFIG='' WORKDIR='' RESTARTS=5 POLL=60
option() {
    case $1 in
    --topology=*) TOPOLOGY=${1#*=} ;;
    --spot) SPOT=--spot ;;
    --nfs=* | --bucket=*) mount_option "$1" ;;
    --config=*) CONFIG=${1#*=} ;;
    --workdir=*) WORKDIR=${1#*=} ;;
    --restarts=*) RESTARTS=${1#*=} ;;
    --poll=*) POLL=${1#*=} ;;
    --) ;;
    *) return 1 ;;
    esac
}
parse "$@"
need --topology "$TOPOLOGY" '--topology=v5e:4x4'
need --config "$CONFIG" '--config=configs/stage1.py'
need --workdir "$WORKDIR" '--workdir=/mnt/exprl/runs/outcome'
need_absolute --workdir "$WORKDIR"

say() {
    printf '%s %s\n' "$(date +%FT%T)" "$1" >&2
}

# Another script of this folder, for this slice.
call() {
    script=$1
    shift
    "$here/$script" --project="$PROJECT" --zone="$ZONE" --name="$NAME" ${DRY_RUN:+"$DRY_RUN"} "$@"
}

create() {
    call create.sh --topology="$TOPOLOGY" ${SPOT:+"$SPOT"}
}

setup() {
    call setup.sh --poll="$POLL" ${NFS:+"--nfs=$NFS"} ${BUCKET:+"--bucket=$BUCKET"}
}

launch() {
    # shellcheck disable=SC2016 # for eval; REST is quoted
    eval 'call launch.sh --config="$CONFIG" --workdir="$WORKDIR" --' "$REST"
}

# One line a worker: running, busy (with another run), `ended` and the status, lost (it was killed with its shell), or
# new: not started yet, or started as another run that is no more.  Looks share the lock, so that two are not two runs.
ask_workers() {
    on_workers all "run=$(records_of "$WORKDIR")
program=$(quote "$(program "$WORKDIR" "$CONFIG")")
if ! flock -s -n $LOCK true; then
    if [ \"\$(cat $LOCK)\" = \"\$program\" ]; then echo running
    else echo busy; echo \"a run is under way: \$(cat $LOCK)\" >&2; fi
elif ! [ -f \"\$run\"/command ] || [ \"\$(cat \"\$run\"/command)\" != \"\$program\" ]; then echo new
elif [ -f \"\$run\"/status ]; then echo \"ended \$(cat \"\$run\"/status)\"
else echo lost
fi"
}

some_worker_is() {
    printf '%s\n' "$answers" | grep -Eq "^($1)\$"
}

if [ -n "$DRY_RUN" ]; then
    create
    setup
    launch
    queued_resources
    nodes
    ask_workers
    call delete.sh
    exit
fi

# What can fail because the slice has just gone, and mostly does not twice.
try() {
    if "$@"; then
        return
    fi
    failures=$((failures + 1))
    [ "$failures" -lt 10 ] || fail "ten failures in a row, the last one: $1"
    say "failed: $1"
    sleep "$POLL"
    return 1
}

# Args: what happened that may not happen for ever.
again() {
    RESTARTS=$((RESTARTS - 1))
    [ "$RESTARTS" -ge 0 ] || fail "$1 once more than --restarts allows; logs.sh may show why"
}

look() {
    answers=''
    state=$(slice_state) || return
    if [ "$state" = ACTIVE ]; then
        answers=$(ask_workers) || return
    fi
}

failures=0
while :; do
    try look || continue
    case $state in
    ACTIVE) ;;
    ABSENT)
        say "asking for $NAME"
        try create || :
        continue
        ;;
    FAILED | SUSPENDED | LOST)
        [ "$state" != FAILED ] || again "the request for $NAME has FAILED"
        say "$NAME is $state: deleting what is left of it"
        try call delete.sh || :
        continue
        ;;
    *)
        say "$NAME is $state"
        failures=0
        sleep "$POLL"
        continue
        ;;
    esac
    if some_worker_is busy; then
        fail "$NAME is busy with another run than this one; wait for its end, or ask it to stop"
    elif some_worker_is running; then
        failures=0
        sleep "$POLL"
    elif some_worker_is new; then
        say "setting up $NAME"
        if try setup; then
            try launch || :
        fi
    elif some_worker_is 'lost|ended 1(2[89]|[3-9].)|ended 2..'; then
        again "the program was killed on $NAME"
        say "the program was killed on $NAME: setting up again" # with it a mount goes where the machine goes down
        if try setup; then
            try launch || :
        fi
    elif some_worker_is 'ended 0' && ! some_worker_is 'ended [^0].*'; then
        say "$WORKDIR has ended"
        exit 0
    else
        fail "the program on $NAME will not go on; logs.sh shows why"
    fi
done
