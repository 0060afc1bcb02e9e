#!/usr/bin/env bash
# Pretraining on several GPU nodes under SLURM.
#
#   sbatch --nodes=4 launch/scripts/slurm.sh --config=configs/sonata.py:base --workdir=/shared/runs/base
#
# Everything after the script's name goes to launch.train. Submit from the repository's root.
#
#SBATCH --job-name=point_jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1        # one process a node: it drives all GPUs of the node
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32         # threads that load scenes, and XLA's compiler
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300          # 5 minutes before the time is over: save and end with 143
#SBATCH --requeue                  # after a node's failure SLURM queues the job again by itself
#SBATCH --open-mode=append         # one log over all restarts
#SBATCH --output=point_jax-%j.log
#
# Adapt: partition and account (#SBATCH --partition=, --account=), and how Python is found (below).
# --workdir and the scenes must be on a file system that all nodes see.
#
#   MAX_RESTARTS=50   times that the job is queued again
#   VENV=.venv        folder of the virtual environment; empty: python as it is found
set -u

venv=${VENV-.venv}
max=${MAX_RESTARTS:-50}
if [ -n "$venv" ]; then
  # shellcheck disable=SC1091
  source "$venv/bin/activate" || exit 1
fi

# Programs that were compiled once are found again after a restart. On node-local disks every node
# keeps its own; a shared folder serves all.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/point_jax}

# JAX takes this share of a GPU's memory, 0.75 if it is not told.
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92}

# srun does not take --cpus-per-task over by itself, from SLURM 22.05 on.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# JAX finds the other processes from SLURM's variables, which only `srun` sets. --kill-on-bad-exit:
# when a process dies the others are ended at once, not after a minute of waiting for it. They end by
# a signal then, and srun with its number (143, 137), whatever the first one's error was: that is in
# its messages ("srun: error: node7: task 3: Exited with exit code 1").
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
{
  srun --kill-on-bad-exit=1 python -u -m launch.train "$@" 2>&1 >&3 | tee "$messages" >&2
  code=${PIPESTATUS[0]}
} 3>&1
told=$(sed -nE 's/^srun: error: .*Exited with exit code (1|2|126|127|130)$/\1/p' "$messages" | head -n 1)

case ${told:-$code} in
  0) exit 0 ;;
  1 | 2 | 126 | 127 | 130)
    echo "slurm.sh: launch.train ended with ${told:-$code}: see its error above" >&2
    exit "${told:-$code}"
    ;;
esac
# 143: stopped by SIGTERM and saved. Others: a process was killed (137: SIGKILL, perhaps out of
# memory; 134: it lost the others). The job goes on from the newest checkpoint.
restarts=${SLURM_RESTART_COUNT:-0}
if ((restarts >= max)); then
  echo "slurm.sh: exit code $code after $restarts restarts, giving up" >&2
  exit "$code"
fi
echo "slurm.sh: exit code $code, queueing again (restart $((restarts + 1)))" >&2
scontrol requeue "$SLURM_JOB_ID"
