#!/bin/sh
# Asks for a TPU slice: a queued resource that gets one as soon as there is one.
#
#     tpu_scripts/create.sh --project=P --zone=Z --name=N --topology=v5e:4x4 [--spot]
#
# --project, --zone, --name   where, and what the request and its slice are called (or PROJECT, ZONE, NAME)
# --topology                  the name that exprl_jax.compile_check takes: v5e:4x4, v6e:8x8, v5p:2x2x2, ...
# --spot                      cheaper, and may be taken away at any moment: resume.sh goes on then
# --dry-run                   print the commands, run nothing
#
# It returns when the request is in the queue; setup.sh waits for the slice.  Billing starts when the slice is there.

set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

TOPOLOGY='' SPOT=''
option() {
    case $1 in
    --topology=*) TOPOLOGY=${1#*=} ;;
    --spot) SPOT=--spot ;;
    *) return 1 ;;
    esac
}
parse "$@"
need --topology "$TOPOLOGY" '--topology=v5e:4x4'

# Those that a type of Google's stands for; v5p types count two cores a chip.
case $TOPOLOGY in
v5e:1x1 | v5e:2x2 | v5e:2x4 | v5e:4x4 | v5e:4x8 | v5e:8x8 | v5e:8x16 | v5e:16x16)
    type=v5litepod runtime=v2-alpha-tpuv5-lite cores=1
    ;;
v6e:1x1 | v6e:2x2 | v6e:2x4 | v6e:4x4 | v6e:4x8 | v6e:8x8 | v6e:8x16 | v6e:16x16)
    type=v6e runtime=v2-alpha-tpuv6e cores=1
    ;;
v5p:2x2x1 | v5p:2x2x2 | v5p:2x2x4 | v5p:2x4x4 | v5p:4x4x4)
    type=v5p runtime=v2-alpha-tpuv5 cores=2
    ;;
*) fail "--topology=$TOPOLOGY: expected v5e or v6e with 1x1 to 16x16, or v5p with 2x2x1 to 4x4x4, as v5e:4x4" 2 ;;
esac
chips=$(($(printf '%s' "${TOPOLOGY#*:}" | sed 's/x/*/g')))

run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --project="$PROJECT" --zone="$ZONE" \
    --accelerator-type="$type-$((chips * cores))" --runtime-version="$runtime" ${SPOT:+"$SPOT"}
