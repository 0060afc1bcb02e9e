#!/usr/bin/env bash
# Pretraining on the TPU VMs of a slice, by ssh. All hosts run the same command; they find one
# another by the slice's metadata.
#
#   export NAME=sonata ZONE=us-west4-a TYPE=v5litepod-32 RUNTIME=v2-alpha-tpuv5-lite
#   launch/scripts/tpu_vm.sh create
#   launch/scripts/tpu_vm.sh install            # copies this repository and installs it, on all hosts
#   launch/scripts/tpu_vm.sh start --config=configs/sonata.py:base --workdir=/shared/runs/base
#   launch/scripts/tpu_vm.sh log                # of host 0; it alone prints the metrics
#   launch/scripts/tpu_vm.sh stop               # SIGTERM on all hosts: they save the same step
#   launch/scripts/tpu_vm.sh delete
#
# TYPE and RUNTIME belong together: v5litepod-* v2-alpha-tpuv5-lite, v5p-* v2-alpha-tpuv5,
# v6e-* v2-alpha-tpuv6e, v4-* tpu-ubuntu2204-base. SPOT=1 asks for a slice that may be taken away.
# --workdir must be a folder that all hosts see (Filestore, NFS) or gs://bucket/folder, as scenes, see
# docs/scaling.md. A slice that was taken away and created anew: install and start again, the run goes
# on.
set -eu

name=${NAME:?NAME= of the slice}
zone=${ZONE:?ZONE= of the slice}
root=$(cd "$(dirname "$0")/../.." && pwd)

tpu() {
  local what=$1
  shift
  gcloud compute tpus tpu-vm "$what" "$@" --zone="$zone"
}

on_all() { tpu ssh "$name" --worker=all --command="$1"; }

# For a host: the end of a command line where a run is going on.
if_none_runs="if kill -0 \$(cat point_jax/keep_running.pid 2>/dev/null) 2>/dev/null; then
  echo 'tpu_vm.sh: a run is going on here; stop it first' >&2
  exit 1
fi"

action=${1:-}
[ $# -gt 0 ] && shift
case $action in
  create)
    tpu create "$name" --accelerator-type="${TYPE:?TYPE= as in v5litepod-32}" \
      --version="${RUNTIME:?RUNTIME= as in v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
    ;;
  install)
    on_all "$if_none_runs"
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    tpu scp "$archive" "$name:point_jax.tar.gz" --worker=all
    on_all "rm -rf point_jax && mkdir point_jax && tar -xzf point_jax.tar.gz -C point_jax &&
      python3 -m venv venv && venv/bin/pip install -q -e 'point_jax[tpu,gcs]'"
    ;;
  start)
    printf -v arguments ' %q' "$@"
    # setsid: it outlives the connection. keep_running.sh starts it again when a host was lost.
    on_all "$if_none_runs
      cd point_jax || exit 1
      setsid nohup launch/scripts/keep_running.sh ../venv/bin/python -u -m launch.train$arguments \
        >> ../train.log 2>&1 < /dev/null &
      echo \$! > keep_running.pid"
    ;;
  log) tpu ssh "$name" --worker=0 --command="tail -n 100 -f train.log" ;;
  stop) on_all "kill -TERM \$(cat point_jax/keep_running.pid)" ;;
  delete) tpu delete "$name" ;;
  *)
    echo "tpu_vm.sh: '$action': expected create, install, start, log, stop or delete" >&2
    exit 2
    ;;
esac
