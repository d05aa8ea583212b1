#!/bin/sh
# Follows what a run prints, from its last hundred lines on, until Ctrl-C; the run does not mind.
#
#     tpu_scripts/logs.sh --project=P --zone=Z --name=N --workdir=/mnt/exprl/runs/outcome [--worker=all]
#
# --project, --zone, --name   as in create.sh (or PROJECT, ZONE, NAME)
# --workdir                   as in launch.sh
# --worker                    a worker's number; all by default (process 0 reports progress, the others only faults)
# --dry-run                   print the command, run nothing

set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

WORKDIR='' WORKER=all
option() {
    case $1 in
    --workdir=*) WORKDIR=${1#*=} ;;
    --worker=*) WORKER=${1#*=} ;;
    *) return 1 ;;
    esac
}
parse "$@"
need --workdir "$WORKDIR" '--workdir=/mnt/exprl/runs/outcome'
need_absolute --workdir "$WORKDIR"

on_workers "$WORKER" "tail -n 100 -F $(records_of "$WORKDIR")/log"
