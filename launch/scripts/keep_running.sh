#!/usr/bin/env bash
# Runs a command until it has finished, again after whatever may not happen a second time.
#
#   launch/scripts/keep_running.sh python -m launch.train --config=... --workdir=...
#
# launch.train ends with 0 when the run is finished, with 1 after an error that it told, with 143
# when SIGTERM came and it has saved. Killed processes end with 128 + signal (137: SIGKILL, perhaps
# out of memory), and the others of their job soon after. The same command goes on from the newest
# checkpoint.
#
#   MAX_RESTARTS=20   starts after the first
#   PAUSE=15          seconds before each: the other hosts must have noticed, too
set -u

max=${MAX_RESTARTS:-20}
pause=${PAUSE:-15}
if (($# == 0)) || [[ ! $max$pause =~ ^[0-9]+$ ]]; then
  echo "usage: [MAX_RESTARTS=20] [PAUSE=15] keep_running.sh COMMAND..., both whole numbers" >&2
  exit 2
fi

child=
stopped=
# SIGTERM is for the command and ends this loop: whoever stops the machine starts it again.
trap 'stopped=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM INT

for ((start = 0; ; start++)); do
  "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # the signal ended `wait`: the command is still saving
    wait "$child"
    code=$?
  done
  case $code in
    0 | 1 | 2 | 126 | 127 | 130) exit "$code" ;; # finished, or an error that would come again
  esac
  [ -n "$stopped" ] && exit "$code"
  if ((start >= max)); then
    echo "keep_running: exit code $code after $max restarts, giving up" >&2
    exit "$code"
  fi
  echo "keep_running: exit code $code, start $((start + 2)) in $pause s" >&2
  for ((waited = 0; waited < pause; waited++)); do # a trap waits for `sleep`
    sleep 1
    [ -n "$stopped" ] && exit "$code"
  done
done
