#!/bin/sh
# Gives a slice back, with its request; the file system with the workdirs stays.  Billing of the slice ends.
#
#     tpu_scripts/delete.sh --project=P --zone=Z --name=N
#
# --project, --zone, --name   as in create.sh (or PROJECT, ZONE, NAME)
# --dry-run                   print the command, run nothing

set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

option() {
    return 1
}
parse "$@"

run gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
