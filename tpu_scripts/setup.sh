#!/bin/sh
# Waits for a slice, and readies all its workers: the shared file system, this commit of the repository, Python 3.11,
# bubblewrap for the programs of code problems.
#
#     tpu_scripts/setup.sh --project=P --zone=Z --name=N [--nfs=ADDRESS:/SHARE | --bucket=B]
#
# --project, --zone, --name   as in create.sh (or PROJECT, ZONE, NAME)
# --nfs                       the Filestore share that /mnt/exprl is to be, for instance 10.0.0.2:/share
# --bucket                    a bucket with hierarchical namespace instead, mounted with gcsfuse
# --poll                      seconds between two looks at the queue, 60
# --dry-run                   print the commands, run nothing
#
# Workdirs lie on /mnt/exprl: what all hosts see and what outlives the slice.  A slice of one host can do without, with
# a workdir elsewhere, which goes with it.  Changes that are not committed stay behind.  Packages are those of the first
# slice that this file system saw.  Last, all workers count the chips together.  A slice that has a run is left as it
# is; one that was set up before may be set up again.

set -eu
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

NFS='' BUCKET='' POLL=60
option() {
    case $1 in
    --nfs=* | --bucket=*) mount_option "$1" ;;
    --poll=*) POLL=${1#*=} ;;
    *) return 1 ;;
    esac
}
parse "$@"

# An apt that waits for the updates of a machine's first minutes.
apt='sudo apt-get -o DPkg::Lock::Timeout=600'
install="$apt install -y -q"
mount=''
if [ -n "$NFS" ]; then
    # No locks on the server: a preempted worker would hold its workdir's for ever.  No cached names or sizes: a worker
    # must see what another has just written.
    options=vers=3,hard,nolock,actimeo=0,lookupcache=none
    mount="$install nfs-common && sudo mount -t nfs -o $options $(quote "$NFS") /mnt/exprl \
&& sudo chmod a+rwx /mnt/exprl"
elif [ -n "$BUCKET" ]; then
    # Names and sizes as above.  Staged writes: of a streamed one nothing is in the bucket before the file is closed.
    caches='--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --enable-streaming-writes=false'
    packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    mount="curl -sSf $packages/doc/apt-key.gpg | sudo tee $key >/dev/null \
&& echo \"deb [signed-by=$key] $packages gcsfuse-\$(lsb_release -cs) main\" \
| sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null && sudo apt-get update -q && $install gcsfuse \
&& sudo chown \"\$(id -u)\" /mnt/exprl && gcsfuse $caches $(quote "$BUCKET") /mnt/exprl"
    renames='value(hierarchicalNamespace.enabled)'
    described=$(run gcloud storage buckets describe "gs://$BUCKET" --raw --format="$renames")
    if [ -n "$DRY_RUN" ]; then
        printf '%s\n' "$described"
    elif [ "$described" != True ]; then
        fail "--bucket=$BUCKET: expected a bucket with hierarchical namespace, whose folders are renamed in one piece"
    fi
fi

if [ -n "$DRY_RUN" ]; then
    queued_resources
    nodes
else
    failures=0
    while :; do
        if state=$(slice_state); then
            failures=0
        else
            failures=$((failures + 1)) state=UNKNOWN
            [ "$failures" -lt 10 ] || fail "gcloud cannot say in what state $NAME is; it failed ten times in a row"
        fi
        case $state in
        ACTIVE) break ;;
        ABSENT | FAILED | SUSPENDING | SUSPENDED | LOST) fail "$NAME is $state; delete.sh and create.sh ask again" ;;
        esac
        echo "$NAME is $state" >&2
        sleep "$POLL"
    done
fi

# Before anything changes on any worker: what is installed anew would be taken away from under a run.
[ -z "$mount" ] || mount="sudo mkdir -p /mnt/exprl; mountpoint -q /mnt/exprl || { $mount; }"
on_workers all "set -e
flock -s -n $LOCK true || { echo \"a run is under way: \$(cat $LOCK)\" >&2; exit 1; }
$mount"
make_scratch "${TMPDIR:-/tmp}"
run git -C "$here/.." archive --format=tar.gz --output="$SCRATCH/exprl_jax.tar.gz" HEAD
run gcloud compute tpus tpu-vm scp "$SCRATCH/exprl_jax.tar.gz" "$NAME:" --project="$PROJECT" --zone="$ZONE" --worker=all
# Later set-ups on one file system take the packages of the first that counted its chips, however fresh newer ones are.
versions=/mnt/exprl/exprl_jax_requirements.txt
# The image's own Python is older than the package's, so uv brings one: the version that compile_check was run with.
on_workers all "set -e
$apt update -q
$install bubblewrap libseccomp2
rm -rf exprl_jax
mkdir exprl_jax
tar -xzf exprl_jax.tar.gz -C exprl_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python=3.11 exprl_jax_env
python3 -m uv pip install --quiet --python=exprl_jax_env/bin/python -r exprl_jax/requirements.txt 'jax[tpu]' \
    \$([ ! -f $versions ] || echo --constraints=$versions)"
on_workers all "exprl_jax_env/bin/python -c 'import jax
jax.distributed.initialize()
print(f\"worker {jax.process_index()} of {jax.process_count()}: {jax.device_count()} chips\")'"
if [ -n "$mount" ]; then
    on_workers 0 "[ -f $versions ] ||
{ python3 -m uv pip freeze --python=exprl_jax_env/bin/python >$versions.part && mv $versions.part $versions; }"
fi
