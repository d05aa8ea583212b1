#!/bin/sh
# Starts a run on all workers of a slice, or goes on with it; it does not need this connection to live.  A slice that
# has a run already is left as it is.
#
#     tpu_scripts/launch.sh --project=P --zone=Z --name=N --config=configs/stage1.py --workdir=/mnt/exprl/runs/outcome \
#         [-- --config.KEY=VALUE ...]
#
# --project, --zone, --name   as in create.sh (or PROJECT, ZONE, NAME)
# --config                    the experiment, a file of the repository, optionally with :arm
# --workdir                   absolute, on the file system that all workers share; starting again in it resumes; one on
#                             /mnt/exprl is refused while nothing is mounted there
# --dry-run                   print the commands, run nothing
#
# What follows -- goes to python -m exprl_jax.main as it is.  Output is in ~/runs<workdir>/log on each worker (logs.sh).

set -eu
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

CONFIG='' WORKDIR=''
option() {
    case $1 in
    --config=*) CONFIG=${1#*=} ;;
    --workdir=*) WORKDIR=${1#*=} ;;
    --) ;;
    *) return 1 ;;
    esac
}
parse "$@"
need --config "$CONFIG" '--config=configs/stage1.py'
need --workdir "$WORKDIR" '--workdir=/mnt/exprl/runs/outcome'
need_absolute --workdir "$WORKDIR"

program=$(program "$WORKDIR" "$CONFIG")
# The lock belongs to the shell that waits for the program, not to the program's own children, and goes with it however
# it ends.  That shell writes how the program ended, unless the machine goes down: then nothing is written.  The TERM
# that asks the program to stop may reach it too, and does not end it: it waits until the program has saved.  A program
# that was asked to stop, and saved, has not ended its run: it ends with 0, says so after what the log held before, and
# counts as killed (143).
# shellcheck disable=SC2016 # for the worker's shell
wait='trap : TERM
before=$(wc -c <"$0"/log)
{ '$program'; } 9>&-
code=$?
[ $code -ne 0 ] || ! tail -c +$((before + 1)) "$0"/log | grep -q "^stopped" || code=143
echo $code >"$0"/status'
mounted=''
case $WORKDIR in
/mnt/exprl | /mnt/exprl/*)
    mounted='mountpoint -q /mnt/exprl ||
{ echo "nothing is mounted on /mnt/exprl; give setup.sh --nfs or --bucket" >&2; exit 1; }'
    ;;
esac
on_workers all "set -eu
$mounted
cd exprl_jax
run=$(records_of "$WORKDIR")
mkdir -p \"\$run\"
exec 9>>$LOCK
flock -w 1 9 || { echo \"a run is under way: \$(cat $LOCK)\" >&2; exit 1; }
rm -f \"\$run\"/status
printf '%s\n' $(quote "$program") | tee $LOCK >\"\$run\"/command
nohup sh -c $(quote "$wait") \"\$run\" >>\"\$run\"/log 2>&1 </dev/null &"
