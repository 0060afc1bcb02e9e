"""A run of the toy that is killed again and again, and goes on each time with the same command.

    python tests/kill_run.py --workdir=DIR [--kills=20] [--seed=0] [--config.key=VALUE ...]

Prints where each kill met it. Every start is a fork of this process, which has imported everything
and touched no device, so that a start takes a second and not six.
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import toy_run

from point_jax.training.metrics import read_metrics

SAVING = "orbax-checkpoint-tmp"


def begin(arguments):
    """The run in a child; its output goes nowhere, its errors here."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = toy_run.main(["toy", f"--config={toy_run.__file__}", *arguments])
    finally:
        os._exit(code)


def last_step(workdir):
    lines = read_metrics(workdir)
    return lines[-1]["step"] if lines else 0


def met(workdir):
    """What a kill has interrupted."""
    checkpoints = workdir / "checkpoints"
    names = [entry.name for entry in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return "a save" if any(SAVING in name for name in names) else "steps"


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    told, rest = parser.parse_known_args(argv)
    arguments, chance = [f"--workdir={told.workdir}", *rest], random.Random(told.seed)
    for number in range(1, told.kills + 1):
        before, child = last_step(told.workdir), begin(arguments)
        wait, starting = chance.random(), chance.random() < 0.25
        goal = before + chance.randint(1, 16)
        if not starting:
            while last_step(told.workdir) < goal:
                time.sleep(0.005)
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    raise SystemExit(f"ended by itself at start {number}: {status}")
        time.sleep(wait if starting else wait / 10)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"finished before kill {number}")
        where = "its start" if starting else met(told.workdir)
        print(f"kill {number} in {where}, step {last_step(told.workdir)}", flush=True)
    _, status = os.waitpid(begin(arguments), 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
