#!/bin/sh
# Copies a workdir from a slice to this machine: config, metrics, TensorBoard, rollouts, samples, tables.
#
#     tpu_scripts/collect.sh --project=P --zone=Z --name=N --workdir=/mnt/exprl/runs/outcome --output=runs/outcome
#
# --project, --zone, --name   as in create.sh (or PROJECT, ZONE, NAME)
# --workdir                   as in launch.sh
# --output                    a folder here; what comes is kept beside it until it is whole
# --weights                   checkpoints and the exported policy too: tens of gigabytes for a 4B model
# --dry-run                   print the commands, run nothing

set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

WORKDIR='' OUTPUT='' LEFT='--exclude=./checkpoints --exclude=./export'
option() {
    case $1 in
    --workdir=*) WORKDIR=${1#*=} ;;
    --output=*) OUTPUT=${1#*=} ;;
    --weights) LEFT='' ;;
    *) return 1 ;;
    esac
}
parse "$@"
need --workdir "$WORKDIR" '--workdir=/mnt/exprl/runs/outcome'
need_absolute --workdir "$WORKDIR"
need --output "$OUTPUT" '--output=runs/outcome'

# tar says 1 when a file grew meanwhile, as those of a run do.
pack="tar -C $(quote "$WORKDIR") ${LEFT:+$LEFT }-cz . || [ \$? -eq 1 ]"
beside=$(dirname -- "$OUTPUT")
run mkdir -p -- "$beside"
make_scratch "$beside" # on the disk that is to hold it all
if [ -n "$DRY_RUN" ]; then
    printf '%s >%s\n' "$(on_workers 0 "$pack")" "$(quote "$SCRATCH/workdir.tar.gz")"
else
    on_workers 0 "$pack" >"$SCRATCH/workdir.tar.gz" # not through a pipe, which would forget that it failed
fi
# After a lost connection gcloud asks again, and what comes then follows what came before: the checksums tell.
run gzip -t "$SCRATCH/workdir.tar.gz" || fail "what came of $WORKDIR is damaged; $OUTPUT is as it was; collect it again"
run mkdir -p -- "$OUTPUT"
run tar -C "$OUTPUT" -xzf "$SCRATCH/workdir.tar.gz"
